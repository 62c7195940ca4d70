"""Generate replies: one, a batch or a stream, each with its timings.

All three share one path: ``transformers`` generates greedily over logits to which a random generator of this reply
alone has added noise, and every token passes through one ``_Answer``, which turns tokens into text and decides when to
stop. Therefore the joined pieces of a stream equal the whole reply, a batch equals single prompts, and the caller's
random state is neither used nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, cast

from helpers.base.errors import WorkbookError, check_whole
from helpers.base.text import is_blank
from helpers.generation.decoding import (
    PLAIN,
    Size,
    _applicable,
    _check,
    compiling,
    configure,
    generate_method,
    warm_up,
    without_settings,
)
from helpers.generation.sampling import DEFAULT_SAMPLING, Reply, Sampling, _check_sampling, _processors
from helpers.generation.stops import UNFINISHED, _check_stop, _Edges, _StopFilter
from helpers.models.finite import NotFiniteFoundError, all_finite, explained
from helpers.models.formats import Message, MessageError, PromptTooLong, spoken
from helpers.models.loaded import context_tokens, inference, input_device
from helpers.models.tokens import encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from helpers.generation.decoding import Decoding
    from helpers.generation.sampling import FinishReason
    from helpers.models.loaded import Loaded

DECODING_CONTEXT = 5  # prompt tokens decoded with the reply: some tokenizers drop the space of the first token
_CHARACTER_BYTES = 4  # of the longest characters in UTF-8


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as the token ids that the model is given; the reply is treated as one to messages."""

    ids: tuple[int, ...]


Prompt = str | Sequence[Message] | EncodedConversation


class Candidate(NamedTuple):
    """A possible next token as text, with its probability."""

    text: str
    probability: float
    token_id: int


def generate(
    loaded: Loaded, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, *, decoding: Decoding = PLAIN
) -> Reply:
    """Generate the reply to a text, used as it is, or to messages, encoded in the model's format to fit its context.

    It ends at an end token ("end"), before a stop string of the model's format ("stop"), or after
    ``sampling.max_new_tokens`` tokens or when the context is full ("length"). Sampling applies the temperature, then
    top-p, without the top-k of 50 that transformers adds by default; the same seed gives the same text. A reply to
    messages loses the white space around it; the reply to a text continues that text and keeps it. A character whose
    last bytes are missing is left out of both. Turns with a blank reply are not shown to the model. ``decoding`` is a
    faster strategy for the same text (``helpers.generation.decoding``); it compiles what it needs before the clock
    starts.
    Raises WorkbookError for an empty prompt or an invalid sampling or decoding, PromptTooLong, and MessageError.
    """
    return generate_batch(loaded, [prompt], sampling, decoding=decoding)[0]


def generate_batch(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULT_SAMPLING,
    seeds: Sequence[int] | None = None,
    *,
    decoding: Decoding = PLAIN,
    stop: Sequence[str] = (),
) -> list[Reply]:
    """Generate one reply for each prompt, all together with left padding. ``stop``: further stop strings.

    All are drawn with ``sampling.seed``, or prompt by prompt with ``seeds``: replies that are to be counted as
    independent draws need different seeds. In fp32 the replies equal those of ``generate`` token for token. The
    ``seconds`` of a reply end at its own last token. Raises as ``generate`` does, WorkbookError for prompts or stop
    strings that are a single text, and ValueError if the number of seeds is not the number of prompts.
    """
    if isinstance(prompts, str):
        raise WorkbookError("Give a list of prompts, or one prompt to generate.")
    seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"There are {len(seeds)} seeds for {len(prompts)} prompts. Give one seed for each prompt.")
    _check(loaded, decoding)
    _check_stop(stop)
    _check_sampling(sampling, seeds)
    answers = [_begin(loaded, prompt, sampling, stop) for prompt in prompts]
    if answers:
        _run(loaded, _Watch(answers), sampling, seeds, decoding)
    return [answer.reply() for answer in answers]


def stream(
    loaded: Loaded, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, *, decoding: Decoding = PLAIN
) -> Generator[str, None, Reply]:
    """Yield the text of ``generate``'s reply in pieces while it is generated; the generator's value is the Reply.

    Generation runs in a thread, whose errors are raised here. If this generator is closed or interrupted, the thread
    ends after the current token, or after a compilation that is under way.
    Raises as ``generate`` does, at once and not with the first piece.
    """
    _check(loaded, decoding)
    return _pieces(loaded, _begin(loaded, prompt, sampling), sampling, decoding)


