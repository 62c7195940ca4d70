# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [profile, bf16]
#       laptop/falcon: [bf16, fp32]
#       laptop/falcon_draft: [fp32]
# ---

# %% [markdown]
# # 01 · Loading: from a checkpoint to the first sentence
#
# **You will learn**
# - to load a Falcon checkpoint with plain transformers, and to check that what arrived is what you asked for;
# - where Falcon-180B's parameters sit, and how its 80 layers spread over several GPUs;
# - what temperature and top-p do, seen on the model's own next-token probabilities;
# - to stream a reply, and to read its timings;
# - what the KV cache holds, with multi-query attention put to use and without, and how to decode faster.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 30 s | 2 GiB |
# | `1x24gb` | minutes, after a download of 14 GB | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | many minutes, after a download of 360 GB | see notebook 00 |
#
# **Before:** [00 · Start here](00_start_here.ipynb) · **Next:** [02 · Quantization](02_quantization.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
prompt = "My name is Pedro, I live in"
max_new_tokens = 50

# %%
from helpers import exercises, figures, generation, machine, models, runs, speed
from helpers.generation import Sampling

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · Load
#
# The announcement asks for transformers 4.33 or later (A24), a login and a click on the licence; then four lines do it.
# `device_map="auto"` spreads the layers over the GPUs found, and `dtype` keeps the weights in bf16. The same lines load
# the 360 GB of Falcon-180B or the stand-in of this profile. Where bf16 does not fit the machine, this cell takes the stand-in;
# the helper below loads what the profile says, in the precision that the profile says.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

stand_in = models.load_profile("laptop").falcon
too_big = machine.shortfall(models.config(settings.falcon), "bf16", machine.detect())
checkpoint = models.resolve(stand_in if too_big else settings.falcon)
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="auto")
print(type(model).__name__, f"with {model.num_parameters():,} parameters in {model.dtype}")

# %%
own = type(model).__module__.startswith("transformers.")  # not code of the repository
label = (stand_in if too_big else settings.falcon).label
runs.record("loaded_by_transformers", own, claim="A24", model=label, agrees=own)

# %% [markdown]
# Did everything arrive? transformers initialises a missing weight at random and only warns. Our `load` refuses: it checks
# that no weight is missing or left over, that each has the type and device asked for, that files are safetensors, and that
# no code of the repository is run. Then it says what it found.

# %%
import gc

del model
gc.collect()
torch.cuda.empty_cache()
loaded = models.load(settings.falcon, settings.precision)
models.report_table(loaded)

# %%
runs.record("parameters", loaded.report.parameters, "parameters")
runs.record("stored", loaded.report.stored_bytes, "bytes")

# %% [markdown]
# ## 2 · Anatomy
#
# One decoder layer, as it was loaded. Attention and MLP read the same input side by side (*parallel attention*), in Falcon-40B
# and 180B each through its own layer norm, and no linear layer has a bias. `query_key_value` is one matrix whose rows are grouped: for each
# key-value head its query heads, one key, one value.

# %%
loaded.model.transformer.h[0]

# %%
flags = [
    "new_decoder_architecture",
    "num_ln_in_parallel_attn",
    "parallel_attn",
    "multi_query",
    "alibi",
    "bias",
]
sizes = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "vocab_size"]
published = machine.published_config("tiiuae/falcon-180B")
for key in flags + sizes:
    print(f"{key:26} {getattr(published, key)!s:>8} {getattr(loaded.model.config, key)!s:>8}")

# %% [markdown]
# First column Falcon-180B, second the model loaded here. `num_ln_in_parallel_attn` is left open in 180B's file; the new
# architecture's own default is 2, the same. Where do the 180 billion parameters sit?

# %%
anatomy = machine.parameter_table(published)
runs.record_figure("anatomy", figures.parameter_breakdown(anatomy, "Falcon-180B"))

# %% [markdown]
# Four fifths are in the MLPs. Attention's keys and values, the part that multi-query attention shrinks, are 0.7% of all: 80
# layers of 2 · 8 heads · 64 by 14848 weights, inside the bar *attention qkv*.

