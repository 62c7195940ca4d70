"""Exercises of notebook 02: the bytes of nf4, counting quantized layers, nf4 by hand, what to leave in bf16."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from helpers.exercises.reading import _is_close, _listed, _number, _numbers, _other_unit, _tensor, _text
from helpers.exercises.verdict import _Exercise, _Found

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from helpers.exercises.verdict import Outcome
    from helpers.models.loaded import Loaded

_KEPT = 4  # matrices that exercise 4 leaves in bf16
_RANDOM_CHOICES = 19  # better than all of them by chance alone: one in twenty
_TEXTS = 2  # on which exercise 4 measures


def _nf4_bytes(function: Callable[[int, int], object]) -> Outcome:
    for rows, columns in ((14848, 14848), (59392, 14848), (64, 64)):
        weights = rows * columns
        given, expected = _number(function(rows, columns)), weights / 2 + weights / 64 * 4
        if _is_close(given, expected, 1e-6):
            continue
        if off := _other_unit(given, expected, {"in GiB": 1 / 2**30, "in MiB": 1 / 2**20, "in bits": 8}, 1e-6):
            return f"{off} Return bytes."
        if given == weights / 2:
            return "Those are the bytes of the indices. What else is stored?"
        return f"For {rows} x {columns} it returns {given:,.0f} bytes, which is not right."
    return None


def _count_quantized(function: Callable[[nn.Module], object]) -> Outcome:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torch import nn
    from transformers.models.falcon.modeling_falcon import FalconLinear

    # FalconLinear is what a Falcon is made of, and what a search for exactly nn.Linear overlooks.
    models = [
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (0, 2), "two nn.Linear"),
        (
            nn.Sequential(Linear4bit(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)),
            (1, 2),
            "a Linear4bit, a LayerNorm and an nn.Linear",
        ),
        (
            nn.Sequential(nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=False)), Linear4bit(64, 64)),
            (2, 2),
            "a Linear8bitLt, inside another module, and a Linear4bit",
        ),
        (
            nn.Sequential(FalconLinear(8, 8), FalconLinear(8, 8), Linear4bit(64, 64)),
            (1, 3),
            "two FalconLinear, which is a subclass of nn.Linear, and a Linear4bit",
        ),
    ]
    for model, expected, description in models:
        given = _numbers(function(model), 2)
        if given == list(reversed(expected)) != list(expected):
            return "Return the number of quantized layers first, then the number of all linear layers."
        if given != list(expected):
            return f"A model of {description}: it returns {given[0]:g} quantized of {given[1]:g} linear layers."
    return None


def _nf4_back(function: Callable[[Tensor, Tensor, Tensor], object]) -> Outcome:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for seed, size in enumerate((64, 640)):
        # The second weight is ten times larger and has ten blocks: a forgotten scale, or one for all, is noticed.
        weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10**seed
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        given = _tensor(function(packed, state.absmax, state.code)).flatten()
        if given.numel() != size:
            return f"For {packed.numel()} bytes it returns {given.numel()} weights. How many indices does a byte hold?"
        expected = dequantize_4bit(packed, state)
        if torch.allclose(given, expected, rtol=1e-5):
            continue
        if torch.allclose(given.sort().values, expected.sort().values, rtol=1e-5):
            return "The weights are right, but not their order."
        if (torch.cosine_similarity(given.view(-1, 64), expected.view(-1, 64)) > 0.999).all():
            return "Within each block the weights are in proportion, so only the scales are off."
        return f"For {size} weights in {size // 64} blocks, bitsandbytes restores other values."
    return None


def _left_in_bf16(answer: object, model: Loaded) -> Outcome:
    from helpers.models.layers import quantizable_layers

    layers, kept = list(quantizable_layers(model.model)), [_text(name) for name in _listed(answer)]
    unknown = [name for name in kept if name not in layers]
    if unknown:
        return f"{unknown[0]!r} is not a quantized matrix of this model; models.quantizable_layers names them."
    if len(set(kept)) != _KEPT:
        return f"Name {_KEPT} different matrices; here are {len(set(kept))}."
    draw = random.Random(0)
    choices = [kept, *(draw.sample(layers, _KEPT) for _ in range(_RANDOM_CHOICES))]
    everything, yours, *others = _distances(model, [[], *choices])
    better = len([other for other in others if other < yours])
    measured = f"With your four in bf16, {1 - yours / everything:.0%} of nf4's distance from bf16 is gone"
    if better:
        return f"{measured}, but {better} of {_RANDOM_CHOICES} random choices of four did better."
    return _Found(
        f"{measured}: more than with any of {_RANDOM_CHOICES} random choices of four (at best "
        f"{1 - min(others) / everything:.0%})."
    )


def _distances(model: Loaded, choices: Sequence[Sequence[str]]) -> list[float]:
    """How far nf4 moves the model's predictions (Kullback-Leibler divergence in nats per token), for each choice of
    matrices that stay as they are in ``model``.
    """
    from helpers.models.loading import load, unload

    inputs = _inputs(model)
    small = load(model.ref, "nf4")
    expected = [_log_probabilities(model, ids) for ids in inputs]
    distances = []
    for kept in choices:
        quantized = {name: small.model.get_submodule(name) for name in kept}
        for name in kept:
            small.model.set_submodule(name, model.model.get_submodule(name))
        moved = [_log_probabilities(small, ids) for ids in inputs]
        for name, layer in quantized.items():
            small.model.set_submodule(name, layer)
        divergences = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(expected, moved, strict=True)]
        distances.append(float(sum(divergences)) / len(divergences))
    unload(small)
    return distances


def _inputs(model: Loaded) -> list[Tensor]:
    from helpers.base.files import ROOT
    from helpers.evaluation.data import read_texts

    texts = read_texts(ROOT / "notebooks" / "data" / "perplexity_texts.jsonl")[:_TEXTS]
    return [model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.model.device) for text in texts]


def _log_probabilities(model: Loaded, ids: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        logits: Tensor = model.model(ids).logits[0]
        return logits.float().log_softmax(-1)


EXERCISES = {
    "02-1": _Exercise(
        _nf4_bytes,
        (
            "How many bits does the index of one of 16 values take, and how many weights share a byte?",
            "How many scales does a matrix have? fp32 means 32 bits.",
        ),
    ),
    "02-2": _Exercise(
        _count_quantized,
        (
            "model.modules() visits every module, also those inside others.",
            "The silent failure above: what did transformers compare when it overlooked all of Falcon's layers?",
        ),
    ),
    "02-3": _Exercise(
        _nf4_back,
        (
            "Take the bytes apart first: a shift gives the upper four bits, a mask the lower four.",
            "Which of the two comes first? Interleave them: one long piece after the other is another order.",
            "Each block of 64 weights has a scale of its own: a shape with one row per block helps.",
        ),
    ),
    "02-4": _Exercise(
        _left_in_bf16,
        (
            "The matrix with the largest error of its own need not be the one that moves the predictions most.",
            "Put one matrix back into bf16 at a time (model.set_submodule, as above), and measure again.",
            "Keep the four that bring the predictions of the whole model closest to bf16, each tried alone.",
        ),
    ),
}
