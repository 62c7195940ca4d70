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
from helpers import bench, evaluation, exercises, loading
from helpers import memory, plots, profiles, quantization, results

loading.tidy_output()
settings = profiles.load_profile(profile)
profiles.table(settings)

# %% [markdown]
# ## 1 · What shrinking promises
#
# A weight in bf16 takes 16 bits. *int8* keeps 8, with one scale for each row of a matrix
# ([Dettmers et al. 2022](https://arxiv.org/abs/2208.07339)); *nf4* keeps 4, the index of one of 16 values, with one scale for
# each 64 weights ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)).
# Embeddings and norms stay in 16 bits. For Falcon-180B, computed:

# %%
import pandas as pd

published = memory.published_config("tiiuae/falcon-180B")
weights = {p: memory.weight_bytes(published, p) for p in ("fp32", "bf16", "int8", "nf4")}
weights["nf4, scales quantized too"] = memory.weight_bytes(published, "nf4", double_quant=True)
rows = [(p, f"{n / 2**30:.1f}", f"{n / weights['bf16']:.0%}") for p, n in weights.items()]
pd.DataFrame(rows, columns=["precision", "weights, GiB", "of bf16"]).set_index("precision")

# %% [markdown]
# Sections 2 to 6 use the laptop's stand-in, falcon-mini, on every profile, because they hold several copies of one model at a
# time; sections 7 and 8 measure the profile's own. One of its matrices, with the inputs that it gets for a real text:

# %%
import json
import math
from pathlib import Path

import torch

lines = Path("data/perplexity_texts.jsonl").read_text(encoding="utf-8").splitlines()
texts = [json.loads(line)["text"] for line in lines]

# %%
mini = profiles.load_profile("laptop").falcon
full = loading.load(mini, "bf16")
ids = full.tokenizer(texts[0], return_tensors="pt")["input_ids"].to(full.model.device)
layer, seen = full.model.transformer.h[6].mlp.dense_4h_to_h, {}
hook = layer.register_forward_pre_hook(lambda layer, given: seen.update(x=given[0][0].cpu()))
with torch.inference_mode():
    full.model(ids)
hook.remove()

# %%
weight, x = layer.weight.detach().cpu(), seen["x"].clone()
exact = x.float() @ weight.float().T
print(f"weight {tuple(weight.shape)} in {weight.dtype}, inputs {tuple(x.shape)}")
print(f"largest weight {weight.abs().max():.2f}, largest input {x.abs().max():.1f}")


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


# %% [markdown]
# ## 2 · int8, by hand
#
# *Absmax*: the largest magnitude of a row becomes 127, and all else a whole number in between. Here is the rule, and what
# bitsandbytes makes of the same matrix (it reads weights as float16).


