"""What a profile says: its models, the machine it needs and the time its notebooks may take.

Sizes are bytes and times are seconds. ``profiles`` reads these from env/profiles/*.yaml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from helpers.base.units import Precision

ChatFormatName = Literal["falcon-chat", "falcon-instruct", "llama-2", "chatml", "plain"]

# The format that the makers of a chat model published for it, by a pattern of its name.
_PUBLISHED_FORMATS: tuple[tuple[str, ChatFormatName], ...] = (
    (r"falcon-(7b|40b)-instruct", "falcon-instruct"),
    (r"falcon-180b-chat|falcon-mini-chat", "falcon-chat"),
    (r"llama-2-\d+b-chat(-hf)?", "llama-2"),
    (r"smollm2-.+-instruct", "chatml"),
)


@dataclass(frozen=True)
class ModelRef:
    """One model of a profile: where it is, how to talk to it, and what it stands in for.

    source: "embedded" (a folder of this repository), "package" (a GGUF file inside an installed Python
    package, see ``file`` and ``file_sha256``) or "hub" (a Hugging Face repository at ``revision``).
    """

    id: str
    family: Literal["falcon", "llama"]
    format: ChatFormatName
    source: Literal["embedded", "package", "hub"] = "hub"
    revision: str | None = None
    file: str | None = None
    file_sha256: str | None = None
    stand_in_for: str | None = None
    licence: str = ""
    download_bytes: int | None = None
    shards: int | None = None  # safetensors files it is published in
    keep: tuple[str, ...] = ()  # precisions whose quantized copy is saved at the first load: see helpers.models.kept
    rehearsed: bool = False  # replaced by a tiny checkpoint of random weights: see helpers.planning.rehearsal

    def __post_init__(self) -> None:
        for name in ("download_bytes", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, but is {value}.")

    def in_rehearsal(self) -> ModelRef:
        """The model, marked as rehearsed if it would come from a hub."""
        return replace(self, rehearsed=self.source == "hub")

    @property
    def name(self) -> str:
        """The last part of the id: ``tiiuae/falcon-180B`` -> ``falcon-180B``."""
        return self.id.rstrip("/").split("/")[-1]

    @property
    def published_format(self) -> ChatFormatName | None:
        """The chat format that this model was trained on; None if the workbook does not know it."""
        for pattern, form in _PUBLISHED_FORMATS:
            if re.fullmatch(pattern, self.name, re.IGNORECASE):
                return form
        return None

    @property
    def label(self) -> str:
        """The name for titles and tables, which says if the model is a stand-in or only rehearsed."""
        if self.rehearsed:
            return f"{self.name} (rehearsal: tiny, random weights)"
        if self.stand_in_for:
            return f"{self.name} (stand-in for {self.stand_in_for})"
        return self.name


@dataclass(frozen=True)
class Budget:
    """The time one notebook may take; ``cell_seconds`` limits each single cell.

    Raises ValueError for a time that is not above 0, or longer than a month, which the libraries below cannot wait.
    """

    MOST_SECONDS: ClassVar[int] = 31 * 24 * 3600

    seconds: float
    cell_seconds: float
    expected_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "cell_seconds", "expected_seconds"):
            time = getattr(self, name)
            if time is None and name == "expected_seconds":
                continue
            if isinstance(time, bool) or not 0 < time <= self.MOST_SECONDS:
                raise ValueError(f"{name} must be above 0 and at most {self.MOST_SECONDS}, but is {time!r}.")


@dataclass(frozen=True)
class Requirement:
    """The smallest machine that a profile runs on."""

    gpus: int = 0
    gpu_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    cpus: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, but is {value}.")


@dataclass(frozen=True)
class Profile:
    """One kind of machine and the models that run on it (env/profiles/*.yaml)."""

    name: str
    description: str
    falcon: ModelRef
    falcon_chat: ModelRef
    llama_chat: ModelRef
    precision: Precision
    precisions: tuple[Precision, ...]
    resident: tuple[tuple[str, ...], ...]
    requires: Requirement
    budgets: dict[str, Budget]
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    decoding: Literal["plain", "compiled", "lookup"] = "plain"  # of single replies: see helpers.generation.decoding
    falcon_draft: ModelRef | None = None  # a small Falcon that proposes tokens to the others
    repair: Literal["falcon_chat", "llama_chat"] = "falcon_chat"  # the role of the model that notebook 05 repairs

    @property
    def offline(self) -> bool:
        """True if no model of the profile comes from a hub."""
        return all(ref.source != "hub" for ref in self.models.values())

    @property
    def models(self) -> dict[str, ModelRef]:
        """The three models by role."""
        return {"falcon": self.falcon, "falcon_chat": self.falcon_chat, "llama_chat": self.llama_chat}

    @property
    def repaired(self) -> ModelRef:
        """The model that notebook 05 repairs."""
        return self.models[self.repair]

    def in_rehearsal(self) -> Profile:
        """The profile with each model that would come from a hub marked as rehearsed."""
        rehearsed = {role: ref.in_rehearsal() for role, ref in self.models.items()}
        return replace(
            self,
            falcon=rehearsed["falcon"],
            falcon_chat=rehearsed["falcon_chat"],
            llama_chat=rehearsed["llama_chat"],
        )
