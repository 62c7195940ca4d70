# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [precisions]
#       llama_chat: [precisions]
#       laptop/falcon: [bf16, int8, nf4]
#     work:  # the speeds: a run without a clock and the repeats, one, four and sixteen replies at once
#       falcon:
#         - {load: 1}
#         - {reply: repeats, tokens: new_tokens, prompt: prompt_tokens}
#         - {reply: 1, tokens: new_tokens, prompt: prompt_tokens}
#         - {reply: [4, repeats], tokens: new_tokens, prompt: prompt_tokens, together: 4}
#         - {reply: 4, tokens: new_tokens, prompt: prompt_tokens, together: 4}
#         - {reply: [16, repeats], tokens: new_tokens, prompt: prompt_tokens, together: 16}
#         - {reply: 16, tokens: new_tokens, prompt: prompt_tokens, together: 16}
#         - {read: texts_falcon, tokens: 190, together: 4}
#         - {read: [4, items_falcon], tokens: 40, together: 16}
#       llama_chat:
#         - {load: 1}
#         - {reply: repeats, tokens: new_tokens_llama, prompt: prompt_tokens_llama}
#         - {reply: 1, tokens: new_tokens_llama, prompt: prompt_tokens_llama}
#         - {reply: [4, repeats], tokens: new_tokens_llama, prompt: prompt_tokens_llama, together: 4}
#         - {reply: 4, tokens: new_tokens_llama, prompt: prompt_tokens_llama, together: 4}
#         - {reply: [16, repeats], tokens: new_tokens_llama, prompt: prompt_tokens_llama, together: 16}
#         - {reply: 16, tokens: new_tokens_llama, prompt: prompt_tokens_llama, together: 16}
#         - {read: texts_llama, tokens: 190, together: 4}
#         - {read: [4, items_llama], tokens: 40, together: 16}
#     parameters:
#       seed: {least: 0, most: 4294967295}
#       texts_falcon: {least: 2, most: 100000}
#       texts_llama: {least: 2, most: 100000}
#       items_falcon: {least: 2, most: 100000}
#       items_llama: {least: 2, most: 100000}
#       prompt_tokens: {least: 1, most: 100000}
#       new_tokens: {least: 2, most: 100000}
#       prompt_tokens_llama: {least: 1, most: 100000}
#       new_tokens_llama: {least: 2, most: 100000}
#       repeats: {least: 1, most: 1000}
# ---

# %% [markdown]
# # 02 · Quantization: fewer bits, at what price?
#
# **You will learn**
# - how int8 and nf4 store a matrix: a dozen lines of torch each, equal to bitsandbytes bit for bit;
# - that current transformers silently loads a Falcon *unquantized* when you ask for 4 bits, and how to prove what you have;
# - to save and reload quantized weights without making the same mistake;
# - to measure the price with its uncertainty: bytes, logits, perplexity, tasks, tokens per second.
#
# **Before:** [01 · Loading](01_loading.ipynb) · **Next:** [03 · Chat prompting](03_chat_prompting.ipynb) · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
texts_falcon = 32
texts_llama = 5
items_falcon = 100
items_llama = 12
prompt_tokens = 32
new_tokens = 16
prompt_tokens_llama = 8
new_tokens_llama = 4
repeats = 3

# %%
import inspect
import pandas as pd
import torch
from pathlib import Path
from tempfile import TemporaryDirectory
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from helpers import evaluation, exercises, figures, machine, models, runs, speed

notebook_name = "02_quantization"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · What shrinking promises
#
# A weight in bf16 takes 16 bits. *[int8](GLOSSARY.md#int8)* takes 8, with one scale per row of a matrix ([Dettmers et al.
# 2022](https://arxiv.org/abs/2208.07339)). *[nf4](GLOSSARY.md#nf4)* takes 4, the index of one of 16 values, with one scale per 64
# weights ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). Embeddings and norms stay in 16 bits. The table is computed
# for Falcon-180B. Sections 2 to 6 hold several copies of a model at once, so they use the laptop's falcon-mini on every profile;
# sections 7 and 8 measure the profile's own models. Below the table: one matrix of falcon-mini, and its inputs for a real text.

