"""Decoding strategies that change the speed but, in fp32, not the greedy output.

Each is transformers' ``generate`` with other options, which this module chooses. In 16 bits the strategies round
differently, so texts may differ from the first token on whose two best candidates are about equally likely.
"""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from helpers.base.errors import WorkbookError, check_whole, choose
from helpers.base.progress import waiting
from helpers.generation.sampling import DecodingPath
from helpers.machine.anatomy import anatomy
from helpers.models.loaded import Loaded
from helpers.models.workarounds.compiled_cpu import compile_config, unmark_cache
from helpers.models.workarounds.draft_limits import merge_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    import torch
    from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache  # noqa: TC004
    from transformers.generation.utils import GenerateOutput

    from helpers.models.references import Profile

PREFILL_TOKENS = 8192  # longer prompts, all rows counted, are read in chunks of at most this many tokens
SHORTEST_CACHE = 256  # tokens of the smallest static cache; each larger size is twice the one before
CANDIDATES = 5  # tokens proposed for each pass of the model
MATCHED_TOKENS = 2  # prompt lookup looks for an earlier occurrence of this many last tokens


@dataclass(frozen=True)
class Decoding:
    """A decoding strategy; where it does not apply, ``_applicable`` replaces it by "plain".

    "plain": one token for each pass of the model, over a cache that grows.
    "compiled": the same over a cache of fixed size; ``torch.compile`` compiles the pass once for each size.
    "lookup": the tokens that followed an earlier occurrence of the last ones are proposed, and one pass checks them all
    (prompt lookup decoding, Saxena 2023). It pays if the text repeats itself.
    "speculative": ``draft``, a smaller model with the same tokenizer, proposes ``candidates`` tokens, and one pass
    checks them all (Leviathan et al. 2023; Chen et al. 2023). It pays if the draft is fast and often right.
    """

    path: DecodingPath = "plain"
    draft: Loaded | None = None
    candidates: int = CANDIDATES

    @property
    def proposes(self) -> bool:
        """Whether tokens are proposed and several may be accepted in one pass."""
        return self.path in ("lookup", "speculative")


PLAIN = Decoding()


@dataclass(frozen=True)
class Size:
    """The size of one call of ``generate``. ``tokens`` counts prompt and reply of the longest row."""

    rows: int
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class _Options:
    """Arguments of ``generate`` that a strategy needs besides its ``GenerationConfig``."""

    cache: StaticCache | None = None
    draft: PreTrainedModel | None = None


@dataclass(frozen=True)
class _Decoder:
    """A model's double for ``generate``, and the sizes (rows, tokens) that were compiled for it."""

    source: PreTrainedModel
    model: PreTrainedModel
    sizes: set[tuple[int, int]]


def for_profile(profile: Profile, loaded: Loaded) -> Decoding:
    """The strategy of the profile, or "plain" if this model cannot be compiled on this machine."""
    if profile.decoding == "compiled" and cannot_compile(loaded):
        return PLAIN
    return Decoding(profile.decoding)


def _check(loaded: Loaded, decoding: Decoding) -> None:
    """Raise WorkbookError, with advice, if the strategy is not possible for this model on this machine."""
    choose(decoding.path, get_args(DecodingPath), "decoding strategy")
    if decoding.path == "compiled" and (reason := cannot_compile(loaded)):
        raise WorkbookError(
            f'{loaded.ref.label} cannot be decoded with "compiled": {reason}. Choose another decoding strategy.'
        )
    check_whole("candidates", decoding.candidates)
    if (decoding.path == "speculative") != (decoding.draft is not None):
        raise WorkbookError('The strategy "speculative" needs a draft, and the others take none.')
    if decoding.draft and decoding.draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise WorkbookError(
            f"{decoding.draft.ref.label} cannot draft for {loaded.ref.label}: their vocabularies differ. "
            "Choose a draft with the same tokenizer."
        )
    if decoding.draft:
        _check_rows(loaded, decoding.draft)


def _check_rows(loaded: Loaded, draft: Loaded) -> None:
    """Refuse a draft of another number of rows: some checkpoints pad the same vocabulary. Raises WorkbookError."""
    own, other = (int(each.model.config.vocab_size) for each in (loaded, draft))
    if own == other:
        return
    raise WorkbookError(
        f"{draft.ref.label} cannot draft for {loaded.ref.label}: their tokens are the same, but its embeddings have "
        f"{other:,} rows, and the model's {own:,}. Call draft.model.resize_token_embeddings({own}, "
        "mean_resizing=False) first. The rows behind the tokens stand for none, so no reply changes."
    )


def cannot_compile(loaded: Loaded) -> str:
    """Why the model's pass cannot be compiled on this machine; empty if it can."""
    model = loaded.model
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return "its layers lie on several devices"
    if hasattr(model, "get_base_model"):
        return "it carries an adapter that is not merged"
    if getattr(model, "is_quantized", False):
        # bitsandbytes registers its kernels as operations of torch.compile for CUDA alone
        on_gpu = devices.pop().type == "cuda"
        if not (on_gpu and cast("Any", model).hf_quantizer.is_compileable):
            return f"torch.compile cannot compile the {loaded.report.precision} layers on this machine"
    return _no_cpu_compiler() if model.device.type == "cpu" else ""