# %%
def absmax_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row over its largest magnitude: (codes from -127 to 127, one scale a row)."""
    scales = matrix.abs().amax(1)
    return (matrix * (127 / scales)[:, None]).round().to(torch.int8), scales


# %%
import bitsandbytes.functional as bnb

codes, scales = absmax_int8(weight.half().float())
their_codes, their_scales, _ = bnb.int8_vectorwise_quant(weight.half())
print(
    "codes equal:", torch.equal(codes, their_codes), "· scales:", torch.equal(scales, their_scales)
)
restored = codes * scales[:, None] / 127
print(f"{weight.nbytes:,} bytes in bf16, {codes.nbytes + scales.nbytes:,} in int8 with its scales")
print(f"relative error of the weights {relative_error(restored, weight.float()):.4f}")

# %% [markdown]
# To multiply in 8 bits, the inputs are rounded too, each token's by its own largest. One huge value would leave the others
# only a few of the 127 steps, and large models have such *outliers*, always in the same few columns. LLM.int8() takes every
# column that holds a magnitude of 6 or more out of the 8-bit product and multiplies it in 16 bits. All of it:

# %%
SQUARE = 6.200124e-05  # bitsandbytes' 1 / 127² outside its CUDA kernels


def int8_product(x: torch.Tensor, weight: torch.Tensor, threshold: float = 6.0) -> torch.Tensor:
    """x @ weight.T: columns of x with outliers in 16 bits, all others in 8."""
    codes, scales = absmax_int8(weight.half().float())
    large = x.half().abs() >= threshold
    columns = large.any(0)
    x_codes, x_scales = absmax_int8(x.half().float().masked_fill(large, 0))
    whole = (x_codes.masked_fill(columns, 0).double() @ codes.double().T).float()  # exact integers
    product = (whole * (x_scales[:, None] * scales) * SQUARE).to(x.dtype)
    return product.addmm(x[:, columns], (codes[:, columns] * scales[:, None] / 127).to(x.dtype).T)


# %%
from bitsandbytes.nn import Int8Params, Linear8bitLt

theirs = Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=6.0).eval()
theirs.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
with torch.inference_mode():
    ours, their_product = int8_product(x, weight), theirs(x)
int8_equal = torch.equal(ours, their_product)
columns = (x.abs() >= 6).any(0).sum().item()
print(f"{columns} of {x.shape[1]} columns hold outliers; products equal: {int8_equal}")
print(f"relative error of the product {relative_error(ours, exact):.4f}, with")
print(f"no column in 16 bits {relative_error(int8_product(x, weight, 1e9), exact):.4f}")
results.record("int8_by_hand_equals_bitsandbytes", int8_equal)

# %% [markdown]
# Equal to the last bit, once a constant is copied too: where there is no CUDA kernel, bitsandbytes 0.50 scales by 6.200124e-05.
# 1/127² is 6.200012e-05, as its CUDA kernels have it: two digits slipped, and 8-bit products come out 18 millionths too large, far
# less than bf16 can hold, though it turns a rounding here and there. (One column in seven with outliers is many: "few" is said of large
# models, not of this miniature.)
#
# ## 3 · nf4, by hand
#
# Trained weights are spread much like a normal distribution. So nf4's 16 values are *quantiles* of one: dense in the middle,
# where most weights lie, and wide apart in the tails. Seven are negative, eight positive, 0 is exact, and the ends are -1 and 1,
# the largest magnitude of a block of 64 weights (QLoRA, section 3 and appendix E).

# %%
code = bnb.get_4bit_type("nf4", device="cpu")
quantiles = torch.tensor(quantization.nf4_code())
print(f"bitsandbytes' values are these quantiles within {(code - quantiles).abs().max():.0e}")
blocks = weight.float().view(-1, 64)
scaled = blocks / blocks.abs().amax(1, keepdim=True)
figure = plots.nf4_code(code.tolist(), scaled.numpy(), mini.label, quantization.NF4_TAIL)
results.record_figure("nf4_code", figure)

# %% [markdown]
# The curve is the normal distribution whose tails nf4 cuts at 1.85 standard deviations. The real weights (blue) stand closer to
# the middle, because the largest of 64 normal values is usually farther out; the spikes at the ends are these largest ones.
#
# Storing a weight is finding the nearest value; its index takes 4 bits, and two share a byte:


# %%
def nf4(weight: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the indices of the nearest values, two in a byte; the largest magnitude of each block of 64)."""
    blocks = weight.float().view(-1, 64)
    largest = blocks.abs().amax(1)
    borders = (code[1:] + code[:-1]) / 2
    nearest = torch.bucketize(blocks / largest[:, None], borders).flatten()
    return (nearest[::2] << 4 | nearest[1::2]).to(torch.uint8)[:, None], largest


# %%
packed, largest = nf4(weight, code)
their_packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
nf4_equal = torch.equal(packed, their_packed) and torch.equal(largest, state.absmax)
print("packed codes and scales equal bitsandbytes':", nf4_equal)
print(f"{weight.nbytes:,} bytes in bf16, {packed.nbytes + largest.nbytes:,} in nf4 with its scales")
restored = bnb.dequantize_4bit(their_packed, state)
print(f"relative error of the weights {relative_error(restored, weight.float()):.4f}")
results.record("nf4_by_hand_equals_bitsandbytes", nf4_equal)

# %% [markdown]
# A scale of 32 bits for 64 weights is half a bit a weight. *Double quantization* stores the scales, their mean taken off, in 8 bits,
# with one 32-bit scale for 256 of them: 0.127 bits a weight. Their 8-bit values are again a fixed list, fine near 0.


# %%
def double_quantized(scales: torch.Tensor, code: torch.Tensor, table: int = 65536) -> tuple:
    """(8-bit indices of the scales, the largest of each 256, their mean)."""
    centred = scales - scales.mean()
    groups = torch.nn.functional.pad(centred, (0, -len(scales) % 256)).view(-1, 256)
    largest = groups.abs().amax(1)
    place = groups / largest[:, None]
    if table:
        place = ((place + 1) / 2 * (table - 1) + 0.5).long() / (table - 1) * 2 - 1
    nearest = torch.bucketize(place, (code[1:] + code[:-1]) / 2)
    return nearest.flatten()[: len(scales)].to(torch.uint8), largest, scales.mean()


