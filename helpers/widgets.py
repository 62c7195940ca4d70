"""What a person plays with: the chat panel, the comparison panel, the memory planner; and HTML of texts and tokens.

Each panel is a small class over plain functions: its controls are attributes (``panel.send.click()``), so code drives
it as a person does. Where nobody is there to play (``settings.unattended``) the same call gives a static view.
All text of models and users is escaped; styles are inline, set both colours, and need nothing from outside.
"""

from __future__ import annotations

import html
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from threading import Event, Thread, Timer
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from helpers import plots
from helpers.types import GIB, Loaded, MemoryEstimate, Message, ModelRef, Placement, Reply, Sampling, WorkbookError

if TYPE_CHECKING:
    from ipywidgets import Box, HBox, ValueWidget
    from matplotlib.figure import Figure
    from pandas import Series
    from transformers import PreTrainedTokenizerBase

    from helpers.chat import Chat
    from helpers.comparison import Comparison, Item, Side
    from helpers.finetuning import Example, Point

T = TypeVar("T")

CURSOR = " ▌"
GOOD = "background:#d5f0e6;color:#00482f"
BAD = "background:#fbe3df;color:#8c1d0a"
ERROR = f"{BAD};padding:2px 6px"

BLOCK = "font-family:sans-serif;font-size:14px;line-height:1.45;max-width:860px"
MONOSPACE = "font-family:monospace;font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere"
ASKED = "background:#cfe4f7;color:#1c1c1c"
REPLIED = "background:#eeeeee;color:#1c1c1c"
BUBBLES = {
    "system": "background:#fff3cd;color:#1c1c1c;margin-right:80px",
    "user": f"{ASKED};margin-left:80px",
    "assistant": f"{REPLIED};margin-right:80px",
}
TOKEN_COLOURS = tuple(f"background:{tint};color:#1c1c1c" for tint in ("#cfe4f7", "#fde3b0", "#c9ecdf", "#f4d6e6"))
TRAINED = "background:#0b6e4f;color:#ffffff"
ROLE_COLOURS = {
    "system": "background:#ece6d6;color:#1c1c1c",
    "user": "background:#dde4ec;color:#1c1c1c",
    "assistant": "background:#e7dfea;color:#1c1c1c",
    "format": "background:#ececec;color:#1c1c1c",
}
ROLE_TAGS = {
    "falcon-chat": r"^(?:System|User|Falcon):",
    "llama-2": r"</?s>|\[/?INST\]|<</?SYS>>",
    "chatml": r"<\|im_start\|>(?:system|user|assistant)|<\|im_end\|>",
}


