"""transformers compiles for accelerators only, and marks the static cache so that torch may freeze it.

What is wrong: ``generate`` compiles a pass over a static cache only on CUDA and similar devices, unless a private field
of its configuration says otherwise. And it marks the tensors of the static cache as inputs at fixed addresses: with
``freezing``, torch takes these for constants and compiles the empty cache into the code.
Versions: transformers 5.23.0 with torch 2.13.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CompileConfig, StaticCache


def compile_config() -> CompileConfig:
    """The configuration with which ``generate`` compiles a whole pass, on any device."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # noqa: SLF001, the only switch there is
    return config


def unmark_cache(cache: StaticCache) -> None:
    """Take the mark off the tensors of a static cache that is initialised."""
    from transformers.cache_utils import StaticLayer

    for layer in cache.layers:
        assert isinstance(layer, StaticLayer)
        for tensor in (layer.keys, layer.values, layer.cumulative_length):
            tensor.__dict__.pop("_dynamo_static_input_type", None)