# %%
their_packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
small, of_256, mean = double_quantized(largest, state.state2.code)
double_equal = torch.equal(small, state.absmax) and torch.equal(mean, state.offset)
double_equal = double_equal and torch.equal(of_256, state.state2.absmax)
plain, _, _ = double_quantized(largest, state.state2.code, table=0)
print("scales of the scales equal bitsandbytes':", double_equal)
print(
    "codes that differ without its table:", (plain != state.absmax).sum().item(), "of", len(plain)
)
results.record("double_quantization_by_hand_equals_bitsandbytes", double_equal)

# %% [markdown]
# Nearest means nearest of 65,536 places here: on a processor, bitsandbytes rounds a scale to one of these and looks the answer up,
# so a scale that lies almost in the middle between two values may go to the farther one. No harm, but without that step the two need
# not agree bit for bit.
#
# ## 4 · The silent failure
#
# This is how the documentation loads a model in 4 bits:

# %%
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
plain = AutoModelForCausalLM.from_pretrained(
    loading.resolve(mini), quantization_config=config, dtype=torch.bfloat16, device_map="auto"
)
print("is_quantized:", plain.is_quantized, "· is_loaded_in_4bit:", plain.is_loaded_in_4bit)

# %% [markdown]
# It says that it is quantized. The one log line names *eetq*, another library altogether, and is easily missed. So, is it?

# %%
with torch.inference_mode():
    same = torch.equal(plain(ids).logits, full.model(ids).logits)
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
small = {precision: loading.load(mini, precision) for precision in ("int8", "nf4")}
quantization.verify_quantized(small["nf4"].model, "nf4")
loading.report_table(small["nf4"])

# %% [markdown]
# One layer left behind is enough to fail the proof, and it is named:

# %%
doctored = loading.load(mini, "nf4").model
doctored.set_submodule("transformer.h.6.mlp.dense_4h_to_h", layer)  # in bf16
try:
    quantization.verify_quantized(doctored, "nf4")
except quantization.QuantizationError as error:
    print(error)

# %%
share = small["nf4"].report.stored_bytes / full.report.stored_bytes
results.record("nf4_layers", small["nf4"].report.quantized_layers, "layers")
results.record("nf4_share_of_bf16", round(share, 3), "of bf16")

# %% [markdown]
# The share is larger than the 29% of Falcon-180B, because in a small model the embeddings, which stay in 16 bits, weigh more.
#
# ## 5 · Save, and load again
#
# Quantized weights can be saved, so that the next load is quick and small. The reload has the same hole: the plain call on an
# int8 checkpoint reports nothing missing and nothing wrong, and puts 8-bit codes into ordinary layers. It fails at the first word.

# %%
from tempfile import mkdtemp

folder = Path(mkdtemp())
saved = {p: loading.save(one, folder / f"{mini.name}-{p}") for p, one in small.items()}
plain = AutoModelForCausalLM.from_pretrained(saved["int8"].id, device_map="auto")
print("loaded without an error; the first layer:", plain.transformer.h[0].mlp.dense_h_to_4h)
try:
    with torch.inference_mode():
        plain(ids)
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# (In nf4 the shapes differ, and the plain load raises.) The helper saves and loads with the repair and proves both, here with the
# same logits, to the last bit. It refuses to save nf4 weights that have run on a processor with AVX512_BF16 instructions: there
# bitsandbytes rearranges them at their first use and rounds their scales to bf16, and the saved copy would be another model.

# %%
import shutil

equal = {}
for p, ref in saved.items():
    again = loading.load(ref, p)
    with torch.inference_mode():
        equal[p] = torch.equal(again.model(ids).logits, small[p].model(ids).logits)
    size = sum(file.stat().st_size for file in Path(ref.id).glob("*.safetensors"))
    print(f"{p}: {size:,} bytes on disk; logits after reloading equal: {equal[p]}")
shutil.rmtree(folder)
results.record("reloaded_equals_saved", all(equal.values()))

