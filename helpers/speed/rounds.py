"""Run the engines in turn: every engine runs each case several times, and every case becomes one row per engine.

From the top: ``_rows`` takes the cases one after the other, ``_round`` lets the engines take turns in a case,
``_Measurement`` is one engine in one case, and ``_Seat`` starts and asks the worker of an engine.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base.files import ROOT
from helpers.base.isolation import isolated
from helpers.engines.catalogue import OWN, EngineError, Job, Kind
from helpers.engines.child import Child, WorkerEndedError, WorkerLateError
from helpers.machine import memory
from helpers.machine.hardware import Machine
from helpers.speed.benchmark import _Spread
from helpers.speed.cases import _Case, _Subject

if TYPE_CHECKING:
    from helpers.engines.catalogue import Ids

TOO_NOISY = "a run with one new token took longer than one with all: too noisy to time decoding"
Times = list[tuple[float, float]]  # of one engine: seconds of a run with one new token, and of one with all
_LOADING_TAKES = 3  # loading may take this many times as long as another answer


@dataclass(frozen=True)
class _Row:
    """One engine at one size. Speeds count the tokens of all sequences of the batch.

    first_token: seconds of a run with one new token, which reads the whole prompt. prefill: its prompt tokens per
    second. decode: (new tokens - 1) of each sequence, divided by the seconds of a run with all of them (median,
    largest, smallest) minus the median of the runs with one. limit: batch * bandwidth / step_bytes. same_tokens: new
    tokens before the first that differs from the first engine's, of all sequences. warm_up_seconds: the untimed runs
    before, compiling included. peak_bytes: see ``helpers.engines.peak``. missing: why there are no figures.
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
    first_token: _Spread | None = None
    prefill: _Spread | None = None
    decode: _Spread | None = None
    warm_up_seconds: float | None = None
    peak_bytes: int | None = None
    peak_definition: str = ""
    cache_bytes: int | None = None
    same_tokens: int | None = None
    note: str = ""
    missing: str = ""


def _show_nothing(text: str, runs: int) -> None:
    pass


@dataclass(frozen=True)
class _Setup:
    """How to run a comparison. ``limit_seconds`` limits one answer of a worker; loading may take three times as long.

    ``done`` is called with what happens now and the number of runs finished by it.
    """

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
    done: Callable[[str, int], object] = _show_nothing


def _rows(
    subject: _Subject, cases: Sequence[_Case], kinds: Sequence[Kind], setup: _Setup, versions: dict[str, str]
) -> Generator[list[_Row], None, None]:
    """Yield the rows of each case, one per engine, when it is done; ``versions`` gains those that the engines report.

    If all engines fit into memory together they take turns, so that a slow moment of the machine affects all of them
    alike. If not, one engine runs all cases before the next.
    """
    references: dict[_Case, Ids] = {}
    groups = _groups(subject, cases, kinds, setup)
    for group in groups:
        with ExitStack() as stack:
            seats = [_Seat.of(kind, subject, cases, setup) for kind in group]
            for seat in seats:
                stack.callback(seat.end)
            setup.done(f"{subject.ref.name}: loading", 0)
            if any(not subject.missing(case) for case in cases):
                _load(seats)
            for seat in seats:
                versions.update(seat.versions)
            for case in cases:
                yield _round(seats, case, references, interleaved=len(groups) == 1)


def _groups(subject: _Subject, cases: Sequence[_Case], kinds: Sequence[Kind], setup: _Setup) -> list[list[Kind]]:
    """The engines that are in memory at once: all if they fit into half of what is free with the largest case."""
    largest = max(cases, key=lambda case: case.context * case.batch_size)
    workload = memory.Workload(largest.batch_size, largest.context)
    estimate = memory.estimate(subject.config, setup.precision, workload=workload)
    gpus = setup.machine.gpus
    free = sum(gpu.free_bytes for gpu in gpus) if gpus else setup.machine.ram_available_bytes
    present = [kind for kind in kinds if not _missing(kind, setup)]
    # vLLM's pool takes most of a GPU, whatever the model
    alone = bool(gpus) and any(kind.name == "vllm" for kind in present)
    if alone or estimate.total * len(present) > free / 2:
        return [[kind] for kind in kinds]
    return [list(kinds)]


def _load(seats: Sequence[_Seat]) -> None:
    # all workers load at the same time; a paused one would not
    for seat in seats:
        seat.start()
    for seat in seats:
        seat.loaded()


