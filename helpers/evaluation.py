"""How well a model predicts text: perplexity."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.generation import context_tokens, inference, input_device
from helpers.types import Loaded, WorkbookError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Perplexity:
    """What ``perplexity`` measured. ``tokens`` and ``bytes`` (UTF-8) count the text that was scored.

    nll: the negative log-likelihood of each text, in nats, summed over its tokens; text_tokens: how many those are.
    """

    tokens: int
    bytes: int
    nll: tuple[float, ...]
    text_tokens: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """exp(sum of nll / tokens): every token weighs the same. Comparable between models of one tokenizer."""
        return math.exp(math.fsum(self.nll) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Sum of nll / (ln 2 * bytes): comparable between tokenizers (Gao et al. 2020, The Pile)."""
        return math.fsum(self.nll) / (math.log(2) * self.bytes)


def perplexity(loaded: Loaded, texts: Sequence[str], *, max_tokens: int | None = None) -> Perplexity:
    """The perplexity of a model on texts, each starting after the begin token, so that its first token counts too.

    A text longer than the context is cut into windows that advance by half a context: a token is scored once, with
    at least the half context before it. ``max_tokens`` limits the tokens scored in all: the text in which the limit
    falls is cut there, later ones are left out.
    Raises WorkbookError for no texts, an empty text, or a tokenizer without a begin or end token.
    """
    from transformers.utils.logging import tqdm

    if isinstance(texts, str) or not texts or not all(texts):
        raise WorkbookError("Give a list of texts, none of them empty.")
    if max_tokens is not None and max_tokens < 1:
        raise WorkbookError(f"max_tokens must be at least 1, but is {max_tokens}.")
    left = sys.maxsize if max_tokens is None else max_tokens
    rows: list[tuple[float, int, int]] = []
    for text in tqdm(texts, desc="perplexity", unit="text", delay=2, leave=False):
        if left == 0:
            break
        ids, size = _encoded(loaded.tokenizer, text, left)
        rows.append((_nll(loaded.model, ids, context_tokens(loaded)), len(ids) - 1, size))
        left -= len(ids) - 1
    nll, tokens, sizes = zip(*rows, strict=True)
    return Perplexity(sum(tokens), sum(sizes), nll, tokens)


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """(begin, first scored position, end) of each window over ``length`` tokens, with ``context`` of at least 2.

    Position 0, which follows nothing, is never scored; every other position is, exactly once.
    """
    stride = context // 2
    found, scored, begin = [], 1, 0
    while scored < length:
        end = min(begin + context, length)
        found.append((begin, scored, end))
        scored, begin = end, begin + stride
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> tuple[list[int], int]:
    """The begin token with at most ``most`` tokens of the text, and the bytes of the text these cover."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise WorkbookError("The tokenizer has neither a begin nor an end token to start a text with.")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = found["input_ids"]
    covered = text if len(ids) <= most else text[: found["offset_mapping"][most - 1][1]]
    return [begin, *ids[:most]], len(covered.encode())


def _nll(model: PreTrainedModel, ids: list[int], context: int) -> float:
    """Sum of -ln p(token | tokens before it) over all tokens but the first, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.tensor(ids, device=input_device(model))
    parts = []
    with inference(model):
        for begin, scored, end in windows(len(ids), context):
            logits = model(input_ids=tokens[None, begin:end], use_cache=False).logits[0, scored - begin - 1 : -1]
            parts.append(cross_entropy(logits.float(), tokens[scored:end], reduction="sum").item())
    return math.fsum(parts)