class Html(str):
    """HTML that shows itself in a notebook; its ``repr`` is the text a reader would see."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return html.unescape(re.sub(r"<[^>]*>", " ", self)).strip()


class Views(tuple[Any, ...]):
    """Several things to look at, displayed one below the other."""

    __slots__ = ()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        for view in self:
            display(view)


def show(live: Callable[[], T], static: Callable[[], T]) -> T:
    """The live widget where a person is there to use it, the static view in an unattended run."""
    from helpers.settings import unattended

    return static() if unattended() else live()


def transcript_html(messages: Sequence[Message], assistant: str = "Falcon", footer: str = "") -> Html:
    """A conversation as bubbles; ``assistant`` is the name shown for the model."""
    names = {"system": "System", "user": "User", "assistant": assistant}
    bubbles = "".join(_bubble(names[m["role"]], m["content"], BUBBLES[m["role"]]) for m in messages)
    return Html(f'<div style="{BLOCK}">{bubbles}{_note(footer)}</div>')


def scrolled(content: str, height: int = 420) -> Html:
    """The content in a box at most ``height`` pixels high that stays scrolled to its end."""
    style = f"max-width:880px;max-height:{height}px;overflow-y:auto;display:flex;flex-direction:column-reverse"
    return Html(f'<div style="{style}"><div>{content}</div></div>')


def _bubble(name: str, content: str, look: str) -> str:
    return (
        f'<div style="{look};padding:6px 12px;margin-top:4px;margin-bottom:4px;border-radius:10px">'
        f'<b style="font-size:12px">{html.escape(name)}</b>'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(content.strip())}</div></div>'
    )


def tokens_html(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Html:
    """A strip of tokens: each with its own background, its id on hover, spaces and line ends visible."""
    looks = [(TOKEN_COLOURS[place % len(TOKEN_COLOURS)], f"id {token}") for place, token in enumerate(ids)]
    return Html(f'<div style="{BLOCK}">{_strip(tokenizer, ids, looks)}{_note(_tokens(len(ids)))}</div>')


def trained_tokens_html(tokenizer: PreTrainedTokenizerBase, example: Example) -> Html:
    """The tokens of a fine-tuning example: green where the loss is taken, a tint of its role elsewhere.

    On hover a token shows its id and its role.
    """
    tokens = list(zip(example.input_ids, example.roles, example.trained, strict=True))
    looks = [(_role_colour(role, trained), f"id {token}, {role}") for token, role, trained in tokens]
    counts = Counter(role for _, role, trained in tokens if trained)
    legend = ", ".join(f"{role} {count}" for role, count in counts.items())
    note = _note(f"{counts.total()} of {_tokens(len(tokens))} carry the loss: {legend}")
    strip = _strip(tokenizer, example.input_ids, looks)
    return Html(f'<div style="{BLOCK}">{strip}{note}{_role_key((role, trained) for _, role, trained in tokens)}</div>')


def _role_colour(role: str, trained: bool) -> str:
    return TRAINED if trained else ROLE_COLOURS[role]


def _role_key(kinds: Iterable[tuple[str, bool]]) -> str:
    """What the colours of the roles mean, in the order in which they occur."""
    names: dict[str, list[str]] = {}
    for role, trained in dict.fromkeys(kinds):
        names.setdefault(_role_colour(role, trained), []).append(role)
    swatches = (f'<span style="{look};padding:1px 6px">{", ".join(roles)}</span>' for look, roles in names.items())
    return f'<div style="font-size:12px;margin-top:2px">{" ".join(swatches)}</div>'


def _strip(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], looks: Iterable[tuple[str, str]]) -> str:
    """The tokens in a row; ``looks`` gives the colours and the title of each."""
    tokens = (_token(tokenizer.decode([token]), *look) for token, look in zip(ids, looks, strict=True))
    return f'<div style="{MONOSPACE}">{"".join(tokens)}</div>'


def _token(text: str, colours: str, title: str) -> str:
    line_ends = "<br>" * text.count("\n")
    style = f"{colours};padding:1px 0;margin-right:1px"
    return f'<span title="{title}" style="{style}">{html.escape(plots.visible(text))}</span>{line_ends}'


def _tokens(number: int) -> str:
    return _counted(number, "token", "tokens")


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _note(text: str) -> str:
    return f'<div style="font-size:12px;opacity:.75">{html.escape(text)}</div>' if text else ""


def prompt_html(text: str, format_name: str, tokens: int | None = None) -> Html:
    """The literal text that a model reads, with the role tags of its format ("falcon-chat" ...) highlighted."""
    tags = re.compile(ROLE_TAGS.get(format_name, r"(?!)"), re.MULTILINE)
    parts, end = [], 0
    for found in tags.finditer(text):
        parts += [html.escape(text[end : found.start()]), _tag(found[0])]
        end = found.end()
    body = "".join([*parts, html.escape(text[end:])])
    note = "" if tokens is None else _note(_tokens(tokens))
    style = f"{MONOSPACE};background:#f6f6f6;color:#1c1c1c;padding:8px 12px;border-radius:6px"
    return Html(f'<div style="{BLOCK}"><div style="{style}">{body}</div>{note}</div>')


def _tag(tag: str) -> str:
    return f'<b style="background:#fde3b0;color:#7a3e00">{html.escape(tag)}</b>'


def chat_panel(chat: Chat, *, script: Sequence[str] = ()) -> ChatPanel | Html:
    """A panel to talk in; unattended, the conversation that the questions of ``script`` lead to.

    Where a person is there, ``script`` gives the suggestions of the text box.
    """
    return show(lambda: ChatPanel(chat, script), lambda: played_html(chat, script))


def played_html(chat: Chat, script: Sequence[str]) -> Html:
    """Asks the questions of ``script`` and shows the whole conversation with the text behind the last reply."""
    from helpers.chat import play

    replies = play(chat, script)
    tokens = sum(reply.tokens for reply in replies)
    ends = ", ".join(dict.fromkeys(FINISHED[reply.finish_reason] for reply in replies))
    footer = f"{_counted(len(replies), 'reply', 'replies')}, {_tokens(tokens)}; {ends}" if replies else ""
    title = f'<div style="{BLOCK}"><b>{html.escape(chat.loaded.ref.label)}</b></div>'
    inspector = f"<details><summary>The text behind the next question</summary>{_prompt_view(chat, '')}</details>"
    return Html(title + transcript_html(chat.messages, assistant_name(chat), footer) + inspector)


FINISHED = {"end": "ended by itself", "stop": "ended at a stop string", "length": "cut at the token limit"}


def assistant_name(chat: Chat) -> str:
    """What the chat format calls the model: Falcon, or else the model's own name."""
    return "Falcon" if chat.loaded.ref.family == "falcon" else chat.loaded.ref.name


