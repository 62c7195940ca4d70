"""How many bytes one training step needs on one device: adapters, what layers keep, the loss, unpacked weights.

``Training`` describes how a model is trained, as far as memory depends on it, and ``_Code`` what programs other than
transformers do otherwise. Every term is counted in the code that allocates it; ``_reserved`` adds what torch's
allocator holds beyond that. ``tests/unit/machine/test_published_memory.py`` compares the sums with what others
measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.machine.anatomy import Anatomy, _Linear

ALL_LINEARS = ("attention qkv", "attention out", "mlp up", "mlp down")
# torch's allocator keeps blocks that it cannot use for what is asked next. Weights and the optimizer's numbers stay
# where they were put; what comes and goes leaves fragments. Answer.AI published both numbers of a run (fsdp_qlora,
# benchmarks_03_2024.md, LoRA of Llama-2-7B on two GPUs, 2048 tokens): 10.22 GiB reserved, 9.16 allocated, of which half
# of the weights are 6.28. So (10.22 - 6.28) / (9.16 - 6.28) = 1.37 bytes are reserved for one that comes and goes.
FRAGMENTS = 0.37


@dataclass(frozen=True)
class _Code:
    """What a program does otherwise than transformers 5, peft and bitsandbytes 0.50, which are the defaults.

    joint_values: queries, keys and values come from one matrix, whose product stays because the values are a part of it
    (litgpt's Llama). copied_heads: keys and values are copied to all query heads (litgpt's Falcon-7B). quantized_head:
    the head is quantized too (litgpt). keeps_quantized_inputs: a quantized matrix keeps its input (``MatMul4Bit`` of
    bitsandbytes 0.41). unpacked_copies: copies of an unpacked matrix (2: unpacked to fp16, then cast to bf16).
    score_bytes: what attention keeps for each pair of tokens and head, if no fused kernel takes the mask.
    """

    joint_values: bool = False
    copied_heads: bool = False
    quantized_head: bool = False
    keeps_quantized_inputs: bool = False
    unpacked_copies: int = 1
    score_bytes: int = 0


@dataclass(frozen=True)
class Training:
    """How a model is trained. The defaults: LoRA over all matrices as peft does it, gradient checkpointing, AdamW.

    targets: the parts of a layer that carry adapters; with ``queries_and_values``, only these two of "attention qkv".
    adapter_bytes: of one weight of an adapter, its gradient, and each of AdamW's moments; peft keeps adapters in fp32.
    paged_optimizer: the moments are in host memory. logit_bytes: for each token and word of the vocabulary, while the
    loss is computed: see ``_loss_bytes``.
    """

    rank: int = 8
    targets: tuple[str, ...] = ALL_LINEARS
    queries_and_values: bool = False
    adapter_bytes: int = 4
    dropout: bool = False
    checkpointing: bool = True
    paged_optimizer: bool = False
    logit_bytes: int = 12
    code: _Code = _Code()


@dataclass(frozen=True)
class _Batch:
    """What a device works on at once: all tokens, those of one sequence, and the bytes of an element."""

    tokens: int
    context: int
    element: int


def _reserved(staying: float, moving: float) -> float:
    """What torch's allocator holds of a device: bytes that stay, and bytes that come and go with their fragments."""
    return staying + moving * (1 + FRAGMENTS)


def _adapted(shape: Anatomy, training: Training) -> list[_Linear]:
    """The matrices of one layer that carry an adapter."""
    chosen = [linear for linear in shape.linears if linear.part in training.targets]
    joint = [linear for linear in chosen if linear.part == "attention qkv"]
    # Llama has three matrices, in the order query, key, value; Falcon's single one is adapted as a whole.
    if training.queries_and_values and len(joint) == 3:
        chosen.remove(joint[1])
    return chosen


def _adapter_parameters(shape: Anatomy, training: Training) -> int:
    sizes = sum(linear.rows + linear.columns for linear in _adapted(shape, training))
    return shape.layers * training.rank * sizes