# %% [markdown]
# ## 6 · Layer by layer
#
# How wrong is each matrix, and how wrong is its result for a real text, if only that one were quantized? The lines of sections
# 2 and 3 did it for one; the helper takes all 32, with the inputs that each gets in bf16.

# %%
small = {precision: loading.load(mini, precision) for precision in ("int8", "nf4")}
errors = {
    precision: quantization.layer_errors(full.model, one.model, ids)
    for precision, one in {"bf16": full, **small}.items()
}
results.record_figure("layer_errors", plots.layer_errors(errors, mini.label))

# %% [markdown]
# In nf4 weights are some 9% off, in int8 about 1%, nearly the same everywhere but in a matrix with a few very large weights, which
# make the steps of their block or row coarse. The error of a result is mostly of the same size: the errors of its terms partly
# cancel, as the terms do. In int8 it is larger in `dense_4h_to_h`: int8 rounds the inputs as well, and these have the outliers. bf16's own rounding of a result lies far below both. What such errors do to the whole model is no sum of them, so
# it is measured.

# %%
for one in small.values():
    loading.unload(one)
worst = max(errors["nf4"], key=lambda row: row.output)
print(f"the largest error of an output in nf4: {worst.layer}, {worst.output:.1%}")
results.record("nf4_weight_error", round(errors["nf4"][0].weight, 4), "relative")

# %% [markdown]
# ## 7 · The price in quality
#
# *Perplexity* is the exponential of the mean negative log-likelihood of a token: 10 means that the model is as unsure as if it
# chose among 10 tokens. *Bits per byte* divides by the bytes of the text instead, so models with different vocabularies can
# be put side by side. The texts are stories on which falcon-mini was not trained. In plain PyTorch, for one of them:

