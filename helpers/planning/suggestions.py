"""List every precision and set of equal GPUs that runs a model: ``workbook plan --suggest``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.machine import placement
from helpers.models import finding
from helpers.planning.plan import AS_MANY_AS_FIT, COUNTS, DECIMAL, SIZES
from helpers.planning.request import FALCON_180B, _check_request, _published_ref

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from helpers.machine.memory import Workload
    from helpers.models.references import ModelRef


@dataclass(frozen=True)
class _Suggestion:
    """A precision on a set of equal GPUs that runs a model, and the tokens of context that fit.

    ``library_context_tokens``: with the cache that transformers itself keeps.
    """

    precision: str
    double_quant: bool
    gpus: int
    gigabytes: int
    total_gigabytes: int
    context_tokens: int
    library_context_tokens: int


def suggested_for(
    profile: str | None, model: str | None, gpus: str | None, *, double_quant: bool = False, figure: bool = False
) -> ModelRef:
    """The model that ``suggest`` is asked for. Raises WorkbookError for options that it would ignore."""
    if profile or gpus:
        raise WorkbookError("--suggest looks at its own list of GPUs. Give --model alone, or nothing.")
    if double_quant:
        raise WorkbookError("--suggest lists nf4 with double quantization and without. Leave --double-quant out.")
    if figure:
        raise WorkbookError("--suggest draws no figure. Leave --figure out, or give --profile or --gpus instead.")
    return _published_ref(model or FALCON_180B)


def suggest(ref: ModelRef, work: Workload = AS_MANY_AS_FIT, precision: str | None = None) -> list[_Suggestion]:
    """Every precision and set of equal GPUs (``COUNTS`` of ``SIZES``) that runs a model, the least memory first.

    ``precision``: only this one. Raises WorkbookError for an unknown one, and for less than one sequence or token.
    """
    _check_request(work, precision)
    config = finding.config(ref)
    precisions = ["fp32", "bf16", "int8", "nf4"]  # fp16 needs what bf16 needs
    if precision is not None:
        precisions = [precision]
    suggestions: list[_Suggestion] = []
    for name, count, size in itertools.product(precisions, COUNTS, SIZES):
        for double_quant in (False, True):
            if double_quant and name != "nf4":  # only nf4 has scales to quantize
                continue
            asked = replace(work, double_quant=double_quant)
            suggestion = _suggestion(config, name, count, size, asked)
            tokens = suggestion.context_tokens
            if work.cache_heads == "library":
                tokens = suggestion.library_context_tokens
            if tokens >= work.tokens_for(config):
                suggestions.append(suggestion)
    return sorted(suggestions, key=lambda listed: (listed.total_gigabytes, listed.gpus))


def _suggestion(config: PretrainedConfig, precision: str, count: int, size: int, work: Workload) -> _Suggestion:
    gpus = [size * DECIMAL] * count
    kv_heads = placement.largest_context(config, precision, gpus, replace(work, cache_heads="kv"))
    library = placement.largest_context(config, precision, gpus, replace(work, cache_heads="library"))
    return _Suggestion(precision, work.double_quant, count, size, count * size, kv_heads, library)
