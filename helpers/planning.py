"""What a machine needs to run the models of a profile, or any published one: nothing is loaded, nothing downloaded.

A ``Plan`` holds memory by precision, every device part by part, the limit of the decoding speed, the download, the disk
and the time to load; ``tables`` shows it, ``draw`` draws its devices, ``to_json`` keeps it. Sizes are bytes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers import hardware, loading, memory, profiles
from helpers.memory import CacheHeads
from helpers.types import (
    GIB,
    PRECISIONS,
    ModelRef,
    Placement,
    Profile,
    WorkbookError,
    choose,
    gib,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.table import Table
    from transformers import PretrainedConfig

FALCON_180B = "tiiuae/falcon-180B"
PARTS = ("weights", "kv_cache", "activations", "reserved")
SIZES = (24, 40, 48, 80, 141)  # GB of a card, as sold
COUNTS = (1, 2, 4, 8, 16)
DECIMAL = 1e9
GIGABIT = 1e9 / 8  # bytes a second over a line of 1 Gbit/s
MOST_GPUS = 1024


@dataclass(frozen=True)
class Card:
    """A GPU with its memory in GB, as sold, and its published memory bandwidth in bytes a second."""

    name: str
    gigabytes: int
    bandwidth: float
    source: str


CARDS = (
    Card("RTX 3090", 24, 936e9, "NVIDIA specifications"),
    Card("RTX 4090", 24, 1008e9, "NVIDIA specifications"),
    Card("A100 40GB", 40, 1555e9, "NVIDIA A100 data sheet"),
    Card("RTX A6000", 48, 768e9, "NVIDIA RTX A6000 data sheet"),
    Card("L40S", 48, 864e9, "NVIDIA L40S data sheet"),
    Card("A100 80GB", 80, 2039e9, "NVIDIA A100 data sheet, SXM"),
    Card("H100 80GB", 80, 3350e9, "NVIDIA H100 data sheet, SXM"),
    Card("H200", 141, 4800e9, "NVIDIA H200 data sheet"),
)


@dataclass(frozen=True)
class Work:
    """What is generated: sequences at a time and tokens of context; ``context_tokens`` None: as many as go.

    That is 2048, or what the model takes where it takes fewer.
    """

    context_tokens: int | None = None
    batch_size: int = 1
    double_quant: bool = False
    cache_heads: CacheHeads = "kv"

    def how(self) -> dict[str, Any]:
        """What ``memory.place_together`` is to count."""
        return asdict(self)

    def how_for(self, config: PretrainedConfig) -> dict[str, Any]:
        """What ``memory`` is to count of one model."""
        return asdict(self) | {"context_tokens": self.context_tokens or memory.context_for(config)}

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.context_tokens is not None and self.context_tokens < 1):
            raise WorkbookError("at least one sequence, and one token of context, is needed to plan for")


# What notebook 04 asks at once; no question with its reply has more tokens, since a token is a byte of text or more.
QUESTIONS = Work(context_tokens=144, batch_size=56)


@dataclass(frozen=True)
class Here:
    """What was measured on this machine: ``disk_free`` in bytes, ``memory_bandwidth`` in bytes a second.

    ``disk`` is None, and ``disk_problem`` says why, where it could not be measured; the bandwidth is None where no
    plan without GPUs asked for it.
    """

    disk_folder: str
    disk_free: int
    disk: hardware.DiskSpeed | None
    disk_problem: str = ""
    memory_bandwidth: float | None = None


@dataclass(frozen=True)
class Need:
    """One model, alone, in one precision. ``least_gpus``: of the largest of these devices; None without GPUs."""

    model: str
    precision: str
    parts: dict[str, int]
    total: int
    fits: bool
    why_not: str
    least_gpus: int | None


@dataclass(frozen=True)
class Device:
    """A device with what it holds; the activations of models that are in memory together are added up."""

    name: str
    limit: int
    weights: int
    kv_cache: int
    activations: int
    reserved: int

    @property
    def held(self) -> int:
        """The sum of the parts."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass(frozen=True)
class Group:
    """Models that are in memory at the same time (``models``), or one after the other in equal shape (``or``)."""

    models: tuple[str, ...]
    precision: str
    devices: tuple[Device, ...]
    fits: bool
    why_not: str

    @property
    def label(self) -> str:
        """Its models and their precision, in words."""
        return f"{' and '.join(self.models)} in {self.precision}"