def next_token_probabilities(loaded: Loaded, text: str, k: int = 10, temperature: float = 1.0) -> list[Candidate]:
    """The ``k`` most likely next tokens after ``text``: the softmax of the last logits divided by the temperature.

    Raises WorkbookError for an empty text, a temperature that is not positive, a ``k`` that is not a whole number from
    1 to the size of the vocabulary, or a text longer than the context.
    """
    import torch

    if not 0 < temperature < math.inf:
        raise WorkbookError(f"The temperature must be greater than 0 here, and finite, but is {temperature}.")
    _check_sampling(Sampling(temperature))
    check_whole("k", k, most=int(loaded.model.config.vocab_size))
    ids = _prompt_ids(loaded, text)
    with inference(loaded.model):
        logits = loaded.model(input_ids=torch.tensor([ids], device=input_device(loaded.model))).logits[0, -1]
    with explained(loaded):
        if not all_finite(logits):
            raise NotFiniteFoundError([ids])
    best = torch.softmax(logits.float() / temperature, dim=-1).topk(k)
    context = _decoding_context(loaded.tokenizer, ids)
    candidates = []
    for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        candidates.append(Candidate(_continuation(loaded.tokenizer, context, [token]), probability, token))
    return candidates


class _Answer:
    """One reply that grows token by token."""

    def __init__(
        self, loaded: Loaded, prompt_ids: list[int], limit: int, *, strip: bool, stop: Sequence[str] = ()
    ) -> None:
        self.prompt_ids, self.limit = prompt_ids, limit
        self.tokenizer, self.end_ids = loaded.tokenizer, _end_token_ids(loaded)
        self.context = _decoding_context(loaded.tokenizer, prompt_ids)
        self.stops, self.edges = _StopFilter((*loaded.format.stop_strings, *stop)), _Edges(strip=strip)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_seconds = self.seconds = 0.0
        self.passes = self.proposed = 0
        self._text = self._shown = ""

    def add(self, token: int, seconds: float) -> str:
        """Take the token generated after ``seconds`` and return the text that may be shown now."""
        if self.finish_reason:
            return ""
        self.ids.append(token)
        self.seconds = seconds
        self.first_token_seconds = self.first_token_seconds or seconds
        if token in self.end_ids:
            self.finish_reason = "end"
        elif len(self.ids) >= self.limit:
            self.finish_reason = "length"
        released = self.stops.feed(self._new_text())
        # a stop string counts even if its last token is also the end token or the last one allowed
        if self.stops.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason:
            released += self.stops.flush()
        piece = self.edges.feed(released)
        self._shown += piece
        return piece

    def reply(self) -> Reply:
        """The finished reply."""
        assert self.finish_reason is not None
        return Reply(
            text=self._shown,
            tokens=len(self.ids),
            seconds=self.seconds,
            first_token_seconds=self.first_token_seconds,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt_ids),
            token_ids=tuple(self.ids),
            passes=self.passes,
            proposed=self.proposed,
        )

    def _new_text(self) -> str:
        ids = self.ids[:-1] if self.finish_reason == "end" else self.ids
        # a character may be cut between two tokens: show it when its last byte has come
        text = _continuation(self.tokenizer, self.context, ids).rstrip(UNFINISHED)
        new = text[len(self._text) :]
        self._text += new
        return new


class _Watch:
    """A stopping criterion of ``generate`` that sees every token: it feeds the answers, keeps the time and stops.

    With proposed tokens, ``generate`` also asks it about proposals that may be rejected. The accepted tokens then come
    through the methods of a streamer (``put``, ``end``), several at a time.
    """

    def __init__(self, answers: list[_Answer], on_text: Callable[[str], None] = lambda _text: None) -> None:
        self.answers, self.on_text = answers, on_text
        self.cancelled = self.streams = self._prompt_seen = False
        self._started = 0.0

    def start(self, *, streams: bool) -> None:
        """Start the clock. With ``streams``, tokens come through ``put``, the prompt first."""
        self.streams, self._started = streams, perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the tokens of one pass over one sequence; before the first pass, the prompt."""
        if self._prompt_seen:
            self._count_pass()
            for token in value.flatten().tolist():
                self._add([token])
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing: a streamer must have this method."""

    def propose(self, count: int) -> None:
        """Count tokens that a draft proposed."""
        for answer in self.answers:
            answer.proposed += count

    def __call__(self, input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        import torch

        if not self.streams:
            self._count_pass()
            self._add(input_ids[:, -1].tolist())
        finished = [self.cancelled or answer.finish_reason is not None for answer in self.answers]
        return torch.tensor(finished, device=input_ids.device)

    def _count_pass(self) -> None:
        for answer in self.answers:
            if answer.finish_reason is None:
                answer.passes += 1

    def _add(self, tokens: list[int]) -> None:
        seconds = perf_counter() - self._started
        for answer, token in zip(self.answers, tokens, strict=True):
            if piece := answer.add(token, seconds):
                self.on_text(piece)


def _end_token_ids(loaded: Loaded) -> list[int]:
    """The tokens that end a reply: the tokenizer's, and those of the checkpoint's generation settings."""
    named = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id}
    if isinstance(named, list):
        ids.update(named)
    else:
        ids.add(named)
    return sorted(ids - {None})


def _begin(loaded: Loaded, prompt: Prompt, sampling: Sampling, stop: Sequence[str] = ()) -> _Answer:
    _check_sampling(sampling)
    ids = _prompt_ids(loaded, prompt, sampling.max_new_tokens)
    limit = min(sampling.max_new_tokens, context_tokens(loaded) - len(ids))
    return _Answer(loaded, ids, limit, strip=not isinstance(prompt, str), stop=stop)


