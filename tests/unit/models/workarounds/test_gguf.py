"""GGUF files: how transformers reads their tokenizer, and the bar that it draws by itself."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import EmptyTqdm

from helpers.base.progress import bars
from helpers.models.workarounds.gguf import _no_conversion_bar, _restore_pre_tokenizer

TEXT, TOKENS = "a\n\n1  23", ["a", "ĊĊ", "1", "ĠĠ", "2", "3"]  # digits split off first, as in SmolLM's training


@pytest.fixture(scope="module")
def file(tmp_path_factory, write_gguf):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_transformers_still_ignores_how_text_is_split(file):
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert tokenizer.tokenize(TEXT) != TOKENS, "transformers reads tokenizer.ggml.pre: delete restore_pre_tokenizer"
    _restore_pre_tokenizer(tokenizer, file)
    assert tokenizer.tokenize(TEXT) == TOKENS


def converted(file) -> None:
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)


def test_transformers_still_draws_a_bar_that_its_hook_does_not_reach(file, capfd):
    with bars(EmptyTqdm):
        converted(file)
    assert "GGUF" in capfd.readouterr().err, "transformers draws this bar by its hook: delete no_conversion_bar"
    with bars(EmptyTqdm), _no_conversion_bar():
        converted(file)
    assert capfd.readouterr().err == ""
