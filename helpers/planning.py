"""What a machine needs to run the models of a profile, or any published one: nothing is loaded, nothing downloaded.

A ``Plan`` holds memory by precision, every device part by part, the limit of the decoding speed, the download, the disk
and the time to load; ``tables`` shows it, ``draw`` draws its devices, ``to_json`` keeps it. Sizes are bytes.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
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
    cache_heads: CacheHeads = "cached"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.context_tokens is not None and self.context_tokens < 1):
            raise WorkbookError("at least one sequence, and one token of context, is needed to plan for")


@dataclass(frozen=True)
class Here:
    """What was measured on this machine; ``disk`` is None, and ``disk_problem`` says why, where it could not be."""

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
    """The most tokens a second, of all sequences together, that the bandwidth of the memory allows."""

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
    """All that is planned; see the module."""

    title: str
    machine: str
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

    ``grouped_context_tokens``: with a cache of the key-value heads alone.
    """

    precision: str
    double_quant: bool
    gpus: int
    gigabytes: int
    total_gigabytes: int
    context_tokens: int
    grouped_context_tokens: int


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

    Raises WorkbookError that lists them.
    """
    for profile in map(profiles.load_profile, profiles.available()):
        for ref in profile.models.values():
            if ref.id == model_id and ref.source == "hub":
                return replace(ref, stand_in_for=None)
    known = memory.published_models()
    base = re.sub("-(chat|instruct)$", "", model_id)
    shape = next((name for name in (model_id, base, f"{base.removesuffix('-hf')}-chat-hf") if name in known), None)
    if shape is None:
        raise WorkbookError(f"there is no configuration of {model_id!r} here; choose one of {', '.join(known)}")
    family: Literal["falcon", "llama"] = "falcon" if "falcon" in shape else "llama"
    size = 2 * memory.count_parameters(memory.published_config(shape), tied=False)
    return ModelRef(model_id if base == shape else shape, family, "plain", download_bytes=size)


def measure(cpu: bool = False) -> Here:
    """Measure the disk under the cache of downloads and, for a plan without GPUs, the memory's bandwidth."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
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
    if precision is not None and precision not in PRECISIONS:
        raise WorkbookError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if profile and (model or gpus):
        raise WorkbookError("a profile names its own models and GPUs: give --profile, or --model and --gpus")
    if model or gpus:
        ref, sizes = published_ref(model or FALCON_180B), parse_gpus(gpus or "8x80")
        return plan_model(ref, sizes, measure(), work, precision or "bf16")
    chosen = profiles.load_profile(profile or profiles.SMALLEST)
    return plan_profile(chosen, measure(cpu=not chosen.requires.gpus), work, precision)


def suggested_for(profile: str | None, model: str | None, gpus: str | None) -> ModelRef:
    """The model that ``suggest`` is asked for. Raises WorkbookError where a profile or GPUs are given."""
    if profile or gpus:
        raise WorkbookError("--suggest looks at sets of GPUs of its own: give --model alone, or nothing")
    return published_ref(model or FALCON_180B)


# --- planning ---------------------------------------------------------------------------------------------------------


