"""Bytes for weights, KV cache, activations, gradients and optimizer, and where the layers go; nothing is loaded.

Everything follows from a model's configuration, for the Falcon family (both decoder architectures) and the Llama
family, as transformers, bitsandbytes and AdamW store it. Sizes are bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
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
    Shortfall,
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
CONTEXT = 2048  # tokens planned for unless a number is given: the context that Falcon was trained on
CacheHeads = Literal["kv", "library"]
Device = int | str  # as in a device map: a GPU's number, "cpu" or "disk"


# --- what a model works on --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What a model works on at once, and how its cache and weights are stored meanwhile.

    ``batch_size`` sequences of ``context_tokens`` tokens each; ``context_tokens=None`` means 2048, or the model's own
    limit if that is smaller. ``cache_heads``: see ``kv_bytes_per_token``. ``double_quant``: see ``weight_bytes``.
    """

    batch_size: int = 1
    context_tokens: int | None = CONTEXT
    cache_heads: CacheHeads = "kv"
    double_quant: bool = False

    def tokens_for(self, config: PretrainedConfig) -> int:
        """Tokens of context of one sequence for a model with this configuration."""
        if self.context_tokens is not None:
            return self.context_tokens
        limit = getattr(config, "max_position_embeddings", None)
        return min(CONTEXT, limit or CONTEXT)

    def cache_bytes(self, config: PretrainedConfig, precision: str) -> int:
        """Bytes of the KV cache of all sequences."""
        tokens = self.batch_size * self.tokens_for(config)
        return tokens * kv_bytes_per_token(config, precision, heads=self.cache_heads)


# --- published configurations -----------------------------------------------------------------------------------------


