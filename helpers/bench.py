"""Speed and memory of loaded models, beside what the memory's bandwidth allows."""

from __future__ import annotations

import copy
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from helpers import hardware, loading, memory
from helpers.decoding import cache_bytes
from helpers.generation import context_tokens, inference, input_device
from helpers.types import GIB, Loaded, Machine, ModelRef, WorkbookError, gib

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from transformers import Cache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TEXT = "Once upon a time there was a small cat who lived in a red house by the sea. One day the cat met a bird. "
BATCH_SIZES = (1, 4, 16)


@dataclass(frozen=True)
class Spread:
    """The median of several runs, with the least and the largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0) -> str:
        """Such as "105 (98 to 110)", each times ``scale``, with three digits."""
        median, low, high = (_short(scale * value) for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


@dataclass(frozen=True)
class SpeedRow:
    """One model at one batch size; speeds count the tokens of all sequences of the batch.

    first_token: seconds from the call to the first new token of each sequence, for which the whole prompt is read;
    prefill: prompt tokens read a second in that time; decode: tokens a second after it. ``peak_bytes`` are the stored
    weights and the most that one run allocates beside them. ``step_bytes`` is what one decoding step reads at least:
    the weights once, and the cache of half-finished replies. ``lacks`` says why there is no figure.
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
    first_token: Spread | None = None
    prefill: Spread | None = None
    decode: Spread | None = None
    peak_bytes: int | None = None
    lacks: str = ""

    @property
    def limit(self) -> float:
        """Tokens a second that decoding cannot exceed where the weights come from memory: bandwidth / bytes a step."""
        return self.batch_size * self.bandwidth / self.step_bytes


@dataclass(frozen=True)
class Benchmark:
    """What ``measure`` found. ``interleaved``: the repeats went round all models, so a slow spell met each of them."""

    rows: tuple[SpeedRow, ...]
    interleaved: bool

    def table(self) -> DataFrame:
        """One row for each model and batch size: medians with the least and largest of the runs."""
        import pandas as pd

        index = ["model", "precision", "batch size"]
        return pd.DataFrame([_described(row) for row in self.rows]).set_index(index)


def measure(
    loaded: Loaded | Sequence[Loaded],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    repeats: int = 3,
    bandwidth: float | None = None,
) -> Benchmark:
    """Time greedy generation of exactly ``new_tokens`` after a prompt of exactly ``prompt_tokens``, at each batch size.

    Several models are measured in turn, repeat by repeat. One run each comes first, untimed: it warms up and gives the
    peak of memory, on CUDA ``torch.cuda.max_memory_allocated`` above what was allocated before, on the CPU the same of
    torch's allocator, by its profiler. ``bandwidth`` is measured unless given (``hardware.memory_bandwidth``), in bytes
    a second on the first model's device: where layers lie on several GPUs, these work one after the other.
    A batch that does not fit becomes a row that says so. Raises WorkbookError for sizes that cannot be run.
    """
    from transformers.utils.logging import tqdm

    models = [loaded] if isinstance(loaded, Loaded) else list(loaded)
    _check(models, batch_sizes, prompt_tokens, new_tokens, repeats)
    speed = bandwidth or hardware.memory_bandwidth(device=str(input_device(models[0].model)))
    work = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "bandwidth": speed}
    found: dict[int, list[SpeedRow]] = {place: [] for place in range(len(models))}
    runs = len(models) * len(batch_sizes) * (1 + repeats)
    with tqdm(total=runs, desc="speed", unit="run", delay=2, leave=False) as bar:
        for one in models:
            _run(one.model, _prompts(one, 1, 8), 2)  # what happens once: on some processors it repacks nf4 weights
        for size in batch_sizes:
            for place, row in enumerate(_batch([_planned(one, size, work) for one in models], models, bar.update)):
                found[place].append(row)
    return Benchmark(tuple(itertools.chain.from_iterable(found.values())), interleaved=len(models) > 1)


def joined(benchmarks: Sequence[Benchmark]) -> Benchmark:
    """All rows in one; interleaved only where there is one benchmark, and that was."""
    rows = tuple(row for benchmark in benchmarks for row in benchmark.rows)
    return Benchmark(rows, len(benchmarks) == 1 and benchmarks[0].interleaved)


