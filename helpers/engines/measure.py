"""Going round the engines: each case is run by every engine in turn, again and again, and becomes a row of each."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from helpers import memory
from helpers.bench import Spread
from helpers.engines.cases import Case, Subject
from helpers.engines.catalogue import OWN, EngineError, Ids, Job, Kind
from helpers.engines.child import Child, Ended, Late
from helpers.types import ROOT, Machine

TOO_NOISY = "a run with one new token took longer than one with all: too noisy to time decoding"
Times = list[tuple[float, float]]  # of one engine: seconds of a run with one new token, and with all


@dataclass(frozen=True)
class Row:
    """One engine at one size; speeds count the tokens of all sequences of the batch.

    first_token: seconds of a run that gives one token, for which the prompt is read; prefill: prompt tokens a second in
    it. decode: (new tokens - 1) of each sequence over the seconds of a run with all of them (median, largest, least)
    less the median of those with one. limit: batch * bandwidth / step_bytes. same_tokens: new tokens, of all, before
    the first that differs from the first engine's. warm_up_seconds: the untimed runs before, compiling included.
    lacks: why there is no figure.
    """

    model: str
    engine: str
    precision: str
    context: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    interleaved: bool
    step_bytes: int
    limit: float
    first_token: Spread | None = None
    prefill: Spread | None = None
    decode: Spread | None = None
    warm_up_seconds: float | None = None
    peak_bytes: int | None = None
    peak_definition: str = ""
    cache_bytes: int | None = None
    same_tokens: int | None = None
    note: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Setup:
    """How a comparison is run. ``limit_seconds``: of one answer of a worker; loading may take three times as long."""

    precision: str
    repeats: int
    threads: int
    bandwidth: float
    machine: Machine
    cache: Path
    logs: Path
    peers: Path
    vllm_python: Path | None = None
    limit_seconds: float = 300
    done: Callable[[str, int], Any] = lambda text, runs: None


@dataclass
class Seat:
    """An engine's place in the round: its worker, started when it is needed, or why there is none."""

    kind: Kind
    subject: Subject
    setup: Setup
    job: Job
    lacks: str = ""
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    child: Child | None = None
    late: list[Case] = field(default_factory=list)

    def start(self) -> None:
        """Start the worker and have it load, without waiting."""
        if self.child is None and not self.lacks:
            log = self.setup.logs / f"{self.subject.name}-{self.kind.name}.log"
            self.child = Child(_command(self.kind, self.setup), _environment(self.kind, self.setup), log)
            self._try(lambda child: child.send({"do": "load", "job": asdict(self.job)}))

    def loaded(self) -> None:
        """Wait until it has loaded; a model that cannot be loaded stays away for good."""
        if self.child is None or self.lacks:
            return
        if told := self._try(lambda child: child.receive(3 * self.setup.limit_seconds)):
            self.note, self.versions = told["note"], told["versions"]

    def ask(self, request: Mapping[str, Any], case: Case) -> dict[str, Any]:
        """An answer, from a worker that is started again where it was ended. Raises EngineError."""
        if self.child is None:
            self.start()
            self.loaded()
        if self.child is None or self.lacks:
            raise EngineError(self.lacks)
        try:
            return self.child.ask(request, self.setup.limit_seconds)
        except Ended as error:
            self.child = None
            self.late += [case] if isinstance(error, Late) else []
            raise

    def end(self) -> None:
        """End the worker."""
        if self.child:
            self.child.end()
            self.child = None

    def _try(self, step: Callable[[Child], Any]) -> Any:
        assert self.child
        try:
            return step(self.child)
        except EngineError as error:
            self.lacks = str(error)
            self.end()
        return None


def missing(kind: Kind, setup: Setup) -> str:
    """Why an engine cannot be run here, whatever the model: not installed, or not for this device or precision."""
    if setup.precision not in kind.precisions:
        return f"takes no {setup.precision} weights"
    if kind.name == "vllm":
        there = setup.vllm_python and setup.vllm_python.is_file()
        return "" if there else "not installed: see env/benchmarks/README.md, and --vllm-python"
    if not kind.package:
        return ""
    if setup.machine.gpus and not kind.on_gpu:
        return "its package here runs on the processor, the model on a GPU"
    if (setup.peers / kind.package).is_dir() or importlib.util.find_spec(kind.package):
        return ""
    return "not installed: see env/benchmarks/README.md"


def rows(
    subject: Subject, cases: Sequence[Case], kinds: Sequence[Kind], setup: Setup, versions: dict[str, str]
) -> Iterator[list[Row]]:
    """The rows of each case as it is done, one for each engine; ``versions`` is filled with what the engines tell.

    All engines of a round are in memory at once where they fit, so that a slow spell of the machine meets each of them;
    where they do not, one engine does all cases before the next.
    """
    job = _job(subject, cases, setup)
    references: dict[Case, Ids] = {}
    for group in _groups(subject, cases, kinds, setup):
        with ExitStack() as stack:
            seats = [Seat(kind, subject, setup, job, lacks=missing(kind, setup)) for kind in group]
            for seat in seats:
                stack.callback(seat.end)
            setup.done(f"{subject.ref.name}: loading", 0)
            if any(not subject.lacks(case) for case in cases):
                for step in (Seat.start, Seat.loaded):
                    for seat in seats:
                        step(seat)
            for seat in seats:
                versions |= seat.versions
            for case in cases:
                yield _round(seats, case, references, interleaved=len(group) == len(kinds))


