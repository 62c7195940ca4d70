"""Bytes for weights, KV cache, activations, gradients and optimizer, and where the layers go; nothing is loaded.

Everything follows from a model's configuration, for the Falcon family (both decoder architectures) and the Llama
family, as transformers, bitsandbytes and AdamW store it. Sizes are bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from helpers.types import (
    GIB,
    PRECISIONS,
    QUANTIZED,
    ROOT,
    Machine,
    MemoryEstimate,
    Placement,
    WorkbookError,
    choose,
    gib,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

CONFIGS = ROOT / "env" / "models" / "configs"
A100_PEAK = 312e12  # bf16 FLOP/s, dense: NVIDIA A100 data sheet
RESERVED = 0.05  # share of each device kept free for the CUDA context and fragments
MODES = ("inference", "full", "lora", "qlora")
CONTEXT = 2048  # tokens that are planned for where none are named: what Falcon was trained on
CacheHeads = Literal["kv", "library"]
Device = int | str  # as in a device map: a GPU's number, "cpu" or "disk"


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder layer: ``rows`` outputs by ``columns`` inputs."""

    part: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, the bias not counted."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Anatomy:
    """The shape of a model as its configuration gives it; all that the formulas of this room need.

    ``cached_heads`` are the heads that transformers' own KV cache holds; ``loading.load`` has ``kv_heads`` cached.
    ``width`` is the MLP's inner size. For one token, elements: ``kept`` by a layer for its backward pass, ``returned``
    the further ones while that pass runs, ``prefill`` alive at once in the MLP of a forward pass, with ``wide_tensors``
    of the MLP's width. For one token and one token of context: ``scores`` are fp32 attention scores, ``masks`` bytes of
    the attention mask that the model makes, and ``biases`` elements of alibi's.
    """

    layers: int
    hidden: int
    vocabulary: int
    head_dim: int
    kv_heads: int
    cached_heads: int
    tied: bool
    linears: tuple[Linear, ...]
    norms: int
    final_norm: int
    width: int
    kept: int
    returned: int
    prefill: int
    wide_tensors: int
    scores: int
    masks: int
    biases: int
    embeddings_name: str
    rotary_name: str
    layers_name: str
    final_norm_name: str
    head_name: str = "lm_head"

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings, and of the head where it is separate."""
        return self.vocabulary * self.hidden


def published_config(repo_id: str) -> PretrainedConfig:
    """The configuration published with a model, from this repository: works offline.

    The fields are as published, but for ``auto_map``, which points at code on the hub that is never run.
    Raises WorkbookError, listing the models there are, for another name.
    """
    from transformers import AutoConfig

    choose(repo_id, published_models(), "published configuration of")
    fields = json.loads((CONFIGS / f"{repo_id.replace('/', '--')}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**fields)


def published_models() -> tuple[str, ...]:
    """The models whose published configuration is here."""
    return tuple(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))


def anatomy(config: PretrainedConfig, cache_heads: CacheHeads = "kv") -> Anatomy:
    """The shape of a model; ``cache_heads``: see ``kv_bytes_per_token``, for what Falcon's attention works with.

    Raises WorkbookError for families other than Falcon and Llama.
    """
    families: dict[str, Callable[[PretrainedConfig, CacheHeads], Anatomy]] = {"falcon": _falcon, "llama": _llama}
    if config.model_type not in families:
        raise WorkbookError(f"memory knows the families {', '.join(families)}, not {config.model_type!r}")
    return families[config.model_type](config, cache_heads)


def count_parameters(config: PretrainedConfig, tied: bool | None = None) -> int:
    """The number of parameters by closed formula.

    ``tied`` says whether the head shares the embeddings' matrix; left out, the configuration decides
    (Falcon shares: 178,557,088,768 for 180B; counted with a separate head: 179,522,565,120).
    """
    return sum(count for count, _ in _parts(anatomy(config), tied).values())


def parameter_table(config: PretrainedConfig, tied: bool | None = None) -> pd.DataFrame:
    """Where the parameters sit. Index: part; columns: parameters, share of the whole, per_layer."""
    import pandas as pd

    parts = _parts(anatomy(config), tied)
    total = sum(count for count, _ in parts.values())
    rows = [(name, count, count / total, per_layer) for name, (count, per_layer) in parts.items()]
    return pd.DataFrame(rows, columns=["part", "parameters", "share", "per_layer"]).set_index("part")


def weight_bytes(config: PretrainedConfig, precision: str, *, double_quant: bool = False) -> int:
    """Bytes of the weights in memory.

    int8 and nf4 as bitsandbytes stores them: the linear layers alone, with their scales and code tables; embeddings,
    norms and head stay in 16 bit. int8: one byte a weight and one fp32 scale a row (arXiv:2208.07339). nf4: half a byte
    a weight and one fp32 scale for 64 weights; ``double_quant`` stores these scales in 8 bit, with one fp32 scale for
    256 of them (arXiv:2305.14314). Raises WorkbookError for an unknown precision.
    """
    shape = anatomy(config)
    first, last = _end_bytes(shape, precision)
    return first + shape.layers * _layer_bytes(shape, precision, double_quant) + last


def kv_bytes_per_token(config: PretrainedConfig, precision: str = "bf16", *, heads: CacheHeads = "kv") -> int:
    """Bytes of keys and values for one token of one sequence, all layers; in 16 bit unless the precision is fp32.

    heads="kv": the key-value heads alone, as ``loading.load`` has them (``helpers.grouped_cache``), and vLLM and
    llama.cpp (163,840 bytes a token for Falcon-180B in bf16); heads="library": what transformers itself stores. For
    Falcon's new decoder architecture these are all query heads, because the keys and values are copied to them before
    they are cached (4,751,360).
    """
    shape = anatomy(config)
    count = {"kv": shape.kv_heads, "library": shape.cached_heads}[heads]
    return 2 * shape.layers * count * shape.head_dim * _element_bytes(precision)


def estimate(
    config: PretrainedConfig,
    precision: str,
    *,
    mode: str = "inference",
    batch_size: int = 1,
    context_tokens: int = 2048,
    lora_rank: int = 8,
    checkpointing: bool = True,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
) -> MemoryEstimate:
    """Bytes by part for one kind of work, as a sum over all devices; the CUDA context is not in it.

    "inference": weights, the KV cache of every sequence, one layer's activations. "full": every parameter trained with
    AdamW in mixed precision, 16 bytes a parameter (2 weight, 2 gradient, 4 master weight, 4 + 4 moments: ZeRO,
    arXiv:1910.02054, section 3.1; fp32 takes 16 as well). "lora" and "qlora": frozen weights, in nf4 or int8 for
    "qlora", and fp32 adapters of rank ``lora_rank`` on every linear layer, trained with AdamW (arXiv:2106.09685,
    arXiv:2305.14314). Under ZeRO-3 each of n devices holds an n-th of weights, gradients and optimizer.
    Activations: see ``activation_bytes``; ``batch_size`` counts the sequences on all devices; ``double_quant``: see
    ``weight_bytes``; ``cache_heads``: see ``kv_bytes_per_token`` (for activations too).
    Raises WorkbookError for an unknown precision or mode, or where the two do not go together.
    """
    _check_mode(precision, mode)
    work = {"batch_size": batch_size, "context_tokens": context_tokens, "checkpointing": checkpointing}
    activations = activation_bytes(config, precision, mode=mode, cache_heads=cache_heads, **work)
    weights = weight_bytes(config, precision, double_quant=double_quant)
    if mode == "inference":
        cache = batch_size * context_tokens * kv_bytes_per_token(config, precision, heads=cache_heads)
        return MemoryEstimate(precision, mode, weights, kv_cache=cache, activations=activations)
    if mode == "full":
        count = count_parameters(config)
        gradients = count * _element_bytes(precision)
        optimizer = 16 * count - weights - gradients
    else:
        adapters = 4 * _adapter_parameters(config, lora_rank)
        weights, gradients, optimizer = weights + adapters, adapters, 2 * adapters
    return MemoryEstimate(precision, mode, weights, activations=activations, gradients=gradients, optimizer=optimizer)


def activation_bytes(
    config: PretrainedConfig,
    precision: str,
    *,
    mode: str = "inference",
    batch_size: int = 1,
    context_tokens: int = 2048,
    checkpointing: bool = True,
    cache_heads: CacheHeads = "kv",
) -> int:
    """Bytes of activations at the peak.

    Inference: the prefill's, counted in transformers' code. Falcon's MLP runs while the embeddings, the layer's input,
    its norms and the result of the attention are alive: 13 hidden sizes a token for 180B, with the two tensors of the
    MLP's width; Llama's: 4 hidden sizes and three times that width. Not counted: the mask that texts of different
    lengths need, one byte for each pair of tokens of a sequence, and what a GPU may need in fp32, for which its fused
    kernels may not take grouped heads (never tried). With ``cache_heads="library"`` that mask is counted,
    as transformers' own Falcon always makes it; and for the old architecture (7B), whose one key head fused attention
    does not take as the library hands it over, attention scores in fp32, twice, and their test for -inf (9as²b for a
    heads). A quantized matrix is multiplied as bitsandbytes does on a GPU: nf4 is unpacked to 16 bit; int8 adds the
    inputs in 8 bit, what finds their outliers, and the products in 32 bit (counted in its code, not measured yet; on a
    CPU int8 takes twice as much).

    Training: after Korthikanti et al. 2022 (arXiv:2205.05198, section 4). Their count of what a layer keeps for its
    backward pass, s tokens, batch b, hidden size h, in 16 bit, with fused attention and no dropout, becomes 28sbh for
    Falcon-180B's parallel block: input 2, two norms 4, the product of the fused matrix 2 (values are read there),
    rotated queries 2, attention's result 2, MLP 8 + 8, and 0.2 for the few keys and values. The library's own keeps
    30sbh: for the product 4 of keys and values copied to all heads. With checkpointing a layer keeps its input alone
    (2sbh) and one layer at a time is computed anew, with the gradients of its MLP beside it. The other peak of training
    is the loss: 12 bytes for each token and word of the vocabulary (logits and their gradient in 16 bit,
    log-probabilities and their gradient in fp32). nf4 adds one matrix of weights unpacked to 16 bit; the library's
    Falcon of the old architecture scores of 4as²b each.
    """
    shape, size = anatomy(config, cache_heads), _element_bytes(precision)
    tokens = batch_size * context_tokens
    if mode == "inference":
        return max(_prefill_bytes(shape, precision, batch_size, context_tokens), batch_size * shape.vocabulary * 6)
    scores = 4 * shape.scores * context_tokens
    layer = tokens * (size * shape.kept + scores)
    returned = tokens * max(size * shape.returned, 2 * scores)
    if mode != "full":  # fp32 copies of what enters the adapters
        returned += tokens * 4 * sum(linear.columns for linear in shape.linears)
    loss = tokens * shape.vocabulary * (2 * size + 8)
    kept = tokens * size * shape.hidden if checkpointing else layer
    return shape.layers * kept + max(layer * checkpointing + returned, loss) + _unpacked_bytes(shape, precision)


def place(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float] = (80e9,) * 8,
    *,
    context_tokens: int = 2048,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
    cpu_bytes: float = 0.0,
    disk: bool = False,
) -> Placement:
    """Whole layers over devices of the given bytes, in order: the fullest as empty as can be, then all as even.

    Each layer's KV cache lies beside it; the embeddings come first, with the head where the two are tied, and the final
    norm last, with the head where it is separate. ``device_map`` is what ``from_pretrained`` takes. Of each device
    ``RESERVED`` and one layer's activations are kept free.

    ``cpu_bytes`` of host memory and the ``disk`` hold what the devices cannot: the devices are filled up in order, the
    modules after that go to "cpu", and what is too much there to "disk". They run on the first device in use, which
    keeps their cache and room for the weights of one of them at a time (accelerate moves them there); a device without
    that room is left out where more modules then stay on the others. Without any device,
    ``gpus=[]``, the model runs in ``cpu_bytes`` of host memory, and "disk" takes what is too much there.
    Raises WorkbookError without a device or host memory, and where int8 or nf4 weights would have to be offloaded:
    bitsandbytes refuses the disk, and leaves modules in host memory unquantized.
    """
    if not gpus and not cpu_bytes:
        raise WorkbookError("place needs at least one device: give the bytes of each, such as [80e9, 80e9]")
    shape = anatomy(config)
    cache = batch_size * context_tokens * kv_bytes_per_token(config, precision, heads=cache_heads) // shape.layers
    pieces = _pieces(shape, precision, cache, double_quant)
    sequences = {"batch_size": batch_size, "context_tokens": context_tokens}
    work = activation_bytes(config, precision, **sequences, cache_heads=cache_heads)
    room = _room(gpus, work)
    sizes = [piece.size for piece in pieces]
    if not (cpu_bytes or disk) or (gpus and _filled(sizes, room)):
        return _placement(pieces, _spread(sizes, room), room, gpus)
    placed = _offloaded(pieces, room, cpu_bytes * (1 - RESERVED), work, disk)
    if precision in QUANTIZED and (gpus or "disk" in placed.device_map.values()):
        raise WorkbookError(_NOT_OFFLOADED.format(precision=precision))
    if placed.fits:
        return placed
    where = f"{_devices(gpus)} and " if gpus else ""
    return replace(placed, why_not=f"{placed.why_not} over {where}{gib(cpu_bytes)} of host memory")


def context_for(config: PretrainedConfig) -> int:
    """The tokens of context that a model is planned for: ``CONTEXT``, or what it takes where it takes fewer."""
    return min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT)


def place_together(
    configs: Sequence[PretrainedConfig],
    precision: str,
    gpus: Sequence[float] = (80e9,) * 8,
    *,
    context_tokens: int | None = None,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
    cpu_bytes: float = 0.0,
) -> list[Placement]:
    """Models that are in memory at the same time: each placed, in turn, into what those before it leave.

    Weights, cache and activations of the earlier ones are taken off each device, of which ``RESERVED`` stays free once.
    Without GPUs, ``gpus=[]``, all are in ``cpu_bytes`` of host memory. ``context_tokens`` left out: ``context_for``
    each model; the other arguments are those of ``place``, whose errors it raises.
    """
    sizes: dict[Device, float] = dict(enumerate(gpus)) if gpus else {"cpu": cpu_bytes}
    taken: dict[Device, float] = dict.fromkeys(sizes, 0)
    placements = []
    for config in configs:
        tokens = context_tokens or context_for(config)
        work = {"context_tokens": tokens, "batch_size": batch_size, "double_quant": double_quant}
        left = [max(size - taken[device] / (1 - RESERVED), 1.0) for device, size in sizes.items()]
        room = {"gpus": left} if gpus else {"gpus": (), "cpu_bytes": left[0]}
        placed = place(config, precision, **room, **work, cache_heads=cache_heads)
        for device, parts in parts_by_device(config, precision, placed, **work, cache_heads=cache_heads).items():
            taken[device] += sum(parts.values())
        placements.append(placed)
    return placements


def left_beside(names: Sequence[str]) -> str:
    """What follows a ``why_not`` of ``place_together``, where the models of these names were placed before."""
    return f" left beside {' and '.join(names)}" if names else ""


def parts_by_device(
    config: PretrainedConfig,
    precision: str,
    placed: Placement,
    *,
    context_tokens: int = 2048,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
) -> dict[Device, dict[str, int]]:
    """What each device of a placement holds, bytes by part: weights, kv_cache, activations.

    The arguments are those of ``place``. Activations are counted on each device on which modules run.
    """
    sequences = {"batch_size": batch_size, "context_tokens": context_tokens}
    work = activation_bytes(config, precision, **sequences, cache_heads=cache_heads)
    weights = dict.fromkeys(placed.per_device_bytes, 0)
    for piece in _pieces(anatomy(config), precision, 0, double_quant):
        weights[placed.device_map[piece.names[0]]] += piece.weights
    on_gpus = any(isinstance(device, int) for device in placed.device_map.values())
    return {
        device: {
            "weights": weights[device],
            "kv_cache": held - weights[device],
            "activations": work if held and (isinstance(device, int) if on_gpus else device == "cpu") else 0,
        }
        for device, held in placed.per_device_bytes.items()
    }


def largest_context(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float],
    *,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
) -> int:
    """The most tokens of context for which ``place`` finds room on these devices, 0 where it finds none for one token.

    What the memory allows: the model may have been trained on fewer.
    """
    how = {"batch_size": batch_size, "double_quant": double_quant, "cache_heads": cache_heads}
    low, high = 0, 1
    while _fits(config, precision, gpus, high, **how):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(config, precision, gpus, middle, **how) else (low, middle)
    return low


def least_gpus(
    config: PretrainedConfig,
    precision: str,
    gpu: float,
    *,
    context_tokens: int = 2048,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
) -> int | None:
    """The least number of GPUs of that many bytes on which ``place`` finds room; None where no number will do."""
    how = {"batch_size": batch_size, "double_quant": double_quant, "cache_heads": cache_heads}
    most = anatomy(config).layers + 2  # one piece on each
    return next((n for n in range(1, most + 1) if _fits(config, precision, [gpu] * n, context_tokens, **how)), None)


def least_gpus_together(
    configs: Sequence[PretrainedConfig],
    precision: str,
    gpu: float,
    *,
    context_tokens: int | None = None,
    batch_size: int = 1,
    double_quant: bool = False,
    cache_heads: CacheHeads = "kv",
) -> int | None:
    """The least number of GPUs of that many bytes on which ``place_together`` finds room; None where none will do."""
    how = {"batch_size": batch_size, "double_quant": double_quant, "cache_heads": cache_heads}
    alone = [
        least_gpus(config, precision, gpu, context_tokens=context_tokens or context_for(config), **how)
        for config in configs
    ]
    if None in alone:
        return None

    def fits(count: int) -> bool:
        placed = place_together(configs, precision, [gpu] * count, context_tokens=context_tokens, **how)
        return all(each.fits for each in placed)

    most = sum(anatomy(config).layers + 2 for config in configs)
    return next((n for n in range(max(filter(None, alone)), most + 1) if fits(n)), None) if fits(most) else None


def shard(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float],
    *,
    mode: str,
    batch_size: int = 1,
    context_tokens: int = 2048,
) -> Placement:
    """Training spread evenly over equal devices, as ZeRO-3 does (Rajbhandari et al. 2020, arXiv:1910.02054).

    Weights, gradients and optimizer are divided; each device works on its share of the sequences and has room for one
    gathered layer. ``RESERVED`` of each device is kept free. There is no ``device_map``: every device holds a part of
    every layer. Raises WorkbookError where precision and mode do not go together.
    """
    sequences = math.ceil(batch_size / len(gpus))
    held = estimate(config, precision, mode=mode, batch_size=sequences, context_tokens=context_tokens)
    gathered = _layer_bytes(anatomy(config), precision)
    each = math.ceil((held.total - held.activations) / len(gpus)) + held.activations + gathered
    lacking = each - min(gpus) * (1 - RESERVED)
    why_not = f"each of {_devices(gpus)} lacks {gib(lacking)}" if lacking > 0 else ""
    return Placement({}, dict.fromkeys(range(len(gpus)), each), lacking <= 0, why_not)


def lacks(config: PretrainedConfig, precision: str, machine: Machine, *, context_tokens: int = 2048) -> str:
    """What is missing for inference here, such as "lacks 12.3 GiB of memory"; empty where the model fits.

    What ``place`` says: of whole layers over what is free on the GPUs, or, where there is none, of free memory.
    """
    if machine.gpus:
        free = [gpu.free_bytes for gpu in machine.gpus]
        return place(config, precision, free, context_tokens=context_tokens).why_not
    host = max(machine.ram_available_bytes, 1)
    placed = place(config, precision, [], context_tokens=context_tokens, cpu_bytes=host)
    return "" if placed.fits else f"{placed.why_not.partition(' over ')[0]} of memory"


def hardware_claims() -> pd.DataFrame:
    """The machines the article names for Falcon-180B (A13-A17) beside what the bytes add up to, and the least that do.

    Published sizes are GB as published. Estimates: one sequence of 2048 tokens; training in bf16 (QLoRA in nf4) with
    gradient checkpointing. The least number of GPUs: for inference whole layers on each (``place``); for training
    weights, gradients and optimizer spread evenly as ZeRO-3 does, each GPU with a sequence of its own and room for one
    gathered layer. A sum over devices says nothing about speed.
    """
    import pandas as pd

    config = published_config("tiiuae/falcon-180B")
    rows = []
    for claim, use, machine, published, precision, mode in _CLAIMS:
        total = estimate(config, precision, mode=mode).total
        least = [_least_for(config, precision, mode, size) for size in (80e9, 40e9)]
        rows.append((claim, use, machine, published, round(total / 1e9), round(total / GIB), *least))
    columns = ["claim", "use", "published machine", "published GB", "estimate GB", "estimate GiB"]
    return pd.DataFrame(rows, columns=[*columns, "least 80 GB GPUs", "least 40 GB GPUs"])


def training_flop(parameters: float, tokens: float) -> float:
    """6·N·D: floating-point operations to train N parameters on D tokens (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * parameters * tokens


def implied_utilisation(flop: float, gpu_hours: float, peak: float = A100_PEAK) -> float:
    """The share of ``peak`` FLOP/s at which so many GPU hours do so many operations."""
    return flop / (gpu_hours * 3600 * peak)


_NOT_OFFLOADED = (
    "{precision} weights cannot be offloaded: bitsandbytes refuses modules on the disk and leaves those in host memory "
    "unquantized. Give larger devices, or choose bf16."
)
_CLAIMS = (
    ("A13", "full fine-tuning", "8x 8x A100 80GB", 5120, "bf16", "full"),
    ("A14", "LoRA with ZeRO-3", "2x 8x A100 80GB", 1280, "bf16", "lora"),
    ("A15", "QLoRA", "2x A100 80GB", 160, "nf4", "qlora"),
    ("A16", "bf16 inference", "8x A100 80GB", 640, "bf16", "inference"),
    ("A17", "int4 inference", "8x A100 40GB", 320, "nf4", "inference"),
)


def _falcon(config: PretrainedConfig, cache_heads: CacheHeads) -> Anatomy:
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size
    new, bias = config.new_decoder_architecture, config.bias
    kv_heads = 1 if config.multi_query and not new else config.num_kv_heads
    cached = heads if new else kv_heads
    norms, library = _falcon_norms(config), cache_heads == "library"
    # Fused attention does not take the library's one key head for many queries: fp32 copies and scores come instead.
    fused = not library or cached == heads
    attention = (3 if fused else 6) * hidden if library else 2 * hidden + 3 * kv_heads * config.head_dim
    sequential = not (new or config.parallel_attn)
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        vocabulary=config.vocab_size,
        head_dim=config.head_dim,
        kv_heads=kv_heads,
        cached_heads=cached,
        tied=config.tie_word_embeddings,
        linears=(
            Linear("attention qkv", hidden + 2 * kv_heads * config.head_dim, hidden, bias),
            Linear("attention out", hidden, hidden, bias),
            Linear("mlp up", width, hidden, bias),
            Linear("mlp down", hidden, width, bias),
        ),
        norms=norms * 2 * hidden,
        final_norm=2 * hidden,
        width=width,
        kept=(2 + sequential + norms) * hidden + attention + 2 * width,
        returned=2 * width,
        prefill=(3 + sequential + norms) * hidden + 2 * width,
        wide_tensors=2,
        scores=0 if fused else heads,
        masks=int(library),
        biases=heads * config.alibi,
        embeddings_name="transformer.word_embeddings",
        rotary_name="transformer.rotary_emb",
        layers_name="transformer.h",
        final_norm_name="transformer.ln_f",
    )


