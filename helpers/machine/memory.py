"""How many bytes a model needs: weights, KV cache, activations, gradients and optimizer; nothing is loaded.

``estimate`` gives all parts for one kind of work, as a sum over all devices; ``placement`` then says where they go.
Everything follows from a model's configuration, as transformers, bitsandbytes and AdamW store it. Sizes are bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError, choose
from helpers.base.units import PRECISIONS, QUANTIZED
from helpers.machine.anatomy import CacheHeads, _Linear, anatomy, count_parameters
from helpers.machine.step import Training, _adapter_parameters, _Batch, _Code, _step_bytes, _unpacked

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from helpers.machine.anatomy import Anatomy

MODES = ("inference", "full", "lora", "qlora")
CONTEXT = 2048  # tokens planned for unless a number is given: the context that Falcon was trained on


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part (weights, kv_cache, activations, gradients, optimizer); see ``estimate``."""

    precision: str
    mode: str
    weights: int
    kv_cache: int = 0
    activations: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name, in the order of the fields."""
        names = ("weights", "kv_cache", "activations", "gradients", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Workload:
    """What a model works on at once, and how its cache and weights are stored meanwhile.

    ``batch_size`` sequences of ``context_tokens`` tokens each; ``context_tokens=None`` means 2048, or the model's own
    limit if that is smaller. ``cache_heads``: see ``kv_bytes_per_token``. ``double_quant``: see ``weight_bytes``.
    Raises WorkbookError for sizes that are not whole numbers of at least 1; 0 tokens mean the weights alone.
    """

    batch_size: int = 1
    context_tokens: int | None = CONTEXT
    cache_heads: CacheHeads = "kv"
    double_quant: bool = False

    def __post_init__(self) -> None:
        _check_size("batch_size", self.batch_size)
        if self.context_tokens is not None:
            _check_size("context_tokens", self.context_tokens, least=0)

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


def _check_size(name: str, value: int, least: int = 1) -> None:
    """Raise WorkbookError unless a size is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise WorkbookError(f"{name} must be a whole number of at least {least}, but is {value!r}.")


def element_bytes(precision: str) -> int:
    """Bytes of one element of what is never quantized: embeddings, norms, activations, cache.

    Raises WorkbookError for an unknown precision.
    """
    choose(precision, PRECISIONS, "precision")
    if precision == "fp32":
        return 4
    return 2


def weight_bytes(config: PretrainedConfig, precision: str, *, double_quant: bool = False) -> int:
    """Bytes of the weights in memory.

    int8 and nf4 as bitsandbytes stores them: only the linear layers, with their scales and code tables; embeddings,
    norms and head stay in 16 bit. int8: one byte per weight and one fp32 scale per row (arXiv:2208.07339). nf4: half a
    byte per weight and one fp32 scale per 64 weights; ``double_quant`` stores these scales in 8 bit, with one fp32
    scale per 256 of them (arXiv:2305.14314). Raises WorkbookError for an unknown precision.
    """
    shape = anatomy(config)
    outside_layers = shape.embeddings + shape.final_norm + shape.head
    return outside_layers * element_bytes(precision) + shape.layers * _layer_bytes(shape, precision, double_quant)


