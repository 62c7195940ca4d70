"""torch: the backward pass of fused attention over short sequences in bfloat16, slow on a CPU."""

import time
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from helpers.models.workarounds.short_attention import plain_attention

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def attended(block):
    """The gradient of the queries of SmolLM2's shape, and the least processor time of its computation."""
    torch.manual_seed(0)
    shape, mask = (8, 9, 57, 64), torch.ones(57, 57, dtype=torch.bool).tril()
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    seconds = []
    for _ in range(20):
        q.grad = None
        with block():
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            started = time.process_time()
            out.sum().backward()
        seconds.append(time.process_time() - started)
    return q.grad.float(), min(seconds)


def test_torch_is_still_slow_and_the_gradient_is_the_same():
    fused, slow = attended(nullcontext)
    plain, fast = attended(lambda: plain_attention(CPU, 57))
    assert slow > 1.5 * fast, "the fused kernel is as fast as plain products: delete plain_attention"
    assert (plain - fused).abs().max() <= 0.02 * fused.abs().max()


def test_long_sequences_and_other_devices_keep_the_fused_kernel():
    assert isinstance(plain_attention(CPU, 129), nullcontext)
    assert isinstance(plain_attention(torch.device("cuda"), 57), nullcontext)