def timed(row: Row, times: Times) -> Row:
    """A row with the figures that follow from the seconds of its runs."""
    first, whole = zip(*times, strict=True)
    read = [row.batch_size * row.prompt_tokens / seconds for seconds in first]
    row = replace(row, first_token=Spread.of(first), prefill=Spread.of(read))
    after, written = Spread.of(whole), row.batch_size * (row.new_tokens - 1)
    longer = [seconds - statistics.median(first) for seconds in (after.median, after.high, after.low)]
    if min(longer) <= 0:
        return replace(row, note="; ".join(filter(None, (row.note, TOO_NOISY))))
    return replace(row, decode=Spread(*(written / seconds for seconds in longer)))


def agreement(tokens: Ids, reference: Ids) -> int:
    """Tokens before the first that differs, summed over the sequences."""
    total = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        same = [one == other for one, other in zip(ours, theirs, strict=True)]
        total += same.index(False) if False in same else len(same)
    return total


def _round(seats: Sequence[Seat], case: Case, references: dict[Case, Ids], *, interleaved: bool) -> list[Row]:
    """One case: everyone warms up, then everyone runs once, and again."""
    found = [_planned(seat, case, interleaved) for seat in seats]
    times: list[Times] = [[] for _ in seats]
    prompts = [] if seats[0].subject.lacks(case) else seats[0].subject.prompts(case)
    for turn in range(-1, seats[0].setup.repeats):
        for place, seat in enumerate(seats):
            seat.setup.done(f"{seat.subject.ref.name}, {case.context} x {case.batch_size}: {seat.kind.name}", 1)
            if found[place].lacks:
                continue
            try:
                if turn < 0:
                    found[place] = _warmed(seat, case, prompts, found[place], references)
                else:
                    seconds = [seat.ask({"do": "run", "new_tokens": new}, case) for new in (1, case.new_tokens)]
                    times[place].append((seconds[0]["seconds"], seconds[1]["seconds"]))
            except EngineError as error:
                found[place] = replace(_planned(seat, case, interleaved), lacks=str(error))
    return [
        row if row.lacks else _weighed(seat, case, timed(row, taken))
        for seat, row, taken in zip(seats, found, times, strict=True)
    ]


def _warmed(seat: Seat, case: Case, prompts: Ids, row: Row, references: dict[Case, Ids]) -> Row:
    told = seat.ask({"do": "case", "prompts": prompts, "new_tokens": case.new_tokens}, case)
    reference = references.setdefault(case, told["tokens"])
    return replace(
        row,
        note=seat.note,
        warm_up_seconds=told["warm_up"],
        cache_bytes=told["cache_bytes"],
        same_tokens=agreement(told["tokens"], reference),
    )


def _weighed(seat: Seat, case: Case, row: Row) -> Row:
    try:
        told = seat.ask({"do": "peak"}, case)
    except EngineError:
        return row
    return replace(row, peak_bytes=told["bytes"], peak_definition=told["definition"])


def _planned(seat: Seat, case: Case, interleaved: bool) -> Row:
    """A row without figures, with the reason if it cannot get any."""
    subject, setup = seat.subject, seat.setup
    late = "a smaller case ran over its time" if any(case.exceeds(each) for each in seat.late) else ""
    step = subject.step_bytes(case, setup.precision)
    return Row(
        model=subject.label,
        engine=seat.kind.name,
        precision=setup.precision,
        context=case.context,
        batch_size=case.batch_size,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        repeats=setup.repeats,
        interleaved=interleaved,
        step_bytes=step,
        limit=case.batch_size * setup.bandwidth / step,
        lacks=subject.lacks(case) or seat.lacks or late,
    )


def _job(subject: Subject, cases: Sequence[Case], setup: Setup) -> Job:
    fitting = [case for case in cases if not subject.lacks(case)] or cases
    return Job(
        ref=asdict(subject.ref),
        folder=str(subject.folder),
        precision=setup.precision,
        threads=setup.threads,
        context=max(case.context for case in fitting),
        batch_size=max(case.batch_size for case in fitting),
        cache=str(setup.cache),
    )


def _groups(subject: Subject, cases: Sequence[Case], kinds: Sequence[Kind], setup: Setup) -> list[list[Kind]]:
    """All engines at once where they fit into half of what is free, each with the largest case; else one by one.

    So too on GPUs where vLLM is among them: its pool takes most of a GPU.
    """
    largest = max(cases, key=lambda case: case.context * case.batch_size)
    workload = memory.Workload(largest.batch_size, largest.context)
    one = memory.estimate(subject.config, setup.precision, workload=workload).total
    gpus, ram = setup.machine.gpus, setup.machine.ram_available_bytes
    free = sum(gpu.free_bytes for gpu in gpus) if gpus else ram
    present = [kind for kind in kinds if not missing(kind, setup)]
    alone = bool(gpus) and any(kind.name == "vllm" for kind in present)
    return [[kind] for kind in kinds] if alone or one * len(present) > free / 2 else [list(kinds)]


def _command(kind: Kind, setup: Setup) -> list[str]:
    python = str(setup.vllm_python) if kind.name == "vllm" else sys.executable
    return [python, "-m", "helpers.engines.worker", kind.name]


def _environment(kind: Kind, setup: Setup) -> dict[str, str]:
    """A peer sees its own packages first: its converter brings another ``gguf`` than the workbook's."""
    paths = [str(ROOT)] if kind.name in OWN or kind.name == "vllm" else [str(setup.peers), str(ROOT)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
