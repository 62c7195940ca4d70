"""What a comparison leaves: bench.json, bench.md and bench.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helpers import plots
from helpers.engines.catalogue import KINDS
from helpers.engines.measure import Row
from helpers.files import write_json, write_text
from helpers.progress import human

COLUMNS = (
    "context", "batch", "engine", "first token, ms", "read, tokens/s", "write, tokens/s", "limit, tokens/s",
    "peak memory", "cache", "same tokens", "warm-up, s",
)  # fmt: skip


def write(folder: Path, record: Mapping[str, Any], rows: Sequence[Row], *, figure: bool = False) -> None:
    """Write the files anew, each whole; the figure, which takes a second, where asked for and something is shown."""
    write_json(folder / "bench.json", {**record, "rows": [asdict(row) for row in rows]})
    write_text(folder / "bench.md", page(record, rows))
    if figure and any(row.decode for row in rows):
        (folder / "bench.png").write_bytes(plots.png(plots.engine_speeds(rows, titles(), _subject(record))))


def titles() -> dict[str, str]:
    """What each engine is called in tables and figures."""
    return {name: kind.title for name, kind in KINDS.items()}


def page(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The tables as Markdown: one for each model, then what has no figures and why."""
    names = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    speeds = record["bandwidth_bytes_per_second"]
    measured = ", ".join(f"{speed / 1e9:.1f}" for speed in speeds)
    lines = [
        "# Engines side by side",
        f"{_subject(record)}; {record['date']}; `{record['command']}`",
        f"Versions: {names}. Memory bandwidth, measured before each model: {measured} GB/s.",
        f"Medians of {record['repeats']} runs (least to largest). How to read the columns: env/benchmarks/README.md.",
    ]
    for model in dict.fromkeys(row.model for row in rows):
        lines += [f"## {model}", *_tables([row for row in rows if row.model == model])]
    return "\n\n".join(lines) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row.first_token]
    table = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(row) for row in shown)]
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in table)] if shown else []
    if len({row.interleaved for row in rows}) == 1 and not rows[0].interleaved:
        parts.append("One engine after the other: they do not fit into memory together.")
    notes = dict.fromkeys(f"- {row.engine}: {row.note}" for row in shown if row.note)
    parts += ["\n".join(notes)] if notes else []
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.lacks:
            reasons.setdefault((row.engine, row.lacks), []).append(row)
    lacking = [f"- {engine}, {_sizes(each)}: {why}" for (engine, why), each in _merged(reasons, rows).items()]
    return [*parts, *(["Without figures:\n\n" + "\n".join(lacking)] if lacking else [])]


def _merged(reasons: Mapping[tuple[str, str], list[Row]], rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """One entry where all engines have the same reason for the same sizes."""
    engines = {row.engine for row in rows}
    merged: dict[tuple[str, str], list[Row]] = {}
    for (engine, why), each in reasons.items():
        same = {
            other for (other, reason), theirs in reasons.items() if reason == why and _sizes(theirs) == _sizes(each)
        }
        merged["all engines" if same == engines and len(engines) > 1 else engine, why] = each
    return merged


def _sizes(rows: Sequence[Row]) -> str:
    contexts = {row.context: [] for row in rows}
    for row in rows:
        contexts[row.context].append(str(row.batch_size))
    return "; ".join(f"context {context:,}, batch {', '.join(sizes)}" for context, sizes in contexts.items())


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
        human(row.peak_bytes) if row.peak_bytes else "not told",
        human(row.cache_bytes) if row.cache_bytes else "not told",
        f"{row.same_tokens} of {row.batch_size * row.new_tokens}",
        f"{row.warm_up_seconds:.1f}",
    ]


def _subject(record: Mapping[str, Any]) -> str:
    device, cpus, threads = record["device"], record["cpus"], record.get("threads")
    return f"{device}, {cpus} cores (torch's threads: {threads}), {record['precision']}"