def _falcon_norms(config: PretrainedConfig) -> int:
    if not config.parallel_attn:
        return 2
    return config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)


def _llama(config: PretrainedConfig, _: CacheHeads) -> Anatomy:
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        vocabulary=config.vocab_size,
        head_dim=head_dim,
        kv_heads=config.num_key_value_heads,
        cached_heads=config.num_key_value_heads,
        tied=config.tie_word_embeddings,
        linears=(
            Linear("attention qkv", queries, hidden, config.attention_bias),
            Linear("attention qkv", keys, hidden, config.attention_bias),
            Linear("attention qkv", keys, hidden, config.attention_bias),
            Linear("attention out", hidden, queries, config.attention_bias),
            Linear("mlp up", width, hidden, config.mlp_bias),
            Linear("mlp up", width, hidden, config.mlp_bias),
            Linear("mlp down", hidden, width, config.mlp_bias),
        ),
        norms=2 * hidden,
        final_norm=hidden,
        # each RMSNorm: input in fp32 (two elements), normalised, scaled; the gated MLP: gate, up, activated, product
        width=width,
        kept=8 * hidden + 2 * queries + 2 * keys + 4 * width,
        returned=3 * width,
        prefill=4 * hidden + 3 * width,
        wide_tensors=3,
        scores=0,
        masks=0,
        biases=0,
        embeddings_name="model.embed_tokens",
        rotary_name="model.rotary_emb",
        layers_name="model.layers",
        final_norm_name="model.norm",
    )