def _step_bytes(shape: Anatomy, batch: _Batch, training: Training, *, adapters: bool) -> int:
    """The peak of the activations of a training step, weights that are unpacked meanwhile left out.

    With checkpointing every layer keeps its input alone, and the one whose backward pass runs is computed again. The
    loss is done before the first layer's backward pass begins, so the larger of the two is the peak.
    """
    counts, code = shape.activations, training.code
    scores = (4 * counts.scores + code.score_bytes * _heads(shape)) * batch.context
    kept = batch.element * counts.kept + scores
    if adapters:
        kept = batch.element * _frozen(shape, code) + scores + _adapter_inputs(shape, training, batch.element)
    returned = batch.element * counts.returned
    if adapters and training.adapter_bytes > batch.element:
        # The gradient of the MLP's inner activations also comes from an adapter, in its precision, before it is cast.
        returned += training.adapter_bytes * shape.width
    backward = max(returned, 8 * counts.scores * batch.context)
    between = shape.layers * kept
    if training.checkpointing:
        between, backward = shape.layers * batch.element * shape.hidden, backward + kept
    return batch.tokens * (between + max(backward, _loss_bytes(shape, training)))


def _loss_bytes(shape: Anatomy, training: Training) -> int:
    """Bytes of the loss for one token, from the logits to their gradient.

    transformers 5: 12 for each word of the vocabulary (log-probabilities, their gradient and the logits' in fp32; the
    logits in 16 bit are gone by then). A loop that holds the model's output, with its fp32 logits, during the backward
    pass: 16. A loss in 16 bit: 6.
    """
    return training.logit_bytes * shape.vocabulary


def _frozen(shape: Anatomy, code: _Code) -> int:
    """Elements that a layer with frozen weights keeps of a token for its backward pass, adapters left out."""
    queries, keys = _queries(shape), shape.kv_heads * shape.head_dim
    elements = shape.activations.frozen
    if code.joint_values:
        elements += queries + keys
    if code.copied_heads:
        # Keys and values of all heads; the product that they were parts of goes.
        elements += 2 * (queries - keys) - queries - keys
    return elements


def _adapter_inputs(shape: Anatomy, training: Training, element: int) -> int:
    """Bytes that adapters keep of a token: the input of each, and what an old bitsandbytes keeps for its matrices.

    peft casts the input to the adapter's precision, a copy for each; in the same precision there is nothing to copy.
    Dropout makes a tensor of its own for each, and a mask of a byte (``native_dropout``).
    """
    size = 0
    shared: set[str] = set()
    for linear in _adapted(shape, training):
        one_for_all = linear.part == "attention qkv" and training.code.joint_values
        copied = training.dropout or training.adapter_bytes != element
        if linear.part in shared and (one_for_all or not copied):
            continue
        shared.add(linear.part)
        size += linear.columns * (training.adapter_bytes + training.dropout)
    if training.code.keeps_quantized_inputs:
        size += element * sum(_distinct_inputs(shape))
    return size


def _distinct_inputs(shape: Anatomy) -> Iterator[int]:
    """Elements of the different inputs of a layer's matrices: the norms' results, attention's, and the MLP's inner."""
    yield shape.activations.norms * shape.hidden
    yield _queries(shape)
    yield shape.width


def _queries(shape: Anatomy) -> int:
    """Elements of all queries of a token: what the matrix after attention reads."""
    return next(linear.columns for linear in shape.linears if linear.part == "attention out")


def _heads(shape: Anatomy) -> int:
    return _queries(shape) // shape.head_dim


def _unpacked(shape: Anatomy, code: _Code) -> int:
    """bitsandbytes unpacks one nf4 matrix at a time to 16 bit (``dequantize_4bit``); the largest decides."""
    largest = max(linear.weights for linear in shape.linears)
    if code.quantized_head:
        largest = max(largest, shape.embeddings)
    return 2 * code.unpacked_copies * largest
