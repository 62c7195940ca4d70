"""Exercises of notebook 01: the share of the MLP, greedy decoding, top-p."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.exercises.verdict import _is_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import FalconConfig, FalconForCausalLM

    from helpers.exercises.verdict import Check, Hint


def _mlp_share(function: Callable[[FalconConfig], float]) -> Hint:
    from transformers import FalconConfig

    shapes = [(14848, 232, 8), (8192, 128, 8), (256, 8, 2)]
    for hidden, heads, kv_heads in shapes:
        config = FalconConfig(
            hidden_size=hidden, num_attention_heads=heads, num_kv_heads=kv_heads, new_decoder_architecture=True
        )
        head_dim = hidden // heads
        attention = hidden * (heads + 2 * kv_heads) * head_dim + hidden * hidden
        mlp = 8 * hidden * hidden
        if not _is_close(function(config), mlp / (mlp + attention), 1e-3):
            return f"The share for hidden size {hidden} is wrong. The MLP has two matrices of hidden by 4 hidden."
    return None


def _tiny_falcon(seed: int) -> FalconForCausalLM:
    """A random Falcon of two layers with 180B's flags, in fp32."""
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, bias=False, alibi=False, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FalconForCausalLM(config)
    model.eval()
    return model


def _greedy(function: Callable[[FalconForCausalLM, Tensor, int], Tensor]) -> Hint:
    import torch

    for seed, count in ((0, 1), (1, 7)):
        model, ids = _tiny_falcon(seed), torch.tensor([[5, 17, 80]])
        answer = function(model, ids, count)
        expected = _generated(model, ids, count)
        if not isinstance(answer, torch.Tensor) or answer.tolist() != expected.tolist():
            return f"transformers generates {expected.tolist()} for the first model; yours should return the same ids."
    return None


def _generated(model: FalconForCausalLM, ids: Tensor, count: int) -> Tensor:
    import torch

    with torch.inference_mode():
        # transformers types the result as one of five classes; without return_dict_in_generate it is the ids.
        return model.generate(  # type: ignore[misc, return-value]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )


def _top_p(function: Callable[[Tensor, float], Tensor]) -> Hint:
    import torch
    from transformers import TopPLogitsWarper

    # The last p keeps the likeliest token alone, although its probability exceeds p.
    for seed, p in ((0, 0.9), (1, 0.5), (2, 0.05)):
        logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 2
        # The warper looks at the scores alone, so it gets no ids.
        kept = TopPLogitsWarper(top_p=p)(None, logits.clone()).softmax(-1)[0]
        answer = function(logits.softmax(-1)[0], p)
        if not isinstance(answer, torch.Tensor) or not torch.allclose(answer, kept, atol=1e-5):
            return f"For p = {p} other tokens should be kept. Keep the likeliest until they sum to p, then renormalise."
    return None


CHECKS: dict[str, Check] = {"01-1": _mlp_share, "01-2": _greedy, "01-3": _top_p}
