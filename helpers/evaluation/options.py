"""Multiple choice by likelihood: each option is scored after the prompt, and the model's choice is the likeliest.

Nothing is generated: ln p(token | tokens before it) is summed over the option, in nats. Values do not depend on the
batch size, up to rounding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError, check_whole
from helpers.models.finite import check_sums, explained
from helpers.models.formats import Message
from helpers.models.loaded import context_tokens, inference, input_device
from helpers.models.tokens import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from helpers.base.stats import Interval
    from helpers.models.loaded import Loaded

_OPTION_BATCH = 16  # options of one forward: they are far shorter than windows of a text
_Scored = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens before an option, and the option's own, which are scored


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
    log_likelihoods = []
    for options in encoded:
        log_likelihoods.append(tuple(values[option] for option in options))
    answers = tuple(question.answer for question in questions)
    return _MultipleChoice(tuple(log_likelihoods), answers, tuple(map(_key, questions)))


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