# %%
published = machine.published_config("tiiuae/falcon-180B")
weights = {p: machine.weight_bytes(published, p) for p in ("fp32", "bf16", "int8", "nf4")}
weights["nf4, scales quantized too"] = machine.weight_bytes(published, "nf4", double_quant=True)
rows = [(p, f"{n / 2**30:.1f}", f"{n / weights['bf16']:.0%}") for p, n in weights.items()]
display(pd.DataFrame(rows, columns=["precision", "weights, GiB", "of bf16"]).set_index("precision"))
texts = evaluation.read_texts(Path("data/perplexity_texts.jsonl"))
mini = models.load_profile("laptop").falcon
full = models.load(mini, "bf16")
ids = full.tokenizer(texts[0], return_tensors="pt")["input_ids"].to(full.model.device)
layer = full.model.transformer.h[6].mlp.dense_4h_to_h
weight, x = layer.weight.detach().cpu(), models.layer_inputs(full.model, layer, ids)
print("weight", tuple(weight.shape), weight.dtype, "largest", weight.abs().max().item())
print("inputs", tuple(x.shape), x.dtype, "largest", x.abs().max().item())

# %% [markdown]
# ## 2 · int8, by hand
#
# *[Absmax](GLOSSARY.md#absmax)*: the largest magnitude of a row becomes 127, and every other weight a whole number in between. To
# multiply in 8 bits, the inputs are rounded too, each token by its own largest value. One huge value leaves only a few of the 127
# steps to the others, and large models have such *[outliers](GLOSSARY.md#outlier)*, always in the same few columns. LLM.int8()
# takes every column with a magnitude of 6 or more out of the 8-bit product and multiplies it in 16 bits. Here is all of it, and
# the comparison with bitsandbytes:

# %%
for rule in (models.absmax_int8, models.int8_product, models.int8_equals_bitsandbytes):
    print(inspect.getsource(rule))
print(f"{(x.abs() >= 6).any(0).sum()} of {x.shape[1]} columns hold outliers. Relative errors:")
for threshold in (6.0, 1e9):
    product = models.int8_product(x, weight, threshold)
    error = models.relative_error(product, x.float() @ weight.float().T)
    print(f"columns from {threshold:g} on in 16 bits: {error:.4f}")

# %% [markdown]
# Both agree to the last bit, once we copy a constant too: on a CPU, bitsandbytes 0.50 scales by 6.200124e-05; its CUDA kernels
# use 1/127², which is 6.200012e-05. It looks like a slip (124 for 012); the effect is 18 millionths, which only now and then
# changes a rounding. (One column in seven is not "few": this is a miniature.)
#
# ## 3 · nf4, by hand
#
# Trained weights are distributed much like a normal distribution. So nf4's 16 values are *[quantiles](GLOSSARY.md#quantile)* of
# one: dense in the middle, where most weights are, and sparse in the tails. Seven are negative, eight are positive, 0 is exact.
# The ends are -1 and 1, the largest magnitude of a block of 64 weights ([QLoRA](GLOSSARY.md#qlora), section 3 and appendix E).
# The figure shows the normal distribution, which nf4 cuts at 1.85 standard deviations. The real weights (blue) are closer to the
# middle, because the largest of 64 normal values is usually farther out; it makes the spikes at the ends.
#
# The drawing shows both grids with real numbers: int8 with and without the outliers of one token, and 4 bits evenly spaced and as
# nf4. To store a weight, find the nearest value; its index takes 4 bits, and two share a byte. A 32-bit scale per 64 weights is
# half a bit per weight. *[Double quantization](GLOSSARY.md#double-quantization)* subtracts the mean of the scales and stores them
# in 8 bits (also a fixed list, fine near 0), with one 32-bit scale per 256 of them: 0.127 bits per weight.

# %%
scaled = models.scaled_blocks(weight).numpy()
token = x[x.abs().amax(1).argmax()].float()  # the token with the largest input
figure = figures.quantization_grids(token, scaled, models.nf4_code(), mini.label)
runs.record_figure("grids", figure)

# %%
figure = figures.nf4_code(models.nf4_code(), scaled, mini.label, models.NF4_TAIL)
display(runs.record_figure("nf4_code", figure))
for rule in (models.nf4, models.double_quantized, models.nf4_equals_bitsandbytes):
    print(inspect.getsource(rule))