@dataclass(frozen=True)
class SpeedLimit:
    """The most tokens a second, of all sequences together, that the bandwidth of the memory (bytes a second) allows."""

    model: str
    precision: str
    card: str
    bandwidth: float
    bytes_read: int
    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Repository:
    """A model's files: where they are, how large, how long reading them takes on this machine's disk."""

    model: str
    place: str
    stored_bytes: int
    download_bytes: int
    load_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """All that is planned; see the module.

    ``on_gpus``: False where all is in host memory. ``contexts``: the tokens of one sequence, each number that a model
    is planned for. ``questions``: the groups with ``QUESTIONS`` in place of ``work``; empty for a plan of no profile.
    ``budgets``: seconds by notebook ("expected", "budget", and "cell" for each cell).
    """

    title: str
    machine: str
    on_gpus: bool
    work: Work
    contexts: tuple[int, ...]
    stand_ins: dict[str, str]
    needs: tuple[Need, ...]
    groups: tuple[Group, ...]
    speeds: tuple[SpeedLimit, ...]
    repositories: tuple[Repository, ...]
    downloaded_bytes: int
    disk_needed: int
    here: Here
    remedies: tuple[str, ...]
    questions: tuple[Group, ...] = ()
    budgets: dict[str, dict[str, float | None]] = field(default_factory=dict)
    article: tuple[dict[str, Any], ...] = ()

    @property
    def download_bytes(self) -> int:
        """The sum of the distinct repositories."""
        return sum(repository.download_bytes for repository in self.repositories)

    @property
    def fits(self) -> bool:
        """Whether all that is in memory at the same time has room on the devices."""
        return all(group.fits for group in self.groups)


@dataclass(frozen=True)
class Suggestion:
    """A precision on a set of equal GPUs that runs a model, and the tokens of context for which there is room.

    ``library_context_tokens``: with the cache that transformers itself keeps.
    """

    precision: str
    double_quant: bool
    gpus: int
    gigabytes: int
    total_gigabytes: int
    context_tokens: int
    library_context_tokens: int


# --- what is asked for ------------------------------------------------------------------------------------------------


def parse_gpus(text: str) -> tuple[float, ...]:
    """The bytes of each GPU: "8x80" is eight of 80 GB (80e9 bytes), "4x80,2x40" two kinds. Raises WorkbookError."""
    sizes: list[float] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})x(\d{1,4}(?:\.\d+)?)\s*(?:gb)?\s*", part, re.IGNORECASE)
        if not found or not int(found[1]) or not float(found[2]):
            raise WorkbookError(f"--gpus {text!r} is not understood: write 8x80, or 4x80,2x40 (number x GB of each)")
        sizes += [float(found[2]) * DECIMAL] * int(found[1])
    if len(sizes) > MOST_GPUS:
        raise WorkbookError(f"--gpus {text!r}: {len(sizes)} GPUs are more than this plans for ({MOST_GPUS})")
    return tuple(sizes)


def published_ref(model_id: str) -> ModelRef:
    """A model by its id, of those whose configuration is known here: published ones and their chat or base sisters.

    Its id stays the one asked for; its size is that of its sister. Raises WorkbookError that lists the known ones.
    """
    for profile in map(profiles.load_profile, profiles.available()):
        for ref in profile.models.values():
            if ref.id == model_id and ref.source == "hub":
                return replace(ref, stand_in_for=None)
    shape = _published_shape(model_id) or choose(model_id, memory.published_models(), "published configuration of")
    family: Literal["falcon", "llama"] = "falcon" if "falcon" in shape else "llama"
    size = 2 * memory.count_parameters(memory.published_config(shape), tied=False)
    return ModelRef(model_id, family, "plain", download_bytes=size)


def config_of(ref: ModelRef) -> PretrainedConfig:
    """A model's configuration: its own, or that of a published sister of the same shape; nothing is downloaded."""
    shape = _published_shape(ref.id) if ref.source == "hub" else None
    return memory.published_config(shape) if shape else loading.config(ref)


def _published_shape(model_id: str) -> str | None:
    """The published model, itself or its base or chat sister, that has a model's configuration; None without one."""
    base = re.sub("-(chat|instruct)$", "", model_id)
    names = (model_id, base, f"{base.removesuffix('-hf')}-chat-hf")
    return next((name for name in names if name in memory.published_models()), None)