# %% [markdown]
# ## 3 · Over several GPUs
#
# accelerate can plan a placement on the meta device, without any GPU. Layers may not be split (a residual stream would
# have to cross devices), so it is told the name of the layer class.

# %%
import logging

from accelerate import infer_auto_device_map, init_empty_weights
from transformers import FalconForCausalLM

logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # no word on absent GPUs
with init_empty_weights():
    empty = FalconForCausalLM(published).to(torch.bfloat16)
empty.tie_weights()
limits = dict.fromkeys(range(8), "72GiB")
device_map = infer_auto_device_map(
    empty, max_memory=limits, no_split_module_classes=["FalconDecoderLayer"]
)
{device: sum(d == device for d in device_map.values()) for device in limits}

# %% [markdown]
# It fills one GPU after another: three stay empty, and on the first five weights leave little room for the cache. `memory.place`
# counts each layer's cache beside its weights and levels the load.

# %%
placement = machine.place(published, "bf16", gpus=[80e9] * 8)
print("fits" if placement.fits else f"does not fit: it {placement.shortfall}")
figure = figures.placement(
    placement, dict.fromkeys(range(8), 80e9), "Falcon-180B in bf16 on 8x A100 80GB"
)
runs.record_figure("placement", figure)

# %% [markdown]
# ## 4 · Generate
#
# The announcement's example, with its settings: temperature 0.6, top-p 0.9, 50 new tokens (A25). First plainly;
# only the two inputs named are passed on, because some tokenizers return a third that Falcon refuses.

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
# The helper returns the reply with its timings and the reason why it ended, and the same seed gives the same text. (It draws
# by temperature and top-p alone; plain `generate` also keeps only the 50 likeliest tokens, its default `top_k`.)

# %%
sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=max_new_tokens, seed=seed)
reply = generation.generate(loaded, prompt, sampling)
again = generation.generate(loaded, prompt, sampling)
print(prompt + reply.text)
print(f"\n{reply.tokens} tokens, ended by {reply.finish_reason!r}")
print("same seed, same text:", reply.text == again.text)

# %%
options = {"claim": "A25", "model": settings.falcon.label}
runs.record("pedro_repeatable", reply.text == again.text, **options)
runs.record("pedro_tokens", reply.tokens, "tokens", **options)
runs.record("first_token", round(reply.first_token_seconds, 4), "s")
runs.record("decoding_speed", round(reply.tokens_per_second, 1), "tokens/s")

# %% [markdown]
# The article's Falcon-180B made of Pedro a person from Portugal, 25 years old, a graphic designer. What the model here
# makes of him depends on the model and on the seed:

# %%
import pandas as pd

replies = [
    generation.generate(loaded, prompt, Sampling(max_new_tokens=25, seed=s)).text for s in range(4)
]
pd.DataFrame({"continuation": replies}).rename_axis("seed")

# %% [markdown]
# ## 5 · What temperature does
#
# A model gives each token of its vocabulary a score (*logit*). Softmax turns scores into probabilities; dividing the
# scores by the *temperature* first sharpens (below 1) or flattens (above 1) them. In plain PyTorch:

# %%
ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(loaded.model.device)
with torch.inference_mode():
    logits = loaded.model(ids).logits[0, -1].float()
probabilities = (logits / 0.6).softmax(-1)
best = probabilities.topk(5)
{
    tokenizer.decode([token]): round(p.item(), 3)
    for token, p in zip(best.indices, best.values, strict=True)
}

# %%
temperatures = (0.3, 0.6, 1.0, 1.5)
by_temperature = {
    t: generation.next_token_probabilities(loaded, prompt, k=8, temperature=t) for t in temperatures
}
figure = figures.next_token_probabilities(by_temperature, settings.falcon.label)
runs.record_figure("temperature", figure)

# %% [markdown]
# *Top-p* then keeps the likeliest tokens until their probabilities reach p, and draws among them. How many stay?


# %%
def kept(probabilities: torch.Tensor, p: float) -> int:
    return int((probabilities.sort(descending=True).values.cumsum(0) < p).sum()) + 1


tops = (0.5, 0.9, 0.99)
rows = {t: [kept((logits / t).softmax(-1), p) for p in tops] for t in temperatures}
columns = [f"top-p {p}" for p in tops]
pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("temperature")

