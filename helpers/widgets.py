"""What a person plays with: the memory planner and the chat panel, and the HTML pieces that show texts and tokens.

Each panel is a small class over plain functions: its controls are attributes (``panel.send.click()``), so code drives
it as a person does. Where nobody is there to play (``results.unattended``) the same call gives a static view.
All text of models and users is escaped; styles are inline, set both colours, and need nothing from outside.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, Thread, Timer
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from helpers import plots
from helpers.types import GIB, MemoryEstimate, Message, Placement, Reply, WorkbookError

if TYPE_CHECKING:
    from ipywidgets import Box, ValueWidget
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from helpers.chat import Chat

T = TypeVar("T")

CURSOR = " ▌"
ERROR = "background:#fbe3df;color:#8c1d0a;padding:2px 6px"

BLOCK = "font-family:sans-serif;font-size:14px;line-height:1.45;max-width:860px"
MONOSPACE = "font-family:monospace;font-size:13px;white-space:pre-wrap;overflow-wrap:anywhere"
BUBBLES = {
    "system": "background:#fff3cd;color:#1c1c1c;margin-right:80px",
    "user": "background:#cfe4f7;color:#1c1c1c;margin-left:80px",
    "assistant": "background:#eeeeee;color:#1c1c1c;margin-right:80px",
}
TOKEN_COLOURS = ("#cfe4f7", "#fde3b0", "#c9ecdf", "#f4d6e6")
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
    from helpers.results import unattended

    return static() if unattended() else live()


def transcript_html(messages: Sequence[Message], assistant: str = "Falcon", footer: str = "") -> Html:
    """A conversation as bubbles; ``assistant`` is the name shown for the model."""
    names = {"system": "System", "user": "User", "assistant": assistant}
    bubbles = "".join(_bubble(names[message["role"]], message["content"], message["role"]) for message in messages)
    return Html(f'<div style="{BLOCK}">{bubbles}{_note(footer)}</div>')


def scrolled(content: str, height: int = 420) -> Html:
    """The content in a box at most ``height`` pixels high that stays scrolled to its end."""
    style = f"max-width:880px;max-height:{height}px;overflow-y:auto;display:flex;flex-direction:column-reverse"
    return Html(f'<div style="{style}"><div>{content}</div></div>')


def _bubble(name: str, content: str, role: str) -> str:
    return (
        f'<div style="{BUBBLES[role]};padding:6px 12px;margin-top:4px;margin-bottom:4px;border-radius:10px">'
        f'<b style="font-size:12px">{html.escape(name)}</b>'
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html.escape(content.strip())}</div></div>'
    )


def tokens_html(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Html:
    """A strip of tokens: each with its own background, its id on hover, spaces and line ends visible."""
    pieces = "".join(_token(token, tokenizer.decode([token]), place) for place, token in enumerate(ids))
    return Html(f'<div style="{BLOCK}"><div style="{MONOSPACE}">{pieces}</div>{_note(_tokens(len(ids)))}</div>')


def _token(token: int, text: str, place: int) -> str:
    colour = TOKEN_COLOURS[place % len(TOKEN_COLOURS)]
    style = f"background:{colour};color:#1c1c1c;padding:1px 0"
    line_ends = "<br>" * text.count("\n")
    return f'<span title="id {token}" style="{style}">{html.escape(plots.visible(text))}</span>{line_ends}'


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


class ChatPanel:
    """A conversation to take part in. The reply streams in from a thread of its own; Stop ends it after a token.

    A stopped reply is shown, but, like its question, not kept in the conversation.
    """

    REDRAW_SECONDS = 0.1
    ENTER_SECONDS = 0.2
    MAX_REPLY_TOKENS = 1024

    def __init__(self, chat: Chat, suggestions: Sequence[str] = ()) -> None:
        import ipywidgets as w

        self.chat = chat
        self._thread: Thread | None = None
        self._entered: Timer | None = None
        self._stopping = Event()
        self.conversation, self.status, self.prompt = w.HTML(), w.HTML(), w.HTML()
        self.text = w.Combobox(
            options=tuple(suggestions),
            placeholder="Ask something, then press Enter",
            continuous_update=False,
            layout={"width": "420px"},
        )
        self.send = w.Button(description="Send", button_style="primary", icon="paper-plane")
        self.stop = w.Button(description="Stop", icon="stop", disabled=True)
        self.reset = w.Button(description="Reset", icon="trash")
        self.save = w.Button(description="Save", icon="save")
        self.path = w.Text("chat.json", description="File", layout={"width": "220px"})
        self._make_sliders()
        self.box = self._layout()
        self._connect()
        self._draw()
        self._say(room_left(chat))

    def _make_sliders(self) -> None:
        from ipywidgets import FloatSlider, IntSlider

        sampling = self.chat.sampling
        most = max(self.MAX_REPLY_TOKENS, sampling.max_new_tokens)
        style = {"style": {"description_width": "initial"}, "layout": {"width": "280px"}}
        self.temperature = FloatSlider(
            sampling.temperature, min=0, max=2, step=0.05, description="Temperature", **style
        )
        self.top_p = FloatSlider(sampling.top_p, min=0.05, max=1, step=0.05, description="Top-p", **style)
        self.max_new_tokens = IntSlider(sampling.max_new_tokens, min=1, max=most, description="Max tokens", **style)

    @property
    def sliders(self) -> dict[str, ValueWidget]:
        """The sampling controls by the name of their field in Sampling."""
        return {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_new_tokens}

    def _layout(self) -> Box:
        import ipywidgets as w

        title = w.HTML(f"<b>{html.escape(self.chat.loaded.ref.label)}</b>")
        self.inspector = w.Accordion([self.prompt], titles=["Prompt inspector: the text the model reads"])
        rows = [
            w.HBox(row, layout={"flex_flow": "row wrap"})
            for row in ([self.text, self.send, self.stop], [self.reset, self.save, self.path], [*self.sliders.values()])
        ]
        return w.VBox([title, self.conversation, rows[0], self.status, *rows[1:], self.inspector])

    def _connect(self) -> None:
        self.send.on_click(lambda _: self.ask())
        self.stop.on_click(lambda _: self._stopping.set())
        self.reset.on_click(lambda _: self._reset())
        self.save.on_click(lambda _: self._save())
        self.text.on_msg(lambda _, content, buffers: self._on_enter() if content.get("event") == "submit" else None)
        self.text.observe(lambda _: self._draw_prompt(), "value")
        self.inspector.observe(lambda _: self._draw_prompt(), "selected_index")
        for slider in self.sliders.values():
            slider.observe(lambda _: self._set_sampling(), "value")

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
        self._thread = Thread(target=self._answer, args=(text,), name="chat-panel", daemon=True)
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
            self._draw()
            self._say_error(error)
        finally:
            self.text.value = self.text.value or ("" if finished else text)
            self._set_busy(False)
            self._draw_prompt()

    def _stream(self, text: str) -> bool:
        """Shows the reply while it is written. False where Stop ended it."""
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

    def _set_busy(self, busy: bool) -> None:
        self._stopping.clear()
        for control in (self.send, self.reset, self.save, *self.sliders.values()):
            control.disabled = busy
        self.stop.disabled = not busy

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

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _say_error(self, error: Exception) -> None:
        name = "" if isinstance(error, WorkbookError) else f"{type(error).__name__}: "
        self.status.value = f'<b style="{ERROR}">{html.escape(f"{name}{error}")}</b>'

    def _set_sampling(self) -> None:
        values = {name: slider.value for name, slider in self.sliders.items()}
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
    """The estimate and the placement for a setup. Raises WorkbookError where precision and mode do not go together.

    Inference places whole layers (``memory.place``), training is spread evenly (``memory.shard``).
    """
    from helpers import memory

    config = memory.published_config(setup.model)
    work = {"batch_size": setup.batch_size, "context_tokens": setup.context_tokens}
    estimate = memory.estimate(config, setup.precision, mode=setup.mode, **work)
    gpus = [setup.gpu_gb * 1e9] * setup.gpu_count
    if setup.mode == "inference":
        placed = memory.place(config, setup.precision, gpus, **work)
    else:
        placed = memory.shard(config, setup.precision, gpus, mode=setup.mode, **work)
    return Plan(setup, estimate, placed)


def plan_html(planned: Plan) -> Html:
    """What is planned, the parts in GiB, their sum, and whether that fits."""
    parts = {plots.part_name(name): size for name, size in planned.estimate.parts.items() if size}
    rows = "".join(_row(name, size) for name, size in [*parts.items(), ("sum", planned.estimate.total)])
    colours = "background:#d5f0e6;color:#00482f" if planned.placed.fits else ERROR
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
    if not placed.fits:
        return f"Does not fit on {gpus}: {placed.why_not}."
    fullest = (
        f"the fullest holds {max(placed.per_device_bytes.values()) / GIB:.1f} of {setup.gpu_gb * 1e9 / GIB:.1f} GiB"
    )
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

    style = {"style": {"description_width": "110px"}, "layout": {"width": "380px"}}
    contexts = sorted({setup.context_tokens, *(2**power for power in range(7, 14))})
    sizes = [(f"{size} GB", size) for size in sorted({setup.gpu_gb, 16, 24, 40, 48, 80, 141})]
    slider = partial(w.IntSlider, min=1, max=64, continuous_update=False, **style)
    return {
        "model": w.Dropdown(options=published_models(), value=setup.model, description="Model", **style),
        "precision": w.Dropdown(options=PLANNED_PRECISIONS, value=setup.precision, description="Precision", **style),
        "mode": w.Dropdown(options=MODES, value=setup.mode, description="Work", **style),
        "batch_size": slider(setup.batch_size, description="Sequences"),
        "context_tokens": w.SelectionSlider(
            options=contexts,
            value=setup.context_tokens,
            description="Context (tokens)",
            continuous_update=False,
            **style,
        ),
        "gpu_gb": w.Dropdown(options=sizes, value=setup.gpu_gb, description="GPU memory", **style),
        "gpu_count": slider(setup.gpu_count, description="GPUs"),
    }
