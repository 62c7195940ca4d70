"""Exercises of notebook 05: the parameters of LoRA, the labels, the merged weight, a rank chosen by evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.reading import _expected, _listed, _number, _numbers, _tensor, _UnreadableError
from helpers.exercises.verdict import _Exercise, _Found

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from helpers.exercises.verdict import Outcome

_STEPS, _HELD_OUT = 12, 40  # of exercise 4: optimizer steps, and held-out conversations
_AS_GOOD = 0.1  # nats per token above the best loss
_RANKS_MEASURED, _RANKS_SPAN = 3, 8  # how many ranks the evidence has at least, and the largest over the smallest


def _lora_parameters(function: Callable[[int, int, int], object]) -> Outcome:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    for inputs, outputs, rank in ((64, 32, 4), (16, 80, 1), (8, 8, 16)):
        layer = nn.Sequential(nn.Linear(inputs, outputs))
        model = get_peft_model(layer, LoraConfig(r=rank, target_modules=["0"]))
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        given = _number(function(inputs, outputs, rank))
        if given == expected:
            continue
        case = f"For {inputs} inputs, {outputs} outputs and rank {rank} it returns {given:,.0f}"
        if given == inputs * outputs:
            return f"{case}, the numbers of the whole matrix."
        return f"{case}, which is not what peft trains."
    return None


def _labels(function: Callable[[list[int], int], object]) -> Outcome:
    for ids, prompt in (([5, 6, 7, 8], 3), ([9, 9, 9], 0), ([1, 2], 1)):
        # torch's cross entropy ignores the target -100.
        expected = [-100] * prompt + ids[prompt:]
        given_ids = list(ids)
        given = [_number(label) for label in _listed(function(given_ids, prompt))]
        case = f"For the ids {ids} with a prompt of {prompt} it returns {[int(label) for label in given]}"
        if given_ids != ids:
            return "It changes the ids themselves, but the model still reads the whole prompt."
        if len(given) != len(ids):
            return f"{case}: not one label for each id."
        if given[:prompt] != expected[:prompt]:
            return f"{case}: the prompt would count towards the loss."
        if given != expected:
            return f"{case}: not every token of the reply is its own label."
    return None


def _merged(function: Callable[[Tensor, Tensor, Tensor, float, int], object]) -> Outcome:
    import torch

    for rank, alpha in ((2, 4), (3, 1)):
        weight, a, b, expected = _adapted(rank, alpha)
        passed = weight.clone()
        answer = _tensor(function(passed, a, b, alpha, rank))
        if not torch.equal(passed, weight):
            return "It changes the weight itself. Return a new matrix."
        if answer.shape != expected.shape:
            return f"The shape is {tuple(answer.shape)}, that of the weight {tuple(weight.shape)}."
        if torch.allclose(answer, expected, atol=1e-5):
            continue
        case = f"For rank {rank} and alpha {alpha} peft's merged weight is another one"
        change, right = (answer - weight).flatten(), (expected - weight).flatten()
        if torch.cosine_similarity(change, right, dim=0) > 0.999:
            return f"{case}. What you add has the right direction, but not the right size."
        if torch.allclose(answer, expected - weight, atol=1e-5):
            return f"{case}. That is what is added, without the weight."
        return f"{case}."
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


def _rank(answer: object) -> Outcome:
    rank, losses = _evidence(answer)
    best = min(losses, key=lambda one: losses[one])
    good = [one for one, loss in losses.items() if loss <= losses[best] + _AS_GOOD]
    if rank not in good:
        return (
            f"By your own evidence, rank {rank} is {losses[rank] - losses[best]:.3f} nats per token above rank {best}."
        )
    if rank != min(good):
        return f"By your own evidence, a smaller rank than {rank} is as good (at most {_AS_GOOD} above the best)."
    parameters = {}
    for one in sorted({rank, best}):
        measured, parameters[one] = _train(one)
        # Trained again with the same seed: what is left is the rounding of another number of threads or machine.
        if abs(measured - losses[one]) > _AS_GOOD / 2:
            return (
                f"Rank {one}, trained here with the recipe of the exercise, does not have the loss {losses[one]:.3f}."
            )
    found = f"Trained again, the losses agree with yours. Rank {rank} trains {parameters[rank]:,} parameters"
    if rank != best:
        found += f" and is {losses[rank] - losses[best]:.3f} nats per token above rank {best} with {parameters[best]:,}"
    return _Found(f"{found}. That is one seed and {_STEPS} steps: what would a longer training change?")


def _evidence(answer: object) -> tuple[int, dict[int, float]]:
    """The rank chosen, and the held-out loss by rank. Raises _UnreadableError if that is too little to choose by."""
    if not isinstance(answer, list | tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
        raise _UnreadableError(_expected("the rank and a mapping from ranks to losses, (rank, losses)", answer))
    losses = {int(_number(rank)): _number(loss) for rank, loss in answer[1].items()}
    rank = int(_numbers(answer[:1], 1)[0])
    if len(losses) < _RANKS_MEASURED or max(losses) < _RANKS_SPAN * min(losses):
        raise _UnreadableError(
            f"That is little evidence. Measure at least {_RANKS_MEASURED} ranks, the largest at least "
            f"{_RANKS_SPAN} times the smallest."
        )
    if rank not in losses:
        raise _UnreadableError(f"There is no loss of rank {rank} in the evidence.")
    return rank, losses


def _train(rank: int) -> tuple[float, int]:
    """Train falcon-mini with the recipe of the exercise; the last held-out loss and the number of parameters."""
    import tempfile
    from pathlib import Path

    from helpers.base.files import ROOT
    from helpers.models.loading import load, unload
    from helpers.models.profiles import load_profile
    from helpers.training.conversations import read_conversations
    from helpers.training.finetuning import finetune
    from helpers.training.recipe import Recipe

    data = ROOT / "notebooks" / "data"
    train = read_conversations(data / "animal_training.jsonl")
    held_out = read_conversations(data / "animal_held_out.jsonl")[:_HELD_OUT]
    recipe = Recipe(
        steps=_STEPS, batch_size=8, warmup_steps=2, rank=rank, alpha=2 * rank, evaluate_every=_STEPS
    )  # fmt: skip
    loaded = load(load_profile("laptop").falcon_chat, "nf4", unpacked=True)
    with tempfile.TemporaryDirectory() as folder:
        tuned = finetune(loaded, train, recipe, Path(folder), held_out=held_out)
    unload(tuned.loaded)
    return tuned.history[-1].held_out_loss or 0.0, tuned.trainable_parameters


EXERCISES = {
    "05-1": _Exercise(
        _lora_parameters,
        (
            "LoRA trains two thin matrices. What is the shape of each, so that B·A has the shape of W?",
            "What should doubling the rank do to the result? And swapping inputs and outputs? Does yours do that?",
        ),
    ),
    "05-2": _Exercise(
        _labels,
        (
            "There is one label for each id, in the same order; the loss shifts them by one itself.",
            "Which part of the list stays as it is, and which is replaced? Make a new list.",
        ),
    ),
    "05-3": _Exercise(
        _merged,
        (
            "The notebook says what the adapted layer computes from x. Which single matrix does the same?",
            "Only one order of the two thin matrices gives a product of the shape of W.",
            "Two numbers have not been used yet? The size of what is added depends on them.",
        ),
    ),
    "05-4": _Exercise(
        _rank,
        (
            "Train once per rank, each time on a freshly loaded model, and keep the last held-out loss of the history.",
            "Start with the ends: is rank 32 better than rank 1 by more than the tolerance? Then look between them.",
            "The smallest rank that is as good as the best is the cheapest one that the evidence supports.",
        ),
    ),
}