# %% [markdown]
# ## 6 · Stream
#
# A reader prefers words as they come. `stream` yields pieces of text, the joined pieces are exactly the reply of
# `generate`, and the times show how the first token differs: it waits for the whole prompt (*prefill*).

# %%
import time

start, times = time.perf_counter(), []
for piece in generation.stream(loaded, prompt, sampling):
    times.append(time.perf_counter() - start)
    print(piece, end="", flush=True)

# %%
runs.record_figure("token_times", figures.token_times(times, settings.falcon.label))

# %% [markdown]
# ## 7 · The cache, weighed
#
# Multi-query attention shrinks the keys and values so that the cache stays small. transformers has the small ones at hand, and
# copies each to all of its query heads *before* it stores them. Falcon-180B's own shape, on the meta device, where a tensor
# has a size and no content:


# %%
def weigh(model, tokens: int = 4) -> tuple[tuple, int]:
    row = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    with torch.inference_mode():
        layers = model(input_ids=row, use_cache=True).past_key_values.layers
    held = sum(each.keys.nbytes + each.values.nbytes for each in layers)
    return tuple(layers[0].keys.shape), held // tokens


with torch.device("meta"):
    library = FalconForCausalLM(published).to(torch.bfloat16)
shape, library_bytes = weigh(library)
print(f"(batch, heads, tokens, head size): {shape}, {library_bytes:,} bytes a token")

# %% [markdown]
# `grouped_cache` builds Falcon with an attention that stores the key-value heads alone, and lets all query heads of a group
# read the same one. `loading.load` builds every Falcon so, unless it is told `grouped_cache=False`.

# %%
from helpers.models import grouped_cache

with grouped_cache(), torch.device("meta"):
    grouped = FalconForCausalLM(published).to(torch.bfloat16)
shape, grouped_bytes = weigh(grouped)
print(f"(batch, heads, tokens, head size): {shape}, {grouped_bytes:,} bytes a token")
loaded_bytes = weigh(loaded.model)[1]
print(f"the model loaded here: {loaded_bytes:,} bytes a token")

# %% [markdown]
# The results stay the same; in fp32, where rounding does not blur the comparison:

# %%
both = [models.load(stand_in, "fp32", grouped_cache=grouped) for grouped in (False, True)]
row = both[0].tokenizer(prompt, return_tensors="pt")["input_ids"]
with torch.inference_mode():
    scores = [each.model(row.to(each.model.device)).logits for each in both]
distance = (scores[0] - scores[1]).abs().max().item()
print(f"{stand_in.label}: the logits differ by {distance:.1e} at most")

# %% [markdown]
# And the speed? A step of decoding reads the whole cache, and transformers also copies it. A Falcon with random weights,
# 64 query heads and 4 key-value heads, decodes one token after contexts of several lengths; random numbers fill both caches.

# %%
from transformers import FalconConfig


narrow = FalconConfig(
    vocab_size=4096, hidden_size=1024, num_hidden_layers=4, num_attention_heads=64, num_kv_heads=4,
    new_decoder_architecture=True,
)  # fmt: skip
rows = speed.compare_caches(narrow, contexts=(128, 512, 1900), batch_sizes=(1, 4), repeats=3)
subject = "a Falcon of random weights, 4 layers, 64 query and 4 key-value heads, bf16, CPU"
runs.record_figure("cache_speed", figures.cache_speed(rows, subject))

# %%
last = {row.cache: row for row in rows}  # batch 4, 1900 tokens
speeds = [round(last[kind].tokens_per_second, 1) for kind in ("library", "grouped")]
print(f"at batch 4 and 1900 tokens: {speeds[1] / speeds[0]:.1f} times as fast")

# %%
options = {"claim": "A8", "model": "tiiuae/falcon-180B (shape only)"}
runs.record("cache_bytes_grouped", grouped_bytes, "bytes/token", **options)
smaller = library_bytes / grouped_bytes
runs.record("cache_times_smaller", smaller, "times", **options, agrees=smaller == 29)
options["model"] = "a Falcon of random weights, batch 4, 1900 tokens"
runs.record("speed_library_cache", speeds[0], "tokens/s", **options)
runs.record("speed_grouped_cache", speeds[1], "tokens/s", **options, agrees=speeds[1] > speeds[0])
runs.record("cache_bytes_per_token", loaded_bytes, "bytes/token")
runs.record("grouped_logits_differ", distance, model=stand_in.label, tolerance=1e-5)

