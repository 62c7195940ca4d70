# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [profile]
#       laptop/falcon: [bf16, fp32]
#       laptop/falcon_draft: [fp32]
#     work:  # counted by tests/notebooks/test_work.py; what the laptop's own models do is not declared
#       falcon:
#         - {load: 1}
#         - {reply: 4, tokens: max_new_tokens, prompt: 10}
#         - {reply: 4, tokens: 25, prompt: 10}
#         - {read: 6, tokens: 10}
#     parameters:
#       seed: {least: 0, most: 4294967295}
#       prompt: {blank: false}
#       max_new_tokens: {least: 2, most: 2048}
# ---

# %% [markdown]
# # 01 · Loading: from a checkpoint to the first sentence
#
# **You will learn**
# - to load a Falcon checkpoint with plain transformers, and to check that you got what you asked for;
# - where Falcon-180B's parameters are, and how its 80 layers are placed on several GPUs;
# - what temperature and top-p do to the model's own next-token probabilities;
# - to stream a reply, and to read its timings;
# - what the KV cache holds, with and without the benefit of multi-query attention;
# - how several tokens can come out of one pass, and when that saves time.
#
# **Before:** [00 · Start here](00_start_here.ipynb) · **Next:** [02 · Quantization](02_quantization.ipynb) · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
prompt = "My name is Pedro, I live in"
max_new_tokens = 50

# %%
from helpers import exercises, figures, generation, machine, models, runs, speed
from helpers.base import known
from helpers.generation import Decoding, Sampling
from helpers.runs import Measured

notebook_name = "01_loading"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · Load
#
# The announcement asks for transformers 4.33 or later (A24), acceptance of the licence, and a login with `huggingface-cli login`.
# (The models of the laptop profile need no login.) Try it as printed, and you find that the command is gone. Which commands does
# the library of today install?

# %%
from importlib import metadata

library = metadata.distribution("huggingface_hub")
installed = {entry.name for entry in library.entry_points if entry.group == "console_scripts"}
for command, login in {"huggingface-cli": "huggingface-cli login", "hf": "hf auth login"}.items():
    state = "installed" if command in installed else "not installed"
    print(f"{login}: {command} is {state} by huggingface_hub {library.version}")

# %% [markdown]
# After `hf auth login`, a few lines load the model. `device_map="auto"` spreads the layers over the GPUs of this machine, and
# `dtype` keeps the weights in bf16. (The announcement writes `torch_dtype`, its old name. Notebook 02, section 4, tries the
# announcement's other options as they are printed.) The same lines would load the 360 GB of Falcon-180B. But 360 GB should be read
# once, and the helper below does that, in the profile's precision. So if the profile's model comes from the hub, this cell loads its
# [stand-in](GLOSSARY.md#stand-in) of the laptop profile.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

stand_in = models.load_profile("laptop").falcon
chosen = stand_in if settings.falcon.source == "hub" else settings.falcon
checkpoint = models.resolve(chosen)  # its folder on this machine
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="auto")
print(type(model).__name__, f"with {model.num_parameters():,} parameters in {model.dtype}")
library_code = type(model).__module__.startswith("transformers.")
print("the code is the library's own, not the repository's:", library_code)

# %% [markdown]
# Did everything arrive? transformers initialises a missing weight at random and only warns. `models.load` refuses. It checks that
# no weight is missing or left over, that each has the requested type and device, that the files are
# [safetensors](GLOSSARY.md#safetensors), and that no code of the repository is run. Then it reports what it loaded.

# %%
import gc

del model
gc.collect()
torch.cuda.empty_cache()
loaded = models.load(settings.falcon, settings.precision)
tokenizer = loaded.tokenizer  # the lines above may have loaded a stand-in
library_code = type(loaded.model).__module__.startswith("transformers.")
models.report_table(loaded)

# %% tags=["record"]
by_library = Measured(library_code, claim="A24", agrees=library_code, model=settings.falcon.label)
values = {"loaded_by_transformers": by_library}
values["parameters"] = Measured(loaded.report.parameters, "parameters")
values["stored"] = Measured(loaded.report.stored_bytes, "bytes")
runs.record_all(values)

