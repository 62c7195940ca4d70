"""What a model finds likely: the perplexity of texts, and multiple choice by the likelihood of its options.

Both read a text without generating anything, and sum ln p(token | tokens before it) in nats. ``perplexity`` scores
every token of a text, in windows if it is longer than the context. ``multiple_choice`` scores each option after the
prompt: the model's choice is the likeliest. Values do not depend on the batch size, up to rounding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError, check_whole
from helpers.base.stats import Interval
from helpers.models.finite import check_sums, explained
from helpers.models.formats import Message
from helpers.models.loaded import context_tokens, inference, input_device
from helpers.models.tokens import document_token, encode, literal_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.models.loaded import Loaded

_WINDOW_BATCH = 4  # windows of one forward: with 2048 tokens and a vocabulary of 65024 their logits take a gigabyte
_OPTION_BATCH = 16  # options of one forward: they are far shorter than windows
_Span = tuple[list[int], int]  # the tokens of a window, and how many at its beginning are only context
_Scored = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens before an option, and the option's own, which are scored


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
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise WorkbookError("Give a list of texts, none of them empty.")
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


@dataclass(frozen=True)
class Question:
    """A question with two or more options, of which ``options[answer]`` is right.

    A text prompt is used as it is, and an option is the text that follows it. A prompt of messages is rendered in the
    model's chat format, and an option is a reply: it begins as that format's replies do.
    """

    prompt: str | Sequence[Message]
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        # JSON, which the keys are made of, knows no numbers of numpy.
        if hasattr(self.answer, "item"):
            object.__setattr__(self, "answer", self.answer.item())

    def check(self, number: int) -> None:
        """Raise WorkbookError for what cannot be scored."""
        if isinstance(self.options, str) or len(self.options) < 2:
            raise WorkbookError(f"Question {number} has fewer than two options. Give a list of them.")
        if type(self.answer) is not int or not 0 <= self.answer < len(self.options):
            raise WorkbookError(f"Question {number} names option {self.answer!r}; they count from 0.")
        if not all(isinstance(option, str) and option for option in self.options):
            raise WorkbookError(f"Question {number} has an empty option, or one that is not a text.")
        if list(self.options).count(self.options[self.answer]) > 1:  # the first of equal ones would be the choice
            raise WorkbookError(f"Question {number} has its right option twice. Make each option a text of its own.")


@dataclass(frozen=True)
class _MultipleChoice:
    """What ``multiple_choice`` measured: for each question its options' log-likelihoods in nats, and the right option.

    keys: a hash of each question, by which ``pairs.py`` checks that two results are of the same questions.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    answers: tuple[int, ...]
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # max would take NaN, or leave it, by its place in the row.
        stats.check_finite([*itertools.chain.from_iterable(self.log_likelihoods)], "the options' log-likelihoods")

    @property
    def chosen(self) -> tuple[int, ...]:
        """The most likely option of each question; of equal ones the first."""
        return tuple(values.index(max(values)) for values in self.log_likelihoods)

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether the chosen option is the right one, by question."""
        return tuple(chosen == answer for chosen, answer in zip(self.chosen, self.answers, strict=True))

    @property
    def accuracy(self) -> Interval:
        """The share of questions answered correctly, with its Wilson interval."""
        return stats.proportion(sum(self.correct), len(self.correct))


def multiple_choice(
    loaded: Loaded, questions: Sequence[Question], *, batch_size: int = _OPTION_BATCH
) -> _MultipleChoice:
    """Ask a model by likelihood: its choice is the option that it finds most likely after the prompt.

    The log-likelihood of an option is the sum of ln p(token | tokens before it) over its tokens. As in
    lm-evaluation-harness (``_encode_pair``), prompt and option are encoded together, white space at the end of the
    prompt belongs to the option, and the option's tokens are those after as many as the prompt has alone. In fp32 the
    values do not depend on ``batch_size``, which counts options.
    Raises WorkbookError for no questions, fewer than two options, the right one twice, an answer out of range, an empty
    prompt or option, or more tokens than the context; MessageError for malformed messages.
    """
    from transformers.utils.logging import tqdm

    if not questions:
        raise WorkbookError("Give at least one question.")
    check_whole("batch_size", batch_size)
    encoded = [_options(loaded, question, number) for number, question in enumerate(questions)]
    # Equal rows are scored once. The longest come first, so that a batch too large for the memory fails at the start.
    distinct = dict.fromkeys(itertools.chain.from_iterable(encoded))
    order = sorted(distinct, key=lambda row: -len(row[0]) - len(row[1]))
    values: dict[_Scored, float] = {}
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="multiple choice", unit="batch", delay=2, leave=False):
        batch = order[start : start + batch_size]
        with explained(loaded):
            values |= zip(batch, _log_likelihoods(loaded.model, batch), strict=True)
    log_likelihoods = tuple(tuple(map(values.__getitem__, options)) for options in encoded)
    answers = tuple(question.answer for question in questions)
    return _MultipleChoice(log_likelihoods, answers, tuple(map(_key, questions)))


def _options(loaded: Loaded, question: Question, number: int) -> list[_Scored]:
    """The options of a question as tokens, each of them checked to be one that can be scored."""
    question.check(number)
    prompt, options = _asked(loaded, question)
    before = prompt.rstrip()
    if not before:
        raise WorkbookError(f"Question {number} has an empty prompt.")
    encoded = _encoder(loaded, question)
    length = len(encoded(before))
    whole = [encoded(prompt + option) for option in options]
    if any(len(ids) <= length for ids in whole):
        raise WorkbookError(f"Question {number} has an option that is no token of its own after the prompt.")
    _check_length(max(map(len, whole)), context_tokens(loaded))
    return [(tuple(ids[:length]), tuple(ids[length:])) for ids in whole]


def _asked(loaded: Loaded, question: Question) -> tuple[str, list[str]]:
    """The text before the options, and the options as they follow it."""
    if isinstance(question.prompt, str):
        return question.prompt, list(question.options)
    form = loaded.format
    return form.render(question.prompt), [form.reply_start + form.escape(option) for option in question.options]


def _encoder(loaded: Loaded, question: Question) -> Callable[[str], list[int]]:
    """What gives the token ids of a question's text: raw text is encoded as it is, a conversation by its format."""
    if isinstance(question.prompt, str):
        return lambda text: encode(loaded.tokenizer, text)
    return lambda text: [token.id for token in loaded.format.tokens(loaded.tokenizer, text)]


