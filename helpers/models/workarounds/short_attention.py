"""torch differentiates its fused attention slowly on a CPU, in bfloat16 over short sequences.

What is wrong: the backward pass of the fused kernel takes three times as long as that of plain matrix products for
sequences of 60 tokens, an eighth of a whole training step of SmolLM2-135M. For 256 tokens and more there is no
difference, and the plain products need memory for all pairs of tokens.
Versions: torch 2.13.0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHORT_TOKENS = 128


def plain_attention(device: torch.device, longest_tokens: int) -> AbstractContextManager[None]:
    """Inside the block, attention is computed with plain matrix products on a CPU, if no sequence is long."""
    if device.type != "cpu" or longest_tokens > _SHORT_TOKENS:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