def _prompt_view(chat: Chat, text: str) -> Html:
    from helpers.prompts import encode

    prompt = chat.prompt(text)
    return prompt_html(prompt, chat.loaded.format.name, len(encode(chat.loaded.tokenizer, prompt)))


def reply_summary(reply: Reply) -> str:
    """One line about a finished reply: tokens, speed, time to the first token, why it ended."""
    speed = f", {reply.tokens_per_second:.0f} tokens/s" if reply.tokens > 1 else ""
    first = f"first after {reply.first_token_seconds:.2f} s"
    return f"{_tokens(reply.tokens)}{speed}, {first}; {FINISHED[reply.finish_reason]}"


def room_left(chat: Chat) -> str:
    """How many tokens of the context the next question may take."""
    left = chat.tokens_left()
    return f"{left} tokens left of the context" if left >= 0 else "context full: the oldest turns are left out"


class _QuestionPanel(ABC):
    """A text box whose question is answered in a thread of its own: Send or Enter asks, Stop ends it after a token.

    ``locked`` holds the controls that are off while a reply is written, ``sliders`` the sampling controls by the name
    of their field in Sampling.
    """

    REDRAW_SECONDS = 0.1
    ENTER_SECONDS = 0.2
    MAX_REPLY_TOKENS = 1024
    box: Box

    def __init__(self, sampling: Sampling, suggestions: Sequence[str]) -> None:
        import ipywidgets as w

        self._thread: Thread | None = None
        self._entered: Timer | None = None
        self._stopping = Event()
        self.status = w.HTML()
        self.text = w.Combobox(
            options=tuple(suggestions),
            placeholder="Ask something, then press Enter",
            continuous_update=False,
            layout={"width": "420px"},
        )
        self.send = w.Button(description="Send", button_style="primary", icon="paper-plane")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self._make_sliders(sampling)
        self.locked = [self.send, *self.sliders.values()]
        self.send.on_click(lambda _: self.ask())
        self.stop.on_click(lambda _: self._stopping.set())
        self.text.on_msg(lambda _, content, buffers: self._on_enter() if content.get("event") == "submit" else None)

    def _make_sliders(self, sampling: Sampling) -> None:
        from ipywidgets import FloatSlider, IntSlider

        most = max(self.MAX_REPLY_TOKENS, sampling.max_new_tokens)
        style = {"style": {"description_width": "initial"}, "layout": {"width": "280px"}}
        self.temperature = FloatSlider(
            sampling.temperature, min=0, max=2, step=0.05, description="Temperature", **style
        )
        self.top_p = FloatSlider(sampling.top_p, min=0.05, max=1, step=0.05, description="Top-p", **style)
        self.max_new_tokens = IntSlider(sampling.max_new_tokens, min=1, max=most, description="Max tokens", **style)
        self.sliders = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_new_tokens}
        for slider in self.sliders.values():
            slider.observe(lambda _: self._set_sampling({n: s.value for n, s in self.sliders.items()}), "value")

    @abstractmethod
    def _stream(self, text: str) -> bool:
        """Shows the answer to a question while it is written. False where it did not end by itself."""

    @abstractmethod
    def _set_sampling(self, values: Mapping[str, float]) -> None:
        """Takes what the sliders show."""

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)

    def _on_enter(self) -> None:
        """Enter reaches the kernel just before the text does, so wait a moment for the text."""
        self._entered = Timer(self.ENTER_SECONDS, self.ask)
        self._entered.start()

    def ask(self) -> None:
        """Sends the text box's question, unless a reply is being written or the box is blank."""
        text = self.text.value.strip()
        if not text or self.busy:
            return
        self.text.value = ""
        self._set_busy(True)
        self._thread = Thread(target=self._answer, args=(text,), name=type(self).__name__, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while a reply is being written."""
        return not self.stop.disabled

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the reply that is being written is finished. Raises TimeoutError when it takes longer."""
        if self._entered is not None:
            self._entered.join()
        if self._thread is not None:
            self._thread.join(seconds)
        if self.busy:
            raise TimeoutError(f"the reply is not finished after {seconds} s")

    def _answer(self, text: str) -> None:
        """The thread of one reply. Whatever goes wrong is shown in the panel; a lost question returns to its box."""
        finished = False
        try:
            finished = self._stream(text)
        except Exception as error:
            self._fail(error)
        finally:
            self.text.value = self.text.value or ("" if finished else text)
            self._set_busy(False)

    def _fail(self, error: Exception) -> None:
        """Shows why there is no answer."""
        self._say_error(error)

    def _set_busy(self, busy: bool) -> None:
        self._stopping.clear()
        for control in self.locked:
            control.disabled = busy
        self.stop.disabled = not busy

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _say_error(self, error: Exception) -> None:
        self.status.value = _error_html(error)


def _error_html(error: Exception) -> str:
    name = "" if isinstance(error, WorkbookError) else f"{type(error).__name__}: "
    return f'<b style="{ERROR}">{html.escape(f"{name}{error}")}</b>'


def _wrapped(controls: Iterable[Any]) -> HBox:
    """A row of controls that goes on below where the window is narrow."""
    from ipywidgets import HBox

    return HBox(list(controls), layout={"flex_flow": "row wrap"})


class ChatPanel(_QuestionPanel):
    """A conversation to take part in. The reply streams in from a thread of its own; Stop ends it after a token.

    A stopped reply is shown, but, like its question, not kept in the conversation.
    """

    def __init__(self, chat: Chat, suggestions: Sequence[str] = ()) -> None:
        import ipywidgets as w

        super().__init__(chat.sampling, suggestions)
        self.chat = chat
        self.conversation, self.prompt = w.HTML(), w.HTML()
        self.reset = w.Button(description="Reset", icon="trash")
        self.save = w.Button(description="Save", icon="save")
        self.path = w.Text("chat.json", description="File", layout={"width": "220px"})
        self.locked += [self.reset, self.save]
        self.box = self._layout()
        self._connect()
        self._draw()
        self._say(room_left(chat))

    def _layout(self) -> Box:
        import ipywidgets as w

        title = w.HTML(f"<b>{html.escape(self.chat.loaded.ref.label)}</b>")
        self.inspector = w.Accordion([self.prompt], titles=["Prompt inspector: the text the model reads"])
        asking = _wrapped([self.text, self.send, self.stop])
        settings = [_wrapped([self.reset, self.save, self.path]), _wrapped(self.sliders.values())]
        return w.VBox([title, self.conversation, asking, self.status, *settings, self.inspector])

    def _connect(self) -> None:
        self.reset.on_click(lambda _: self._reset())
        self.save.on_click(lambda _: self._save())
        self.text.observe(lambda _: self._draw_prompt(), "value")
        self.inspector.observe(lambda _: self._draw_prompt(), "selected_index")

    def _answer(self, text: str) -> None:
        super()._answer(text)
        self._draw_prompt()

    def _fail(self, error: Exception) -> None:
        self._draw()
        super()._fail(error)

    def _stream(self, text: str) -> bool:
        self._say("writing ...")
        self._draw(text, CURSOR)
        shown, drawn = "", 0.0
        pieces = self.chat.stream(text)
        for piece in pieces:
            shown += piece
            if self._stopping.is_set():
                pieces.close()
                self._draw(text, f"{shown} (stopped)")
                self._say("Stopped: this question and its reply are not kept.")
                return False
            if perf_counter() - drawn > self.REDRAW_SECONDS:
                self._draw(text, shown + CURSOR)
                drawn = perf_counter()
        self._draw()
        self._say(f"{reply_summary(self.chat.last_reply)}; {room_left(self.chat)}")
        return True

    def _draw(self, question: str | None = None, reply: str = "") -> None:
        """The conversation, with the turn in progress if there is one."""
        messages = self.chat.messages
        if question is not None:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        self.conversation.value = scrolled(transcript_html(messages, assistant_name(self.chat)))

    def _draw_prompt(self) -> None:
        """The prompt inspector, if it is open: the text for the question as it stands in the box."""
        if self.inspector.selected_index is not None:
            try:
                self.prompt.value = _prompt_view(self.chat, self.text.value)
            except WorkbookError as error:
                self.prompt.value = html.escape(str(error))

    def _set_sampling(self, values: Mapping[str, float]) -> None:
        self.chat.sampling = replace(self.chat.sampling, **values)
        self._draw_prompt()

    def _reset(self) -> None:
        self.chat.reset()
        self._draw()
        self._draw_prompt()
        self._say(f"A new conversation; {room_left(self.chat)}")

    def _save(self) -> None:
        try:
            self.chat.save(self.path.value)
            self._say(f"Saved to {self.path.value}")
        except OSError as error:
            self._say_error(error)


COMPARED_SAMPLING = Sampling(temperature=0, max_new_tokens=100)


def comparison_panel(
    models: Mapping[str, Side],
    sampling: Sampling = COMPARED_SAMPLING,
    *,
    script: Sequence[str] = (),
    precision: str = "bf16",
) -> ComparisonPanel | Html:
    """A panel that asks every model the same question; unattended, the replies to the questions of ``script``.

    Where a person is there, ``script`` gives the suggestions of the text box. ``precision`` is that of models given as
    ModelRef, which are loaded for their turn only. Unattended raises as ``comparison.compare`` does.
    """
    return show(
        lambda: ComparisonPanel(models, sampling, script, precision),
        lambda: compared_html(models, script, sampling, precision),
    )


def compared_html(models: Mapping[str, Side], script: Sequence[str], sampling: Sampling, precision: str) -> Html:
    """Asks every model the questions of ``script`` and shows the replies side by side, with their median speeds."""
    from helpers.comparison import compare

    compared = compare(script, models, sampling, precision=precision)
    asked = zip(script, zip(*compared.replies.values(), strict=True), strict=True)
    pairs = "".join(_pair_html(models, question, replies) for question, replies in asked)
    medians = "; ".join(f"{side} {_speed_text(row)}" for side, row in compared.speed().iterrows())
    caption = f"Medians of {_counted(len(script), 'reply', 'replies')}, written one at a time: {medians}"
    return Html(f'{_models_html(models)}{pairs}<div style="{BLOCK}">{_note(caption)}</div>')


def _pair_html(models: Mapping[str, Side], question: str, replies: Sequence[Reply]) -> str:
    columns = "".join(
        f'<div style="flex:1 1 300px;min-width:0">{reply_html(name, reply.text, _note(reply_summary(reply)))}</div>'
        for name, reply in zip(_column_names(models).values(), replies, strict=True)
    )
    row = f'<div style="display:flex;flex-wrap:wrap;gap:2px 10px">{columns}</div>'
    return f'<div style="max-width:860px;margin-top:10px;margin-bottom:14px">{question_html(question)}{row}</div>'


def _speed_text(row: Series) -> str:
    speed = "" if math.isnan(row["tokens/s"]) else f"{row['tokens/s']:.0f} tokens/s, "
    return f"{speed}first token after {row['first token (s)']:.2f} s"


def question_html(text: str) -> Html:
    """A question that several models are asked."""
    return Html(f'<div style="{BLOCK}">{_bubble("Question", text, ASKED)}</div>')


def reply_html(name: str, text: str, below: str = "") -> Html:
    """One model's reply under its name; ``below`` is HTML that stands under it."""
    return Html(f'<div style="{BLOCK}">{_bubble(name, text, REPLIED)}{below}</div>')


def _ref(model: Side) -> ModelRef:
    return model.ref if isinstance(model, Loaded) else model


def _models_html(models: Mapping[str, Side]) -> str:
    """Which model each side is, stand-ins named as such."""
    labels = (f"<b>{html.escape(side)}</b>: {html.escape(_ref(model).label)}" for side, model in models.items())
    return f'<div style="{BLOCK}">{"<br>".join(labels)}</div>'


def _column_names(models: Mapping[str, Side]) -> dict[str, str]:
    return {side: f"{side}: {_ref(model).name}" for side, model in models.items()}


class ComparisonPanel(_QuestionPanel):
    """One question to several models, their replies side by side. Every question is a fresh one, without history.

    Loaded models write at the same time, a piece from each in turn; where one is given as ModelRef they go one after
    the other, each loaded for its turn only. Stop ends all. ``replies`` holds the finished replies to the question
    last asked, ``columns`` what is shown of each side. An error of one side stands in its column.
    """

    def __init__(
        self, models: Mapping[str, Side], sampling: Sampling, suggestions: Sequence[str] = (), precision: str = "bf16"
    ) -> None:
        import ipywidgets as w

        super().__init__(sampling, suggestions)
        self.models, self.sampling, self.precision = models, sampling, precision
        self.replies: dict[str, Reply] = {}
        self.columns = {side: _Column(name) for side, name in _column_names(models).items()}
        self.question = w.HTML()
        row = _wrapped(column.view for column in self.columns.values())
        asking = _wrapped([self.text, self.send, self.stop])
        self.box = w.VBox(
            [w.HTML(_models_html(models)), self.question, row, asking, self.status, _wrapped(self.sliders.values())],
            layout={"max_width": "864px"},
        )

    @property
    def together(self) -> bool:
        """True where all models are loaded and so write at the same time."""
        return all(isinstance(model, Loaded) for model in self.models.values())

    def _set_sampling(self, values: Mapping[str, float]) -> None:
        self.sampling = replace(self.sampling, **values)

    def _stream(self, text: str) -> bool:
        self.replies = {}
        self.question.value = question_html(text)
        for column in self.columns.values():
            column.begin()
        for sides in [list(self.models)] if self.together else [[side] for side in self.models]:
            if not self._stopping.is_set():
                self._write(sides, text)
        self._say(self._ending())
        return len(self.replies) == len(self.models)

    def _write(self, sides: Sequence[str], question: str) -> None:
        """Shows the replies of these sides while they are written, a piece from each in turn."""
        columns = [self.columns[side] for side in sides]
        replies = [self._reply(side, question) for side in sides]
        drawn = 0.0
        for pieces in zip_longest(*replies, fillvalue=""):
            for column, piece in zip(columns, pieces, strict=True):
                column.text += piece
            if self._stopping.is_set():
                for reply in replies:
                    reply.close()
            elif perf_counter() - drawn > self.REDRAW_SECONDS:
                for column in columns:
                    column.draw()
                drawn = perf_counter()

    def _reply(self, side: str, question: str) -> Generator[str, None, None]:
        """The pieces of one side's reply; however it ends is shown below it."""
        from helpers.comparison import opened
        from helpers.generation import stream

        column, model = self.columns[side], self.models[side]
        below = _note("Stopped.")
        try:
            if isinstance(model, ModelRef):
                self._say(f"loading {model.label} in {self.precision} ...")
            with opened(model, self.precision) as loaded:
                self._say("writing ...")
                column.writing = True
                reply = yield from stream(loaded, [{"role": "user", "content": question}], self.sampling)
            self.replies[side] = reply
            below = _note(reply_summary(reply))
        except Exception as error:
            below = _error_html(error)
        finally:
            column.end(below)

    def _ending(self) -> str:
        if self._stopping.is_set():
            return "Stopped."
        if len(self.replies) < len(self.models):
            return "Not every model has replied: the reason stands in its column."
        if self.together and len(self.models) > 1:
            return "Done. The models wrote at the same time, so each was slower than it is alone."
        return "Done."


class _Column:
    """What is shown of one side: its name, the reply as far as it is written, and what stands below it."""

    def __init__(self, name: str) -> None:
        from ipywidgets import HTML

        self.name = name
        self.view = HTML(layout={"flex": "1 1 320px", "min_width": "0"})
        self.begin()

    def begin(self) -> None:
        """Shows an empty reply."""
        self.text, self.below, self.writing = "", "", False
        self.draw()

    def end(self, below: str) -> None:
        """Shows the reply as it is, with something below it."""
        self.below, self.writing = below, False
        self.draw()

    def draw(self) -> None:
        """Shows the reply as far as it is written."""
        self.view.value = reply_html(self.name, self.text + CURSOR * self.writing, self.below)


SHOWN_CHARACTERS = 400
MARKS = {"correct": ("correct", "wrong"), "concise": ("concise", "long")}
CELL = "text-align:left;vertical-align:top;padding:6px 10px;border:1px solid #b9c0ca;white-space:normal"


def replies_html(comparison: Comparison, rows: Sequence[int] | None = None) -> Html:
    """The replies of a comparison side by side: all, or those of the items ``rows`` (places from 0).

    A reply to an item with an answer key is marked by ``comparison.RULES``: correct or wrong, concise or long.
    """
    places = range(len(comparison.items)) if rows is None else rows
    heads = [f"{html.escape(side)}<br>{_label(comparison.labels[side])}" for side in comparison.sides]
    lines = [_table_row("th", ["question", *heads], "background:#dde4ec;color:#1c1c1c")]
    for place in places:
        item = comparison.items[place]
        replies = [_reply_cell(item, comparison.replies[side][place]) for side in comparison.sides]
        lines.append(_table_row("td", [_text(item.question), *replies], "background:#ffffff;color:#1c1c1c"))
    width = f"width:100%;min-width:{220 * (1 + len(heads))}px;table-layout:fixed;border-collapse:collapse;margin:0"
    return Html(f'<div style="{BLOCK};overflow-x:auto"><table style="{width}">{"".join(lines)}</table></div>')


def _label(label: str) -> str:
    return f'<span style="font-size:12px;font-weight:normal">{html.escape(label)}</span>'


def _table_row(tag: str, cells: Sequence[str], colours: str) -> str:
    row = "".join(f'<{tag} style="{colours};{CELL}">{cell}</{tag}>' for cell in cells)
    return f'<tr style="{colours}">{row}</tr>'


def _text(text: str) -> str:
    """At most ``SHOWN_CHARACTERS`` of a text, its white space kept."""
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} …"
    return f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(cut)}</div>'


