"""The engines that can run a model: their names and packages, what each loads, and the methods each must have.

To add an engine, write a module of this group with a class that has the methods of ``_Engine``, and name it in
``_ALL``. An engine's class is imported by its name when it is started, so that the others need not be installed.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from helpers.base.errors import WorkbookError, choose

if TYPE_CHECKING:
    from collections.abc import Sequence

Ids = list[list[int]]  # token ids of each sequence of a batch
_UNQUANTIZED = ("fp32", "bf16", "fp16")


class EngineError(WorkbookError):
    """An engine that cannot do what it is asked to do; the message is the reason shown in the table of results."""


@dataclass(frozen=True)
class Job:
    """What a worker loads: the fields of a ``ModelRef``, its checkpoint's folder, and the largest sizes to come."""

    ref: dict[str, Any]
    folder: str
    precision: str
    threads: int
    context: int
    batch_size: int
    cache: str  # a folder for converted checkpoints


@dataclass(frozen=True)
class _Started:
    """What an engine says when it has loaded: a note for the reader, or "", and versions by package."""

    note: str
    versions: dict[str, str]


class _Engine(Protocol):
    """One way to run a model. Decoding is greedy, end tokens are ignored, and no prompt is remembered."""

    def load(self, job: Job) -> _Started:
        """Load the model. Raises EngineError if the engine cannot run it."""

    def prepare(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> None:
        """Get ready for runs of this size. It is not timed."""

    def run(self, prompts: Ids, new_tokens: int) -> list[int]:
        """Decode and return the number of new tokens of each sequence. This is what is timed."""

    def tokens(self, prompts: Ids, new_tokens: int) -> Ids:
        """The new tokens of the same run. It is not timed."""

    def cache_bytes(self) -> int | None:
        """Bytes of the key-value cache of the last ``tokens``; None if the engine does not tell."""


@dataclass(frozen=True)
class Kind:
    """An engine: where it is implemented, and the package that it needs if it is not the workbook's own."""

    name: str
    title: str
    implementation: str  # "module:Class" of this group
    package: str = ""
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16", "int8", "nf4")
    on_gpu: bool = True

    def make(self) -> _Engine:
        """Import the engine's module and create the engine."""
        # imported by name: a worker under another Python must not import the modules of the other engines
        module, name = self.implementation.split(":")
        return cast("_Engine", getattr(importlib.import_module(f"helpers.engines.{module}"), name)())


_ALL = (
    Kind("plain", "transformers alone, as in the announcement", "transformers_engines:_Plain", precisions=_UNQUANTIZED),
    Kind("default", "the workbook's default", "transformers_engines:_Default"),
    Kind("fastest", "the workbook's fastest: static cache, compiled", "transformers_engines:_Fastest"),
    Kind("llama.cpp", "llama.cpp (xllamacpp)", "llama_cpp:_LlamaCpp", "xllamacpp", _UNQUANTIZED, on_gpu=False),
    Kind("ctranslate2", "CTranslate2", "ctranslate2:_CTranslate2", "ctranslate2", _UNQUANTIZED, on_gpu=False),
    Kind("vllm", "vLLM", "vllm:_Vllm", "vllm", _UNQUANTIZED),
)
KINDS = {kind.name: kind for kind in _ALL}
OWN = ("plain", "default", "fastest")


def chosen(names: Sequence[str]) -> list[Kind]:
    """The engines of these names in the order of the catalogue; all of them if no name is given.

    Raises WorkbookError for an unknown name.
    """
    for name in names:
        choose(name, KINDS, "engine")
    return [kind for kind in KINDS.values() if not names or kind.name in names]


def _versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages by name."""
    return {name: importlib.metadata.version(name) for name in packages}
