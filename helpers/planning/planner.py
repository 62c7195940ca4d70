"""Compute a plan: what a machine needs to run a profile's models, or a published one. Nothing is loaded or downloaded.

``make`` answers ``workbook plan``. It measures the disk of this machine, and the memory if the plan uses no GPU; all
else follows from configurations and profiles. Sizes are bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from helpers.base.errors import WorkbookError
from helpers.base.settings import DEFAULT_PROFILE
from helpers.base.units import PRECISIONS, gib
from helpers.machine import anatomy, hardware, memory, sharding
from helpers.machine.memory import Workload
from helpers.machine.placement import RESERVED, Devices, Resident, least_gpus, parts_by_device, place_together
from helpers.models import finding, profiles
from helpers.models.references import ModelRef
from helpers.planning.hours import _estimate
from helpers.planning.plan import (
    AS_MANY_AS_FIT,
    CARDS,
    DECIMAL,
    QUESTIONS,
    _Card,
    _Device,
    _Group,
    _Here,
    _Hours,
    _Need,
    _Plan,
    _Repository,
    _sold_as,
    _SpeedLimit,
)
from helpers.planning.request import FALCON_180B, _check_request, _parse_gpus, _published_ref

if TYPE_CHECKING:
    from transformers import PretrainedConfig  # noqa: TC004 (it takes seconds to import)

    from helpers.machine.placement import Device, Placement
    from helpers.models.references import Profile
    from helpers.planning.hours import Work


def _measure(cpu: bool = False) -> _Here:
    """Measure the disk under the cache of downloads and, for a plan without GPUs, the memory's bandwidth."""
    cache = hardware.download_folder()
    folder = next(path for path in (cache, *cache.parents) if path.is_dir())
    free = hardware.disk_free(cache)  # before the measurement writes its file
    bandwidth = None
    if cpu:
        bandwidth = hardware.memory_bandwidth(2**27)
    try:
        return _Here(str(folder), free, hardware.disk_read_speed(folder, 2**27), memory_bandwidth=bandwidth)
    except OSError as error:
        return _Here(str(folder), free, None, error.strerror or str(error), bandwidth)


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
            return _sold_as(self.devices.gpus)
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
    declared: Mapping[str, Sequence[Work]] | None = None,
) -> _Plan:
    """The plan of a profile, or of a model (Falcon-180B) on GPUs (8x80), measuring this machine.

    ``declared``: what each notebook does with the profile's models, for the hours that they take.

    Raises WorkbookError for unknown names, and for arguments that do not go together.
    """
    _check_request(work, precision)
    if profile and (model or gpus):
        raise WorkbookError("A profile names its own models and GPUs. Give --profile, or --model and --gpus.")
    if model or gpus:
        ref, sizes = _published_ref(model or FALCON_180B), _parse_gpus(gpus or "8x80")
        return _plan_model(ref, sizes, _measure(), work, precision or "bf16")
    chosen = profiles.load_profile(profile or DEFAULT_PROFILE)
    plan = _plan_profile(chosen, _measure(cpu=not chosen.requires.gpus), work, precision)
    return replace(plan, hours=_hours(chosen, declared))


def _hours(profile: Profile, declared: Mapping[str, Sequence[Work]] | None) -> tuple[_Hours, ...]:
    """The estimated hours of the notebooks on the profile's GPUs; empty without GPUs."""
    if not profile.requires.gpus or declared is None:
        return ()
    # What does not depend on the profile's models takes at most as long as on a laptop.
    other = {}
    for name, budget in profiles.load_profile(DEFAULT_PROFILE).budgets.items():
        other[name] = budget.expected_seconds or 0.0
    return _estimate(profile, declared, other)


