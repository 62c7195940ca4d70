"""One run of ``workbook bench``: from the options to a folder with its figures, kept row by row."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers import hardware
from helpers.engines import cases, measure, output
from helpers.engines.cases import Case, Subject
from helpers.engines.catalogue import OWN, Kind, chosen
from helpers.engines.measure import Setup
from helpers.progress import bar_class
from helpers.types import PRECISIONS, ROOT, Machine, Profile, choose

PEERS = ROOT / ".cache" / "peers"
VLLM_PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
QUICK_REPEATS = 2
QUICK_LEAVES_OUT = ("fastest", "vllm")  # compiling takes a minute for each size, starting vLLM half a minute


@dataclass(frozen=True)
class Wish:
    """What is asked for on the command line; empty: all."""

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
class Outcome:
    """The folder with bench.json, bench.md and bench.png, and whether all was measured."""

    folder: Path
    rows: list[measure.Row]
    interrupted: bool


def run(profile: Profile, wish: Wish) -> Outcome:
    """Measure what is wished for; what is measured is kept at once, also where the run is interrupted (Ctrl-C).

    Raises WorkbookError for a wish that makes no sense, LoadError where a model cannot be had.
    """
    plan = _plan(profile, wish)
    precision = wish.precision or profile.precision
    choose(precision, PRECISIONS, "precision")
    folder = wish.out or ROOT / "runs" / f"bench-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    machine = hardware.detect_apart()
    record = _record(profile, wish, machine, precision)
    repeats = record["repeats"]
    total = sum(len(kinds) * len(sizes) * (repeats + 1) for _, sizes, kinds in plan)
    found: list[measure.Row] = []
    interrupted = False
    with bar_class()(total=total, desc="bench", unit="run") as bar:
        try:
            for subject, sizes, kinds in plan:
                setup = _setup(wish, record, machine, folder, bar)
                with closing(measure.rows(subject, sizes, kinds, setup, record["versions"])) as measured:
                    for rows in measured:
                        found += rows
                        output.write(folder, record, found)
        except KeyboardInterrupt:
            interrupted = True
    record |= {"finished": _now(), "interrupted": interrupted}
    output.write(folder, record, found, figure=True)
    return Outcome(folder, found, interrupted)


def _kinds(wish: Wish, name: str) -> list[Kind]:
    """The engines for a model; a quick run leaves out what starts slowly, and peers that read a long prompt slowly."""
    kinds = chosen(wish.engines)
    if wish.quick and not wish.engines:
        kinds = [kind for kind in kinds if kind.name not in QUICK_LEAVES_OUT]
        kinds = [kind for kind in kinds if kind.name in OWN or name != "shape"]
    return kinds


def _plan(profile: Profile, wish: Wish) -> list[tuple[Subject, list[Case], list[Kind]]]:
    chosen(wish.engines)
    sizes = cases.grid(wish.contexts or cases.CONTEXTS, wish.batch_sizes or cases.BATCHES, wish.new_tokens)
    short = wish.quick and not (wish.contexts or wish.batch_sizes)
    return [
        (subject, cases.quick(subject) if short else sizes, _kinds(wish, subject.name))
        for subject in cases.subjects(profile, wish.models)
    ]


def _setup(wish: Wish, record: dict[str, Any], machine: Machine, folder: Path, bar: Any) -> Setup:
    """The bandwidth is measured for each model, while no worker is there."""
    import torch

    def done(text: str, runs: int = 0) -> None:
        bar.set_description_str(text)
        bar.update(runs)

    bandwidth = hardware.memory_bandwidth(device="cuda" if machine.gpus else "cpu")
    record["bandwidth_bytes_per_second"].append(bandwidth)
    record["threads"] = torch.get_num_threads()
    return Setup(
        precision=record["precision"],
        repeats=record["repeats"],
        threads=torch.get_num_threads(),
        bandwidth=bandwidth,
        machine=machine,
        cache=ROOT / ".cache" / "bench",
        logs=folder / "logs",
        peers=wish.peers.absolute(),
        vllm_python=(wish.vllm_python or VLLM_PYTHON).absolute(),
        limit_seconds=wish.limit_seconds,
        done=done,
    )


def _record(profile: Profile, wish: Wish, machine: Machine, precision: str) -> dict[str, Any]:
    """What the figures hang on: machine, versions, date, command."""
    return {
        "device": ", ".join(dict.fromkeys(gpu.name for gpu in machine.gpus)) or f"CPU: {machine.cpu_name}",
        "cpus": machine.cpu_count,
        "ram_bytes": machine.ram_bytes,
        "system": machine.system,
        "date": _now(),
        "command": " ".join(["workbook", *(_portable(each) for each in sys.argv[1:])]),
        "profile": profile.name,
        "precision": precision,
        "quick": wish.quick,
        "repeats": wish.repeats or (QUICK_REPEATS if wish.quick else cases.REPEATS),
        "versions": {"python": platform.python_version()},
        "bandwidth_bytes_per_second": [],
    }


def _portable(argument: str) -> str:
    """An absolute path says nothing elsewhere: its last part stands for it."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
