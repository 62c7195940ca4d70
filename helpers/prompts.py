"""Messages -> the text a model family was trained on, its stop strings, and fitting the context.

Each format has control strings: the text that begins or ends a turn. Where the content of a message holds one, it is
broken by one space after its first character ("\\nUser:" becomes "\\n User:", "<|im_end|>" becomes "< |im_end|>"), so
that nothing a user or a model writes can forge a turn. All other content stands as it is, line breaks included.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from helpers.types import Message, WorkbookError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class MessageError(WorkbookError):
    """The messages are no conversation: a wrong role, order or content."""


class PromptTooLong(WorkbookError):
    """The prompt takes ``tokens`` tokens, more than the ``max_tokens`` there are."""

    def __init__(self, tokens: int, max_tokens: int) -> None:
        self.tokens, self.max_tokens = tokens, max_tokens
        super().__init__(
            f"The prompt takes {tokens} tokens, but there is room for {max_tokens}: "
            "shorten the question or the system message, or lower max_new_tokens."
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the begin token of tokenizers that add one, never doubled where the text has it."""
    has_begin = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not has_begin, verbose=False)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises MessageError unless an optional system message is followed by user and assistant in turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise MessageError('Give a list of messages, for example [{"role": "user", "content": "Hello"}].')
    for position, message in enumerate(messages):
        _check_message(message, position)
    start = 1 if messages[0]["role"] == "system" else 0
    for position, message in enumerate(messages[start:], start):
        expected = ("user", "assistant")[(position - start) % 2]
        if message["role"] != expected:
            raise MessageError(
                f"Message {position} has the role {message['role']!r} where {expected!r} is due: "
                "at most one system message comes first, then user and assistant take turns."
            )
    if len(messages) == start:
        raise MessageError("The conversation has only a system message: add a user message.")


