"""What a person sees while something takes its time: bars, and a line that says what is going on."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from helpers.types import GIB

if TYPE_CHECKING:
    from tqdm.std import tqdm

BYTES = "{desc}: {percentage:3.0f}%|{bar}| {done} [{elapsed}<{remaining}]"


def human(size: float) -> str:
    """Bytes as text: "1.50 GiB", below that "1.5 MiB"."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def bar_class() -> type[tqdm]:
    """A progress bar that shows after two seconds.

    In a notebook it is plain text that updates in place, so that a saved notebook shows how it ended; in a terminal it
    goes when it is done; written to a file, there is none.
    """
    from tqdm.std import tqdm

    notebook = _in_notebook()

    class Bar(tqdm):
        line = None

        def __init__(self, *args: Any, **options: Any) -> None:
            place = {"file": io.StringIO(), "ncols": 100, "ascii": False} if notebook else {"disable": None}
            super().__init__(*args, **{**options, **place, "delay": 2, "leave": notebook})

        @property
        def format_dict(self) -> dict[str, Any]:
            found = super().format_dict
            return found | {"done": f"{human(found['n'])} of {human(found['total'] or 0)}"}

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            if not notebook:
                super().display(msg, pos)
                return
            from IPython.display import display

            content = {"text/plain": str(self) if msg is None else msg}
            if self.line is None:
                self.line = display(content, raw=True, display_id=True)
            else:
                self.line.update(content, raw=True)

    return Bar


def bytes_bar(total: int, text: str) -> tqdm:
    """A bar over ``total`` bytes: ``update`` it with how many more are done."""
    return bar_class()(total=total, desc=text, bar_format=BYTES, miniters=1)


def weights_bar(
    files: Mapping[str, str], sizes: Mapping[str, int], device_of: Callable[[str], str]
) -> Callable[..., Any]:
    """What draws transformers' walk through the weights: bytes done, the shard it is at and where that one goes.

    ``files`` and ``sizes`` say for each weight in which file it lies and how many bytes it takes there.
    """
    order = {file: number for number, file in enumerate(sorted(set(files.values())), start=1)}

    def walk(weights: Any) -> Iterator[Any]:
        with bytes_bar(sum(sizes.get(name, 0) for name, _ in weights), "Loading weights") as bar:
            for name, how in weights:
                if name in files:
                    shard = f"Shard {order[files[name]]} of {len(order)} to {device_of(name)}"
                    bar.set_description_str(shard, refresh=False)
                yield name, how
                bar.update(sizes.get(name, 0))
            bar.set_description_str("Loading weights", refresh=False)

    def draw(*args: Any, **options: Any) -> Any:
        return walk(*args) if options.get("desc") == "Loading weights" else bar_class()(*args, **options)

    return draw


@contextmanager
def bars(draw: Callable[..., Any]) -> Iterator[None]:
    """transformers draws its progress bars with ``draw`` inside the block."""
    from transformers.utils import logging

    previous = logging.set_tqdm_hook(lambda factory, args, options: draw(*args, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something takes a while: a spinner in a terminal, a line in a notebook, nothing in a file."""
    from rich.console import Console

    if _in_notebook():
        from IPython.display import display

        line = display({"text/plain": f"{text} ..."}, raw=True, display_id=True)
        yield
        line.update({"text/plain": f"{text}: done"}, raw=True)
    else:
        with Console(stderr=True).status(text):
            yield


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"