def plan_profile(profile: Profile, here: Here, work: Work | None = None, precision: str | None = None) -> Plan:
    """The plan of a profile on the least machine it asks for. Raises WorkbookError for an unknown precision."""
    need = profile.requires
    planned = _plan(
        f"profile {profile.name}: {profile.description}",
        profile.models,
        _Room((need.gpu_bytes,) * need.gpus, 0 if need.gpus else need.ram_bytes),
        resident=profile.resident,
        precision=precision or profile.precision,
        precisions=profile.precisions,
        work=work or Work(),
        here=here,
    )
    budgets = {
        name: {"expected": budget.expected_seconds, "budget": budget.seconds, "cell": budget.cell_seconds}
        for name, budget in profile.budgets.items()
    }
    downloaded = profiles.downloaded_bytes(profile)
    return replace(planned, budgets=budgets, downloaded_bytes=downloaded, disk_needed=need.disk_bytes)


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
    if precision is not None and precision not in PRECISIONS:
        raise WorkbookError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    work = work or Work()
    config = loading.config(ref)
    tokens, found = _context(config, work), []
    wanted = (precision,) if precision else ("fp32", "bf16", "int8", "nf4")
    choices = [(name, double) for name in wanted for double in ((False, True) if name == "nf4" else (False,))]
    for (name, double), count, size in itertools.product(choices, COUNTS, SIZES):
        how = {"batch_size": work.batch_size, "double_quant": double}
        gpus = [size * DECIMAL] * count
        fitting, grouped = (
            memory.largest_context(config, name, gpus, cache_heads=heads, **how) for heads in ("cached", "kv")
        )
        if (grouped if work.cache_heads == "kv" else fitting) >= tokens:
            found.append(Suggestion(name, double, count, size, count * size, fitting, grouped))
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
    configs = {role: loading.config(ref) for role, ref in models.items()}
    names = {role: _name(ref) for role, ref in models.items()}
    shapes = {" or ".join(names[role] for role in same): configs[same[0]] for same in _by_shape(configs)}
    groups = _distinct(
        [_group({names[role]: configs[role] for role in group}, precision, room, work) for group in resident]
    )
    needs = [_need(name, config, each, room, work) for name, config in shapes.items() for each in precisions]
    repositories = {ref.id: ref for ref in models.values()}
    is_180b = any(name.startswith(FALCON_180B) for name in repositories)
    return Plan(
        title=title,
        machine=room.words,
        work=work,
        contexts=tuple(sorted({_context(config, work) for config in configs.values()})),
        stand_ins={ref.name: ref.stand_in_for for ref in models.values() if ref.stand_in_for},
        needs=tuple(needs),
        groups=tuple(groups),
        speeds=tuple(
            limit
            for name, config in shapes.items()
            for limit in _speeds(name, config, precision, room, work=work, here=here)
        ),
        repositories=tuple(_repository(ref, here) for ref in repositories.values()),
        downloaded_bytes=0,
        disk_needed=sum(ref.download_bytes or 0 for ref in repositories.values()),
        here=here,
        remedies=tuple(_remedies(groups, needs, precision, room)),
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

    def place(self, config: PretrainedConfig, precision: str, work: Work) -> Placement:
        return memory.place(config, precision, self.gpus, cpu_bytes=self.ram, **_how(config, work))

    def parts(
        self, config: PretrainedConfig, precision: str, work: Work
    ) -> tuple[Placement, dict[Any, dict[str, int]]]:
        placed, how = self.place(config, precision, work), _how(config, work)
        del how["cache_heads"]
        return placed, memory.parts_by_device(config, precision, placed, **how)

    def less(self, used: Mapping[Any, Mapping[str, int]]) -> _Room:
        """What is left beside models that are in memory, so that the reserved share stays free as a whole."""
        taken = {device: sum(parts.values()) / (1 - memory.RESERVED) for device, parts in used.items()}
        gpus = tuple(max(size - taken[index], 1.0) for index, size in enumerate(self.gpus))
        return _Room(gpus, 0 if gpus else max(self.ram - taken["cpu"], 1.0))


def _need(name: str, config: PretrainedConfig, precision: str, room: _Room, work: Work) -> Need:
    how = _how(config, work)
    estimate, placed = memory.estimate(config, precision, **how), room.place(config, precision, work)
    parts = {part: size for part, size in estimate.parts.items() if part in PARTS}
    least = memory.least_gpus(config, precision, max(room.gpus), **how) if room.gpus else None
    return Need(name, precision, parts, estimate.total, placed.fits, placed.why_not, least)


def _group(models: Mapping[str, PretrainedConfig], precision: str, room: _Room, work: Work) -> Group:
    left, whys = room, []
    held: dict[Any, dict[str, int]] = {device: dict.fromkeys(PARTS, 0) for device in room.sizes}
    for config in models.values():
        placed, parts = left.parts(config, precision, work)
        whys += [placed.why_not] if placed.why_not else []
        for device, more in parts.items():
            for part, size in more.items():
                held[device][part] += size
        left = room.less(held)
    devices = tuple(
        Device(_device_name(device), round(size), **held[device] | {"reserved": round(size * memory.RESERVED)})
        for device, size in room.sizes.items()
    )
    return Group(tuple(models), precision, devices, not whys, "; ".join(whys))


def _speeds(
    name: str, config: PretrainedConfig, precision: str, room: _Room, *, work: Work, here: Here
) -> Iterator[SpeedLimit]:
    """For every kind of card that the devices may be: layers run one after the other, each at its card's bandwidth."""
    placed, parts = room.parts(config, precision, work)
    if not placed.fits:
        return
    shape = memory.anatomy(config)
    read = {device: part["weights"] + part["kv_cache"] for device, part in parts.items()}
    if not shape.tied:  # of the embeddings one row is looked up; a tied matrix is read as the head
        read[placed.device_map[shape.embeddings_name]] -= shape.embeddings * (4 if precision == "fp32" else 2)
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


def _remedies(groups: Iterable[Group], needs: Sequence[Need], precision: str, room: _Room) -> Iterator[str]:
    """A sentence for each group that has no room: by how much, and what would."""
    for group in groups:
        if group.fits:
            continue
        own = [need for need in needs if any(name in need.model.split(" or ") for name in group.models)]
        fitting = [
            each
            for each in dict.fromkeys(need.precision for need in own)
            if all(need.fits for need in own if need.precision == each)
        ]
        would = [f"{' or '.join(fitting)} on {room.words}"] if fitting else []
        least = max((need.least_gpus or 0 for need in own if need.precision == precision), default=0)
        if least:
            would.append(f"{precision} on {_sold([max(room.gpus)] * least)}")
        yield f"{group.label} does not fit: it {group.why_not}. What would: {'; '.join(would) or 'a larger machine'}."


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """Groups of equal shape become one, named "A or B"."""
    found: dict[tuple[Device, ...], Group] = {}
    for group in groups:
        same = found.get(group.devices)
        if same and len(same.models) == len(group.models):
            names = tuple(a if a == b else f"{a} or {b}" for a, b in zip(same.models, group.models, strict=True))
            found[group.devices] = replace(same, models=names)
        else:
            found[group.devices] = group
    return list(found.values())


def _by_shape(configs: Mapping[str, PretrainedConfig]) -> list[list[str]]:
    """Roles whose models have the same shape."""
    shapes: dict[Any, list[str]] = {}
    for role, config in configs.items():
        shapes.setdefault((memory.anatomy(config), _context(config, Work())), []).append(role)
    return list(shapes.values())


def _how(config: PretrainedConfig, work: Work) -> dict[str, Any]:
    """What ``memory`` is to count."""
    return asdict(work) | {"context_tokens": _context(config, work)}


def _context(config: PretrainedConfig, work: Work) -> int:
    return work.context_tokens or min(2048, getattr(config, "max_position_embeddings", None) or 2048)


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
    numbers = ["GB in all", "tokens that fit", "grouped cache"]
    table = _table(["precision", "GPUs"], numbers, ["such as"])
    for each in suggestions:
        precision = f"{each.precision}, double quant" if each.double_quant else each.precision
        cards = " or ".join(card.name for card in CARDS if card.gigabytes == each.gigabytes)
        fitting = (f"{tokens:,}" for tokens in (each.context_tokens, each.grouped_context_tokens))
        table.add_row(precision, f"{each.gpus} x {each.gigabytes} GB", f"{each.total_gigabytes:,}", *fitting, cards)
    sequences = f"each of {work.batch_size} sequences" if work.batch_size > 1 else "one sequence"
    return _section(
        f"What runs {model or FALCON_180B}, the least GPU memory first",
        table,
        f"Listed is what has room for {work.context_tokens or 2048} tokens of {sequences}. Looked at: "
        f"{_series(COUNTS)} GPUs of {_series(SIZES)} GB (1 GB = 1e9 bytes). fp16 needs what bf16 needs.",
        "Tokens that fit: what the memory allows. A model takes only as many as it was trained on (Falcon-180B: 2048); "
        "the rest is room for more sequences.",
        "Grouped cache: tokens that fit where the key-value heads alone are kept, as vLLM and llama.cpp do; "
        "transformers keeps all heads of Falcon.",
    )


def _heading(plan: Plan) -> RenderableType:
    from rich.text import Text

    work = plan.work
    tokens = " or ".join(map(str, plan.contexts))
    sequences = f"{work.batch_size} conversations" if work.batch_size > 1 else "one conversation"
    kept = "; cache: key-value heads alone" if work.cache_heads == "kv" else ""
    double = "; nf4 with double quantization" if work.double_quant else ""
    sold = " A card sold as 80 GB is counted as 80e9 bytes = 74.5 GiB." if plan.here.memory_bandwidth is None else ""
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
        return Text("\n".join(plan.remedies), style="bold red")
    fullest = min(device.limit - device.held for group in plan.groups for device in group.devices)
    return Text(f"Every device is under its limit; the fullest has {gib(fullest)} free.", style="bold green")


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
    if plan.here.memory_bandwidth is None:
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
