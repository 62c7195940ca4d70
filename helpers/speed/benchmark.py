"""Time loaded models in this process: prompt tokens read and new tokens written per second, and peak memory.

``measure`` runs greedy generation at several batch sizes. Each model at each batch size becomes one row, whose speed
stands beside the limit that the memory's bandwidth sets. Engines in processes of their own are timed by ``session``.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import statistics
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB, gib
from helpers.machine import hardware, memory
from helpers.models.loaded import Loaded, context_tokens, inference, input_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.machine.hardware import Machine

_TEXT = "Once upon a time there was a small cat who lived in a red house by the sea. One day the cat met a bird. "
_BATCH_SIZES = (1, 4, 16)


@dataclass(frozen=True)
class SpeedSettings:
    """What one run does: exactly ``new_tokens`` after a prompt of exactly ``prompt_tokens``, ``repeats`` times.

    bandwidth: bytes per second of the memory that holds the weights; None: measured. Raises WorkbookError if it is not
    finite and above 0.
    """

    prompt_tokens: int = 64
    new_tokens: int = 32
    repeats: int = 3
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise WorkbookError(f"The bandwidth must be finite and above 0, but is {self.bandwidth}.")


@dataclass(frozen=True)
class Benchmark:
    """What ``measure`` found. ``interleaved``: the models took turns, so a slow moment affects all of them alike."""

    rows: tuple[_SpeedRow, ...]
    interleaved: bool

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second of the memory that holds the weights; None without rows."""
        return self.rows[0].bandwidth if self.rows else None

    def table(self) -> DataFrame:
        """One row for each model and batch size: medians with the smallest and largest of the runs."""
        import pandas as pd

        index = ["model", "precision", "batch size"]
        return pd.DataFrame([_described(row) for row in self.rows]).set_index(index)


def measure(
    loaded: Loaded | Sequence[Loaded],
    batch_sizes: Sequence[int] = _BATCH_SIZES,
    settings: SpeedSettings | None = None,
) -> Benchmark:
    """Time greedy generation at each batch size.

    Several models are measured in turn, repeat by repeat. One untimed run of each comes first: it warms up and gives
    the peak of memory (what that counts: ``helpers.engines.peak``). The bandwidth of the settings is that of the first
    model's device: layers on several GPUs work one after the other. A batch that does not fit becomes a row that says
    so.
    Raises WorkbookError for sizes that cannot be run.
    """
    from transformers.utils.logging import tqdm

    models = [loaded] if isinstance(loaded, Loaded) else list(loaded)
    chosen = settings or SpeedSettings()
    _check(models, batch_sizes, chosen)
    bandwidth = chosen.bandwidth or hardware.memory_bandwidth(device=str(input_device(models[0].model))).best
    rows_by_model: list[list[_SpeedRow]] = [[] for _ in models]
    runs = len(models) * len(batch_sizes) * (1 + chosen.repeats)
    with tqdm(total=runs, desc="speed", unit="run", delay=2, leave=False) as bar:
        # the very first forward pass takes longer than any other: on some CPUs it repacks nf4 weights.
        for model in models:
            _run(model.model, _prompts(model, 1, 8), 2)
        for size in batch_sizes:
            planned = [_planned(model, size, chosen, bandwidth) for model in models]
            for rows, row in zip(rows_by_model, _batch(planned, models, bar.update), strict=True):
                rows.append(row)
    return Benchmark(tuple(itertools.chain.from_iterable(rows_by_model)), interleaved=len(models) > 1)


def joined(benchmarks: Sequence[Benchmark]) -> Benchmark:
    """The rows of all; interleaved only if there is a single benchmark, and that one was."""
    rows: list[_SpeedRow] = []
    for benchmark in benchmarks:
        rows += benchmark.rows
    return Benchmark(tuple(rows), len(benchmarks) == 1 and benchmarks[0].interleaved)