def _round(seats: Sequence[_Seat], case: _Case, references: dict[_Case, Ids], *, interleaved: bool) -> list[_Row]:
    """One case: every engine warms up, then every engine runs once, and again."""
    subject, setup = seats[0].subject, seats[0].setup
    prompts = [] if subject.missing(case) else subject.prompts(case)
    measurements = []
    for seat in seats:
        planned = _planned(seat, case, interleaved)
        measurements.append(_Measurement(seat, case, planned, planned))
    for measurement in measurements:
        measurement.warm_up(prompts, references)
    for _ in range(setup.repeats):
        for measurement in measurements:
            measurement.run()
    return [measurement.finished() for measurement in measurements]


def _planned(seat: _Seat, case: _Case, interleaved: bool) -> _Row:
    """A row without figures, with the reason if it cannot get any."""
    subject, setup = seat.subject, seat.setup
    late = ""
    if any(case.exceeds(other) for other in seat.late):
        late = "a smaller case ran over its time"
    step_bytes = subject.step_bytes(case, setup.precision)
    return _Row(
        model=subject.label,
        engine=seat.kind.name,
        precision=setup.precision,
        context=case.context,
        batch_size=case.batch_size,
        prompt_tokens=case.prompt_tokens,
        new_tokens=case.new_tokens,
        repeats=setup.repeats,
        interleaved=interleaved,
        step_bytes=step_bytes,
        limit=case.batch_size * setup.bandwidth / step_bytes,
        missing=subject.missing(case) or seat.missing or late,
    )


