# %% [markdown]
# # 02 · Quantization: fewer bits, at what price?
#
# **You will learn**
# - how bitsandbytes stores weights in 8 and in 4 bits;
# - that on current transformers a Falcon asked for in 4 bits arrives *unquantized*, with no error, and how to prove what you have;
# - to measure the price: bytes, tokens per second, logits, perplexity.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 90 s | 4 GiB |
# | `1x24gb` | minutes | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | an hour and more | see notebook 00 |
#
# **Before:** [01 · Loading](01_loading.ipynb) · **Next:** [03 · Chat prompting](03_chat_prompting.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
texts_falcon = 32
texts_llama = 6
speed_tokens = 48

# %%
from helpers import evaluation, exercises, generation, hardware, loading, stats
from helpers import memory, plots, profiles, quantization, results
from helpers.types import Sampling

loading.tidy_output()
settings = profiles.load_profile(profile)
profiles.table(settings)

# %% [markdown]
# ## 1 · What shrinking promises
#
# A weight in bf16 takes 16 bits. *int8* keeps 8, with one scale for each row of a matrix
# ([Dettmers et al. 2022](https://arxiv.org/abs/2208.07339)), and computes columns with outliers in 16 bits; *nf4* keeps 4, the index of one of 16 values spaced like a
# normal distribution, with one scale for each 64 weights ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)).
# Embeddings and norms stay in 16 bits. For Falcon-180B, computed:

# %%
import pandas as pd

published = memory.published_config("tiiuae/falcon-180B")
weights = {p: memory.weight_bytes(published, p) for p in ("fp32", "bf16", "int8", "nf4")}
rows = [(p, f"{n / 2**30:.1f}", f"{n / weights['bf16']:.0%}") for p, n in weights.items()]
pd.DataFrame(rows, columns=["precision", "weights, GiB", "of bf16"]).set_index("precision")

# %% [markdown]
# One matrix by hand, with the bitsandbytes call underneath: pack, unpack, compare. Sections 1 to 3 use the laptop's stand-in,
# falcon-mini, on every profile, because they hold several copies of one model at a time; section 4 measures the profile's own.

# %%
import bitsandbytes.functional as bnb
import torch

mini = profiles.load_profile("laptop").falcon
full = loading.load(mini, "bf16")
weight = full.model.transformer.h[0].mlp.dense_h_to_4h.weight.detach().float()
packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
restored = bnb.dequantize_4bit(packed, state)
stored = packed.nbytes + state.absmax.nbytes
print(f"{weight.nbytes:,} bytes in fp32, {stored:,} in nf4 with its scales")
print(f"relative error {(restored - weight).norm() / weight.norm():.3f}")

# %% [markdown]
# ## 2 · The silent failure
#
# This is how the documentation loads a model in 4 bits:

# %%
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
checkpoint = loading.resolve(mini)
plain = AutoModelForCausalLM.from_pretrained(
    checkpoint, quantization_config=nf4, dtype=torch.bfloat16, device_map="auto"
)
print("is_quantized:", plain.is_quantized, "· is_loaded_in_4bit:", plain.is_loaded_in_4bit)

# %% [markdown]
# It says that it is quantized. The one log line names *eetq*, another library altogether, and is easily missed. So, is it?

# %%
inputs = full.tokenizer("Once upon a time", return_tensors="pt")["input_ids"].to(plain.device)
with torch.inference_mode():
    same = torch.equal(plain(inputs).logits, full.model(inputs).logits)
footprints = plain.get_memory_footprint(), full.model.get_memory_footprint()
print(f"footprint {footprints[0]:,} bytes, in bf16 {footprints[1]:,}")
print("logits equal to bf16's, to the last bit:", same)

# %%
try:
    quantization.verify_quantized(plain, "nf4")
except quantization.QuantizationError as error:
    print(error)
results.record("plain_load_quantizes", not same)

# %% [markdown]
# Not one layer is. Since transformers 5.5 the code that replaces layers looks for the type `nn.Linear` exactly, and Falcon's
# layers are of a subclass, `FalconLinear`. Whoever trusts the flag compares bf16 with bf16 and finds *almost no
# difference*.
#
# `loading.load` swaps the subclass for `nn.Linear` while it loads (in full precision the logits stay identical) and then proves
# by structure that every layer was converted: its class, its storage type and bytes, and one weight against the checkpoint.

# %%
del plain
small = loading.load(mini, "nf4")
quantization.verify_quantized(small.model, "nf4")
loading.report_table(small)

# %% [markdown]
# The share below is larger than the 29% of Falcon-180B, because in a small model the embeddings, which stay in 16 bits, weigh more.

