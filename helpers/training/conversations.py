"""Turn conversations into training examples: token ids, and which of them carry the loss.

Every reply of a conversation becomes one example. The model learns to predict the reply and the end token after it;
everything before the reply is only read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from helpers.base.errors import WorkbookError
from helpers.base.jsonl import scan_records
from helpers.base.text import is_blank
from helpers.models.formats import FORMATS, Message, MessageError, format_for
from helpers.models.loaded import Loaded, context_tokens
from helpers.models.tokens import continuation_ids
from helpers.training.recipe import FinetuneError

if TYPE_CHECKING:
    from pathlib import Path

    from pandas import DataFrame

    from helpers.base.jsonl import BadRow
    from helpers.models.tokens import Token

TRAINED_ROLES = ("reply", "end")
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Example:
    """One reply to train on, after all that the model reads before it.

    ``roles`` names what each token is: system, user, assistant (an earlier reply), format (tags and line ends), reply
    and end (the end token). Only "reply" and "end" carry the loss.
    """

    input_ids: tuple[int, ...]
    roles: tuple[str, ...]

    @property
    def trained(self) -> tuple[bool, ...]:
        """True for each token that carries the loss."""
        return tuple(role in TRAINED_ROLES for role in self.roles)

    def row(self) -> dict[str, list[int]]:
        """The example as trl takes it: token ids, and 1 for each token that carries the loss."""
        return {"input_ids": list(self.input_ids), "completion_mask": list(map(int, self.trained))}


class Conversations(list[list[Message]]):
    """The valid conversations of a file. ``dropped`` are its bad rows, which were left out because that was asked for.

    ``blank_replies`` counts the replies in which nothing can be seen: they are not trained on.
    """

    dropped: tuple[BadRow, ...] = ()
    blank_replies: int = 0


@dataclass(frozen=True)
class _Selected:
    """The examples of some conversations, and how many replies gave none: blank ones, and those that do not fit."""

    examples: list[Example]
    blank: int
    too_long: int


def read_conversations(path: Path, *, skip_bad_rows: bool = False) -> Conversations:
    """The conversations of a JSON Lines file: each row holds a list ``messages``; other keys are ignored.

    Every row is checked: the roles, their order, the contents, whether there is a reply and no question is blank.
    Raises FinetuneError, which lists the bad rows with line and reason, unless ``skip_bad_rows`` drops and counts them;
    and always if no reply to train on is left.
    """
    conversations = Conversations()
    try:
        records = scan_records(path)
        for line, row, record in records.valid:
            if reason := _fault(record.get("messages"), '"messages" must be a list of messages'):
                records.reject(line, row, reason)
            else:
                conversations.append(cast("list[Message]", record["messages"]))
        if not skip_bad_rows:
            advice = "Correct or remove them, or leave them out with skip_bad_rows=True (--skip-bad-rows)."
            records.refuse_bad('conversations, such as {"messages": [{"role": "user", "content": "Hi"}, ...]}', advice)
    except WorkbookError as error:
        raise FinetuneError(str(error)) from error
    conversations.dropped = tuple(records.bad)
    replies = [message["content"] for conversation in conversations for message in _replies(conversation)]
    conversations.blank_replies = sum(map(_is_silent, replies))
    if conversations.blank_replies == len(replies):
        raise FinetuneError(
            f"{path} has no reply to train on: {records.total} rows, {len(records.bad)} of them not valid, and "
            f"{len(replies)} replies, all of them blank. Give another file."
        )
    return conversations


def examples(loaded: Loaded, conversations: Sequence[Conversation]) -> list[Example]:
    """One example for each reply, in the model's chat format, with the end token after that reply only.

    Prompt and reply are tokenized separately, as they are when the model is asked. White space around a reply and the
    format's control strings at its end, such as an end token written out, are not part of it. Turns whose reply is
    blank, and examples longer than the context, are left out. Raises FinetuneError if none is left, if the argument is
    not a list of conversations, or if some of them are not valid, naming these by number.
    """
    return _select(loaded, conversations).examples


def _select(loaded: Loaded, conversations: Sequence[Conversation]) -> _Selected:
    """The examples of conversations with the count of what was left out. Raises as ``examples`` does."""
    _check_conversations(conversations)
    closers = (*loaded.format.control_strings, loaded.tokenizer.eos_token or "")
    # get_vocab builds a dictionary of all tokens each time: that takes longer than to encode a sample
    writer = _Writer(loaded, loaded.tokenizer.get_vocab(), context_tokens(loaded))
    made: list[Example] = []
    blank = too_long = 0
    for conversation in conversations:
        spoken = _spoken(conversation, closers)
        blank += len(_replies(conversation)) - len(_replies(spoken))
        fitting = writer.fitting(spoken)
        too_long += len(_replies(spoken)) - len(fitting)
        made += fitting
    if not made:
        raise FinetuneError(
            f"None of the {too_long + blank} replies fits the context of {writer.context} tokens: {too_long} are "
            f"longer with what comes before them, and {blank} are blank. Give other conversations."
        )
    return _Selected(made, blank, too_long)


def token_counts(rows: Sequence[Example]) -> DataFrame:
    """Table of the number of tokens, and of those that carry the loss, by role."""
    import pandas as pd

    tokens = Counter(role for example in rows for role in example.roles)
    trained = {role: count if role in TRAINED_ROLES else 0 for role, count in tokens.items()}
    return pd.DataFrame({"tokens": tokens, "trained": trained}).rename_axis("role").sort_values("trained")


def _check_conversations(conversations: Sequence[Conversation]) -> None:
    """Raise FinetuneError unless this is a list of valid conversations with a reply in each."""
    valid = isinstance(conversations, Sequence) and all(map(_is_conversation, conversations))
    if not valid:
        raise FinetuneError(
            'Give a list of conversations, each a list of messages: [[{"role": "user", "content": "Hi"}, '
            '{"role": "assistant", "content": "Hello."}], ...].'
        )
    faults = []
    for number, conversation in enumerate(conversations, 1):
        if reason := _fault(conversation):
            faults.append(f"conversation {number}: {reason}")
    if faults:
        rest = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
        count = f"{len(faults)} of {len(conversations)} conversations cannot be trained on"
        raise FinetuneError("\n  ".join([f"{count}:", *faults[:5], *rest]))
    if not conversations:
        raise FinetuneError('There is no reply to train on. Add messages with the role "assistant".')


def _is_conversation(value: object) -> bool:
    # strings and mappings can be iterated too
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)


def _fault(conversation: object, no_list: str = "It must be a list of messages") -> str | None:
    """What is wrong with a conversation, or None. What every format asks for is asked for here, before any is known."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str) or not conversation:
        return f'{no_list}, for example [{{"role": "user", "content": "Hi"}}, ...].'
    try:
        format_for("plain").check(conversation)
    except MessageError as error:
        return str(error)
    for position, message in enumerate(conversation):
        if message["role"] == "user" and is_blank(message["content"]):
            return f"Message {position}, a question, is blank."
    if not _replies(conversation):
        return 'There is no reply to train on: no message has the role "assistant".'
    return None


