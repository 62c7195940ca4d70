"""Names that transformers renamed and peft still uses: the warnings, and that others are still shown."""

import warnings

from peft import LoraConfig, get_peft_model

from helpers.models.workarounds.renamed_names import _ignore_renamed_names


def warned(model, *, quiet: bool) -> str:
    """What is warned about while adapters are made, and a warning of another kind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if quiet:
            _ignore_renamed_names()
        get_peft_model(model, LoraConfig(r=1, target_modules=["dense"], task_type="CAUSAL_LM"))
        warnings.warn("something else", FutureWarning, stacklevel=1)
    return "\n".join(str(warning.message) for warning in caught)


def test_peft_still_uses_renamed_names(falcon):
    assert "is deprecated and will be removed in v6" in warned(falcon(), quiet=False), (
        "delete helpers/models/workarounds/renamed_names.py"
    )


def test_these_warnings_are_hidden_and_no_others(falcon):
    text = warned(falcon(), quiet=True)
    assert "will be removed in v6" not in text
    assert "something else" in text