def _fitting(loaded: Loaded, messages: Sequence[Message], max_new_tokens: int) -> Sequence[Message]:
    """The messages that ``generate`` shows the model: no blank replies, and not the oldest turns if they are too long.

    The reply gets ``max_new_tokens`` of the context, but never more than half of it. Raises PromptTooLong if the last
    question alone is too long, MessageError for malformed messages.
    """
    context = context_tokens(loaded)
    prompt_tokens = context - min(max_new_tokens, context // 2)
    loaded.format.check(messages)
    return loaded.format.fit(spoken(messages), loaded.tokenizer, prompt_tokens)


def _prompt_ids(loaded: Loaded, prompt: Prompt, max_new_tokens: int = 1) -> list[int]:
    """Token ids of a prompt. Raises as ``generate`` does; PromptTooLong if no token of a reply fits."""
    if isinstance(prompt, str):
        ids = encode(loaded.tokenizer, prompt) if prompt else []
    elif isinstance(prompt, EncodedConversation):
        ids = list(prompt.ids)
    else:
        messages = _fitting(loaded, prompt, max_new_tokens)
        if messages[-1]["role"] == "user" and is_blank(messages[-1]["content"]):
            raise MessageError("The question is blank. Ask something.")
        ids = loaded.format.encode(loaded.tokenizer, messages)
    if not ids:
        raise WorkbookError("The prompt is empty. Give the model at least one word to continue.")
    if len(ids) >= context_tokens(loaded):
        raise PromptTooLong(len(ids), context_tokens(loaded) - 1)
    return ids


def _continuation(tokenizer: PreTrainedTokenizerBase, context: list[int], ids: list[int]) -> str:
    """The text of ``ids`` as it continues the last tokens of a prompt, special tokens included."""
    before = cast("str", tokenizer.decode(context, clean_up_tokenization_spaces=False))
    whole = cast("str", tokenizer.decode([*context, *ids], clean_up_tokenization_spaces=False))
    return whole[len(before) :]


def _decoding_context(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> list[int]:
    """The last tokens of a prompt, from one that begins a character.

    If the first token were inside a character, a decoder with byte fallback would take all bytes after it for broken.
    """
    contexts = []
    for size in range(DECODING_CONTEXT, DECODING_CONTEXT + _CHARACTER_BYTES):
        context = prompt_ids[-size:]
        broken = tokenizer.decode(context, clean_up_tokenization_spaces=False).count(UNFINISHED)
        if not broken:
            return context
        contexts.append((broken, size, context))
    # The prompt itself holds the character that stands for broken ones: the fewest are the whole ones.
    return min(contexts)[2]


def _left_padded(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest row)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"), mask


def _padding(loaded: Loaded, ends: Sequence[int]) -> int:
    """The token that fills short rows: the tokenizer's, else an end token, else 0. The mask hides it."""
    for token in (loaded.tokenizer.pad_token_id, *ends):
        if token is not None:
            return int(token)
    return 0


def _run(loaded: Loaded, watch: _Watch, sampling: Sampling, seeds: Sequence[int], decoding: Decoding) -> None:
    """Generate until every answer is finished."""
    from transformers import GenerationConfig, StoppingCriteriaList

    ends = _end_token_ids(loaded)
    padding = _padding(loaded, ends)
    ids, mask = _left_padded([answer.prompt_ids for answer in watch.answers], padding)
    device = input_device(loaded.model)
    limit = max(answer.limit for answer in watch.answers)
    size = Size(rows=len(ids), prompt_tokens=ids.shape[1], tokens=ids.shape[1] + limit)
    decoding = _applicable(decoding, size.rows, greedy=sampling.temperature == 0)
    config = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=ends or None, pad_token_id=padding)
    with inference(loaded.model):
        warm_up(loaded, decoding, size)
        options = configure(loaded, decoding, size, config, watch.propose)
        watch.start(streams=decoding.proposes)
        models = [loaded, decoding.draft] if decoding.draft else [loaded]
        with compiling(loaded, decoding), explained(*models):
            generate_method(without_settings(loaded))(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=_processors(sampling, seeds),
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=watch if decoding.proposes else None,
                past_key_values=options.cache,
                assistant_model=options.draft,
            )


def _pieces(loaded: Loaded, answer: _Answer, sampling: Sampling, decoding: Decoding) -> Generator[str, None, Reply]:
    pieces: SimpleQueue[str | None] = SimpleQueue()
    watch = _Watch([answer], pieces.put)
    with ThreadPoolExecutor(1, thread_name_prefix="generate") as thread:
        work = thread.submit(_run, loaded, watch, sampling, [sampling.seed], decoding)
        # None marks the end of the stream, also after an error
        work.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from iter(pieces.get, None)
        finally:
            watch.cancelled = True
        work.result()
    return answer.reply()
