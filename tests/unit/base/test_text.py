"""Whole characters, and contents that nobody can see."""

import json
import subprocess
import unicodedata

import pytest

from helpers.base.text import is_blank, one_line, printable, shell_word, shortened, well_formed


@pytest.mark.parametrize(
    ("text", "whole"), [("", True), ("é\u2028", True), ("\U0001f600", True), ("a\ud83d", False), ("\udcff", False)]
)
def test_half_of_a_surrogate_pair_is_no_character(text, whole):
    """A7"""
    assert well_formed(text) is whole


@pytest.mark.parametrize(
    "text",
    ["", " \t\n", "\u00a0", "\u200b", "\ufeff", "\u2060", "\u00ad", "\u3000", "\u2800", "\u3164", "\u115f", "\ufe0f",
     "\u034f", "\u180e", "\u202e\u202c", "\u2028", "\U000e0041", "\x00\x07", " \u200b\u00a0\ufeff "],
    ids=ascii,
)  # fmt: skip
def test_what_nobody_can_see_is_blank(text):
    """A3"""
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", ".", "\u0301", "\U0001f600", "\u200ba", "\ufffd", "_"], ids=ascii)
def test_what_can_be_seen_is_not_blank(text):
    """A3"""
    assert not is_blank(text)


def test_no_letter_digit_or_sign_is_blank_but_unicodes_four_fillers():
    visible = filter(lambda c: unicodedata.category(c)[0] in "LNPS", map(chr, range(0x110000)))
    assert {f"{ord(c):x}" for c in visible if is_blank(c)} == {"115f", "1160", "2800", "3164", "ffa0"}


# --- what reaches a terminal or a shell -------------------------------------------------------------------------------

HOSTILE = [
    "\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\x1bP+q\x1b\\", "a\rb", "a\bb", "\u202eevil", "\u2066x\u2069", "\ud800",
    "\x7f", "\u2028", "\ufeff", "\U000e0041", "\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_would_obey_is_written_out(text):
    """D3"""
    shown = printable(f"a{text}b\n\tc")
    assert shown.isascii()
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    assert shown.startswith("a")
    assert shown.endswith("b\n\tc")
    assert printable(shown) == shown


def test_texts_of_all_languages_are_printable():
    text = "Größe, 東京, العربية, עברית, हिन्दी, 👩\u200d💻, é"
    assert printable(text) == text
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_json_stays_json():
    value = "\x1b\x7f\x9b\u202e\U000e0041\ud800"
    assert json.loads(printable(json.dumps({"x": value}, ensure_ascii=False))) == {"x": value}


@pytest.mark.parametrize(
    "name", ["runs/x", "a b", "it's; rm -rf ~ #", '"$(id)`id`', "\x1b]0;t\x07'\n\\x", "-p", "\u202ex", ""]
)
def test_a_quoted_word_reaches_the_command_as_it_is(name):
    """D4: the printed command, pasted."""
    word = shell_word(name)
    assert printable(word) == word
    assert "\n" not in word
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert done.stdout.decode() == name


def test_a_long_text_is_cut_with_a_note():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd" * 1000, 3) == "abc … (3,997 more characters)"
