"""HTML that notebooks and panels show: transcripts, tokens, prompts, tables of replies.

The views are Jinja templates with autoescape in ``templates``: all text of models and users is escaped. Styles are
inline, set both colours, and need nothing from outside.
"""

from __future__ import annotations

import functools
import html
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from helpers.figures.replies import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jinja2 import Environment
    from transformers import PreTrainedTokenizerBase

    from helpers.evaluation.comparison import Comparison
    from helpers.evaluation.data import Item
    from helpers.generation.sampling import Reply
    from helpers.models.formats import Message
    from helpers.training.conversations import Example

Live = TypeVar("Live")
Static = TypeVar("Static")
_GOOD = "background:#d5f0e6;color:#00482f"
_BAD = "background:#fbe3df;color:#8c1d0a"
_NEUTRAL = "background:#e4e4e4;color:#333333"
_ERROR = f"{_BAD};padding:2px 6px"
_BLOCK = "font-family:sans-serif;font-size:14px;line-height:1.45;max-width:860px"
_ASKED = "background:#cfe4f7;color:#1c1c1c"
_REPLIED = "background:#eeeeee;color:#1c1c1c"
# What every template may use by name.
_STYLES = {
    "GOOD": _GOOD,
    "BAD": _BAD,
    "ERROR": _ERROR,
    "BLOCK": _BLOCK,
    "MONOSPACE": "font-family:monospace;font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere",
    "ASKED": _ASKED,
    "REPLIED": _REPLIED,
}
_BUBBLES = {
    "system": "background:#fff3cd;color:#1c1c1c;margin-right:80px",
    "user": f"{_ASKED};margin-left:80px",
    "assistant": f"{_REPLIED};margin-right:80px",
}
_TOKEN_LOOKS = tuple(f"background:{tint};color:#1c1c1c" for tint in ("#cfe4f7", "#fde3b0", "#c9ecdf", "#f4d6e6"))
TRAINED = "background:#0b6e4f;color:#ffffff"
_ROLE_LOOKS = {
    "system": "background:#ece6d6;color:#1c1c1c",
    "user": "background:#dde4ec;color:#1c1c1c",
    "assistant": "background:#e7dfea;color:#1c1c1c",
    "format": "background:#ececec;color:#1c1c1c",
}
_ROLE_TAGS = {
    "falcon-chat": r"^(?:System|User|Falcon):",
    "falcon-instruct": r"^(?:User|Assistant):",
    "llama-2": r"</?s>|\[/?INST\]|<</?SYS>>",
    "chatml": r"<\|im_start\|>(?:system|user|assistant)|<\|im_end\|>",
}
_NO_TAGS = r"(?!)"  # matches nowhere
_FINISHED = {"end": "ended by itself", "stop": "ended at a stop string", "length": "cut at the token limit"}
_CLASS_MARKS = {"right": ("correct", _GOOD), "wrong": ("wrong", _BAD), "no answer": ("no answer", _NEUTRAL)}
_SHOWN_CHARACTERS = 400
_TEMPLATES = Path(__file__).parent / "templates"