def _layer_bytes(shape: Anatomy, precision: str, double_quant: bool = False) -> int:
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

    heads="kv": only the key-value heads, as ``helpers.models.load``, vLLM and llama.cpp cache them (163,840 bytes per
    token for Falcon-180B in bf16). heads="library": what transformers itself stores. For Falcon's new decoder
    architecture these are all query heads, because the keys and values are copied to them before they are cached
    (4,751,360).
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
    training: Training = Training(),
) -> MemoryEstimate:
    """Bytes by part for one kind of work, as a sum over all devices, without the CUDA context and fragments.

    "inference": weights, the KV cache of every sequence, one layer's activations. "full": every parameter trained with
    AdamW in mixed precision, 16 bytes per parameter (2 weight, 2 gradient, 4 master weight, 4 + 4 moments: ZeRO,
    arXiv:1910.02054, section 3.1; fp32 takes 16 as well). "lora" and "qlora": frozen weights, in nf4 or int8 for
    "qlora", and the adapters of ``training``, trained with AdamW (arXiv:2106.09685, arXiv:2305.14314).
    ``workload.batch_size`` counts the sequences on all devices; ``sharding.shard`` divides the rest. Activations: see
    ``_activation_bytes``. Raises WorkbookError for an unknown precision or mode, if the two do not go together, and for
    a rank below 1.
    """
    _check_mode(precision, mode)
    _check_size("rank", training.rank)
    activations = _activation_bytes(config, precision, mode=mode, workload=workload, training=training)
    weights = weight_bytes(config, precision, double_quant=workload.double_quant)
    if mode == "inference":
        cache = workload.cache_bytes(config, precision)
        return MemoryEstimate(precision, mode, weights, kv_cache=cache, activations=activations)
    if mode == "full":
        parameters = count_parameters(config)
        gradients = parameters * element_bytes(precision)
        optimizer = 16 * parameters - weights - gradients
    else:
        weights += _quantized_head(anatomy(config), precision, workload, training)
        gradients = training.adapter_bytes * _adapter_parameters(anatomy(config), training)
        optimizer = 0 if training.paged_optimizer else 2 * gradients
        weights += gradients
    return MemoryEstimate(precision, mode, weights, activations=activations, gradients=gradients, optimizer=optimizer)


def _quantized_head(shape: Anatomy, precision: str, workload: Workload, training: Training) -> int:
    """What a program that quantizes a separate head too adds to the weights: fewer bytes, so 0 or less."""
    if not training.code.quantized_head or precision not in QUANTIZED or not shape.head:
        return 0
    head = _Linear("head", shape.vocabulary, shape.hidden)
    return _linear_bytes(head, precision, workload.double_quant) - shape.head * element_bytes(precision)


def _check_mode(precision: str, mode: str) -> None:
    element_bytes(precision)
    choose(mode, MODES, "mode")
    if mode == "qlora" and precision not in QUANTIZED:
        known = " or ".join(QUANTIZED)
        raise WorkbookError(f"The mode qlora trains adapters over {known} weights. For {precision} choose mode='lora'.")
    if mode in ("full", "lora") and precision in QUANTIZED:
        raise WorkbookError(f"The mode {mode} cannot train {precision} weights. Choose mode='qlora' or bf16.")


def _activation_bytes(
    config: PretrainedConfig,
    precision: str,
    *,
    mode: str = "inference",
    workload: Workload = Workload(),
    training: Training = Training(),
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
    30sbh: for the product 4 of keys and values copied to all heads. A frozen layer keeps less, but its adapters keep
    their inputs: ``step._step_bytes`` counts both, checkpointing, and the loss. nf4 adds one matrix of weights unpacked
    to 16 bit; the library's Falcon of the old architecture scores of 4as²b each.
    """
    shape, context = anatomy(config, workload.cache_heads), workload.tokens_for(config)
    if mode != "inference":
        batch = _Batch(workload.batch_size * context, context, element_bytes(precision))
        step = _step_bytes(shape, batch, training, adapters=mode != "full")
        return step + (_unpacked(shape, training.code) if precision == "nf4" else 0)
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
        return others + tokens * size * width + _unpacked(shape, _Code())
    if precision != "int8":
        return 0
    # The products in 32 and in 16 bit, beside the inputs in 8 bit.
    products = others + tokens * (shape.hidden + 6 * width)
    # Before that, the inputs of the widest matrix: as they are, as float16, in 8 bit, and their absolute values with
    # the marks of the outliers.
    inputs = tokens * size * (counts.prefill - counts.wide_tensors * width) + tokens * 8 * width
    return max(products, inputs)