def _parts(shape: Anatomy, tied: bool | None) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, of these in each layer)."""
    parts = {"embeddings": (shape.embeddings, 0)}
    for name in ("attention qkv", "attention out", "mlp up", "mlp down"):
        each = sum(x.weights + x.bias * x.rows for x in shape.linears if x.part == name)
        parts[name] = (shape.layers * each, each)
    parts["norms"] = (shape.layers * shape.norms + shape.final_norm, shape.norms)
    separate = not (shape.tied if tied is None else tied)
    parts["head"] = (shape.embeddings if separate else 0, 0)
    return parts


def _element_bytes(precision: str) -> int:
    """Bytes of what is not quantized: embeddings, norms, activations, cache."""
    choose(precision, PRECISIONS, "precision")
    return 4 if precision == "fp32" else 2


def _linear_bytes(linear: Linear, precision: str, double_quant: bool) -> int:
    bias = linear.bias * linear.rows * _element_bytes(precision)
    if precision == "int8":
        return linear.weights + 4 * linear.rows + bias
    if precision != "nf4":
        return linear.weights * _element_bytes(precision) + bias
    blocks = math.ceil(linear.weights / 64)
    # 16 fp32 code values; nested: 256 more, one fp32 offset
    scales = blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1) if double_quant else 4 * (blocks + 16)
    return math.ceil(linear.weights / 2) + scales + bias


def _layer_bytes(shape: Anatomy, precision: str, double_quant: bool = False) -> int:
    linears = sum(_linear_bytes(linear, precision, double_quant) for linear in shape.linears)
    return linears + shape.norms * _element_bytes(precision)


def _end_bytes(shape: Anatomy, precision: str) -> tuple[int, int]:
    """Bytes before the layers and after them: a tied head needs none of its own."""
    size = _element_bytes(precision)
    separate_head = 0 if shape.tied else shape.embeddings
    return shape.embeddings * size, (shape.final_norm + separate_head) * size


def _adapter_parameters(config: PretrainedConfig, rank: int) -> int:
    shape = anatomy(config)
    return shape.layers * rank * sum(linear.rows + linear.columns for linear in shape.linears)


def _check_mode(precision: str, mode: str) -> None:
    _element_bytes(precision)
    choose(mode, MODES, "mode")
    if mode == "qlora" and precision not in QUANTIZED:
        raise WorkbookError(f"qlora trains over {' or '.join(QUANTIZED)} weights; for {precision} choose mode='lora'")
    if mode in ("full", "lora") and precision in QUANTIZED:
        raise WorkbookError(f"{mode} does not train over {precision} weights; choose mode='qlora' or bf16")


def _prefill_bytes(shape: Anatomy, precision: str, batch_size: int, context_tokens: int) -> int:
    size, tokens = _element_bytes(precision), batch_size * context_tokens
    mlp = tokens * size * shape.prefill
    # while a matrix of the MLP is multiplied, one of the two widest tensors is not there yet
    others = mlp - tokens * size * 2 * shape.width
    if precision == "nf4":
        mlp = max(mlp, others + tokens * size * shape.width + _unpacked_bytes(shape, precision))
    if precision == "int8":
        # The products in 32 and in 16 bit beside the inputs in 8; before that the inputs of the widest matrix, as they
        # are, as float16, in 8 bit, and their absolute values with the marks of the outliers.
        base = tokens * size * (shape.prefill - shape.wide_tensors * shape.width)
        mlp = max(mlp, others + tokens * (shape.hidden + 6 * shape.width), base + tokens * 8 * shape.width)
    if shape.scores:  # queries in fp32 and scaled beside what is alive, and the mask in fp32
        attention = size * 6 * shape.hidden + 8 * shape.hidden + (9 * shape.scores + 4) * context_tokens
        mlp = max(mlp, tokens * attention)
    positions = 2 * size * context_tokens * shape.head_dim
    return mlp + tokens * context_tokens * (shape.masks + size * shape.biases) + positions


def _unpacked_bytes(shape: Anatomy, precision: str) -> int:
    return 2 * max(linear.weights for linear in shape.linears) if precision == "nf4" else 0


@dataclass(frozen=True)
class _Piece:
    """Modules that may not be split; bytes."""

    names: tuple[str, ...]
    weights: int
    cache: int = 0

    @property
    def size(self) -> int:
        return self.weights + self.cache


def _pieces(shape: Anatomy, precision: str, cache: int, double_quant: bool = False) -> list[_Piece]:
    """What may not be split, in the order of the forward pass; ``cache`` is that of one layer."""
    first, last = _end_bytes(shape, precision)
    start, end = [shape.embeddings_name, shape.rotary_name], [shape.final_norm_name]
    (start if shape.tied else end).append(shape.head_name)
    layer = _layer_bytes(shape, precision, double_quant)
    layers = [_Piece((f"{shape.layers_name}.{i}",), layer, cache) for i in range(shape.layers)]
    return [_Piece(tuple(start), first), *layers, _Piece(tuple(end), last)]


def _room(gpus: Sequence[float], work: float) -> list[float]:
    return [max(gpu * (1 - RESERVED) - work, 1.0) for gpu in gpus]


def _fits(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float],
    context_tokens: int,
    *,
    batch_size: int,
    double_quant: bool,
    cache_heads: CacheHeads,
) -> bool:
    shape = anatomy(config)
    cache = batch_size * context_tokens * kv_bytes_per_token(config, precision, heads=cache_heads) // shape.layers
    sequences = {"batch_size": batch_size, "context_tokens": context_tokens}
    work = activation_bytes(config, precision, **sequences, cache_heads=cache_heads)
    sizes = [piece.size for piece in _pieces(shape, precision, cache, double_quant)]
    return bool(_filled(sizes, _room(gpus, work)))


def _placement(
    pieces: Sequence[_Piece], devices: Sequence[int], room: Sequence[float], gpus: Sequence[float]
) -> Placement:
    used = dict.fromkeys(range(len(gpus)), 0)
    for piece, device in zip(pieces, devices, strict=True):
        used[device] += piece.size
    excess = sum(max(used[device] - free, 0) for device, free in enumerate(room))
    lacking = max(excess, sum(used.values()) - sum(room))
    why_not = "" if excess <= 0 else f"lacks {gib(lacking)} over {_devices(gpus)}"
    return Placement(_device_map(pieces, devices), used, excess <= 0, why_not)


def _device_map(pieces: Sequence[_Piece], devices: Sequence[Device]) -> dict[str, Device]:
    return {name: device for piece, device in zip(pieces, devices, strict=True) for name in piece.names}


def _offloaded(pieces: Sequence[_Piece], room: Sequence[float], host: float, work: float, disk: bool) -> Placement:
    """The leading pieces on the devices (where there is no room for one: in host memory), the rest on "cpu", "disk"."""
    leading: list[Device] = list(_leading(pieces, room)) if room else []
    main: Device = leading[0] if leading else "cpu"
    if not leading:
        host -= work
        leading = ["cpu"] * len(_leading(pieces, [host]))
    rest = pieces[len(leading) :]
    below = list(accumulate(piece.weights for piece in rest))
    overflow: Device = "disk" if disk else "cpu"
    offloaded = ["cpu" if main != "cpu" and size <= host else overflow for size in below]
    devices = [*leading, *offloaded]
    used: dict[Device, int] = dict.fromkeys([*range(len(room)), "cpu", *(["disk"] if disk else [])], 0)
    for piece, device in zip(pieces, devices, strict=True):
        used[device] += piece.weights
        used[device if isinstance(device, int) else main] += piece.cache
    visiting = max((piece.weights for piece in rest), default=0) if main == "cpu" and disk else 0
    lacking = used["cpu"] + visiting - host
    return Placement(_device_map(pieces, devices), used, lacking <= 0, "" if lacking <= 0 else f"lacks {gib(lacking)}")


def _leading(pieces: Sequence[_Piece], room: Sequence[float]) -> list[int]:
    """The devices of the leading pieces that can stay, one device after the other filled up: as many as there can be.

    The rest runs on the first device in use, whose room holds the cache of all of it and the weights of one piece at a
    time. That is the first device of all, unless more pieces stay where the first ones are left out.
    """
    for count in range(len(pieces), 0, -1):
        rest, sizes = pieces[count:], [piece.size for piece in pieces[:count]]
        visiting = sum(piece.cache for piece in rest) + max((piece.weights for piece in rest), default=0)
        for first in range(len(room)):
            devices = _filled(sizes, [room[first] - visiting, *room[first + 1 :]])
            if devices and devices[0] == 0:
                return [first + device for device in devices]
    return []


def _spread(sizes: Sequence[int], room: Sequence[float]) -> list[int]:
    """The device of each piece, order kept: the largest share of a room in use is the least, then all are most even."""

    def fits(share: float) -> bool:
        return bool(_filled(sizes, [share * free for free in room]))

    low, high = 0.0, 1.0 if fits(1.0) else 2 * sum(sizes) / min(room)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _most_even(sizes, [high * free for free in room])


def _filled(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The device of each piece, one device after the other filled up to its limit; empty where they do not fit."""
    devices, device, used = [], 0, 0
    for size in sizes:
        while used + size > limits[device]:
            device, used = device + 1, 0
            if device == len(limits):
                return []
        devices.append(device)
        used += size
    return devices


