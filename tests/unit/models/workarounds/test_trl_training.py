"""trl: adapters of a quantized model in bfloat16, and positions without loss that a CPU scores all the same."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

from helpers.base.files import ROOT
from helpers.models import bnb_config
from helpers.models.workarounds.falcon_linear import falcon_repair
from helpers.models.workarounds.nf4_repacking import _keep_unpacked
from helpers.models.workarounds.trl_training import float_adapters, trained_positions_alone


@pytest.fixture
def trained(checkpoint, tmp_path):
    """An nf4 model with adapters, once trl's trainer has been made for it."""
    with falcon_repair():
        base = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=bnb_config("nf4"), device_map="cpu"
        )
    _keep_unpacked(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["dense"], task_type="CAUSAL_LM"))
    settings = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], max_length=None)
    rows = Dataset.from_list([{"input_ids": [5, 9, 2], "completion_mask": [0, 1, 1]}])
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    return SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer).model


def types(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def test_trl_still_casts_adapters_to_bfloat16(trained):
    assert types(trained) == {torch.bfloat16}, "trl leaves the adapters in float32: delete float_adapters"
    float_adapters(trained)
    assert types(trained) == {torch.float32}


def test_trl_still_scores_positions_without_loss_on_a_cpu():
    cpu = torch.device("cpu")
    assert not utils._use_triton(cpu), "trl scores trained positions alone on CPUs: delete trained_positions_alone"
    with trained_positions_alone(cpu):
        assert utils._use_triton(cpu)
    assert not utils._use_triton(cpu)


def test_on_other_devices_nothing_is_changed():
    before = utils._use_triton
    with trained_positions_alone(torch.device("meta")):
        assert utils._use_triton is before
