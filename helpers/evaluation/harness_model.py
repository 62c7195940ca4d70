"""The model as lm-evaluation-harness sees it: plain text as the harness encodes it, or the model's own chat format."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers.base.errors import WorkbookError
from helpers.evaluation.options import _check_length
from helpers.generation.generating import EncodedConversation, generate_batch
from helpers.generation.sampling import FiniteLogits, Sampling
from helpers.models.finite import check_sums
from helpers.models.formats import PromptTooLong
from helpers.models.loaded import context_tokens, input_device
from helpers.models.tokens import document_token, literal_tokens
from helpers.models.workarounds.lm_eval_model import logits_without_cache, untied_copy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from helpers.models.formats import ChatFormat, Message
    from helpers.models.loaded import Loaded

_Request = tuple[object, list[int], list[int]]  # what the harness asked, and the tokens before the reply and of it


def _harness_model(loaded: Loaded, chat: bool, batch_size: int, truncate: bool) -> HFLM:
    """The model as the harness sees it, in its chat format; ``truncated`` counts the requests that were shortened.

    The harness sets a padding token and ties the output layer to the embeddings if the configuration says so, even
    if the checkpoint has an output layer of its own: it gets copies (the weights are shared) that keep it from both.
    """
    model_class = _harness_class(loaded, truncate)
    begin = document_token(loaded.tokenizer)
    return (_chat_class(model_class, loaded) if chat else model_class)(
        pretrained=untied_copy(loaded.model),
        tokenizer=copy.deepcopy(loaded.tokenizer),
        backend="causal",
        batch_size=batch_size,
        max_length=context_tokens(loaded),
        softmax_dtype="float32",
        # Of a chat model, the harness would take the token that opens a turn.
        prefix_token_id=None if begin is None else loaded.tokenizer.get_vocab()[begin],
    )


def _checked_class() -> type[HFLM]:
    """The harness' own model, which takes no number that is not finite for a result."""
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):  # type: ignore[misc]  # the harness has no types
        def _loglikelihood_tokens(self, requests: list[_Request], *given: Any) -> list[tuple[float, bool]]:
            results: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *given)
            check_sums([value for value, _ in results], [[*before, *reply] for _, before, reply in requests])
            return results

        def _model_generate(self, *given: Any, **settings: Any) -> torch.Tensor:
            ids: torch.Tensor = super()._model_generate(*given, logits_processor=[FiniteLogits()], **settings)
            return ids

        # A causal model gets no mask and no labels, which the harness passes to others.
        def _model_call(self, inps: torch.Tensor, **_: None) -> torch.Tensor:
            return logits_without_cache(self.model, inps)

    return Checked