def _most_even(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """Of all placements within the limits the one with the least sum of used² / limit (dynamic programming)."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # pieces placed -> (sum, where each device ends)
    for limit in limits:
        longer: dict[int, tuple[float, list[int]]] = {}
        for placed, (total, ends) in best.items():
            for end, used in enumerate(accumulate(sizes[placed:], initial=0), placed):
                if used > limit:
                    break
                cost = total + used * used / limit
                if end not in longer or cost < longer[end][0]:
                    longer[end] = (cost, [*ends, end])
        best = longer
    starts_and_ends = pairwise([0, *best[len(sizes)][1]])
    return [device for device, (start, end) in enumerate(starts_and_ends) for _ in range(start, end)]


def _least_for(config: PretrainedConfig, precision: str, mode: str, size: float) -> int | None:
    if mode == "inference":
        return least_gpus(config, precision, size)
    return next(n for n in range(1, 1000) if shard(config, precision, [size] * n, mode=mode, batch_size=n).fits)


def _devices(gpus: Sequence[float]) -> str:
    sizes = list(dict.fromkeys(f"{size / GIB:.1f}" for size in sorted(gpus)))
    kinds = " and ".join(sizes) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
    return f"{len(gpus)} device{'s' if len(gpus) > 1 else ''} of {kinds} GiB"
