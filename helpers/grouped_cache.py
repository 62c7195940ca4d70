"""Falcon whose KV cache holds the key-value heads alone, as multi-query attention was meant to.

transformers' FalconAttention copies each key-value head to all of its query heads *before* it stores them: a cache of
232 heads for Falcon-180B, which has 8. Here the heads are stored as they are (``GroupedFalconAttention``), and the mask
is made as in the library's Llama (``GroupedFalconModel``): with the position ids, so that packed texts do not see each
other, and only where the kernel cannot do without. Weights, names and results stay the same. ``tests/unit`` says when
the library does this by itself; then this module can go.

This module imports torch and transformers: import it where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW_QUERIES = 8  # up to so many new tokens, queries that share a key-value head are read as more queries of one head
_BUILDING = RLock()


@contextmanager
def grouped_cache() -> Iterator[None]:
    """Inside the block, Falcon models are built with a cache of their key-value heads. One thread at a time.

    Models built before or after are transformers' own. Flash attention, where it is asked for, stays the library's.
    """
    classes = modeling_falcon.FALCON_ATTENTION_CLASSES
    ours = dict.fromkeys(("eager", "sdpa"), GroupedFalconAttention)
    with _BUILDING:
        original = dict(classes), modeling_falcon.FalconModel
        classes.update(ours)
        modeling_falcon.FalconModel = GroupedFalconModel
        try:
            yield
        finally:
            classes.update(original[0])
            modeling_falcon.FalconModel = original[1]


def has_grouped_cache(model: PreTrainedModel) -> bool:
    """Whether a Falcon model was built with ``grouped_cache``."""
    return any(isinstance(module, GroupedFalconAttention) for module in model.modules())


class GroupedFalconAttention(FalconAttention):
    """Falcon's attention over cached key-value heads: (batch, key-value heads, tokens, head size).

    Shazeer 2019 (one key-value head) and Ainslie et al. 2023 (groups). All three layouts of the fused weights read as
    groups of query heads followed by one key and one value: one group (multi-query), several, or one for each head.
    """

    @property
    def num_key_value_groups(self) -> int:
        """Query heads for each key-value head; read at each call, as tensor parallelism changes both counts."""
        return self.num_heads // self.num_kv_heads

    def forward(  # noqa: PLR0917, the signature is the library's
        self,
        hidden_states: torch.Tensor,
        alibi: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) -> the same, and the attention weights (batch, heads, tokens, keys) if asked for."""
        query, key, value = self._split_heads(self.query_key_value(hidden_states))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if output_attentions or self.config._attn_implementation == "eager":
            output, weights = self._explicit(query, key, value, attention_mask)
        else:
            output, weights = self._fused(query, key, value, attention_mask), None
        return self.dense(output.transpose(1, 2).flatten(2)), weights

    def _split_heads(self, fused_qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, tokens, _ = fused_qkv.shape
        groups = fused_qkv.view(batch, tokens, self.num_kv_heads, self.num_key_value_groups + 2, self.head_dim)
        query, key, value = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _dropout(self) -> float:
        """As in the library, only with ALiBi."""
        return self.attention_dropout.p if self.training and self.config.alibi else 0.0

    def _fused(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Through ``scaled_dot_product_attention``; no mask means causal, or a single query that sees all keys."""
        tokens = query.shape[2]
        if (mask is None and tokens > 1) or tokens > FEW_QUERIES:
            output, _ = sdpa_attention_forward(self, query, key, value, mask, self._dropout())
            return output.transpose(1, 2)
        folded = query.unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)
        mask = None if mask is None else self._by_group(mask).flatten(2, 3)
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=self._dropout())
        return output.reshape(query.shape)

    def _explicit(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step by step, which gives the weights too; softmax in float32."""
        mask, grouped = self._by_group(mask), query.unflatten(1, (self.num_kv_heads, -1))
        scores = grouped @ key[:, :, None].transpose(-1, -2) / math.sqrt(self.head_dim)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        dropped = F.dropout(weights, self._dropout())
        return (dropped @ value[:, :, None]).flatten(1, 2), weights.flatten(1, 2)

    def _by_group(self, mask: torch.Tensor) -> torch.Tensor:
        """(batch, 1 or heads, queries, keys) -> (batch, 1 or key-value heads, group, queries, keys)."""
        if mask.shape[1] > 1:
            return mask.unflatten(1, (self.num_kv_heads, -1))
        return mask[:, None].expand(-1, -1, self.num_key_value_groups, -1, -1)


class GroupedFalconModel(FalconModel):
    """Falcon's decoder with the mask made once, from everything that belongs in it: order, padding, packing, ALiBi."""

    def forward(  # noqa: PLR0917, the signature is the library's
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
        """As ``FalconModel.forward``, except that ``position_ids`` that start again mark packed texts, kept apart.

        That is where neither a mask nor a cache is given, as in the library's Llama.
        Raises ValueError unless exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        chosen = {"use_cache": use_cache, "output_attentions": output_attentions, "return_dict": return_dict}
        chosen["output_hidden_states"] = output_hidden_states
        chosen = {name: getattr(self.config, name) if value is None else value for name, value in chosen.items()}
        chosen["use_cache"] &= not (self.gradient_checkpointing and self.training)
        embeds = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self._mask(embeds, attention_mask, past_key_values, position_ids, chosen["output_attentions"])
        if chosen["use_cache"] and past_key_values is None:  # after the mask: texts are packed only where no cache is
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen)[None]
        return self._decoded(embeds, mask, past_key_values, position_ids, **chosen)

    def _decoded(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor,
        *,
        use_cache: bool,
        output_attentions: bool,
        output_hidden_states: bool,
        return_dict: bool,
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPastAndCrossAttentions:
        """The layers in turn; (batch, tokens, hidden) of the embeddings -> of the last layer, normed."""
        rotary = None if self.use_alibi else self.rotary_emb(hidden, position_ids=position_ids)
        states, weights = [], []
        for block in self.h:
            states += [hidden] if output_hidden_states else []
            hidden, attention = block(
                hidden,
                alibi=None,
                attention_mask=mask,
                position_ids=position_ids,
                layer_past=cache,
                use_cache=use_cache,
                output_attentions=output_attentions,
                position_embeddings=rotary,
            )
            weights += [attention] if output_attentions else []
        hidden = self.ln_f(hidden)
        found = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )
        return found if return_dict else found.to_tuple()

    def _mask(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        output_attentions: bool,
    ) -> torch.Tensor | None:
        """What each query may see: bool, or numbers to add to the scores; None where the kernel knows by itself."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
            allow_is_causal_skip=not (self.use_alibi or output_attentions),
        )
        return self._with_alibi(mask, embeds.dtype) if self.use_alibi else mask

    def _with_alibi(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A mask (batch, 1, queries, keys) with ALiBi's biases added (Press et al. 2022): (batch, heads, ...).

        A key's position counts the keys before it that the same query may see, so that each packed text starts at 0:
        the library rounds positions to bfloat16, and a text that starts later would get other biases.
        """
        allowed = mask if mask.dtype == torch.bool else mask >= 0
        batch, _, queries, keys = allowed.shape
        biases = build_alibi_tensor(allowed.flatten(0, 2).long(), self.num_heads, dtype)
        biases = biases.view(batch, queries, self.num_heads, keys).transpose(1, 2)
        biases /= math.sqrt(self.config.hidden_size // self.num_heads)
        return biases.masked_fill_(~allowed, torch.finfo(dtype).min)