# %%
device = full.model.device
row = full.tokenizer(full.tokenizer.bos_token + texts[0], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    nll = full.model(row.to(device), labels=row.to(device)).loss
print(f"perplexity of the first text: {nll.exp():.3f}")
print(f"the helper says the same: {evaluation.perplexity(full, texts[:1]).perplexity:.3f}")

# %% [markdown]
# A *task* asks the model to choose: of several endings, the one it finds likeliest is its answer. One item by hand:

# %%
fact = json.loads(Path("data/short_facts.jsonl").read_text(encoding="utf-8").splitlines()[0])
before = len(full.tokenizer(fact["text"])["input_ids"])
for option in fact["options"]:
    text = f"{fact['text']} {option}"
    row = full.tokenizer(text, return_tensors="pt")["input_ids"].to(device)
    with torch.inference_mode():
        logs = full.model(row).logits[0, before - 1 : -1].float().log_softmax(-1)
    print(f"{text}: {logs.gather(1, row[0, before:, None]).sum():.2f} nats")

# %% [markdown]
# `evaluation.evaluate` leaves that to EleutherAI's lm-evaluation-harness, over the first items of `story_endings` and
# `short_facts`, as many of each as the parameters at the top say.
# Now every precision of this profile, all at once where they fit, else one after the other: bytes, logits, texts, tasks, and the
# speeds of section 8.

# %%
TASKS = ["story_endings", "short_facts"]


def first_logits(loaded) -> torch.Tensor:
    ids = loaded.tokenizer(texts[0], return_tensors="pt")["input_ids"].to(loaded.model.device)
    with torch.inference_mode():
        return loaded.model(ids).logits[0].float().cpu()


# %%
def measure(ref, texts: list[str], items: int, tokens: tuple[int, int], bandwidth=None) -> tuple:
    found, speeds = {}, []
    for group in bench.residents(ref, settings.precisions):
        sizes = dict(zip(("prompt_tokens", "new_tokens"), tokens, strict=True))
        sizes |= {"repeats": repeats, "bandwidth": bandwidth}
        speeds.append(bench.measure(list(group.values()), **sizes))
        for precision, loaded in group.items():
            row = {"report": loaded.report, "logits": first_logits(loaded)}
            row["text"] = evaluation.perplexity(loaded, texts)
            row["tasks"] = evaluation.evaluate(loaded, TASKS, items)
            found[precision] = row
    return found, bench.joined(speeds)


# %%
falcon, falcon_speeds = measure(
    settings.falcon, texts[:texts_falcon], items_falcon, (prompt_tokens, new_tokens)
)


# %%
def moved(found: dict, precision: str) -> str:
    """How far the logits of the first text are from bf16's, on average."""
    if "bf16" not in found:
        return "bf16 does not fit"
    return f"{(found[precision]['logits'] - found['bf16']['logits']).abs().mean():.4f}"


def with_interval(value) -> str:
    return f"{value.estimate:.3f} ({value.low:.3f} to {value.high:.3f})"


# %%
def overview(ref, found: dict) -> pd.DataFrame:
    missing = bench.shortfalls(ref, settings.precisions)
    table = {p: {"weights, GiB": missing.get(p, "")} for p in settings.precisions}
    for p, row in found.items():
        report = row["report"]
        table[p] = {"weights, GiB": f"{report.stored_bytes / 2**30:.3f}"}
        table[p]["converted"] = f"{report.quantized_layers} of {report.linear_layers}"
        table[p]["logits moved"] = moved(found, p)
        table[p]["perplexity"] = with_interval(row["text"].perplexity_interval)
        table[p]["bits per byte"] = with_interval(row["text"].bits_per_byte_interval)
    return pd.DataFrame.from_dict(table, orient="index").fillna("")


overview(settings.falcon, falcon)

# %% [markdown]
# A row without figures says what this machine lacks. Had the silent failure struck, no layer would be converted and the logits would
# have moved by exactly zero:


# %%
def bars(ref, found: dict, speeds) -> list[dict]:
    missing = bench.shortfalls(ref, settings.precisions)
    decode = {row.precision: row.decode for row in speeds.rows if row.batch_size == 1}
    rows = [{"precision": p, "lacks": missing.get(p)} for p in settings.precisions]
    for row in rows:
        if one := found.get(row["precision"]):
            row["stored_bytes"] = one["report"].stored_bytes
            row["perplexity"] = one["text"].perplexity
            speed = decode[row["precision"]]
            row["tokens_per_second"] = speed and speed.median
    return rows


# %%
rows = bars(settings.falcon, falcon, falcon_speeds)
figure = plots.precision_comparison(rows, settings.falcon.label)
results.record_figure("falcon_by_precision", figure)

# %%
shown = "needs bf16 and another precision that fit this machine"
if "bf16" in falcon and len(falcon) > 1:
    logits = {p: row["logits"] for p, row in falcon.items()}
    distances = {
        p: (x - logits["bf16"]).abs().mean().item() for p, x in logits.items() if p != "bf16"
    }
    figure = plots.logit_differences(distances, settings.falcon.label)
    shown = results.record_figure("logit_differences", figure)
shown

# %% [markdown]
# ### Almost no difference?
#
# The article reports that 8-bit and 4-bit show almost no difference to bf16 in evaluation (A18). The intervals of the perplexities
# above overlap widely, but they are of the *texts*: other texts would give other values. Every precision read the same ones, so
# each text, and each item of a task, gives a pair, and the differences are known far better. "Almost none" shall mean here: the
# whole interval is within 0.02 bits per byte, or within 5 points of accuracy. Where it reaches across that line, these
# texts and items cannot tell.

# %%
ALMOST = {"text": 0.02, "tasks": 0.05}
VERDICTS = {True: "yes", False: "no", None: "cannot tell"}


def verdict(difference, margin: float) -> bool | None:
    """True: all of the interval is within the margin; False: all beyond; None: it cannot tell."""
    if max(abs(difference.low), abs(difference.high)) < margin:
        return True
    return False if difference.low > margin or difference.high < -margin else None


def pairs(found: dict, what: str) -> dict[str, evaluation.Paired]:
    others = [p for p in found if p != "bf16" and "bf16" in found]
    return {p: evaluation.paired(found[p][what], found["bf16"][what], seed=seed) for p in others}


# %%
def changes(found: dict) -> pd.DataFrame:
    table = {}
    for what in ALMOST:
        for p, pair in pairs(found, what).items():
            change = pair.difference
            row = {"bf16": f"{pair.second:.4f}", "change": f"{change.estimate:+.4f}"}
            row["95% interval"] = f"{change.low:+.4f} to {change.high:+.4f}"
            if pair.p_value is not None:
                row["only bf16 / only this right"] = f"{pair.only_second} / {pair.only_first}"
                row["McNemar's p"] = f"{pair.p_value:.2f}"
            row["almost none"] = VERDICTS[verdict(change, ALMOST[what])]
            table[f"{pair.measure}, {pair.count} items", p] = row
    return pd.DataFrame.from_dict(table, orient="index").fillna("")


# %%
def settled(found: dict) -> dict:
    """The verdicts on int8 and nf4; where one cannot tell, the claim stays open, unless another refutes it."""
    judged = {
        (what, p): verdict(pair.difference, ALMOST[what])
        for what in ALMOST
        for p, pair in pairs(found, what).items()
        if p in ("int8", "nf4")
    }
    is_open = None in judged.values()
    return {key: None if value and is_open else value for key, value in judged.items()}


# %%
def record_changes(side: str, ref, found: dict, claim: str | None) -> None:
    for what, name in (("text", "nll"), ("tasks", "accuracy")):
        compared = pairs(found, what)
        for p in [p for p in ("int8", "nf4") if p in compared]:
            difference = compared[p].difference
            value, tolerance, unit = difference.estimate, 0.03, ""
            if what == "text":
                text = found[p]["text"]
                value, tolerance = value * math.log(2) * text.bytes / text.tokens, 0.005
                unit = "nats/token"
            options = {"tolerance": tolerance, "model": ref.label, "claim": claim}
            options["agrees"] = settled(found)[what, p] if claim else None
            results.record(f"{side}_{name}_change_{p}", round(value, 4), unit, **options)


# %%
record_changes("falcon", settings.falcon, falcon, "A18")
for p, row in falcon.items():
    results.record(f"perplexity_{p}", round(row["text"].perplexity, 3))
    results.record(f"bits_per_byte_{p}", round(row["text"].bits_per_byte, 4), "bits/byte")
changes(falcon)

# %% [markdown]
# An interval that holds zero means that no difference was detected on these texts, not that there is none. And note that a model
# left unquantized by mistake would pass this test with honours: only the proof of section 4 tells the two apart.
#
# ### The same for the Llama side
#
# Llama's layers are plain `nn.Linear`, so its quantization needs no repair; it is proven all the same. On the laptop profile
# SmolLM2's *bf16* is itself a 4-bit file (Q4_1) dequantized, so its int8 and nf4 are a second rounding. It is slower, so it reads
# fewer texts and items, and its intervals are wider. Its vocabulary is another one: compare bits per byte, not perplexity.

# %%
tokens = (prompt_tokens_llama, new_tokens_llama)
bandwidth = next((row.bandwidth for row in falcon_speeds.rows), None)  # the same machine's
llama, llama_speeds = measure(
    settings.llama_chat, texts[:texts_llama], items_llama, tokens, bandwidth
)
overview(settings.llama_chat, llama)

# %%
label = settings.llama_chat.label
figure = plots.precision_comparison(bars(settings.llama_chat, llama, llama_speeds), label)
results.record_figure("llama_by_precision", figure)

# %%
record_changes("llama", settings.llama_chat, llama, None)
changes(llama)

# %% [markdown]
# ### Quality against bytes
#
# What is left of bf16's bytes, and what that costs. The green band is the published claim as it is read here.


# %%
def trade(found: dict) -> list[dict]:
    size = {p: row["report"].stored_bytes for p, row in found.items()}
    return [
        {"precision": p, "share": size[p] / size["bf16"], "change": pair.difference}
        for p, pair in pairs(found, "text").items()
    ]


sides = {settings.falcon.label: trade(falcon), settings.llama_chat.label: trade(llama)}
title = " and ".join(sides)
figure = plots.quality_against_bytes(sides, title, ALMOST["text"])
results.record_figure("quality_against_bytes", figure)

# %% [markdown]
# ## 8 · The price in speed and memory
#
# By hand: the time of one reply, and the tokens in it. Its first token costs the reading of the whole prompt (*prefill*), each
# later one a step over a single token (*decoding*).

# %%
from time import perf_counter

prompt = ids[:, :prompt_tokens]
options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
for count in (1, 1 + new_tokens):
    begin = perf_counter()
    full.model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)
    print(f"{count} new tokens: {1000 * (perf_counter() - begin):.0f} ms")

