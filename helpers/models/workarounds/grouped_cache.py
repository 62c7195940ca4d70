"""Falcon with a KV cache of its key-value heads only, as multi-query attention was meant to have.

What is wrong: transformers' FalconAttention copies each key-value head to all of its query heads *before* it stores
them, which makes a cache of 232 heads for Falcon-180B instead of 8. And FalconModel builds its mask without looking at
the position ids, so packed texts see each other.
Versions: transformers 5.23.0. A test fails once the library does this itself: then this module goes.

Here the heads are stored as they are (``_GroupedFalconAttention``), and the mask is made as in the library's Llama
(``_GroupedFalconModel``): with the position ids, and only if the kernel needs one. Weights, names and results stay the
same. This module imports torch and transformers, so import it inside the functions that use it.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.falcon import modeling_falcon
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    FalconModel,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from helpers.base.errors import WorkbookError
from helpers.models.workarounds.rebinding import rebound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

# For at most this many new tokens, the queries that share a key-value head are passed as more queries of one head.
FEW_QUERIES = 8
# The classes to build from are globals of the library, which all threads share.
_BUILDING = RLock()


class _Outputs(NamedTuple):
    """What a forward pass is asked to return."""

    cache: bool
    attentions: bool
    hidden_states: bool
    as_dict: bool


@contextmanager
def grouped_cache() -> Iterator[None]:
    """Inside the block, Falcon models are built with a cache of their key-value heads. One thread at a time.

    Models built before or after the block are transformers' own, and so is flash attention, if it is asked for.
    """
    classes = modeling_falcon.FALCON_ATTENTION_CLASSES
    with _BUILDING, rebound(modeling_falcon, "FalconModel", _GroupedFalconModel):
        original = dict(classes)
        classes.update(dict.fromkeys(("eager", "sdpa"), _GroupedFalconAttention))
        try:
            yield
        finally:
            classes.update(original)


def _has_grouped_cache(model: PreTrainedModel) -> bool:
    """Whether a Falcon model was built with ``grouped_cache``."""
    return any(isinstance(module, _GroupedFalconAttention) for module in model.modules())


class _GroupedFalconAttention(FalconAttention):
    """Falcon's attention over cached key-value heads: (batch, key-value heads, tokens, head size).

    Shazeer 2019 (one key-value head) and Ainslie et al. 2023 (groups). All three layouts of the fused weights can be
    read as groups of query heads followed by one key and one value: one group, several, or one per head.
    """

    @property
    def num_key_value_groups(self) -> int:
        """Query heads per key-value head."""
        # Computed at each call: tensor parallelism changes both counts.
        return self.num_heads // self.num_kv_heads  # type: ignore[operator]  # Falcon's number is never None

    def forward(  # noqa: PLR0913, PLR0917, the signature is the library's
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,  # noqa: ARG002, the library's block passes it by name
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,  # noqa: ARG002, as above
        layer_past: Cache | None = None,
        use_cache: bool = False,  # noqa: ARG002, as above
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map (batch, tokens, hidden) to the same shape; with the weights (batch, heads, tokens, keys) if asked for."""
        query, key, value = self._split_heads(self.query_key_value(hidden_states))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        weights = None
        if output_attentions or self.config._attn_implementation == "eager":  # noqa: SLF001, as the library asks
            assert attention_mask is not None, "FalconModel always makes a mask for explicit attention"
            output, weights = self._explicit(query, key, value, attention_mask)
        else:
            output = self._fused(query, key, value, attention_mask)
        return self.dense(output.transpose(1, 2).flatten(2)), weights

    def _split_heads(self, fused_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, tokens, _ = fused_qkv.shape
        # A group holds its queries, one key and one value; the number of groups follows.
        groups = fused_qkv.view(batch, tokens, -1, self.num_key_value_groups + 2, self.head_dim)
        query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _dropout(self) -> float:
        # As in the library, which drops attention weights only with ALiBi.
        return self.attention_dropout.p if self.training and self.config.alibi else 0.0

    def _fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention by ``scaled_dot_product_attention``. No mask: causal, or a single query that sees all keys."""
        tokens = query.shape[2]
        if (mask is None and tokens > 1) or tokens > FEW_QUERIES:
            output, _ = sdpa_attention_forward(self, query, key, value, mask, self._dropout())
            return output.transpose(1, 2)
        # Heads that share keys and values become more queries of one head: nothing needs to be copied.
        folded = _split(query, self.num_kv_heads).flatten(2, 3)
        if mask is not None:
            mask = self._by_group(mask).flatten(2, 3)
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=self._dropout())
        return output.reshape(query.shape)

    def _explicit(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention step by step, which gives the weights too; softmax in float32."""
        mask = self._by_group(mask)
        grouped = _split(query, self.num_kv_heads)
        scores = grouped @ key[:, :, None].transpose(-1, -2) / math.sqrt(self.head_dim)
        weights = F.softmax(_masked(scores, mask), dim=-1, dtype=torch.float32).to(query.dtype).flatten(1, 2)
        # The weights that are returned are those that are used: their gradient is the output's.
        dropped = _split(F.dropout(weights, self._dropout()), self.num_kv_heads)
        return (dropped @ value[:, :, None]).flatten(1, 2), weights

    def _by_group(self, mask: torch.Tensor) -> torch.Tensor:
        """Reshape (batch, 1 or heads, queries, keys) to (batch, 1 or key-value heads, group, queries, keys)."""
        if mask.shape[1] > 1:
            return _split(mask, self.num_kv_heads)
        return mask[:, None].expand(-1, -1, self.num_key_value_groups, -1, -1)


def _split(by_head: torch.Tensor, groups: int | None) -> torch.Tensor:
    """Reshape (batch, heads, ...) to (batch, groups, heads per group, ...)."""
    split: torch.Tensor = by_head.unflatten(1, (groups, -1))
    return split


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


class _GroupedFalconModel(FalconModel):
    """Falcon's decoder; its mask is made once, from the order, the padding, the packing and ALiBi."""

    def forward(  # noqa: PLR0913, PLR0917, the signature is the library's
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPastAndCrossAttentions:
        """As ``FalconModel.forward``, except that texts whose ``position_ids`` start again do not see each other.

        Such packed texts are recognised if neither a mask nor a cache is given, as in the library's Llama.
        Raises ValueError unless exactly one of ``input_ids`` and ``inputs_embeds`` is given, WorkbookError for a cache
        of other heads.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        # Checkpointing computes each layer twice, which would put its tokens into the cache twice.
        checkpointing = self.gradient_checkpointing and self.training
        outputs = _Outputs(
            cache=self._setting("use_cache", use_cache) and not checkpointing,
            attentions=self._setting("output_attentions", output_attentions),
            hidden_states=self._setting("output_hidden_states", output_hidden_states),
            as_dict=self._setting("return_dict", return_dict),
        )
        self._check_cache(past_key_values)
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self._mask(embeds, attention_mask, past_key_values, position_ids, outputs.attentions)
        # After the mask, because packed texts are recognised by the absence of a cache.
        if outputs.cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen)[None]
        return self._decoded(embeds, mask, past_key_values, position_ids, outputs)

    def _setting(self, name: str, given: bool | None) -> bool:
        """A flag of a call; the configuration's if the call leaves it open."""
        return bool(getattr(self.config, name)) if given is None else given

    def _check_cache(self, cache: Cache | None) -> None:
        """Refuse a cache of all query heads, as peft's prefix tuning makes for Falcon. Raises WorkbookError."""
        keys = getattr(cache.layers[0], "keys", None) if cache is not None and len(cache.layers) else None
        # The module's number and not the configuration's, because tensor parallelism changes it.
        own = cast("FalconAttention", self.h[0].self_attention).num_kv_heads
        if own is None or keys is None or keys.dim() != 4 or keys.shape[1] == own:
            return
        raise WorkbookError(
            f"The cache holds {keys.shape[1]} heads, and this model keeps its {own} key-value heads alone. Load the "
            "model with grouped_cache=False; for prefix tuning you may instead give PrefixTuningConfig "
            f"num_attention_heads={own} and token_dim={own * keys.shape[-1]}."
        )

    def _decoded(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor,
        outputs: _Outputs,
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPastAndCrossAttentions:
        """Apply the layers in turn: (batch, tokens, hidden) of the embeddings to that of the last layer, normed."""
        rotary = None if self.use_alibi else self.rotary_emb(hidden, position_ids=position_ids)
        states: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for block in self.h:
            if outputs.hidden_states:
                states.append(hidden)
            hidden, attention = block(
                hidden,
                alibi=None,
                attention_mask=mask,
                position_ids=position_ids,
                layer_past=cache,
                use_cache=outputs.cache,
                output_attentions=outputs.attentions,
                position_embeddings=rotary,
            )
            if outputs.attentions:
                weights.append(attention)
        hidden = self.ln_f(hidden)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if outputs.hidden_states else None,
            attentions=tuple(weights) if outputs.attentions else None,
        )
        return output if outputs.as_dict else output.to_tuple()

    def _mask(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        output_attentions: bool,
    ) -> torch.Tensor | None:
        """What each query may see: bool, or numbers to add to the scores; None if the kernel needs no mask."""
        # The library's third kind of mask is for flex attention, which this module does not replace.
        mask: torch.Tensor | None = create_causal_mask(  # type: ignore[assignment]
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
            allow_is_causal_skip=not (self.use_alibi or output_attentions),
        )
        if not self.use_alibi or mask is None:
            return mask
        return self._with_alibi(mask, embeds.dtype)

    def _with_alibi(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A mask (batch, 1, queries, keys) with ALiBi's biases added (Press et al. 2022): (batch, heads, ...)."""
        # A key's position counts the keys before it that the same query may see, so each packed text starts at 0: the
        # library rounds positions to bfloat16, and a text that starts later would get other biases.
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        batch, _, queries, keys = allowed.shape
        biases = build_alibi_tensor(allowed.flatten(0, 2).long(), self.num_heads, dtype)
        biases = biases.view(batch, queries, self.num_heads, keys).transpose(1, 2)
        biases /= math.sqrt(self.config.hidden_size // self.num_heads)
        return biases.masked_fill_(~allowed, torch.finfo(dtype).min)
