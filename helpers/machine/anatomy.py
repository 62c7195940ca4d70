"""The shape of a model, from its configuration alone: layers, matrices, heads, and the number of parameters.

``published_config`` gives the configurations that are kept in this repository, so all of this works offline. The Falcon
family (both decoder architectures) and the Llama family are known, as transformers builds them. ``anatomy`` brings a
configuration of either into one form, ``Anatomy``, which is all that the formulas for memory read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from helpers.base.errors import WorkbookError, choose
from helpers.base.files import ROOT
from helpers.base.hashes import changes

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from transformers import PretrainedConfig

CONFIGS = ROOT / "env" / "models" / "configs"
CacheHeads = Literal["kv", "library"]


def published_config(repo_id: str) -> PretrainedConfig:
    """The configuration published with a model, from this repository: works offline.

    The fields are as published, but for ``auto_map``, which points at code on the hub that is never run.
    Raises WorkbookError, which lists the known models, for another name, and if a file is not as it was recorded.
    """
    from transformers import AutoConfig

    choose(repo_id, published_models(), "published configuration of")
    if found := changes(CONFIGS, CONFIGS.name):
        raise WorkbookError(
            f"The published configurations in {CONFIGS} are not those of this project: {'; '.join(found)}. Restore "
            f"them with: git -C {ROOT} restore env/models. If the change is yours, record it with: workbook "
            f"record-hashes {CONFIGS}"
        )
    fields = json.loads((CONFIGS / f"{repo_id.replace('/', '--')}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**fields)


def published_models() -> tuple[str, ...]:
    """The models whose published configuration is in this repository."""
    # Each name has its owner, such as tiiuae--falcon-7b; hashes.json has none.
    return tuple(sorted(path.stem.replace("--", "/") for path in CONFIGS.glob("*--*.json")))


@dataclass(frozen=True)
class _Linear:
    """One weight matrix of a decoder layer: ``rows`` outputs by ``columns`` inputs."""

    part: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.rows * self.columns

    @property
    def biases(self) -> int:
        """Number of biases."""
        if not self.bias:
            return 0
        return self.rows


@dataclass(frozen=True)
class _Activations:
    """Activations of one decoder layer, in elements for each token of a sequence.

    ``kept`` by the layer for its backward pass if its weights are trained, ``frozen`` if they are not; ``returned``:
    further ones while that pass runs; ``prefill``: alive at once in the MLP of a forward pass, with ``wide_tensors`` of
    the MLP's width. ``norms``: how many norms give the matrices their inputs. For each token and each token of its
    context: ``scores`` are attention scores in fp32, ``masks`` bytes of the attention mask that the model makes itself,
    and ``biases`` elements of alibi's biases.
    """

    kept: int
    frozen: int
    norms: int
    returned: int
    prefill: int
    wide_tensors: int
    scores: int = 0
    masks: int = 0
    biases: int = 0


@dataclass(frozen=True)
class _ModuleNames:
    """The names of a family's modules in transformers, as device maps use them."""

    embeddings: str
    rotary: str
    layers: str
    final_norm: str
    head: str = "lm_head"


@dataclass(frozen=True)
class Anatomy:
    """The shape of a model, as its configuration gives it: all that the formulas for memory need.

    ``width`` is the MLP's inner size; ``linears`` are the matrices of one layer, ``norms`` the parameters of its norms.
    ``cached_heads`` are the heads that transformers' own KV cache holds; ``helpers.models.load`` caches ``kv_heads``.
    """

    layers: int
    hidden: int
    width: int
    vocabulary: int
    head_dim: int
    kv_heads: int
    cached_heads: int
    tied: bool
    linears: tuple[_Linear, ...]
    norms: int
    final_norm: int
    activations: _Activations
    names: _ModuleNames

    @property
    def embeddings(self) -> int:
        """Parameters of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head; 0 if it shares the embeddings' matrix."""
        if self.tied:
            return 0
        return self.embeddings


_FALCON_NAMES = _ModuleNames(
    "transformer.word_embeddings", "transformer.rotary_emb", "transformer.h", "transformer.ln_f"
)
_LLAMA_NAMES = _ModuleNames("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm")
_LINEAR_PARTS = ("attention qkv", "attention out", "mlp up", "mlp down")


def anatomy(config: PretrainedConfig, cache_heads: CacheHeads = "kv") -> Anatomy:
    """The shape of a model; ``cache_heads`` (see ``kv_bytes_per_token``) decides what Falcon's attention works with.

    Raises WorkbookError for families other than Falcon and Llama.
    """
    families: dict[str, Callable[[PretrainedConfig, CacheHeads], Anatomy]] = {"falcon": _falcon, "llama": _llama}
    if config.model_type not in families:
        known = ", ".join(families)
        raise WorkbookError(f"The model family {config.model_type!r} is not supported. Supported are {known}.")
    return families[config.model_type](config, cache_heads)


def count_parameters(config: PretrainedConfig, tied: bool | None = None) -> int:
    """The number of parameters by closed formula.

    ``tied`` says whether the head shares the embeddings' matrix; unless given, the configuration decides
    (Falcon shares: 178,557,088,768 for 180B; counted with a separate head: 179,522,565,120).
    """
    return sum(part.parameters for part in _parts(anatomy(config), tied))


def parameter_table(config: PretrainedConfig, tied: bool | None = None) -> pd.DataFrame:
    """Where the parameters sit. Index: part; columns: parameters, share of the whole, per_layer."""
    import pandas as pd

    parts = _parts(anatomy(config), tied)
    total = sum(part.parameters for part in parts)
    rows = [(part.name, part.parameters, part.parameters / total, part.per_layer) for part in parts]
    return pd.DataFrame(rows, columns=["part", "parameters", "share", "per_layer"]).set_index("part")


