"""What a model finds likely: the perplexity of texts.

A text is read without generating anything, and ln p(token | tokens before it) is summed in nats. ``perplexity`` scores
every token of a text, in windows if it is longer than the context. Values do not depend on the batch size, up to
rounding.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError, check_whole
from helpers.base.stats import Interval
from helpers.models.finite import check_sums, explained
from helpers.models.loaded import context_tokens, inference, input_device
from helpers.models.tokens import document_token, literal_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.models.loaded import Loaded

_WINDOW_BATCH = 4  # windows of one forward: with 2048 tokens and a vocabulary of 65024 their logits take a gigabyte
_Span = tuple[list[int], int]  # the tokens of a window, and how many at its beginning are only context


@dataclass(frozen=True)
class _Perplexity:
    """What ``perplexity`` measured. ``tokens`` and ``bytes`` (UTF-8) count the text that was scored.

    nll: the negative log-likelihood of each text, in nats, summed over its tokens; text_tokens, text_bytes: the number
    of tokens and bytes of each text; text_keys: a hash of the part of each text that was scored; begins_with: the token
    before each text, as in the model's training. If it is empty, the first token of each text was not scored.
    """

    tokens: int
    bytes: int
    nll: tuple[float, ...]
    text_tokens: tuple[int, ...]
    text_bytes: tuple[int, ...]
    text_keys: tuple[str, ...]
    begins_with: str = ""

    def __post_init__(self) -> None:
        stats.check_finite(self.nll, "the texts' log-likelihoods")

    @property
    def perplexity(self) -> float:
        """exp(sum of nll / tokens): every token has the same weight. Comparable between models with one tokenizer."""
        return stats.exp(math.fsum(self.nll) / self.tokens)

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
        mean = stats.ratio(self.nll, self.text_tokens)
        return Interval(self.perplexity, stats.exp(mean.low), stats.exp(mean.high), mean.confidence)

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
    batch_size: int = _WINDOW_BATCH,
    max_tokens: int | None = None,
) -> _Perplexity:
    """The perplexity of a model on texts, in which nothing is a control token.

    Each text follows the token that began a document in training (``begins_with``), so that its first token counts too;
    if the tokenizer has no such token, the first token of each text is only read.

    A text longer than ``window`` tokens (default: the model's context) is cut into windows that advance by ``stride``
    (default: half a window). Each token is scored once, with at least ``window - stride`` tokens before it, or all
    there are (transformers' documentation, "Perplexity of fixed-length models"). ``batch_size`` counts windows and
    does not change the values, up to rounding; in int8 they change a little more, because bitsandbytes looks for
    outlier columns in the batch as a whole. ``max_tokens`` limits the tokens scored over all texts: the text that
    reaches the limit is cut there, and later ones are left out.
    Raises WorkbookError for no texts, an empty text, an impossible number, or a text of which no token can be scored.
    """
    _check_texts(texts)
    context = context_tokens(loaded)
    size = window if window is not None else context
    step = stride if stride is not None else size // 2
    _check_sizes(context, size, step, batch_size, max_tokens)
    begin = document_token(loaded.tokenizer)
    encoded = _encoded_up_to(loaded.tokenizer, texts, begin, max_tokens or sys.maxsize)
    with explained(loaded):
        nll = _nll_by_text(loaded.model, [ids for ids, _ in encoded], size, step, batch_size)
    tokens, sizes, keys = [], [], []
    for ids, text in encoded:
        content = text.encode()
        tokens.append(len(ids) - 1)  # the first token is not scored
        sizes.append(len(content))
        keys.append(hashlib.sha256(content).hexdigest()[:16])
    return _Perplexity(sum(tokens), sum(sizes), nll, tuple(tokens), tuple(sizes), tuple(keys), begin or "")


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise WorkbookError("Give a list of texts, none of them empty.")


def _check_sizes(context: int, size: int, step: int, batch_size: int, max_tokens: int | None) -> None:
    check_whole("window", size, 2, context)
    check_whole("stride", step, 1, size - 1)
    check_whole("batch_size", batch_size)
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens)


def _encoded_up_to(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: str | None, most: int
) -> list[tuple[list[int], str]]:
    """The texts as ``_encoded``, with at most ``most`` tokens over all of them."""
    encoded: list[tuple[list[int], str]] = []
    left = most
    for text in texts:
        if left == 0:
            break
        ids, covered = _encoded(tokenizer, text, begin, left)
        encoded.append((ids, covered))
        left -= len(ids) - 1
    return encoded


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, begin: str | None, most: int) -> tuple[list[int], str]:
    """A token that is only read, then at most ``most`` tokens of the text, and the part of the text that they cover.

    The first token is ``begin``, or else the text's own.
    """
    tokens = literal_tokens(tokenizer, text)
    covered = text
    if len(tokens) > most:
        covered = text[: tokens[most - 1].end]
        tokens = tokens[:most]
    ids = [token.id for token in tokens]
    if begin is not None:
        return [tokenizer.get_vocab()[begin], *ids], covered
    if len(ids) < 2:
        raise WorkbookError(
            f"The tokenizer has no token to begin a text with, and {text[:40]!r} is too short. Add words."
        )
    return ids, covered[tokens[0].end :]


def _nll_by_text(
    model: PreTrainedModel, rows: Sequence[list[int]], size: int, step: int, batch_size: int
) -> tuple[float, ...]:
    """Sum of -ln p(token | tokens before it) over all tokens of each row but its first, in nats."""
    from transformers.utils.logging import tqdm

    spans: list[tuple[int, _Span]] = []
    for number, ids in enumerate(rows):
        for begin, scored, end in _windows(len(ids), size, step):
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


def _windows(length: int, size: int, step: int) -> list[tuple[int, int, int]]:
    """(begin, first scored position, end) of each window over ``length`` tokens, with ``size`` of at least 2.

    The windows advance by ``step``, at least 1 and less than ``size``. Position 0, which follows nothing, is never
    scored; every other position is scored exactly once.
    """
    spans = []
    scored, begin = 1, 0
    while scored < length:
        end = min(begin + size, length)
        spans.append((begin, scored, end))
        scored, begin = end, begin + step
    return spans


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
    check_sums(sums, [ids for ids, _ in spans])
    return sums
