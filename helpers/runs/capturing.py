"""What a cell prints inside an output widget (``with widgets.Output():``, ``interact``), kept for the saved notebook.

A browser would show it in the widget, and there is no browser in a run. nbclient's own stand-in for the widget fails
unless all states of widgets are saved, takes time with the square of the output, and ends the run if widgets are left
in another order than entered. So here is another one. The output stays in the cell that made it, marked with its
widget; ``_resolved`` shows it there, or where the widget itself is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbformat import NotebookNode

_Message = dict[str, Any]
_VIEW = "application/vnd.jupyter.widget-view+json"
_WIDGET, _CLEARED = "captured_by", "captured_before_clear"
_MODEL = "IPY_MODEL_"  # how a widget's state names another widget


@dataclass
class _Widgets:
    """The output widgets of one notebook, by the id that views name, and the states of all widgets."""

    outputs: dict[str, _OutputWidget] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def registry(self) -> dict[str, dict[str, Callable[..., _OutputWidget]]]:
        """What nbclient is to make of a widget, by its module and model."""
        return {"@jupyter-widgets/output": {"OutputModel": functools.partial(_OutputWidget, self)}}

    def within(self, model: str) -> Iterator[_OutputWidget]:
        """The output widgets in a widget, itself included, in the order of its parts."""
        pending, seen = [model], set()
        while pending:
            name = pending.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self.outputs:
                yield self.outputs[name]
            pending[:0] = _models(self.states.get(name, {}))


class _OutputWidget:
    """Stands for one output widget: nbclient hands it what is put out while the widget is entered."""

    def __init__(self, widgets: _Widgets, comm_id: str, state: _Message, client: Any, executor: Any) -> None:
        self.comm_id, self.client, self.executor = comm_id, client, executor
        self.outputs: list[NotebookNode] = _nodes(state.get("outputs", ()))
        self.entered: str | None = None  # the id of the message whose output is captured
        self.parent: _Message = {}
        self.clears_next = False
        widgets.outputs[comm_id], widgets.states = self, executor.widget_state

    def handle_msg(self, message: _Message) -> None:
        """Take in what the kernel says of the widget: it is entered or left, or its outputs are set."""
        data = message["content"]["data"]
        # The kernel repeats what it was told, as "echo_update".
        if data.get("method") != "update":
            return
        self.parent, state = message["parent_header"], data.get("state", {})
        if "outputs" in state:
            self.outputs = _nodes(state["outputs"])
        if "msg_id" in state:
            self._leave()
            self.entered = state["msg_id"] or None
            if self.entered:
                self.executor.output_hook_stack[self.entered].append(self)

    def output(self, outputs: list[NotebookNode], message: _Message, display_id: str | None, cell: int) -> None:
        """Capture one output, in the widget and, marked, in the cell."""
        from nbformat.v4 import output_from_msg

        try:
            output = output_from_msg(message)
        except ValueError:  # no kind of output, as for nbclient itself
            return
        if self.clears_next:
            self._clear()
        output[_WIDGET] = self.comm_id
        if display_id:  # so that a later update finds it
            places = self.executor._display_id_map.setdefault(display_id, {})  # noqa: SLF001
            places.setdefault(cell, []).append(len(outputs))
        outputs.append(output)
        self.outputs.append(output)

    def clear_output(self, _outputs: list[NotebookNode], message: _Message, _cell: int) -> None:
        """Forget what was captured: now, or if the kernel waits, at the next output."""
        self.clears_next = bool(message["content"].get("wait"))
        if not self.clears_next:
            self._clear()

    def _clear(self) -> None:
        for output in self.outputs:
            output[_CLEARED] = True
        self.outputs, self.clears_next = [], False

    def _leave(self) -> None:
        if self.entered is None:
            return
        stack = self.executor.output_hook_stack[self.entered]
        if self in stack:  # threads may leave in another order than they entered
            stack.remove(self)
        self._tell_kernel()

    def _tell_kernel(self) -> None:
        """Set the widget's outputs in the kernel, which a later cell may read; once, not with each output."""
        state = {"outputs": [dict(_unmarked(output)) for output in self.outputs]}
        content = {"data": {"method": "update", "state": state, "buffer_paths": []}, "comm_id": self.comm_id}
        message = self.client.session.msg("comm_msg", content=content, parent=self.parent)
        self.client.shell_channel.send(message)


def _resolved(outputs: Iterable[NotebookNode], widgets: _Widgets, shown: set[str]) -> list[NotebookNode]:
    """The outputs of a cell with what widgets captured in the place of their views.

    ``shown`` are the output widgets that some cell shows; what another one captured stays where it was made.
    """
    resolved: list[NotebookNode] = []
    for output in outputs:
        if output.get(_WIDGET) in shown or output.get(_CLEARED):
            continue
        if _view(output):
            for widget in widgets.within(_view(output)):
                inner = [_unmarked(captured) for captured in widget.outputs if _view(captured) != widget.comm_id]
                resolved += _resolved(inner, _without(widgets, widget), shown)
        else:
            resolved.append(_unmarked(output) if _WIDGET in output else output)
    return resolved


def _shown_widgets(cells: Iterable[NotebookNode], widgets: _Widgets) -> set[str]:
    """The output widgets that some cell shows, in another widget or on their own."""
    shown: set[str] = set()
    for cell in cells:
        for output in cell.get("outputs", ()):
            # Also a view that another widget captured is shown somewhere; its own view, nowhere.
            if _view(output) not in ("", output.get(_WIDGET)) and not output.get(_CLEARED):
                shown.update(widget.comm_id for widget in widgets.within(_view(output)))
    return shown


def _holds_widgets(outputs: Iterable[NotebookNode]) -> bool:
    """True if the outputs of a cell depend on what widgets hold."""
    return any(_view(output) or _WIDGET in output for output in outputs)


def _view(output: Mapping[str, Any]) -> str:
    """The id of the widget that an output shows; empty if it shows none."""
    data = output.get("data", {}).get(_VIEW)
    return str(data.get("model_id", "")) if isinstance(data, Mapping) else ""


def _without(widgets: _Widgets, widget: _OutputWidget) -> _Widgets:
    # A widget may have captured its own view: shown once is enough.
    others = {name: other for name, other in widgets.outputs.items() if other is not widget}
    return _Widgets(others, widgets.states)


def _unmarked(output: NotebookNode) -> NotebookNode:
    from nbformat import NotebookNode as Node

    return Node({key: value for key, value in output.items() if key not in (_WIDGET, _CLEARED)})


def _nodes(outputs: Iterable[Mapping[str, Any]]) -> list[NotebookNode]:
    from nbformat import from_dict

    return [from_dict(dict(output)) for output in outputs]


def _models(state: object) -> list[str]:
    """The widgets that a widget's state names, such as the children of a box, in their order."""
    if isinstance(state, str):
        return [state.removeprefix(_MODEL)] if state.startswith(_MODEL) else []
    parts: Iterable[object] = ()
    if isinstance(state, Mapping):
        parts = state.values()
    elif isinstance(state, list | tuple):
        parts = state
    names = []
    for part in parts:
        names += _models(part)
    return names
