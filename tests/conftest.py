"""Fixtures that several test files share."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' two workers would wait for each other's threads


@pytest.fixture(scope="session")
def tiny_loaded():
    """A random two-layer Falcon of 180B's architecture (fp32, context 128) with falcon-mini's tokenizer, in the Falcon
    chat format. Shared: a test that changes it works on ``copy.deepcopy`` or puts back what it changed."""
    import torch
    from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

    from helpers.prompts import format_for
    from helpers.types import ROOT, Loaded, LoadReport, ModelRef

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    config = FalconConfig(
        vocab_size=len(tokenizer), new_decoder_architecture=True, multi_query=True, parallel_attn=True,
        num_ln_in_parallel_attn=2, alibi=False, bias=False, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_kv_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FalconForCausalLM(config).eval()
    ref = ModelRef(id="tests/tiny-falcon", family="falcon", format="falcon-chat", source="embedded")
    parameters = model.num_parameters()
    report = LoadReport(
        model=ref.id, stand_in_for=None, precision="fp32", parameters=parameters, stored_bytes=4 * parameters,
        linear_layers=8, quantized_layers=0, dtypes={"torch.float32": parameters}, devices={"cpu": parameters},
        seconds=0.0, repaired=False, cache_bytes_per_token=2 * 2 * 4 * 16 * 4,
    )  # fmt: skip
    return Loaded(model, tokenizer, format_for(ref.format), report, ref)


@pytest.fixture
def one_thread():
    """Tiny models are fastest on one thread, above all where the cores are busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
