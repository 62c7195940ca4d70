"""torch: a frozen output layer that is copied for each sequence of a batch."""

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models.workarounds.frozen_head import contiguous_head


def operations(model, ids):
    """The logits of the last two positions, and the names of torch's operations on the way."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled, torch.inference_mode():
        logits = model(ids, logits_to_keep=2, use_cache=False).logits
    return logits, [event.key for event in profiled.key_averages(group_by_input_shape=False)]


def test_torch_still_copies_a_frozen_head_and_the_logits_stay_the_same():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, attn_implementation="sdpa", **shape)).eval()
    ids = torch.randint(0, 100, (4, 6))
    assert "aten::bmm" not in operations(model, ids)[1]
    model.requires_grad_(requires_grad=False)
    copied, names = operations(model, ids)
    assert "aten::bmm" in names, "torch folds the batch for a frozen weight too: delete contiguous_head"
    contiguous_head(model)
    folded, names = operations(model, ids)
    assert "aten::bmm" not in names
    assert torch.allclose(copied, folded, atol=1e-6)