# %% tags=["record"]
by_hand = models.equal_to_bitsandbytes(weight, x)
runs.record_all(by_hand)

# %% [markdown]
# ## 4 · The silent failure
#
# First the call as the announcement prints it, with `torch_dtype` and `load_in_8bit`:

# %%
files, as_printed = models.resolve(mini), "loads"
options = {"torch_dtype": torch.bfloat16, "load_in_8bit": True, "device_map": "auto"}
try:
    AutoModelForCausalLM.from_pretrained(files, **options)
except TypeError as error:
    as_printed = "TypeError"
    print("TypeError:", error)

# %% [markdown]
# `torch_dtype` is only an old name: the library says so and takes it as `dtype`. `load_in_8bit` is gone since transformers 5, and
# falls through to the model, which does not know it. Today the settings are an object, a `BitsAndBytesConfig`. This is how the
# documentation loads a model in 4 bits. The model says that it is quantized; the only log line is about *eetq*, another library.
# So, is it quantized?

# %%
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
plain = AutoModelForCausalLM.from_pretrained(files, quantization_config=config, device_map="auto")
print("is_quantized:", plain.is_quantized, "· is_loaded_in_4bit:", plain.is_loaded_in_4bit)
with torch.inference_mode():
    same = torch.equal(plain(ids).logits, full.model(ids).logits)
print("logits equal to bf16's, to the last bit:", same)
try:
    models.verify_quantized(plain, "nf4")
except models.QuantizationError as error:
    print(error)

# %% [markdown]
# Not one layer is. Since transformers 5.5, the code that replaces layers looks for exactly the type `nn.Linear`, and Falcon's
# layers have a subclass, `FalconLinear`. If you trust the flag, you compare bf16 with bf16 and find *almost no difference*.
# `models.load` swaps the subclass for `nn.Linear` while it loads (in full precision the [logits](GLOSSARY.md#logit) stay
# identical). Then it proves that every layer was converted: by its class, its storage type and bytes, and one weight compared
# with the checkpoint. One unconverted layer makes the proof fail, and the error names it. (In Falcon-180B, nf4 takes 29% of
# bf16's bytes; here more.)

# %%
small = {precision: models.load(mini, precision) for precision in ("int8", "nf4")}
display(models.report_table(small["nf4"]))
doctored = models.load(mini, "nf4").model
doctored.set_submodule("transformer.h.6.mlp.dense_4h_to_h", layer)  # in bf16
try:
    models.verify_quantized(doctored, "nf4")
except models.QuantizationError as error:
    print(error)

# %% [markdown]
# ## 5 · Save, and load again
#
# You can save quantized weights, so that the next load is quick and small. The plain reload fails silently too: for an int8
# checkpoint it reports no problem, but puts 8-bit codes into ordinary layers, and the first forward pass fails. (In nf4 the
# shapes differ, and the plain load raises.) `models.save` and `models.load` apply the repair and prove the result. `models.save`
# refuses nf4 weights that have run on a CPU with AVX512_BF16: there bitsandbytes rearranges them at their first use and rounds
# their scales to bf16, so the saved copy would be another model.

# %%
with TemporaryDirectory() as folder:
    saved = {p: models.save(one, Path(folder) / f"{mini.name}-{p}") for p, one in small.items()}
    plain = AutoModelForCausalLM.from_pretrained(saved["int8"].id, device_map="auto")
    again = {p: models.load(ref, p).model for p, ref in saved.items()}
print("loaded without an error; the first layer:", plain.transformer.h[0].mlp.dense_h_to_4h)
try:
    plain(ids)
except RuntimeError as error:
    print("RuntimeError:", error)
with torch.inference_mode():
    equal = [torch.equal(again[p](ids).logits, small[p].model(ids).logits) for p in small]
print("logits after reloading equal:", equal)

