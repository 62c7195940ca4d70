"""What a machine needs to run the models of a profile, or any published one: nothing is loaded, nothing downloaded.

A ``Plan`` holds memory by precision, every device part by part, the limit of the decoding speed, the download, the disk
and the time to load; ``tables`` shows it, ``draw`` draws its devices, ``to_json`` keeps it. Sizes are bytes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from helpers import hardware, loading, memory, profiles
from helpers.memory import Devices, Resident, Workload
from helpers.types import (
    GIB,
    PRECISIONS,
    ModelRef,
    Placement,
    Profile,
    Shortfall,
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
AS_MANY_AS_FIT = Workload(context_tokens=None)  # one sequence of 2048 tokens, or of the model's own limit
# What notebook 04 asks at once; no question with its reply has more tokens, since a token is a byte of text or more.
QUESTIONS = Workload(batch_size=56, context_tokens=144)


# --- cards ------------------------------------------------------------------------------------------------------------


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


def sold_as(gpus: Sequence[float]) -> str:
    """GPUs of these bytes in words, by their decimal size: "4 GPUs of 80 GB and 2 of 40 GB"."""
    kinds: list[str] = []
    for size, same in itertools.groupby(gpus):
        count = len(list(same))
        number = str(count)
        if not kinds:  # the noun stands once
            number += " GPU" if count == 1 else " GPUs"
        kinds.append(f"{number} of {size / DECIMAL:g} GB")
    return " and ".join(kinds)


# --- a plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Here:
    """What was measured on this machine: ``disk_free`` in bytes, ``memory_bandwidth`` in bytes a second.

    ``disk`` is None, and ``disk_problem`` says why, if it could not be measured; the bandwidth is None unless a plan
    without GPUs asked for it.
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
    shortfall: Shortfall | None
    least_gpus: int | None

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.shortfall is None


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
        return self.weights + self.kv_cache + self.activations + self.reserved

    @property
    def free(self) -> int:
        """What is left; negative if the device holds too much."""
        return self.limit - self.held


