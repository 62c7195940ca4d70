"""Dataclasses that several modules share. Sizes are bytes and times are seconds unless a name says otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, TypeVar, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.prompts import ChatFormat

_Option = TypeVar("_Option", bound=str)

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]

Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
QUANTIZED = ("int8", "nf4")
Mode = Literal["inference", "full", "lora", "qlora"]
FinishReason = Literal["end", "stop", "length"]
DecodingPath = Literal["plain", "compiled", "lookup", "speculative"]


def gib(size: float) -> str:
    """Bytes as text in GiB (2^30), such as "74.5 GiB"."""
    return f"{size / GIB:.1f} GiB"


def first_names(names: Iterable[str], count: int = 3) -> str:
    """The first names in alphabetical order as text, such as "a, b, c and 4 more"."""
    ordered = sorted(names)
    text = ", ".join(ordered[:count])
    return f"{text} and {len(ordered) - count} more" if len(ordered) > count else text


class Message(TypedDict):
    """One message of a conversation, in the form chat libraries share."""

    role: Literal["system", "user", "assistant"]
    content: str


class WorkbookError(Exception):
    """An error whose message tells the reader what to do about it."""


def choose(value: str, options: Iterable[_Option], what: str, error: type[Exception] = WorkbookError) -> _Option:
    """The option that equals ``value``. ``what`` is the noun for it, such as "profile".

    Raises ``error`` if there is none, listing the options.
    """
    names = tuple(options)
    for name in names:
        if name == value:
            return name
    raise error(f"There is no {what} {value!r}. Choose one of: {', '.join(names)}.")


@dataclass(frozen=True)
class ModelRef:
    """One model of a profile: where it is, how to talk to it, and what it stands in for.

    source: "embedded" (a folder of this repository), "package" (a GGUF file inside an installed Python
    package, see ``file``) or "hub" (a Hugging Face repository at ``revision``).
    """

    id: str
    family: Literal["falcon", "llama"]
    format: Literal["falcon-chat", "llama-2", "chatml", "plain"]
    source: Literal["embedded", "package", "hub"] = "hub"
    revision: str | None = None
    file: str | None = None
    stand_in_for: str | None = None
    licence: str = ""
    download_bytes: int | None = None
    shards: int | None = None  # safetensors files it is published in
    rehearsed: bool = False  # replaced by a tiny checkpoint of random weights: see helpers.rehearsal

    @property
    def name(self) -> str:
        """The last part of the id: ``tiiuae/falcon-180B`` -> ``falcon-180B``."""
        return self.id.rstrip("/").split("/")[-1]

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
    """The time one notebook may take; ``cell_seconds`` limits each single cell."""

    seconds: float
    cell_seconds: float
    expected_seconds: float | None = None


@dataclass(frozen=True)
class Requirement:
    """The smallest machine that a profile runs on."""

    gpus: int = 0
    gpu_bytes: int = 0
    ram_bytes: int = 0
    disk_bytes: int = 0
    cpus: int = 1


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
    decoding: Literal["plain", "compiled", "lookup"] = "plain"  # of single replies: see helpers.decoding
    falcon_draft: ModelRef | None = None  # a small Falcon that proposes tokens to the others

    @property
    def offline(self) -> bool:
        """True if no model of the profile comes from a hub."""
        return all(ref.source != "hub" for ref in self.models.values())

    @property
    def models(self) -> dict[str, ModelRef]:
        """The three models by role."""
        return {"falcon": self.falcon, "falcon_chat": self.falcon_chat, "llama_chat": self.llama_chat}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver reports it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True)
class Machine:
    """What this machine has. A ``rehearsed`` one does not exist: see ``helpers.rehearsal``."""

    gpus: tuple[Gpu, ...]
    ram_bytes: int
    ram_available_bytes: int
    disk_free_bytes: int
    cpu_count: int
    cpu_name: str
    system: str
    python: str
    rehearsed: bool = False
    cache_free_bytes: int | None = None  # on the disk of the Hugging Face cache, which may be another one


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part (weights, kv_cache, activations, gradients, optimizer); see ``helpers.memory.estimate``."""

    precision: str
    mode: str
    weights: int
    kv_cache: int = 0
    activations: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The parts by name, in the order of the fields."""
        names = ("weights", "kv_cache", "activations", "gradients", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Shortfall:
    """Bytes that are missing, and the devices that do not hold enough, such as "4 devices of 74.5 GiB".

    ``str`` gives the rest of a sentence that begins with "it".
    """

    bytes: int
    devices: str

    def __str__(self) -> str:
        return f"needs {gib(self.bytes)} more than {self.devices} can hold"


@dataclass(frozen=True)
class Placement:
    """Which device holds which module. ``per_device_bytes`` counts weights and each layer's share of the rest."""

    device_map: dict[str, int | str]
    per_device_bytes: dict[int | str, int]
    shortfall: Shortfall | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.shortfall is None


@dataclass(frozen=True)
class LoadReport:
    """The verified facts of a load. ``stored_bytes``: bytes of the weights in memory, quantized or not."""

    model: str
    stand_in_for: str | None
    precision: str
    parameters: int
    stored_bytes: int
    linear_layers: int
    quantized_layers: int
    dtypes: dict[str, int]
    devices: dict[str, int]
    seconds: float
    repaired: bool
    cache_bytes_per_token: int = 0  # keys and values of one sequence
    grouped_cache: bool = False  # Falcon with a cache of its key-value heads only: see helpers.grouped_cache
    commit: str | None = None  # of a hub's repository, and whether the profile pins it


@dataclass
class Loaded:
    """A verified model with its tokenizer and the chat format it was trained on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    format: ChatFormat
    report: LoadReport
    ref: ModelRef
    decoder: Any = field(default=None, init=False, repr=False, compare=False)  # kept by helpers.decoding


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Temperature 0 is greedy. The defaults are the announcement's example's settings."""

    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A finished reply. ``tokens`` counts generated tokens, stop string and end token included."""

    text: str
    tokens: int
    seconds: float
    first_token_seconds: float
    finish_reason: FinishReason
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    passes: int = 0  # of the model; fewer than tokens if proposed ones were accepted
    proposed: int = 0  # tokens that a draft proposed

    @property
    def acceptance_rate(self) -> float:
        """The share of a draft's tokens that the model accepted; nan if none were proposed."""
        if not self.proposed:
            return float("nan")
        return (self.tokens - self.passes) / self.proposed

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        after = self.seconds - self.first_token_seconds
        if self.tokens < 2 or after <= 0:
            return float("nan")
        return (self.tokens - 1) / after


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float = 0.95


class Scalar(Protocol):
    """A number of numpy or torch."""

    def item(self) -> object: ...


@dataclass(frozen=True)
class Measured:
    """A value to record with what is known about it; ``results.record`` says what the fields mean."""

    value: bool | int | float | str | Scalar
    unit: str = ""
    claim: str | None = None
    tolerance: float | None = None
    agrees: bool | None = None
    model: str | None = None