def _reply_cell(item: Item, reply: Reply) -> str:
    from helpers.comparison import RULES

    marks = [_mark(rule, passes(item, reply)) for rule, passes in RULES.items()] if item.answer else []
    return f'{_text(reply.text.strip() or "(no text)")}<div style="margin-top:4px">{" ".join(marks)}</div>'


def _mark(rule: str, passed: bool) -> str:
    word = MARKS[rule][not passed]
    return f'<span style="{GOOD if passed else BAD};font-size:12px;padding:1px 6px;border-radius:8px">{word}</span>'


class LiveCurve:
    """A figure that grows with a training: ``on_point=curve.update``, and at the end ``curve.finish(history)``.

    ``draw`` makes the figure of a history. It is shown in the cell that is the first to call, and replaced in place.
    """

    REDRAW_SECONDS = 1.0

    def __init__(self, draw: Callable[[Sequence[Point]], Figure]) -> None:
        from IPython.display import DisplayHandle

        self._draw, self._display = draw, DisplayHandle()
        self._drawn: float | None = None

    def update(self, history: Sequence[Point]) -> None:
        """Shows a history, unless one was shown within the last second."""
        if self._drawn is None or perf_counter() - self._drawn >= self.REDRAW_SECONDS:
            self.finish(history)

    def finish(self, history: Sequence[Point]) -> None:
        """Shows a history in any case."""
        display = self._display.display if self._drawn is None else self._display.update
        display(self._draw(history))
        self._drawn = perf_counter()


