"""How a chat model writes a conversation: its text and token ids, where a reply stops, what fits into the context.

``format_for`` gives the format of a name. Each is a subclass of ``ChatFormat`` and says where it was published.
"""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

from helpers.base.errors import WorkbookError, choose
from helpers.base.text import is_blank, well_formed
from helpers.models.tokens import Token, _conversation_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Message(TypedDict):
    """One message of a conversation, in the form chat libraries share."""

    role: Literal["system", "user", "assistant"]
    content: str


ROLES = ("system", "user", "assistant")
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class MessageError(WorkbookError):
    """The messages are not a conversation: a role, the order or a content is wrong."""


class PromptTooLong(WorkbookError):  # noqa: N818, it says what happened, as Python's StopIteration does
    """The prompt takes ``tokens`` tokens, but only ``max_tokens`` fit."""

    def __init__(self, tokens: int, max_tokens: int) -> None:
        self.tokens, self.max_tokens = tokens, max_tokens
        super().__init__(
            f"The prompt takes {tokens} tokens, but there is room for {max_tokens}. "
            "Shorten the question or the system message, or lower max_new_tokens."
        )


@dataclass(frozen=True)
class ChatFormat(ABC):
    """How one family of models writes a conversation.

    ``stop_strings`` end a reply when the model writes them; ``control_strings`` are broken if content holds them.
    ``control_tokens`` are those of them that are one token each, and ``turn_begin`` is the one that makes each turn a
    sequence of its own. ``generation_prompt`` ends a prompt, and ``reply_start`` is what the model writes before the
    first character of its reply.
    """

    name: ClassVar[str]
    generation_prompt: ClassVar[str] = ""
    reply_start: ClassVar[str] = ""
    stop_strings: ClassVar[tuple[str, ...]] = ()
    control_strings: ClassVar[tuple[str, ...]] = ()
    control_tokens: ClassVar[tuple[str, ...]] = ()
    turn_begin: ClassVar[str] = ""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one text, ready for the reply unless ``add_generation_prompt`` is false.

        Raises MessageError for malformed messages, and if a reply is due but the last message is one already.
        """
        self.check(messages)
        if add_generation_prompt and messages[-1]["role"] != "user":
            raise MessageError("The last message is a reply. Add a user message, or pass add_generation_prompt=False.")
        escaped: list[Message] = []
        for message in messages:
            escaped.append({"role": message["role"], "content": self.escape(message["content"])})
        text = self._text(escaped)
        if add_generation_prompt:
            text += self.generation_prompt
        return text

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of ``render``'s text: control tokens where the format writes them, and nowhere in a content.

        They begin with the begin token if the tokenizer adds one. Raises as ``render`` does.
        """
        return [token.id for token in self.tokens(tokenizer, self.render(messages, add_generation_prompt))]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[Token]:
        """The tokens of a text that ``render`` gave, which an escaped reply may follow, with their positions in it."""
        return _conversation_tokens(tokenizer, text, self.control_tokens, self.turn_begin)

    def check(self, messages: Sequence[Message]) -> None:
        """Raise MessageError unless an optional system message is followed by user and assistant in turn."""
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise MessageError('Give a list of messages, for example [{"role": "user", "content": "Hello"}].')
        for position, message in enumerate(messages):
            _check_message(message, position)
        start = 1 if messages[0]["role"] == "system" else 0
        for position, message in enumerate(messages[start:], start):
            expected = ("user", "assistant")[(position - start) % 2]
            if message["role"] != expected:
                raise MessageError(
                    f"Message {position} has the role {message['role']!r}, but {expected!r} is expected: "
                    "at most one system message comes first, then user and assistant take turns."
                )
        if len(messages) == start:
            raise MessageError("The conversation has only a system message. Add a user message.")

    def fit(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_tokens: int
    ) -> Sequence[Message]:
        """The messages without the oldest turns, as few as possible, so that they take at most ``max_tokens``.

        A turn is a user message with its reply. The system message and the last question always stay.
        Raises PromptTooLong if even these take more, MessageError for malformed messages.
        """
        self.check(messages)
        system = list(messages[:1]) if messages[0]["role"] == "system" else []
        rest = messages[len(system) :]
        asking = rest[-1]["role"] == "user"

        def tokens_without(turns: int) -> int:
            return len(self.encode(tokenizer, [*system, *rest[2 * turns :]], asking))

        # Bisection, because long histories are slow to encode and fewer turns never take more tokens.
        turns = range((len(rest) + 1) // 2)
        dropped = bisect_left(turns, True, key=lambda count: tokens_without(count) <= max_tokens)
        if dropped == len(turns):
            raise PromptTooLong(tokens_without(turns[-1]), max_tokens)
        return [*system, *rest[2 * dropped :]]

    def escape(self, content: str) -> str:
        """A content in which a space breaks each control string, so that it forges no turn."""
        if not self.control_strings:
            return content
        pattern = "|".join(map(re.escape, self.control_strings))
        return re.sub(pattern, lambda match: f"{match[0][0]} {match[0][1:]}", content)

    @abstractmethod
    def _text(self, messages: Sequence[Message]) -> str:
        """The rendering of checked and escaped messages, without the generation prompt."""


def spoken(messages: Sequence[Message]) -> list[Message]:
    """The messages of a checked conversation without the turns whose reply is blank: no model was trained on such."""
    kept: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and is_blank(message["content"]):
            kept.pop()  # the question
        else:
            kept.append(message)
    return kept


def _check_message(message: Message, position: int) -> None:
    # reprlib shortens: a value may be as long and as deep as its file.
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise MessageError(f"Message {position} is not a mapping with 'role' and 'content': {reprlib.repr(message)}.")
    if message["role"] not in ROLES:
        role = reprlib.repr(message["role"])
        raise MessageError(f"Message {position} has the role {role}; the roles are {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        kind = type(message["content"]).__name__
        raise MessageError(f"The content of message {position} must be a string, but is {kind}.")
    if not well_formed(message["content"]):
        raise MessageError(
            f"The content of message {position} holds half of a surrogate pair, which is no character. Remove it."
        )


@dataclass(frozen=True)
class _FalconChat(ChatFormat):
    """Falcon-180B-chat: ``System: ...``, ``User: ...``, ``Falcon: ...``, one newline after each turn.

    Source: the Falcon-180B announcement (Hugging Face, September 2023); as in its demo, an empty system message is left
    out. The history contains no end token. The stop strings `` User:`` and ``###`` are those of easyllm (Hugging Face's
    P. Schmid, 2023) for this model.
    """

    name = "falcon-chat"
    generation_prompt = "Falcon:"
    reply_start = " "
    stop_strings = ("\nUser:", "\nFalcon:", "\nSystem:", " User:", "###", "<|endoftext|>")
    # Not " User:" and "###": these open no turn, and users write headings.
    control_strings = ("\nUser:", "\nFalcon:", "\nSystem:", "<|endoftext|>")
    control_tokens = ("<|endoftext|>",)
    tags: ClassVar[dict[str, str]] = {"system": "System", "user": "User", "assistant": "Falcon"}

    def _text(self, messages: Sequence[Message]) -> str:
        lines = _without_blank_system(messages)
        return "".join(f"{self.tags[message['role']]}: {message['content']}\n" for message in lines)


@dataclass(frozen=True)
class _FalconInstruct(ChatFormat):
    """falcon-7b-instruct: the system message, then ``User: ...`` and ``Assistant: ...``, each after a blank line.

    Source: the chat template in the model's tokenizer_config.json (tiiuae/falcon-7b-instruct), which is FastChat's
    "falcon". Contents are stripped and lose their blank lines, as published: a blank line separates turns.
    """

    name = "falcon-instruct"
    generation_prompt = "\n\nAssistant:"
    reply_start = " "
    stop_strings = ("\nUser:", "\nAssistant:", "<|endoftext|>")
    control_strings = stop_strings
    control_tokens = ("<|endoftext|>",)
    tags: ClassVar[dict[str, str]] = {"user": "User", "assistant": "Assistant"}

    def _text(self, messages: Sequence[Message]) -> str:
        text = ""
        for message in messages:
            content = message["content"].strip()
            if message["role"] == "system":
                # It begins the text, where a tag would open a turn.
                text = self.escape(f"\n{content}")[1:]
            else:
                content = content.replace("\r\n", "\n").replace("\n\n", "\n")
                text += f"\n\n{self.tags[message['role']]}: {content}"
        return text


@dataclass(frozen=True)
class _Llama2Chat(ChatFormat):
    """Llama-2-chat: ``[INST]`` around a question, ``<<SYS>>`` around the system message inside the first.

    Source: ``chat_completion`` in Meta's llama repository (2023). Each turn is a sequence of its own, so every turn
    begins with ``<s>`` and every reply ends with ``</s>``. Contents are stripped, and an empty system message is
    written, as published. A question ends with ``[/INST]``, so there is no separate generation prompt.
    """

    name = "llama-2"
    reply_start = " "
    stop_strings = ("</s>", "[INST]")
    control_strings = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>")
    control_tokens = ("<s>", "</s>")
    turn_begin = "<s>"

    def _text(self, messages: Sequence[Message]) -> str:
        text = opening = ""
        for message in messages:
            if message["role"] == "system":
                opening = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
            elif message["role"] == "user":
                # The system message is part of the first question, and is stripped together with it.
                text += f"<s>[INST] {(opening + message['content']).strip()} [/INST]"
                opening = ""
            else:
                text += f" {message['content'].strip()} </s>"
        return text


@dataclass(frozen=True)
class _ChatMl(ChatFormat):
    """ChatML as SmolLM2-Instruct was trained on it.

    Its template puts the default system message ``SMOLLM_SYSTEM`` first if none is given, and so does this format. To
    replace it, pass a system message of your own, which may be empty.
    """

    name = "chatml"
    generation_prompt = "<|im_start|>assistant\n"
    stop_strings = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    control_strings = stop_strings
    control_tokens = stop_strings

    def _text(self, messages: Sequence[Message]) -> str:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SMOLLM_SYSTEM}, *messages]
        return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


