"""How the next token is drawn, and the reply that the drawn tokens make.

``Sampling`` is what a user chooses, ``Reply`` is what a user gets. In between, ``_processors`` turns the model's logits
into scores whose largest is the next token, so that sampled and greedy replies take the same path (see ``generating``).
Times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from helpers.base.errors import WorkbookError
from helpers.models.finite import NotFiniteFoundError, all_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import LogitsProcessorList

FinishReason = Literal["end", "stop", "length"]
DecodingPath = Literal["plain", "compiled", "lookup", "speculative"]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Temperature 0 is greedy. The defaults are the announcement's example's settings."""

    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """A finished reply. ``tokens`` counts generated tokens, stop string and end token included."""

    text: str
    tokens: int
    seconds: float
    first_token_seconds: float
    finish_reason: FinishReason
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    passes: int = 0  # of the model; fewer than tokens if proposed ones were accepted
    proposed: int = 0  # tokens that a draft proposed

    @property
    def acceptance_rate(self) -> float:
        """The share of a draft's tokens that the model accepted; nan if none were proposed."""
        if not self.proposed:
            return float("nan")
        return (self.tokens - self.passes) / self.proposed

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        after = self.seconds - self.first_token_seconds
        if self.tokens < 2 or after <= 0:
            return float("nan")
        return (self.tokens - 1) / after


DEFAULT_SAMPLING = Sampling()


def _check_sampling(sampling: Sampling) -> None:
    if not 0 <= sampling.temperature < math.inf:
        raise WorkbookError(f"The temperature must be 0 (greedy) or more, and finite, but is {sampling.temperature}.")
    if not 0 < sampling.top_p <= 1:
        raise WorkbookError(f"top_p must be above 0 and at most 1, but is {sampling.top_p}.")
    if sampling.max_new_tokens < 1:
        raise WorkbookError(f"max_new_tokens must be at least 1, but is {sampling.max_new_tokens}.")


def _processors(sampling: Sampling, seeds: Sequence[int]) -> LogitsProcessorList:
    """What turns logits into scores whose largest is the next token, after a look whether they are finite."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList([FiniteLogits()])
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
        processors.append(_GumbelNoise(seeds))
    return processors


class FiniteLogits:
    """A logits processor that changes nothing, and raises NotFiniteFoundError for logits that are not finite.

    It stands before all others: they set unlikely tokens to -inf on purpose.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        if not all_finite(scores):
            raise NotFiniteFoundError(input_ids.tolist())
        return scores


class _GumbelNoise:
    """A logits processor after which the largest score is a draw from softmax(scores), with one generator per row.

    The Gumbel-max method (Gumbel 1954; Maddison et al. 2014): -log of an exponential variable is Gumbel noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        size = scores.shape[-1]
        # drawn on the CPU, so that a seed gives the same text on every device
        draws = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in self.generators])
        return scores - draws.log().to(scores.device)