def _replies(conversation: Conversation) -> list[Message]:
    return [message for message in conversation if message["role"] == "assistant"]


def _is_silent(reply: str) -> bool:
    """Whether nothing of a reply would be left in any format: its model is not known yet."""
    controls = [control for form in FORMATS.values() for control in form.control_strings]
    return is_blank(_without_closers(reply, controls))


def _spoken(conversation: Conversation, closers: Sequence[str]) -> list[Message]:
    """The conversation with its replies stripped, without the turns whose reply is blank."""
    kept: list[Message] = []
    for message in conversation:
        content = message["content"]
        if message["role"] != "assistant":
            kept.append(message)
            continue
        reply = _without_closers(content, closers)
        if is_blank(reply):
            kept.pop()  # the question
        else:
            kept.append({"role": "assistant", "content": reply})
    return kept


def _without_closers(reply: str, closers: Sequence[str]) -> str:
    """A reply without white space around it and without the control strings that close it, however many there are."""
    end = len(reply)
    while True:
        # What nobody can see may stand behind a closing string; at the end of words it may belong to an emoji.
        visible = end
        while visible > 0 and is_blank(reply[visible - 1]):
            visible -= 1
        closer = next((text for text in closers if text and reply.endswith(text, 0, visible)), None)
        if closer is None:
            return reply[:end].strip()
        end = visible - len(closer)


