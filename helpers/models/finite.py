"""Numbers that are not finite: noticed where a model's results are used, and explained by the layer that made them.

A weight that is NaN, or an activation beyond the largest float16, spreads through all later layers, and what comes out
still looks like a result: argmax takes NaN for the largest logit. So whoever uses logits asks ``all_finite`` or
``check_sums``, which cost one pass over them, within ``explained``. Only after a failure does the model run once more,
with hooks that find the layer.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.models.loaded import inference, input_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

    from helpers.models.loaded import Loaded


class NotFiniteError(WorkbookError):
    """A model computed NaN or infinity; the message names the layer and says what to do."""


class NotFiniteFoundError(Exception):
    """What ``explained`` turns into a NotFiniteError: the tokens that the model was given, (rows, tokens)."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        super().__init__("numbers that are not finite")
        self.rows = rows


def all_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite. A sum is not finite if one of its terms is not, so one pass is enough."""
    import torch

    if math.isfinite(values.sum(dtype=torch.float32).item()):
        return True
    # Finite values may sum beyond the largest float32.
    return bool(values.isfinite().all())


def check_sums(sums: Sequence[float], rows: Sequence[Sequence[int]]) -> None:
    """Raise NotFiniteFoundError for the first row of tokens whose sum of log-likelihoods is not finite."""
    for value, row in zip(sums, rows, strict=True):
        if not math.isfinite(value):
            raise NotFiniteFoundError([row])


@contextmanager
def explained(*models: Loaded) -> Iterator[None]:
    """Turn a NotFiniteFoundError within the block into a NotFiniteError about the model that is at fault."""
    try:
        yield
    except NotFiniteFoundError as found:
        reasons = [reason for loaded in models if (reason := _reason(loaded, found.rows))]
        labels = " and ".join(loaded.ref.label for loaded in models)
        if not reasons:
            reasons = [
                f"{labels} computed numbers that are not finite (NaN or infinity), but not when asked again. "
                "Run it again; if this happens often, suspect the machine's memory."
            ]
        raise NotFiniteError(reasons[0]) from None


def _reason(loaded: Loaded, rows: Sequence[Sequence[int]]) -> str:
    """Which layer of a model makes numbers that are not finite from these tokens, why, and what to do; empty if none.

    A row may be padded: its numbers are looked at as they were computed, without a mask.
    """
    for row in rows:
        name, module, largest = _first_layer(loaded, row)
        if module is None:
            continue
        start = f"{loaded.ref.label} computes numbers that are not finite (NaN or infinity), first in {name}"
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not all_finite(parameter.detach()):
                count = int((~parameter.detach().isfinite()).sum())
                return (
                    f"{start}, whose {weight} holds {count} of them. Its files are damaged: fetch or make them again."
                )
        if loaded.report.dtypes.get("torch.float16") or loaded.report.precision == "fp16":
            return (
                f"{start}: its inputs reach {largest:.3g}, and float16 ends at 65,504. "
                "Load the model in bf16 or fp32, which reach further."
            )
        return f"{start}: its inputs reach {largest:.3g}. Load the model in fp32, and check its files."
    return ""


def _first_layer(loaded: Loaded, row: Sequence[int]) -> tuple[str, nn.Module | None, float]:
    """The first module, in the order of the computation, whose result is not finite; and its largest input."""
    import torch

    model = loaded.model
    found: list[tuple[str, nn.Module | None, float]] = []
    handles = []
    for name, module in model.named_modules():

        def look(inner: nn.Module, given: tuple[object, ...], made: object, name: str = name) -> None:
            if not found and not _are_finite(made):
                found.append((name or "the model", inner, _largest(given)))

        handles.append(module.register_forward_hook(look))
    try:
        with inference(model):
            model(input_ids=torch.tensor([list(row)], device=input_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ("", None, 0.0)


def _floats(values: object) -> Iterator[torch.Tensor]:
    import torch
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel():
            yield leaf


def _are_finite(values: object) -> bool:
    return all(all_finite(tensor) for tensor in _floats(values))


def _largest(values: object) -> float:
    return max((tensor.abs().max().item() for tensor in _floats(values)), default=0.0)
