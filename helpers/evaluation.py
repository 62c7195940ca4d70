"""How well a model predicts text: perplexity, multiple choice, and tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import copy
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

from helpers import stats
from helpers.generation import Prompt, context_tokens, inference, input_device
from helpers.prompts import encode
from helpers.types import ROOT, Interval, Loaded, Message, WorkbookError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16
TASKS = ROOT / "notebooks/data/tasks"
Scored = tuple[list[int], list[int]]  # the tokens before an option, and the option's own, which are scored


@dataclass(frozen=True)
class Perplexity:
    """What ``perplexity`` measured. ``tokens`` and ``bytes`` (UTF-8) count the text that was scored.

    nll: the negative log-likelihood of each text, in nats, summed over its tokens; text_tokens: how many those are.
    """

    tokens: int
    bytes: int
    nll: tuple[float, ...]
    text_tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """exp(sum of nll / tokens): every token weighs the same. Comparable between models of one tokenizer."""
        return math.exp(math.fsum(self.nll) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Sum of nll / (ln 2 * bytes): comparable between tokenizers (Gao et al. 2020, The Pile)."""
        return math.fsum(self.nll) / (math.log(2) * self.bytes)


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
    """What ``multiple_choice`` measured: each option's log-likelihood in nats by question, and the right options."""

    log_likelihoods: tuple[tuple[float, ...], ...]
    answers: tuple[int, ...]

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