@dataclass(frozen=True)
class _Spread:
    """The median of several runs, with the smallest and the largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Spread:
        """The spread of at least one value. Raises WorkbookError for a value that is not finite and above 0."""
        for value in values:
            if not 0 < value < math.inf:
                raise WorkbookError(
                    f"A measured time or speed is {value}. It must be finite and above 0: measure again."
                )
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0) -> str:
        """Text such as "105 (98 to 110)": each value times ``scale``, with three digits."""
        return f"{_short(scale * self.median)} ({_short(scale * self.low)} to {_short(scale * self.high)})"


@dataclass(frozen=True)
class _SpeedRow:
    """One model at one batch size; speeds count the tokens of all sequences of the batch.

    first_token: seconds from the call to the first new token of each sequence, for which the whole prompt is read;
    prefill: prompt tokens read per second in that time; decode: tokens per second after it. ``peak_bytes`` are the
    stored weights plus the most that one run allocates in addition. ``step_bytes`` is the least that one decoding step
    reads: the weights once, and the cache of half-finished replies. ``missing`` says why there is no figure.
    """

    model: str
    precision: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    stored_bytes: int
    step_bytes: int
    bandwidth: float
    first_token: _Spread | None = None
    prefill: _Spread | None = None
    decode: _Spread | None = None
    peak_bytes: int | None = None
    missing: str = ""

    @property
    def limit(self) -> float:
        """Upper limit of the decoding speed in tokens per second: the bandwidth divided by the bytes of a step."""
        return self.batch_size * self.bandwidth / self.step_bytes


def _check(models: Sequence[Loaded], batch_sizes: Sequence[int], settings: SpeedSettings) -> None:
    if not models or not batch_sizes or min(batch_sizes) < 1:
        raise WorkbookError("Give at least one model and one batch size, each at least 1.")
    prompt, new = settings.prompt_tokens, settings.new_tokens
    if prompt < 1 or new < 2 or settings.repeats < 1:
        raise WorkbookError(
            "A run needs at least one prompt token, two new tokens (the speed is measured after the first), one repeat."
        )
    for model in models:
        context = context_tokens(model)
        if prompt + new > context:
            raise WorkbookError(
                f"{prompt} and {new} tokens do not fit into the context of {model.ref.label}, {context}."
            )


def _planned(loaded: Loaded, batch_size: int, settings: SpeedSettings, bandwidth: float) -> _SpeedRow:
    """A row without figures, which says what is missing if the batch cannot fit."""
    config, precision, held = loaded.model.config, loaded.report.precision, loaded.report.stored_bytes
    tokens = settings.prompt_tokens + settings.new_tokens
    # over all steps, the cache holds the prompt and on average half of the new tokens.
    average_tokens = tokens - settings.new_tokens // 2
    cached = batch_size * average_tokens * loaded.report.cache_bytes_per_token
    needed = memory.estimate(config, precision, workload=memory.Workload(batch_size, tokens))
    missing = needed.kv_cache + needed.activations - _free_bytes(hardware.detect())
    return _SpeedRow(
        model=loaded.ref.label,
        precision=precision,
        batch_size=batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        stored_bytes=held,
        step_bytes=held - _idle_embeddings(loaded.model) + cached,
        bandwidth=bandwidth,
        missing=f"{gib(missing)} missing for this batch" if missing > 0 else "",
    )


def _free_bytes(machine: Machine) -> int:
    """Free bytes where models run: on all GPUs, or without any in the main memory."""
    if machine.gpus:
        return sum(gpu.free_bytes for gpu in machine.gpus)
    return machine.ram_available_bytes


def _idle_embeddings(model: PreTrainedModel) -> int:
    """Bytes of the embeddings if the head is separate: a step reads only one row of them for each sequence."""
    embeddings = cast("torch.Tensor", model.get_input_embeddings().weight)
    head = cast("torch.Tensor", model.get_output_embeddings().weight)
    return 0 if embeddings is head else embeddings.nbytes


def _batch(
    planned: Sequence[_SpeedRow], models: Sequence[Loaded], done: Callable[[int], object]
) -> Iterator[_SpeedRow]:
    """The rows of one batch size, measured; the models take turns."""
    rows = list(planned)
    times: list[list[tuple[float, float]]] = [[] for _ in rows]
    for repeat in range(rows[0].repeats + 1):
        for number, model in enumerate(models):
            rows[number], taken = _once(rows[number], model, untimed=repeat == 0)
            if taken is not None:
                times[number].append(taken)
            done(1)
    for row, taken_times in zip(rows, times, strict=True):
        # a row that ran out of memory may have times of earlier repeats.
        yield row if row.missing else _timed(row, taken_times)


def _once(row: _SpeedRow, loaded: Loaded, *, untimed: bool) -> tuple[_SpeedRow, tuple[float, float] | None]:
    """One run: the row, with its peak after the untimed run, and (seconds to the first token, seconds after it)."""
    import torch

    if row.missing:
        return row, None
    try:
        ids = _prompts(loaded, row.batch_size, row.prompt_tokens)
        if untimed:
            # the profiler that counts the bytes would slow a timed run down.
            allocated = _peak_memory(lambda: _run(loaded.model, ids, row.new_tokens), ids.device)
            return replace(row, peak_bytes=row.stored_bytes + allocated), None
        arrivals = _run(loaded.model, ids, row.new_tokens)
        return row, (arrivals[0], arrivals[-1] - arrivals[0])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, peak_bytes=None, missing="ran out of memory"), None


def _timed(row: _SpeedRow, times: Sequence[tuple[float, float]]) -> _SpeedRow:
    first, after = zip(*times, strict=True)
    _Spread.of([*first, *after])  # refuses times by which nothing can be divided
    tokens = row.batch_size * (row.new_tokens - 1)
    return replace(
        row,
        first_token=_Spread.of(first),
        prefill=_Spread.of([row.batch_size * row.prompt_tokens / seconds for seconds in first]),
        decode=_Spread.of([tokens / seconds for seconds in after]),
    )


def _run(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds from the call of ``generate`` to each of exactly ``new_tokens`` new tokens; ids (sequences, tokens)."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    arrivals: list[float] = []
    never = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def arrived(*_: object, **__: object) -> torch.Tensor:
        _synchronize(ids.device)
        arrivals.append(perf_counter() - start)
        return never

    # the weights are shared; the model's own settings, which the copy drops, would end a reply early.
    plain: Any = copy.copy(model)
    plain.generation_config = GenerationConfig()
    with inference(model):
        _synchronize(ids.device)
        start = perf_counter()
        plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0),
            stopping_criteria=StoppingCriteriaList([arrived]),
        )
    return arrivals


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prompts(loaded: Loaded, count: int, length: int) -> torch.Tensor:
    return _prompt_rows(loaded.tokenizer, count, length).to(input_device(loaded.model))


def _prompt_rows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """Token ids (count, length) of a plain text over and over; each row begins one token later than the one before."""
    import torch

    ids: torch.Tensor = tokenizer(_TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    positions = torch.arange(length)[None] + torch.arange(count)[:, None]
    return ids[positions % len(ids)]


def _described(row: _SpeedRow) -> dict[str, str | int]:
    names: dict[str, str | int] = {"model": row.model, "precision": row.precision, "batch size": row.batch_size}
    if row.first_token is None or row.prefill is None or row.decode is None or row.peak_bytes is None:
        return names | {"read, tokens/s": row.missing}
    return names | {
        "read, tokens/s": row.prefill.text(),
        "first token, ms": row.first_token.text(1000),
        "write, tokens/s": row.decode.text(),
        "limit, tokens/s": _short(row.limit),
        "peak, GiB": f"{row.peak_bytes / GIB:.3f}",
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch's allocators hold at once above what they held when ``work`` was called.

    On the CPU, every allocation and release is summed in order of time (torch's profiler records them); on CUDA it is
    ``torch.cuda.max_memory_allocated``, summed over the devices. ``helpers.engines.peak`` defines the kinds of peak
    memory in this project; this is the one of a model in this process.
    """
    if device.type == "cuda":
        return _peak_on_gpus(work)
    return _peak_on_cpu(work)


def _peak_on_gpus(work: Callable[[], object]) -> int:
    import torch

    devices = range(torch.cuda.device_count())
    before = [torch.cuda.memory_allocated(device) for device in devices]
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    work()
    peak = 0
    for device, start in zip(devices, before, strict=True):
        peak += torch.cuda.max_memory_allocated(device) - start
    return peak


def _peak_on_cpu(work: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _silent_libraries(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # the profiler lists them by thread
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Drop what compiled code writes to the standard error: the profiler says when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
