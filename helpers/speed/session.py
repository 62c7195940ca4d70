"""Compare engines side by side, which is ``workbook bench``, and write bench.json, bench.md and bench.png.

``run`` decides what to measure (models, sizes, engines), ``rounds`` measures it, and the files are written again after
every case. How to read the columns of the tables is explained in env/benchmarks/README.md.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helpers.base.errors import choose
from helpers.base.files import ROOT, write_json, write_text
from helpers.base.progress import bar_class
from helpers.base.units import PRECISIONS, human
from helpers.engines.catalogue import KINDS, OWN, Kind, chosen
from helpers.figures.speed import engine_speeds
from helpers.figures.style import png
from helpers.machine import hardware
from helpers.speed import cases
from helpers.speed.cases import _Case, _grid, _quick, _Subject, _subjects
from helpers.speed.rounds import _Row, _rows, _Setup

if TYPE_CHECKING:
    from tqdm.std import tqdm

    from helpers.machine.hardware import Machine
    from helpers.models.references import Profile

PEERS = ROOT / ".cache" / "peers"
_VLLM_PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
_QUICK_REPEATS = 2
_QUICK_LEAVES_OUT = ("fastest", "vllm")  # compiling takes a minute for each size, starting vLLM half a minute
_COLUMNS = (
    "context", "batch", "engine", "first token, ms", "read, tokens/s", "write, tokens/s", "limit, tokens/s",
    "peak memory", "cache", "same tokens", "warm-up, s",
)  # fmt: skip
_Reasons = Mapping[tuple[str, str], Sequence[_Row]]  # rows without figures, by engine and reason


@dataclass(frozen=True)
class Wish:
    """Options from the command line; an empty list selects all."""

    quick: bool = False
    engines: Sequence[str] = ()
    models: Sequence[str] = ()
    contexts: Sequence[int] = ()
    batch_sizes: Sequence[int] = ()
    new_tokens: int = cases.NEW_TOKENS
    repeats: int | None = None
    precision: str | None = None
    limit_seconds: float = 300
    peers: Path = PEERS
    vllm_python: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class _Outcome:
    """The folder with bench.json, bench.md and bench.png, the rows, and whether an interrupt left some out."""

    folder: Path
    rows: list[_Row]
    interrupted: bool


def run(profile: Profile, wish: Wish) -> _Outcome:
    """Measure the engines and write the results after every case, so that an interrupt (Ctrl-C) loses only one.

    Raises WorkbookError for invalid options, LoadError if a model could not be downloaded.
    """
    parts = _parts(profile, wish)
    precision = wish.precision or profile.precision
    choose(precision, PRECISIONS, "precision")
    folder = wish.out or ROOT / "runs" / f"bench-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    machine = hardware.detect_apart()
    conditions = _conditions(profile, wish, machine, precision)
    # one untimed run, then the timed ones
    total = sum(len(part.kinds) * len(part.sizes) for part in parts) * (conditions.repeats + 1)
    rows: list[_Row] = []
    with bar_class()(total=total, desc="bench", unit="run") as bar:
        try:
            for part in parts:
                setup = _setup(wish, conditions, machine, folder, bar)
                # closed at once after an interrupt: the generator ends the workers
                with closing(_rows(part.subject, part.sizes, part.kinds, setup, conditions.versions)) as measured:
                    for new_rows in measured:
                        rows += new_rows
                        _write(folder, conditions, rows)
        except KeyboardInterrupt:
            conditions.interrupted = True
    conditions.finished = _now()
    _write(folder, conditions, rows, figure=True)
    return _Outcome(folder, rows, conditions.interrupted)


@dataclass(frozen=True)
class _Part:
    """What is measured of one model."""

    subject: _Subject
    sizes: list[_Case]
    kinds: list[Kind]


def _parts(profile: Profile, wish: Wish) -> list[_Part]:
    chosen(wish.engines)  # a wrong name is refused before a model is downloaded
    grid = _grid(wish.contexts or cases.CONTEXTS, wish.batch_sizes or cases.BATCHES, wish.new_tokens)
    few_sizes = wish.quick and not (wish.contexts or wish.batch_sizes)
    parts = []
    for subject in _subjects(profile, wish.models):
        sizes = _quick(subject) if few_sizes else grid
        parts.append(_Part(subject, sizes, _kinds(wish, subject.name)))
    return parts


def _kinds(wish: Wish, name: str) -> list[Kind]:
    """The engines for a model. A quick run leaves out those that start slowly, or read a long prompt slowly."""
    kinds = chosen(wish.engines)
    if not wish.quick or wish.engines:
        return kinds
    quick = []
    for kind in kinds:
        slow_prompt = name == "shape" and kind.name not in OWN
        if kind.name not in _QUICK_LEAVES_OUT and not slow_prompt:
            quick.append(kind)
    return quick


def _setup(wish: Wish, conditions: _Conditions, machine: Machine, folder: Path, bar: tqdm[NoReturn]) -> _Setup:
    """How to run one model. The bandwidth is measured now, while no worker is there to disturb it."""
    import torch

    def done(text: str, runs: int = 0) -> None:
        bar.set_description_str(text)
        bar.update(runs)

    bandwidth = hardware.memory_bandwidth(device="cuda" if machine.gpus else "cpu")
    conditions.bandwidth_bytes_per_second.append(bandwidth.best)
    conditions.slowest_copy_bytes_per_second.append(bandwidth.slowest)
    conditions.threads = torch.get_num_threads()
    return _Setup(
        precision=conditions.precision,
        repeats=conditions.repeats,
        threads=conditions.threads,
        bandwidth=bandwidth.best,
        machine=machine,
        cache=ROOT / ".cache" / "bench",
        logs=folder / "logs",
        peers=wish.peers.absolute(),
        vllm_python=(wish.vllm_python or _VLLM_PYTHON).absolute(),
        limit_seconds=wish.limit_seconds,
        done=done,
    )


@dataclass
class _Conditions:
    """What the figures depend on: machine, precision, versions, date and command.

    ``bandwidth_bytes_per_second`` is measured before each model, the best of several copies; the slowest of them says
    how busy the machine was. ``finished`` and ``interrupted`` are set at the end.
    """

    device: str
    cpus: int
    ram_bytes: int
    system: str
    date: str
    command: str
    profile: str
    precision: str
    quick: bool
    repeats: int
    versions: dict[str, str]
    bandwidth_bytes_per_second: list[float] = field(default_factory=list)
    slowest_copy_bytes_per_second: list[float] = field(default_factory=list)
    threads: int | None = None
    finished: str = ""
    interrupted: bool = False

    @property
    def subject(self) -> str:
        """Device, cores and precision, for titles."""
        return f"{self.device}, {self.cpus} cores (torch's threads: {self.threads}), {self.precision}"


def _conditions(profile: Profile, wish: Wish, machine: Machine, precision: str) -> _Conditions:
    gpus = dict.fromkeys(gpu.name for gpu in machine.gpus)
    arguments = [_portable(argument) for argument in sys.argv[1:]]
    default_repeats = _QUICK_REPEATS if wish.quick else cases.REPEATS
    return _Conditions(
        device=", ".join(gpus) or f"CPU: {machine.cpu_name}",
        cpus=machine.cpu_count,
        ram_bytes=machine.ram_bytes,
        system=machine.system,
        date=_now(),
        command=" ".join(["workbook", *arguments]),
        profile=profile.name,
        precision=precision,
        quick=wish.quick,
        repeats=wish.repeats or default_repeats,
        versions={"python": platform.python_version()},
    )


def _portable(argument: str) -> str:
    """An argument as another machine can read it: of an absolute path, only the last part."""
    path = Path(argument)
    return path.name if path.is_absolute() else argument


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _write(folder: Path, conditions: _Conditions, rows: Sequence[_Row], *, figure: bool = False) -> None:
    """Write all files of a comparison, each whole. The figure takes a second and is drawn only if asked for."""
    write_json(folder / "bench.json", {**asdict(conditions), "rows": [asdict(row) for row in rows]})
    write_text(folder / "bench.md", _page(conditions, rows))
    if figure and any(row.decode for row in rows):
        (folder / "bench.png").write_bytes(png(engine_speeds(rows, _titles(), conditions.subject)))


def _titles() -> dict[str, str]:
    """What tables and figures call each engine."""
    return {name: kind.title for name, kind in KINDS.items()}


def _page(conditions: _Conditions, rows: Sequence[_Row]) -> str:
    """The tables as Markdown: one for each model, followed by the engines without figures and the reasons."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    measured = zip(conditions.bandwidth_bytes_per_second, conditions.slowest_copy_bytes_per_second, strict=True)
    bandwidths = ", ".join(f"{best / 1e9:.1f} (slowest copy {slowest / 1e9:.1f})" for best, slowest in measured)
    parts = [
        "# Engines side by side",
        f"{conditions.subject}; {conditions.date}; `{conditions.command}`",
        f"Versions: {versions}. Memory bandwidth, measured before each model: {bandwidths} GB/s.",
        f"Medians of {conditions.repeats} runs (least to largest). How to read the columns: env/benchmarks/README.md.",
    ]
    by_model: dict[str, list[_Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    for model, models_rows in by_model.items():
        parts += [f"## {model}", *_tables(models_rows)]
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[_Row]) -> list[str]:
    """The parts of one model's section: its table, then remarks."""
    shown = [row for row in rows if row.first_token]
    parts = []
    if shown:
        table = [_COLUMNS, ["---"] * len(_COLUMNS)]
        for row in shown:
            table.append(_cells(row))
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in table))
    if not any(row.interleaved for row in rows):
        parts.append("One engine after the other: they do not fit into memory together.")
    if notes := _note_lines(shown):
        parts.append("\n".join(notes))
    if reasons := _reason_lines(rows):
        parts.append("Without figures:\n\n" + "\n".join(reasons))
    return parts