def measure(cpu: bool = False) -> Here:
    """Measure the disk under the cache of downloads and, for a plan without GPUs, the memory's bandwidth."""
    cache = hardware.download_folder()
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    free = hardware.disk_free(cache)
    bandwidth = hardware.memory_bandwidth(2**27) if cpu else None
    try:
        return Here(str(folder), free, hardware.disk_read_speed(folder, 2**27), memory_bandwidth=bandwidth)
    except OSError as error:
        return Here(str(folder), free, None, error.strerror or str(error), bandwidth)


def make(
    profile: str | None = None,
    model: str | None = None,
    gpus: str | None = None,
    precision: str | None = None,
    work: Work | None = None,
) -> Plan:
    """The plan of a profile, or of a model (Falcon-180B) on GPUs (8x80), measuring this machine.

    Raises WorkbookError for what is unknown or does not go together.
    """
    if precision is not None:
        choose(precision, PRECISIONS, "precision")
    if profile and (model or gpus):
        raise WorkbookError("a profile names its own models and GPUs: give --profile, or --model and --gpus")
    if model or gpus:
        ref, sizes = published_ref(model or FALCON_180B), parse_gpus(gpus or "8x80")
        return plan_model(ref, sizes, measure(), work, precision or "bf16")
    chosen = profiles.load_profile(profile or profiles.SMALLEST)
    return plan_profile(chosen, measure(cpu=not chosen.requires.gpus), work, precision)


def suggested_for(
    profile: str | None, model: str | None, gpus: str | None, *, double_quant: bool = False, figure: bool = False
) -> ModelRef:
    """The model that ``suggest`` is asked for. Raises WorkbookError for what it does not look at, and for a figure."""
    if profile or gpus:
        raise WorkbookError("--suggest looks at sets of GPUs of its own: give --model alone, or nothing")
    if double_quant:
        raise WorkbookError("--suggest lists nf4 with double quantization and without: leave --double-quant out")
    if figure:
        raise WorkbookError("--suggest draws no figure: leave --figure out, or give --profile or --gpus instead")
    return published_ref(model or FALCON_180B)


# --- planning ---------------------------------------------------------------------------------------------------------


def plan_profile(profile: Profile, here: Here, work: Work | None = None, precision: str | None = None) -> Plan:
    """The plan of a profile on the least machine it asks for. Raises WorkbookError for an unknown precision."""
    need, used = profile.requires, precision or profile.precision
    room = _Room((need.gpu_bytes,) * need.gpus, 0 if need.gpus else need.ram_bytes)
    planned = _plan(
        f"profile {profile.name}: {profile.description}",
        profile.models,
        room,
        resident=profile.resident,
        precision=used,
        precisions=profile.precisions,
        work=work or Work(),
        here=here,
    )
    budgets = {
        name: {"expected": budget.expected_seconds, "budget": budget.seconds, "cell": budget.cell_seconds}
        for name, budget in profile.budgets.items()
    }
    questions = replace(planned.work, context_tokens=QUESTIONS.context_tokens, batch_size=QUESTIONS.batch_size)
    return replace(
        planned,
        questions=tuple(_group(each, used, room, questions) for each in _residents(profile.models, profile.resident)),
        budgets=budgets,
        downloaded_bytes=profiles.downloaded_bytes(profile),
        disk_needed=need.disk_bytes,
    )


def plan_model(
    ref: ModelRef, gpus: Sequence[float], here: Here, work: Work | None = None, precision: str = "bf16"
) -> Plan:
    """The plan of one model on GPUs of these bytes. Raises WorkbookError for an unknown precision."""
    title = f"{ref.id} in {precision} on {_sold(gpus)}"
    known = dict.fromkeys((*(name for name in PRECISIONS if name != "fp16"), precision))
    return _plan(
        title,
        {"model": ref},
        _Room(tuple(gpus), 0),
        resident=[["model"]],
        precision=precision,
        precisions=tuple(known),
        work=work or Work(),
        here=here,
    )