@dataclass
class _Measurement:
    """One engine at one case: the runs so far, and the row that they become."""

    seat: _Seat
    case: _Case
    planned: _Row
    row: _Row
    times: Times = field(default_factory=list)

    def warm_up(self, prompts: Ids, references: dict[_Case, Ids]) -> None:
        """Run once, untimed. The tokens of the first engine to come this far are the reference for the others."""
        self._announce()
        if self.row.missing:
            return
        request = {"do": "case", "prompts": prompts, "new_tokens": self.case.new_tokens}
        with self._giving_up():
            answer = self.seat.ask(request, self.case)
            reference = references.setdefault(self.case, answer["tokens"])
            self.row = replace(
                self.planned,
                note=self.seat.note,
                warm_up_seconds=answer["warm_up"],
                cache_bytes=answer["cache_bytes"],
                same_tokens=_agreement(answer["tokens"], reference),
            )

    def run(self) -> None:
        """Time a run with one new token, and one with all."""
        self._announce()
        if self.row.missing:
            return
        with self._giving_up():
            first = self.seat.ask({"do": "run", "new_tokens": 1}, self.case)["seconds"]
            whole = self.seat.ask({"do": "run", "new_tokens": self.case.new_tokens}, self.case)["seconds"]
            if not (0 < first < math.inf and 0 < whole < math.inf):
                raise EngineError(f"it reported runs of {first} and {whole} seconds, which cannot be")
            self.times.append((first, whole))

    def finished(self) -> _Row:
        """The row with its figures and the peak of memory."""
        if self.row.missing:
            return self.row
        row = _timed(self.row, self.times)
        try:
            answer = self.seat.ask({"do": "peak"}, self.case)
        except EngineError:
            # the times are measured: a worker that dies now takes only the peak with it
            return row
        return replace(row, peak_bytes=answer["bytes"], peak_definition=answer["definition"])

    def _announce(self) -> None:
        seat, case = self.seat, self.case
        seat.setup.done(f"{seat.subject.ref.name}, {case.context} x {case.batch_size}: {seat.kind.name}", 1)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Replace the row by one without figures if the engine fails."""
        try:
            yield
        except EngineError as error:
            self.row = replace(self.planned, missing=str(error))


def _timed(row: _Row, times: Times) -> _Row:
    """A row with the figures that follow from the seconds of its runs."""
    first_seconds = [first for first, _ in times]
    prefill = [row.batch_size * row.prompt_tokens / seconds for seconds in first_seconds]
    row = replace(row, first_token=_Spread.of(first_seconds), prefill=_Spread.of(prefill))
    whole = _Spread.of([seconds for _, seconds in times])
    first = statistics.median(first_seconds)
    # the fastest run has the fewest seconds, so the ends of the spread change places
    after = (whole.median - first, whole.high - first, whole.low - first)
    if min(after) <= 0:
        notes = [note for note in (row.note, TOO_NOISY) if note]
        return replace(row, note="; ".join(notes))
    tokens = row.batch_size * (row.new_tokens - 1)
    return replace(row, decode=_Spread(tokens / after[0], tokens / after[1], tokens / after[2]))


def _agreement(tokens: Ids, reference: Ids) -> int:
    """Number of tokens before the first that differs, summed over the sequences."""
    total = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        for token, other in zip(ours, theirs, strict=True):
            if token != other:
                break
            total += 1
    return total


@dataclass
class _Seat:
    """An engine's place in the round: its worker, started when it is needed, or why there is none (``missing``)."""

    kind: Kind
    subject: _Subject
    setup: _Setup
    job: Job
    missing: str = ""
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    child: Child | None = None
    late: list[_Case] = field(default_factory=list)

    @classmethod
    def of(cls, kind: Kind, subject: _Subject, cases: Sequence[_Case], setup: _Setup) -> _Seat:
        """A seat for an engine that is to run these cases."""
        fitting = [case for case in cases if not subject.missing(case)] or cases
        job = Job(
            ref=asdict(subject.ref),
            folder=str(subject.folder),
            precision=setup.precision,
            threads=setup.threads,
            context=max(case.context for case in fitting),
            batch_size=max(case.batch_size for case in fitting),
            cache=str(setup.cache),
        )
        return cls(kind, subject, setup, job, missing=_missing(kind, setup))

    def start(self) -> None:
        """Start the worker and let it load, without waiting."""
        if self.child is None and not self.missing:
            log = self.setup.logs / f"{self.subject.name}-{self.kind.name}.log"
            self.child = Child(_command(self.kind, self.setup), _environment(self.kind, self.setup), log)
            with self._giving_up():
                self.child.send({"do": "load", "job": asdict(self.job)})

    def loaded(self) -> None:
        """Wait until the worker has loaded. A model that fails to load is not tried again."""
        if self.child is None or self.missing:
            return
        with self._giving_up():
            answer = self.child.receive(_LOADING_TAKES * self.setup.limit_seconds)
            self.note, self.versions = answer["note"], answer["versions"]

    def ask(self, request: Mapping[str, object], case: _Case) -> dict[str, Any]:
        """The worker's answer. A worker that was ended is started again first. Raises EngineError."""
        if self.child is None:
            self.start()
            self.loaded()
        if self.child is None or self.missing:
            raise EngineError(self.missing)
        try:
            return self.child.ask(request, self.setup.limit_seconds)
        except WorkerEndedError as error:
            self.child = None
            if isinstance(error, WorkerLateError):
                self.late.append(case)
            raise

    def end(self) -> None:
        """End the worker."""
        if self.child:
            self.child.end()
            self.child = None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Keep the reason of an EngineError and end the worker for good."""
        try:
            yield
        except EngineError as error:
            self.missing = str(error)
            self.end()


def _missing(kind: Kind, setup: _Setup) -> str:
    """Why an engine cannot run here, whatever the model: not installed, or not for this device or precision."""
    if setup.precision not in kind.precisions:
        return f"takes no {setup.precision} weights"
    if setup.machine.gpus and not kind.on_gpu:
        return "its package runs on the CPU here, the model on a GPU"
    if _is_installed(kind, setup):
        return ""
    advice = "not installed: see env/benchmarks/README.md"
    return f"{advice}, and --vllm-python" if kind.name == "vllm" else advice


def _is_installed(kind: Kind, setup: _Setup) -> bool:
    if kind.name == "vllm":
        return setup.vllm_python is not None and setup.vllm_python.is_file()
    if not kind.package:
        return True
    return (setup.peers / kind.package).is_dir() or importlib.util.find_spec(kind.package) is not None


def _command(kind: Kind, setup: _Setup) -> list[str]:
    python = str(setup.vllm_python) if kind.name == "vllm" else sys.executable
    return [python, "-m", "helpers.engines.worker", kind.name]


def _environment(kind: Kind, setup: _Setup) -> dict[str, str]:
    """The worker's environment, with the packages of an engine that is not the workbook's own in front."""
    paths = [str(ROOT)]
    # the converter of llama.cpp brings another version of gguf than the workbook's, and needs its own
    if kind.name not in OWN and kind.name != "vllm":
        paths.insert(0, str(setup.peers))
    return isolated(os.environ) | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