def _harness_class(loaded: Loaded, truncate: bool) -> type[HFLM]:
    class Model(_checked_class()):  # type: ignore[misc]  # the harness has no types
        truncated = 0

        @property
        def device(self) -> torch.device:
            # The harness would put its inputs on the device of its own choice, not on that of the model's first layer.
            return input_device(loaded.model)

        def _loglikelihood_tokens(
            self, requests: list[_Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            self.truncated += _count_too_long(self.max_length, requests, truncate)
            results: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return results

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            self._checked_rooms(requests)
            replies: list[str] = super().generate_until(requests, disable_tqdm)
            return replies

        def _checked_rooms(self, requests: list[Instance]) -> list[int]:
            # The harness would shorten a long prompt without a word.
            rooms = _prompt_rooms(self.max_length, requests)
            sizes = [len(self.tok_encode(request.args[0])) for request in requests]
            self.truncated += _count_long_prompts(sizes, rooms, truncate)
            return rooms

    return Model


def _chat_class(base: type[HFLM], loaded: Loaded) -> type[HFLM]:
    """The same, asked in the model's chat format: prompts are encoded by it, and replies are those of ``generate``."""

    begun: set[str] = set()  # prompts that hold the beginning of the reply (the harness' gen_prefix)

    class ChatModel(base):  # type: ignore[misc]  # the harness has no types
        def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
            form = loaded.format
            if add_generation_prompt:
                return form.render(chat_history)
            *asked, reply = chat_history
            text = form.render(asked) + form.reply_start + form.escape(reply["content"])
            begun.add(text)
            return text

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            # Without special tokens, the harness asks for a text without a prompt.
            alone = add_special_tokens is False
            tokenizer = loaded.tokenizer
            tokens = literal_tokens(tokenizer, string) if alone else loaded.format.tokens(tokenizer, string)
            return [token.id for token in tokens]

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            asked = [_begun(request, loaded.format, begun) for request in requests]
            results: list[tuple[float, bool]] = super().loglikelihood(asked, disable_tqdm)
            return results

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            return _replies(loaded, requests, self._checked_rooms(requests), self.batch_size)

    return ChatModel


def _replies(loaded: Loaded, requests: Sequence[Instance], rooms: Sequence[int], batch_size: int) -> list[str]:
    """The replies of ``generate``, which also end at the task's own stop strings."""
    replies: list[str] = []
    for start in range(0, len(requests), batch_size):
        batch = zip(requests[start : start + batch_size], rooms[start : start + batch_size], strict=True)
        # The requests of one task have the same settings, but those of several tasks may come together.
        for settings, same in itertools.groupby(batch, key=lambda pair: pair[0].args[1]):
            encoded = [_conversation(loaded, request.args[0], room) for request, room in same]
            sampling, stop = _sampling(settings)
            seeds = range(len(replies), len(replies) + len(encoded))
            replies += [reply.text for reply in generate_batch(loaded, encoded, sampling, seeds, stop=stop)]
    return replies


def _conversation(loaded: Loaded, text: str, room: int) -> EncodedConversation:
    """A rendered conversation as token ids, of which the last ``room`` are kept."""
    tokens = loaded.format.tokens(loaded.tokenizer, text)
    return EncodedConversation(tuple(token.id for token in tokens[-room:]))


def _sampling(settings: Mapping[str, object]) -> tuple[Sampling, list[str]]:
    """A task's ``generation_kwargs`` as the workbook's settings, and its stop strings. Raises WorkbookError."""
    options = _options(settings)
    stop = [text for text in options.pop("until") if text]
    temperature, top_p = options.pop("temperature", 0.0), options.pop("top_p", 1.0)
    tokens, do_sample = options.pop("max_gen_toks"), options.pop("do_sample")
    if options:
        raise WorkbookError(
            f"A task in chat format sets {', '.join(sorted(options))} in its generation_kwargs, which `generate` does "
            "not know. Leave it out, or take chat: true out of the task's metadata."
        )
    return Sampling(temperature if do_sample else 0.0, top_p, tokens), stop


def _options(settings: Mapping[str, object]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` in the harness' own form: ``until`` is a list, ``max_gen_toks`` is there."""
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(dict(settings)))


def _prompt_rooms(context: int, requests: Sequence[Instance]) -> list[int]:
    """How many tokens each prompt may take. Raises WorkbookError if a task wants replies as long as the context."""
    rooms = []
    for request in requests:
        new_tokens = _options(request.args[1])["max_gen_toks"]
        if new_tokens >= context:
            raise WorkbookError(
                f"A task asks for {new_tokens} new tokens, but the context holds {context}. "
                "Set a smaller max_gen_toks in its generation_kwargs."
            )
        rooms.append(context - new_tokens)
    return rooms


def _count_long_prompts(sizes: Sequence[int], rooms: Sequence[int], truncate: bool) -> int:
    """How many prompts leave no room for the reply. Raises PromptTooLong for one, unless ``truncate``."""
    too_long = [(size, room) for size, room in zip(sizes, rooms, strict=True) if size > room]
    if too_long and not truncate:
        raise PromptTooLong(*max(too_long))
    return len(too_long)


def _begun(request: Instance, form: ChatFormat, begun: Collection[str]) -> Instance:
    """The request with what the chat format writes before a reply, unless the prompt holds a reply's beginning."""
    prompt, reply = request.args
    start = "" if prompt in begun else form.reply_start
    return replace(request, arguments=(prompt, start + form.escape(reply)))


def _count_too_long(context: int, requests: Sequence[_Request], truncate: bool) -> int:
    """How many requests take more tokens than the context holds. Raises WorkbookError for one, unless ``truncate``."""
    too_long = []
    for _, before, reply in requests:
        # The last token of a reply is only predicted, never read.
        size = len(before) + len(reply) - 1
        if size > context:
            too_long.append(size)
    if too_long and not truncate:
        _check_length(max(too_long), context)
    return len(too_long)
