"""How the tokens of a reply are decoded: ways that differ in speed, not in what greedy decoding says in fp32.

Every way is transformers' ``generate``; this room chooses its options. In 16 bit the ways round differently, so texts
may part where two tokens are about equally likely.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from helpers.memory import anatomy
from helpers.progress import waiting
from helpers.types import DecodingPath, Loaded, Profile, WorkbookError
from helpers.workarounds.compiled_cpu import compile_config, unmark_cache
from helpers.workarounds.draft_limits import merge_limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StaticCache

PREFILL_TOKENS = 8192  # longer prompts, all rows counted, are read in chunks of at most so many tokens
SHORTEST_CACHE = 256  # tokens of the smallest static cache; each further size is twice the last
CANDIDATES = 5  # tokens proposed for each pass of the model
MATCHED_TOKENS = 2  # prompt lookup proposes what followed the last so many tokens when they came before


@dataclass(frozen=True)
class Decoding:
    """A way of decoding; what cannot be done so falls back to "plain" (see ``path_for``).

    "plain": one token for each pass of the model, over a cache that grows.
    "compiled": the same over a cache of fixed size, the pass compiled by ``torch.compile`` once for each size.
    "lookup": tokens that followed the last ones earlier in the text are proposed, and one pass checks them all (prompt
    lookup decoding, Saxena 2023): pays where the text repeats itself.
    "speculative": ``draft``, a smaller model with the same tokenizer, proposes ``candidates`` tokens, and one pass
    checks them all (Leviathan et al. 2023; Chen et al. 2023): pays where the draft is fast and often right.
    """

    path: DecodingPath = "plain"
    draft: Loaded | None = None
    candidates: int = CANDIDATES


PLAIN = Decoding()


@dataclass(frozen=True)
class Options:
    """Options of ``generate``: fields of its ``GenerationConfig``, and arguments of the call."""

    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Decoder:
    """A model's double for ``generate``, and the sizes (rows, tokens) that were compiled for it."""

    source: PreTrainedModel
    model: PreTrainedModel
    sizes: set[tuple[int, int]]


def for_profile(profile: Profile, loaded: Loaded) -> Decoding:
    """The way that the profile names, or "plain" where this model or machine cannot be decoded so."""
    return PLAIN if profile.decoding == "compiled" and cannot_compile(loaded) else Decoding(profile.decoding)


def check(loaded: Loaded, decoding: Decoding) -> None:
    """Raises WorkbookError where this model cannot be decoded so on this machine, saying what to do."""
    if decoding.path == "compiled" and (why := cannot_compile(loaded)):
        raise WorkbookError(f"{loaded.ref.label} cannot be decoded compiled: {why}. Choose another way of decoding.")
    if decoding.candidates < 1:
        raise WorkbookError(f"candidates must be at least 1, but is {decoding.candidates}.")
    if (decoding.path == "speculative") != (decoding.draft is not None):
        raise WorkbookError("Speculative decoding needs a draft, and no other way takes one.")
    if decoding.draft and decoding.draft.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise WorkbookError(
            f"{decoding.draft.ref.label} cannot draft for {loaded.ref.label}: their vocabularies differ."
        )


def cannot_compile(loaded: Loaded) -> str:
    """Why the model's pass cannot be compiled here; empty where it can."""
    import torch

    devices = {parameter.device for parameter in loaded.model.parameters()}
    if len(devices) > 1:
        return "its layers lie on several devices"
    if hasattr(loaded.model, "get_base_model"):
        return "it carries an adapter that is not merged"
    if getattr(loaded.model, "is_quantized", False) and not (
        devices.pop().type == "cuda" and loaded.model.hf_quantizer.is_compileable
    ):
        return f"its {loaded.report.precision} layers are no operations of torch.compile here"
    if loaded.model.device.type == "cpu" and not _compiler():
        return "there is no C++ compiler (g++) here"
    if loaded.model.device.type == "cpu" and " " in torch.__file__:
        return "torch's call of the linker takes no space in the path of the Python environment"
    return ""


def path_for(decoding: Decoding, rows: int, *, greedy: bool) -> DecodingPath:
    """The way that a call really takes.

    Tokens are proposed for one sequence at a time, and drawn replies keep to the order of their draws: several
    prompts, and sampling, are decoded plainly instead.
    """
    proposes = decoding.path in ("lookup", "speculative")
    return "plain" if proposes and (rows > 1 or not greedy) else decoding.path