def _plan_profile(
    profile: Profile, here: _Here, work: Workload = AS_MANY_AS_FIT, precision: str | None = None
) -> _Plan:
    """The plan of a profile on the least machine it asks for.

    Raises WorkbookError for an unknown precision, and for less than one sequence or token.
    """
    _check_request(work, precision)
    need = profile.requires
    devices = Devices((), need.ram_bytes)
    if need.gpus:
        devices = Devices((need.gpu_bytes,) * need.gpus)
    request = _Request(
        f"profile {profile.name}: {profile.description}",
        profile.models,
        profile.resident,
        devices,
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


def _plan_model(
    ref: ModelRef, gpus: Sequence[float], here: _Here, work: Workload = AS_MANY_AS_FIT, precision: str = "bf16"
) -> _Plan:
    """The plan of one model on GPUs of these bytes.

    Raises WorkbookError for an unknown precision, and for less than one sequence or token.
    """
    _check_request(work, precision)
    # fp16 needs what bf16 needs, so it is compared only if it is asked for.
    compared = dict.fromkeys((*(name for name in PRECISIONS if name != "fp16"), precision))
    title = f"{ref.id} in {precision} on {_sold_as(gpus)}"
    devices = Devices(tuple(gpus))
    return _plan(_Request(title, {"model": ref}, [["model"]], devices, precision, tuple(compared), work), here)


def _plan(request: _Request, here: _Here) -> _Plan:
    """Every model alone in each precision, then all that are in memory together; the article's table for 180B."""
    needs, speeds, contexts = list[_Need](), list[_SpeedLimit](), set[int]()
    for residents in request.alone():
        (name,), (config,) = residents.names, residents.configs
        contexts.add(request.work.tokens_for(config))
        for precision in request.precisions:
            needs.append(_need(name, config, precision, request))
        speeds += _speeds(residents, request, here)
    groups = [_group(residents, request) for residents in request.together()]
    repositories = _repositories(request.models)
    stand_ins: dict[str, str] = {}
    for ref in request.models.values():
        if ref.stand_in_for:
            stand_ins[ref.name] = ref.stand_in_for
    return _Plan(
        title=request.title,
        machine=request.machine,
        on_gpus=bool(request.devices.gpus),
        work=request.work,
        contexts=tuple(sorted(contexts)),
        stand_ins=stand_ins,
        needs=tuple(needs),
        groups=tuple(groups),
        speeds=tuple(speeds),
        repositories=tuple(_repository(ref, here) for ref in repositories),
        downloaded_bytes=0,
        disk_needed=sum(ref.download_bytes or 0 for ref in repositories),
        here=here,
        remedies=tuple(_remedies(groups, request)),
        article=_article(repositories),
    )


def _repositories(models: Mapping[str, ModelRef]) -> list[ModelRef]:
    """The models to download; roles that share a model share its download."""
    by_id = {ref.id: ref for ref in models.values()}
    return list(by_id.values())


def _article(refs: Sequence[ModelRef]) -> tuple[dict[Hashable, Any], ...]:
    """The article's machines, a row each; empty if Falcon-180B is not planned for."""
    for ref in refs:
        if ref.id.startswith(FALCON_180B):
            return tuple(sharding.hardware_claims().to_dict("records"))
    return ()


def _residents(models: Mapping[str, ModelRef], groups: Sequence[Sequence[str]]) -> list[_Residents]:
    """Groups of roles as what is in memory together; groups of equal shapes become one."""
    configs = {role: finding.config(ref) for role, ref in models.items()}
    # A model of the same shape, planned for the same context, needs the same bytes: one table is enough for both.
    same_shape: dict[tuple[tuple[anatomy.Anatomy, int], ...], list[Sequence[str]]] = {}
    for group in groups:
        shapes: list[tuple[anatomy.Anatomy, int]] = []
        for role in group:
            shapes.append((anatomy.anatomy(configs[role]), AS_MANY_AS_FIT.tokens_for(configs[role])))
        same_shape.setdefault(tuple(shapes), []).append(group)
    residents: list[_Residents] = []
    for alike in same_shape.values():
        names: list[str] = []
        for taking_turns in zip(*alike, strict=True):
            names.append(" or ".join(dict.fromkeys(_name(models[role]) for role in taking_turns)))
        residents.append(_Residents(tuple(names), tuple(configs[role] for role in alike[0])))
    return residents


def _need(name: str, config: PretrainedConfig, precision: str, request: _Request) -> _Need:
    estimate = memory.estimate(config, precision, workload=request.work)
    # A plan is for inference: it has no gradients and no optimizer.
    parts = {"weights": estimate.weights, "kv_cache": estimate.kv_cache, "activations": estimate.activations}
    model = Resident(config, precision, name)
    (placement,) = place_together([model], request.devices, request.work)
    least = None
    if request.devices.gpus:
        least = least_gpus([model], max(request.devices.gpus), request.work)
    return _Need(name, precision, parts, estimate.total, placement.shortfall, least)


def _group(residents: _Residents, request: _Request) -> _Group:
    models = residents.in_precision(request.precision)
    placements = place_together(models, request.devices, request.work)
    totals: dict[Device, dict[str, int]] = {}
    for model, placement in zip(models, placements, strict=True):
        for device, parts in _parts(model, placement, request).items():
            total = totals.setdefault(device, dict.fromkeys(parts, 0))
            for part, held in parts.items():
                total[part] += held
    sizes: dict[Device, float] = dict(enumerate(request.devices.gpus))
    if not sizes:
        sizes = {"cpu": request.devices.cpu_bytes}
    devices: list[_Device] = []
    for device, size in sizes.items():
        parts, reserved = totals[device], round(size * RESERVED)
        name, limit = _device_name(device), round(size)
        devices.append(_Device(name, limit, parts["weights"], parts["kv_cache"], parts["activations"], reserved))
    shortfalls = [placement.shortfall for placement in placements if placement.shortfall]
    return _Group(residents.names, request.precision, tuple(devices), tuple(shortfalls))


def _parts(model: Resident, placement: Placement, request: _Request) -> dict[Device, dict[str, int]]:
    return parts_by_device(model.config, model.precision, placement, workload=request.work)


def _speeds(residents: _Residents, request: _Request, here: _Here) -> Iterator[_SpeedLimit]:
    """For every kind of card that the devices may be: layers run one after the other, each at its card's bandwidth."""
    (model,) = residents.in_precision(request.precision)
    (placement,) = place_together([model], request.devices, request.work)
    if not placement.fits:
        return
    read: dict[Device, int] = {}
    for device, parts in _parts(model, placement, request).items():
        read[device] = parts["weights"] + parts["kv_cache"]
    shape = anatomy.anatomy(model.config)
    if not shape.tied:
        # Of the embeddings one row is looked up for each token; a tied matrix is read in full, as the head.
        holder = placement.device_map[shape.names.embeddings]
        read[holder] -= shape.embeddings * memory.element_bytes(model.precision)
    total = sum(read.values())
    for cards, bandwidth in _bandwidths(request.devices, here):
        seconds = 0.0
        for device, size in read.items():
            seconds += size / bandwidth[device]
        label = " + ".join(card.name for card in cards)
        source = "; ".join(dict.fromkeys(card.source for card in cards))
        tokens_per_second = request.work.batch_size / seconds
        yield _SpeedLimit(model.name, model.precision, label, total / seconds, total, tokens_per_second, source)


def _bandwidths(devices: Devices, here: _Here) -> Iterator[tuple[Sequence[_Card], dict[Device, float]]]:
    """The cards that the devices may be, a kind for each size, with the bandwidth of each device."""
    if not devices.gpus:
        if here.memory_bandwidth:
            measured = here.memory_bandwidth
            yield [_Card("this machine", 0, 0, f"measured here: {measured}")], {"cpu": measured.best}
        return
    sizes = list(dict.fromkeys(devices.gpus))
    choices: list[list[_Card]] = []
    for size in sizes:
        choices.append([card for card in CARDS if card.gigabytes == round(size / DECIMAL)])
    # Nobody said which card has that size, so every combination of known ones is shown.
    for cards in itertools.product(*choices):
        card_of = dict(zip(sizes, cards, strict=True))
        bandwidths: dict[Device, float] = {}
        for device, size in enumerate(devices.gpus):
            bandwidths[device] = card_of[size].bandwidth
        yield cards, bandwidths


def _repository(ref: ModelRef, here: _Here) -> _Repository:
    stored = ref.download_bytes or 0
    if ref.source != "hub":  # its files are here: no need to trust a number in a profile
        stored = sum(file.stat().st_size for file in finding.resolve(ref).glob("*.safetensors"))
    seconds = None
    if here.disk:
        seconds = stored / here.disk.bytes_per_second
    return _Repository(ref.id, profiles.LIVES[ref.source], stored, ref.download_bytes or 0, seconds)


def _remedies(groups: Sequence[_Group], request: _Request) -> Iterator[str]:
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
            least = least_gpus(residents.in_precision(group.precision), gpu, request.work)
            if least:
                would.append(f"{group.precision} on {_sold_as([gpu] * least)}")
        options = "; ".join(would) or "a larger machine"
        yield f"{group.label} does not fit: it {group.why_not}. What would fit: {options}."


def _name(ref: ModelRef) -> str:
    if ref.stand_in_for:
        return f"{ref.name} (stand-in)"
    return ref.name


def _device_name(device: Device) -> str:
    if isinstance(device, int):
        return f"GPU {device}"
    return "memory"