@dataclass(frozen=True)
class _Plain(ChatFormat):
    """No format, for base models: only the contents, one below the other; a single message is unchanged."""

    name = "plain"
    reply_start = "\n"

    def _text(self, messages: Sequence[Message]) -> str:
        return "\n".join(message["content"] for message in _without_blank_system(messages))


def _without_blank_system(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[1:] if messages[0]["role"] == "system" and is_blank(messages[0]["content"]) else messages


FORMATS: dict[str, ChatFormat] = {
    form.name: form for form in (_FalconChat(), _FalconInstruct(), _Llama2Chat(), _ChatMl(), _Plain())
}


def format_for(name: str) -> ChatFormat:
    """The chat format of this name. Raises WorkbookError for an unknown name, listing the known ones."""
    return FORMATS[choose(name, FORMATS, "chat format")]


def published_format_prompt(message: str, history: Sequence[tuple[str, str]], system_prompt: str = "") -> str:
    """The announcement's ``format_prompt``, including its mistake. Use ``format_for("falcon-chat")`` instead.

    Its last line, which adds the new question, is inside the loop over ``history`` ((question, reply) pairs): with an
    empty history the question is lost, and with two turns or more it is repeated after each.
    """
    opening = f"System: {system_prompt}\n" if system_prompt else ""
    question = f"User: {message}\nFalcon:"
    return opening + "".join(f"User: {asked}\nFalcon: {answered}\n{question}" for asked, answered in history)
