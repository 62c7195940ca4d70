"""What a notebook's header declares for ``workbook plan`` against what it does, counted where transformers does it.

The two quickest notebooks; the others by hand: ``python -m tests.notebooks.counted 05_fine_tuning``.
"""

import pytest

from tests.notebooks.counted import count, declared


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more_loads"), [("01_loading", 1), ("03_chat_prompting", 0)])
def test_a_notebook_does_what_its_header_declares(name, more_loads):
    """01's plain lines load the laptop's Falcon on every profile; only here is it also the profile's own."""
    counted = count(name)
    for model, at_most in declared(name).items():
        done = counted[model]
        assert done["loads"] == at_most["loads"] + more_loads, f"{name}, {model}: correct `work:` in its header"
        # A reply may end early; prompts differ by some tokens from one tokenizer to the next.
        assert at_most["steps"] / 6 <= done["steps"] <= at_most["steps"], (name, model, done, at_most)
        assert at_most["passes"] / 2 <= done["passes"] <= at_most["passes"] * 1.5, (name, model, done, at_most)
        assert at_most["tokens"] / 2 <= done["tokens"] <= at_most["tokens"] * 1.5, (name, model, done, at_most)
