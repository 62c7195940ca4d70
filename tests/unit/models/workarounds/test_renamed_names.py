"""Names that transformers renamed and peft still uses: the warnings, and that others are still shown."""

import subprocess
import sys

CODE = """
import warnings
from peft import LoraConfig, get_peft_model
from transformers import FalconConfig, FalconForCausalLM
from helpers.models.workarounds.renamed_names import ignore_renamed_names
warnings.simplefilter("always")
if {quiet}:
    ignore_renamed_names()
size = FalconConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
get_peft_model(FalconForCausalLM(size), LoraConfig(r=1, target_modules=["dense"], task_type="CAUSAL_LM"))
warnings.warn("something else", FutureWarning)
"""


def warned(*, quiet: bool) -> str:
    done = subprocess.run([sys.executable, "-c", CODE.format(quiet=quiet)], capture_output=True, text=True, check=True)
    return done.stderr


def test_peft_still_uses_renamed_names():
    assert "is deprecated and will be removed in v6" in warned(quiet=False), (
        "delete helpers/models/workarounds/renamed_names.py"
    )


def test_these_warnings_are_hidden_and_no_others():
    text = warned(quiet=True)
    assert "will be removed in v6" not in text
    assert "something else" in text
