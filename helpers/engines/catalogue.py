"""The engines that are compared, and what a worker is told and answers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from helpers.types import WorkbookError, choose

Ids = list[list[int]]  # token ids of each sequence of a batch


class EngineError(WorkbookError):
    """An engine that cannot do what it is asked for; the message is the reason that stands in its row."""


@dataclass(frozen=True)
class Job:
    """What a worker loads. ``ref``: the fields of a ``ModelRef``; ``folder``: its checkpoint; the rest are limits."""

    ref: dict[str, Any]
    folder: str
    precision: str
    threads: int
    context: int
    batch_size: int
    cache: str  # a folder for converted checkpoints


class Engine(Protocol):
    """One way to run a model. Decoding is greedy, end tokens are ignored, and no prompt is remembered."""

    def load(self, job: Job) -> dict[str, Any]:
        """Load the model; returns ``note`` (what a reader should know, or "") and ``versions``."""

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Make ready, untimed, for runs of this size."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """What is timed: decode; the number of new tokens of each sequence."""

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The new tokens of the same run, untimed."""

    def cache_bytes(self) -> int | None:
        """Bytes of the key-value cache of the last ``tokens``; None where the engine does not tell."""


@dataclass(frozen=True)
class Kind:
    """An engine: its module and class here, and the package that it needs, if it is a peer."""

    name: str
    title: str
    place: str
    package: str = ""
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "nf4")
    on_gpu: bool = True

    def make(self) -> Engine:
        """The engine, its module imported."""
        module, name = self.place.split(":")
        return getattr(importlib.import_module(f"helpers.engines.{module}"), name)()


SIXTEEN = ("fp32", "bf16", "fp16")
KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", "transformers alone, as in the announcement", "library:Plain", precisions=SIXTEEN),
        Kind("default", "the workbook's default", "library:Default"),
        Kind("fastest", "the workbook's fastest: static cache, compiled", "library:Fastest"),
        Kind("llama.cpp", "llama.cpp (xllamacpp)", "llama_cpp:LlamaCpp", "xllamacpp", SIXTEEN, on_gpu=False),
        Kind("ctranslate2", "CTranslate2", "translate:CTranslate2", "ctranslate2", SIXTEEN, on_gpu=False),
        Kind("vllm", "vLLM", "virtual:Vllm", "vllm", SIXTEEN),
    )
}
OWN = ("plain", "default", "fastest")


def chosen(names: Sequence[str]) -> list[Kind]:
    """The engines of these names, all where none is given. Raises WorkbookError for an unknown one."""
    for name in names:
        choose(name, KINDS, "engine")
    return [kind for kind in KINDS.values() if not names or kind.name in names]
