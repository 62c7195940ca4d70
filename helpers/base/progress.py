"""Progress bars, and a line that says what is going on: in a terminal, in a notebook, and silent in a file.

``bytes_bar`` and ``waiting`` are for the workbook's own work; ``bars`` and ``weights_bar`` replace the bars that
transformers draws while it loads a model.
"""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from helpers.base.units import human

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from IPython.display import DisplayHandle
    from tqdm.std import tqdm

_BYTES = "{desc}: {percentage:3.0f}%|{bar}| {done} [{elapsed}<{remaining}]"
_LOADING = "Loading weights"  # transformers' name for its bar over the weights


def bar_class() -> type[tqdm[Any]]:
    """A progress bar that appears after two seconds.

    In a notebook it is plain text that updates in place, so that a saved notebook shows how it ended; in a terminal it
    disappears when it is done; output to a file has no bars.
    """
    from tqdm.std import tqdm

    notebook = _in_notebook()

    class Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
        line: DisplayHandle | None = None

        def __init__(self, *args: Any, **options: Any) -> None:
            options |= {"delay": 2, "leave": notebook}
            if notebook:
                options |= {"file": io.StringIO(), "ncols": 100, "ascii": False}
            else:
                options["disable"] = None  # tqdm's word for "only if the output is not a terminal"
            super().__init__(*args, **options)

        @property
        def format_dict(self) -> dict[str, Any]:
            values = dict(super().format_dict)
            values["done"] = f"{human(values['n'])} of {human(values['total'] or 0)}"
            return values

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if not notebook:
                super().display(msg, pos)
                return
            self.line = _show(str(self) if msg is None else msg, self.line)

    return Bar


def bytes_bar(total: int, text: str) -> tqdm[Any]:
    """A bar over ``total`` bytes. Call its ``update`` with the number of bytes that were added."""
    return bar_class()(total=total, desc=text, bar_format=_BYTES, miniters=1)


def weights_bar(
    files: Mapping[str, str], sizes: Mapping[str, int], device_of: Callable[[str], str]
) -> Callable[..., Iterable[Any]]:
    """A bar factory for ``bars``: shows the bytes that were loaded, the current shard and the device it goes to.

    ``files`` and ``sizes`` give the file of each weight and its bytes there; ``device_of`` names its device.
    """
    shard_numbers = {file: number for number, file in enumerate(sorted(set(files.values())), start=1)}

    def walk(weights: Collection[tuple[str, object]]) -> Iterator[tuple[str, object]]:
        total = sum(sizes.get(name, 0) for name, _ in weights)
        with bytes_bar(total, _LOADING) as bar:
            for name, loader in weights:
                # A tied weight is in no file of its own.
                if name in files:
                    shard = f"Shard {shard_numbers[files[name]]} of {len(shard_numbers)} to {device_of(name)}"
                    bar.set_description_str(shard, refresh=False)
                yield name, loader
                bar.update(sizes.get(name, 0))
            bar.set_description_str(_LOADING, refresh=False)

    def draw(*args: Any, **options: Any) -> Iterable[Any]:
        # transformers has more bars; only this one walks through the weights.
        if options.get("desc") == _LOADING:
            return walk(*args)
        return bar_class()(*args, **options)

    return draw


@contextmanager
def bars(draw: Callable[..., Iterable[Any]]) -> Iterator[None]:
    """Inside the block, transformers draws its progress bars with ``draw``."""
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(lambda _, args, options: draw(*args, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something takes a while: a spinner in a terminal, a line in a notebook, nothing in a file."""
    from helpers.base.terminal import Terminal

    if _in_notebook():
        line = _show(f"{text} ...")
        yield
        _show(f"{text}: done", line)
    else:
        with Terminal(stderr=True).status(text):
            yield


def _show(text: str, line: DisplayHandle | None = None) -> DisplayHandle:
    """Show a line of plain text in a notebook, or replace the text of ``line``."""
    from IPython.display import DisplayHandle

    if line is None:
        line = DisplayHandle()
        line.display({"text/plain": text}, raw=True)
    else:
        line.update({"text/plain": text}, raw=True)
    return line


def _in_notebook() -> bool:
    # Looked up, not imported: in a notebook it is there, elsewhere it would only cost time.
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    return type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"
