# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [precisions]
#       llama_chat: [precisions]
#       laptop/falcon: [bf16, int8, nf4]
# ---

# %% [markdown]
# # 02 · Quantization: fewer bits, at what price?
#
# **You will learn**
# - how int8 and nf4 store a matrix: a dozen lines of torch each, equal to bitsandbytes bit for bit;
# - that on current transformers a Falcon asked for in 4 bits arrives *unquantized*, with no error, and how to prove what you have;
# - to save and reload quantized weights without falling into the same hole;
# - to measure the price with its uncertainty: bytes, logits, perplexity, tasks, tokens per second.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 90 s | 5 GiB |
# | `1x24gb` | minutes | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | an hour and more | see notebook 00 |
#
# **Before:** [01 · Loading](01_loading.ipynb) · **Next:** [03 · Chat prompting](03_chat_prompting.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
texts_falcon = 32
texts_llama = 6
items_falcon = 100
items_llama = 16
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

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · What shrinking promises
#
# A weight in bf16 takes 16 bits. *int8* keeps 8, with one scale for each row of a matrix ([Dettmers et al. 2022](https://arxiv.org/abs/2208.07339)). *nf4* keeps 4, the index of one of 16
# values, with one scale for each 64 weights ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). Embeddings and norms stay in 16 bits. The table is computed for Falcon-180B. Sections 2
# to 6 use the laptop's stand-in, falcon-mini, on every profile, because they hold several copies of one model at a time; sections 7 and 8 measure the profile's own models. Below the table: one
# of falcon-mini's matrices, with the inputs that it gets for a real text.

# %%
published = machine.published_config("tiiuae/falcon-180B")
weights = {p: machine.weight_bytes(published, p) for p in ("fp32", "bf16", "int8", "nf4")}
weights["nf4, scales quantized too"] = machine.weight_bytes(published, "nf4", double_quant=True)
rows = [(p, f"{n / 2**30:.1f}", f"{n / weights['bf16']:.0%}") for p, n in weights.items()]
display(pd.DataFrame(rows, columns=["precision", "weights, GiB", "of bf16"]).set_index("precision"))
texts = pd.read_json("data/perplexity_texts.jsonl", lines=True)["text"].tolist()
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
# *Absmax*: the largest magnitude of a row becomes 127, and all else a whole number in between. To multiply in 8 bits, the inputs are rounded too, each token's by its own largest. One huge
# value would leave the others only a few of the 127 steps, and large models have such *outliers*, always in the same few columns. LLM.int8() takes every column that holds a magnitude of 6
# or more out of the 8-bit product and multiplies it in 16 bits. All of it, and the same by bitsandbytes:

# %%
for rule in (models.absmax_int8, models.int8_product, models.int8_equals_bitsandbytes):
    print(inspect.getsource(rule))
print(f"{(x.abs() >= 6).any(0).sum()} of {x.shape[1]} columns hold outliers. Relative errors:")
for threshold in (6.0, 1e9):
    product = models.int8_product(x, weight, threshold)
    error = models.relative_error(product, x.float() @ weight.float().T)
    print(f"columns from {threshold:g} on in 16 bits: {error:.4f}")

# %% [markdown]
# Equal to the last bit, once a constant is copied too: without a CUDA kernel, bitsandbytes 0.50 scales by 6.200124e-05, while 1/127², as in its CUDA kernels, is 6.200012e-05. It looks like
# a slip (124 for 012); the effect is 18 millionths, which only now and then changes a rounding. (One column in seven is many: "few" is said of large models, not of this miniature.)
#
# ## 3 · nf4, by hand
#
# Trained weights are spread much like a normal distribution. So nf4's 16 values are *quantiles* of one: dense in the middle, where most weights lie, and wide apart in the tails. Seven are
# negative, eight positive, 0 is exact, and the ends are -1 and 1, the largest magnitude of a block of 64 weights (QLoRA, section 3 and appendix E). The figure shows the normal distribution,
# whose tails nf4 cuts at 1.85 standard deviations. The real weights (blue) stand closer to the middle, because the largest of 64 normal values is usually farther out; the spikes at the ends
# are these largest ones.
#
# Storing a weight is finding the nearest value; its index takes 4 bits, and two share a byte. A scale of 32 bits for 64 weights is half a bit per weight. *Double quantization* subtracts the
# mean of the scales and stores them in 8 bits, with one 32-bit scale for 256 of them: 0.127 bits per weight. Their 8-bit values are again a fixed list, fine near 0.

