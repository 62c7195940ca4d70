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

    from helpers.base.files import ROOT
    from helpers.models import Loaded, LoadReport, ModelRef, format_for

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


@pytest.fixture(scope="session")
def write_gguf():
    """Writes a random one-layer Llama with a byte-level tokenizer, as a real GGUF file with Q4_1 matrices."""
    import gguf
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    def write(file, seed=0):
        rng = np.random.default_rng(seed)
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĊĊ", "he", "ĠĠ"]
        writer = gguf.GGUFWriter(file, "llama")
        for add, value in (
            (writer.add_context_length, 128), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
            (writer.add_feed_forward_length, 128), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
            (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, 16),
            (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "gpt2"),
            (writer.add_tokenizer_pre, "smollm"), (writer.add_token_list, tokens),
            (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)),
            (writer.add_token_merges, ["Ċ Ċ", "h e", "Ġ Ġ"]),
            (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2),
        ):  # fmt: skip
            add(value)
        shapes = {"token_embd": (len(tokens), 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64)}
        shapes |= {"blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (128, 64)}
        shapes |= {"blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
        kind = gguf.GGMLQuantizationType.Q4_1
        for name, shape in shapes.items():
            packed = gguf.quantize(rng.normal(0, 0.3, shape).astype(np.float32), kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write
