"""How the next token is drawn, and the reply that the drawn tokens make.

``Sampling`` is what a user chooses, ``Reply`` is what a user gets. In between, ``_processors`` turns the model's logits
into scores whose largest is the next token, so that sampled and greedy replies take the same path (see ``generating``).
Times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from helpers.base.errors import WorkbookError, check_whole
from helpers.models.finite import NotFiniteFoundError, all_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import LogitsProcessorList

FinishReason = Literal["end", "stop", "length"]
_LEAST_TEMPERATURE = 1e-6
DecodingPath = Literal["plain", "compiled", "lookup", "speculative"]


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. Temperature 0 is greedy. The defaults are the announcement's example's settings.

    Numbers of numpy become Python's own, which libraries and files take everywhere.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if hasattr(value, "item"):
                object.__setattr__(self, name, value.item())


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

    @property
    def characters_per_second(self) -> float:
        """Decoding speed in characters of the text: tokens of two tokenizers are not of the same length."""
        return self.tokens_per_second * len(self.text) / self.tokens


DEFAULT_SAMPLING = Sampling()


def _check_sampling(sampling: Sampling, seeds: Sequence[int] = ()) -> None:
    """Raise WorkbookError for a setting of the wrong type or out of its range, or such a seed."""
    if not _is_real(sampling.temperature) or not 0 <= sampling.temperature < math.inf:
        raise WorkbookError(f"The temperature must be 0 (greedy) or more, and finite, but is {sampling.temperature!r}.")
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        # Divided by it, several logits would be infinite, and the first of them always drawn.
        raise WorkbookError(
            f"The temperature {sampling.temperature!r} is too small to divide by. Give 0 (greedy), or "
            f"{_LEAST_TEMPERATURE:g} or more."
        )
    if not _is_real(sampling.top_p) or not 0 < sampling.top_p <= 1:
        raise WorkbookError(f"top_p must be above 0 and at most 1, but is {sampling.top_p!r}.")
    check_whole("max_new_tokens", sampling.max_new_tokens)
    for seed in (sampling.seed, *seeds):
        check_whole("The seed", seed, -(2**63), 2**63 - 1)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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

        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        size = scores.shape[-1]
        # drawn on the CPU, so that a seed gives the same text on every device
        draws = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in self.generators])
        return scores - draws.log().to(scores.device)
