"""The chat panel: a conversation to take part in. Unattended, the same call plays a script."""

from __future__ import annotations

import html
from time import perf_counter
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.panels.html import (
    _counted,
    _finish,
    _piece,
    _prompt_html,
    _render,
    _reply_summary,
    _scrolled,
    _show,
    _token_count,
    _transcript_html,
)
from helpers.panels.widgets import CURSOR, _QuestionPanel, _wrapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipywidgets import Box

    from helpers.generation.chat import Chat
    from helpers.generation.sampling import Reply
    from helpers.panels.html import _Html


def chat_panel(chat: Chat, *, script: Sequence[str] = ()) -> _ChatPanel | _Html:
    """A panel to talk in; unattended, the conversation that the questions of ``script`` lead to.

    If a person is there, ``script`` gives the suggestions of the text box.
    """
    return _show(lambda: _ChatPanel(chat, script), lambda: _played_html(chat, script))


def _played_html(chat: Chat, script: Sequence[str]) -> _Html:
    """Ask the questions of ``script`` and show the whole conversation, with the text behind the next question."""
    from helpers.generation.chat import play

    replies = play(chat, script)
    transcript = _transcript_html(chat.transcript, _assistant_name(chat), _played_summary(replies))
    return _render("played.j2", label=chat.loaded.ref.label, transcript=transcript, prompt=_prompt_view(chat, ""))


def _played_summary(replies: Sequence[Reply]) -> str:
    if not replies:
        return ""
    tokens = sum(reply.tokens for reply in replies)
    ends = ", ".join(dict.fromkeys(_finish(reply) for reply in replies))
    return f"{_counted(len(replies), 'reply', 'replies')}, {_token_count(tokens)}; {ends}"


def _assistant_name(chat: Chat) -> str:
    """What the chat format calls the model: Falcon, or else the model's own name."""
    ref = chat.loaded.ref
    return "Falcon" if ref.family == "falcon" else ref.name


def _prompt_view(chat: Chat, text: str) -> _Html:
    prompt = chat.prompt(text)
    form = chat.loaded.format
    return _prompt_html(prompt, form.name, len(form.tokens(chat.loaded.tokenizer, prompt)))


def _space_left(chat: Chat) -> str:
    """How many tokens of the context the next question may take."""
    left = chat.tokens_left()
    if left < 0:
        return "context full: the oldest turns are left out"
    return f"{left} tokens left of the context"


class _ChatPanel(_QuestionPanel):
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
        self._say(_space_left(chat))

    def _layout(self) -> Box:
        import ipywidgets as w

        title = w.HTML(_piece("title", self.chat.loaded.ref.label))
        self.inspector = w.Accordion([self.prompt], titles=["Prompt inspector: the text the model reads"])
        asking = _wrapped([self.text, self.send, self.stop])
        settings = [_wrapped([self.reset, self.save, self.path]), _wrapped(self.sliders)]
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
        for part in pieces:
            shown += part
            if self._stopping.is_set():
                # Closing the generator ends the generation itself, not only what is shown of it.
                pieces.close()
                self._draw(text, f"{shown} (stopped)")
                self._say("Stopped: this question and its reply are not kept.")
                return False
            # Each drawing sends the whole conversation to the browser.
            if perf_counter() - drawn > self.REDRAW_SECONDS:
                self._draw(text, shown + CURSOR)
                drawn = perf_counter()
        self._draw()
        if self.chat.last_reply is not None:
            self._say(f"{_reply_summary(self.chat.last_reply)}; {_space_left(self.chat)}")
        return True

    def _draw(self, question: str | None = None, reply: str = "") -> None:
        """Show the conversation, with the turn in progress if there is one."""
        messages = self.chat.transcript
        if question is not None:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        self.conversation.value = _scrolled(_transcript_html(messages, _assistant_name(self.chat)))

    def _draw_prompt(self) -> None:
        """Show, if the prompt inspector is open, the text for the question as it stands in the box."""
        if self.inspector.selected_index is not None:
            try:
                self.prompt.value = _prompt_view(self.chat, self.text.value)
            except WorkbookError as error:
                self.prompt.value = html.escape(str(error))

    def _set_sampling(self) -> None:
        self.chat.sampling = self._chosen(self.chat.sampling)
        # The length of the reply decides how much of the history fits into the prompt.
        self._draw_prompt()

    def _reset(self) -> None:
        self.chat.reset()
        self._draw()
        self._draw_prompt()
        self._say(f"A new conversation; {_space_left(self.chat)}")

    def _save(self) -> None:
        try:
            self.chat.save(self.path.value)
            self._say(f"Saved to {self.path.value}")
        except WorkbookError as error:
            self._say_error(error)
