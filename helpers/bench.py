"""Speed and memory of loaded models, compared with what the memory's bandwidth allows."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from helpers import hardware, loading, memory
from helpers.decoding import cache_bytes
from helpers.generation import context_tokens, inference, input_device
from helpers.peak import peak_memory
from helpers.types import GIB, Loaded, Machine, ModelRef, WorkbookError, gib

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from transformers import Cache, FalconConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TEXT = "Once upon a time there was a small cat who lived in a red house by the sea. One day the cat met a bird. "
_BATCH_SIZES = (1, 4, 16)
_CACHED = ("keys", "values")


@dataclass(frozen=True)
class Spread:
    """The median of several runs, with the smallest and the largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0) -> str:
        """Text such as "105 (98 to 110)": each value times ``scale``, with three digits."""
        return f"{_short(scale * self.median)} ({_short(scale * self.low)} to {_short(scale * self.high)})"


@dataclass(frozen=True)
class SpeedRow:
    """One model at one batch size; speeds count the tokens of all sequences of the batch.

    first_token: seconds from the call to the first new token of each sequence, for which the whole prompt is read;
    prefill: prompt tokens read per second in that time; decode: tokens per second after it. ``peak_bytes`` are the
    stored weights plus the most that one run allocates in addition. ``step_bytes`` is the least that one decoding step
    reads: the weights once, and the cache of half-finished replies. ``lacks`` says why there is no figure.
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
        """Upper limit of the decoding speed in tokens per second: the bandwidth divided by the bytes of a step."""
        return self.batch_size * self.bandwidth / self.step_bytes


@dataclass(frozen=True)
class Benchmark:
    """What ``measure`` found. ``interleaved``: the models took turns, so a slow moment affects all of them alike."""

    rows: tuple[SpeedRow, ...]
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


@dataclass(frozen=True)
class SpeedSettings:
    """What one run does: exactly ``new_tokens`` after a prompt of exactly ``prompt_tokens``, ``repeats`` times.

    bandwidth: bytes per second of the memory that holds the weights; None: measured.
    """

    prompt_tokens: int = 64
    new_tokens: int = 32
    repeats: int = 3
    bandwidth: float | None = None


def measure(
    loaded: Loaded | Sequence[Loaded],
    batch_sizes: Sequence[int] = _BATCH_SIZES,
    settings: SpeedSettings | None = None,
) -> Benchmark:
    """Time greedy generation at each batch size.

    Several models are measured in turn, repeat by repeat. One untimed run of each comes first: it warms up and gives
    the peak of memory (see ``peak_memory``). The bandwidth of the settings is that of the first model's device: layers
    on several GPUs work one after the other. A batch that does not fit becomes a row that says so.
    Raises WorkbookError for sizes that cannot be run.
    """
    from transformers.utils.logging import tqdm

    models = [loaded] if isinstance(loaded, Loaded) else list(loaded)
    chosen = settings or SpeedSettings()
    _check(models, batch_sizes, chosen)
    bandwidth = chosen.bandwidth or hardware.memory_bandwidth(device=str(input_device(models[0].model)))
    rows_by_model: list[list[SpeedRow]] = [[] for _ in models]
    runs = len(models) * len(batch_sizes) * (1 + chosen.repeats)
    with tqdm(total=runs, desc="speed", unit="run", delay=2, leave=False) as bar:
        # The very first forward pass takes longer than any other: on some CPUs it repacks nf4 weights.
        for model in models:
            _run(model.model, _prompts(model, 1, 8), 2)
        for size in batch_sizes:
            planned = [_planned(model, size, chosen, bandwidth) for model in models]
            for rows, row in zip(rows_by_model, _batch(planned, models, bar.update), strict=True):
                rows.append(row)
    return Benchmark(tuple(itertools.chain.from_iterable(rows_by_model)), interleaved=len(models) > 1)


def joined(benchmarks: Sequence[Benchmark]) -> Benchmark:
    """The rows of all; interleaved only if there is a single benchmark, and that one was."""
    rows: list[SpeedRow] = []
    for benchmark in benchmarks:
        rows += benchmark.rows
    return Benchmark(tuple(rows), len(benchmarks) == 1 and benchmarks[0].interleaved)


@dataclass(frozen=True)
class CacheRow:
    """Decoding over a cache of one kind: "grouped" (the key-value heads) or "library" (transformers' own).

    ``seconds``: the time of one pass that decodes one token of each sequence; ``cache_bytes``: those of all sequences.
    """

    cache: str
    batch_size: int
    context_tokens: int
    cache_bytes: int
    seconds: Spread

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all sequences together, by the median."""
        return self.batch_size / self.seconds.median


def compare_caches(
    config: FalconConfig,
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

    if min([*contexts, *batch_sizes, repeats]) < 1:
        raise WorkbookError("Contexts, batch sizes and repeats must be at least 1.")
    rows = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = _models_by_cache(config)
        for batch, tokens in itertools.product(batch_sizes, contexts):
            rows += _compared(models, batch, tokens, repeats)
    return rows


def _models_by_cache(config: FalconConfig) -> dict[str, PreTrainedModel]:
    """The same random Falcon (bf16) with transformers' own cache and with a cache of its key-value heads."""
    from transformers import FalconForCausalLM

    from helpers.grouped_cache import grouped_cache

    library: PreTrainedModel = FalconForCausalLM(config)
    library.bfloat16().eval()
    with grouped_cache():
        grouped: PreTrainedModel = FalconForCausalLM(config)
    grouped.bfloat16().eval()
    grouped.load_state_dict(library.state_dict())
    return {"library": library, "grouped": grouped}


def _compared(models: dict[str, PreTrainedModel], batch: int, tokens: int, repeats: int) -> list[CacheRow]:
    import torch

    ids = torch.zeros((batch, 1), dtype=torch.long)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        caches = {name: _filled_cache(model, ids, tokens) for name, model in models.items()}
        for _ in range(1 + repeats):
            for name, model in models.items():
                start = perf_counter()
                model(input_ids=ids, past_key_values=caches[name])
                seconds[name].append(perf_counter() - start)
    rows = []
    for name, cache in caches.items():
        timed = seconds[name][1:]  # the first step warms up
        rows.append(CacheRow(name, batch, tokens, cache_bytes(cache), Spread.of(timed)))
    return rows


def _filled_cache(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Cache:
    """A cache of ``tokens`` random keys and values per sequence, in the shape that the model itself gives it."""
    import torch

    # One pass lets the model make the cache, so that its classes and shapes are the model's own.
    cache: Cache = model(input_ids=ids, use_cache=True).past_key_values
    for layer in cache.layers:
        for name in _CACHED:
            made = getattr(layer, name)
            batch, heads, _, size = made.shape
            setattr(layer, name, torch.randn(batch, heads, tokens, size).to(made.dtype))
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


def _batch(planned: Sequence[SpeedRow], models: Sequence[Loaded], done: Callable[[int], object]) -> Iterator[SpeedRow]:
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
        # A row that ran out of memory may have times of earlier repeats.
        yield row if row.lacks else _timed(row, taken_times)


def _once(row: SpeedRow, loaded: Loaded, *, untimed: bool) -> tuple[SpeedRow, tuple[float, float] | None]:
    """One run: the row, with its peak after the untimed run, and (seconds to the first token, seconds after it)."""
    import torch

    if row.lacks:
        return row, None
    try:
        ids = _prompts(loaded, row.batch_size, row.prompt_tokens)
        if untimed:
            # The profiler that counts the bytes would slow a timed run down.
            allocated = peak_memory(lambda: _run(loaded.model, ids, row.new_tokens), ids.device)
            return replace(row, peak_bytes=row.stored_bytes + allocated), None
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


def _planned(loaded: Loaded, batch_size: int, settings: SpeedSettings, bandwidth: float) -> SpeedRow:
    """A row without figures, which says what is missing if the batch cannot fit."""
    config, precision, held = loaded.model.config, loaded.report.precision, loaded.report.stored_bytes
    tokens = settings.prompt_tokens + settings.new_tokens
    # Over all steps, the cache holds the prompt and on average half of the new tokens.
    average_tokens = tokens - settings.new_tokens // 2
    cached = batch_size * average_tokens * loaded.report.cache_bytes_per_token
    needed = memory.estimate(config, precision, workload=memory.Workload(batch_size, tokens))
    missing = needed.kv_cache + needed.activations - _free_bytes(hardware.detect())
    return SpeedRow(
        model=loaded.ref.label,
        precision=precision,
        batch_size=batch_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        stored_bytes=held,
        step_bytes=held - _idle_embeddings(loaded.model) + cached,
        bandwidth=bandwidth,
        lacks=f"{gib(missing)} missing for this batch" if missing > 0 else "",
    )


def _free_bytes(machine: Machine) -> int:
    """Free bytes where models run: on all GPUs, or without any in the main memory."""
    if machine.gpus:
        return sum(gpu.free_bytes for gpu in machine.gpus)
    return machine.ram_available_bytes


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

    # The weights are shared. The model's own settings, which the copy drops, would end a reply early.
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


def prompt_rows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> torch.Tensor:
    """Token ids (count, length) of a plain text over and over; each row begins one token later than the one before."""
    import torch

    ids: torch.Tensor = tokenizer(_TEXT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    positions = torch.arange(length)[None] + torch.arange(count)[:, None]
    return ids[positions % len(ids)]


def _prompts(loaded: Loaded, count: int, length: int) -> torch.Tensor:
    return prompt_rows(loaded.tokenizer, count, length).to(input_device(loaded.model))


def _idle_embeddings(model: PreTrainedModel) -> int:
    """Bytes of the embeddings if the head is separate: a step reads only one row of them for each sequence."""
    embeddings = cast("torch.Tensor", model.get_input_embeddings().weight)
    head = cast("torch.Tensor", model.get_output_embeddings().weight)
    return 0 if embeddings is head else embeddings.nbytes


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


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _described(row: SpeedRow) -> dict[str, str | int]:
    names: dict[str, str | int] = {"model": row.model, "precision": row.precision, "batch size": row.batch_size}
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