@dataclass(frozen=True)
class _Writer:
    """Writes conversations as examples of one model. ``context``: the tokens that it holds at most."""

    loaded: Loaded
    vocabulary: Mapping[str, int]
    context: int

    def fitting(self, conversation: Conversation) -> list[Example]:
        """The examples of a conversation's replies, up to the first one that does not fit the context.

        What has more characters than the longest tokens could hold is not even encoded: megabytes would take a minute.
        """
        most = self.context * self._longest
        made: list[Example] = []
        characters = 0
        for position, message in enumerate(conversation):
            characters += len(message["content"])
            if characters > most:
                break
            if message["role"] == "assistant":
                example = self._example(conversation[: position + 1])
                # What follows is longer still: to encode it would cost the square of a long conversation.
                if len(example.input_ids) > self.context:
                    break
                made.append(example)
        return made

    @cached_property
    def _longest(self) -> int:
        """The characters of the longest token."""
        return max(map(len, self.vocabulary))

    def _example(self, messages: Conversation) -> Example:
        """The example for the last message, a reply."""
        form, tokenizer = self.loaded.format, self.loaded.tokenizer
        prompt = form.render(messages[:-1])
        whole = form.render(messages, add_generation_prompt=False)
        reply, end = self._reply_and_end(whole[len(prompt) :].rstrip())
        before = form.tokens(tokenizer, prompt)
        reply_ids = continuation_ids(tokenizer, reply)
        ids = (*[token.id for token in before], *reply_ids, end)
        contents = [(form.escape(message["content"]).strip(), message["role"]) for message in messages[:-1]]
        roles = _prompt_roles(prompt, before, contents)
        return Example(ids, (*roles, *["reply"] * len(reply_ids), "end"))

    def _reply_and_end(self, reply: str) -> tuple[str, int]:
        """The reply without the end that its format writes, and the id of that end, or else of the tokenizer's end.

        The end must come once, as a token and not as its letters; the tokenizer may name another one than the format.
        """
        end = self.loaded.tokenizer.eos_token
        for control in self.loaded.format.control_tokens:
            if reply.endswith(control):
                reply = reply.removesuffix(control)
                if control in self.vocabulary:
                    end = control
        if end is None:
            raise FinetuneError(
                f"The tokenizer of {self.loaded.ref.label} has no end token, so no reply would end. Set its eos_token "
                "first."
            )
        return reply, self.vocabulary[end]


def _prompt_roles(prompt: str, tokens: Sequence[Token], contents: Sequence[tuple[str, str]]) -> list[str]:
    """The role of each token of the prompt: that of the content, as it stands there, that it overlaps, or "format"."""
    spans: list[tuple[int, int, str]] = []
    position = 0
    for content, role in contents:
        start = prompt.find(content, position)
        if content and start >= 0:
            position = start + len(content)
            spans.append((start, position, role))
    roles = []
    number = 0
    for token in tokens:
        # both are in the order of the text, so one pass is enough
        while number < len(spans) and spans[number][1] <= token.start:
            number += 1
        inside = number < len(spans) and spans[number][0] < token.end
        roles.append(spans[number][2] if inside else "format")
    return roles
