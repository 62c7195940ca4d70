"""Exercises of notebook 03: the chat format, trimming the history, stop strings, whether the history is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.reading import _expected, _listed, _text, _UnreadableError
from helpers.exercises.verdict import _Exercise, _Found, _is_stub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from helpers.exercises.verdict import Outcome
    from helpers.models.formats import Message
    from helpers.models.loaded import Loaded

Turn = tuple[str, str]  # what the user said, what the model replied
# Without and with a history: the published format_prompt fails on both, each in its own way.
_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Is a saddle an animal?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
)
_GAP = "{}"
_REPLY_TOKENS = 40


def _arguments(messages: Sequence[Message]) -> tuple[str, list[Turn], str]:
    """A conversation as ``format_prompt`` takes it: the last question, the finished turns, the system prompt."""
    said = [message["content"] for message in messages if message["role"] != "system"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    return said[-1], list(zip(said[:-1:2], said[1::2], strict=True)), system


def _format_prompt(function: Callable[[str, list[Turn], str], object]) -> Outcome:
    from helpers.models.formats import format_for

    for messages in _CONVERSATIONS:
        message, history, system = _arguments(messages)
        given, expected = _text(function(message, list(history), system)), format_for("falcon-chat").render(messages)
        if given == expected:
            continue
        right = _common_beginning(given, expected)
        case = f"With {len(history)} turns of history and {'a' if system else 'no'} system prompt"
        if right == given:
            return f"{case} it ends too early, after {given[-30:]!r}."
        if right == expected:
            return f"{case} it is right at first, but then goes on with {given[len(right) :]!r}."
        if not right:
            return f"{case} it begins with {given[:30]!r}."
        return f"{case} it is right as far as {right[-30:]!r}, but then has {given[len(right) :][:30]!r}."
    return None


def _common_beginning(first: str, second: str) -> str:
    length = 0
    while first[: length + 1] == second[: length + 1] and length < min(len(first), len(second)):
        length += 1
    return first[:length]


def _is_as_published(answer: object) -> bool:
    """True for the stub of the exercise, which is the published function: for every conversation the same text."""
    from helpers.models.formats import published_format_prompt

    if _is_stub(answer) or not callable(answer):
        return _is_stub(answer)
    try:
        for messages in _CONVERSATIONS:
            message, history, system = _arguments(messages)
            if answer(message, list(history), system) != published_format_prompt(message, history, system):
                return False
    except Exception:  # the reader's code, which the check itself will run and explain
        return False
    return True


def _trim(function: Callable[[list[Turn], str, int], object]) -> Outcome:
    history = [("a b c", "d e"), ("f", "g h i j"), ("k l", "m")]
    # The history has 5, 5 and 3 words and the question 2: the limits lie on and beside the borders between turns.
    cases = [(history, limit) for limit in (20, 15, 14, 11, 10, 9, 5, 4, 1)]
    # A long turn in the middle: the short one before it would fit, but would leave a hole in the conversation.
    cases.append(([("a", "b"), ("c d e f g", "h i j k l"), ("m", "n")], 8))
    for turns, limit in cases:
        given = [_turn(turn) for turn in _listed(function(list(turns), "n o", limit))]
        if off := _trimmed_wrongly(given, turns, limit):
            sizes = ", ".join(str(_words([turn])) for turn in turns)
            return f"For turns of {sizes} words, a question of 2 and a limit of {limit}: {off}"
    return None


def _trimmed_wrongly(given: list[Turn], turns: list[Turn], limit: int) -> str | None:
    """What is off with the turns that are left, if anything is."""
    if any(turn not in turns for turn in given):
        return "what it returns are not whole turns of the history."
    if given != turns[len(turns) - len(given) :]:
        return "the turns that it keeps are not the last ones, all of them and in their order."
    if given and _words(given) + 2 > limit:
        return "it keeps more words than the limit."
    longer = turns[len(turns) - len(given) - 1 :]
    if len(given) < len(turns) and _words(longer) + 2 <= limit:
        return "it drops more turns than it must."
    return None


def _words(turns: Sequence[Turn]) -> int:
    return sum(len(user.split()) + len(reply.split()) for user, reply in turns)


def _turn(turn: object) -> Turn:
    texts = [_text(text) for text in _listed(turn)]
    if len(texts) != 2:
        raise _UnreadableError(_expected("a turn of two texts", turn))
    return texts[0], texts[1]


def _cut(function: Callable[[str, tuple[str, ...]], object]) -> Outcome:
    cases = [
        ("Hello.\nUser: and you?", ("\nUser:",), "Hello."),
        ("Hello.", ("\nUser:",), "Hello."),
        ("a\nSystem: b\nUser: c", ("\nUser:", "\nSystem:"), "a"),
        ("a\nUser: b\nSystem: c", ("\nUser:", "\nSystem:"), "a"),
        ("The User: tag", ("\nUser:",), "The User: tag"),
        ("Well\nUser: why\nUser: how", ("\nUser:",), "Well"),
    ]
    for text, stops, expected in cases:
        given = _text(function(text, stops))
        if given == expected:
            continue
        off = "it cuts off too little"
        if len(given) < len(expected):
            off = "it cuts off too much"
        elif not text.startswith(given):
            off = "that is not a beginning of the text"
        return f"For {text!r} and the stop strings {stops} it returns {given!r}: {off}."
    return None


def _reads_history(answer: object, model: Loaded) -> Outcome:
    from helpers.evaluation.rules import names
    from helpers.generation.generating import generate
    from helpers.generation.sampling import Sampling

    user, reply, question, words = _experiment(answer)
    greedy, said = Sampling(temperature=0, max_new_tokens=_REPLY_TOKENS), {}
    for word in words:
        messages: list[Message] = [
            {"role": "user", "content": user.replace(_GAP, word)},
            {"role": "assistant", "content": reply.replace(_GAP, word)},
            {"role": "user", "content": question},
        ]
        said[word] = generate(model, messages, greedy).text.strip()
    seen = " ".join(f"With {word!r} it says {text!r}." for word, text in said.items())
    for word, other in (words, words[::-1]):
        if not names(said[word], word):
            return f"{seen} The reply does not name {word!r}."
        if names(said[word], other):
            return f"{seen} The reply to {word!r} names {other!r} too, so it need not come from the history."
    return _Found(f"{seen} Nothing else was changed, so the model read it in the history.")


def _experiment(answer: object) -> tuple[str, str, str, tuple[str, str]]:
    """What the user said, the reply, the question, the two words. Raises _UnreadableError if it is no experiment."""
    parts = _parts(answer)
    user, reply, question = (_text(part) for part in parts[:3])
    first, second = _turn(parts[3])
    if _GAP not in user + reply:
        raise _UnreadableError("Neither what the user said nor the reply has the gap {} for the words.")
    # An empty word is part of every other.
    if first.casefold() in second.casefold() or second.casefold() in first.casefold():
        raise _UnreadableError("Choose two words of which neither is part of the other.")
    for word in (_GAP, first, second):
        if word.casefold() in question.casefold():
            raise _UnreadableError(f"The last question must not hold {word!r}: the model could read it there.")
    return user, reply, question, (first, second)


def _parts(answer: object) -> list[object]:
    """The four parts of the experiment, in their order. Raises _UnreadableError if one is missing."""
    keys = ("user", "reply", "question", "words")
    if isinstance(answer, dict):
        missing = [key for key in keys if key not in answer]
        if missing:
            raise _UnreadableError(f"The experiment has no {missing[0]!r}.")
        return [answer[key] for key in keys]
    parts = _listed(answer)
    if len(parts) != len(keys):
        raise _UnreadableError("Give four things: what the user said, the reply, the last question and two words.")
    return parts


EXERCISES = {
    "03-1": _Exercise(
        _format_prompt,
        (
            "Call it with an empty history and print the result. Which line of the function did not run?",
            "Which lines should run once for each past turn, and which exactly once?",
        ),
        _is_as_published,
    ),
    "03-2": _Exercise(
        _trim,
        (
            "Write a small function that counts the words of a list of turns. The question counts too.",
            "Drop the oldest turn, count again. When do you stop? Mind an empty history.",
            "A model that sees turn 1 and turn 3 without turn 2 sees a conversation that never took place.",
        ),
    ),
    "03-3": _Exercise(
        _cut,
        (
            "The earliest in the text need not be the first in the tuple.",
            "str.find says where a string begins, and -1 if it does not occur. What should happen if none occurs?",
        ),
    ),
    "03-4": _Exercise(
        _reads_history,
        (
            "Start from a short last question that means nothing without the turn before it.",
            "falcon-mini knows everyday things: food, animals, toys, stories. Try yours with generation.generate.",
            "Let both the user and the reply name the thing. If the model ignores one pair of words, try others.",
        ),
    ),
}
