"""The console that all commands print to: what it is given is text, whatever stands in it."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from helpers.base.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType
    from rich.segment import Segment


def tell(console: Console, text: str) -> None:
    """Print a line about work that goes on, also if its reader is gone, or the disk of a log is full."""
    # rich exits when a pipe is closed; a terminal may lack the letters (UnicodeEncodeError).
    with suppress(OSError, ValueError, SystemExit):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


class Terminal(Console):
    """A rich console without markup in texts and without escape sequences but its own.

    Tables, colours and live displays work as in rich. Style a text with ``rich.text.Text``, not with ``[bold]``.
    """

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a Text of a str, as rich does of every cell of a table, printable."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object as rich does, each of its texts made printable."""
        if isinstance(renderable, Text) and (shown := printable(renderable.plain)) != renderable.plain:
            # Before the lines are broken, so that nothing is cut off. The styles of its parts are lost with it.
            renderable = Text(shown, renderable.style, justify=renderable.justify, overflow=renderable.overflow)
        for segment in super().render(renderable, options):
            # A control segment is rich's own: it moves the cursor of a live display.
            yield segment if segment.control else segment._replace(text=printable(segment.text))