# %% [markdown]
# ## 2 · Anatomy
#
# This is one decoder layer of the loaded model. Attention and MLP read the same input side by side (*[parallel
# attention](GLOSSARY.md#parallel-attention)*). In Falcon-40B and 180B, each has its own [layer norm](GLOSSARY.md#layer-norm). No
# linear layer has a bias. `query_key_value` is one matrix; its rows are grouped by key-value head: the query heads of the group,
# one key, one value.

# %%
loaded.model.transformer.h[0]

# %% [markdown]
# Drawn with the sizes of Falcon-180B, from bottom to top: the [residual stream](GLOSSARY.md#residual-stream) goes straight
# through, and the layer adds two results to it.

# %%
published = machine.published_config("tiiuae/falcon-180B")
runs.record_figure("decoder_layer", figures.decoder_layer(published, "Falcon-180B"))

# %% [markdown]
# These settings of the configuration make it so. `alibi` is off: positions are rotary embeddings, not [ALiBi](GLOSSARY.md#alibi).

# %%
flags = ["new_decoder_architecture", "num_ln_in_parallel_attn", "parallel_attn"]
flags += ["multi_query", "alibi", "bias"]
sizes = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "vocab_size"]
print(f"{'':26} {'180B':>8} {'loaded':>8}")
for key in flags + sizes:
    print(f"{key:26} {getattr(published, key)!s:>8} {getattr(loaded.model.config, key)!s:>8}")

# %% [markdown]
# 180B's file does not set `num_ln_in_parallel_attn`; the default of the new architecture is 2, the same value. Where are the 180
# billion parameters?

# %%
anatomy = machine.parameter_table(published)
mlp = anatomy.loc[["mlp up", "mlp down"], "share"].sum()
runs.record_figure("anatomy", figures.parameter_breakdown(anatomy, "Falcon-180B"))

# %% [markdown]
# Four fifths are in the MLPs. The keys and values of attention, the part that [multi-query
# attention](GLOSSARY.md#multi-query-attention) shrinks, are 0.7% of all: 80 layers of 2 · 8 heads · 64 by 14848 weights, inside
# the bar *attention qkv*.

# %% [markdown]
# ## 3 · On several GPUs
#
# accelerate can plan a placement on the [meta device](GLOSSARY.md#meta-device), without any GPU. Layers may not be split (a
# residual stream would have to move between devices), so it needs the name of the layer class.

# %%
import logging

from accelerate import infer_auto_device_map, init_empty_weights
from transformers import FalconForCausalLM

logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # it warns of absent GPUs
with init_empty_weights():
    empty = FalconForCausalLM(published).to(torch.bfloat16)
empty.tie_weights()
limits = dict.fromkeys(range(8), "72GiB")
layer_class = ["FalconDecoderLayer"]
device_map = infer_auto_device_map(empty, max_memory=limits, no_split_module_classes=layer_class)
{device: sum(d == device for d in device_map.values()) for device in limits}

# %% [markdown]
# accelerate fills one GPU after another: three stay empty, and the first five have little memory left for the cache.
# `machine.place` also counts the cache of each layer and balances the load.

# %%
placement = machine.place(published, "bf16", gpus=[80e9] * 8)
gpus = [gpu for name, gpu in placement.device_map.items() if ".h." in name]  # of each layer
most = max(map(gpus.count, gpus))  # layers on one GPU
print("fits" if placement.fits else f"does not fit: it {placement.shortfall}")
memory = dict.fromkeys(range(8), 80e9)
figure = figures.placement(placement, memory, "Falcon-180B in bf16 on 8x A100 80GB")
runs.record_figure("placement", figure)

# %% [markdown]
# ## 4 · Generate
#
# This is the announcement's example with its settings: [temperature](GLOSSARY.md#temperature) 0.6, [top-p](GLOSSARY.md#top-p)
# 0.9, 50 new tokens (A25). First in plain transformers. The call passes two inputs by name, because some tokenizers return a
# third that Falcon refuses.