# %% [markdown]
# `bench.measure`, which ran above, does that at batch sizes 1, 4 and 16, several times after a run to warm up; where all precisions
# are in memory at once it goes round them, so that a slow spell of the machine meets each. Medians, with the least and the
# largest of the runs in brackets. *Peak* is the weights and the most that a run allocates beside them (counted by torch's
# allocator). *Limit* is what the memory's bandwidth allows, measured by large copies: every step reads all the weights once,
# and the cache of each reply. Precision shrinks the weights alone: the cache stays in the type of the other layers (16 bit for
# int8 and nf4), which is one more reason to keep only the key-value heads in it (notebook 01, section 7).

# %%
falcon_speeds.table()

# %%
figure = plots.speed_against_bytes(
    falcon_speeds.rows, settings.falcon.label, interleaved=falcon_speeds.interleaved
)
results.record_figure("falcon_speed_against_bytes", figure)

# %% [markdown]
# On a laptop falcon-mini lies far below its limit: Python takes longer to start each operation than the processor to finish it.
# The larger a model, the more the bytes decide. In a batch, one reading of the weights serves all replies, so the batch writes
# more tokens a second.
#
# ### Is 8-bit much faster than 4-bit?
#
# The article says so (A19). A user of bitsandbytes reported, on eight A100s, int8 five times as slow as bf16 and
# slower than 4-bit too ([bitsandbytes#490](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/490)). Speed belongs to the machine, so here
# is yours. "Much faster" shall mean one and a half times, for a single reply.

