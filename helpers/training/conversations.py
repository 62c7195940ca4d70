"""Turn conversations into training examples: token ids, and which of them carry the loss.

Every reply of a conversation becomes one example. The model learns to predict the reply and the end token after it;
everything before the reply is only read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.models.formats import Message
from helpers.models.loaded import context_tokens
from helpers.models.tokens import continuation_ids
from helpers.training.recipe import FinetuneError

if TYPE_CHECKING:
    from pathlib import Path

    from pandas import DataFrame

    from helpers.models.loaded import Loaded
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


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations of a JSON Lines file: each line holds a list ``messages``.

    Raises FinetuneError, naming the line, if one is not valid.
    """
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            conversation = json.loads(line)["messages"]
            _check_conversations([conversation])
        except (ValueError, KeyError, TypeError, FinetuneError) as error:
            raise FinetuneError(
                f"{path.name}, line {number} is not a conversation: {error} "
                'Each line must be a JSON object with a list "messages".'
            ) from error
        conversations.append(conversation)
    return conversations


def examples(loaded: Loaded, conversations: Sequence[Conversation]) -> list[Example]:
    """One example for each reply, in the model's chat format, with the end token after that reply only.

    Prompt and reply are tokenized separately, as they are when the model is asked. Examples longer than the context are
    left out. Raises FinetuneError if none is left or if the argument is not a list of conversations, MessageError for
    malformed messages.
    """
    _check_conversations(conversations)
    made = []
    for conversation in conversations:
        for position, message in enumerate(conversation):
            if message["role"] == "assistant":
                made.append(_example(loaded, conversation[: position + 1]))
    limit = context_tokens(loaded)
    fitting = [example for example in made if len(example.input_ids) <= limit]
    if not fitting:
        raise FinetuneError(
            f"None of the {len(made)} replies fits the context of {limit} tokens. Give shorter conversations."
        )
    return fitting


def token_counts(rows: Sequence[Example]) -> DataFrame:
    """Table of the number of tokens, and of those that carry the loss, by role."""
    import pandas as pd

    tokens = Counter(role for example in rows for role in example.roles)
    trained = {role: count if role in TRAINED_ROLES else 0 for role, count in tokens.items()}
    return pd.DataFrame({"tokens": tokens, "trained": trained}).rename_axis("role").sort_values("trained")


def _check_conversations(conversations: Sequence[Conversation]) -> None:
    """Raise FinetuneError unless this is a list of conversations with a reply."""
    valid = isinstance(conversations, Sequence) and all(map(_is_conversation, conversations))
    if not valid:
        raise FinetuneError(
            'Give a list of conversations, each a list of messages: [[{"role": "user", "content": "Hi"}, '
            '{"role": "assistant", "content": "Hello."}], ...].'
        )
    if _reply_count(conversations) == 0:
        raise FinetuneError('There is no reply to train on. Add messages with the role "assistant".')


def _is_conversation(value: object) -> bool:
    # strings and mappings can be iterated too
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return False
    return all(isinstance(message, Mapping) and "role" in message for message in value)


def _reply_count(conversations: Sequence[Conversation]) -> int:
    """Number of replies: messages with the role "assistant"."""
    count = 0
    for conversation in conversations:
        for message in conversation:
            if message["role"] == "assistant":
                count += 1
    return count


def _example(loaded: Loaded, messages: Conversation) -> Example:
    """The example for the last message, a reply."""
    prompt = loaded.format.render(messages[:-1])
    whole = loaded.format.render(messages, add_generation_prompt=False)
    end = loaded.tokenizer.eos_token
    # some formats end a reply with the end token themselves: it must come once, as a token of its own
    reply = whole[len(prompt) :].rstrip().removesuffix(end)
    before = loaded.format.tokens(loaded.tokenizer, prompt)
    reply_ids = continuation_ids(loaded.tokenizer, reply)
    ids = (*[token.id for token in before], *reply_ids, loaded.tokenizer.eos_token_id)
    roles = _prompt_roles(prompt, before, messages[:-1])
    return Example(ids, (*roles, *["reply"] * len(reply_ids), "end"))


def _prompt_roles(prompt: str, tokens: Sequence[Token], messages: Conversation) -> list[str]:
    """The role of each token of the prompt: that of the message whose content it overlaps, or "format"."""
    spans: list[tuple[int, int, str]] = []
    position = 0
    for message in messages:
        start = prompt.find(message["content"], position)
        if start >= 0:
            position = start + len(message["content"])
            spans.append((start, position, message["role"]))
    return [_role_at(token.start, token.end, spans) for token in tokens]


def _role_at(start: int, end: int, spans: Sequence[tuple[int, int, str]]) -> str:
    """The role of the first span that overlaps the characters from ``start`` to ``end``."""
    for low, high, role in spans:
        if low < end and start < high:
            return role
    return "format"
