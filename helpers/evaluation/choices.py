"""Multiple choice by likelihood."""

from __future__ import annotations

import hashlib
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
Scored = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens before an option, and the option's own, which are scored


@dataclass(frozen=True)
class Question:
    """A question with two options or more, of which ``options[answer]`` is right.

    A prompt of text is used as it is, and an option is the text that follows it. A prompt of messages is rendered in
    the model's chat format, and an option is a reply: it begins as that format's replies do.
    """

    prompt: Prompt
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """What ``multiple_choice`` measured: each option's log-likelihood in nats by question, and the right options.

    keys: a hash of each question, by which ``paired`` knows that two results are of the same ones.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    answers: tuple[int, ...]
    keys: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[int, ...]:
        """The likeliest option of each question, the first of equals."""
        return tuple(values.index(max(values)) for values in self.log_likelihoods)

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether the chosen option is the right one, by question."""
        return tuple(chosen == answer for chosen, answer in zip(self.chosen, self.answers, strict=True))

    @property
    def accuracy(self) -> Interval:
        """The share of questions answered right, with its Wilson interval."""
        return stats.proportion(sum(self.correct), len(self.correct))


def multiple_choice(loaded: Loaded, questions: Sequence[Question], *, batch_size: int = BATCH_SIZE) -> MultipleChoice:
    """Asks a model by likelihood: the option it finds likeliest, after the prompt, is the one it chooses.

    The log-likelihood of an option is the sum of ln p(token | tokens before it) over its tokens. As in
    lm-evaluation-harness (``_encode_pair``), prompt and option are encoded together, white space at the prompt's end
    counts to the option, and the option's tokens are those after as many as the prompt has alone. In fp32 the values
    do not depend on ``batch_size``, which counts options.
    Raises WorkbookError for no questions, fewer than two options, an answer out of range, an empty prompt or option,
    or more tokens than the context; MessageError for malformed messages.
    """
    from transformers.utils.logging import tqdm

    if not questions:
        raise WorkbookError("Give at least one question.")
    if batch_size < 1:
        raise WorkbookError(f"batch_size must be at least 1, but is {batch_size}.")
    scored = [row for number, question in enumerate(questions) for row in _options(loaded, question, number)]
    order = sorted(dict.fromkeys(scored), key=lambda row: -len(row[0]) - len(row[1]))  # equal rows are scored once
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    values: dict[Scored, float] = {}
    for batch in tqdm(batches, desc="multiple choice", unit="batch", delay=2, leave=False):
        values |= zip(batch, _log_likelihoods(loaded.model, batch), strict=True)
    in_order = (values[row] for row in scored)
    found = tuple(tuple(next(in_order) for _ in question.options) for question in questions)
    return MultipleChoice(found, tuple(question.answer for question in questions), tuple(map(_key, questions)))


def check_room(tokens: int, context: int) -> None:
    """Raises WorkbookError where a question takes more tokens than the context holds."""
    if tokens > context:
        raise WorkbookError(f"A question takes {tokens} tokens with an option, but the context holds {context}.")


def _key(question: Question) -> str:
    text = json.dumps([question.prompt, question.options, question.answer])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _options(loaded: Loaded, question: Question, number: int) -> list[Scored]:
    """The options of a question as tokens, each of them checked to be one that can be scored."""
    if len(question.options) < 2:
        raise WorkbookError(f"Question {number} has fewer than two options.")
    if not 0 <= question.answer < len(question.options):
        raise WorkbookError(f"Question {number} names option {question.answer}; they count from 0.")
    if not all(question.options):
        raise WorkbookError(f"Question {number} has an empty option.")
    is_text = isinstance(question.prompt, str)
    prompt = question.prompt if is_text else loaded.format.render(question.prompt)
    start = "" if is_text else loaded.format.reply_start
    before = prompt.rstrip()
    if not before:
        raise WorkbookError(f"Question {number} has an empty prompt.")
    length = len(encode(loaded.tokenizer, before))
    whole = [encode(loaded.tokenizer, prompt + start + option) for option in question.options]
    if any(len(ids) <= length for ids in whole):
        raise WorkbookError(f"Question {number} has an option that is no token of its own after the prompt.")
    check_room(max(map(len, whole)), context_tokens(loaded))
    return [(tuple(ids[:length]), tuple(ids[length:])) for ids in whole]


def _log_likelihoods(model: PreTrainedModel, scored: Sequence[Scored]) -> list[float]:
    """Sum of ln p(token | tokens before it) over the second part of each row, in nats, from one padded forward."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor([*before, *option], device=input_device(model)) for before, option in scored]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    first = min(len(before) for before, _ in scored) - 1
    with inference(model):
        kept = ids.shape[1] - first
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        return [
            _option_sum(row[len(before) - 1 - first :], option)
            for row, (before, option) in zip(logits, scored, strict=True)
        ]


def _option_sum(logits: torch.Tensor, option: Sequence[int]) -> float:
    """The sum over the option's tokens, of which ``logits`` (positions, vocabulary) predict one after the other."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = torch.tensor(option, device=logits.device)
    return -cross_entropy(logits[: len(option)].float(), targets, reduction="sum").item()