def suggest(ref: ModelRef, work: Work | None = None, precision: str | None = None) -> list[Suggestion]:
    """Every precision and set of equal GPUs (``COUNTS`` of ``SIZES``) that runs a model, the least memory first.

    ``precision``: that one alone.
    """
    if precision is not None:
        choose(precision, PRECISIONS, "precision")
    work = work or Work()
    config = config_of(ref)
    tokens, found = work.context_tokens or memory.context_for(config), []
    wanted = (precision,) if precision else ("fp32", "bf16", "int8", "nf4")
    choices = [(name, double) for name in wanted for double in ((False, True) if name == "nf4" else (False,))]
    for (name, double), count, size in itertools.product(choices, COUNTS, SIZES):
        how = {"batch_size": work.batch_size, "double_quant": double}
        gpus = [size * DECIMAL] * count
        fitting, library = (
            memory.largest_context(config, name, gpus, cache_heads=heads, **how) for heads in ("kv", "library")
        )
        if (library if work.cache_heads == "library" else fitting) >= tokens:
            found.append(Suggestion(name, double, count, size, count * size, fitting, library))
    return sorted(found, key=lambda each: (each.total_gigabytes, each.gpus))


def _plan(
    title: str,
    models: Mapping[str, ModelRef],
    room: _Room,
    *,
    resident: Iterable[Sequence[str]],
    precision: str,
    precisions: Sequence[str],
    work: Work,
    here: Here,
) -> Plan:
    shapes = {each.models[0]: each.configs[0] for each in _residents(models, [(role,) for role in models])}
    residents = _residents(models, resident)
    needs = [_need(name, config, each, room, work) for name, config in shapes.items() for each in precisions]
    repositories = {ref.id: ref for ref in models.values()}
    is_180b = any(name.startswith(FALCON_180B) for name in repositories)
    return Plan(
        title=title,
        machine=room.words,
        on_gpus=bool(room.gpus),
        work=work,
        contexts=tuple(sorted({work.context_tokens or memory.context_for(config) for config in shapes.values()})),
        stand_ins={ref.name: ref.stand_in_for for ref in models.values() if ref.stand_in_for},
        needs=tuple(needs),
        groups=tuple(_group(each, precision, room, work) for each in residents),
        speeds=tuple(
            limit
            for name, config in shapes.items()
            for limit in _speeds(name, config, precision, room, work=work, here=here)
        ),
        repositories=tuple(_repository(ref, here) for ref in repositories.values()),
        downloaded_bytes=0,
        disk_needed=sum(ref.download_bytes or 0 for ref in repositories.values()),
        here=here,
        remedies=tuple(
            text for each in residents for text in _remedies(each, precision, precisions, room=room, work=work)
        ),
        article=tuple(memory.hardware_claims().to_dict("records")) if is_180b else (),
    )


@dataclass(frozen=True)
class _Room:
    """The devices of a plan: GPUs, or else host memory."""

    gpus: tuple[float, ...]
    ram: float

    @property
    def sizes(self) -> dict[int | str, float]:
        return dict(enumerate(self.gpus)) if self.gpus else {"cpu": self.ram}

    @property
    def words(self) -> str:
        return _sold(self.gpus) if self.gpus else f"{gib(self.ram)} of memory, no GPU"

    def place(self, configs: Sequence[PretrainedConfig], precision: str, work: Work) -> list[_Placed]:
        """Models that are in memory at the same time, each with its parts on every device."""
        placements = memory.place_together(configs, precision, self.gpus, cpu_bytes=self.ram, **work.how())
        return [
            _Placed(placed, memory.parts_by_device(config, precision, placed, **work.how_for(config)))
            for config, placed in zip(configs, placements, strict=True)
        ]


@dataclass(frozen=True)
class _Placed:
    """Where a model is, and what it holds on each device."""

    placement: Placement
    parts: Mapping[Any, Mapping[str, int]]


@dataclass(frozen=True)
class _Resident:
    """Models that are in memory at the same time; a name is "A or B" where two of one shape take turns."""

    models: tuple[str, ...]
    configs: tuple[PretrainedConfig, ...]


def _residents(models: Mapping[str, ModelRef], groups: Iterable[Sequence[str]]) -> list[_Resident]:
    """Groups of roles as what is in memory together; groups of equal shapes become one."""
    configs = {role: config_of(ref) for role, ref in models.items()}
    found: dict[Any, list[Sequence[str]]] = {}
    for group in groups:
        shapes = tuple((memory.anatomy(configs[role]), memory.context_for(configs[role])) for role in group)
        found.setdefault(shapes, []).append(group)
    names = {role: _name(ref) for role, ref in models.items()}
    return [
        _Resident(
            tuple(" or ".join(dict.fromkeys(names[role] for role in turns)) for turns in zip(*same, strict=True)),
            tuple(configs[role] for role in same[0]),
        )
        for same in found.values()
    ]