# %%
torch.manual_seed(seed)
inputs = tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
with torch.inference_mode():
    output = loaded.model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
        do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=max_new_tokens,
    )  # fmt: skip
print(tokenizer.decode(output[0]))

# %% [markdown]
# `generation.generate` returns the reply with its timings and the reason why it ended. The same seed gives the same text. (It
# samples with temperature and top-p alone; plain `generate` also keeps only the 50 most likely tokens, its default `top_k`.)

# %%
sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=max_new_tokens, seed=seed)
reply = generation.generate(loaded, prompt, sampling)
again = generation.generate(loaded, prompt, sampling)
print(prompt + reply.text)
print(f"\n{reply.tokens} tokens, ended by {reply.finish_reason!r}")
print("same seed, same text:", reply.text == again.text)

# %% [markdown]
# In the article, Falcon-180B made Pedro a 25-year-old graphic designer from Portugal. What the model here makes of him depends on
# the model and on the seed:

# %%
import pandas as pd

replies = []
for number in range(4):
    short = Sampling(max_new_tokens=25, seed=number)
    replies.append(generation.generate(loaded, prompt, short).text)
pd.DataFrame({"continuation": replies}).rename_axis("seed")

# %% tags=["record"]
label = settings.falcon.label
values = {"pedro_repeatable": Measured(reply.text == again.text, claim="A25", model=label)}
values["pedro_tokens"] = Measured(reply.tokens, "tokens", "A25", model=label)
values["first_token"] = Measured(round(reply.first_token_seconds, 4), "s")
speed_of_reply = known(reply.tokens_per_second, "none: the reply has no second token", 1)
values["decoding_speed"] = Measured(speed_of_reply, "tokens/s")
runs.record_all(values)

# %% [markdown]
# ## 5 · What temperature does
#
# A model gives each token of its vocabulary a score (*[logit](GLOSSARY.md#logit)*). [Softmax](GLOSSARY.md#softmax) turns the
# scores into probabilities. Before that, the scores are divided by the *temperature*: below 1 it sharpens the probabilities,
# above 1 it flattens them. In plain PyTorch:

# %%
ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.model.device)
with torch.inference_mode():
    logits = loaded.model(ids).logits[0, -1].float()
probabilities = (logits / 0.6).softmax(-1)
best = probabilities.topk(5)
for token, probability in zip(best.indices, best.values, strict=True):
    print(f"{tokenizer.decode([token])!r}: {probability:.3f}")

# %%
temperatures = (0.3, 0.6, 1.0, 1.5)
candidates = {}
for t in temperatures:
    candidates[t] = generation.next_token_probabilities(loaded, prompt, k=8, temperature=t)
figure = figures.next_token_probabilities(candidates, settings.falcon.label)
runs.record_figure("temperature", figure)

# %% [markdown]
# *Top-p* keeps the most likely tokens until their probabilities add up to p, and samples from these. How many tokens does it
# keep?


# %%
def kept(probabilities: torch.Tensor, p: float) -> int:
    return int((probabilities.sort(descending=True).values.cumsum(0) < p).sum()) + 1


tops = (0.5, 0.9, 0.99)
kept_tokens = {}
for t in temperatures:
    kept_tokens[t] = [kept((logits / t).softmax(-1), p) for p in tops]
columns = [f"top-p {p}" for p in tops]
pd.DataFrame.from_dict(kept_tokens, orient="index", columns=columns).rename_axis("temperature")

# %% [markdown]
# ## 6 · Stream
#
# A reader wants to see words as they come. `generation.stream` yields pieces of text; joined, they are exactly the reply of
# `generate`. The times show that the first token is different: it waits for the whole prompt (*[prefill](GLOSSARY.md#prefill)*).

# %%
import time

start, times = time.perf_counter(), []
for piece in generation.stream(loaded, prompt, sampling):
    times.append(time.perf_counter() - start)
    print(piece, end="", flush=True)

# %%
runs.record_figure("token_times", figures.token_times(times, settings.falcon.label))

