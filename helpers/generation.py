"""One reply, whole, streamed or several at once, with its timings.

All three go the same way: ``transformers`` generates greedily over logits to which a generator of this reply alone has
added the randomness, and every token passes through one ``_Answer``, which turns tokens into text and knows when to
stop. So the pieces of a stream joined are the whole reply, a batch gives what single prompts give, and the random
state of the caller is neither used nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from helpers import decoding as ways
from helpers.decoding import PLAIN, Decoding
from helpers.prompts import PromptTooLong, encode
from helpers.types import FinishReason, Loaded, Message, Reply, Sampling, WorkbookError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[Message]
DECODING_CONTEXT = 5  # prompt tokens decoded with the reply: some tokenizers drop the space of what comes first
DEFAULT_SAMPLING = Sampling()
UNFINISHED = "\ufffd"  # what decoding shows for bytes that are no whole character yet


class Candidate(NamedTuple):
    """One token that may come next, as text, with its probability."""

    text: str
    probability: float
    token_id: int


class StopFilter:
    """Releases text as it arrives, but nothing of a stop string, nor of a beginning that may still become one.

    The stop string that is complete first counts, so the result does not depend on how the text is cut into pieces.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings = tuple(stop_strings)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Takes the next piece of text and returns what may be shown; after a stop that is nothing."""
        if self.stopped:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop)) for stop in self.stop_strings if stop in self._held]
        if found:
            end, negative_length = min(found)
            self.stopped = True
            return self._take(end + negative_length)
        return self._take(len(self._held) - self._possible_beginning())

    def flush(self) -> str:
        """The text held back, once no more can come; nothing after a stop."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _possible_beginning(self) -> int:
        longest = max(map(len, self.stop_strings), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(self._held[-n:]) for s in self.stop_strings)), 0)


def context_tokens(loaded: Loaded) -> int:
    """How many tokens the model's context holds, prompt and reply together."""
    return int(loaded.model.config.max_position_embeddings)