class _Html(str):
    """HTML that shows itself in a notebook; its ``repr`` is the text a reader would see."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)

    def __html__(self) -> str:
        # Templates ask for this name: a rendered view goes into another one without being escaped again.
        return str(self)

    def __repr__(self) -> str:
        return html.unescape(re.sub(r"<[^<>]*>", " ", self)).strip()


class _Views(tuple[object, ...]):
    """Several things to look at, displayed one below the other."""

    __slots__ = ()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        for view in self:
            display(view)


def _show(live: Callable[[], Live], static: Callable[[], Static]) -> Live | Static:
    """Return the live widget if a person is there to use it, the static view in an unattended run."""
    from helpers.base.settings import unattended

    if unattended():
        return static()
    return live()


@functools.cache
def _environment() -> Environment:
    import jinja2

    # Line ends and indents of a template are for its reader alone: in the page some of them would be visible, between
    # tokens and in texts that keep their white space.
    templates = {}
    for path in _TEMPLATES.glob("*.j2"):
        lines = path.read_text(encoding="utf-8").splitlines()
        templates[path.name] = "".join(line.strip() for line in lines)
    environment = jinja2.Environment(loader=jinja2.DictLoader(templates), autoescape=True)
    environment.globals.update(_STYLES)
    return environment


def _render(template: str, **values: object) -> _Html:
    """Render a file of ``templates``; texts among the values are escaped, Html is not."""
    return _Html(_environment().get_template(template).render(values))


def _piece(name: str, *values: object) -> _Html:
    """Render one of the pieces in ``templates/pieces.j2``, by the name of its macro."""
    macro = getattr(_environment().get_template("pieces.j2").module, name)
    return _Html(macro(*values))


def _counted(number: int, one: str, many: str) -> str:
    """A number with its noun: 1 token, 2 tokens."""
    return f"{number} {one}" if number == 1 else f"{number} {many}"


def _token_count(number: int) -> str:
    """A number of tokens: 1 token, 2 tokens."""
    return _counted(number, "token", "tokens")


def _transcript_html(messages: Sequence[Message], assistant: str = "Falcon", footer: str = "") -> _Html:
    """A conversation as bubbles; ``assistant`` is the name shown for the model."""
    names = {"system": "System", "user": "User", "assistant": assistant}
    bubbles = [(names[message["role"]], message["content"], _BUBBLES[message["role"]]) for message in messages]
    return _render("transcript.j2", bubbles=bubbles, footer=footer)


def _scrolled(content: _Html, height: int = 420) -> _Html:
    """The content in a box at most ``height`` pixels high that stays scrolled to its end."""
    return _render("scrolled.j2", content=content, height=height)


class _Token(NamedTuple):
    """A token as it is shown: its text, what stands there on hover, its colours, the line breaks after it."""

    text: str
    title: str
    look: str
    line_ends: int


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int, title: str, look: str) -> _Token:
    text = str(tokenizer.decode([token_id]))
    return _Token(visible(text), title, look, text.count("\n"))


def tokens_html(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> _Html:
    """A strip of tokens: each with its own background, its id on hover, spaces and line ends visible."""
    tokens = []
    for place, token_id in enumerate(ids):
        look = _TOKEN_LOOKS[place % len(_TOKEN_LOOKS)]
        tokens.append(_token(tokenizer, token_id, f"id {token_id}", look))
    return _render("tokens.j2", tokens=tokens, footer=_token_count(len(ids)))


def trained_tokens_html(tokenizer: PreTrainedTokenizerBase, example: Example) -> _Html:
    """The tokens of a fine-tuning example: green if the loss is taken there, otherwise a tint of its role.

    On hover a token shows its id and its role; below stands what the colours mean, in the order in which they occur.
    """
    tokens: list[_Token] = []
    trained_roles: Counter[str] = Counter()
    key: dict[str, list[str]] = {}
    for token_id, role, trained in zip(example.input_ids, example.roles, example.trained, strict=True):
        look = TRAINED if trained else _ROLE_LOOKS[role]
        tokens.append(_token(tokenizer, token_id, f"id {token_id}, {role}", look))
        roles = key.setdefault(look, [])
        if role not in roles:
            roles.append(role)
        if trained:
            trained_roles[role] += 1
    legend = ", ".join(f"{role} {count}" for role, count in trained_roles.items())
    footer = f"{trained_roles.total()} of {_token_count(len(tokens))} carry the loss: {legend}"
    return _render("tokens.j2", tokens=tokens, footer=footer, key=key)


class _Part(NamedTuple):
    """A stretch of a prompt."""

    text: str
    is_tag: bool


def _prompt_html(text: str, format_name: str, tokens: int | None = None) -> _Html:
    """The literal text that a model reads, with the role tags of its format ("falcon-chat" ...) highlighted."""
    # With a group in its pattern, split returns the tags as well: every second part is one.
    pattern = f"({_ROLE_TAGS.get(format_name, _NO_TAGS)})"
    parts = []
    for index, part in enumerate(re.split(pattern, text, flags=re.MULTILINE)):
        parts.append(_Part(part, index % 2 == 1))
    footer = "" if tokens is None else _token_count(tokens)
    return _render("prompt.j2", parts=parts, footer=footer)


def _finish(reply: Reply) -> str:
    """Why a reply ended, in words."""
    return _FINISHED[reply.finish_reason]


def _reply_summary(reply: Reply) -> str:
    """One line about a finished reply: tokens, speed, time to the first token, why it ended."""
    parts = [_token_count(reply.tokens)]
    # The speed counts the tokens after the first.
    if reply.tokens > 1:
        parts.append(f"{reply.tokens_per_second:.0f} tokens/s")
    parts.append(f"first after {reply.first_token_seconds:.2f} s")
    return f"{', '.join(parts)}; {_finish(reply)}"


class _Mark(NamedTuple):
    """What a rule says about a reply, in a word, with its colours."""

    word: str
    look: str


class _ShownReply(NamedTuple):
    """A reply as the table shows it."""

    text: str
    marks: list[_Mark]


def replies_html(comparison: Comparison, rows: Sequence[int] | None = None) -> _Html:
    """The replies of a comparison side by side: all, or those of the items ``rows`` (places from 0).

    A reply to an item with an answer key is marked: correct, wrong or no answer, and a correct one also as concise or
    long. A reply that was cut at the token limit is marked as such.
    """
    places = range(len(comparison.items)) if rows is None else rows
    heads = []
    for side, name in comparison.names.items():
        # Below the name stands only what the label adds to it.
        heads.append((name, comparison.labels[side].removeprefix(name).strip()))
    table = []
    for place in places:
        item = comparison.items[place]
        replies = [_shown_reply(item, comparison.replies[side][place]) for side in comparison.sides]
        table.append((_beginning(item.question), replies))
    # Columns narrower than 220 pixels are unreadable: the table scrolls instead.
    return _render("replies.j2", heads=heads, rows=table, width=220 * (1 + len(heads)))


def _shown_reply(item: Item, reply: Reply) -> _ShownReply:
    from helpers.evaluation.answers import RULES, classify

    marks = []
    cut = reply.finish_reason == "length"
    if item.scored:
        marks.append(_Mark(*_CLASS_MARKS[classify(item, reply.text)]))
    # A program or a story need not be short.
    if item.answer:
        if RULES["concise"](item, reply):
            marks.append(_Mark("concise", _GOOD))
        elif RULES["correct"](item, reply) and not cut:
            marks.append(_Mark("long", _NEUTRAL))
    if cut:
        marks.append(_Mark(_FINISHED["length"], _NEUTRAL))
    return _ShownReply(_beginning(reply.text.strip() or "(no text)"), marks)


def _beginning(text: str) -> str:
    """At most ``_SHOWN_CHARACTERS`` of a text, with an ellipsis if more follows."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS].rstrip()} …"