# %% [markdown]
# ## 8 · Faster, and word for word the same
#
# A pass of the model reads all its weights, whether it looks at one new token or at six. So several tokens may be *proposed* and
# checked in one pass; greedily decoded, the text stays the same. *Prompt lookup* proposes what followed the last two tokens when
# they stood in the text before. In plain transformers it is one option:

# %%
story = "The dog ran to the red house. The cat ran to the red house. The bird"
row = both[1].tokenizer(story, return_tensors="pt")["input_ids"].to(both[1].model.device)
options = {"attention_mask": torch.ones_like(row), "do_sample": False, "max_new_tokens": 40}
plainly = both[1].model.generate(row, **options)
proposed = both[1].model.generate(row, **options, prompt_lookup_num_tokens=5)
n = min(plainly.shape[1], proposed.shape[1])
print("the same tokens:", torch.equal(plainly[:, :n], proposed[:, :n]))

# %% [markdown]
# *Speculative decoding* lets a small model propose. For Falcon-180B that would be Falcon-7B, which has the same vocabulary; here a
# Falcon of one layer drafts for one of eight. `generate` takes the way as `decoding` and counts passes and accepted proposals.

# %%
from helpers.generation import Decoding

draft = models.load(models.load_profile("laptop").falcon_draft, "fp32")
ways = {
    "plain": Decoding(),
    "prompt lookup": Decoding("lookup"),
    "speculative": Decoding("speculative", draft, 3),
}

# %%
greedy_sampling = Sampling(temperature=0, max_new_tokens=60)
expected = generation.generate(both[1], story, greedy_sampling)
table = {}
for name, way in ways.items():
    told = generation.generate(both[1], story, greedy_sampling, decoding=way)
    table[name] = {"tokens": told.tokens, "passes": told.passes, "accepted": told.acceptance_rate}
    table[name]["tokens/s"] = round(told.tokens_per_second, 1)
    table[name]["same text"] = told.text == expected.text
accepted = table["speculative"]["accepted"]
runs.record("draft_acceptance", round(accepted, 2), model=stand_in.label, tolerance=0.1)
pd.DataFrame.from_dict(table, orient="index").round(2)

# %% [markdown]
# Fewer passes are not always less time: these miniatures spend most of a pass outside their weights, and a draft of one layer
# costs more than an eighth of its model. A third way, `Decoding("compiled")`, compiles the pass, which takes a minute at
# first. `workbook bench` measures all of them, beside other engines.

# %% [markdown]
# ## What you saw
#
# A load is only as good as its check: four lines load a model, and a report proves it. Four fifths of the parameters are
# MLP weights. The example of the announcement runs with its own settings, repeatably. The cache holds what multi-query attention
# meant it to hold: 163,840 bytes a token of Falcon-180B, a 29th of what transformers itself stores, with the same results.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# **1.** What share of a decoder layer's matrix weights is in the MLP? Write it for any Falcon configuration with the new
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
# **2.** Write greedy decoding: append the likeliest next token `count` times, and return all ids, the prompt's first. The
# check compares with `model.generate`.


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
# **3.** Write top-p: given a vector of probabilities, keep the likeliest until their sum reaches `p`, set the others to
# zero and divide by what is left, so that the result sums to one.


# %% tags=["exercise"]
def top_p(probabilities: torch.Tensor, p: float) -> torch.Tensor: ...


exercises.check("01-3", top_p)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def top_p(probabilities: torch.Tensor, p: float) -> torch.Tensor:
#     ordered, order = probabilities.sort(descending=True)
#     before = ordered.cumsum(0) - ordered  # the sum of all likelier tokens
#     kept = torch.zeros_like(probabilities)
#     kept[order[before < p]] = ordered[before < p]
#     return kept / kept.sum()
#
#
# exercises.check("01-3", top_p)
# ```
#
# </details>