def published_config(repo_id: str) -> PretrainedConfig:
    """The configuration published with a model, from this repository: works offline.

    The fields are as published, but for ``auto_map``, which points at code on the hub that is never run.
    Raises WorkbookError, which lists the known models, for another name.
    """
    from transformers import AutoConfig

    choose(repo_id, published_models(), "published configuration of")
    fields = json.loads((CONFIGS / f"{repo_id.replace('/', '--')}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**fields)


def published_models() -> tuple[str, ...]:
    """The models whose published configuration is in this repository."""
    return tuple(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")))


# --- anatomy: shapes and parameter counts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linear:
    """One weight matrix of a decoder layer: ``rows`` outputs by ``columns`` inputs."""

    part: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.rows * self.columns

    @property
    def biases(self) -> int:
        """Number of biases."""
        return self.rows if self.bias else 0


@dataclass(frozen=True)
class _Activations:
    """Activations of one decoder layer, in elements for each token of a sequence.

    ``kept`` by the layer for its backward pass; ``returned``: further ones while that pass runs; ``prefill``: alive at
    once in the MLP of a forward pass, with ``wide_tensors`` of the MLP's width. For each token and each token of its
    context: ``scores`` are attention scores in fp32, ``masks`` bytes of the attention mask that the model makes itself,
    and ``biases`` elements of alibi's biases.
    """

    kept: int
    returned: int
    prefill: int
    wide_tensors: int
    scores: int = 0
    masks: int = 0
    biases: int = 0


@dataclass(frozen=True)
class _ModuleNames:
    """The names of a family's modules in transformers, as device maps use them."""

    embeddings: str
    rotary: str
    layers: str
    final_norm: str
    head: str = "lm_head"


@dataclass(frozen=True)
class Anatomy:
    """The shape of a model, as its configuration gives it: all that the formulas of this module need.

    ``width`` is the MLP's inner size; ``linears`` are the matrices of one layer, ``norms`` the parameters of its norms.
    ``cached_heads`` are the heads that transformers' own KV cache holds; ``loading.load`` caches ``kv_heads``.
    """

    layers: int
    hidden: int
    width: int
    vocabulary: int
    head_dim: int
    kv_heads: int
    cached_heads: int
    tied: bool
    linears: tuple[_Linear, ...]
    norms: int
    final_norm: int
    activations: _Activations
    names: _ModuleNames

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head; 0 if it shares the embeddings' matrix."""
        return 0 if self.tied else self.embeddings


_FALCON_NAMES = _ModuleNames(
    "transformer.word_embeddings", "transformer.rotary_emb", "transformer.h", "transformer.ln_f"
)
_LLAMA_NAMES = _ModuleNames("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm")
_LINEAR_PARTS = ("attention qkv", "attention out", "mlp up", "mlp down")


def anatomy(config: PretrainedConfig, cache_heads: CacheHeads = "kv") -> Anatomy:
    """The shape of a model; ``cache_heads`` (see ``kv_bytes_per_token``) decides what Falcon's attention works with.

    Raises WorkbookError for families other than Falcon and Llama.
    """
    families: dict[str, Callable[[PretrainedConfig, CacheHeads], Anatomy]] = {"falcon": _falcon, "llama": _llama}
    if config.model_type not in families:
        known = ", ".join(families)
        raise WorkbookError(f"The model family {config.model_type!r} is not supported. Supported are {known}.")
    return families[config.model_type](config, cache_heads)


def count_parameters(config: PretrainedConfig, tied: bool | None = None) -> int:
    """The number of parameters by closed formula.

    ``tied`` says whether the head shares the embeddings' matrix; unless given, the configuration decides
    (Falcon shares: 178,557,088,768 for 180B; counted with a separate head: 179,522,565,120).
    """
    return sum(part.parameters for part in _parts(anatomy(config), tied))


def parameter_table(config: PretrainedConfig, tied: bool | None = None) -> pd.DataFrame:
    """Where the parameters sit. Index: part; columns: parameters, share of the whole, per_layer."""
    import pandas as pd

    parts = _parts(anatomy(config), tied)
    total = sum(part.parameters for part in parts)
    rows = [(part.name, part.parameters, part.parameters / total, part.per_layer) for part in parts]
    return pd.DataFrame(rows, columns=["part", "parameters", "share", "per_layer"]).set_index("part")


@dataclass(frozen=True)
class _Part:
    """A part of a model: its parameters in all, and those in each decoder layer."""

    name: str
    parameters: int
    per_layer: int = 0


def _parts(shape: Anatomy, tied: bool | None) -> list[_Part]:
    parts = [_Part("embeddings", shape.embeddings)]
    for name in _LINEAR_PARTS:
        per_layer = sum(linear.weights + linear.biases for linear in shape.linears if linear.part == name)
        parts.append(_Part(name, shape.layers * per_layer, per_layer))
    parts.append(_Part("norms", shape.layers * shape.norms + shape.final_norm, shape.norms))
    head = _Part("head", shape.head)
    if tied is not None:
        # Published checkpoints store a tied head a second time, so both counts are of use.
        head = _Part("head", 0 if tied else shape.embeddings)
    return [*parts, head]


def _falcon(config: PretrainedConfig, cache_heads: CacheHeads) -> Anatomy:
    hidden, width, bias = config.hidden_size, config.ffn_hidden_size, config.bias
    new = config.new_decoder_architecture
    # transformers reads multi_query in the old architecture (7B) alone; 40B and 180B set it too, and have 8 heads.
    kv_heads = 1 if config.multi_query and not new else config.num_kv_heads
    # In the new architecture transformers copies keys and values to every query head before it caches them.
    cached_heads = config.num_attention_heads if new else kv_heads
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        width=width,
        vocabulary=config.vocab_size,
        head_dim=config.head_dim,
        kv_heads=kv_heads,
        cached_heads=cached_heads,
        tied=config.tie_word_embeddings,
        linears=(
            _Linear("attention qkv", hidden + 2 * kv_heads * config.head_dim, hidden, bias),
            _Linear("attention out", hidden, hidden, bias),
            _Linear("mlp up", width, hidden, bias),
            _Linear("mlp down", hidden, width, bias),
        ),
        norms=_falcon_norms(config) * 2 * hidden,  # a LayerNorm has a scale and a shift
        final_norm=2 * hidden,
        activations=_falcon_activations(config, cache_heads, kv_heads, cached_heads),
        names=_FALCON_NAMES,
    )


def _falcon_norms(config: PretrainedConfig) -> int:
    """The number of LayerNorms in each decoder layer, as transformers builds it."""
    if not config.parallel_attn:
        return 2
    if config.num_ln_in_parallel_attn:
        return int(config.num_ln_in_parallel_attn)
    if config.new_decoder_architecture:
        return 2
    return 1


def _falcon_activations(
    config: PretrainedConfig, cache_heads: CacheHeads, kv_heads: int, cached_heads: int
) -> _Activations:
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size
    library = cache_heads == "library"
    # Fused attention refuses the library's one key head for many queries (7B): fp32 copies and scores come instead.
    fused = not library or cached_heads == heads
    if not library:
        attention = 2 * hidden + 3 * kv_heads * config.head_dim
    elif fused:
        attention = 3 * hidden
    else:
        attention = 6 * hidden
    tensors = _falcon_norms(config)
    if not (config.new_decoder_architecture or config.parallel_attn):
        # A sequential block adds attention's result to its input before the MLP: one tensor more stays alive.
        tensors += 1
    return _Activations(
        kept=(2 + tensors) * hidden + attention + 2 * width,
        returned=2 * width,
        prefill=(3 + tensors) * hidden + 2 * width,
        wide_tensors=2,
        scores=0 if fused else heads,
        masks=1 if library else 0,
        biases=heads if config.alibi else 0,
    )


def _llama(config: PretrainedConfig, _: CacheHeads) -> Anatomy:
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        width=width,
        vocabulary=config.vocab_size,
        head_dim=head_dim,
        kv_heads=config.num_key_value_heads,
        cached_heads=config.num_key_value_heads,
        tied=config.tie_word_embeddings,
        linears=(
            _Linear("attention qkv", queries, hidden, attention_bias),
            _Linear("attention qkv", keys, hidden, attention_bias),
            _Linear("attention qkv", keys, hidden, attention_bias),
            _Linear("attention out", hidden, queries, attention_bias),
            _Linear("mlp up", width, hidden, mlp_bias),
            _Linear("mlp up", width, hidden, mlp_bias),
            _Linear("mlp down", hidden, width, mlp_bias),
        ),
        norms=2 * hidden,
        final_norm=hidden,
        activations=_llama_activations(hidden, width, queries, keys),
        names=_LLAMA_NAMES,
    )


def _llama_activations(hidden: int, width: int, queries: int, keys: int) -> _Activations:
    # Each RMSNorm keeps its input in fp32 (two elements), normalised, and scaled; the gated MLP keeps four wide
    # tensors: gate, up, activated gate, and their product.
    kept = 8 * hidden + 2 * queries + 2 * keys + 4 * width
    return _Activations(kept=kept, returned=3 * width, prefill=4 * hidden + 3 * width, wide_tensors=3)


# --- bytes: weights, cache, activations -------------------------------------------------------------------------------


def element_bytes(precision: str) -> int:
    """Bytes of one element of what is never quantized: embeddings, norms, activations, cache.

    Raises WorkbookError for an unknown precision.
    """
    choose(precision, PRECISIONS, "precision")
    return 4 if precision == "fp32" else 2


def weight_bytes(config: PretrainedConfig, precision: str, *, double_quant: bool = False) -> int:
    """Bytes of the weights in memory.

    int8 and nf4 as bitsandbytes stores them: only the linear layers, with their scales and code tables; embeddings,
    norms and head stay in 16 bit. int8: one byte per weight and one fp32 scale per row (arXiv:2208.07339). nf4: half a
    byte per weight and one fp32 scale per 64 weights; ``double_quant`` stores these scales in 8 bit, with one fp32
    scale per 256 of them (arXiv:2305.14314). Raises WorkbookError for an unknown precision.
    """
    shape = anatomy(config)
    outside_layers = shape.embeddings + shape.final_norm + shape.head
    return outside_layers * element_bytes(precision) + shape.layers * layer_bytes(shape, precision, double_quant)


def layer_bytes(shape: Anatomy, precision: str, double_quant: bool = False) -> int:
    """Bytes of the weights of one decoder layer; see ``weight_bytes``."""
    linears = sum(_linear_bytes(linear, precision, double_quant) for linear in shape.linears)
    return linears + shape.norms * element_bytes(precision)


def _linear_bytes(linear: _Linear, precision: str, double_quant: bool) -> int:
    biases = linear.biases * element_bytes(precision)
    if precision == "int8":
        return linear.weights + 4 * linear.rows + biases
    if precision != "nf4":
        return linear.weights * element_bytes(precision) + biases
    blocks = math.ceil(linear.weights / 64)
    scales = 4 * (blocks + 16)  # fp32, with the table of nf4's 16 values
    if double_quant:
        # The fp32 numbers: a scale for 256 blocks, the code tables (16 values of nf4, 256 of 8 bit), one offset.
        scales = blocks + 4 * (math.ceil(blocks / 256) + 16 + 256 + 1)
    return math.ceil(linear.weights / 2) + scales + biases


def kv_bytes_per_token(config: PretrainedConfig, precision: str = "bf16", *, heads: CacheHeads = "kv") -> int:
    """Bytes of keys and values for one token of one sequence, all layers; in 16 bit unless the precision is fp32.

    heads="kv": only the key-value heads, as ``loading.load`` caches them (``helpers.grouped_cache``), and vLLM and
    llama.cpp (163,840 bytes per token for Falcon-180B in bf16); heads="library": what transformers itself stores. For
    Falcon's new decoder architecture these are all query heads, because the keys and values are copied to them before
    they are cached (4,751,360).
    """
    shape = anatomy(config)
    count = {"kv": shape.kv_heads, "library": shape.cached_heads}[heads]
    return 2 * shape.layers * count * shape.head_dim * element_bytes(precision)


def estimate(
    config: PretrainedConfig,
    precision: str,
    *,
    mode: str = "inference",
    workload: Workload = Workload(),
    lora_rank: int = 8,
    checkpointing: bool = True,
) -> MemoryEstimate:
    """Bytes by part for one kind of work, as a sum over all devices, without the CUDA context.

    "inference": weights, the KV cache of every sequence, one layer's activations. "full": every parameter trained with
    AdamW in mixed precision, 16 bytes per parameter (2 weight, 2 gradient, 4 master weight, 4 + 4 moments: ZeRO,
    arXiv:1910.02054, section 3.1; fp32 takes 16 as well). "lora" and "qlora": frozen weights, in nf4 or int8 for
    "qlora", and fp32 adapters of rank ``lora_rank`` on every linear layer, trained with AdamW (arXiv:2106.09685,
    arXiv:2305.14314). Under ZeRO-3 each of n devices holds an n-th of weights, gradients and optimizer.
    ``workload.batch_size`` counts the sequences on all devices. Activations, and ``checkpointing``: see
    ``activation_bytes``. Raises WorkbookError for an unknown precision or mode, or if the two do not go together.
    """
    _check_mode(precision, mode)
    activations = activation_bytes(config, precision, mode=mode, workload=workload, checkpointing=checkpointing)
    weights = weight_bytes(config, precision, double_quant=workload.double_quant)
    if mode == "inference":
        cache = workload.cache_bytes(config, precision)
        return MemoryEstimate(precision, mode, weights, kv_cache=cache, activations=activations)
    if mode == "full":
        parameters = count_parameters(config)
        gradients = parameters * element_bytes(precision)
        optimizer = 16 * parameters - weights - gradients
    else:
        adapters = 4 * _adapter_parameters(config, lora_rank)
        weights, gradients, optimizer = weights + adapters, adapters, 2 * adapters
    return MemoryEstimate(precision, mode, weights, activations=activations, gradients=gradients, optimizer=optimizer)


def _check_mode(precision: str, mode: str) -> None:
    element_bytes(precision)
    choose(mode, MODES, "mode")
    if mode == "qlora" and precision not in QUANTIZED:
        known = " or ".join(QUANTIZED)
        raise WorkbookError(f"The mode qlora trains adapters over {known} weights. For {precision} choose mode='lora'.")
    if mode in ("full", "lora") and precision in QUANTIZED:
        raise WorkbookError(f"The mode {mode} cannot train {precision} weights. Choose mode='qlora' or bf16.")


def _adapter_parameters(config: PretrainedConfig, rank: int) -> int:
    shape = anatomy(config)
    return shape.layers * rank * sum(linear.rows + linear.columns for linear in shape.linears)


def activation_bytes(
    config: PretrainedConfig,
    precision: str,
    *,
    mode: str = "inference",
    workload: Workload = Workload(),
    checkpointing: bool = True,
) -> int:
    """Bytes of activations at the peak.

    Inference: the prefill's, counted in transformers' code. Falcon's MLP runs while the embeddings, the layer's input,
    its norms and the result of the attention are alive: 13 hidden sizes per token for 180B, with the two tensors of the
    MLP's width; Llama's: 4 hidden sizes and three times that width. Not counted: the mask that texts of different
    lengths need, one byte for each pair of tokens of a sequence, and what a GPU may need in fp32, if its fused kernels
    do not take grouped heads (never tried). With ``cache_heads="library"`` that mask is counted, as transformers' own
    Falcon always makes it; and for the old architecture (7B), whose one key head fused attention does not take as the
    library passes it on, attention scores in fp32, twice, and their test for -inf (9as²b for a heads). A quantized
    matrix is multiplied as bitsandbytes does on a GPU: nf4 is unpacked to 16 bit; int8 adds the inputs in 8 bit, what
    finds their outliers, and the products in 32 bit (counted in its code, not measured yet; on a CPU int8 takes twice
    as much).

    Training: after Korthikanti et al. 2022 (arXiv:2205.05198, section 4). Their count of what a layer keeps for its
    backward pass, s tokens, batch b, hidden size h, in 16 bit, with fused attention and no dropout, becomes 28sbh for
    Falcon-180B's parallel block: input 2, two norms 4, the product of the fused matrix 2 (values are read there),
    rotated queries 2, attention's result 2, MLP 8 + 8, and 0.2 for the few keys and values. The library's own keeps
    30sbh: for the product 4 of keys and values copied to all heads. With checkpointing a layer keeps only its input
    (2sbh) and one layer at a time is computed again, with the gradients of its MLP beside it. The other peak of
    training is the loss: 12 bytes for each token and word of the vocabulary (logits and their gradient in 16 bit,
    log-probabilities and their gradient in fp32). nf4 adds one matrix of weights unpacked to 16 bit; the library's
    Falcon of the old architecture scores of 4as²b each.
    """
    shape, context = anatomy(config, workload.cache_heads), workload.tokens_for(config)
    if mode != "inference":
        tokens = workload.batch_size * context
        return _training_bytes(shape, precision, tokens, context, adapters=mode != "full", checkpointing=checkpointing)
    # After the layers, only the last token's logits are computed: in 16 bit, and copied to fp32 for sampling.
    logits = workload.batch_size * shape.vocabulary * 6
    return max(_prefill_bytes(shape, precision, workload.batch_size * context, context), logits)


def _prefill_bytes(shape: Anatomy, precision: str, tokens: int, context: int) -> int:
    """The peak of one layer while it reads ``tokens``, in sequences of ``context`` tokens each."""
    size, counts = element_bytes(precision), shape.activations
    peak = max(tokens * size * counts.prefill, _quantized_mlp_bytes(shape, precision, tokens))
    if counts.scores:
        # Unfused attention may be the larger peak: queries in fp32 and scaled beside what is alive; the mask in fp32.
        attention = size * 6 * shape.hidden + 8 * shape.hidden + (9 * counts.scores + 4) * context
        peak = max(peak, tokens * attention)
    for_each_pair = tokens * context * (counts.masks + size * counts.biases)
    rotary = 2 * size * context * shape.head_dim  # cosines and sines
    return peak + for_each_pair + rotary


def _quantized_mlp_bytes(shape: Anatomy, precision: str, tokens: int) -> int:
    """The peak of the MLP while one of its quantized matrices is multiplied; 0 if they are not quantized."""
    size, width, counts = element_bytes(precision), shape.width, shape.activations
    # One of the two widest tensors does not exist yet while a matrix is multiplied.
    others = tokens * size * (counts.prefill - 2 * width)
    if precision == "nf4":
        return others + tokens * size * width + _unpacked_bytes(shape, precision)
    if precision != "int8":
        return 0
    # The products in 32 and in 16 bit, beside the inputs in 8 bit.
    products = others + tokens * (shape.hidden + 6 * width)
    # Before that, the inputs of the widest matrix: as they are, as float16, in 8 bit, and their absolute values with
    # the marks of the outliers.
    inputs = tokens * size * (counts.prefill - counts.wide_tensors * width) + tokens * 8 * width
    return max(products, inputs)


def _unpacked_bytes(shape: Anatomy, precision: str) -> int:
    """bitsandbytes unpacks one nf4 matrix at a time to 16 bit; the largest decides."""
    if precision != "nf4":
        return 0
    return 2 * max(linear.weights for linear in shape.linears)


def _training_bytes(
    shape: Anatomy, precision: str, tokens: int, context: int, *, adapters: bool, checkpointing: bool
) -> int:
    """The peak of a training step over ``tokens``, in sequences of ``context`` tokens each."""
    size, counts = element_bytes(precision), shape.activations
    scores = 4 * counts.scores * context
    kept_by_layer = tokens * (size * counts.kept + scores)
    backward = tokens * max(size * counts.returned, 2 * scores)
    if adapters:
        # Adapters compute in fp32, so what enters them is copied.
        backward += tokens * 4 * sum(linear.columns for linear in shape.linears)
    if checkpointing:
        # Every layer keeps its input alone; the one whose backward pass runs is computed again.
        kept = shape.layers * tokens * size * shape.hidden
        backward += kept_by_layer
    else:
        kept = shape.layers * kept_by_layer
    loss = tokens * shape.vocabulary * (2 * size + 8)
    # The loss is done before the first layer's backward pass begins, so the larger of the two is the peak.
    return kept + max(backward, loss) + _unpacked_bytes(shape, precision)


# --- placement: does it fit, and where do the layers go? --------------------------------------------------------------


@dataclass(frozen=True)
class Devices:
    """Where models may go: the bytes of each GPU, and those of host memory and the disk for what the GPUs cannot hold.

    Without GPUs the models run in host memory.
    """

    gpus: tuple[float, ...] = ()
    cpu_bytes: float = 0.0
    disk: bool = False

    @classmethod
    def free(cls, machine: Machine, *, offload: bool = False) -> Devices:
        """The free memory of a machine: its GPUs', or, if it has none, the host's; with ``offload`` both and disk."""
        gpus = tuple(gpu.free_bytes for gpu in machine.gpus)
        host = max(machine.ram_available_bytes, 1)  # 0 would mean that the host is not to be used
        if offload:
            return cls(gpus, host, disk=True)
        if gpus:
            return cls(gpus)
        return cls((), host)

    @property
    def text(self) -> str:
        """Number and sizes, such as "4 devices of 74.5 GiB"."""
        if not self.gpus:
            return f"{gib(self.cpu_bytes)} of memory"
        sizes = list(dict.fromkeys(f"{size / GIB:.1f}" for size in sorted(self.gpus)))
        kinds = " and ".join(sizes) if len(sizes) < 3 else f"{sizes[0]} to {sizes[-1]}"
        number = "1 device" if len(self.gpus) == 1 else f"{len(self.gpus)} devices"
        text = f"{number} of {kinds} GiB"
        if self.cpu_bytes:
            text += f" and {gib(self.cpu_bytes)} of host memory"
        return text

    def without(self, taken: Mapping[Device, float]) -> Devices:
        """What is left when models hold ``taken`` bytes of the devices."""

        def left(size: float, device: Device) -> float:
            # A share of what is left will be reserved again. Divided by the other share, what is taken reserves nothing
            # of its own, so the reserve of the whole device counts once.
            return max(size - taken.get(device, 0) / (1 - RESERVED), 1.0)

        remaining = replace(self, gpus=tuple(left(size, device) for device, size in enumerate(self.gpus)))
        if self.cpu_bytes:
            remaining = replace(remaining, cpu_bytes=left(self.cpu_bytes, "cpu"))
        return remaining


@dataclass(frozen=True)
class Resident:
    """A model that is to be in memory; ``name`` is what messages call it."""

    config: PretrainedConfig
    precision: str
    name: str = "the models before it"


def place(
    config: PretrainedConfig,
    precision: str,
    gpus: Sequence[float] = (80e9,) * 8,
    *,
    workload: Workload = Workload(),
    cpu_bytes: float = 0.0,
    disk: bool = False,
) -> Placement:
    """Place whole layers on devices of these bytes, in order: as little as possible on the fullest, then evenly.

    Each layer's KV cache lies beside it; the embeddings come first, with the head if the two are tied, and the final
    norm last, with the head if it is separate. ``device_map`` is what ``from_pretrained`` takes. Of each device
    ``RESERVED`` and one layer's activations are kept free.

    ``cpu_bytes`` of host memory and the ``disk`` hold what the devices cannot: the devices are filled up in order, the
    modules after that go to "cpu", and what is too much there to "disk". They run on the first device used, which
    holds their cache and has free bytes for the weights of one of them at a time (accelerate moves them there); a
    device without these free bytes is left out if more modules then stay on the others. Without any device,
    ``gpus=[]``, the model runs in ``cpu_bytes`` of host memory, and "disk" takes what is too much there.
    Raises WorkbookError without a device or host memory, and if int8 or nf4 weights would have to be offloaded:
    bitsandbytes refuses the disk, and leaves modules in host memory unquantized.
    """
    devices = Devices(tuple(gpus), cpu_bytes, disk)
    return place_together([Resident(config, precision)], devices, workload)[0]


def place_together(
    residents: Sequence[Resident], devices: Devices, workload: Workload = Workload(context_tokens=None)
) -> list[Placement]:
    """Say where models go that are in memory at the same time, and whether they fit: each into what is left.

    Every question "does it fit?" of the project is answered here. Weights, cache and activations of the earlier models
    are taken off each device, of which ``RESERVED`` stays free once. The rules, and the errors, are those of ``place``.
    """
    placements: list[Placement] = []
    taken: dict[Device, float] = {}
    left = devices
    for index, resident in enumerate(residents):
        placement = _place_one(resident, left, workload)
        if placement.shortfall and index:
            names = " and ".join(earlier.name for earlier in residents[:index])
            missing = replace(placement.shortfall, devices=f"{left.text} left by {names}")
            placement = replace(placement, shortfall=missing)
        placements.append(placement)
        parts = parts_by_device(resident.config, resident.precision, placement, workload=workload)
        for device, sizes in parts.items():
            taken[device] = taken.get(device, 0) + sum(sizes.values())
        left = devices.without(taken)
    return placements


def shortfall(
    config: PretrainedConfig, precision: str, machine: Machine, workload: Workload = Workload()
) -> Shortfall | None:
    """What is missing to run a model in the free memory of a machine; None if it fits.

    It needs whole layers on the GPUs (``place``), or, on a machine without any, host memory.
    """
    return place_together([Resident(config, precision)], Devices.free(machine), workload)[0].shortfall


def parts_by_device(
    config: PretrainedConfig, precision: str, placed: Placement, *, workload: Workload = Workload()
) -> dict[Device, dict[str, int]]:
    """What each device of a placement holds, bytes by part: weights, kv_cache, activations.

    Activations are counted on each device on which modules run.
    """
    activations = activation_bytes(config, precision, workload=workload)
    weights: dict[Device, int] = dict.fromkeys(placed.per_device_bytes, 0)
    for piece in _pieces(config, precision, workload):
        weights[placed.device_map[piece.names[0]]] += piece.weights
    on_gpus = any(isinstance(device, int) for device in placed.device_map.values())
    parts: dict[Device, dict[str, int]] = {}
    for device, held in placed.per_device_bytes.items():
        parts[device] = {"weights": weights[device], "kv_cache": held - weights[device], "activations": 0}
        # Offloaded modules run on a GPU; the CPU runs modules only if no GPU holds any.
        runs = (on_gpus and isinstance(device, int)) or (not on_gpus and device == "cpu")
        if held and runs:
            parts[device]["activations"] = activations
    return parts


def largest_context(
    config: PretrainedConfig, precision: str, gpus: Sequence[float], workload: Workload = Workload()
) -> int:
    """Largest context that fits on these devices, in tokens; 0 if not even one token fits.

    This is what the memory allows: the model may have been trained on fewer. ``workload.context_tokens`` is ignored.
    """

    def fits(tokens: int) -> bool:
        return _fits(config, precision, gpus, replace(workload, context_tokens=tokens))

    fitting, too_many = 0, 1
    while fits(too_many):
        fitting, too_many = too_many, 2 * too_many
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def least_gpus(
    residents: Sequence[Resident], gpu: float, workload: Workload = Workload(context_tokens=None)
) -> int | None:
    """The least number of GPUs of that many bytes that hold the models together; None if no number does."""
    alone, most = 0, 0
    for resident in residents:
        least = _least_gpus_alone(resident, gpu, workload)
        if least is None:
            return None
        alone, most = max(alone, least), most + anatomy(resident.config).layers + 2
    if len(residents) == 1:
        return alone

    def fit(count: int) -> bool:
        placements = place_together(residents, Devices((gpu,) * count), workload)
        return all(placement.fits for placement in placements)

    # The largest number comes first: if it is too small, the long search would be in vain.
    if not fit(most):
        return None
    return next(count for count in range(alone, most + 1) if fit(count))


def _least_gpus_alone(resident: Resident, gpu: float, workload: Workload) -> int | None:
    pieces = anatomy(resident.config).layers + 2  # embeddings, layers, final norm: more GPUs than these do not help
    for count in range(1, pieces + 1):
        if _fits(resident.config, resident.precision, [gpu] * count, workload):
            return count
    return None


@dataclass(frozen=True)
class _Piece:
    """Modules that may not be split; bytes."""

    names: tuple[str, ...]
    weights: int
    cache: int = 0

    @property
    def size(self) -> int:
        return self.weights + self.cache


def _pieces(config: PretrainedConfig, precision: str, workload: Workload) -> list[_Piece]:
    """What may not be split, in the order of the forward pass: embeddings, layers, final norm; the head with either."""
    shape, size = anatomy(config), element_bytes(precision)
    layer = layer_bytes(shape, precision, workload.double_quant)
    cache = workload.cache_bytes(config, precision) // shape.layers
    start, end = [shape.names.embeddings, shape.names.rotary], [shape.names.final_norm]
    with_head = start if shape.tied else end
    with_head.append(shape.names.head)
    pieces = [_Piece(tuple(start), shape.embeddings * size)]
    for number in range(shape.layers):
        pieces.append(_Piece((f"{shape.names.layers}.{number}",), layer, cache))
    pieces.append(_Piece(tuple(end), (shape.final_norm + shape.head) * size))
    return pieces


def _sizes(pieces: Sequence[_Piece]) -> list[int]:
    return [piece.size for piece in pieces]


def _limits(gpus: Sequence[float], activations: float) -> list[float]:
    """The bytes of each GPU that weights and cache may take; never 0, by which shares could not be computed."""
    return [max(gpu * (1 - RESERVED) - activations, 1.0) for gpu in gpus]


def _fits(config: PretrainedConfig, precision: str, gpus: Sequence[float], workload: Workload) -> bool:
    """What ``place`` answers, without balancing the load: quick enough for a search."""
    activations = activation_bytes(config, precision, workload=workload)
    pieces = _pieces(config, precision, workload)
    return bool(fill(_sizes(pieces), _limits(gpus, activations)))


def _place_one(resident: Resident, devices: Devices, workload: Workload) -> Placement:
    config, precision = resident.config, resident.precision
    if not devices.gpus and not devices.cpu_bytes:
        raise WorkbookError("A placement needs at least one device. Give the bytes of each, such as [80e9, 80e9].")
    pieces = _pieces(config, precision, workload)
    activations = activation_bytes(config, precision, workload=workload)
    limits = _limits(devices.gpus, activations)
    gpus_alone = not devices.cpu_bytes and not devices.disk
    if gpus_alone or (limits and fill(_sizes(pieces), limits)):
        return _on_gpus(pieces, limits, devices)
    placement = _offloaded(pieces, limits, devices, activations)
    if precision in QUANTIZED and (devices.gpus or "disk" in placement.device_map.values()):
        raise WorkbookError(
            f"{precision} weights cannot be offloaded: bitsandbytes refuses modules on the disk and leaves those in "
            "host memory unquantized. Give larger devices, or choose bf16."
        )
    return placement


def _on_gpus(pieces: Sequence[_Piece], limits: Sequence[float], devices: Devices) -> Placement:
    placed_on = spread(_sizes(pieces), limits)
    used: dict[Device, int] = dict.fromkeys(range(len(limits)), 0)
    for piece, device in zip(pieces, placed_on, strict=True):
        used[device] += piece.size
    excess = sum(max(used[device] - limit, 0) for device, limit in enumerate(limits))
    missing = 0.0
    if excess > 0:
        # Whole layers waste some of each device, so more may be missing than the sum of all sizes says.
        missing = max(excess, sum(used.values()) - sum(limits))
    return Placement(_device_map(pieces, placed_on), used, _shortfall(missing, devices.text))


def _shortfall(missing: float, devices: str) -> Shortfall | None:
    return Shortfall(math.ceil(missing), devices) if missing > 0 else None


def _device_map(pieces: Sequence[_Piece], placed_on: Sequence[Device]) -> dict[str, Device]:
    device_map: dict[str, Device] = {}
    for piece, device in zip(pieces, placed_on, strict=True):
        device_map.update(dict.fromkeys(piece.names, device))
    return device_map


def _offloaded(pieces: Sequence[_Piece], limits: Sequence[float], devices: Devices, activations: float) -> Placement:
    """The leading pieces on the GPUs (if none holds one: in host memory), the rest in host memory and on disk."""
    host = devices.cpu_bytes * (1 - RESERVED)
    overflow: Device = "disk" if devices.disk else "cpu"
    placed_on: list[Device] = [*_leading(pieces, limits)]
    main: Device = "cpu"  # runs what is offloaded, and keeps its cache
    if placed_on:
        main = placed_on[0]
    else:
        # No GPU holds a piece, so the CPU runs the model: its activations lie in host memory.
        host -= activations
        placed_on = ["cpu"] * len(_leading(pieces, [host]))
    rest = pieces[len(placed_on) :]
    for offloaded in accumulate(piece.weights for piece in rest):
        # A CPU that runs the model has been filled with the leading pieces; only a GPU's has bytes left.
        if main != "cpu" and offloaded <= host:
            placed_on.append("cpu")
        else:
            placed_on.append(overflow)

    used: dict[Device, int] = dict.fromkeys([*range(len(limits)), "cpu", overflow], 0)
    for piece, device in zip(pieces, placed_on, strict=True):
        used[device] += piece.weights
        used[device if isinstance(device, int) else main] += piece.cache
    needed = used["cpu"]
    if main == "cpu" and devices.disk and rest:
        needed += max(piece.weights for piece in rest)  # read from disk, one at a time
    return Placement(_device_map(pieces, placed_on), used, _shortfall(needed - host, devices.text))


def _leading(pieces: Sequence[_Piece], limits: Sequence[float]) -> list[int]:
    """The devices of as many leading pieces as can stay on them, one device after the other filled up.

    Offloaded pieces run on the first device used. It must hold their whole cache and the weights of one of them at a
    time. That is the first device of all, unless more pieces stay if the first ones are left out.
    """
    for count in range(len(pieces), 0, -1):
        sizes = _sizes(pieces[:count])
        rest = pieces[count:]
        kept_free = sum(piece.cache for piece in rest)
        kept_free += max((piece.weights for piece in rest), default=0)
        for first in range(len(limits)):
            devices = fill(sizes, [limits[first] - kept_free, *limits[first + 1 :]])
            # If its first device stays empty, it is not the one that runs the rest: the next `first` tries that.
            if devices and devices[0] == 0:
                return [first + device for device in devices]
    return []


# --- packing: pieces of these bytes over devices of those ------------------------------------------------------------


def spread(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The device of each piece, order kept: minimise the highest utilisation, then balance the devices.

    ``sizes`` are the pieces' bytes, ``limits`` the devices'; pieces that do not fit exceed all limits by one factor.
    """
    too_low, enough = 0.0, 1.0
    if not fill(sizes, limits):
        enough = 2 * sum(sizes) / min(limits)  # any device then holds all pieces, whatever the rounding
    # Sixty halvings bring the least utilisation below the rounding of a float.
    for _ in range(60):
        middle = (too_low + enough) / 2
        if fill(sizes, [middle * limit for limit in limits]):
            enough = middle
        else:
            too_low = middle
    return _most_even(sizes, [enough * limit for limit in limits])


def fill(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The device of each piece, one device after the other filled up to its limit; empty if they do not fit."""
    devices, device, used = [], 0, 0
    for size in sizes:
        while used + size > limits[device]:
            device, used = device + 1, 0
            if device == len(limits):
                return []
        devices.append(device)
        used += size
    return devices


@dataclass(frozen=True)
class _Split:
    """The first pieces over the first devices: the cost so far, and the piece before which each device ends."""

    cost: float
    ends: tuple[int, ...] = ()


def _most_even(sizes: Sequence[int], limits: Sequence[float]) -> list[int]:
    """The placement within the limits with the least sum of used² / limit, by dynamic programming."""
    # The best split for each number of pieces placed, over the devices so far: what comes later depends on no more.
    best = {0: _Split(0.0)}
    for limit in limits:
        longer: dict[int, _Split] = {}
        for placed, split in best.items():
            # The device takes no piece, the next one, the next two, ... until its limit.
            for end, used in enumerate(accumulate(sizes[placed:], initial=0), placed):
                if used > limit:
                    break
                cost = split.cost + used * used / limit
                if end not in longer or cost < longer[end].cost:
                    longer[end] = _Split(cost, (*split.ends, end))
        best = longer
    devices: list[int] = []
    for device, (start, end) in enumerate(pairwise([0, *best[len(sizes)].ends])):
        devices += [device] * (end - start)
    return devices


# --- training ---------------------------------------------------------------------------------------------------------


def shard(
    config: PretrainedConfig, precision: str, gpus: Sequence[float], *, mode: str, workload: Workload = Workload()
) -> Placement:
    """Training spread evenly over equal devices, as ZeRO-3 does (Rajbhandari et al. 2020, arXiv:1910.02054).

    Weights, gradients and optimizer are divided; each device works on its share of the sequences and has free bytes
    for one gathered layer. ``RESERVED`` of each device is kept free. There is no ``device_map``: every device holds a
    part of every layer. Raises WorkbookError if precision and mode do not go together.
    """
    share = replace(workload, batch_size=math.ceil(workload.batch_size / len(gpus)))
    training = estimate(config, precision, mode=mode, workload=share)
    divided = math.ceil((training.total - training.activations) / len(gpus))
    gathered = layer_bytes(anatomy(config), precision, workload.double_quant)
    held = divided + training.activations + gathered
    used: dict[Device, int] = dict.fromkeys(range(len(gpus)), held)
    missing = held - min(gpus) * (1 - RESERVED)
    if missing <= 0:
        return Placement({}, used)
    return Placement({}, used, Shortfall(math.ceil(missing), f"each of {Devices(tuple(gpus)).text}"))


@dataclass(frozen=True)
class _Claim:
    """A machine that the article names for one use of Falcon-180B; ``gigabytes`` as published."""

    number: str
    use: str
    machine: str
    gigabytes: int
    precision: str
    mode: str


_CLAIMS = (
    _Claim("A13", "full fine-tuning", "8x 8x A100 80GB", 5120, "bf16", "full"),
    _Claim("A14", "LoRA with ZeRO-3", "2x 8x A100 80GB", 1280, "bf16", "lora"),
    _Claim("A15", "QLoRA", "2x A100 80GB", 160, "nf4", "qlora"),
    _Claim("A16", "bf16 inference", "8x A100 80GB", 640, "bf16", "inference"),
    _Claim("A17", "int4 inference", "8x A100 40GB", 320, "nf4", "inference"),
)


def hardware_claims() -> pd.DataFrame:
    """The article's machines for Falcon-180B (A13-A17), the computed bytes, and the smallest machines that will do.

    Published sizes are GB as published. Estimates: one sequence of 2048 tokens; training in bf16 (QLoRA in nf4) with
    gradient checkpointing. The least number of GPUs: for inference whole layers on each (``place``); for training
    weights, gradients and optimizer spread evenly as ZeRO-3 does, each GPU with a sequence of its own and free bytes
    for one gathered layer. A sum over devices says nothing about speed.
    """
    import pandas as pd

    config = published_config("tiiuae/falcon-180B")
    rows = []
    for claim in _CLAIMS:
        total = estimate(config, claim.precision, mode=claim.mode).total
        row: dict[str, str | int | None] = {
            "claim": claim.number,
            "use": claim.use,
            "published machine": claim.machine,
            "published GB": claim.gigabytes,
            "estimate GB": round(total / 1e9),
            "estimate GiB": round(total / GIB),
        }
        for size in (80, 40):
            row[f"least {size} GB GPUs"] = _least_gpus_for(config, claim, size * 1e9)
        rows.append(row)
    return pd.DataFrame(rows)


def _least_gpus_for(config: PretrainedConfig, claim: _Claim, size: float) -> int | None:
    if claim.mode == "inference":
        return least_gpus([Resident(config, claim.precision)], size)
    for count in range(1, 1000):
        # Each GPU trains on a sequence of its own.
        workload = Workload(batch_size=count)
        if shard(config, claim.precision, [size] * count, mode=claim.mode, workload=workload).fits:
            return count
    return None


def training_flop(parameters: float, tokens: float) -> float:
    """6·N·D: floating-point operations to train N parameters on D tokens (Kaplan et al. 2020, arXiv:2001.08361)."""
    return 6 * parameters * tokens


def implied_utilisation(flop: float, gpu_hours: float, peak: float = A100_PEAK) -> float:
    """The share of ``peak`` FLOP/s at which that many GPU hours do that many operations."""
    return flop / (gpu_hours * 3600 * peak)