def _need(name: str, config: PretrainedConfig, precision: str, room: _Room, work: Work) -> Need:
    how = work.how_for(config)
    estimate, placed = memory.estimate(config, precision, **how), room.place([config], precision, work)[0].placement
    parts = {part: size for part, size in estimate.parts.items() if part in PARTS}
    least = memory.least_gpus(config, precision, max(room.gpus), **how) if room.gpus else None
    return Need(name, precision, parts, estimate.total, placed.fits, placed.why_not, least)


def _group(resident: _Resident, precision: str, room: _Room, work: Work) -> Group:
    placed = room.place(resident.configs, precision, work)
    devices = tuple(
        Device(
            _device_name(device),
            round(size),
            **{part: sum(each.parts[device][part] for each in placed) for part in PARTS if part != "reserved"},
            reserved=round(size * memory.RESERVED),
        )
        for device, size in room.sizes.items()
    )
    whys = [
        each.placement.why_not + memory.left_beside(resident.models[:index])
        for index, each in enumerate(placed)
        if not each.placement.fits
    ]
    return Group(resident.models, precision, devices, not whys, "; ".join(whys))


def _speeds(
    name: str, config: PretrainedConfig, precision: str, room: _Room, *, work: Work, here: Here
) -> Iterator[SpeedLimit]:
    """For every kind of card that the devices may be: layers run one after the other, each at its card's bandwidth."""
    (placed,) = room.place([config], precision, work)
    if not placed.placement.fits:
        return
    shape = memory.anatomy(config)
    read = {device: part["weights"] + part["kv_cache"] for device, part in placed.parts.items()}
    if not shape.tied:  # of the embeddings one row is looked up; a tied matrix is read as the head
        read[placed.placement.device_map[shape.embeddings_name]] -= shape.embeddings * (4 if precision == "fp32" else 2)
    for cards, bandwidth in _bandwidths(room, here):
        seconds = sum(size / bandwidth[device] for device, size in read.items())
        total = sum(read.values())
        label, source = " + ".join(card.name for card in cards), "; ".join(dict.fromkeys(card.source for card in cards))
        yield SpeedLimit(name, precision, label, total / seconds, total, work.batch_size / seconds, source)


def _bandwidths(room: _Room, here: Here) -> Iterator[tuple[list[Card], dict[Any, float]]]:
    if not room.gpus:
        if here.memory_bandwidth:
            yield [Card("this machine", 0, 0, "measured here by copying")], {"cpu": here.memory_bandwidth}
        return
    kinds = list(dict.fromkeys(room.gpus))
    choices = [[card for card in CARDS if card.gigabytes == round(kind / DECIMAL)] for kind in kinds]
    for cards in itertools.product(*choices):
        by_size = dict(zip(kinds, cards, strict=True))
        yield list(cards), {index: by_size[size].bandwidth for index, size in enumerate(room.gpus)}


def _repository(ref: ModelRef, here: Here) -> Repository:
    if ref.source == "hub":
        stored = ref.download_bytes or 0
    else:
        stored = sum(file.stat().st_size for file in loading.resolve(ref).glob("*.safetensors"))
    seconds = stored / here.disk.bytes_per_second if here.disk else None
    return Repository(ref.id, profiles.LIVES[ref.source], stored, ref.download_bytes or 0, seconds)


def _remedies(
    resident: _Resident, precision: str, precisions: Sequence[str], *, room: _Room, work: Work
) -> Iterator[str]:
    """A sentence for models in memory together that have no room: by how much, and what would hold them all."""
    group = _group(resident, precision, room, work)
    if group.fits:
        return
    fitting = [name for name in precisions if _group(resident, name, room, work).fits]
    would = [f"{' or '.join(fitting)} on {room.words}"] if fitting else []
    if room.gpus:
        least = memory.least_gpus_together(resident.configs, precision, max(room.gpus), **work.how())
        would += [f"{precision} on {_sold([max(room.gpus)] * least)}"] if least else []
    yield f"{group.label} does not fit: it {group.why_not}. What would: {'; '.join(would) or 'a larger machine'}."


def _name(ref: ModelRef) -> str:
    return f"{ref.name} (stand-in)" if ref.stand_in_for else ref.name


def _device_name(device: int | str) -> str:
    return f"GPU {device}" if isinstance(device, int) else "memory"