# %%
results.record("nf4_layers", small.report.quantized_layers, "layers")
results.record(
    "nf4_share_of_bf16", round(small.report.stored_bytes / full.report.stored_bytes, 3), "of bf16"
)

# %% [markdown]
# ## 3 · Perplexity
#
# *Perplexity* is the exponential of the mean negative log-likelihood of a token: 10 means that the model is as unsure as if it
# chose among 10 tokens. *Bits per byte* divides by the bytes of the text instead, so models with different vocabularies can
# be put side by side. The texts are stories on which falcon-mini was not trained. In plain PyTorch, for one of them:

# %%
import json
from pathlib import Path

lines = Path("data/perplexity_texts.jsonl").read_text(encoding="utf-8").splitlines()
texts = [json.loads(line)["text"] for line in lines]
ids = full.tokenizer(full.tokenizer.bos_token + texts[0], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    nll = full.model(ids.to(full.model.device), labels=ids.to(full.model.device)).loss
print(f"perplexity of the first text: {nll.exp():.3f}")
print(f"the helper says the same: {evaluation.perplexity(full, texts[:1]).perplexity:.3f}")

# %% [markdown]
# ## 4 · The price, measured
#
# For each precision of this profile: bytes, how far the logits move, perplexity and decoding speed. A precision that does not
# fit becomes a row that says so.


# %%
def first_logits(loaded) -> torch.Tensor:
    ids = loaded.tokenizer(texts[0], return_tensors="pt")["input_ids"].to(loaded.model.device)
    with torch.inference_mode():
        return loaded.model(ids).logits[0].float().cpu()


def speed(loaded) -> float:
    sampling = Sampling(temperature=0, max_new_tokens=speed_tokens, seed=seed)
    replies = [generation.generate(loaded, "Once upon a time", sampling) for _ in range(3)]
    return sorted(reply.tokens_per_second for reply in replies)[1]


# %%
def measure(ref, precision: str, texts: list[str]) -> dict:
    if missing := memory.lacks(loading.config(ref), precision, hardware.detect()):
        return {"precision": precision, "lacks": missing}
    loaded = loading.load(ref, precision)
    quality = evaluation.perplexity(loaded, texts)
    row = {"precision": precision, "stored_bytes": loaded.report.stored_bytes}
    row |= {"perplexity": quality.perplexity, "bits_per_byte": quality.bits_per_byte}
    row["nll"] = [nll / n for nll, n in zip(quality.nll, quality.text_tokens, strict=True)]
    row |= {"tokens_per_second": speed(loaded), "logits": first_logits(loaded)}
    loading.unload(loaded)
    return row


# %%
loading.unload(full)
loading.unload(small)
falcon = [
    measure(settings.falcon, precision, texts[:texts_falcon]) for precision in settings.precisions
]

# %%
results.record_figure(
    "falcon_by_precision", plots.precision_comparison(falcon, settings.falcon.label)
)

# %% [markdown]
# ### How far the logits move
#
# The mean absolute difference of each precision's logits from bf16's, on the first text. Had the silent failure struck, its
# bar would be exactly zero.

# %%
measured = {row["precision"]: row for row in falcon if "logits" in row}


def differences(rows: dict[str, dict]) -> dict[str, float]:
    others = {p: row["logits"] for p, row in rows.items() if p != "bf16"}
    return {p: (x - rows["bf16"]["logits"]).abs().mean().item() for p, x in others.items()}


# %%
shown = "needs bf16 and another precision that fit this machine"
if "bf16" in measured and len(measured) > 1:
    figure = plots.logit_differences(differences(measured), settings.falcon.label)
    shown = results.record_figure("logit_differences", figure)
shown

# %% [markdown]
# ### Almost no difference?
#
# The article reports that 8-bit and 4-bit show almost no difference to bf16 in evaluation (A18). Every precision read the
# *same* texts, so each text gives a pair: its loss in int8 or nf4 minus its loss in bf16. The interval is of the mean of
# these differences.


# %%
def changes(side: str, rows: dict[str, dict], **claim) -> pd.DataFrame:
    table = {}
    for p in [p for p in ("int8", "nf4") if {p, "bf16"} <= rows.keys()]:
        change = stats.paired_difference(rows[p]["nll"], rows["bf16"]["nll"])
        interval = f"{change.low:+.4f} to {change.high:+.4f}"
        table[p] = {"change of loss": f"{change.estimate:+.4f}", "95% interval": interval}
        options = {"tolerance": 0.005, **claim}
        if claim:  # "almost none" means under 0.05 here
            options["agrees"] = change.high < 0.05
        name, value = f"{side}_nll_change_{p}", round(change.estimate, 4)
        results.record(name, value, "nats/token", **options)
    return pd.DataFrame.from_dict(table, orient="index")


# %%
changes("falcon", measured, claim="A18", model=settings.falcon.label)

# %% [markdown]
# An interval that holds zero means that no difference was detected on these texts, not that there is none. And note that a model
# left unquantized by mistake would pass this test with honours: only the proof of section 2 tells the two apart.
#
# ### Is 8-bit much faster than 4-bit?
#
# The article says so (A19). A user of bitsandbytes found int8 five times slower than bf16 on eight A100s
# ([bitsandbytes#490](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/490)). Speed belongs to the machine, so here is yours:

# %%
for p, row in measured.items():
    results.record(f"perplexity_{p}", round(row["perplexity"], 3), "")
    results.record(f"speed_{p}", round(row["tokens_per_second"], 1), "tokens/s")
if {"int8", "nf4"} <= measured.keys():
    ratio = measured["int8"]["tokens_per_second"] / measured["nf4"]["tokens_per_second"]
    print(f"int8 decodes {ratio:.2f} times as fast as nf4 on this machine")
    options = {"claim": "A19", "model": settings.falcon.label, "agrees": ratio > 1.5}
    results.record("int8_over_nf4_speed", round(ratio, 2), "ratio of tokens/s", **options)

# %% [markdown]
# ## 5 · The same for the Llama side
#
# Llama's layers are plain `nn.Linear`, so its quantization needs no repair; it is proven all the same. On the laptop profile
# SmolLM2's *bf16* is itself a 4-bit file (Q4_1) dequantized, so its int8 and nf4 are a second rounding. Its vocabulary is
# another one, so its perplexity cannot be compared with Falcon's; bits per byte can, below.

# %%
llama = [
    measure(settings.llama_chat, precision, texts[:texts_llama])
    for precision in settings.precisions
]

# %%
figure = plots.precision_comparison(llama, settings.llama_chat.label)
results.record_figure("llama_by_precision", figure)

# %%
changes("llama", {row["precision"]: row for row in llama if "nll" in row})

# %%
sides = {settings.falcon.label: falcon, settings.llama_chat.label: llama}
table = {
    label: {row["precision"]: f"{row['bits_per_byte']:.3f}" for row in rows if "nll" in row}
    for label, rows in sides.items()
}
pd.DataFrame(table).rename_axis("bits per byte")

# %% [markdown]
# ## What you saw
#
# A flag is not a proof: the plain 4-bit load changed nothing and said that it had. Repaired and proven, nf4 takes a little
# over a quarter of bf16's bytes in the layers; what it costs has an interval, and differs from model to model, so one model's
# *almost no difference* is not another's. Which precision is fastest belongs to the machine and its kernels.

# %%
results.recorded()

# %% [markdown]
# ## Exercises
#
# **1.** How many bytes does an nf4 matrix of `rows` by `columns` take, with one fp32 scale for each block of 64 weights (no
# double quantization)?


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
#
#
# exercises.check("02-1", nf4_bytes)
# ```
#
# </details>

# %% [markdown]
# **2.** Write your own proof: count the quantized linear layers and all linear layers of a model. bitsandbytes' classes are
# `Linear4bit` and `Linear8bitLt` in `bitsandbytes.nn`.


# %% tags=["exercise"]
def count_quantized(model: torch.nn.Module) -> tuple[int, int]: ...


exercises.check("02-2", count_quantized)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# from bitsandbytes.nn import Linear4bit, Linear8bitLt
#
#
# def count_quantized(model: torch.nn.Module) -> tuple[int, int]:
#     linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
#     quantized = [m for m in linear if isinstance(m, (Linear4bit, Linear8bitLt))]
#     return len(quantized), len(linear)
#
#
# exercises.check("02-2", count_quantized)
# ```
#
# </details>

# %% [markdown]
# **3.** Quantize one row of weights to int8 by *absmax*: the largest absolute value becomes 127. Return the int8 tensor and
# the scale that brings it back (`values * scale`).


# %% tags=["exercise"]
def absmax_int8(row: torch.Tensor) -> tuple[torch.Tensor, float]: ...


exercises.check("02-3", absmax_int8)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def absmax_int8(row: torch.Tensor) -> tuple[torch.Tensor, float]:
#     scale = row.abs().max().item() / 127
#     return (row / scale).round().to(torch.int8), scale
#
#
# exercises.check("02-3", absmax_int8)
# ```
#
# </details>