# %%
single = [row for row in falcon_speeds.rows if row.batch_size == 1 and row.decode]
decode = {row.precision: row.decode.median for row in single}
for p, speed in decode.items():
    results.record(f"speed_{p}", round(speed, 1), "tokens/s", model=settings.falcon.label)
if {"int8", "nf4"} <= decode.keys():
    ratio = decode["int8"] / decode["nf4"]
    print(f"int8 decodes {ratio:.2f} times as fast as nf4 on this machine")
    options = {"claim": "A19", "model": settings.falcon.label, "agrees": ratio > 1.5}
    results.record("int8_over_nf4_speed", round(ratio, 2), "ratio of tokens/s", **options)

# %% [markdown]
# The Llama side:

# %%
llama_speeds.table()

# %%
figure = plots.speed_against_bytes(
    llama_speeds.rows, settings.llama_chat.label, interleaved=llama_speeds.interleaved
)
results.record_figure("llama_speed_against_bytes", figure)

# %% [markdown]
# ## 9 · Other ways to shrink
#
# | format | what it is | pick it when | Falcon on transformers 5.23, tried with this workbook |
# |---|---|---|---|
# | [bitsandbytes](https://huggingface.co/docs/transformers/quantization/bitsandbytes) int8, nf4 | rounds at load, no calibration | you want to try, or to fine-tune with QLoRA | works with the repair of section 4 |
# | [GPTQ](https://arxiv.org/abs/2210.17323) ([docs](https://huggingface.co/docs/transformers/quantization/gptq)) | 2 to 8 bits; each column's rounding is made good in the next ones, with calibration texts | you serve one model for long on GPUs and can spend hours on calibration, or a checkpoint is published | not tried |
# | [AWQ](https://arxiv.org/abs/2306.00978) ([docs](https://huggingface.co/docs/transformers/quantization/awq)) | 4 bits; scales up the weights that meet the largest inputs first, with calibration texts | as GPTQ | not tried |
# | [GGUF](https://huggingface.co/docs/transformers/gguf) | one file in 2 to 8 bits, for llama.cpp | you run on processors or Apple's chips, outside transformers | llama.cpp runs it; transformers does not load Falcon's new architecture from it |
# | [fp8](https://huggingface.co/docs/transformers/quantization/finegrained_fp8) | 8-bit floating point for weights and inputs | your GPUs multiply in it (compute capability 9, such as H100; not the A100) | not tried; its code looks for `nn.Linear` exactly, too |
# | [torchao](https://huggingface.co/docs/transformers/quantization/torchao) | PyTorch's own int4, int8 and fp8 | you compile the model with `torch.compile` | int8 loads, but its first forward pass fails without the repair |

# %% [markdown]
# ## What you saw
#
# A flag is not a proof: the plain 4-bit load changed nothing and said that it had. Repaired and proven, nf4 takes a little
# over a quarter of bf16's bytes in the layers; what it costs has an interval, and differs from model to model, so one model's
# *almost no difference* is not another's. Which precision is fastest belongs to the machine and its kernels.

# %%
loading.unload(full)
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
# **3.** Bring nf4 back: from `packed` (uint8, two indices a byte, the first in the upper four bits), one `scale` for each 64 weights
# and the 16 values of `code`, make the flat float32 tensor of weights.


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
#
#
# exercises.check("02-3", nf4_back)
# ```
#
# </details>