def _sold(gpus: Sequence[float]) -> str:
    """ "4 GPUs of 80 GB and 2 of 40 GB"."""
    counts = [(len(list(same)), size) for size, same in itertools.groupby(gpus)]
    kinds = [f"{count} of {size / DECIMAL:g} GB" for count, size in counts]
    kinds[0] = kinds[0].replace(" of", " GPU of" if counts[0][0] == 1 else " GPUs of", 1)
    return " and ".join(kinds)


# --- showing ----------------------------------------------------------------------------------------------------------


def to_json(plan: Plan | Sequence[Suggestion]) -> str:
    """A whole plan, or suggestions, as JSON text; sizes are bytes."""
    if not isinstance(plan, Plan):
        return json.dumps([asdict(each) for each in plan], indent=2)
    fields = asdict(plan) | {"fits": plan.fits, "download_bytes": plan.download_bytes}
    for group, written in zip(plan.groups, fields["groups"], strict=True):
        for device, kept in zip(group.devices, written["devices"], strict=True):
            kept["held"] = device.held
    return json.dumps(fields, indent=2)


def draw(plan: Plan) -> Figure:
    """Memory of every device by part, against its limit: a panel for all that is in memory together."""
    from helpers import plots

    panels = {group.label: [asdict(device) for device in group.devices] for group in plan.groups}
    stand_ins = ", ".join(f"{name} stands in for {real}" for name, real in plan.stand_ins.items())
    return plots.memory_per_device(panels, f"{plan.machine}{'; ' if stand_ins else ''}{stand_ins}", fits=plan.fits)


def save_figure(plan: Plan, file: Path) -> None:
    """Write ``draw``'s figure as a PNG file. Raises WorkbookError for another kind of file, or where it cannot be."""
    from helpers import plots

    if file.suffix.lower() != ".png":
        raise WorkbookError(f"the figure is a PNG file: name it so, such as {file.with_suffix('.png')}")
    try:
        file.write_bytes(plots.png(draw(plan)))
    except OSError as error:
        raise WorkbookError(f"the figure cannot be written to {file}: {error.strerror}") from error


def tables(plan: Plan) -> Iterator[RenderableType]:
    """The plan in parts, for a terminal of 100 columns or more."""
    yield _heading(plan)
    yield _needs_table(plan)
    for group in plan.groups:
        yield _devices_table(group)
    yield _verdict(plan)
    yield _speed_table(plan)
    yield _storage_table(plan)
    if plan.budgets:
        yield _time_table(plan)
    if plan.article:
        yield _article_table(plan)


def suggestion_table(suggestions: Sequence[Suggestion], work: Work, model: str | None = None) -> RenderableType:
    """What runs a model (Falcon-180B), the least memory first."""
    numbers = ["GB in all", "tokens that fit", "library's cache"]
    table = _table(["precision", "GPUs"], numbers, ["such as"])
    for each in suggestions:
        precision = f"{each.precision}, double quant" if each.double_quant else each.precision
        cards = " or ".join(card.name for card in CARDS if card.gigabytes == each.gigabytes)
        fitting = (f"{tokens:,}" for tokens in (each.context_tokens, each.library_context_tokens))
        table.add_row(precision, f"{each.gpus} x {each.gigabytes} GB", f"{each.total_gigabytes:,}", *fitting, cards)
    sequences = f"each of {work.batch_size} sequences" if work.batch_size > 1 else "one sequence"
    return _section(
        f"What runs {model or FALCON_180B}, the least GPU memory first",
        table,
        f"Listed is what has room for {work.context_tokens or 2048} tokens of {sequences}. Looked at: "
        f"{_series(COUNTS)} GPUs of {_series(SIZES)} GB (1 GB = 1e9 bytes). fp16 needs what bf16 needs.",
        "Tokens that fit: what the memory allows. A model takes only as many as it was trained on (Falcon-180B: 2048); "
        "the rest is room for more sequences.",
        "The cache holds the key-value heads alone, as this workbook loads Falcon. Library's cache: the tokens that "
        "fit with transformers' own, which copies them to all query heads.",
    )


