"""What a comparison writes: bench.json, bench.md and bench.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from helpers.engines.catalogue import KINDS
from helpers.engines.measure import Row
from helpers.figures.speed import engine_speeds
from helpers.figures.style import png
from helpers.files import write_json, write_text
from helpers.progress import human

_COLUMNS = (
    "context", "batch", "engine", "first token, ms", "read, tokens/s", "write, tokens/s", "limit, tokens/s",
    "peak memory", "cache", "same tokens", "warm-up, s",
)  # fmt: skip
_Reasons = Mapping[tuple[str, str], Sequence[Row]]  # rows without figures, by engine and reason


@dataclass
class Conditions:
    """What the figures depend on: machine, precision, versions, date and command.

    ``bandwidth_bytes_per_second`` is measured before each model; ``finished`` and ``interrupted`` are set at the end.
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
    threads: int | None = None
    finished: str = ""
    interrupted: bool = False

    @property
    def subject(self) -> str:
        """Device, cores and precision, for titles."""
        return f"{self.device}, {self.cpus} cores (torch's threads: {self.threads}), {self.precision}"


def write(folder: Path, conditions: Conditions, rows: Sequence[Row], *, figure: bool = False) -> None:
    """Write all files of a comparison, each whole. The figure takes a second and is drawn only if asked for."""
    write_json(folder / "bench.json", {**asdict(conditions), "rows": [asdict(row) for row in rows]})
    write_text(folder / "bench.md", page(conditions, rows))
    if figure and any(row.decode for row in rows):
        (folder / "bench.png").write_bytes(png(engine_speeds(rows, titles(), conditions.subject)))


def titles() -> dict[str, str]:
    """What tables and figures call each engine."""
    return {name: kind.title for name, kind in KINDS.items()}


def page(conditions: Conditions, rows: Sequence[Row]) -> str:
    """The tables as Markdown: one for each model, followed by the engines without figures and the reasons."""
    versions = ", ".join(f"{name} {version}" for name, version in conditions.versions.items())
    bandwidths = ", ".join(f"{speed / 1e9:.1f}" for speed in conditions.bandwidth_bytes_per_second)
    parts = [
        "# Engines side by side",
        f"{conditions.subject}; {conditions.date}; `{conditions.command}`",
        f"Versions: {versions}. Memory bandwidth, measured before each model: {bandwidths} GB/s.",
        f"Medians of {conditions.repeats} runs (least to largest). How to read the columns: env/benchmarks/README.md.",
    ]
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    for model, models_rows in by_model.items():
        parts += [f"## {model}", *_tables(models_rows)]
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
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
    notes: list[str] = []
    for row in shown:
        note = f"- {row.engine}: {row.note}"
        if row.note and note not in notes:
            notes.append(note)
    if notes:
        parts.append("\n".join(notes))
    lines = _reason_lines(rows)
    if lines:
        parts.append("Without figures:\n\n" + "\n".join(lines))
    return parts


def _reason_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each reason why an engine has no figures, with the sizes."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.lacks:
            reasons.setdefault((row.engine, row.lacks), []).append(row)
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


def _sizes(rows: Sequence[Row]) -> str:
    """Sizes as text, such as "context 128, batch 1, 4; context 512, batch 1"."""
    batches: dict[int, list[str]] = {}
    for row in rows:
        batches.setdefault(row.context, []).append(str(row.batch_size))
    return "; ".join(f"context {context:,}, batch {', '.join(sizes)}" for context, sizes in batches.items())


def _cells(row: Row) -> list[str]:
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
