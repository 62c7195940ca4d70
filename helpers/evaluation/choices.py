"""Multiple choice by likelihood."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers import stats
from helpers.generation import Prompt, context_tokens, inference, input_device
from helpers.prompts import encode
from helpers.types import Interval, Loaded, WorkbookError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_SIZE = 16
_Scored = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens before an option, and the option's own, which are scored


@dataclass(frozen=True)
class Question:
    """A question with two or more options, of which ``options[answer]`` is right.

    A text prompt is used as it is, and an option is the text that follows it. A prompt of messages is rendered in the
    model's chat format, and an option is a reply: it begins as that format's replies do.
    """

    prompt: Prompt
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """What ``multiple_choice`` measured: for each question its options' log-likelihoods in nats, and the right option.

    keys: a hash of each question, by which ``paired`` checks that two results are of the same questions.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    answers: tuple[int, ...]
    keys: tuple[str, ...] = ()

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


def multiple_choice(loaded: Loaded, questions: Sequence[Question], *, batch_size: int = BATCH_SIZE) -> MultipleChoice:
    """Ask a model by likelihood: its choice is the option that it finds most likely after the prompt.

    The log-likelihood of an option is the sum of ln p(token | tokens before it) over its tokens. As in
    lm-evaluation-harness (``_encode_pair``), prompt and option are encoded together, white space at the end of the
    prompt belongs to the option, and the option's tokens are those after as many as the prompt has alone. In fp32 the
    values do not depend on ``batch_size``, which counts options.
    Raises WorkbookError for no questions, fewer than two options, an answer out of range, an empty prompt or option,
    or more tokens than the context; MessageError for malformed messages.
    """
    from transformers.utils.logging import tqdm

    if not questions:
        raise WorkbookError("Give at least one question.")
    if batch_size < 1:
        raise WorkbookError(f"batch_size must be at least 1, but is {batch_size}.")
    encoded = [_options(loaded, question, number) for number, question in enumerate(questions)]
    # Equal rows are scored once. The longest come first, so that a batch too large for the memory fails at the start.
    distinct = dict.fromkeys(itertools.chain.from_iterable(encoded))
    order = sorted(distinct, key=lambda row: -len(row[0]) - len(row[1]))
    values: dict[_Scored, float] = {}
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc="multiple choice", unit="batch", delay=2, leave=False):
        batch = order[start : start + batch_size]
        values |= zip(batch, _log_likelihoods(loaded.model, batch), strict=True)
    log_likelihoods = []
    for options in encoded:
        log_likelihoods.append(tuple(values[option] for option in options))
    answers = tuple(question.answer for question in questions)
    return MultipleChoice(tuple(log_likelihoods), answers, tuple(map(_key, questions)))


def check_room(tokens: int, context: int) -> None:
    """Raise WorkbookError for a question with more tokens than the context holds."""
    if tokens > context:
        raise WorkbookError(f"A question takes {tokens} tokens with an option, but the context holds {context}.")


def _key(question: Question) -> str:
    text = json.dumps([question.prompt, question.options, question.answer])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _options(loaded: Loaded, question: Question, number: int) -> list[_Scored]:
    """The options of a question as tokens, each of them checked to be one that can be scored."""
    if len(question.options) < 2:
        raise WorkbookError(f"Question {number} has fewer than two options.")
    if not 0 <= question.answer < len(question.options):
        raise WorkbookError(f"Question {number} names option {question.answer}; they count from 0.")
    if not all(question.options):
        raise WorkbookError(f"Question {number} has an empty option.")
    if isinstance(question.prompt, str):
        prompt, start = question.prompt, ""
    else:
        prompt, start = loaded.format.render(question.prompt), loaded.format.reply_start
    before = prompt.rstrip()
    if not before:
        raise WorkbookError(f"Question {number} has an empty prompt.")
    length = len(encode(loaded.tokenizer, before))
    whole = [encode(loaded.tokenizer, prompt + start + option) for option in question.options]
    if any(len(ids) <= length for ids in whole):
        raise WorkbookError(f"Question {number} has an option that is no token of its own after the prompt.")
    check_room(max(map(len, whole)), context_tokens(loaded))
    return [(tuple(ids[:length]), tuple(ids[length:])) for ids in whole]


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
    return sums


def _option_sum(logits: torch.Tensor, option: Sequence[int]) -> float:
    """The sum over the option's tokens, which ``logits`` (positions, vocabulary) predict one after the other."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = torch.tensor(option, device=logits.device)
    return -cross_entropy(logits[: len(option)].float(), targets, reduction="sum").item()