def _check_length(tokens: int, context: int) -> None:
    """Raise WorkbookError for a question with more tokens than the context holds."""
    if tokens > context:
        raise WorkbookError(f"A question takes {tokens} tokens with an option, but the context holds {context}.")


def _log_likelihoods(model: PreTrainedModel, scored: Sequence[_Scored]) -> list[float]:
    """Sum of ln p(token | tokens before it) over the second part of each row, in nats, from one padded forward."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device = input_device(model)
    rows = [torch.tensor([*before, *option], device=device) for before, option in scored]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    # Logits of positions that predict no option are not computed: a large vocabulary makes them expensive.
    first = min(len(before) for before, _ in scored) - 1
    sums = []
    with inference(model):
        kept = ids.shape[1] - first
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        for row, (before, option) in zip(logits, scored, strict=True):
            sums.append(_option_sum(row[len(before) - 1 - first :], option))
    check_sums(sums, [[*before, *option] for before, option in scored])
    return sums


def _option_sum(logits: torch.Tensor, option: Sequence[int]) -> float:
    """The sum over the option's tokens, which ``logits`` (positions, vocabulary) predict one after the other."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = torch.tensor(option, device=logits.device)
    return -cross_entropy(logits[: len(option)].float(), targets, reduction="sum").item()


def _key(question: Question) -> str:
    return hashlib.sha256(json.dumps([question.prompt, question.options, question.answer]).encode()).hexdigest()[:16]
