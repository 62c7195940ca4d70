"""Compare Falcon's two key-value caches: transformers' own, and one of the key-value heads alone.

A decoding step reads the whole cache, so a smaller one is faster, too, the longer the context is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.generation.decoding import cache_bytes
from helpers.speed.benchmark import _Spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import Cache, FalconConfig, PreTrainedModel

_CACHED = ("keys", "values")


@dataclass(frozen=True)
class _CacheRow:
    """Decoding over a cache of one kind: "grouped" (the key-value heads) or "library" (transformers' own).

    ``seconds``: the time of one pass that decodes one token of each sequence; ``cache_bytes``: those of all sequences.
    """

    cache: str
    batch_size: int
    context_tokens: int
    cache_bytes: int
    seconds: _Spread

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
) -> list[_CacheRow]:
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

    from helpers.models.workarounds.grouped_cache import grouped_cache

    library: PreTrainedModel = FalconForCausalLM(config)
    library.bfloat16().eval()
    with grouped_cache():
        grouped: PreTrainedModel = FalconForCausalLM(config)
    grouped.bfloat16().eval()
    grouped.load_state_dict(library.state_dict())
    return {"library": library, "grouped": grouped}


def _compared(models: dict[str, PreTrainedModel], batch: int, tokens: int, repeats: int) -> list[_CacheRow]:
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
        rows.append(_CacheRow(name, batch, tokens, cache_bytes(cache), _Spread.of(timed)))
    return rows


def _filled_cache(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Cache:
    """A cache of ``tokens`` random keys and values per sequence, in the shape that the model itself gives it."""
    import torch

    # one pass lets the model make the cache, so that its classes and shapes are the model's own.
    cache: Cache = model(input_ids=ids, use_cache=True).past_key_values
    for layer in cache.layers:
        for name in _CACHED:
            made = getattr(layer, name)
            batch, heads, _, size = made.shape
            setattr(layer, name, torch.randn(batch, heads, tokens, size).to(made.dtype))
    return cache