def _heading(plan: Plan) -> RenderableType:
    from rich.text import Text

    work = plan.work
    tokens = " or ".join(map(str, plan.contexts))
    sequences = f"{work.batch_size} conversations" if work.batch_size > 1 else "one conversation"
    kept = "; cache: as transformers itself keeps it" if work.cache_heads == "library" else ""
    double = "; nf4 with double quantization" if work.double_quant else ""
    sold = " A card sold as 80 GB is counted as 80e9 bytes = 74.5 GiB." if plan.on_gpus else ""
    lines = [
        f"Machine: {plan.machine}. Planned for {sequences} of {tokens} tokens{kept}{double}.",
        f"1 GiB = 2^30 bytes = 1.074 GB.{sold}",
    ]
    lines += [f"{name} is a stand-in for {real}." for name, real in plan.stand_ins.items()]
    return Text.assemble(("Plan: ", "bold"), (plan.title, "bold"), "\n", "\n".join(lines))


def _needs_table(plan: Plan) -> RenderableType:
    least = any(need.least_gpus is not None for need in plan.needs)
    numbers = ["weights", "KV cache", "activations", "sum"]
    table = _table(["model", "precision"], [*numbers, *(["GPUs"] if least else [])], ["fits"])
    for model, rows in itertools.groupby(plan.needs, key=lambda need: need.model):
        names = [f"or {name}" if index else name for index, name in enumerate(model.split(" or "))]
        for name, need in itertools.zip_longest(names, list(rows)):
            if need is None:
                table.add_row(name)
                continue
            sizes = [_gib(size) for size in (*need.parts.values(), need.total)]
            count = [str(need.least_gpus or "none")] if least else []
            lacking = need.why_not.partition(" over ")[0].removesuffix(" GiB")
            fits = "[green]yes[/]" if need.fits else f"[red]{lacking}[/]"
            table.add_row(name or "", need.precision, *sizes, *count, fits)
    notes = ["Activations: the peak while the prompt is read; every device needs that room."]
    if least:
        notes += ["GPUs: the least number of this size (of the largest here) that hold it in whole layers."]
    return _section("Memory to generate, by precision, each model alone (GiB)", table, *notes)


def _devices_table(group: Group) -> RenderableType:
    table = _table(["device"], [*map(_part_name, PARTS), "sum", "limit", "free"])
    for device in group.devices:
        free = device.limit - device.held
        parts = [_gib(getattr(device, part)) for part in PARTS]
        left = _gib(free) if free >= 0 else f"[red]{_gib(free)}[/]"
        table.add_row(device.name, *parts, _gib(device.held), _gib(device.limit), left)
    notes = [f"Reserved: {memory.RESERVED:.0%} of each device, for the CUDA context and fragments."]
    if group.devices[0].name == "memory":
        notes = [f"Reserved: {memory.RESERVED:.0%}, for other programs."]
    if len(group.models) > 1:
        notes += ["These are in memory together: their activations are added up."]
    return _section(f"Each device with {group.label} (GiB)", table, *notes)


def _verdict(plan: Plan) -> RenderableType:
    from rich.text import Text

    if plan.remedies:
        verdict = "\n".join(plan.remedies), "bold red"
    else:
        free = gib(_least_free(plan.groups))
        verdict = f"Every device is under its limit; the fullest has {free} free.", "bold green"
    return Text.assemble(verdict, *((f"\n{text}", "italic") for text in _of_notebooks(plan)))


def _of_notebooks(plan: Plan) -> Iterator[str]:
    """What the notebooks do that is more than what was planned for."""
    if not plan.questions:
        return
    lacking = [f"{group.label} {group.why_not}" for group in plan.questions if not group.fits]
    room = "; ".join(lacking) or f"the fullest device then has {gib(_least_free(plan.questions))} free"
    yield (
        f"Notebook 04 asks {QUESTIONS.batch_size} questions at once, each with its reply of at most "
        f"{QUESTIONS.context_tokens} tokens: {room}."
    )
    yield "Notebook 05 trains (QLoRA in nf4, several conversations at once): what that takes is not planned here."


def _least_free(groups: Sequence[Group]) -> int:
    return min(device.limit - device.held for group in groups for device in group.devices)


