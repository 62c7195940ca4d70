"""``workbook bench``: from the options to a folder of figures, which are kept row by row."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from helpers import hardware
from helpers.engines import cases, measure, output
from helpers.engines.cases import Case, Subject
from helpers.engines.catalogue import OWN, Kind, chosen
from helpers.engines.measure import Setup
from helpers.engines.output import Conditions
from helpers.progress import bar_class
from helpers.types import PRECISIONS, ROOT, Machine, Profile, choose

if TYPE_CHECKING:
    from tqdm.std import tqdm

PEERS = ROOT / ".cache" / "peers"
_VLLM_PYTHON = ROOT / ".cache" / "vllm" / "bin" / "python"
_QUICK_REPEATS = 2
_QUICK_LEAVES_OUT = ("fastest", "vllm")  # compiling takes a minute for each size, starting vLLM half a minute


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
class Outcome:
    """The folder with bench.json, bench.md and bench.png, the rows, and whether some are missing by an interrupt."""

    folder: Path
    rows: list[measure.Row]
    interrupted: bool


@dataclass(frozen=True)
class _Part:
    """What is measured of one model."""

    subject: Subject
    sizes: list[Case]
    kinds: list[Kind]


def run(profile: Profile, wish: Wish) -> Outcome:
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
    rows: list[measure.Row] = []
    with bar_class()(total=total, desc="bench", unit="run") as bar:
        try:
            for part in parts:
                setup = _setup(wish, conditions, machine, folder, bar)
                # closed at once after an interrupt: the generator ends the workers
                with closing(
                    measure.rows(part.subject, part.sizes, part.kinds, setup, conditions.versions)
                ) as measured:
                    for new_rows in measured:
                        rows += new_rows
                        output.write(folder, conditions, rows)
        except KeyboardInterrupt:
            conditions.interrupted = True
    conditions.finished = _now()
    output.write(folder, conditions, rows, figure=True)
    return Outcome(folder, rows, conditions.interrupted)


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


def _parts(profile: Profile, wish: Wish) -> list[_Part]:
    chosen(wish.engines)  # a wrong name is refused before a model is downloaded
    grid = cases.grid(wish.contexts or cases.CONTEXTS, wish.batch_sizes or cases.BATCHES, wish.new_tokens)
    few_sizes = wish.quick and not (wish.contexts or wish.batch_sizes)
    parts = []
    for subject in cases.subjects(profile, wish.models):
        sizes = cases.quick(subject) if few_sizes else grid
        parts.append(_Part(subject, sizes, _kinds(wish, subject.name)))
    return parts


def _setup(wish: Wish, conditions: Conditions, machine: Machine, folder: Path, bar: tqdm[NoReturn]) -> Setup:
    """How to run one model. The bandwidth is measured now, while no worker is there to disturb it."""
    import torch

    def done(text: str, runs: int = 0) -> None:
        bar.set_description_str(text)
        bar.update(runs)

    bandwidth = hardware.memory_bandwidth(device="cuda" if machine.gpus else "cpu")
    conditions.bandwidth_bytes_per_second.append(bandwidth)
    conditions.threads = torch.get_num_threads()
    return Setup(
        precision=conditions.precision,
        repeats=conditions.repeats,
        threads=conditions.threads,
        bandwidth=bandwidth,
        machine=machine,
        cache=ROOT / ".cache" / "bench",
        logs=folder / "logs",
        peers=wish.peers.absolute(),
        vllm_python=(wish.vllm_python or _VLLM_PYTHON).absolute(),
        limit_seconds=wish.limit_seconds,
        done=done,
    )


def _conditions(profile: Profile, wish: Wish, machine: Machine, precision: str) -> Conditions:
    gpus = dict.fromkeys(gpu.name for gpu in machine.gpus)
    arguments = [_portable(argument) for argument in sys.argv[1:]]
    default_repeats = _QUICK_REPEATS if wish.quick else cases.REPEATS
    return Conditions(
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
    return Path(argument).name if os.path.isabs(argument) else argument


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
