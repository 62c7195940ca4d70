"""Perplexity over a sliding window, and bits per byte."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import stats
from helpers.generation import context_tokens, inference, input_device
from helpers.types import Interval, Loaded, WorkbookError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH_SIZE = 4  # windows of one forward: with 2048 tokens and a vocabulary of 65024 their logits take a gigabyte
_Span = tuple[list[int], int]  # the tokens of a window, and how many at its beginning are only context


@dataclass(frozen=True)
class Perplexity:
    """What ``perplexity`` measured. ``tokens`` and ``bytes`` (UTF-8) count the text that was scored.

    nll: the negative log-likelihood of each text, in nats, summed over its tokens; text_tokens, text_bytes: the number
    of tokens and bytes of each text; text_keys: a hash of the part of each text that was scored.
    """

    tokens: int
    bytes: int
    nll: tuple[float, ...]
    text_tokens: tuple[int, ...]
    text_bytes: tuple[int, ...]
    text_keys: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """exp(sum of nll / tokens): every token has the same weight. Comparable between models with one tokenizer."""
        return math.exp(math.fsum(self.nll) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Sum of nll / (ln 2 * bytes): comparable between tokenizers (Gao et al. 2020, The Pile)."""
        return math.fsum(self.nll) / (math.log(2) * self.bytes)

    @property
    def standard_error(self) -> float:
        """Standard error of ``bits_per_byte`` over the texts: how far other such texts would move it (``stats.ratio``).

        Raises ValueError for fewer than two texts.
        """
        return stats.ratio_error(self.bits, self.text_bytes)

    @property
    def bits_per_byte_interval(self) -> Interval:
        """``bits_per_byte`` with its interval over the texts. Raises ValueError for fewer than two texts."""
        return stats.ratio(self.bits, self.text_bytes)

    @property
    def perplexity_interval(self) -> Interval:
        """``perplexity`` with its interval over the texts: exp of the interval of the mean nll per token.

        Raises ValueError for fewer than two texts.
        """
        found = stats.ratio(self.nll, self.text_tokens)
        return Interval(self.perplexity, math.exp(found.low), math.exp(found.high), found.confidence)

    @property
    def bits(self) -> tuple[float, ...]:
        """``nll`` in bits."""
        return tuple(value / math.log(2) for value in self.nll)


def perplexity(
    loaded: Loaded,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = _BATCH_SIZE,
    max_tokens: int | None = None,
) -> Perplexity:
    """The perplexity of a model on texts. Each text starts after the begin token, so that its first token counts too.

    A text longer than ``window`` tokens (default: the model's context) is cut into windows that advance by ``stride``
    (default: half a window). Each token is scored once, with at least ``window - stride`` tokens before it, or all
    there are (transformers' documentation, "Perplexity of fixed-length models"). ``batch_size`` counts windows and
    does not change the values, up to rounding; in int8 they change a little more, because bitsandbytes looks for
    outlier columns in the batch as a whole. ``max_tokens`` limits the tokens scored over all texts: the text that
    reaches the limit is cut there, and later ones are left out.
    Raises WorkbookError for no texts, an empty text, an impossible number, or a tokenizer without a begin or end token.
    """
    if isinstance(texts, str) or not texts or not all(texts):
        raise WorkbookError("Give a list of texts, none of them empty.")
    context = context_tokens(loaded)
    size = context if window is None else window
    step = size // 2 if stride is None else stride
    _check(context, size, step, batch_size, max_tokens)
    most = sys.maxsize if max_tokens is None else max_tokens
    encoded = _encoded_up_to(loaded.tokenizer, texts, most)
    nll = _nll_by_text(loaded.model, [ids for ids, _ in encoded], size, step, batch_size)
    tokens, sizes, keys = [], [], []
    for ids, text in encoded:
        content = text.encode()
        tokens.append(len(ids) - 1)  # the begin token is not scored
        sizes.append(len(content))
        keys.append(hashlib.sha256(content).hexdigest()[:16])
    return Perplexity(sum(tokens), sum(sizes), nll, tuple(tokens), tuple(sizes), tuple(keys))


