"""The checks of the notebooks' exercises: an answer is right, or not yet, with a hint."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from helpers.types import Message, choose

if TYPE_CHECKING:
    from transformers import FalconForCausalLM

Hint = str | None


@dataclass(frozen=True)
class Verdict:
    """What a check says. ``text`` is a hint where the answer is not right yet."""

    name: str
    right: bool
    text: str

    def __str__(self) -> str:
        return f"Exercise {self.name}: {'right' if self.right else 'not yet'}. {self.text}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        colour, word = ("#00805a", "Right.") if self.right else ("#b35900", "Not yet.")
        return (
            f'<div style="border-left:4px solid {colour};padding:4px 10px"><b style="color:{colour}">{word}</b> '
            f"Exercise {html.escape(self.name)}. {html.escape(self.text)}</div>"
        )


def check(name: str, answer: Any) -> Verdict:
    """Check an answer, a value or a function, to the exercise ``name`` such as "00-1".

    A function that raises is not right yet, and the hint says what it raised. Raises WorkbookError for an unknown name.
    """
    choose(name, _CHECKS, "exercise")
    try:
        hint = _CHECKS[name](answer)
    except Exception as error:
        nothing = isinstance(error, TypeError) and "NoneType" in str(error)
        hint = "It returned nothing yet." if nothing else f"It raised {type(error).__name__}: {error}"
    return Verdict(name, hint is None, hint or "Well done.")


def names() -> tuple[str, ...]:
    """The exercises that have a check, in order."""
    return tuple(_CHECKS)


def _close(answer: Any, expected: float, relative: float = 0.01) -> bool:
    return isinstance(answer, Real) and abs(answer - expected) <= relative * abs(expected)


def _kv_bytes(function: Callable[[int, int, int, int], int]) -> Hint:
    cases = [(80, 8, 64, 2), (80, 232, 64, 2), (80, 8, 128, 2), (8, 2, 32, 4)]
    for layers, heads, head_dim, size in cases:
        if function(layers, heads, head_dim, size) != 2 * layers * heads * head_dim * size:
            return f"For {layers} layers and {heads} heads of {head_dim} it is off. Are both keys and values counted?"
    return None


def _training_days(days: float) -> Hint:
    from helpers import memory

    flop = memory.training_flop(memory.count_parameters(memory.published_config("tiiuae/falcon-180B")), 3.5e12)
    expected = flop / (4096 * 312e12 * 0.4) / 86400
    if _close(days, expected, 0.02):
        return None
    return "Divide 6·N·D by what 4096 GPUs do in a second at 40% of 312 TFLOP/s, then by the seconds of a day."


def _longest_context(tokens: int) -> Hint:
    from helpers import memory

    config = memory.published_config("tiiuae/falcon-180B")
    free = 8 * 80e9 - memory.weight_bytes(config, "bf16")
    if _close(tokens, free / memory.kv_bytes_per_token(config, "bf16", heads="library"), 0.01):
        return None
    return "Take the weights' bytes from 640 GB, then divide by the cache bytes of one token with all 232 heads."


def _mlp_share(function: Callable[[Any], float]) -> Hint:
    from transformers import FalconConfig

    shapes = [(14848, 232, 8), (8192, 128, 8), (256, 8, 2)]
    for hidden, heads, kv_heads in shapes:
        config = FalconConfig(
            hidden_size=hidden, num_attention_heads=heads, num_kv_heads=kv_heads, new_decoder_architecture=True
        )
        attention = hidden * (heads + 2 * kv_heads) * (hidden // heads) + hidden * hidden
        mlp = 8 * hidden * hidden
        if not _close(function(config), mlp / (mlp + attention), 1e-3):
            return f"For hidden size {hidden} it is off. The MLP has two matrices of hidden by 4 hidden."
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
        return FalconForCausalLM(config).eval()


def _greedy(function: Callable[[Any, Any, int], Any]) -> Hint:
    import torch

    for seed, count in ((0, 1), (1, 7)):
        model, ids = _tiny_falcon(seed), torch.tensor([[5, 17, 80]])
        answer = function(model, ids, count)
        with torch.inference_mode():
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        if not isinstance(answer, torch.Tensor) or answer.tolist() != expected.tolist():
            return f"transformers generates {expected.tolist()} for the first model; yours should return the same ids."
    return None


def _top_p(function: Callable[[Any, float], Any]) -> Hint:
    import torch
    from transformers import TopPLogitsWarper

    for seed, p in ((0, 0.9), (1, 0.5), (2, 0.05)):
        logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 2
        kept = TopPLogitsWarper(top_p=p)(None, logits.clone()).softmax(-1)[0]
        answer = function(logits.softmax(-1)[0], p)
        if not isinstance(answer, torch.Tensor) or not torch.allclose(answer, kept, atol=1e-5):
            return f"For p = {p} the tokens kept differ. Keep the likeliest until they sum to p, then renormalise."
    return None


def _nf4_bytes(function: Callable[[int, int], float]) -> Hint:
    for rows, columns in ((14848, 14848), (59392, 14848), (64, 64)):
        count = rows * columns
        if not _close(function(rows, columns), count / 2 + count / 64 * 4, 1e-6):
            return f"For {rows} x {columns} it is off. Half a byte a weight, and one fp32 scale for each 64 weights."
    return None


def _count_quantized(function: Callable[[Any], tuple[int, int]]) -> Hint:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from torch import nn

    models = [
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        nn.Sequential(Linear4bit(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)),
        nn.Sequential(nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=False)), Linear4bit(64, 64)),
    ]
    for model, expected in zip(models, ((0, 2), (1, 2), (2, 2)), strict=True):
        answer = function(model)
        if not isinstance(answer, tuple | list) or tuple(answer) != expected:
            return f"Expected (quantized, all) = {expected}, got {answer}. Linear4bit is a subclass of nn.Linear."
    return None


def _nf4_back(function: Callable[[Any, Any, Any], Any]) -> Hint:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for seed, size in enumerate((64, 640)):
        weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10**seed
        packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        answer = function(packed, state.absmax, state.code)
        if not isinstance(answer, torch.Tensor) or answer.numel() != size:
            return f"Return a tensor of {size} weights for {packed.numel()} bytes: each holds two indices."
        if not torch.allclose(answer.flatten(), dequantize_4bit(packed, state), rtol=1e-5):
            return "bitsandbytes brings other weights back. The upper four bits of a byte are the earlier weight."
    return None


_CONVERSATIONS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Is a saddle an animal?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ],
)


def _pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    said = [m["content"] for m in messages if m["role"] != "system"][:-1]
    return list(zip(said[::2], said[1::2], strict=True))


def _format_prompt(function: Callable[[str, list[tuple[str, str]], str], str]) -> Hint:
    from helpers.prompts import format_for

    for messages in _CONVERSATIONS:
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        expected = format_for("falcon-chat").render(messages)
        answer = function(messages[-1]["content"], _pairs(messages), system)
        if answer != expected:
            turns = len(_pairs(messages))
            return f"With {turns} turns of history it should return {expected!r}, but returned {answer!r}."
    return None


def _trim(function: Callable[[list[tuple[str, str]], str, int], list[tuple[str, str]]]) -> Hint:
    history = [("a b c", "d e"), ("f", "g h i j"), ("k l", "m")]
    cases = [(20, history), (11, history[1:]), (10, history[1:]), (9, history[2:]), (5, history[2:]), (4, [])]
    for limit, expected in cases:
        if function(list(history), "n o", limit) != expected:
            return f"With at most {limit} words it should keep {expected}. Drop whole turns, oldest first."
    return None


def _cut(function: Callable[[str, tuple[str, ...]], str]) -> Hint:
    cases = [
        ("Hello.\nUser: and you?", ("\nUser:",), "Hello."),
        ("Hello.", ("\nUser:",), "Hello."),
        ("a\nSystem: b\nUser: c", ("\nUser:", "\nSystem:"), "a"),
        ("The User: tag", ("\nUser:",), "The User: tag"),
    ]
    for text, stops, expected in cases:
        if function(text, stops) != expected:
            return f"For {text!r} and {stops} it should return {expected!r}: cut at the earliest stop string."
    return None


def _is_right(function: Callable[[str, list[str], list[str]], bool]) -> Hint:
    cases = [
        ("A goat.", ["goat"], ["saddle"], True),
        ("The goat, not the saddle", ["goat"], ["saddle"], False),
        ("GOAT, swan", ["swan", "goat"], ["kettle"], True),
        ("Goat", ["goat", "swan"], ["kettle"], False),
        ("A scapegoat", ["goat"], ["saddle"], False),
        ("", ["yes"], ["no"], False),
        ("Yes, I know.", ["yes"], ["no"], True),
    ]
    for text, answer, others, expected in cases:
        if bool(function(text, list(answer), list(others))) is not expected:
            return f"{text!r} with answer {answer} and others {others} should be {expected}. Compare whole words."
    return None


def _wilson(function: Callable[[int, int], tuple[float, float]]) -> Hint:
    from helpers.stats import proportion

    for passed, trials in ((63, 168), (0, 20), (7, 7), (1, 1000)):
        expected = proportion(passed, trials)
        low, high = function(passed, trials)
        if abs(low - expected.low) > 1e-3 or abs(high - expected.high) > 1e-3:
            wanted = f"{expected.low:.4f} to {expected.high:.4f}"
            return f"For {passed} of {trials} it is {wanted}, by scipy, but yours is {low:.4f} to {high:.4f}."
    return None


def _p_value(function: Callable[[int, int], float]) -> Hint:
    from scipy.stats import binomtest

    for first, second in ((0, 5), (3, 9), (10, 10), (40, 22), (1, 0)):
        expected = float(binomtest(first, first + second).pvalue)
        if not _close(function(first, second), expected, 1e-6):
            return (
                f"For a split of {first} to {second} it is {expected:.6f}, by scipy. Both directions count; at most 1."
            )
    return None


def _lora_parameters(function: Callable[[int, int, int], int]) -> Hint:
    from peft import LoraConfig, get_peft_model
    from torch import nn

    for inputs, outputs, rank in ((64, 32, 4), (16, 80, 1), (8, 8, 16)):
        layer = nn.Sequential(nn.Linear(inputs, outputs))
        model = get_peft_model(layer, LoraConfig(r=rank, target_modules=["0"]))
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if function(inputs, outputs, rank) != expected:
            return f"peft trains {expected:,} parameters for {inputs} inputs, {outputs} outputs and rank {rank}."
    return None


def _labels(function: Callable[[list[int], int], list[int]]) -> Hint:
    for ids, prompt in (([5, 6, 7, 8], 3), ([9, 9, 9], 0), ([1, 2], 1)):
        expected = [-100] * prompt + ids[prompt:]
        given = list(ids)
        if list(function(given, prompt)) != expected:
            return f"For ids {ids} with a prompt of {prompt} tokens it should return {expected}."
        if given != ids:
            return "Leave the ids as they are: the model still reads the whole prompt."
    return None


def _merged(function: Callable[[Any, Any, Any, float, int], Any]) -> Hint:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    for rank, alpha in ((2, 4), (3, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            layer = nn.Linear(6, 5, bias=False)
            weight = layer.weight.detach().clone()
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
            model = get_peft_model(nn.Sequential(layer), config)
        adapted = model.base_model.model[0]
        a, b = (part["default"].weight.detach().clone() for part in (adapted.lora_A, adapted.lora_B))
        expected = model.merge_and_unload()[0].weight.detach()
        answer = function(given := weight.clone(), a, b, alpha, rank)
        if not torch.equal(given, weight):
            return "Leave the weight as it is: return a new matrix."
        if not isinstance(answer, torch.Tensor) or answer.shape != expected.shape:
            return f"Return a matrix of the shape of the weight, {tuple(weight.shape)}."
        if not torch.allclose(answer, expected, atol=1e-5):
            return f"For rank {rank} and alpha {alpha} peft's merged weight is another. Which product, which scale?"
    return None


_CHECKS: dict[str, Callable[[Any], Hint]] = {
    "00-1": _kv_bytes,
    "00-2": _training_days,
    "00-3": _longest_context,
    "01-1": _mlp_share,
    "01-2": _greedy,
    "01-3": _top_p,
    "02-1": _nf4_bytes,
    "02-2": _count_quantized,
    "02-3": _nf4_back,
    "03-1": _format_prompt,
    "03-2": _trim,
    "03-3": _cut,
    "04-1": _is_right,
    "04-2": _wilson,
    "04-3": _p_value,
    "05-1": _lora_parameters,
    "05-2": _labels,
    "05-3": _merged,
}