# %% [markdown]
# ## 7 · The size of the cache
#
# Multi-query attention has few keys and values, so the cache could be small. transformers computes the few key-value heads, but
# copies each of them to every query head of its group *before* storing them. We measure this with Falcon-180B's own shape, on the
# meta device, where a tensor has a size but no content:


# %%
def cache_size(model, tokens: int = 4) -> tuple[tuple, int]:
    row = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        layers = model(input_ids=row, use_cache=True).past_key_values.layers
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return tuple(layers[0].keys.shape), stored // tokens


with torch.device("meta"):
    library = FalconForCausalLM(published).to(torch.bfloat16)
shape, library_bytes = cache_size(library)
print(f"(batch, heads, tokens, head size): {shape}, {library_bytes:,} bytes per token")

# %% [markdown]
# `models.grouped_cache` builds Falcon with an attention that stores only the key-value heads; all query heads of a group read the
# same one. `models.load` builds every Falcon like this, unless you pass `grouped_cache=False`.

# %%
with models.grouped_cache(), torch.device("meta"):
    grouped = FalconForCausalLM(published).to(torch.bfloat16)
shape, grouped_bytes = cache_size(grouped)
print(f"(batch, heads, tokens, head size): {shape}, {grouped_bytes:,} bytes per token")
loaded_bytes = cache_size(loaded.model)[1]
print(f"the model loaded here: {loaded_bytes:,} bytes per token")

# %% [markdown]
# The results stay the same. We compare them in fp32, where rounding does not blur the comparison:

# %%
library = models.load(stand_in, "fp32", grouped_cache=False)
grouped = models.load(stand_in, "fp32")
row = grouped.tokenizer(prompt, return_tensors="pt")["input_ids"].to(grouped.model.device)
with torch.inference_mode():
    difference = library.model(row.to(library.model.device)).logits - grouped.model(row).logits
distance = difference.abs().max().item()
print(f"{stand_in.label}: the logits differ by at most {distance:.1e}")

# %% [markdown]
# And the speed? A decoding step reads the whole cache, and transformers also copies it. A Falcon with random weights, 64 query
# heads and 4 key-value heads decodes one token after contexts of several lengths. Both caches are filled with random numbers.

# %%
from transformers import FalconConfig

narrow = FalconConfig(
    vocab_size=4096, hidden_size=1024, num_hidden_layers=4, num_attention_heads=64, num_kv_heads=4,
    new_decoder_architecture=True,
)  # fmt: skip
rows = speed.compare_caches(narrow, contexts=(128, 512, 1900), batch_sizes=(1, 4), repeats=3)
last = {row.cache: row.tokens_per_second for row in rows}  # the last rows: batch 4, 1900 tokens
ratio = last["grouped"] / last["library"]
print(f"at batch 4 and 1900 tokens: {ratio:.1f} times as fast")
subject = "a Falcon of random weights, 4 layers, 64 query and 4 key-value heads, bf16, CPU"
runs.record_figure("cache_speed", figures.cache_speed(rows, subject))

# %% tags=["record"]
smaller, shape = library_bytes / grouped_bytes, "tiiuae/falcon-180B (shape only)"
slow, fast = round(last["library"], 1), round(last["grouped"], 1)
random = "a Falcon of random weights, batch 4, 1900 tokens"
values = {"cache_bytes_grouped": Measured(grouped_bytes, "bytes/token", "A8", model=shape)}
by_29 = smaller == 29
values["cache_times_smaller"] = Measured(smaller, "times", "A8", agrees=by_29, model=shape)
values["speed_library_cache"] = Measured(slow, "tokens/s", "A8", model=random)
values["speed_grouped_cache"] = Measured(fast, "tokens/s", "A8", agrees=fast > slow, model=random)
values["cache_bytes_per_token"] = Measured(loaded_bytes, "bytes/token")
values["grouped_logits_differ"] = Measured(distance, tolerance=1e-5, model=stand_in.label)
runs.record_all(values)