@dataclass(frozen=True)
class _Part:
    """A part of a model: its parameters in all, and those in each decoder layer."""

    name: str
    parameters: int
    per_layer: int = 0


def _parts(shape: Anatomy, tied: bool | None) -> list[_Part]:
    parts = [_Part("embeddings", shape.embeddings)]
    for name in _LINEAR_PARTS:
        per_layer = sum(linear.weights + linear.biases for linear in shape.linears if linear.part == name)
        parts.append(_Part(name, shape.layers * per_layer, per_layer))
    parts.append(_Part("norms", shape.layers * shape.norms + shape.final_norm, shape.norms))
    # Published checkpoints store a tied head a second time, so both counts are of use.
    head = shape.head
    if tied:
        head = 0
    elif tied is not None:
        head = shape.embeddings
    return [*parts, _Part("head", head)]


def _falcon(config: PretrainedConfig, cache_heads: CacheHeads) -> Anatomy:
    hidden, width, bias = config.hidden_size, config.ffn_hidden_size, config.bias
    new = config.new_decoder_architecture
    # transformers reads multi_query in the old architecture (7B) alone; 40B and 180B set it too, and have 8 heads.
    kv_heads = 1 if config.multi_query and not new else config.num_kv_heads
    # In the new architecture transformers copies keys and values to every query head before it caches them.
    cached_heads = config.num_attention_heads if new else kv_heads
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        width=width,
        vocabulary=config.vocab_size,
        head_dim=config.head_dim,
        kv_heads=kv_heads,
        cached_heads=cached_heads,
        tied=config.tie_word_embeddings,
        linears=(
            _Linear("attention qkv", hidden + 2 * kv_heads * config.head_dim, hidden, bias),
            _Linear("attention out", hidden, hidden, bias),
            _Linear("mlp up", width, hidden, bias),
            _Linear("mlp down", hidden, width, bias),
        ),
        norms=_falcon_norms(config) * 2 * hidden,  # a LayerNorm has a scale and a shift
        final_norm=2 * hidden,
        activations=_falcon_activations(config, cache_heads, kv_heads, cached_heads),
        names=_FALCON_NAMES,
    )


def _falcon_norms(config: PretrainedConfig) -> int:
    """The number of LayerNorms in each decoder layer, as transformers builds it."""
    if not config.parallel_attn:
        return 2
    if config.num_ln_in_parallel_attn:
        return int(config.num_ln_in_parallel_attn)
    if config.new_decoder_architecture:
        return 2
    return 1


def _falcon_activations(
    config: PretrainedConfig, cache_heads: CacheHeads, kv_heads: int, cached_heads: int
) -> _Activations:
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.ffn_hidden_size
    library = cache_heads == "library"
    # Fused attention refuses the library's one key head for many queries (7B): fp32 copies and scores come instead.
    fused = not library or cached_heads == heads
    if not library:
        attention = 2 * hidden + 3 * kv_heads * config.head_dim
    elif fused:
        attention = 3 * hidden
    else:
        attention = 6 * hidden
    norms = tensors = _falcon_norms(config)
    if not (config.new_decoder_architecture or config.parallel_attn):
        # A sequential block adds attention's result to its input before the MLP: one tensor more stays alive.
        tensors += 1
    kept = (2 + tensors) * hidden + attention + 2 * width
    return _Activations(
        kept=kept,
        # Only a trained matrix needs its input for the backward pass: the norms' results and the MLP's inner one go.
        frozen=kept - norms * hidden - width,
        norms=norms,
        returned=2 * width,
        prefill=(3 + tensors) * hidden + 2 * width,
        wide_tensors=2,
        scores=0 if fused else heads,
        masks=int(library),
        biases=heads if config.alibi else 0,
    )


def _llama(config: PretrainedConfig, _: CacheHeads) -> Anatomy:
    hidden, width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return Anatomy(
        layers=config.num_hidden_layers,
        hidden=hidden,
        width=width,
        vocabulary=config.vocab_size,
        head_dim=head_dim,
        kv_heads=config.num_key_value_heads,
        cached_heads=config.num_key_value_heads,
        tied=config.tie_word_embeddings,
        linears=(
            _Linear("attention qkv", queries, hidden, attention_bias),
            _Linear("attention qkv", keys, hidden, attention_bias),
            _Linear("attention qkv", keys, hidden, attention_bias),
            _Linear("attention out", hidden, queries, attention_bias),
            _Linear("mlp up", width, hidden, mlp_bias),
            _Linear("mlp up", width, hidden, mlp_bias),
            _Linear("mlp down", hidden, width, mlp_bias),
        ),
        norms=2 * hidden,
        final_norm=hidden,
        activations=_llama_activations(hidden, width, queries, keys),
        names=_LLAMA_NAMES,
    )


def _llama_activations(hidden: int, width: int, queries: int, keys: int) -> _Activations:
    # Each RMSNorm keeps its input in fp32 (two elements), normalised, and scaled; the gated MLP keeps four wide
    # tensors: gate, up, activated gate, and their product.
    kept = 8 * hidden + 2 * queries + 2 * keys + 4 * width
    # Frozen, a norm keeps only its input, and the product, which is the last matrix' input, goes.
    frozen = kept - 4 * hidden - width
    return _Activations(kept, frozen, norms=2, returned=3 * width, prefill=4 * hidden + 3 * width, wide_tensors=3)