# %% [markdown]
# ## 6 · Layer by layer
#
# How wrong is each matrix, and how wrong is its result for a real text, if only this matrix is quantized? The helper measures all
# 32, with their inputs in bf16. nf4 weights are some 9% off and int8 weights about 1%; a matrix with a few very large weights is
# worse, because they make the steps of their block or row coarse. The error of a result has mostly the same size. int8 rounds the
# inputs as well, so its error is larger in `dense_4h_to_h`, whose inputs have the outliers. Rounding a result to bf16 adds far
# less. The effect on the whole model is not the sum; section 7 measures it.

# %%
errors = {}
for p in ("bf16", "int8", "nf4"):
    errors[p] = models.layer_errors(full.model, models.load(mini, p).model, ids)
runs.record_figure("layer_errors", figures.layer_errors(errors, mini.label))

# %% tags=["record"]
share = round(small["nf4"].report.stored_bytes / full.report.stored_bytes, 3)
values = {"plain_load_quantizes": not same, "printed_8bit_call": as_printed}
values["nf4_layers"] = runs.Measured(small["nf4"].report.quantized_layers, "layers")
values["nf4_share_of_bf16"] = runs.Measured(share, "of bf16")
values["reloaded_equals_saved"] = all(equal)
values["nf4_weight_error"] = runs.Measured(round(errors["nf4"][0].weight, 4), "relative")
runs.record_all(values)

# %% [markdown]
# ## 7 · The price in quality
#
# *[Perplexity](GLOSSARY.md#perplexity)* is the exponential of the mean negative [log-likelihood](GLOSSARY.md#likelihood) of a
# token, in [nats](GLOSSARY.md#nats): 10 means that the model is as unsure as if it chose among 10 tokens. Each text follows the
# token that began a document in training. *[Bits per byte](GLOSSARY.md#bits-per-byte)* divides by the bytes of the text instead,
# so it can compare models with different vocabularies. In a *task* the model chooses an ending: the one it finds most likely
# (notebook 04 does one item by hand). The first cell measures a story on which falcon-mini was not trained, in plain PyTorch.
#
# `evaluation.evaluate` runs EleutherAI's lm-evaluation-harness on the first items of `story_endings` and `short_facts`.
# `evaluation.measure_precisions` measures bytes, logits, texts, tasks and the speeds of section 8 for every precision of this
# profile, all at once if they fit together, otherwise one after the other. A row without values says what is missing. After a
# silent failure, a row would show zero converted layers and logits that moved by exactly zero.
#
# Llama's layers are plain `nn.Linear` and need no repair; they are proven all the same. On the laptop profile, SmolLM2's *bf16*
# is a dequantized 4-bit file (Q4_1), so its int8 and nf4 are a second rounding. It is slower, so it reads fewer texts and items,
# and its [intervals](GLOSSARY.md#interval) are wider.