# %% tags=["record"]
scaled = models.scaled_blocks(weight).numpy()
figure = figures.nf4_code(models.nf4_code(), scaled, mini.label, models.NF4_TAIL)
display(runs.record_figure("nf4_code", figure))
for rule in (models.nf4, models.double_quantized, models.nf4_equals_bitsandbytes):
    print(inspect.getsource(rule))
for name, equal in models.equal_to_bitsandbytes(weight, x).items():
    display(runs.record(name, equal))

# %% [markdown]
# ## 4 · The silent failure
#
# This is how the documentation loads a model in 4 bits. It says that it is quantized, and the one log line names *eetq*, another library altogether. So, is it?

# %%
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
files = models.resolve(mini)
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
# Not one layer is. Since transformers 5.5 the code that replaces layers looks for the type `nn.Linear` exactly, and Falcon's layers are of a subclass, `FalconLinear`. Whoever trusts the
# flag compares bf16 with bf16 and finds *almost no difference*. `loading.load` swaps the subclass for `nn.Linear` while it loads (in full precision the logits stay identical) and then
# proves by structure that every layer was converted: its class, its storage type and bytes, and one weight against the checkpoint. One layer left behind is enough to fail the proof, and it
# is named. (The share of bf16's bytes is larger than the 29% of Falcon-180B, because in a small model the embeddings, which stay in 16 bits, weigh more.)

# %% tags=["record"]
small = {precision: models.load(mini, precision) for precision in ("int8", "nf4")}
display(models.report_table(small["nf4"]))
doctored = models.load(mini, "nf4").model
doctored.set_submodule("transformer.h.6.mlp.dense_4h_to_h", layer)  # in bf16
try:
    models.verify_quantized(doctored, "nf4")
except models.QuantizationError as error:
    print(error)
share = small["nf4"].report.stored_bytes / full.report.stored_bytes
runs.record("plain_load_quantizes", not same)
runs.record("nf4_layers", small["nf4"].report.quantized_layers, "layers")
runs.record("nf4_share_of_bf16", round(share, 3), "of bf16")

# %% [markdown]
# ## 5 · Save, and load again
#
# Quantized weights can be saved, so that the next load is quick and small. The reload has the same hole: the plain call on an int8 checkpoint reports nothing missing and nothing wrong, and
# puts 8-bit codes into ordinary layers. It fails at the first word. (In nf4 the shapes differ, and the plain load raises.) The helper saves and loads with the repair and proves both, here
# with the same logits, to the last bit. It refuses to save nf4 weights that have run on a CPU with AVX512_BF16 instructions: there bitsandbytes rearranges them at their first use and rounds
# their scales to bf16, and the saved copy would be another model.

# %% tags=["record"]
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
runs.record("reloaded_equals_saved", all(equal))

# %% [markdown]
# ## 6 · Layer by layer
#
# How wrong is each matrix, and how wrong is its result for a real text, if only that one were quantized? Sections 2 and 3 did it for one; the helper takes all 32, with the inputs that each
# gets in bf16. In nf4 weights are some 9% off, in int8 about 1%, nearly the same everywhere but in a matrix with a few very large weights, which make the steps of their block or row coarse.
# The error of a result is mostly of the same size: the errors of its terms partly cancel, as the terms do. In int8 it is larger in `dense_4h_to_h`, whose inputs have the outliers: int8
# rounds the inputs as well. bf16's own rounding of a result lies far below both. Their effect on the whole model is not their sum; section 7 measures it.

# %% tags=["record"]
errors = {}
for p in ("bf16", "int8", "nf4"):
    errors[p] = models.layer_errors(full.model, models.load(mini, p).model, ids)
