"""The console of all commands: whatever stands in a text reaches the screen as text."""

import io

import pytest
from rich.table import Table
from rich.text import Text

from helpers.base.terminal import Terminal
from tests.unit.base.test_text import HOSTILE


def screen(*parts, tty=False):
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        if tty:
            patch.setenv("FORCE_COLOR", "1")
            patch.setenv("TERM", "xterm")
        console = Terminal(file=file)
    for part in parts:
        console.print(part, soft_wrap=not isinstance(part, Table))
    return file.getvalue()


def table(cell):
    rows = Table("head" if isinstance(cell, Text) else cell, title=cell)
    rows.add_row(cell)
    return rows


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
@pytest.mark.parametrize(
    "form", [str, Text, table, lambda text: table(Text(text))], ids=["str", "Text", "cell", "Text cell"]
)
def test_no_escape_sequence_of_a_text_is_printed(text, form, tty):
    """D3"""
    printed = screen(form(f"a{text}b"), tty=tty)
    if tty:  # rich's own styles
        for style in ("\x1b[1m", "\x1b[3m", "\x1b[0m"):
            printed = printed.replace(style, "")
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert "b" in printed


@pytest.mark.parametrize("markup", ["[bold]x[/bold]", "[/nothing]", "[link=http://a]x[/link]", ":smile:"])
def test_markup_is_text(markup):
    """D3"""
    assert markup in screen(markup)
    assert markup in screen(table(markup))


def test_nothing_is_cut_off_where_sequences_are_written_out():
    assert screen("\x1b" * 60 + "end").count("\\x1b") == 60
    assert "a\\x1bb" in screen(table("a\x1bb"))
    assert screen(Text("styled", "bold"), tty=True) == "\x1b[1mstyled\x1b[0m\n"
