"""Compiled decoding on a CPU: what transformers would not compile, and the mark that would freeze the cache."""

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, StaticCache

from helpers.models.workarounds.compiled_cpu import compile_config, unmark_cache

MARK = "_dynamo_static_input_type"


@pytest.fixture
def cache(falcon):
    model = falcon()
    static = StaticCache(config=model.config, max_cache_len=8)
    static.early_initialization(1, 4, 16, torch.float32, torch.device("cpu"))
    return static


def tensors(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]


def would_compile(model, cache, compiled) -> bool:
    settings = GenerationConfig(compile_config=compiled)
    return bool(model._valid_auto_compile_criteria({"past_key_values": cache}, settings))


def test_transformers_still_compiles_for_accelerators_only(falcon, cache):
    plain = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    assert not would_compile(falcon(), cache, plain), "transformers compiles on CPUs: delete compile_config"
    assert would_compile(falcon(), cache, compile_config())


def test_transformers_still_marks_the_static_cache(cache):
    assert all(hasattr(tensor, MARK) for tensor in tensors(cache)), "the cache is not marked: delete unmark_cache"


def test_an_unmarked_cache_has_no_marks_and_the_same_tensors(cache):
    before = tensors(cache)
    unmark_cache(cache)
    assert all(new is old for new, old in zip(tensors(cache), before, strict=True))
    assert not any(hasattr(tensor, MARK) for tensor in before)