@dataclass(frozen=True)
class EvaluationRow:
    """One metric of one task, over ``count`` items; ``standard_error`` is the harness' own, None where it has none."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    count: int


@dataclass(frozen=True)
class Evaluation:
    """What lm-evaluation-harness measured; ``version`` is the harness' own.

    log_likelihoods: by task of multiple choice, the log-likelihoods (nats) of each item's options.
    """

    rows: tuple[EvaluationRow, ...]
    log_likelihoods: Mapping[str, tuple[tuple[float, ...], ...]]
    version: str

    def table(self) -> DataFrame:
        """One row for each metric of each task."""
        import pandas as pd

        return pd.DataFrame(self.rows)


def perplexity(loaded: Loaded, texts: Sequence[str], *, max_tokens: int | None = None) -> Perplexity:
    """The perplexity of a model on texts, each starting after the begin token, so that its first token counts too.

    A text longer than the context is cut into windows that advance by half a context: a token is scored once, with
    at least the half context before it. ``max_tokens`` limits the tokens scored in all: the text in which the limit
    falls is cut there, later ones are left out.
    Raises WorkbookError for no texts, an empty text, or a tokenizer without a begin or end token.
    """
    from transformers.utils.logging import tqdm

    if isinstance(texts, str) or not texts or not all(texts):
        raise WorkbookError("Give a list of texts, none of them empty.")
    if max_tokens is not None and max_tokens < 1:
        raise WorkbookError(f"max_tokens must be at least 1, but is {max_tokens}.")
    left = sys.maxsize if max_tokens is None else max_tokens
    rows: list[tuple[float, int, int]] = []
    for text in tqdm(texts, desc="perplexity", unit="text", delay=2, leave=False):
        if left == 0:
            break
        ids, size = _encoded(loaded.tokenizer, text, left)
        rows.append((_nll(loaded.model, ids, context_tokens(loaded)), len(ids) - 1, size))
        left -= len(ids) - 1
    nll, tokens, sizes = zip(*rows, strict=True)
    return Perplexity(sum(tokens), sum(sizes), nll, tokens)


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
    order = sorted(range(len(scored)), key=lambda row: -len(scored[row][0]) - len(scored[row][1]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    values: dict[int, float] = {}
    for batch in tqdm(batches, desc="multiple choice", unit="batch", delay=2, leave=False):
        values |= zip(batch, _log_likelihoods(loaded.model, [scored[row] for row in batch]), strict=True)
    in_order = (values[row] for row in range(len(scored)))
    found = tuple(tuple(next(in_order) for _ in question.options) for question in questions)
    return MultipleChoice(found, tuple(question.answer for question in questions))


def evaluate(loaded: Loaded, tasks: Sequence[str], limit: int | None = None) -> Evaluation:
    """Runs EleutherAI's lm-evaluation-harness over task files of notebooks/data/tasks/, named by their ``task:``.

    ``data_files`` of a task map each split to one file name, relative to the task's file. Questions are asked in the
    model's chat format, and answers begin as its replies do. ``limit`` takes the first items of each task only. Works
    offline; the harness' own command line would not know the chat format. The random state stays as it was.
    Raises WorkbookError for an unknown task, listing the tasks there are, for a limit below 1, or where an item takes
    more tokens than the context.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    if limit is not None and limit < 1:
        raise WorkbookError(f"limit must be at least 1, but is {limit}.")
    bars = _slow_bars_only(lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    with bars, _same_random(), TemporaryDirectory() as cache, inference(loaded.model):
        chosen = _harness_tasks(tasks, cache)
        results = lm_eval.evaluator.evaluate(
            _harness_model(loaded), {"tasks": chosen}, limit=limit, apply_chat_template=True, fewshot_as_multiturn=True
        )
    return Evaluation(
        rows=tuple(row for name in chosen for row in _rows(name, results)),
        log_likelihoods={
            name: tuple(tuple(value for value, _ in item["filtered_resps"]) for item in results["samples"][name])
            for name, task in chosen.items()
            if task.OUTPUT_TYPE == "multiple_choice"
        },
        version=lm_eval.__version__,
    )


def choice_rows(rows: Dataset) -> Dataset:
    """The rows of animal_items.jsonl that are a choice: ``process_docs`` of the harness' task animal_choice."""
    return rows.select([place for place, kind in enumerate(rows["kind"]) if kind == "choice"])


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """(begin, first scored position, end) of each window over ``length`` tokens, with ``context`` of at least 2.

    Position 0, which follows nothing, is never scored; every other position is, exactly once.
    """
    stride = context // 2
    found, scored, begin = [], 1, 0
    while scored < length:
        end = min(begin + context, length)
        found.append((begin, scored, end))
        scored, begin = end, begin + stride
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> tuple[list[int], int]:
    """The begin token with at most ``most`` tokens of the text, and the bytes of the text these cover."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise WorkbookError("The tokenizer has neither a begin nor an end token to start a text with.")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = found["input_ids"]
    covered = text if len(ids) <= most else text[: found["offset_mapping"][most - 1][1]]
    return [begin, *ids[:most]], len(covered.encode())


def _nll(model: PreTrainedModel, ids: list[int], context: int) -> float:
    """Sum of -ln p(token | tokens before it) over all tokens but the first, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.tensor(ids, device=input_device(model))
    parts = []
    with inference(model):
        for begin, scored, end in windows(len(ids), context):
            logits = model(input_ids=tokens[None, begin:end], use_cache=False).logits[0, scored - begin - 1 : -1]
            parts.append(cross_entropy(logits.float(), tokens[scored:end], reduction="sum").item())
    return math.fsum(parts)


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
    _check_room(max(map(len, whole)), context_tokens(loaded))
    return [(ids[:length], ids[length:]) for ids in whole]


def _check_room(tokens: int, context: int) -> None:
    if tokens > context:
        raise WorkbookError(f"A question takes {tokens} tokens with an option, but the context holds {context}.")


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


def _option_sum(logits: torch.Tensor, option: list[int]) -> float:
    """The sum over the option's tokens, of which ``logits`` (positions, vocabulary) predict one after the other."""
    import torch
    from torch.nn.functional import cross_entropy

    targets = torch.tensor(option, device=logits.device)
    return -cross_entropy(logits[: len(option)].float(), targets, reduction="sum").item()


# The bridge to lm-evaluation-harness. Its lower interface, ``evaluator.evaluate``, is used: ``simple_evaluate`` also
# seeds all random generators, asks the hub for the model's commit and collects facts on the machine.


def _harness_tasks(names: Sequence[str], cache: str) -> dict[str, Task]:
    """The tasks by name, their data files read by ``datasets`` through a cache in the folder ``cache``."""
    import datasets
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    if isinstance(names, str) or not names or not set(names) <= set(manager.all_subtasks):
        raise WorkbookError(f"Give a list of tasks, of these: {', '.join(manager.all_subtasks)}; you gave {names!r}.")
    chosen = []
    for name in dict.fromkeys(names):
        entry = manager.task_index[name]
        options = entry.cfg["dataset_kwargs"]
        files = {split: str(entry.yaml_path.parent / file) for split, file in options["data_files"].items()}
        chosen.append({"task": name, "dataset_kwargs": {**options, "data_files": files, "cache_dir": cache}})
    with _no_dataset_bars(datasets):
        return manager.load([{"group": "chosen", "task": chosen}])["tasks"]  # a group's members take overrides


def _harness_model(loaded: Loaded) -> HFLM:
    """The model as the harness sees it, in its chat format.

    The harness sets a padding token and ties the output layer to the embeddings where the configuration says so, even
    if the checkpoint has an output layer of its own: it gets copies (the weights are shared) that keep it from both.
    """
    from lm_eval.models.huggingface import HFLM

    class ChatModel(HFLM):
        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            return loaded.format.render(chat_history, add_generation_prompt)

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            start = loaded.format.reply_start
            asked = [replace(one, arguments=(one.args[0], start + one.args[1])) for one in requests]
            return super().loglikelihood(asked, disable_tqdm)

        def _loglikelihood_tokens(self, requests: list, **options: Any) -> list[tuple[float, bool]]:
            given = max(len(before) + len(reply) - 1 for _, before, reply in requests)  # the last is only predicted
            _check_room(given, self.max_length)
            return super()._loglikelihood_tokens(requests, **options)

    model = copy.copy(loaded.model)
    model.tie_weights = lambda: None
    with _only_errors(logging.getLogger("lm_eval")):
        harness = ChatModel(
            pretrained=model,
            tokenizer=copy.deepcopy(loaded.tokenizer),
            backend="causal",
            batch_size=BATCH_SIZE,
            max_length=context_tokens(loaded),
            softmax_dtype="float32",
        )
    harness._device = input_device(loaded.model)
    return harness


def _rows(task: str, results: Mapping[str, Any]) -> list[EvaluationRow]:
    """The metrics of one task: the harness keys each "metric,filter", and its error "metric_stderr,filter"."""
    values, count = results["results"][task], results["n-samples"][task]["effective"]
    rows = []
    for key in values:
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            rows.append(EvaluationRow(task, metric, values[key], error if isinstance(error, float) else None, count))
    return rows


@contextmanager
def _slow_bars_only(*modules: ModuleType) -> Iterator[None]:
    """The progress bars of the harness' modules show after two seconds only, and go when done, as all others here."""
    from transformers.utils.logging import tqdm

    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = partial(tqdm, delay=2, leave=False)
    try:
        yield
    finally:
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar


@contextmanager
def _same_random() -> Iterator[None]:
    """Python's random state is the same afterwards: the harness draws a name for each task, which it may not need."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def _no_dataset_bars(datasets: ModuleType) -> Iterator[None]:
    """``datasets`` reads the small local files without progress bars."""
    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    """Without the harness' warnings that a model object, not a name, was passed: that is meant."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