def settings(
    loaded: Loaded,
    decoding: Decoding,
    path: DecodingPath,
    rows: int,
    *,
    prompt_tokens: int,
    tokens: int,
    on_proposed: Callable[[int], None] = lambda count: None,
) -> Options:
    """What ``generate`` needs to decode so; ``tokens``: prompt and reply of the longest row.

    A draft tells ``on_proposed`` how many tokens it proposes, each time. Long prompts are read in chunks of at most
    PREFILL_TOKENS tokens, all rows counted, where nothing is compiled for them and no draft reads them.
    """
    if path == "compiled":
        return _compiled_settings(loaded, rows, tokens)
    if path == "lookup":
        return Options({"prompt_lookup_num_tokens": decoding.candidates, "max_matching_ngram_size": MATCHED_TOKENS})
    if path == "speculative":
        return Options(call={"assistant_model": _assistant(decoding, on_proposed)})
    chunk = max(1, PREFILL_TOKENS // rows)
    return Options({"prefill_chunk_size": chunk} if prompt_tokens > chunk else {})


def without_settings(loaded: Loaded) -> PreTrainedModel:
    """The model with the same weights and no generation settings of its own; the same object as long as the model is.

    ``generate`` fills what is left open from the model's settings, and peft would write settings back to the model.
    What was compiled belongs to the object, which is why it is kept.
    """
    return _decoder(loaded).model


def _decoder(loaded: Loaded) -> _Decoder:
    from transformers import GenerationConfig

    source = loaded.model
    if loaded.decoder is None or loaded.decoder.source is not source:
        model = copy.copy(source.get_base_model() if hasattr(source, "get_base_model") else source)
        model.generation_config = GenerationConfig()
        model.training = False
        loaded.decoder = _Decoder(source, model, set())
    return loaded.decoder


def warm_up(loaded: Loaded, path: DecodingPath, rows: int, tokens: int) -> None:
    """Compile what decoding ``rows`` sequences of so many tokens will run, once for each size, saying so.

    What torch can keep of the compiled code lies in its own cache (``$TORCHINDUCTOR_CACHE_DIR``), for later processes.
    """
    import torch
    from transformers import GenerationConfig

    done, size = _decoder(loaded).sizes, (rows, cache_tokens(loaded, tokens))
    if path != "compiled" or size in done:
        return
    ids = torch.zeros((rows, 2), dtype=torch.long, device=loaded.model.device)
    text = f"Compiling {loaded.ref.name} for {rows} x {size[1]} tokens (once a size, about a minute)"
    with waiting(text), compiling(loaded, path):
        options = _compiled_settings(loaded, rows, tokens)
        config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, **options.config)
        mask = torch.ones_like(ids)
        without_settings(loaded).generate(ids, attention_mask=mask, generation_config=config, **options.call)
    done.add(size)


@contextmanager
def compiling(loaded: Loaded, path: DecodingPath) -> Iterator[None]:
    """Around a call of ``generate``: on a CPU, compiled passes read weights that are laid out anew ("frozen")."""
    if path != "compiled" or loaded.model.device.type != "cpu":
        yield
        return
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


def cache_tokens(loaded: Loaded, tokens: int) -> int:
    """The size of the static cache for so many tokens: few sizes, because each is compiled by itself."""
    size = SHORTEST_CACHE
    while size < tokens:
        size *= 2
    return min(size, max(tokens, loaded.model.config.max_position_embeddings))


def _compiled_settings(loaded: Loaded, rows: int, tokens: int) -> Options:
    from transformers import StaticCache

    if loaded.model.device.type == "cuda":  # compiled by generate itself, which sees the cache's kind
        size = cache_tokens(loaded, tokens)
        return Options(call={"past_key_values": StaticCache(config=loaded.model.config, max_cache_len=size)})
    cache = _static_cache(loaded, rows, cache_tokens(loaded, tokens))
    return Options({"compile_config": compile_config()}, {"past_key_values": cache})


def _static_cache(loaded: Loaded, rows: int, tokens: int) -> StaticCache:
    """A cache of fixed size whose tensors are not marked as constants: what is frozen would freeze them too."""
    from transformers import StaticCache

    shape, model = anatomy(loaded.model.config), loaded.model
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    heads = shape.kv_heads if loaded.report.grouped_cache else shape.cached_heads
    cache.early_initialization(rows, heads, shape.head_dim, model.dtype, model.device)
    unmark_cache(cache)
    return cache


def _assistant(decoding: Decoding, on_proposed: Callable[[int], None]) -> PreTrainedModel:
    """The draft, set to propose the same number of tokens each time (fewer at the end), telling how many they were."""
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


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