runs.record("nf4_weight_error", round(errors["nf4"][0].weight, 4), "relative")
runs.record_figure("layer_errors", figures.layer_errors(errors, mini.label))

# %% [markdown]
# ## 7 · The price in quality
#
# *Perplexity* is the exponential of the mean negative log-likelihood of a token: 10 means that the model is as unsure as if it chose among 10 tokens. *Bits per byte* divides by the bytes of
# the text instead, so that models with different vocabularies can be compared. The texts are stories on which falcon-mini was not trained. The first lines measure one in plain PyTorch.
#
# A *task* asks the model to choose: of several endings, the one it finds most likely is its answer (notebook 04 does one item by hand). `evaluation.evaluate` leaves that to EleutherAI's
# lm-evaluation-harness, over the first items of `story_endings` and `short_facts`. `measure_precisions` does all of it for every precision of this profile, all at once if they fit together,
# else one after the other: bytes, logits, texts, tasks, and the speeds of section 8. A row without figures says what this machine lacks. Had the silent failure struck, no layer would be
# converted and the logits would have moved by exactly zero.
#
# Llama's layers are plain `nn.Linear`, so its quantization needs no repair; it is proven all the same. On the laptop profile SmolLM2's *bf16* is itself a 4-bit file (Q4_1) dequantized, so
# its int8 and nf4 are a second rounding. It is slower, so it reads fewer texts and items, and its intervals are wider. Its vocabulary is another one: compare bits per byte, not perplexity.

