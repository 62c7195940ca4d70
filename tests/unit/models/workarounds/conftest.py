"""What the tests of several workarounds share: a tiny Falcon, as a model and as a checkpoint."""

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

IDS = torch.tensor([[5, 9, 2, 77, 3]])


@pytest.fixture(autouse=True)
def _fast(one_thread):
    """Tiny models are fastest on one thread."""


@pytest.fixture
def falcon():
    """Makes a random Falcon of 180B's flags: hidden 64, 2 layers, 4 query and 2 key-value heads, vocabulary 256."""

    def make(**changes) -> FalconForCausalLM:
        sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = FalconConfig(
            new_decoder_architecture=True, num_ln_in_parallel_attn=2, num_kv_heads=2, alibi=False, bias=False,
            bos_token_id=0, eos_token_id=0, initializer_range=0.3, **{**sizes, **changes},
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return FalconForCausalLM(config).eval()

    return make


@pytest.fixture
def checkpoint(falcon, tmp_path):
    """The tiny Falcon in bf16, saved."""
    falcon().to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def logits():
    """The logits of a model for five tokens, in inference mode."""

    def of(model) -> torch.Tensor:
        with torch.inference_mode():
            return model(IDS).logits

    return of