# %%
row = full.tokenizer(full.tokenizer.bos_token + texts[0], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    nll = full.model(row.to(ids.device), labels=row.to(ids.device)).loss
print(f"perplexity of the first text: {nll.exp():.3f}")
print(f"the helper says the same: {evaluation.perplexity(full, texts[:1]).perplexity:.3f}")

# %%
measure, precisions = evaluation.measure_precisions, settings.precisions
timing = speed.SpeedSettings(prompt_tokens, new_tokens, repeats)
sample = texts[:texts_falcon], items_falcon
falcon = measure(settings.falcon, precisions, *sample, speed=timing, seed=seed)
bandwidth = falcon.speeds.bandwidth  # of the same machine
timing = speed.SpeedSettings(prompt_tokens_llama, new_tokens_llama, repeats, bandwidth)
sample = texts[:texts_llama], items_llama
llama = measure(settings.llama_chat, precisions, *sample, speed=timing, seed=seed)
display(falcon.table(), llama.table())

# %%
for side, study in {"falcon": falcon, "llama": llama}.items():
    figure = figures.precision_comparison(study.figure_rows(), study.ref.label)
    display(runs.record_figure(f"{side}_by_precision", figure))
if distances := falcon.logit_distances():
    figure = figures.logit_differences(distances, falcon.ref.label)
    display(runs.record_figure("logit_differences", figure))

# %% [markdown]
# ### Almost no difference?
#
# The article reports almost no difference between 8-bit, 4-bit and bf16 in evaluation (A18). The perplexity intervals overlap
# widely, because other *texts* would give other values. But every precision read the same texts and items, so each of them gives
# a pair, and the differences are known far better. Here, "almost none" means that the whole interval lies within 0.02 bits per
# byte, or within 5 points of accuracy. If it crosses that line, these texts and items cannot tell. If it contains zero, no
# difference was detected here; there may still be one. And an unquantized model would pass this test perfectly: only the proof of
# section 4 finds it. The figure shows the share of bf16's bytes and its cost; the green band is the claim as we read it.

# %%
display(falcon.changes(), llama.changes())
sides = {study.ref.label: study.quality_rows() for study in (falcon, llama)}
figure = figures.quality_against_bytes(sides, " and ".join(sides), evaluation.ALMOST_NONE["text"])
runs.record_figure("quality_against_bytes", figure)

# %% tags=["record"]
values = falcon.change_values("falcon", "A18") | falcon.text_values() | llama.change_values("llama")
runs.record_all(values)

# %% [markdown]
# ## 8 · The price in speed and memory
#
# Before the first token of a reply, the model reads the whole prompt (*[prefill](GLOSSARY.md#prefill)*); each later token is a
# step over a single token (*decoding*), as notebook 01 timed by hand. `speed.measure`, which ran above, times both at batch sizes
# 1, 4 and 16, several times after a warm-up. If all precisions are in memory at once, it measures them in turn, so that a slow
# moment affects all of them alike. The tables show medians, with the smallest and the largest run in brackets. *Peak* is the
# weights plus the most that a run allocates (counted by torch's allocator). *Limit* is what the memory bandwidth allows: every
# step reads all the weights once, and the cache of each reply. Only the weights shrink: with int8 and nf4 weights the cache stays
# in 16 bits.
#
# On a laptop, falcon-mini is far below its limit: Python starts an operation more slowly than the CPU finishes it. In a larger
# model the bytes decide. One reading of the weights serves all replies of a batch, so a batch writes more tokens per second.
#
# ### Is 8-bit much faster than 4-bit?
#
# The article says so (A19). A user of bitsandbytes reported that on eight A100s int8 was five times as slow as bf16, and slower
# than 4-bit ([#490](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/490)). Speed depends on the machine, so here
# is yours. We count more than 1.5× for a single reply as "much faster".

# %%
for side, study in {"falcon": falcon, "llama": llama}.items():
    rows, in_turn = study.speeds.rows, study.speeds.interleaved
    figure = figures.speed_against_bytes(rows, study.ref.label, interleaved=in_turn)
    display(study.speeds.table(), runs.record_figure(f"{side}_speed_against_bytes", figure))

# %% tags=["record"]
runs.record_all(falcon.speed_values("A19"))

# %% [markdown]
# ## 9 · Other ways to shrink
#
# | format | what it is | choose it if | Falcon on transformers 5.23, tried with this workbook |
# |---|---|---|---|
# | [bitsandbytes](https://huggingface.co/docs/transformers/quantization/bitsandbytes) int8, nf4 | rounds at load, no calibration | you want to try it, or to fine-tune with QLoRA | works with the repair of section 4 |
# | [GPTQ](https://arxiv.org/abs/2210.17323) ([docs](https://huggingface.co/docs/transformers/quantization/gptq)) | 2 to 8 bits; the next columns make up for the rounding of each column, with calibration texts | you serve one model for long on GPUs and can spend hours on calibration, or a checkpoint is published | not tried |
# | [AWQ](https://arxiv.org/abs/2306.00978) ([docs](https://huggingface.co/docs/transformers/quantization/awq)) | 4 bits; first scales up the weights with the largest inputs, with calibration texts | as GPTQ | not tried |
# | [GGUF](https://huggingface.co/docs/transformers/gguf) | one file in 2 to 8 bits, for llama.cpp | you run on CPUs or Apple's chips, outside transformers | llama.cpp runs it; transformers does not load Falcon's new architecture from it |
# | [fp8](https://huggingface.co/docs/transformers/quantization/finegrained_fp8) | 8-bit floating point for weights and inputs | your GPUs multiply in it (compute capability 9, such as H100; not the A100) | not tried; its code also looks for exactly `nn.Linear` |
# | [torchao](https://huggingface.co/docs/transformers/quantization/torchao) | PyTorch's own int4, int8 and fp8 | you compile the model with `torch.compile` | int8 loads, but its first forward pass fails without the repair |
#
# ## What you saw
#
# A flag is not a proof. The answers to the goals at the top, with the numbers of this run:

# %%
prices = []
for (measured, precision), pair in falcon.pairs.items():
    if measured == "text":
        low, high = pair.difference.low, pair.difference.high
        prices.append(f"{precision} {low:+.4f} to {high:+.4f}")
converted = small["nf4"].report.quantized_layers
answers = [
    f"{sum(by_hand.values())} of {len(by_hand)} grids by hand equal bitsandbytes' bit for bit.",
    f"Plain 4-bit load: logits {'unchanged' if same else 'changed'}. Proven: {converted} layers.",
    f"Logits equal after saving and loading again: {all(equal)}.",
    f"Bits per byte more than bf16 (95%): {'; '.join(prices) or 'bf16 does not fit here'}.",
]
print(*answers, sep="\n")

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("02-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
#
# **1.** How many bytes does an nf4 matrix of `rows` by `columns` take, with one fp32 scale per 64 weights?


# %% tags=["exercise"]
def nf4_bytes(rows: int, columns: int) -> float: ...


exercises.check("02-1", nf4_bytes)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def nf4_bytes(rows: int, columns: int) -> float:
#     count = rows * columns
#     return count / 2 + count / 64 * 4
# exercises.check("02-1", nf4_bytes)
# ```
# </details>

# %% [markdown]
# **2.** Write your own proof: count the quantized linear layers and all linear layers of a model. The quantized classes are
# `Linear4bit` and `Linear8bitLt` of `bitsandbytes.nn`.


# %% tags=["exercise"]
def count_quantized(model: torch.nn.Module) -> tuple[int, int]: ...


exercises.check("02-2", count_quantized)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# from bitsandbytes.nn import Linear4bit, Linear8bitLt
# def count_quantized(model: torch.nn.Module) -> tuple[int, int]:
#     linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
#     quantized = [m for m in linear if isinstance(m, (Linear4bit, Linear8bitLt))]
#     return len(quantized), len(linear)
# exercises.check("02-2", count_quantized)
# ```
# </details>

# %% [markdown]
# **3.** Undo nf4: compute the flat float32 weights from `packed` (uint8, two indices per byte, the first in the upper four bits),
# one scale per 64 weights in `scales`, and the 16 values of `code`.


# %% tags=["exercise"]
def nf4_back(packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor: ...


exercises.check("02-3", nf4_back)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def nf4_back(packed: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
#     indices = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1)
#     return (code[indices.long()].view(-1, 64) * scales[:, None]).flatten()
# exercises.check("02-3", nf4_back)
# ```
# </details>

# %% [markdown]
# **4. A finding.** Which matrices should stay in bf16? Name the four of falcon-mini's 32 (`models.quantizable_layers(full.model)`)
# that bring the predictions of the nf4 model closest to bf16. The check measures this on two texts and compares your four with 19
# random choices of four: yours must beat them all.

# %% tags=["exercise"]
left_in_bf16 = ...  # a list of four names

exercises.check("02-4", left_in_bf16, model=full)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def distance(model) -> float:
#     with torch.inference_mode():
#         p = full.model(ids).logits[0].float().log_softmax(-1)
#         q = model(ids).logits[0].float().log_softmax(-1)
#     return (p.exp() * (p - q)).sum(-1).mean().item()  # Kullback-Leibler divergence
#
#
# trial, distances = models.load(mini, "nf4").model, {}
# for name in models.quantizable_layers(full.model):
#     quantized = trial.get_submodule(name)
#     trial.set_submodule(name, full.model.get_submodule(name))
#     distances[name] = distance(trial)  # with this one matrix in bf16
#     trial.set_submodule(name, quantized)
# left_in_bf16 = sorted(distances, key=distances.get)[:4]
#
# exercises.check("02-4", left_in_bf16, model=full)
# ```
#
# </details>

# %% [markdown]
# **Before:** [01 · Loading](01_loading.ipynb) · **Next:** [03 · Chat prompting](03_chat_prompting.ipynb) · [Glossary](GLOSSARY.md)