# %%
row = full.tokenizer(full.tokenizer.bos_token + texts[0], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    nll = full.model(row.to(ids.device), labels=row.to(ids.device)).loss
print(f"perplexity of the first text: {nll.exp():.3f}")
print(f"the helper says the same: {evaluation.perplexity(full, texts[:1]).perplexity:.3f}")
measure, precisions = evaluation.measure_precisions, settings.precisions
rate = speed.SpeedSettings(prompt_tokens, new_tokens, repeats)
read, asked = texts[:texts_falcon], items_falcon
falcon = measure(settings.falcon, precisions, read, asked, speed=rate, seed=seed)
bandwidth = falcon.speeds.bandwidth  # the same machine's
rate = speed.SpeedSettings(prompt_tokens_llama, new_tokens_llama, repeats, bandwidth)
read, asked = texts[:texts_llama], items_llama
llama = measure(settings.llama_chat, precisions, read, asked, speed=rate, seed=seed)
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
# The article reports that 8-bit and 4-bit show almost no difference to bf16 in evaluation (A18). The intervals of the perplexities above overlap widely, but they are of the *texts*: other
# texts would give other values. Every precision read the same ones, so each text, and each item of a task, gives a pair, and the differences are known far better. Here, "almost none" means
# that the whole interval lies within 0.02 bits per byte, or within 5 points of accuracy. If it reaches across that line, these texts and items cannot tell. An interval that holds zero means
# that no difference was detected on these texts, not that there is none. And note that a model left unquantized by mistake would pass this test with honours: only the proof of section 4
# tells the two apart. The figure shows what is left of bf16's bytes, and what that costs; the green band is the published claim as it is read here.

# %% tags=["record"]
values = falcon.change_values("falcon", "A18") | falcon.text_values() | llama.change_values("llama")
for name, measured in values.items():
    runs.record(name, **vars(measured))
display(falcon.changes(), llama.changes())
sides = {study.ref.label: study.quality_rows() for study in (falcon, llama)}
figure = figures.quality_against_bytes(sides, " and ".join(sides), evaluation.ALMOST_NONE["text"])
runs.record_figure("quality_against_bytes", figure)

# %% [markdown]
# ## 8 · The price in speed and memory
#
# The first token of a reply costs the reading of the whole prompt (*prefill*), each later one a step over a single token (*decoding*), as notebook 01 timed by hand. `bench.measure`, which
# ran above, times both at batch sizes 1, 4 and 16, several times after a run to warm up. If all precisions are in memory at once, it measures them in turn, so that a slow moment affects all
# of them alike. The tables show medians, with the smallest and the largest of the runs in brackets. *Peak* is the weights and the most that a run allocates in addition (counted by torch's
# allocator). *Limit* is what the memory's bandwidth allows, measured by large copies: every step reads all the weights once, and the cache of each reply. Precision shrinks the weights
# alone: the cache stays in the type of the other layers (16 bit for int8 and nf4), which is one more reason to keep only the key-value heads in it (notebook 01, section 7).
#
# On a laptop falcon-mini lies far below its limit: Python takes longer to start each operation than the CPU to finish it. The larger a model, the more the bytes decide. In a batch, one
# reading of the weights serves all replies, so the batch writes more tokens per second.
#
# ### Is 8-bit much faster than 4-bit?
#
# The article says so (A19). A user of bitsandbytes reported, on eight A100s, int8 five times as slow as bf16 and slower than 4-bit too
# ([bitsandbytes#490](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/490)). Speed belongs to the machine, so here is yours. We count more than 1.5× for a single reply as "much faster".

# %% tags=["record"]
for side, study in {"falcon": falcon, "llama": llama}.items():
    rows, in_turn = study.speeds.rows, study.speeds.interleaved
    figure = figures.speed_against_bytes(rows, study.ref.label, interleaved=in_turn)
    display(study.speeds.table(), runs.record_figure(f"{side}_speed_against_bytes", figure))
for name, measured in falcon.speed_values("A19").items():
    display(runs.record(name, **vars(measured)))

# %% [markdown]
# ## 9 · Other ways to shrink
#
# | format | what it is | pick it when | Falcon on transformers 5.23, tried with this workbook |
# |---|---|---|---|
# | [bitsandbytes](https://huggingface.co/docs/transformers/quantization/bitsandbytes) int8, nf4 | rounds at load, no calibration | you want to try, or to fine-tune with QLoRA | works with the repair of section 4 |
# | [GPTQ](https://arxiv.org/abs/2210.17323) ([docs](https://huggingface.co/docs/transformers/quantization/gptq)) | 2 to 8 bits; each column's rounding is made good in the next ones, with calibration texts | you serve one model for long on GPUs and can spend hours on calibration, or a checkpoint is published | not tried |
# | [AWQ](https://arxiv.org/abs/2306.00978) ([docs](https://huggingface.co/docs/transformers/quantization/awq)) | 4 bits; scales up the weights that meet the largest inputs first, with calibration texts | as GPTQ | not tried |
# | [GGUF](https://huggingface.co/docs/transformers/gguf) | one file in 2 to 8 bits, for llama.cpp | you run on CPUs or Apple's chips, outside transformers | llama.cpp runs it; transformers does not load Falcon's new architecture from it |
# | [fp8](https://huggingface.co/docs/transformers/quantization/finegrained_fp8) | 8-bit floating point for weights and inputs | your GPUs multiply in it (compute capability 9, such as H100; not the A100) | not tried; its code looks for `nn.Linear` exactly, too |
# | [torchao](https://huggingface.co/docs/transformers/quantization/torchao) | PyTorch's own int4, int8 and fp8 | you compile the model with `torch.compile` | int8 loads, but its first forward pass fails without the repair |
#
# ## What you saw
#
# A flag is not a proof: the plain 4-bit load changed nothing and said that it had. Repaired and proven, nf4 takes a little over a quarter of bf16's bytes in the layers; what it costs has an
# interval, and differs from model to model, so one model's *almost no difference* is not another's. Which precision is fastest belongs to the machine and its kernels.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# **1.** How many bytes does an nf4 matrix of `rows` by `columns` take, with one fp32 scale for each block of 64 weights (no double quantization)?


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
# **2.** Write your own proof: count the quantized linear layers and all linear layers of a model. The classes are `Linear4bit` and `Linear8bitLt` of `bitsandbytes.nn`.


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
# **3.** Bring nf4 back: from `packed` (uint8, two indices a byte, the first in the upper four bits), one `scale` for each 64 weights and the 16 values of `code`, make the flat float32 weights.


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