@dataclass(frozen=True)
class Setup:
    """What the memory planner plans for; by default what the article names for Falcon-180B in bf16 (A16).

    ``batch_size`` counts the sequences on all GPUs together; ``gpu_gb`` is a GPU's size as sold (80 GB: 80e9 bytes).
    """

    model: str = "tiiuae/falcon-180B"
    precision: str = "bf16"
    mode: str = "inference"
    batch_size: int = 1
    context_tokens: int = 2048
    gpu_gb: int = 80
    gpu_count: int = 8


@dataclass(frozen=True)
class Plan:
    """What a setup needs, and how that lies on its GPUs."""

    setup: Setup
    estimate: MemoryEstimate
    placed: Placement


PLANNED_PRECISIONS = ("fp32", "bf16", "int8", "nf4")


def memory_planner(setup: Setup = Setup()) -> MemoryPlanner | Views:
    """Sliders over ``memory.estimate`` and ``memory.place``; unattended, the table and the figures of ``setup``."""
    return show(lambda: MemoryPlanner(setup), lambda: Views([plan_html(plan(setup)), *plan_figures(plan(setup))]))


def plan(setup: Setup) -> Plan:
    """The estimate and the placement for a setup. Raises WorkbookError if precision and mode do not go together.

    Inference places whole layers (``memory.place``), training is spread evenly (``memory.shard``).
    """
    from helpers import memory

    config = memory.published_config(setup.model)
    workload = memory.Workload(setup.batch_size, setup.context_tokens)
    estimate = memory.estimate(config, setup.precision, mode=setup.mode, workload=workload)
    gpus = [setup.gpu_gb * 1e9] * setup.gpu_count
    if setup.mode == "inference":
        placed = memory.place(config, setup.precision, gpus, workload=workload)
    else:
        placed = memory.shard(config, setup.precision, gpus, mode=setup.mode, workload=workload)
    return Plan(setup, estimate, placed)