# %% [markdown]
# ## 8 · Fewer passes, the same text
#
# A pass of the model reads all its weights, whether it processes one new token or six. So several tokens can be *proposed* and
# checked in one pass; with [greedy decoding](GLOSSARY.md#greedy-decoding) the text stays the same. What this saves is passes.
# *[Prompt lookup](GLOSSARY.md#prompt-lookup)* looks for an earlier occurrence of the last two tokens and proposes whatever
# followed it. In plain transformers it is one option:

# %%
story = "The dog ran to the red house. The cat ran to the red house. The bird"
row = grouped.tokenizer(story, return_tensors="pt")["input_ids"].to(grouped.model.device)
options = {"attention_mask": torch.ones_like(row), "do_sample": False, "max_new_tokens": 40}
plain = grouped.model.generate(row, **options)
lookup = grouped.model.generate(row, **options, prompt_lookup_num_tokens=5)
n = min(plain.shape[1], lookup.shape[1])
print("the same tokens:", torch.equal(plain[:, :n], lookup[:, :n]))

# %% [markdown]
# In *[speculative decoding](GLOSSARY.md#speculative-decoding)* a small model proposes. For Falcon-180B this could be Falcon-7B,
# which has the same vocabulary; here a Falcon of one layer drafts for one of eight. Pass the method to `generation.generate` as
# `decoding`; the reply counts passes and accepted proposals.

# %%
draft = models.load(models.load_profile("laptop").falcon_draft, "fp32")
methods = {"plain": Decoding(), "prompt lookup": Decoding("lookup")}
methods["speculative"] = Decoding("speculative", draft, 3)
greedy_sampling = Sampling(temperature=0, max_new_tokens=60)
expected = generation.generate(grouped, story, greedy_sampling)
table = {}
for name, method in methods.items():
    reply = generation.generate(grouped, story, greedy_sampling, decoding=method)
    row = {"tokens": reply.tokens, "passes": reply.passes}
    row["passes saved"] = 1 - reply.passes / reply.tokens
    row["accepted"], row["tokens/s"] = reply.acceptance_rate, reply.tokens_per_second
    row["same text"] = reply.text == expected.text
    table[name] = row
pd.DataFrame.from_dict(table, orient="index").round(2)

# %% [markdown]
# Do fewer passes take less time? In these miniatures hardly: they spend most of a pass outside their weights, and a draft of one
# layer costs more than an eighth of its model. (Each speed is of one reply, so a few percent mean nothing.) In Falcon-180B,
# reading the weights is most of a pass, and Falcon-7B has few of them. If a pass takes as long as its weights are large, and if
# Falcon-7B were right as often as the draft here, then:

# %%
sizes = [machine.published_config(f"tiiuae/falcon-{size}") for size in ("7b", "180B")]
small, large = map(machine.count_parameters, sizes)
speculative = table["speculative"]
cost = speculative["passes"] * (1 + 3 * small / large)  # each pass checks three tokens of the draft
would_be = speculative["tokens"] / cost
faster = [n for n, r in table.items() if r["tokens/s"] > 1.2 * table["plain"]["tokens/s"]]
print(f"Falcon-7B has {small / large:.1%} of Falcon-180B's parameters.")
print(
    f"{speculative['tokens']} tokens would take the time of {cost:.1f} passes: {would_be:.1f} times as fast"
)
print("At least a fifth faster here, in this run:", ", ".join(faster) or "none")

# %% [markdown]
# A third method, `Decoding("compiled")`, compiles the pass, which takes about a minute the first time. `workbook bench` measures
# all of them and compares them with other engines.

# %% tags=["record"]
values = {"draft_acceptance": Measured(round(table["speculative"]["accepted"], 2), tolerance=0.1)}
for name in ("prompt lookup", "speculative"):
    saved = Measured(round(table[name]["passes saved"], 3), "of plain's", tolerance=0.05)
    values[f"passes_saved_{name.replace(' ', '_')}"] = saved
values["same_text_by_all_methods"] = all(row["same text"] for row in table.values())
runs.record_all(values, model=stand_in.label)

# %% [markdown]
# ## What you saw
#
# A load is only as good as its check. The answers to the goals at the top, with the numbers of this run:

# %%
stream = "no piece came"  # as from the random models of a rehearsal
if times:
    pause = (times[-1] - times[0]) / max(1, len(times) - 1)
    stream = f"{times[0]:.3f} s to the first piece, then {pause:.3f} s for each"
few, many = kept_tokens[0.3][1], kept_tokens[1.5][1]
answers = [
    f"Load: {loaded.report.parameters:,} parameters, every one checked.",
    f"Anatomy: {mlp:.0%} of Falcon-180B is in MLPs; a GPU of 8 holds at most {most} of 80 layers.",
    f"Top-p 0.9 keeps {few} of {len(logits):,} tokens at temperature 0.3, and {many} at 1.5.",
    f"Stream: {stream}.",
    f"Cache: {library_bytes:,} bytes per token, or {grouped_bytes:,} if only 8 heads are stored.",
    f"Decode: {speculative['passes']} passes for {speculative['tokens']} tokens, with a draft.",
]
print(*answers, sep="\n")

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("01-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
#
# **1.** What share of a decoder layer's matrix weights is in the MLP? Write a function for any Falcon configuration with the new
# decoder architecture (fields `hidden_size`, `num_attention_heads`, `num_kv_heads`).


# %% tags=["exercise"]
def mlp_share(config) -> float: ...


exercises.check("01-1", mlp_share)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def mlp_share(config) -> float:
#     hidden, head_size = config.hidden_size, config.hidden_size // config.num_attention_heads
#     qkv = hidden * (config.num_attention_heads + 2 * config.num_kv_heads) * head_size
#     mlp = 2 * hidden * 4 * hidden
#     return mlp / (mlp + qkv + hidden * hidden)
#
#
# exercises.check("01-1", mlp_share)
# ```
#
# </details>

# %% [markdown]
# **2.** Write greedy decoding: append the most likely next token `count` times. Return all ids, those of the prompt first. The
# check compares the result with `model.generate`.


# %% tags=["exercise"]
def greedy(model, input_ids: torch.Tensor, count: int) -> torch.Tensor: ...


exercises.check("01-2", greedy)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def greedy(model, input_ids: torch.Tensor, count: int) -> torch.Tensor:
#     for _ in range(count):
#         with torch.inference_mode():
#             best = model(input_ids).logits[:, -1].argmax(-1, keepdim=True)
#         input_ids = torch.cat([input_ids, best], dim=1)
#     return input_ids
#
#
# exercises.check("01-2", greedy)
# ```
#
# </details>

# %% [markdown]
# **3.** Write top-p: given a vector of probabilities, keep the most likely ones until their sum reaches `p`, set the others to
# zero, and divide by the sum of those kept, so that the result sums to one.


# %% tags=["exercise"]
def top_p(probabilities: torch.Tensor, p: float) -> torch.Tensor: ...


exercises.check("01-3", top_p)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def top_p(probabilities: torch.Tensor, p: float) -> torch.Tensor:
#     ordered, order = probabilities.sort(descending=True)
#     before = ordered.cumsum(0) - ordered  # the sum of all more likely tokens
#     kept = torch.zeros_like(probabilities)
#     kept[order[before < p]] = ordered[before < p]
#     return kept / kept.sum()
#
#
# exercises.check("01-3", top_p)
# ```
#
# </details>

# %% [markdown]
# **4. A finding.** When does prompt lookup pay? Find two prompts: after the first, writing 40 tokens takes at most half as many
# passes; after the second, at least 85%. The check asks the loaded model, with greedy decoding.

# %% tags=["exercise"]
two_prompts = ...  # the one that pays, the one that does not

exercises.check("01-4", two_prompts, model=loaded)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# # falcon-mini goes on repeating a sentence, but not single letters. Another model needs other prompts.
# pays = "He said yes. She said yes. He said yes. She said yes. He said"
# does_not = "a b a b a b a b a b a b"
# two_prompts = (pays, does_not)
#
# exercises.check("01-4", two_prompts, model=loaded)
# ```
#
# </details>

# %% [markdown]
# **Before:** [00 · Start here](00_start_here.ipynb) · **Next:** [02 · Quantization](02_quantization.ipynb) · [Glossary](GLOSSARY.md)