@dataclass(frozen=True)
class Group:
    """Models that are in memory at the same time (``models``), or one after the other in equal shape (``or``).

    ``shortfalls``: one for each of the models that does not fit beside those before it.
    """

    models: tuple[str, ...]
    precision: str
    devices: tuple[Device, ...]
    shortfalls: tuple[Shortfall, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not self.shortfalls

    @property
    def why_not(self) -> str:
        """What is missing, in words; empty if the models fit."""
        return "; ".join(map(str, self.shortfalls))

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

    ``on_gpus``: False if all is in host memory. ``contexts``: the tokens of one sequence, each number that a model
    is planned for. ``questions``: the groups with ``QUESTIONS`` in place of ``work``; empty for a plan of no profile.
    ``budgets``: seconds by notebook ("expected", "budget", and "cell" for each cell).
    """

    title: str
    machine: str
    on_gpus: bool
    work: Workload
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
    article: tuple[dict[Hashable, Any], ...] = ()

    @property
    def download_bytes(self) -> int:
        """The sum of the distinct repositories."""
        return sum(repository.download_bytes for repository in self.repositories)

    @property
    def fits(self) -> bool:
        """Whether all models that are in memory at the same time fit on the devices."""
        return all(group.fits for group in self.groups)


# --- what is asked for ------------------------------------------------------------------------------------------------


def parse_gpus(text: str) -> tuple[float, ...]:
    """The bytes of each GPU: "8x80" is eight of 80 GB (80e9 bytes), "4x80,2x40" two kinds. Raises WorkbookError."""
    sizes: list[float] = []
    for part in text.split(","):
        kind = re.fullmatch(r"\s*(\d{1,4})x(\d{1,4}(?:\.\d+)?)\s*(?:gb)?\s*", part, re.IGNORECASE)
        if not kind or not int(kind[1]) or not float(kind[2]):
            raise WorkbookError(
                f"--gpus {text!r} is not valid. Write number x GB of each, such as 8x80, or 4x80,2x40 for two kinds."
            )
        sizes += [float(kind[2]) * DECIMAL] * int(kind[1])
    if len(sizes) > MOST_GPUS:
        raise WorkbookError(f"--gpus {text!r} names {len(sizes)} GPUs. Give at most {MOST_GPUS}.")
    return tuple(sizes)


def published_ref(model_id: str) -> ModelRef:
    """A model by its id, if its configuration is known here: published ones and their chat or base sisters.

    Its id stays the one asked for; its size is that of its sister. Raises WorkbookError that lists the known ones.
    """
    for name in profiles.available():
        for ref in profiles.load_profile(name).models.values():
            if ref.id == model_id and ref.source == "hub":
                return replace(ref, stand_in_for=None)
    shape = _published_shape(model_id) or choose(model_id, memory.published_models(), "published configuration of")
    family: Literal["falcon", "llama"] = "falcon" if "falcon" in shape else "llama"
    # The hub's files are in 16 bit, and hold the head even if it is tied to the embeddings.
    size = 2 * memory.count_parameters(memory.published_config(shape), tied=False)
    return ModelRef(model_id, family, "plain", download_bytes=size)


def config_of(ref: ModelRef) -> PretrainedConfig:
    """A model's configuration: its own, or that of a published sister of the same shape; nothing is downloaded."""
    if ref.source == "hub":
        shape = _published_shape(ref.id)
        if shape:
            return memory.published_config(shape)
    return loading.config(ref)


def _published_shape(model_id: str) -> str | None:
    """The published model, itself or its base or chat sister, that has a model's configuration; None without one."""
    base = re.sub("-(chat|instruct)$", "", model_id)
    for name in (model_id, base, f"{base.removesuffix('-hf')}-chat-hf"):
        if name in memory.published_models():
            return name
    return None


def measure(cpu: bool = False) -> Here:
    """Measure the disk under the cache of downloads and, for a plan without GPUs, the memory's bandwidth."""
    cache = hardware.download_folder()
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    free = hardware.disk_free(cache)  # before the measurement writes its file
    bandwidth = hardware.memory_bandwidth(2**27) if cpu else None
    try:
        return Here(str(folder), free, hardware.disk_read_speed(folder, 2**27), memory_bandwidth=bandwidth)
    except OSError as error:
        return Here(str(folder), free, None, error.strerror or str(error), bandwidth)


def check_request(work: Workload, precision: str | None) -> None:
    """Raise WorkbookError for less than one sequence or token, and for an unknown precision."""
    if work.batch_size < 1 or (work.context_tokens is not None and work.context_tokens < 1):
        raise WorkbookError("There is nothing to plan for. Give at least one sequence and one token of context.")
    if precision is not None:
        memory.element_bytes(precision)  # raises for an unknown one


# --- planning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Residents:
    """Models that are in memory at the same time; a name is "A or B" if two of one shape take turns."""

    names: tuple[str, ...]
    configs: tuple[PretrainedConfig, ...]

    def in_precision(self, precision: str) -> list[Resident]:
        pairs = zip(self.configs, self.names, strict=True)
        return [Resident(config, precision, name) for config, name in pairs]


@dataclass(frozen=True)
class _Request:
    """What is to be planned: models by role, the roles in memory together, and the devices for them.

    ``precision`` is the one that is used; ``precisions`` are all those that the plan compares.
    """

    title: str
    models: Mapping[str, ModelRef]
    resident: Sequence[Sequence[str]]
    devices: Devices
    precision: str
    precisions: tuple[str, ...]
    work: Workload

    @property
    def machine(self) -> str:
        """The devices in words."""
        if self.devices.gpus:
            return sold_as(self.devices.gpus)
        return f"{gib(self.devices.cpu_bytes)} of memory, no GPU"

    def alone(self) -> list[_Residents]:
        """Every model by itself; those of one shape only once."""
        return _residents(self.models, [(role,) for role in self.models])

    def together(self) -> list[_Residents]:
        """The models that are in memory at the same time."""
        return _residents(self.models, self.resident)


def make(
    profile: str | None = None,
    model: str | None = None,
    gpus: str | None = None,
    precision: str | None = None,
    work: Workload = AS_MANY_AS_FIT,
) -> Plan:
    """The plan of a profile, or of a model (Falcon-180B) on GPUs (8x80), measuring this machine.

    Raises WorkbookError for unknown names, and for arguments that do not go together.
    """
    check_request(work, precision)
    if profile and (model or gpus):
        raise WorkbookError("A profile names its own models and GPUs. Give --profile, or --model and --gpus.")
    if model or gpus:
        ref, sizes = published_ref(model or FALCON_180B), parse_gpus(gpus or "8x80")
        return plan_model(ref, sizes, measure(), work, precision or "bf16")
    chosen = profiles.load_profile(profile or profiles.SMALLEST)
    return plan_profile(chosen, measure(cpu=not chosen.requires.gpus), work, precision)


def plan_profile(profile: Profile, here: Here, work: Workload = AS_MANY_AS_FIT, precision: str | None = None) -> Plan:
    """The plan of a profile on the least machine it asks for.

    Raises WorkbookError for an unknown precision, and for less than one sequence or token.
    """
    check_request(work, precision)
    need = profile.requires
    request = _Request(
        f"profile {profile.name}: {profile.description}",
        profile.models,
        profile.resident,
        Devices((need.gpu_bytes,) * need.gpus, 0 if need.gpus else need.ram_bytes),
        precision or profile.precision,
        profile.precisions,
        work,
    )
    asked = replace(work, batch_size=QUESTIONS.batch_size, context_tokens=QUESTIONS.context_tokens)
    questions = [_group(residents, replace(request, work=asked)) for residents in request.together()]
    budgets: dict[str, dict[str, float | None]] = {}
    for name, budget in profile.budgets.items():
        budgets[name] = {"expected": budget.expected_seconds, "budget": budget.seconds, "cell": budget.cell_seconds}
    return replace(
        _plan(request, here),
        questions=tuple(questions),
        budgets=budgets,
        downloaded_bytes=profiles.downloaded_bytes(profile),
        disk_needed=need.disk_bytes,
    )


def plan_model(
    ref: ModelRef, gpus: Sequence[float], here: Here, work: Workload = AS_MANY_AS_FIT, precision: str = "bf16"
) -> Plan:
    """The plan of one model on GPUs of these bytes.

    Raises WorkbookError for an unknown precision, and for less than one sequence or token.
    """
    check_request(work, precision)
    # fp16 needs what bf16 needs, so it is compared only if it is asked for.
    compared = dict.fromkeys((*(name for name in PRECISIONS if name != "fp16"), precision))
    title = f"{ref.id} in {precision} on {sold_as(gpus)}"
    devices = Devices(tuple(gpus))
    return _plan(_Request(title, {"model": ref}, [["model"]], devices, precision, tuple(compared), work), here)


def _plan(request: _Request, here: Here) -> Plan:
    """Every model alone in each precision, then all that are in memory together; the article's table for 180B."""
    needs, speeds, contexts = list[Need](), list[SpeedLimit](), set[int]()
    for residents in request.alone():
        (name,), (config,) = residents.names, residents.configs
        contexts.add(request.work.tokens_for(config))
        needs += [_need(name, config, precision, request) for precision in request.precisions]
        speeds += _speeds(residents, request, here)
    groups = [_group(residents, request) for residents in request.together()]
    # Roles that share a model share its download.
    repositories = {ref.id: ref for ref in request.models.values()}
    article: tuple[dict[Hashable, Any], ...] = ()
    if any(name.startswith(FALCON_180B) for name in repositories):
        article = tuple(memory.hardware_claims().to_dict("records"))
    return Plan(
        title=request.title,
        machine=request.machine,
        on_gpus=bool(request.devices.gpus),
        work=request.work,
        contexts=tuple(sorted(contexts)),
        stand_ins={ref.name: ref.stand_in_for for ref in request.models.values() if ref.stand_in_for},
        needs=tuple(needs),
        groups=tuple(groups),
        speeds=tuple(speeds),
        repositories=tuple(_repository(ref, here) for ref in repositories.values()),
        downloaded_bytes=0,
        disk_needed=sum(ref.download_bytes or 0 for ref in repositories.values()),
        here=here,
        remedies=tuple(_remedies(groups, request)),
        article=article,
    )


def _residents(models: Mapping[str, ModelRef], groups: Sequence[Sequence[str]]) -> list[_Residents]:
    """Groups of roles as what is in memory together; groups of equal shapes become one."""
    configs = {role: config_of(ref) for role, ref in models.items()}
    # A model of the same shape, planned for the same context, needs the same bytes: one table is enough for both.
    same_shape: dict[tuple[tuple[memory.Anatomy, int], ...], list[Sequence[str]]] = {}
    for group in groups:
        shapes: list[tuple[memory.Anatomy, int]] = []
        for role in group:
            shapes.append((memory.anatomy(configs[role]), AS_MANY_AS_FIT.tokens_for(configs[role])))
        same_shape.setdefault(tuple(shapes), []).append(group)
    residents: list[_Residents] = []
    for alike in same_shape.values():
        names: list[str] = []
        for taking_turns in zip(*alike, strict=True):
            names.append(" or ".join(dict.fromkeys(_name(models[role]) for role in taking_turns)))
        residents.append(_Residents(tuple(names), tuple(configs[role] for role in alike[0])))
    return residents


def _need(name: str, config: PretrainedConfig, precision: str, request: _Request) -> Need:
    estimate = memory.estimate(config, precision, workload=request.work)
    # A plan is for inference: it has no gradients and no optimizer.
    parts = {"weights": estimate.weights, "kv_cache": estimate.kv_cache, "activations": estimate.activations}
    model = Resident(config, precision, name)
    (placement,) = memory.place_together([model], request.devices, request.work)
    least = None
    if request.devices.gpus:
        least = memory.least_gpus([model], max(request.devices.gpus), request.work)
    return Need(name, precision, parts, estimate.total, placement.shortfall, least)


def _group(residents: _Residents, request: _Request) -> Group:
    models = residents.in_precision(request.precision)
    placements = memory.place_together(models, request.devices, request.work)
    totals: dict[memory.Device, dict[str, int]] = {}
    for model, placement in zip(models, placements, strict=True):
        for device, parts in _parts(model, placement, request).items():
            total = totals.setdefault(device, dict.fromkeys(parts, 0))
            for part, held in parts.items():
                total[part] += held
    sizes: dict[memory.Device, float] = dict(enumerate(request.devices.gpus)) or {"cpu": request.devices.cpu_bytes}
    devices: list[Device] = []
    for device, size in sizes.items():
        parts, reserved = totals[device], round(size * memory.RESERVED)
        name, limit = _device_name(device), round(size)
        devices.append(Device(name, limit, parts["weights"], parts["kv_cache"], parts["activations"], reserved))
    shortfalls = [placement.shortfall for placement in placements if placement.shortfall]
    return Group(residents.names, request.precision, tuple(devices), tuple(shortfalls))


def _parts(model: Resident, placement: Placement, request: _Request) -> dict[memory.Device, dict[str, int]]:
    return memory.parts_by_device(model.config, model.precision, placement, workload=request.work)


def _speeds(residents: _Residents, request: _Request, here: Here) -> Iterator[SpeedLimit]:
    """For every kind of card that the devices may be: layers run one after the other, each at its card's bandwidth."""
    (model,) = residents.in_precision(request.precision)
    (placement,) = memory.place_together([model], request.devices, request.work)
    if not placement.fits:
        return
    read: dict[memory.Device, int] = {}
    for device, parts in _parts(model, placement, request).items():
        read[device] = parts["weights"] + parts["kv_cache"]
    shape = memory.anatomy(model.config)
    if not shape.tied:
        # Of the embeddings one row is looked up for each token; a tied matrix is read in full, as the head.
        holder = placement.device_map[shape.names.embeddings]
        read[holder] -= shape.embeddings * memory.element_bytes(model.precision)
    total = sum(read.values())
    for cards, bandwidth in _bandwidths(request.devices, here):
        seconds = sum(size / bandwidth[device] for device, size in read.items())
        label = " + ".join(card.name for card in cards)
        source = "; ".join(dict.fromkeys(card.source for card in cards))
        tokens_per_second = request.work.batch_size / seconds
        yield SpeedLimit(model.name, model.precision, label, total / seconds, total, tokens_per_second, source)


def _bandwidths(devices: Devices, here: Here) -> Iterator[tuple[Sequence[Card], dict[memory.Device, float]]]:
    """The cards that the devices may be, a kind for each size, with the bandwidth of each device."""
    if not devices.gpus:
        if here.memory_bandwidth:
            yield [Card("this machine", 0, 0, "measured here by copying")], {"cpu": here.memory_bandwidth}
        return
    sizes = list(dict.fromkeys(devices.gpus))
    choices: list[list[Card]] = []
    for size in sizes:
        choices.append([card for card in CARDS if card.gigabytes == round(size / DECIMAL)])
    # Nobody said which card has that size, so every combination of known ones is shown.
    for cards in itertools.product(*choices):
        card_of = dict(zip(sizes, cards, strict=True))
        yield cards, {device: card_of[size].bandwidth for device, size in enumerate(devices.gpus)}


def _repository(ref: ModelRef, here: Here) -> Repository:
    stored = ref.download_bytes or 0
    if ref.source != "hub":  # its files are here: no need to trust a number in a profile
        stored = sum(file.stat().st_size for file in loading.resolve(ref).glob("*.safetensors"))
    seconds = stored / here.disk.bytes_per_second if here.disk else None
    return Repository(ref.id, profiles.LIVES[ref.source], stored, ref.download_bytes or 0, seconds)


def _remedies(groups: Sequence[Group], request: _Request) -> Iterator[str]:
    """A sentence for models in memory together that do not fit: what is missing, and what would hold them all."""
    for residents, group in zip(request.together(), groups, strict=True):
        if group.fits:
            continue
        would: list[str] = []
        smaller: list[str] = []
        for precision in request.precisions:
            if _group(residents, replace(request, precision=precision)).fits:
                smaller.append(precision)
        if smaller:
            would.append(f"{' or '.join(smaller)} on {request.machine}")
        if request.devices.gpus:
            # More of the largest kind of these GPUs, for all the models together.
            gpu = max(request.devices.gpus)
            least = memory.least_gpus(residents.in_precision(group.precision), gpu, request.work)
            if least:
                would.append(f"{group.precision} on {sold_as([gpu] * least)}")
        options = "; ".join(would) or "a larger machine"
        yield f"{group.label} does not fit: it {group.why_not}. What would fit: {options}."


def _name(ref: ModelRef) -> str:
    return f"{ref.name} (stand-in)" if ref.stand_in_for else ref.name


def _device_name(device: memory.Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else "memory"


# --- suggestions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suggestion:
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
    return published_ref(model or FALCON_180B)


def suggest(ref: ModelRef, work: Workload = AS_MANY_AS_FIT, precision: str | None = None) -> list[Suggestion]:
    """Every precision and set of equal GPUs (``COUNTS`` of ``SIZES``) that runs a model, the least memory first.

    ``precision``: only this one. Raises WorkbookError for an unknown one, and for less than one sequence or token.
    """
    check_request(work, precision)
    config = config_of(ref)
    precisions = (precision,) if precision else ("fp32", "bf16", "int8", "nf4")
    suggestions: list[Suggestion] = []
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
    return sorted(suggestions, key=lambda suggestion: (suggestion.total_gigabytes, suggestion.gpus))


def _suggestion(config: PretrainedConfig, precision: str, count: int, size: int, work: Workload) -> Suggestion:
    gpus = [size * DECIMAL] * count
    kv_heads = memory.largest_context(config, precision, gpus, replace(work, cache_heads="kv"))
    library = memory.largest_context(config, precision, gpus, replace(work, cache_heads="library"))
    return Suggestion(precision, work.double_quant, count, size, count * size, kv_heads, library)


# --- showing ----------------------------------------------------------------------------------------------------------

Row = TypeVar("Row", Need, SpeedLimit)


def to_json(plan: Plan | Sequence[Suggestion]) -> str:
    """A whole plan, or suggestions, as JSON text; sizes are bytes."""
    if not isinstance(plan, Plan):
        return json.dumps([asdict(suggestion) for suggestion in plan], indent=2)
    fields = asdict(plan) | {"fits": plan.fits, "download_bytes": plan.download_bytes}
    for need, written in zip(plan.needs, fields["needs"], strict=True):
        written |= {"fits": need.fits, "why_not": str(need.shortfall or "")}
    groups = [*plan.groups, *plan.questions]
    for group, written in zip(groups, [*fields["groups"], *fields["questions"]], strict=True):
        written |= {"fits": group.fits, "why_not": group.why_not}
        for device, kept in zip(group.devices, written["devices"], strict=True):
            kept["held"] = device.held
    return json.dumps(fields, indent=2)


def draw(plan: Plan) -> Figure:
    """Memory of every device by part, against its limit: a panel for all that is in memory together."""
    from helpers.figures.memory import memory_per_device

    panels: dict[str, list[dict[str, int | str]]] = {}
    for group in plan.groups:
        panels[group.label] = [asdict(device) for device in group.devices]
    notes = [f"{name} stands in for {real}" for name, real in plan.stand_ins.items()]
    subject = "; ".join(filter(None, [plan.machine, ", ".join(notes)]))
    return memory_per_device(panels, subject, fits=plan.fits)


def save_figure(plan: Plan, file: Path) -> None:
    """Write ``draw``'s figure as a PNG file. Raises WorkbookError for another kind of file, or if writing fails."""
    from helpers.figures.style import png

    if file.suffix.lower() != ".png":
        name = file.with_suffix(".png")
        raise WorkbookError(f"The figure is a PNG file, and {file} is not named like one. Name it {name}.")
    try:
        file.write_bytes(png(draw(plan)))
    except OSError as error:
        raise WorkbookError(
            f"The figure cannot be written to {file}: {error.strerror}. Name a file in a folder you can write to."
        ) from error


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


def suggestion_table(suggestions: Sequence[Suggestion], work: Workload, model: str | None = None) -> RenderableType:
    """What runs a model (Falcon-180B), the least memory first."""
    numbers = ["GB in all", "tokens that fit", "library's cache"]
    table = _table(["precision", "GPUs"], numbers, ["such as"])
    for suggestion in suggestions:
        double = ", double quant" if suggestion.double_quant else ""
        cards = [card.name for card in CARDS if card.gigabytes == suggestion.gigabytes]
        table.add_row(
            f"{suggestion.precision}{double}",
            f"{suggestion.gpus} x {suggestion.gigabytes} GB",
            f"{suggestion.total_gigabytes:,}",
            f"{suggestion.context_tokens:,}",
            f"{suggestion.library_context_tokens:,}",
            " or ".join(cards),
        )
    sequences = f"{work.batch_size} sequences" if work.batch_size > 1 else "one sequence"
    return _section(
        f"What runs {model or FALCON_180B}, the least GPU memory first",
        table,
        f"Combinations that fit {sequences} of {work.context_tokens or memory.CONTEXT} tokens, among "
        f"{_series(COUNTS)} GPUs of {_series(SIZES)} GB (1 GB = 1e9 bytes). fp16 needs what bf16 needs.",
        "Tokens that fit: what the memory allows. A model takes only as many as it was trained on (Falcon-180B: 2048); "
        "the remaining memory can hold more sequences.",
        "The cache holds only the key-value heads, as this workbook loads Falcon. Library's cache: the tokens that "
        "fit with transformers' own, which copies them to all query heads.",
    )


def _heading(plan: Plan) -> RenderableType:
    from rich.text import Text

    work = plan.work
    conversations = f"{work.batch_size} conversations" if work.batch_size > 1 else "one conversation"
    planned = f"{conversations} of {' or '.join(map(str, plan.contexts))} tokens"
    if work.cache_heads == "library":
        planned += "; cache: as transformers itself keeps it"
    if work.double_quant:
        planned += "; nf4 with double quantization"
    units = "1 GiB = 2^30 bytes = 1.074 GB."
    if plan.on_gpus:
        units += " A card sold as 80 GB is counted as 80e9 bytes = 74.5 GiB."
    lines = [f"Machine: {plan.machine}. Planned for {planned}.", units]
    for name, real in plan.stand_ins.items():
        lines.append(f"{name} is a stand-in for {real}.")
    return Text.assemble(("Plan: ", "bold"), (plan.title, "bold"), "\n", "\n".join(lines))


def _needs_table(plan: Plan) -> RenderableType:
    count_gpus = any(need.least_gpus is not None for need in plan.needs)
    numbers = ["weights", "KV cache", "activations", "sum"]
    if count_gpus:
        numbers.append("GPUs")
    table = _table(["model", "precision"], numbers, ["fits"])
    for name, need in _by_model(plan.needs):
        if need is None:
            table.add_row(name)
            continue
        cells = [_gib(size) for size in (*need.parts.values(), need.total)]
        if count_gpus:
            cells.append(str(need.least_gpus or "none"))
        fits = "[green]yes[/]"
        if need.shortfall:
            fits = f"[red]{need.shortfall.bytes / GIB:.1f} missing[/]"
        table.add_row(name, need.precision, *cells, fits)
    notes = ["Activations: the peak while the prompt is read; every device needs these bytes."]
    if count_gpus:
        notes.append("GPUs: the least number of this size (of the largest here) that hold it in whole layers.")
    return _section("Memory to generate, by precision, each model alone (GiB)", table, *notes)


def _by_model(rows: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """Rows with what stands in their first column: "A or B" takes two lines, the names of one model no more."""
    for model, same in itertools.groupby(rows, key=lambda row: row.model):
        first, *others = model.split(" or ")
        names = [first, *(f"or {name}" for name in others)]
        for name, row in itertools.zip_longest(names, same):
            yield name or "", row


def _devices_table(group: Group) -> RenderableType:
    table = _table(["device"], [*map(_part_name, PARTS), "sum", "limit", "free"])
    for device in group.devices:
        parts = [_gib(size) for size in (device.weights, device.kv_cache, device.activations, device.reserved)]
        free = _gib(device.free)
        if device.free < 0:
            free = f"[red]{free}[/]"
        table.add_row(device.name, *parts, _gib(device.held), _gib(device.limit), free)
    notes = [f"Reserved: {memory.RESERVED:.0%} of each device, for the CUDA context and fragments."]
    if group.devices[0].name == "memory":
        notes = [f"Reserved: {memory.RESERVED:.0%}, for other programs."]
    if len(group.models) > 1:
        notes.append("These are in memory together: their activations are added up.")
    return _section(f"Each device with {group.label} (GiB)", table, *notes)


def _verdict(plan: Plan) -> RenderableType:
    from rich.text import Text

    free = gib(_least_free(plan.groups))
    verdict, style = f"Every device is under its limit; the fullest has {free} free.", "bold green"
    if plan.remedies:
        verdict, style = "\n".join(plan.remedies), "bold red"
    text = Text(verdict, style)
    for sentence in _of_notebooks(plan):
        text.append(f"\n{sentence}", "italic")
    return text


def _of_notebooks(plan: Plan) -> Iterator[str]:
    """What the notebooks do that is more than what was planned for."""
    if not plan.questions:
        return
    answer = f"the fullest device then has {gib(_least_free(plan.questions))} free"
    missing = [f"{group.label} {group.why_not}" for group in plan.questions if not group.fits]
    if missing:
        answer = "; ".join(missing)
    yield (
        f"Notebook 04 asks {QUESTIONS.batch_size} questions at once, each with its reply of at most "
        f"{QUESTIONS.context_tokens} tokens: {answer}."
    )
    yield "Notebook 05 trains (QLoRA in nf4, several conversations at once): this plan does not cover training."


def _least_free(groups: Sequence[Group]) -> int:
    free: list[int] = []
    for group in groups:
        free += [device.free for device in group.devices]
    return min(free)


def _speed_table(plan: Plan) -> RenderableType:
    from rich.text import Text

    title = "Decoding: the most tokens/s that the memory's bandwidth allows"
    table = _table(["model", "card"], ["GB/s", "GiB read", "tokens/s"], ["bandwidth from"])
    if not plan.speeds:
        why = "the bandwidth of a card of this size is not known here" if plan.fits else "the models do not fit"
        return Text.assemble((title, "bold"), f"\nNo estimate: {why}.")
    for name, limit in _by_model(plan.speeds):
        if limit is None:
            table.add_row(name)
            continue
        bandwidth = f"{limit.bandwidth / DECIMAL:,.0f}"
        table.add_row(name, limit.card, bandwidth, _gib(limit.bytes_read), _rate(limit.tokens_per_second), limit.source)
    sequences = f"{plan.work.batch_size} tokens, one of each sequence," if plan.work.batch_size > 1 else "one token"
    notes = [f"A limit, not a forecast: for {sequences} all weights and the full cache are read once."]
    if plan.on_gpus:
        notes += [
            "Layers run one after the other, device by device: the bandwidth of one card counts, not the sum.",
            "The card model is unknown; all known cards of this size are shown, assuming all are alike.",
        ]
    else:
        notes.append("A model that fits in the CPU's cache may be faster.")
    return _section(title, table, *notes)


def _storage_table(plan: Plan) -> RenderableType:
    table = _table(["repository", "where"], ["GiB", "download", "load, s"])
    for repository in plan.repositories:
        seconds = "not measured" if repository.load_seconds is None else _rate(repository.load_seconds)
        sizes = (_gib(repository.stored_bytes), _gib(repository.download_bytes))
        table.add_row(repository.model, repository.place, *sizes, seconds)
    here, total, notes = plan.here, plan.download_bytes, []
    if total:
        table.add_row("sum of the distinct repositories", "", "", _gib(total), "")
        notes.append(f"Download: {_duration(total / GIGABIT)} at 1 Gbit/s.")
    notes += [
        f"Disk: {gib(plan.disk_needed)} needed, {gib(here.disk_free)} free in {here.disk_folder}; "
        f"{gib(plan.downloaded_bytes)} of the models are here already.",
        f"Load: to read the files from this machine's disk, {_disk_words(here)}. Quantizing takes longer.",
    ]
    return _section("Download, disk and load (GiB)", table, *notes)


def _disk_words(here: Here) -> str:
    disk = here.disk
    if not disk:
        return f"not measured in {here.disk_folder}: {here.disk_problem}"
    how = "past the page cache" if disk.direct else "the page cache emptied of it"
    speed, size = disk.bytes_per_second / GIB, disk.read_bytes / 2**20
    return f"{speed:.2f} GiB/s as measured just now on {size:.0f} MiB written to and read from {disk.folder}, {how}"


def _time_table(plan: Plan) -> RenderableType:
    table = _table(["notebook"], ["expected", "budget", "budget of a cell"])
    for name, budget in plan.budgets.items():
        expected = f"{budget['expected']:,.0f}" if budget["expected"] else "not measured"
        table.add_row(name, expected, f"{budget['budget']:,.0f}", f"{budget['cell']:,.0f}")
    return _section("Time of the notebooks (seconds)", table)


def _article_table(plan: Plan) -> RenderableType:
    numbers = ["its GB", "computed GB", "least 80 GB GPUs", "least 40 GB GPUs"]
    table = _table(["use", "article's machine"], numbers)
    for row in plan.article:
        table.add_row(
            row["use"],
            row["published machine"],
            f"{row['published GB']:,}",
            f"{row['estimate GB']:,}",
            str(row["least 80 GB GPUs"]),
            str(row["least 40 GB GPUs"]),
        )
    return _section(
        "Falcon-180B: the article's machines, and the least that will do",
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
    """GiB as a bare number: two decimals, four for small sizes."""
    if not size:
        return "0"
    decimals = 2 if abs(size) > GIB / 10 else 4
    return f"{size / GIB:,.{decimals}f}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _series(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _part_name(part: str) -> str:
    return part.replace("kv_", "KV ")