def windows(length: int, context: int, stride: int | None = None) -> list[tuple[int, int, int]]:
    """(begin, first scored position, end) of each window over ``length`` tokens, with ``context`` of at least 2.

    The windows advance by ``stride``, at least 1 and less than ``context``; by default half a context. Position 0,
    which follows nothing, is never scored; every other position is scored exactly once.
    """
    step = context // 2 if stride is None else stride
    spans = []
    scored, begin = 1, 0
    while scored < length:
        end = min(begin + context, length)
        spans.append((begin, scored, end))
        scored, begin = end, begin + step
    return spans


def _check(context: int, size: int, step: int, batch_size: int, max_tokens: int | None) -> None:
    if not 2 <= size <= context:
        raise WorkbookError(f"window must be from 2 to the model's context of {context} tokens, but is {size}.")
    if not 1 <= step < size:
        raise WorkbookError(f"stride must be from 1 to {size - 1}, less than the window, but is {step}.")
    if batch_size < 1:
        raise WorkbookError(f"batch_size must be at least 1, but is {batch_size}.")
    if max_tokens is not None and max_tokens < 1:
        raise WorkbookError(f"max_tokens must be at least 1, but is {max_tokens}.")


def _encoded_up_to(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], most: int) -> list[tuple[list[int], str]]:
    """The texts as ``_encoded``, with at most ``most`` tokens over all of them."""
    encoded: list[tuple[list[int], str]] = []
    left = most
    for text in texts:
        if left == 0:
            break
        ids, covered = _encoded(tokenizer, text, left)
        encoded.append((ids, covered))
        left -= len(ids) - 1
    return encoded


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> tuple[list[int], str]:
    """The begin token with at most ``most`` tokens of the text, and the part of the text that they cover."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise WorkbookError("The tokenizer has neither a begin nor an end token to start a text with.")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    if len(ids) <= most:
        return [begin, *ids], text
    end = encoding["offset_mapping"][most - 1][1]
    return [begin, *ids[:most]], text[:end]


def _nll_by_text(
    model: PreTrainedModel, rows: Sequence[list[int]], size: int, step: int, batch_size: int
) -> tuple[float, ...]:
    """Sum of -ln p(token | tokens before it) over all tokens of each row but its first, in nats."""
    from transformers.utils.logging import tqdm

    spans: list[tuple[int, _Span]] = []
    for number, ids in enumerate(rows):
        for begin, scored, end in windows(len(ids), size, step):
            spans.append((number, (ids[begin:end], scored - begin)))
    # Windows of like length share a batch, and the longest, which take the most memory, come first.
    spans.sort(key=lambda span: (-len(span[1][0]), -span[1][1]))
    parts: list[list[float]] = [[] for _ in rows]
    for start in tqdm(range(0, len(spans), batch_size), desc="perplexity", unit="batch", delay=2, leave=False):
        batch = spans[start : start + batch_size]
        values = _nll(model, [span for _, span in batch])
        for (number, _), value in zip(batch, values, strict=True):
            parts[number].append(value)
    return tuple(map(math.fsum, parts))


def _nll(model: PreTrainedModel, spans: Sequence[_Span]) -> list[float]:
    """Sum of -ln p(token | tokens before it) over the scored tokens of each window, in nats, from one forward."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    device = input_device(model)
    # The windows are padded on the right, where a causal model does not look, so they need no mask.
    rows = pad_sequence([torch.tensor(ids, device=device) for ids, _ in spans], batch_first=True)
    first = min(skipped for _, skipped in spans) - 1
    sums = []
    with inference(model):
        logits = model(input_ids=rows, use_cache=False, logits_to_keep=rows.shape[1] - first).logits
        for row, (ids, skipped) in zip(logits, spans, strict=True):
            targets = torch.tensor(ids[skipped:], device=row.device)
            predicted = row[skipped - 1 - first : len(ids) - 1 - first].float()
            sums.append(cross_entropy(predicted, targets, reduction="sum").item())
    return sums