def _speed_table(plan: Plan) -> RenderableType:
    from rich.text import Text

    title = "Decoding: the most tokens/s that the memory's bandwidth allows"
    table = _table(["model", "card"], ["GB/s", "GiB read", "tokens/s"], ["bandwidth from"])
    if not plan.speeds:
        why = "a card of this size is not known here" if plan.fits else "what does not fit does not run"
        return Text.assemble((title, "bold"), f"\nNone to be given: {why}.")
    for model, rows in itertools.groupby(plan.speeds, key=lambda limit: limit.model):
        names = [f"or {name}" if index else name for index, name in enumerate(model.split(" or "))]
        for name, limit in itertools.zip_longest(names, list(rows)):
            if limit is None:
                table.add_row(name)
                continue
            sizes = (f"{limit.bandwidth / DECIMAL:,.0f}", _gib(limit.bytes_read), _rate(limit.tokens_per_second))
            table.add_row(name or "", limit.card, *sizes, limit.source)
    sequences = f"{plan.work.batch_size} tokens, one of each sequence," if plan.work.batch_size > 1 else "one token"
    notes = [f"A limit, not a forecast: for {sequences} all weights and the full cache are read once."]
    if plan.on_gpus:
        notes += [
            "Layers run one after the other, device by device: the bandwidth of one card counts, not the sum.",
            "Which card it will be is not known: all known here of that size are shown, assuming all are alike.",
        ]
    else:
        notes += ["A model that fits in the processor's cache may be faster."]
    return _section(title, table, *notes)


def _storage_table(plan: Plan) -> RenderableType:
    table = _table(["repository", "where"], ["GiB", "download", "load, s"])
    for each in plan.repositories:
        seconds = "not measured" if each.load_seconds is None else _rate(each.load_seconds)
        table.add_row(each.model, each.place, _gib(each.stored_bytes), _gib(each.download_bytes), seconds)
    here, total, notes = plan.here, plan.download_bytes, []
    if total:
        table.add_row("sum of the distinct repositories", "", "", _gib(total), "")
        notes += [f"Download: {_duration(total / GIGABIT)} at 1 Gbit/s."]
    notes += [
        f"Disk: {gib(plan.disk_needed)} needed, {gib(here.disk_free)} free in {here.disk_folder}; "
        f"{gib(plan.downloaded_bytes)} of the models are here already.",
        f"Load: to read the files from this machine's disk, {_disk_words(here)}. Quantizing takes longer.",
    ]
    return _section("Download, disk and load (GiB)", table, *notes)


def _disk_words(here: Here) -> str:
    if not here.disk:
        return f"not measured in {here.disk_folder}: {here.disk_problem}"
    how = "past the page cache" if here.disk.direct else "the page cache emptied of it"
    speed, size = here.disk.bytes_per_second / GIB, here.disk.read_bytes / 2**20
    return (
        f"{speed:.2f} GiB/s as measured just now on {size:.0f} MiB written to and read from {here.disk.folder}, {how}"
    )


def _time_table(plan: Plan) -> RenderableType:
    table = _table(["notebook"], ["expected", "budget", "budget of a cell"])
    for name, each in plan.budgets.items():
        expected = f"{each['expected']:,.0f}" if each["expected"] else "not measured"
        table.add_row(name, expected, f"{each['budget']:,.0f}", f"{each['cell']:,.0f}")
    return _section("Time of the notebooks (seconds)", table)


def _article_table(plan: Plan) -> RenderableType:
    numbers = ["its GB", "computed GB", "least 80 GB GPUs", "least 40 GB GPUs"]
    table = _table(["use", "article's machine"], numbers)
    for row in plan.article:
        counts = (str(row[f"least {size} GB GPUs"]) for size in (80, 40))
        sizes = (f"{row[name]:,}" for name in ("published GB", "estimate GB"))
        table.add_row(row["use"], row["published machine"], *sizes, *counts)
    return _section(
        "Falcon-180B: the machines of the article beside the least that do",
        table,
        "The article names machines that were tried, not the least. 1 GB = 1e9 bytes, as published.",
        "Computed: one sequence of 2048 tokens; training with gradient checkpointing, spread evenly as ZeRO-3 does.",
    )


def _table(texts: Sequence[str], numbers: Sequence[str], ends: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="underline")
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in ends:
        table.add_column(name)
    return table


def _section(title: str, table: Table, *notes: str) -> RenderableType:
    """A table under its title and above its notes, which take the whole width."""
    from rich.console import Group as Together
    from rich.text import Text

    return Together(Text(title, style="bold"), table, *(Text(note, style="italic") for note in notes))


def _gib(size: float) -> str:
    """GiB as a bare number: two decimals, four where it is small."""
    return "0" if not size else f"{size / GIB:,.{2 if abs(size) > GIB / 10 else 4}f}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _series(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _part_name(part: str) -> str:
    return part.replace("kv_", "KV ")
