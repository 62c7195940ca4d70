"""The executed notebook as it is saved after each cell: redacted, its streams merged, widgets replaced.

What the kernel sent stays as it was sent, because nbclient counts on its places. Only a cell that has changed is
redacted and written as JSON again, so a notebook with megabytes of output costs as much as its cells together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from helpers.runs.capturing import _holds_widgets, _resolved, _shown_widgets, _Widgets
from helpers.runs.document import _make_portable
from helpers.runs.redaction import _redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbformat import NotebookNode


@dataclass
class _Written:
    """A cell's JSON, and what it was made of."""

    outputs: list[object]
    text: str


@dataclass
class _Document:
    """One notebook's JSON, brought up to date cell by cell."""

    secrets: tuple[str, ...]
    widgets: _Widgets = field(default_factory=_Widgets)
    written: dict[int, _Written] = field(default_factory=dict)

    def text(self, notebook: NotebookNode) -> str:
        """The notebook as nbformat would write it."""
        shown = _shown_widgets(notebook.cells, self.widgets)
        cells = [self._cell(number, cell, shown) for number, cell in enumerate(notebook.cells)]
        rest = {key: value for key, value in notebook.items() if key != "cells"}
        envelope = _json(_portable({**rest, "cells": []}, self.secrets))
        listed = ",\n  ".join(cells)
        return envelope.replace('"cells": []', f'"cells": [\n  {listed}\n ]' if cells else '"cells": []', 1) + "\n"

    def _cell(self, number: int, cell: NotebookNode, shown: set[str]) -> str:
        outputs = cell.get("outputs", [])
        parts = _parts(cell, outputs)
        done = self.written.get(number)
        if done is not None and _same(done.outputs, parts) and not _holds_widgets(outputs):
            return done.text
        content = dict(cell)
        if "outputs" in content:
            content["outputs"] = _merged(_resolved(outputs, self.widgets, shown))
        (saved,) = _portable({"metadata": {}, "cells": [content]}, self.secrets)["cells"]
        # As nbformat indents a cell: no text in JSON holds a line end.
        text = _json(saved).replace("\n", "\n  ")
        self.written[number] = _Written(parts, text)
        return text


def _parts(cell: NotebookNode, outputs: Iterable[NotebookNode]) -> list[object]:
    """All that may be exchanged in a cell while a notebook runs: whole outputs, and the data of one."""
    parts: list[object] = [cell.get("execution_count")]
    for output in outputs:
        parts += (output, output.get("data"))
    return parts


def _same(before: list[object], now: list[object]) -> bool:
    # By identity: to compare the contents would read all of them again.
    return len(before) == len(now) and all(first is second for first, second in zip(before, now, strict=True))


def _portable(document: Mapping[str, object], secrets: tuple[str, ...]) -> dict[str, Any]:
    """A notebook, or a cell in one, redacted and without the records of papermill."""
    from nbformat import from_dict
    from nbformat.v4.rwbase import split_lines

    notebook = from_dict(_redact(document, secrets))
    _make_portable(notebook)
    portable: dict[str, Any] = split_lines(notebook)
    return portable


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)


def _merged(outputs: Iterable[NotebookNode]) -> list[dict[str, Any]]:
    """The outputs in their order, neighbours of one stream as one, each line as a terminal would leave it."""
    merged: list[dict[str, Any]] = []
    texts: list[str] = []
    for output in outputs:
        if output["output_type"] != "stream":
            merged.append(output)
            continue
        last = merged[-1] if merged else {}
        if last.get("output_type") != "stream" or last["name"] != output["name"]:
            texts = []
            merged.append(dict(output) | {"text": texts})
        texts.append("".join(output["text"]))
    for entry in merged:
        if entry["output_type"] == "stream":
            entry["text"] = _overwritten("".join(entry["text"]))
    return merged


def _overwritten(text: str) -> str:
    """The text without what carriage returns have overwritten, such as the steps of a progress bar."""
    if "\r" not in text:
        return text
    lines = []
    for line in text.split("\n"):
        # The last character apart: a return at the end of a line overwrites nothing.
        lines.append(line[:-1].rpartition("\r")[2] + line[-1:])
    return "\n".join(lines)
