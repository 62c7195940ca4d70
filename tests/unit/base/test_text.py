"""Whole characters, and contents that nobody can see."""

import unicodedata

import pytest

from helpers.base.text import is_blank, well_formed


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