@dataclass(frozen=True)
class CacheRow:
    """Decoding over a cache of one kind: "grouped" (the key-value heads) or "library" (transformers' own).

    ``seconds``: of one pass that decodes one token of each sequence; ``cache_bytes``: of all its sequences.
    """

    cache: str
    batch_size: int
    context_tokens: int
    cache_bytes: int
    seconds: Spread

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences, by the median."""
        return self.batch_size / self.seconds.median


def compare_caches(
    config: PreTrainedConfig,
    contexts: Sequence[int],
    batch_sizes: Sequence[int] = (1,),
    *,
    repeats: int = 5,
) -> list[CacheRow]:
    """Time a decoding step of one Falcon with random weights (bf16, CPU) over both kinds of cache.

    The caches are filled with random keys and values, so no prompt is read. The two take turns, step by step, after
    one untimed step each. Raises WorkbookError for a context or batch below 1.
    """
    import torch
    from transformers import FalconForCausalLM

    from helpers.grouped_cache import grouped_cache

    if min([*contexts, *batch_sizes, repeats]) < 1:
        raise WorkbookError("Contexts, batch sizes and repeats must be at least 1.")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        library = FalconForCausalLM(config).to(torch.bfloat16).eval()
        with grouped_cache():
            grouped = FalconForCausalLM(config).to(torch.bfloat16).eval()
        grouped.load_state_dict(library.state_dict())
        models = {"library": library, "grouped": grouped}
        sizes = itertools.product(batch_sizes, contexts)
        return [row for batch, tokens in sizes for row in _compared(models, batch, tokens, repeats)]


def _compared(models: dict[str, PreTrainedModel], batch: int, tokens: int, repeats: int) -> list[CacheRow]:
    import torch

    ids = torch.zeros((batch, 1), dtype=torch.long)
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        caches = {name: _filled_cache(model, ids, tokens) for name, model in models.items()}
        for _ in range(1 + repeats):
            for name, model in models.items():
                start = perf_counter()
                model(input_ids=ids, past_key_values=caches[name])
                taken[name].append(perf_counter() - start)
    return [
        CacheRow(name, batch, tokens, cache_bytes(caches[name]), Spread.of(seconds[1:]))
        for name, seconds in taken.items()
    ]


def _filled_cache(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Cache:
    """A cache of so many tokens of random keys and values, in the shape that the model itself gives it."""
    import torch

    cache = model(input_ids=ids, use_cache=True).past_key_values
    for layer in cache.layers:
        batch, heads, _, size = layer.keys.shape
        layer.keys, layer.values = (torch.randn(batch, heads, tokens, size).to(layer.keys.dtype) for _ in "kv")
    return cache


def shortfalls(ref: ModelRef, precisions: Sequence[str], machine: Machine | None = None) -> dict[str, str]:
    """The precisions in which a model does not fit on a machine (this one, unless given), and what it needs."""
    config, machine = loading.config(ref), machine or hardware.detect()
    needs: dict[str, str] = {}
    for precision in precisions:
        if missing := memory.shortfall(config, precision, machine):
            needs[precision] = str(missing)
    return needs


def residents(ref: ModelRef, precisions: Sequence[str]) -> Iterator[dict[str, Loaded]]:
    """A model in each precision that fits here: all at once if they fit together, else one after the other.

    What was handed out is unloaded before the next is loaded, and at the end. Raises LoadError as ``loading.load``.
    """
    machine = hardware.detect()
    missing = shortfalls(ref, precisions, machine)
    fitting = [precision for precision in precisions if precision not in missing]
    groups = [[precision] for precision in fitting]
    if fitting and fit_together(loading.config(ref), fitting, machine):
        groups = [fitting]
    for group in groups:
        loaded = {precision: loading.load(ref, precision) for precision in group}
        try:
            yield loaded
        finally:
            for model in loaded.values():
                loading.unload(model)


def fit_together(config: PreTrainedConfig, precisions: Sequence[str], machine: Machine) -> bool:
    """Whether a model fits in all these precisions at once, each with one sequence of 2048 tokens."""
    residents = [memory.Resident(config, precision) for precision in precisions]
    placements = memory.place_together(residents, memory.Devices.free(machine), memory.Workload())
    return all(placement.fits for placement in placements)


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch's allocators hold at once above what they held when ``work`` was called.

    On the CPU every allocation and release is summed in order of time (torch's profiler records them); on CUDA it is
    ``torch.cuda.max_memory_allocated``, summed over the devices.
    """
    import torch

    if device.type == "cuda":
        devices = range(torch.cuda.device_count())
        before = [torch.cuda.memory_allocated(each) for each in devices]
        for each in devices:
            torch.cuda.reset_peak_memory_stats(each)
        work()
        return sum(torch.cuda.max_memory_allocated(each) - start for each, start in zip(devices, before, strict=True))
    from torch.profiler import ProfilerActivity, profile

    with _silent_libraries(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def _batch(rows: list[SpeedRow], models: Sequence[Loaded], done: Callable[[int], Any]) -> list[SpeedRow]:
    """The rows of one batch size, measured; the models take turns."""
    times: list[list[tuple[float, float]]] = [[] for _ in rows]
    for repeat in range(rows[0].repeats + 1):
        for place, one in enumerate(models):
            rows[place], taken = _once(rows[place], one, untimed=repeat == 0)
            times[place] += [taken] if taken else []
            done(1)
    return [row if row.lacks else _timed(row, taken) for row, taken in zip(rows, times, strict=True)]


def _once(row: SpeedRow, loaded: Loaded, *, untimed: bool) -> tuple[SpeedRow, tuple[float, float] | None]:
    """One run: the row, with its peak after the untimed one, and (seconds to the first token, seconds after it)."""
    import torch

    if row.lacks:
        return row, None
    try:
        ids = _prompts(loaded, row.batch_size, row.prompt_tokens)
        if untimed:
            beside = peak_memory(lambda: _run(loaded.model, ids, row.new_tokens), ids.device)
            return replace(row, peak_bytes=row.stored_bytes + beside), None
        arrivals = _run(loaded.model, ids, row.new_tokens)
        return row, (arrivals[0], arrivals[-1] - arrivals[0])
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return replace(row, peak_bytes=None, lacks="ran out of memory"), None


def _timed(row: SpeedRow, times: Sequence[tuple[float, float]]) -> SpeedRow:
    first, after = zip(*times, strict=True)
    tokens = row.batch_size * (row.new_tokens - 1)
    return replace(
        row,
        first_token=Spread.of(first),
        prefill=Spread.of([row.batch_size * row.prompt_tokens / seconds for seconds in first]),
        decode=Spread.of([tokens / seconds for seconds in after]),
    )


def _planned(loaded: Loaded, batch_size: int, work: dict[str, Any]) -> SpeedRow:
    """A row without figures, which says what is missing if the batch cannot fit."""
    config, precision, held = loaded.model.config, loaded.report.precision, loaded.report.stored_bytes
    tokens = work["prompt_tokens"] + work["new_tokens"]
    cached = batch_size * (tokens - work["new_tokens"] // 2) * loaded.report.cache_bytes_per_token
    needed = memory.estimate(config, precision, workload=memory.Workload(batch_size, tokens))
    machine = hardware.detect()
    free = sum(gpu.free_bytes for gpu in machine.gpus) if machine.gpus else machine.ram_available_bytes
    missing = needed.kv_cache + needed.activations - free
    return SpeedRow(
        model=loaded.ref.label,
        precision=precision,
        batch_size=batch_size,
        stored_bytes=held,
        step_bytes=held - _idle_embeddings(loaded.model) + cached,
        lacks=f"{gib(missing)} missing for this batch" if missing > 0 else "",
        **work,
    )


def _run(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> list[float]:
    """Seconds from the call of ``generate`` to each of exactly ``new_tokens`` new tokens; ids (sequences, tokens)."""
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    arrivals: list[float] = []
    never = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def arrived(*_: Any, **__: Any) -> torch.Tensor:
        _synchronize(ids.device)
        arrivals.append(perf_counter() - start)
        return never

    plain = copy.copy(model)  # the weights are shared; the model's own settings would end a reply early
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


def prompt_rows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """Token ids (count, length) of a plain text over and over, each row from another place on."""
    import torch

    ids = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    places = torch.arange(length)[None] + torch.arange(count)[:, None]
    return ids[places % len(ids)]


def _prompts(loaded: Loaded, count: int, length: int) -> torch.Tensor:
    return prompt_rows(loaded.tokenizer, count, length).to(input_device(loaded.model))


def _idle_embeddings(model: PreTrainedModel) -> int:
    """Bytes of the embeddings where the head is separate: a step reads one row of them for each sequence."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return 0 if embeddings is head else embeddings.nbytes


def _check(models: Sequence[Loaded], batch_sizes: Sequence[int], prompt: int, new: int, repeats: int) -> None:
    if not models or not batch_sizes or min(batch_sizes) < 1:
        raise WorkbookError("Give at least one model and one batch size, each at least 1.")
    if prompt < 1 or new < 2 or repeats < 1:
        raise WorkbookError("A run needs a prompt token, two new ones (the speed is that after the first), one repeat.")
    for one in models:
        if prompt + new > context_tokens(one):
            raise WorkbookError(
                f"{prompt} and {new} tokens do not fit into the context of {one.ref.label}, {context_tokens(one)}."
            )


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Without what compiled code writes to the standard error: the profiler says when it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _described(row: SpeedRow) -> dict[str, Any]:
    names = {"model": row.model, "precision": row.precision, "batch size": row.batch_size}
    if row.first_token is None or row.prefill is None or row.decode is None or row.peak_bytes is None:
        return names | {"read, tokens/s": row.lacks}
    return names | {
        "read, tokens/s": row.prefill.text(),
        "first token, ms": row.first_token.text(1000),
        "write, tokens/s": row.decode.text(),
        "limit, tokens/s": _short(row.limit),
        "peak, GiB": f"{row.peak_bytes / GIB:.3f}",
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
