"""One wording for every unknown name, and lists of names as text."""

import pytest

from helpers.base import WorkbookError, choose, first_names
from helpers.models import ProfileError


def test_a_known_option_is_returned():
    assert choose("b", ("a", "b"), "letter") == "b"
    assert choose("b", {"a": 1, "b": 2}, "letter") == "b"


@pytest.mark.parametrize("error", [WorkbookError, ProfileError, ValueError])
def test_an_unknown_one_is_named_with_the_options(error):
    with pytest.raises(error) as caught:
        choose("c", iter(("a", "b")), "letter", error)
    assert str(caught.value) == "There is no letter 'c'. Choose one of: a, b."


def test_long_lists_of_names_are_cut_short():
    assert first_names(["b", "a"]) == "a, b"
    assert first_names(["d", "b", "c", "a"]) == "a, b, c and 1 more"
    assert first_names(list("edcba"), 2) == "a, b and 3 more"