def _check_message(message: Message, position: int) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise MessageError(f"Message {position} is not a mapping with 'role' and 'content': {message!r}.")
    if message["role"] not in ROLES:
        raise MessageError(f"Message {position} has the role {message['role']!r}; the roles are {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        kind = type(message["content"]).__name__
        raise MessageError(f"The content of message {position} must be a string, but is {kind}.")


@dataclass(frozen=True)
class ChatFormat(ABC):
    """How one family of models writes a conversation.

    ``stop_strings`` end a reply when the model writes them; ``control_strings`` are broken where content holds them.
    ``reply_start`` is what stands between the prompt and the first character of a reply.
    """

    name: ClassVar[str]
    reply_start: ClassVar[str] = ""
    stop_strings: ClassVar[tuple[str, ...]] = ()
    control_strings: ClassVar[tuple[str, ...]] = ()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, ready for the reply unless ``add_generation_prompt`` is false.

        Raises MessageError for malformed messages, and where a reply is due but the last message is one already.
        """
        check_messages(messages)
        if add_generation_prompt and messages[-1]["role"] != "user":
            raise MessageError("The last message is a reply: add a user message, or pass add_generation_prompt=False.")
        safe: list[Message] = [{"role": m["role"], "content": self._escape(m["content"])} for m in messages]
        return self._text(safe, add_generation_prompt)

    def fit(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> Sequence[Message]:
        """The messages whose rendering takes at most ``max_tokens``: whole oldest turns are left out.

        A turn is a user message with its reply. The system message and the last question always stay.
        Raises PromptTooLong when even these take more, MessageError for malformed messages.
        """
        check_messages(messages)
        system = [m for m in messages[:1] if m["role"] == "system"]
        rest = messages[len(system) :]
        asking = rest[-1]["role"] == "user"

        def tokens(dropped: int) -> int:
            return len(encode(tokenizer, self.render([*system, *rest[2 * dropped :]], asking)))

        turns = range((len(rest) + 1) // 2)
        dropped = bisect_left(turns, True, key=lambda turn: tokens(turn) <= max_tokens)
        if dropped == len(turns):
            raise PromptTooLong(tokens(turns[-1]), max_tokens)
        return [*system, *rest[2 * dropped :]]

    def _escape(self, content: str) -> str:
        if not self.control_strings:
            return content
        pattern = "|".join(map(re.escape, self.control_strings))
        return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", content)

    @abstractmethod
    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The rendering of checked and escaped messages."""


@dataclass(frozen=True)
class FalconChat(ChatFormat):
    """Falcon-180B-chat: ``System: ...``, ``User: ...``, ``Falcon: ...``, one newline after each turn.

    Source: the Falcon-180B announcement (Hugging Face, September 2023). No end token stands inside the history.
    """

    name = "falcon-chat"
    reply_start = " "
    stop_strings = ("\nUser:", "\nFalcon:", "\nSystem:")
    control_strings = (*stop_strings, "<|endoftext|>")
    tags: ClassVar[dict[str, str]] = {"system": "System", "user": "User", "assistant": "Falcon"}

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        lines = [f"{self.tags[message['role']]}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("Falcon:" if add_generation_prompt else "")


@dataclass(frozen=True)
class Llama2Chat(ChatFormat):
    """Llama-2-chat: ``[INST]`` around a question, ``<<SYS>>`` around the system message inside the first.

    Source: ``chat_completion`` in Meta's llama repository (2023). Each turn is a sequence of its own, so every turn
    begins with ``<s>`` and every reply ends with ``</s>``; ``encode`` adds no second ``<s>`` in front. Contents are
    stripped, as published. A question ends with ``[/INST]``, so there is no separate generation prompt.
    """

    name = "llama-2"
    reply_start = " "
    stop_strings = ("</s>", "[INST]")
    control_strings = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>")

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        opening = ""
        if messages[0]["role"] == "system":
            opening = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
            messages = messages[1:]
        first = {**messages[0], "content": opening + messages[0]["content"]}
        return "".join(
            f"<s>[INST] {message['content'].strip()} [/INST]"
            if message["role"] == "user"
            else f" {message['content'].strip()} </s>"
            for message in [first, *messages[1:]]
        )


@dataclass(frozen=True)
class ChatMl(ChatFormat):
    """ChatML as SmolLM2-Instruct was trained on it.

    Its template puts the default system message ``SMOLLM_SYSTEM`` first when none is given, and so does this format;
    pass a system message of your own, an empty one perhaps, to replace it.
    """

    name = "chatml"
    stop_strings = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    control_strings = stop_strings

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SMOLLM_SYSTEM}, *messages]
        turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
        return "".join(turns) + ("<|im_start|>assistant\n" if add_generation_prompt else "")


@dataclass(frozen=True)
class Plain(ChatFormat):
    """No format, for base models: the contents alone, one below the other; a single message stands as it is."""

    name = "plain"
    reply_start = "\n"

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return "\n".join(message["content"] for message in messages)


FORMATS: dict[str, ChatFormat] = {form.name: form for form in (FalconChat(), Llama2Chat(), ChatMl(), Plain())}


def format_for(name: str) -> ChatFormat:
    """The chat format of that name. Raises WorkbookError, listing the names, for one that is not known."""
    if name not in FORMATS:
        raise WorkbookError(f"There is no chat format {name!r}; the formats are {', '.join(FORMATS)}.")
    return FORMATS[name]


def published_format_prompt(message: str, history: Sequence[tuple[str, str]], system_prompt: str = "") -> str:
    """The announcement's ``format_prompt``, mistake included: do not use it, use ``format_for("falcon-chat")``.

    Its last line, which adds the new question, stands inside the loop over ``history`` ((question, reply) pairs):
    with an empty history the question is lost, and with two turns or more it is repeated after each.
    """
    opening = f"System: {system_prompt}\n" if system_prompt else ""
    question = f"User: {message}\nFalcon:"
    return opening + "".join(f"User: {asked}\nFalcon: {answered}\n{question}" for asked, answered in history)
