"""Exercises of notebook 05: the parameters of LoRA, the labels, the merged weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from helpers.exercises.verdict import Check, Hint


def _lora_parameters(function: Callable[[int, int, int], int]) -> Hint:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    for inputs, outputs, rank in ((64, 32, 4), (16, 80, 1), (8, 8, 16)):
        layer = nn.Sequential(nn.Linear(inputs, outputs))
        model = get_peft_model(layer, LoraConfig(r=rank, target_modules=["0"]))
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if function(inputs, outputs, rank) != expected:
            return f"peft trains {expected:,} parameters for {inputs} inputs, {outputs} outputs and rank {rank}."
    return None


def _labels(function: Callable[[list[int], int], list[int]]) -> Hint:
    for ids, prompt in (([5, 6, 7, 8], 3), ([9, 9, 9], 0), ([1, 2], 1)):
        # torch's cross entropy ignores the target -100.
        expected = [-100] * prompt + ids[prompt:]
        given = list(ids)
        if list(function(given, prompt)) != expected:
            return f"For ids {ids} with a prompt of {prompt} tokens it should return {expected}."
        if given != ids:
            return "Do not change the ids: the model still reads the whole prompt."
    return None


def _merged(function: Callable[[Tensor, Tensor, Tensor, float, int], Tensor]) -> Hint:
    import torch

    for rank, alpha in ((2, 4), (3, 1)):
        weight, a, b, expected = _adapted(rank, alpha)
        given = weight.clone()
        answer = function(given, a, b, alpha, rank)
        if not torch.equal(given, weight):
            return "Do not change the weight: return a new matrix."
        if not isinstance(answer, torch.Tensor) or answer.shape != expected.shape:
            return f"Return a matrix of the shape of the weight, {tuple(weight.shape)}."
        if not torch.allclose(answer, expected, atol=1e-5):
            return f"For rank {rank} and alpha {alpha} peft's merged weight differs. Which product, which scale?"
    return None


def _adapted(rank: int, alpha: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random weight (5, 6), its adapter's A (rank, 6) and B (5, rank), and the weight that peft merges them into."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)
        layer = nn.Linear(6, 5, bias=False)
        weight = layer.weight.detach().clone()
        # Without init_lora_weights=False, B would be zero and any scale would be right.
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(nn.Sequential(layer), config)
    # The adapter's tensors under peft's names, copied: merging replaces the layer.
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    a, b = (tensors[f"base_model.model.0.lora_{letter}.default.weight"] for letter in "AB")
    return weight, a, b, model.merge_and_unload().state_dict()["0.weight"]


CHECKS: dict[str, Check] = {"05-1": _lora_parameters, "05-2": _labels, "05-3": _merged}
