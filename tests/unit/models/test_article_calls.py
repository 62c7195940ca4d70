"""What a reader of the article tries first, on today's libraries: the notebooks say that it fails, and how.

A test here fails when a library takes the call again: then the text of the notebook named has to change.
"""

from importlib import metadata

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import models
from helpers.base.files import ROOT

FILES = ROOT / "env" / "models" / "falcon-mini"


@pytest.mark.parametrize("flag", ["load_in_8bit", "load_in_4bit"])
def test_the_flags_as_printed_are_refused(flag):
    """Notebook 02, section 4."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{flag}'"):
        AutoModelForCausalLM.from_pretrained(FILES, torch_dtype=torch.bfloat16, device_map="cpu", **{flag: True})


def test_torch_dtype_is_still_taken_as_dtype():
    model = AutoModelForCausalLM.from_pretrained(FILES, torch_dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16


def test_the_way_of_today_quantizes_with_the_repair():
    loaded = models.load(models.load_profile("laptop").falcon, "int8")
    assert isinstance(loaded.model.config.quantization_config, BitsAndBytesConfig)
    assert loaded.report.quantized_layers == 32


def test_the_login_as_printed_is_gone_and_hf_is_there():
    """Notebook 01, section 1."""
    commands = {entry.name for entry in metadata.distribution("huggingface_hub").entry_points}
    assert "huggingface-cli" not in commands
    assert "hf" in commands