def plan_html(planned: Plan) -> Html:
    """What is planned, the parts in GiB, their sum, and whether that fits."""
    parts = {plots.part_name(name): size for name, size in planned.estimate.parts.items() if size}
    rows = "".join(_row(name, size) for name, size in [*parts.items(), ("sum", planned.estimate.total)])
    colours = GOOD if planned.placed.fits else BAD
    verdict = f'<div style="{colours};padding:4px 10px;margin-top:6px">{html.escape(verdict_text(planned))}</div>'
    title = f"<b>{html.escape(setup_text(planned.setup))}</b>"
    return Html(f'<div style="{BLOCK}">{title}<table>{rows}</table>{verdict}</div>')


def setup_text(setup: Setup) -> str:
    """What a setup plans for, in words."""
    sequences = _counted(setup.batch_size, "sequence", "sequences")
    return f"{setup.model}, {setup.mode} in {setup.precision}, {sequences} of {setup.context_tokens} tokens"


def _row(name: str, size: int) -> str:
    return f'<tr><th style="text-align:left">{name}</th><td style="text-align:right">{size / GIB:,.1f} GiB</td></tr>'


def verdict_text(planned: Plan) -> str:
    """Whether a plan fits, as a sentence."""
    setup, placed = planned.setup, planned.placed
    gpus = f"{_counted(setup.gpu_count, 'GPU', 'GPUs')} of {setup.gpu_gb} GB"
    if placed.shortfall:
        return f"Does not fit on {gpus}: it {placed.shortfall}."
    held, size = max(placed.per_device_bytes.values()), setup.gpu_gb * 1e9
    fullest = f"the fullest holds {held / GIB:.1f} of {size / GIB:.1f} GiB"
    how = "in whole layers" if setup.mode == "inference" else "spread evenly (ZeRO-3)"
    return f"Fits on {gpus}, {how}: {fullest}."