def prompt_text(loaded: Loaded, messages: Sequence[Message], max_new_tokens: int) -> str:
    """The text that ``generate`` gives the model for these messages: rendered, oldest turns left out to fit.

    Room for the reply is kept free: ``max_new_tokens``, but never more than half the context.
    Raises PromptTooLong where the last question alone leaves too little, MessageError for malformed messages.
    """
    context = context_tokens(loaded)
    room = context - min(max_new_tokens, context // 2)
    return loaded.format.render(loaded.format.fit(messages, loaded.tokenizer, room))


def generate(
    loaded: Loaded, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, *, decoding: Decoding = PLAIN
) -> Reply:
    """The whole reply to a text (used as it is) or to messages (rendered in the model's format, fitted to its context).

    It ends at an end token ("end"), before a stop string of the model's format ("stop"), or after
    ``sampling.max_new_tokens`` tokens or with the context full ("length"). Sampling is by temperature, then top-p,
    without the top-k of 50 that transformers adds by default; the same seed gives the same text. A reply to messages
    loses one leading space; the reply to a text continues that text and keeps it. ``decoding``: a faster way to the
    same text (``helpers.decoding``); what must be compiled for it is compiled before the clock starts.
    Raises WorkbookError for an empty prompt, impossible sampling or decoding, PromptTooLong, and MessageError.
    """
    return generate_batch(loaded, [prompt], sampling, decoding=decoding)[0]


def generate_batch(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULT_SAMPLING,
    seeds: Sequence[int] | None = None,
    *,
    decoding: Decoding = PLAIN,
) -> list[Reply]:
    """One reply for each prompt, generated together with left padding.

    Every one is drawn with ``sampling.seed``, or each with its own of ``seeds``: replies to be counted as independent
    draws need seeds of their own. In fp32 the replies equal those of ``generate`` token for token. ``seconds`` of a
    reply is the time to its own last token. Raises as ``generate`` does, and ValueError for too few or many seeds.
    """
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    ways.check(loaded, decoding)
    answers = [_begin(loaded, prompt, sampling) for prompt in prompts]
    if answers:
        _run(loaded, _Watch(answers), sampling, seeds, decoding)
    return [answer.reply() for answer in answers]


def stream(
    loaded: Loaded, prompt: Prompt, sampling: Sampling = DEFAULT_SAMPLING, *, decoding: Decoding = PLAIN
) -> Generator[str, None, Reply]:
    """The text of ``generate``'s reply, in pieces, while it is generated; the generator's value is the Reply.

    Generation runs in a thread. What it raises is raised here; closing this generator, or an interrupt in it, ends
    the thread after the token at hand, or after what had to be compiled.
    Raises at once, before the first piece, as ``generate`` does.
    """
    ways.check(loaded, decoding)
    return _pieces(loaded, _begin(loaded, prompt, sampling), sampling, decoding)


def next_token_probabilities(loaded: Loaded, text: str, k: int = 10, temperature: float = 1.0) -> list[Candidate]:
    """The ``k`` likeliest next tokens after ``text``: softmax of the last logits over the temperature.

    Raises WorkbookError for an empty text, a temperature that is not positive, or a text longer than the context.
    """
    import torch

    if temperature <= 0:
        raise WorkbookError(f"The temperature must be greater than 0 here, but is {temperature}.")
    ids = _checked(loaded, text, encode(loaded.tokenizer, text))
    with inference(loaded.model):
        logits = loaded.model(input_ids=torch.tensor([ids], device=input_device(loaded.model))).logits[0, -1]
    best = torch.softmax(logits.float() / temperature, dim=-1).topk(k)
    return [
        Candidate(_continuation(loaded.tokenizer, ids, [token]), probability, token)
        for probability, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go: the model's device, or the CPU where its first weights are offloaded to disk."""
    import torch

    return torch.device("cpu") if model.device.type == "meta" else model.device


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Inference mode with dropout off; a model that was being trained is set back to training afterwards."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()


class _Answer:
    """One reply as it grows, token by token."""

    def __init__(self, loaded: Loaded, prompt_ids: list[int], limit: int, strip_space: bool) -> None:
        self.prompt_ids, self.limit, self.strip_space = prompt_ids, limit, strip_space
        self.tokenizer, self.end_ids = loaded.tokenizer, end_token_ids(loaded)
        self.stops = StopFilter(loaded.format.stop_strings)
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.first_token_seconds = self.seconds = 0.0
        self.passes = self.proposed = 0
        self._text = self._shown = ""

    def add(self, token: int, seconds: float) -> str:
        """Takes the token generated after so many seconds and returns the text that may be shown now."""
        if self.finish_reason:
            return ""
        self.ids.append(token)
        self.seconds = seconds
        self.first_token_seconds = self.first_token_seconds or seconds
        self.finish_reason = "end" if token in self.end_ids else "length" if len(self.ids) >= self.limit else None
        released = self.stops.feed(self._new_text())
        if self.stops.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason:
            released += self.stops.flush()
        return self._show(released)

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
        text = _continuation(self.tokenizer, self.prompt_ids, ids)
        if not self.finish_reason:
            text = text.rstrip(UNFINISHED)
        new = text[len(self._text) :]
        self._text += new
        return new

    def _show(self, piece: str) -> str:
        if self.strip_space and not self._shown and piece:
            piece, self.strip_space = piece.removeprefix(" "), False
        self._shown += piece
        return piece


class _Watch:
    """A stopping criterion of ``generate`` that sees every token: it feeds the answers, keeps the time and stops.

    Where tokens are proposed, ``generate`` also asks it about proposals that it may not take; there the taken ones
    come through the streamer's methods (``put``, ``end``), several at a time.
    """

    def __init__(self, answers: list[_Answer], on_text: Callable[[str], None] = lambda text: None) -> None:
        self.answers, self.on_text = answers, on_text
        self.cancelled = self.streams = self._prompt_seen = False
        self._started = 0.0

    def start(self, *, streams: bool) -> None:
        """Starts the clock; ``streams``: tokens come through ``put``, the prompt first."""
        self.streams, self._started = streams, perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Takes the tokens of one pass over one sequence; before the first pass, the prompt."""
        if self._prompt_seen:
            self._count_pass()
            for token in value.flatten().tolist():
                self._add([token])
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do at the end."""

    def propose(self, count: int) -> None:
        """Counts tokens that a draft proposed."""
        for answer in self.answers:
            answer.proposed += count

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        import torch

        if not self.streams:
            self._count_pass()
            self._add(input_ids[:, -1].tolist())
        finished = [self.cancelled or answer.finish_reason is not None for answer in self.answers]
        return torch.tensor(finished, device=input_ids.device)

    def _count_pass(self) -> None:
        for answer in self.answers:
            answer.passes += answer.finish_reason is None

    def _add(self, tokens: list[int]) -> None:
        seconds = perf_counter() - self._started
        for answer, token in zip(self.answers, tokens, strict=True):
            if piece := answer.add(token, seconds):
                self.on_text(piece)


class _GumbelNoise:
    """A logits processor after which the largest score is a draw from softmax(scores), one generator a row.

    The Gumbel-max method (Gumbel 1954; Maddison et al. 2014): -log of an exponential variable is Gumbel noise.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        size = scores.shape[-1]
        draws = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in self.generators])
        return scores - draws.log().to(scores.device)


def end_token_ids(loaded: Loaded) -> list[int]:
    """The tokens that end a reply: the tokenizer's, and those the checkpoint's generation settings name."""
    named = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return sorted(ids - {None})


def _begin(loaded: Loaded, prompt: Prompt, sampling: Sampling) -> _Answer:
    _check_sampling(sampling)
    is_text = isinstance(prompt, str)
    text = prompt if is_text else prompt_text(loaded, prompt, sampling.max_new_tokens)
    ids = _checked(loaded, text, encode(loaded.tokenizer, text))
    limit = min(sampling.max_new_tokens, context_tokens(loaded) - len(ids))
    return _Answer(loaded, ids, limit, strip_space=not is_text)


def _checked(loaded: Loaded, text: str, ids: list[int]) -> list[int]:
    if not text or not ids:
        raise WorkbookError("The prompt is empty: give the model at least one word to continue.")
    if len(ids) >= context_tokens(loaded):
        raise PromptTooLong(len(ids), context_tokens(loaded) - 1)
    return ids


def _check_sampling(sampling: Sampling) -> None:
    if sampling.temperature < 0:
        raise WorkbookError(f"temperature must be 0 (greedy) or more, but is {sampling.temperature}.")
    if not 0 < sampling.top_p <= 1:
        raise WorkbookError(f"top_p must be above 0 and at most 1, but is {sampling.top_p}.")
    if sampling.max_new_tokens < 1:
        raise WorkbookError(f"max_new_tokens must be at least 1, but is {sampling.max_new_tokens}.")


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int]) -> str:
    """The text of ``ids`` as it continues the prompt, special tokens included."""
    context = prompt_ids[-DECODING_CONTEXT:]
    before, whole = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (context, [*context, *ids]))
    return whole[len(before) :]


def _processors(sampling: Sampling, seeds: Sequence[int]) -> list:
    if sampling.temperature == 0:
        return []
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(float(sampling.temperature)), TopPLogitsWarper(float(sampling.top_p))]
    return [*warpers, _GumbelNoise(seeds)]


def _left_padded(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest row)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
    return pad_sequence(ids, batch_first=True, padding_value=padding, padding_side="left"), mask


def _run(
    loaded: Loaded,
    watch: _Watch,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    decoding: Decoding = PLAIN,
) -> None:
    """Generates until every answer is finished."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    ends = end_token_ids(loaded)
    padding = next((i for i in (loaded.tokenizer.pad_token_id, *ends) if i is not None), 0)
    ids, mask = (part.to(input_device(loaded.model)) for part in _left_padded(_prompts(watch.answers), padding))
    limit = max(answer.limit for answer in watch.answers)
    path = ways.path_for(decoding, len(ids), greedy=sampling.temperature == 0)
    sizes = {"prompt_tokens": ids.shape[1], "tokens": ids.shape[1] + limit, "on_proposed": watch.propose}
    known = {"do_sample": False, "max_new_tokens": limit, "eos_token_id": ends or None, "pad_token_id": padding}
    streams = path in ("lookup", "speculative")
    with inference(loaded.model):
        ways.warm_up(loaded, path, len(ids), ids.shape[1] + limit)
        options = ways.settings(loaded, decoding, path, len(ids), **sizes)
        watch.start(streams=streams)
        with ways.compiling(loaded, path):
            ways.without_settings(loaded).generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=GenerationConfig(**known, **options.config),
                logits_processor=LogitsProcessorList(_processors(sampling, seeds or [sampling.seed] * len(ids))),
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=watch if streams else None,
                **options.call,
            )


def _prompts(answers: Sequence[_Answer]) -> list[list[int]]:
    return [answer.prompt_ids for answer in answers]


def _pieces(loaded: Loaded, answer: _Answer, sampling: Sampling, decoding: Decoding) -> Generator[str, None, Reply]:
    pieces: SimpleQueue[str | None] = SimpleQueue()
    watch = _Watch([answer], pieces.put)
    with ThreadPoolExecutor(1, thread_name_prefix="generate") as thread:
        work = thread.submit(_run, loaded, watch, sampling, None, decoding)
        work.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from iter(pieces.get, None)
        finally:
            watch.cancelled = True
        work.result()
    return answer.reply()
