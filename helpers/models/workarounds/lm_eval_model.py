"""lm-evaluation-harness changes the model that it is given, keeps a cache that nothing reads, and draws its own bars.

What is wrong: the harness ties the output layer to the embeddings if the configuration says so, even if the checkpoint
has an output layer of its own; it sets a padding token in the tokenizer; each batch returns keys and values that
nothing reads; its bars appear at once and stay; and it draws a random name for each task, which moves the caller's
random state.
Versions: lm-eval 0.4.13.
"""

from __future__ import annotations

import copy
import random
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from helpers.models.workarounds.rebinding import rebound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import torch
    from transformers import PreTrainedModel


def untied_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A shallow copy that shares all weights and that the harness cannot tie."""
    copied = copy.copy(model)
    copied.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
    return copied


def logits_without_cache(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits (batch, tokens, vocabulary) of token ids (batch, tokens), without keys and values."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextmanager
def slow_bars_only(*modules: ModuleType) -> Iterator[None]:
    """Inside the block, the bars of these modules of the harness show after two seconds and go when done."""
    from transformers.utils.logging import tqdm

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(rebound(module, "tqdm", partial(tqdm, delay=2, leave=False)))
        yield


@contextmanager
def same_random_state() -> Iterator[None]:
    """Python's random state is the same after the block as before it."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)