def plan_figures(planned: Plan) -> list[Figure]:
    """The memory of every precision that goes with the mode, and the load of each GPU."""
    setup = planned.setup
    size = setup.gpu_gb * 1e9
    machine = {f"{setup.gpu_count}x {setup.gpu_gb} GB": size * setup.gpu_count}
    return [
        plots.memory_by_precision(_estimates(setup), machine, setup.model),
        plots.placement(planned.placed, dict.fromkeys(range(setup.gpu_count), size), setup.model),
    ]


def _estimates(setup: Setup) -> list[MemoryEstimate]:
    estimates = []
    for precision in PLANNED_PRECISIONS:
        with suppress(WorkbookError):  # a precision that does not go with the mode
            estimates.append(plan(replace(setup, precision=precision)).estimate)
    return estimates


class MemoryPlanner:
    """Memory of a published model, part by part, as its controls say; ``controls`` has one for each field of Setup."""

    def __init__(self, setup: Setup) -> None:
        import ipywidgets as w

        self.controls = _planner_controls(setup)
        self.table = w.HTML()
        self.pictures = [w.Image(format="png", layout={"width": "520px", "margin": "4px"}) for _ in range(2)]
        self.figures = w.HBox(self.pictures, layout={"flex_flow": "row wrap"})
        settings = w.VBox(list(self.controls.values()))
        top = w.HBox([settings, self.table], layout={"flex_flow": "row wrap", "align_items": "flex-start"})
        self.box = w.VBox([top, self.figures])
        for control in self.controls.values():
            control.observe(lambda _: self.update(), "value")
        self.update()

    @property
    def setup(self) -> Setup:
        """The setup that the controls show."""
        return Setup(**{name: control.value for name, control in self.controls.items()})

    def update(self) -> None:
        """Shows the plan for the controls' setup, or why there is none."""
        try:
            planned = plan(self.setup)
        except WorkbookError as error:
            self.table.value = f'<div style="{ERROR}">{html.escape(str(error))}</div>'
            self.figures.layout.display = "none"
            return
        self.table.value = plan_html(planned)
        for picture, figure in zip(self.pictures, plan_figures(planned), strict=True):
            picture.value = plots.png(figure)
        self.figures.layout.display = "flex"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.box._repr_mimebundle_(**options)


