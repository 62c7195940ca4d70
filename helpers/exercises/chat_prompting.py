"""Exercises of notebook 03: the chat format, trimming the history, stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from helpers.exercises.verdict import Check, Hint
    from helpers.models.formats import Message

Turn = tuple[str, str]  # what the user said, what the model replied
# Without and with a history: the published format_prompt fails on both, each in its own way.
_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Is a saddle an animal?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
)


def _turns(messages: Sequence[Message]) -> list[Turn]:
    """The finished turns of a conversation that ends in a question."""
    said = [message["content"] for message in messages if message["role"] != "system"][:-1]
    return list(zip(said[::2], said[1::2], strict=True))


def _format_prompt(function: Callable[[str, list[Turn], str], str]) -> Hint:
    from helpers.models.formats import format_for

    for messages in _CONVERSATIONS:
        system = ""
        if messages[0]["role"] == "system":
            system = messages[0]["content"]
        history = _turns(messages)
        expected = format_for("falcon-chat").render(messages)
        answer = function(messages[-1]["content"], history, system)
        if answer != expected:
            return f"With {len(history)} turns of history it should return {expected!r}, but returned {answer!r}."
    return None


def _trim(function: Callable[[list[Turn], str, int], list[Turn]]) -> Hint:
    history = [("a b c", "d e"), ("f", "g h i j"), ("k l", "m")]
    # The history has 5, 5 and 3 words and the question 2: the limits lie on and beside the borders between turns.
    cases = [(20, history), (11, history[1:]), (10, history[1:]), (9, history[2:]), (5, history[2:]), (4, [])]
    for limit, expected in cases:
        if function(list(history), "n o", limit) != expected:
            return f"With at most {limit} words it should keep {expected}. Drop whole turns, oldest first."
    return None


def _cut(function: Callable[[str, tuple[str, ...]], str]) -> Hint:
    cases = [
        ("Hello.\nUser: and you?", ("\nUser:",), "Hello."),
        ("Hello.", ("\nUser:",), "Hello."),
        ("a\nSystem: b\nUser: c", ("\nUser:", "\nSystem:"), "a"),
        ("The User: tag", ("\nUser:",), "The User: tag"),
    ]
    for text, stops, expected in cases:
        if function(text, stops) != expected:
            return f"For {text!r} and {stops} it should return {expected!r}: cut at the earliest stop string."
    return None


CHECKS: dict[str, Check] = {"03-1": _format_prompt, "03-2": _trim, "03-3": _cut}