def _no_cpu_compiler() -> str:
    """Why torch.compile cannot compile anything for a CPU here; empty if it can."""
    import torch

    if not (shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")):
        return "there is no C++ compiler (g++) on this machine"
    if " " in torch.__file__:
        return "torch.compile fails if the path of the Python environment contains a space"
    return ""


def _applicable(decoding: Decoding, rows: int, *, greedy: bool) -> Decoding:
    """The strategy that a call really uses.

    ``generate`` proposes tokens for one sequence only, and a sampled reply would change with the number of proposals.
    Several prompts, and sampling, are therefore decoded plainly.
    """
    if decoding.proposes and (rows > 1 or not greedy):
        return PLAIN
    return decoding


def configure(
    loaded: Loaded,
    decoding: Decoding,
    size: Size,
    config: GenerationConfig,
    on_proposed: Callable[[int], None] = lambda _count: None,
) -> _Options:
    """Set the fields of ``config`` that the strategy needs, and return the other arguments of ``generate``.

    ``on_proposed`` is called with the number of tokens whenever a draft proposes some. Long prompts are read in chunks
    of at most PREFILL_TOKENS tokens, all rows counted, if nothing is compiled for them and no draft reads them.
    """
    if decoding.path == "compiled":
        return _compiled_settings(loaded, size, config)
    if decoding.path == "speculative":
        return _Options(draft=_assistant(decoding, on_proposed))
    if decoding.path == "lookup":
        config.prompt_lookup_num_tokens = decoding.candidates
        config.max_matching_ngram_size = MATCHED_TOKENS
        return _Options()
    chunk = max(1, PREFILL_TOKENS // size.rows)
    if size.prompt_tokens > chunk:
        config.prefill_chunk_size = chunk
    return _Options()


def generate_method(model: PreTrainedModel) -> Callable[..., GenerateOutput | torch.LongTensor]:
    """The model's ``generate``, which ``PreTrainedModel`` does not declare: a mixin of its class brings it."""
    return cast("Callable[..., GenerateOutput | torch.LongTensor]", model.generate)


def without_settings(loaded: Loaded) -> PreTrainedModel:
    """The model with the same weights and no generation settings of its own; one object for the life of the model.

    ``generate`` takes missing options from the model's settings, and peft would write settings back to the model.
    Compiled code belongs to the object, which is why the object is kept.
    """
    return _decoder(loaded).model


def _decoder(loaded: Loaded) -> _Decoder:
    from transformers import GenerationConfig

    source = loaded.model
    decoder = cast("_Decoder | None", loaded.decoder)
    if decoder is None or decoder.source is not source:
        base = cast("Any", source).get_base_model() if hasattr(source, "get_base_model") else source
        # a shallow copy shares the weights, but has settings of its own
        model = copy.copy(base)
        model.generation_config = GenerationConfig()
        model.training = False
        decoder = _Decoder(source, model, set())
        loaded.decoder = decoder
    return decoder


def warm_up(loaded: Loaded, decoding: Decoding, size: Size) -> None:
    """Compile what a call of this size will run, once for each size, and tell the user; do nothing if not "compiled".

    torch keeps part of the compiled code for later processes, in its own cache (``$TORCHINDUCTOR_CACHE_DIR``).
    """
    import torch
    from transformers import GenerationConfig

    compiled, kept = _decoder(loaded).sizes, (size.rows, _cache_tokens(loaded, size.tokens))
    if decoding.path != "compiled" or kept in compiled:
        return
    # two tokens of prompt and three new ones run both shapes of pass that are compiled: prefill and decode
    ids = torch.zeros((size.rows, 2), dtype=torch.long, device=loaded.model.device)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    text = f"Compiling {loaded.ref.name} for {kept[0]} x {kept[1]} tokens (once for each size, about a minute)"
    with waiting(text), compiling(loaded, decoding):
        options = _compiled_settings(loaded, size, config)
        generate_method(without_settings(loaded))(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=options.cache
        )
    compiled.add(kept)


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's tensors: keys and values of all layers."""
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if tensor is not None:
                total += tensor.nbytes
    return total


@contextmanager
def compiling(loaded: Loaded, decoding: Decoding) -> Iterator[None]:
    """Surround a call of ``generate``: on a CPU, compiled passes read weights in a layout of their own ("frozen")."""
    if decoding.path != "compiled" or loaded.model.device.type != "cpu":
        yield
        return
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


def _cache_tokens(loaded: Loaded, tokens: int) -> int:
    """Size of the static cache for ``tokens`` tokens: one of few sizes, because each is compiled separately."""
    size = SHORTEST_CACHE
    while size < tokens:
        size *= 2
    context = int(loaded.model.config.max_position_embeddings)
    return min(size, max(tokens, context))


def _compiled_settings(loaded: Loaded, size: Size, config: GenerationConfig) -> _Options:
    from transformers import StaticCache

    tokens = _cache_tokens(loaded, size.tokens)
    if loaded.model.device.type == "cuda":
        # on CUDA generate compiles by itself when it is given a static cache
        return _Options(cache=StaticCache(config=loaded.model.config, max_cache_len=tokens))
    config.compile_config = compile_config()
    return _Options(cache=_static_cache(loaded, size.rows, tokens))


def _static_cache(loaded: Loaded, rows: int, tokens: int) -> StaticCache:
    """A cache of fixed size that freezing does not compile into the code as a constant."""
    from transformers import StaticCache

    shape, model = anatomy(loaded.model.config), loaded.model
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    heads = shape.kv_heads if loaded.report.grouped_cache else shape.cached_heads
    cache.early_initialization(rows, heads, shape.head_dim, model.dtype, model.device)
    unmark_cache(cache)
    return cache


def _assistant(decoding: Decoding, on_proposed: Callable[[int], None]) -> PreTrainedModel:
    """The draft, set to propose the same number of tokens each time (fewer at the end) and to report each number."""
    assert decoding.draft is not None
    model = copy.copy(without_settings(decoding.draft))
    model.generation_config = copy.copy(model.generation_config)
    model.generation_config.update(
        num_assistant_tokens=decoding.candidates,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    merge_limits(model, on_proposed)
    return model