def _note_lines(rows: Sequence[_Row]) -> list[str]:
    """What the engines say about themselves, each note once."""
    notes: list[str] = []
    for row in rows:
        note = f"- {row.engine}: {row.note}"
        if row.note and note not in notes:
            notes.append(note)
    return notes


def _cells(row: _Row) -> list[str]:
    assert row.first_token
    assert row.prefill
    return [
        f"{row.context:,}",
        str(row.batch_size),
        row.engine,
        row.first_token.text(1000),
        row.prefill.text(),
        row.decode.text() if row.decode else "too noisy",
        f"{row.limit:,.0f}",
        _size_text(row.peak_bytes),
        _size_text(row.cache_bytes),
        f"{row.same_tokens} of {row.batch_size * row.new_tokens}",
        f"{row.warm_up_seconds:.1f}",
    ]


def _size_text(size: int | None) -> str:
    return human(size) if size else "not told"


def _reason_lines(rows: Sequence[_Row]) -> list[str]:
    """A line for each reason why an engine has no figures, with the sizes."""
    reasons: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        if row.missing:
            reasons.setdefault((row.engine, row.missing), []).append(row)
    engines = {row.engine for row in rows}
    lines: list[str] = []
    for (engine, reason), concerned in reasons.items():
        sizes = _sizes(concerned)
        name = engine
        # a reason of the model, such as its context, concerns all engines alike: one line for all
        if len(engines) > 1 and _same_reason(reasons, reason, sizes) == engines:
            name = "all engines"
        line = f"- {name}, {sizes}: {reason}"
        if line not in lines:
            lines.append(line)
    return lines


def _same_reason(reasons: _Reasons, reason: str, sizes: str) -> set[str]:
    """The engines that have the same reason for the same sizes."""
    engines = set()
    for (engine, other), concerned in reasons.items():
        if other == reason and _sizes(concerned) == sizes:
            engines.add(engine)
    return engines


def _sizes(rows: Sequence[_Row]) -> str:
    """Sizes as text, such as "context 128, batch 1, 4; context 512, batch 1"."""
    batches: dict[int, list[str]] = {}
    for row in rows:
        batches.setdefault(row.context, []).append(str(row.batch_size))
    return "; ".join(f"context {context:,}, batch {', '.join(sizes)}" for context, sizes in batches.items())