def _planner_controls(setup: Setup) -> dict[str, ValueWidget]:
    """One control for each field of Setup."""
    import ipywidgets as w

    from helpers.memory import MODES, published_models

    contexts = sorted({setup.context_tokens, *(2**power for power in range(7, 14))})
    sizes = [(f"{size} GB", size) for size in sorted({setup.gpu_gb, 16, 24, 40, 48, 80, 141})]
    slider = partial(w.IntSlider, min=1, max=64, continuous_update=False)
    controls: dict[str, ValueWidget] = {
        "model": w.Dropdown(options=published_models(), value=setup.model, description="Model"),
        "precision": w.Dropdown(options=PLANNED_PRECISIONS, value=setup.precision, description="Precision"),
        "mode": w.Dropdown(options=MODES, value=setup.mode, description="Work"),
        "batch_size": slider(setup.batch_size, description="Sequences"),
        "context_tokens": w.SelectionSlider(
            options=contexts,
            value=setup.context_tokens,
            description="Context (tokens)",
            continuous_update=False,
        ),
        "gpu_gb": w.Dropdown(options=sizes, value=setup.gpu_gb, description="GPU memory"),
        "gpu_count": slider(setup.gpu_count, description="GPUs"),
    }
    for control in controls.values():
        control.style.description_width = "110px"
        control.layout.width = "380px"
    return controls
