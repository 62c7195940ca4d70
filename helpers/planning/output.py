"""Show a plan: tables for a terminal, JSON for programs, a figure of the devices; and the table of suggestions."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB, duration, gib
from helpers.machine import memory, placement
from helpers.planning.layout import _counted, _gib, _rate, _section, _series, _table
from helpers.planning.plan import CARDS, COUNTS, DECIMAL, GIGABIT, PARTS, QUESTIONS, SIZES, _Need, _Plan, _SpeedLimit
from helpers.planning.request import FALCON_180B
from helpers.planning.times import _hours_table, _time_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from helpers.machine.memory import Workload
    from helpers.planning.plan import _Group, _Here
    from helpers.planning.suggestions import _Suggestion

Row = TypeVar("Row", _Need, _SpeedLimit)


def to_json(plan: _Plan | Sequence[_Suggestion]) -> str:
    """A whole plan, or suggestions, as JSON text; sizes are bytes."""
    if not isinstance(plan, _Plan):
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


def _draw(plan: _Plan) -> Figure:
    """Memory of every device by part, against its limit: a panel for all that is in memory together."""
    from helpers.figures.memory import memory_per_device

    panels: dict[str, list[dict[str, int | str]]] = {}
    for group in plan.groups:
        panels[group.label] = [asdict(device) for device in group.devices]
    notes: list[str] = []
    for name, real in plan.stand_ins.items():
        notes.append(f"{name} stands in for {real}")
    subject = plan.machine
    if notes:
        subject += f"; {', '.join(notes)}"
    return memory_per_device(panels, subject, fits=plan.fits)


def save_figure(plan: _Plan, file: Path) -> None:
    """Draw the devices of a plan into a PNG file. Raises WorkbookError for another suffix, or if writing fails."""
    from helpers.figures.style import png

    if file.suffix.lower() != ".png":
        name = file.with_suffix(".png")
        raise WorkbookError(f"The figure is a PNG file, and {file} is not named like one. Name it {name}.")
    try:
        file.write_bytes(png(_draw(plan)))
    except OSError as error:
        raise WorkbookError(
            f"The figure cannot be written to {file}: {error.strerror}. Name a file in a folder you can write to."
        ) from error


def tables(plan: _Plan) -> Iterator[RenderableType]:
    """The plan in parts, for a terminal of 100 columns or more."""
    yield _heading(plan)
    yield _needs_table(plan)
    for group in plan.groups:
        yield _devices_table(group)
    yield _verdict(plan)
    yield _speed_table(plan)
    yield _storage_table(plan)
    if plan.hours:
        yield _hours_table(plan)
    elif plan.budgets:
        yield _time_table(plan)
    if plan.article:
        yield _article_table(plan)


def suggestion_table(suggestions: Sequence[_Suggestion], work: Workload, model: str | None = None) -> RenderableType:
    """What runs a model (Falcon-180B), the least memory first."""
    numbers = ["GB in all", "tokens that fit", "library's cache"]
    table = _table(["precision", "GPUs"], numbers, ["such as"])
    for suggestion in suggestions:
        precision = suggestion.precision
        if suggestion.double_quant:
            precision += ", double quant"
        cards = [card.name for card in CARDS if card.gigabytes == suggestion.gigabytes]
        table.add_row(
            precision,
            f"{suggestion.gpus} x {suggestion.gigabytes} GB",
            f"{suggestion.total_gigabytes:,}",
            f"{suggestion.context_tokens:,}",
            f"{suggestion.library_context_tokens:,}",
            " or ".join(cards),
        )
    sequences = _counted(work.batch_size, "sequence")
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


def _heading(plan: _Plan) -> RenderableType:
    from rich.text import Text

    work = plan.work
    planned = f"{_counted(work.batch_size, 'conversation')} of {' or '.join(map(str, plan.contexts))} tokens"
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


def _needs_table(plan: _Plan) -> RenderableType:
    from rich.text import Text

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
        fits = Text("yes", "green")
        if need.shortfall:
            fits = Text(f"{need.shortfall.bytes / GIB:.1f} missing", "red")
        table.add_row(name, need.precision, *cells, fits)
    notes = ["Activations: the peak while the prompt is read; every device needs these bytes."]
    if count_gpus:
        notes.append("GPUs: the least number of this size (of the largest here) that hold it in whole layers.")
    return _section("Memory to generate, by precision, each model alone (GiB)", table, *notes)


def _by_model(rows: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """Rows with what stands in their first column: "A or B" takes two lines, the names of one model no more."""
    for model, same in itertools.groupby(rows, key=lambda row: row.model):
        first, *others = model.split(" or ")
        names = [first]
        for other in others:
            names.append(f"or {other}")
        for name, row in itertools.zip_longest(names, same):
            yield name or "", row


def _devices_table(group: _Group) -> RenderableType:
    from rich.text import Text

    table = _table(["device"], [*map(_part_name, PARTS), "sum", "limit", "free"])
    for device in group.devices:
        parts = [_gib(size) for size in (device.weights, device.kv_cache, device.activations, device.reserved)]
        free = Text(_gib(device.free), "red" if device.free < 0 else "")
        table.add_row(device.name, *parts, _gib(device.held), _gib(device.limit), free)
    notes = [f"Reserved: {placement.RESERVED:.0%} of each device, for the CUDA context and fragments."]
    if group.devices[0].name == "memory":
        notes = [f"Reserved: {placement.RESERVED:.0%}, for other programs."]
    if len(group.models) > 1:
        notes.append("These are in memory together: their activations are added up.")
    return _section(f"Each device with {group.label} (GiB)", table, *notes)


def _verdict(plan: _Plan) -> RenderableType:
    from rich.text import Text

    free = gib(_least_free(plan.groups))
    verdict, style = f"Every device is under its limit; the fullest has {free} free.", "bold green"
    if plan.remedies:
        verdict, style = "\n".join(plan.remedies), "bold red"
    text = Text(verdict, style)
    for sentence in _of_notebooks(plan):
        text.append(f"\n{sentence}", "italic")
    return text


def _of_notebooks(plan: _Plan) -> Iterator[str]:
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


def _least_free(groups: Sequence[_Group]) -> int:
    free: list[int] = []
    for group in groups:
        free += [device.free for device in group.devices]
    return min(free)


def _speed_table(plan: _Plan) -> RenderableType:
    from rich.text import Text

    title = "Decoding: the most tokens/s that the memory's bandwidth allows"
    table = _table(["model", "card"], ["GB/s", "GiB read", "tokens/s"], ["bandwidth from"])
    if not plan.speeds:
        why = "the models do not fit"
        if plan.fits:
            why = "the bandwidth of a card of this size is not known here"
        return Text.assemble((title, "bold"), f"\nNo estimate: {why}.")
    for name, limit in _by_model(plan.speeds):
        if limit is None:
            table.add_row(name)
            continue
        bandwidth = f"{limit.bandwidth / DECIMAL:,.0f}"
        table.add_row(name, limit.card, bandwidth, _gib(limit.bytes_read), _rate(limit.tokens_per_second), limit.source)
    sequences = "one token"
    if plan.work.batch_size > 1:
        sequences = f"{plan.work.batch_size} tokens, one of each sequence,"
    notes = [f"A limit, not a forecast: for {sequences} all weights and the full cache are read once."]
    if plan.on_gpus:
        notes += [
            "Layers run one after the other, device by device: the bandwidth of one card counts, not the sum.",
            "The card model is unknown; all known cards of this size are shown, assuming all are alike.",
        ]
    else:
        notes.append("A model that fits in the CPU's cache may be faster.")
    return _section(title, table, *notes)


def _storage_table(plan: _Plan) -> RenderableType:
    table = _table(["repository", "where"], ["GiB", "download", "load, s"])
    for repository in plan.repositories:
        seconds = "not measured"
        if repository.load_seconds is not None:
            seconds = _rate(repository.load_seconds)
        sizes = (_gib(repository.stored_bytes), _gib(repository.download_bytes))
        table.add_row(repository.model, repository.place, *sizes, seconds)
    here, total, notes = plan.here, plan.download_bytes, []
    if total:
        table.add_row("sum of the distinct repositories", "", "", _gib(total), "")
        notes.append(f"Download: {duration(total / GIGABIT)} at 1 Gbit/s.")
    notes += [
        f"Disk: {gib(plan.disk_needed)} needed, {gib(here.disk_free)} free in {here.disk_folder}; "
        f"{gib(plan.downloaded_bytes)} of the models are here already.",
        f"Load: to read the files from this machine's disk, {_disk_words(here)}. Quantizing takes longer.",
    ]
    return _section("Download, disk and load (GiB)", table, *notes)


def _disk_words(here: _Here) -> str:
    disk = here.disk
    if not disk:
        return f"not measured in {here.disk_folder}: {here.disk_problem}"
    how = "the page cache emptied of it"
    if disk.direct:
        how = "past the page cache"
    speed, size = disk.bytes_per_second / GIB, disk.read_bytes / 2**20
    return f"{speed:.2f} GiB/s as measured just now on {size:.0f} MiB written to and read from {disk.folder}, {how}"


def _article_table(plan: _Plan) -> RenderableType:
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
        "The article says at least these; the announcement's page says today that they are not the minimum.",
        "1 GB = 1e9 bytes, as published.",
        "Computed: one sequence of 2048 tokens; training with gradient checkpointing, spread evenly as ZeRO-3 does.",
    )


def _part_name(part: str) -> str:
    return part.replace("kv_", "KV ")
