"""Read what ``workbook plan`` is asked for: the GPUs, the model and the work on it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from helpers.base.errors import WorkbookError, choose
from helpers.machine import anatomy, memory
from helpers.models import profiles
from helpers.models.finding import published_shape
from helpers.models.references import ModelRef
from helpers.planning.plan import DECIMAL

if TYPE_CHECKING:
    from helpers.machine.memory import Workload

FALCON_180B = "tiiuae/falcon-180B"
_MOST_GPUS = 1024


def _parse_gpus(text: str) -> tuple[float, ...]:
    """The bytes of each GPU: "8x80" is eight of 80 GB (80e9 bytes), "4x80,2x40" two kinds. Raises WorkbookError."""
    sizes: list[float] = []
    for part in text.split(","):
        kind = re.fullmatch(r"\s*(\d{1,4})x(\d{1,4}(?:\.\d+)?)\s*(?:gb)?\s*", part, re.IGNORECASE)
        if not kind or not int(kind[1]) or not float(kind[2]):
            raise WorkbookError(
                f"--gpus {text!r} is not valid. Write number x GB of each, such as 8x80, or 4x80,2x40 for two kinds."
            )
        sizes += [float(kind[2]) * DECIMAL] * int(kind[1])
    if len(sizes) > _MOST_GPUS:
        raise WorkbookError(f"--gpus {text!r} names {len(sizes)} GPUs. Give at most {_MOST_GPUS}.")
    return tuple(sizes)


def _published_ref(model_id: str) -> ModelRef:
    """A model by its id, if its configuration is known here: published ones and their chat or base sisters.

    Its id stays the one asked for; its size is that of its sister. Raises WorkbookError that lists the known ones.
    """
    for name in profiles.available():
        for ref in profiles.load_profile(name).models.values():
            if ref.id == model_id and ref.source == "hub":
                return replace(ref, stand_in_for=None)
    shape = published_shape(model_id) or choose(model_id, anatomy.published_models(), "published configuration of")
    family: Literal["falcon", "llama"] = "llama"
    if "falcon" in shape:
        family = "falcon"
    # The hub's files are in 16 bit, and hold the head even if it is tied to the embeddings.
    size = 2 * anatomy.count_parameters(anatomy.published_config(shape), tied=False)
    return ModelRef(model_id, family, "plain", download_bytes=size)


def _check_request(work: Workload, precision: str | None) -> None:
    """Raise WorkbookError for less than one sequence or token, and for an unknown precision."""
    if work.batch_size < 1 or (work.context_tokens is not None and work.context_tokens < 1):
        raise WorkbookError("There is nothing to plan for. Give at least one sequence and one token of context.")
    if precision is not None:
        memory.element_bytes(precision)  # raises for an unknown one
