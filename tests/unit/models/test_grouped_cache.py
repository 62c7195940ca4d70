"""Falcon with a cache of its key-value heads against transformers' own, on tiny random models in fp32."""

import copy
import functools
import statistics
import time
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.models.falcon import modeling_falcon

from helpers import base
from helpers.base.files import ROOT
from helpers.machine import published_config
from helpers.models import ModelRef, grouped_cache, loading
from helpers.models.workarounds.grouped_cache import (
    FEW_QUERIES,
    _GroupedFalconAttention,
    _GroupedFalconModel,
    _has_grouped_cache,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OLD = {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None, "num_kv_heads": 12}
KINDS = {
    "grouped": {},
    "grouped, one norm": {"num_ln_in_parallel_attn": 1},
    "multi-query": {**OLD, "multi_query": True},
    "multi-head": {**OLD, "multi_query": False},
    "sequential": {**OLD, "multi_query": True, "parallel_attn": False, "bias": True},
    "alibi": {"alibi": True},
    "alibi, multi-query": {**OLD, "multi_query": True, "alibi": True},
    "alibi, sequential": {**OLD, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
}
HEADS = {"multi-query": 1, "multi-head": 12, "sequential": 1, "alibi, multi-query": 1, "alibi, sequential": 12}
ROTARY = [kind for kind in KINDS if "alibi" not in kind]
MAIN = ["grouped", "multi-query", "alibi"]


def settings(kind="grouped", **changes) -> FalconConfig:
    return FalconConfig(**{
        "vocab_size": 97, "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 12, "num_kv_heads": 4,
        "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "alibi": False, "bias": False,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
        "initializer_range": 0.1, **KINDS[kind], **changes,
    })  # fmt: skip


def build(kind="grouped", seed=0, **changes) -> FalconForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FalconForCausalLM(settings(kind, **changes)).eval()


def regroup(plain, implementation="sdpa", block=grouped_cache):
    """The same model with the grouped cache."""
    with block():
        ours = AutoModelForCausalLM.from_config(copy.deepcopy(plain.config), attn_implementation=implementation)
    assert ours.config._attn_implementation == implementation
    ours.load_state_dict(plain.state_dict())
    return ours.eval()


@functools.cache
def pair(kind="grouped"):
    """(transformers' own model, the same with the grouped cache): shared, not to be changed."""
    plain = build(kind)
    return plain, regroup(plain)


def tokens(*shape, seed=1):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths=(30, 17, 9, 1)):
    """Token ids, mask and position ids as ``generate`` makes them."""
    ids, mask = tokens(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


@torch.no_grad()
def in_steps(model, ids, sizes, cache, *, mask=None, positions=None):
    """The logits of ids fed in pieces of the given sizes over one cache."""
    found, start = [], 0
    for size in sizes:
        end = start + size
        options = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        found.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **options).logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(found, dim=1)


def assert_same(found, expected, tolerance=1e-5):
    assert 1 < expected.abs().max() < 10, "the tolerance is meant for logits of order 1 to 10"
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def cache_bytes(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


# What announces its own end


def test_transformers_still_caches_every_query_head():
    cache = pair()[0](tokens(1, 4), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[1] == 12, (
        "transformers caches the key-value heads by itself: delete helpers/models/workarounds/grouped_cache.py"
    )


# Logits


@pytest.mark.parametrize(("kind", "steps"), [(kind, 200 if kind in MAIN else 40) for kind in KINDS])
def test_prefill_and_many_steps_give_the_same_logits(kind, steps):
    plain, ours = pair(kind)
    ids, sizes = tokens(1, 40 + steps), [40] + [1] * steps
    expected = in_steps(plain, ids, sizes, DynamicCache(config=plain.config))
    assert_same(in_steps(ours, ids, sizes, DynamicCache(config=ours.config)), expected)
    assert_same(logits(ours, ids), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_batch_gives_the_logits_of_each_text_alone(kind):
    plain, ours = pair(kind)
    ids, mask, positions = left_padded((60, 47, 39, 31))
    sizes, options = [30, *[1] * 30], {"mask": mask, "positions": positions}
    found = in_steps(ours, ids, sizes, DynamicCache(config=ours.config), **options)
    library = in_steps(plain, ids, sizes, DynamicCache(config=plain.config), **options)
    for row, seen in enumerate(mask.bool()):
        assert_same(found[row, seen], library[row, seen])
        assert_same(found[row, seen], logits(plain, ids[row : row + 1, seen])[0])
    whole = logits(ours, ids, attention_mask=mask, position_ids=positions)
    assert_same(whole[mask.bool()], found[mask.bool()])


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("sizes", [[2] * 20, [FEW_QUERIES] * 5, [FEW_QUERIES + 1] * 4 + [4], [20, 20], [3, 1, 36]])
def test_pieces_of_any_size_over_a_cache(kind, sizes):
    plain, ours = pair(kind)
    ids, mask, positions = left_padded((40, 26))
    for options in ({}, {"mask": mask, "positions": positions}):
        expected = in_steps(plain, ids, [40], DynamicCache(config=plain.config), **options)
        found = in_steps(ours, ids, sizes, DynamicCache(config=ours.config), **options)
        seen = mask.bool() if options else torch.ones_like(mask).bool()
        assert_same(found[seen], expected[seen])


def test_a_kernel_that_lays_out_its_result_otherwise_gives_the_same(monkeypatch):
    """CUDA's memory-efficient kernel returns (batch, queries, heads, size) transposed: no view of it has all heads."""
    from torch.nn import functional

    plain, grouped = pair()
    ids, mask, positions = left_padded()
    sizes = [29, 1]
    expected = in_steps(plain, ids, sizes, DynamicCache(), mask=mask, positions=positions)
    kernel = functional.scaled_dot_product_attention

    def otherwise(*args, **options):
        return kernel(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", otherwise)
    found = in_steps(grouped, ids, sizes, DynamicCache(), mask=mask, positions=positions)
    assert_same(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("sizes", [[40], [20, 20], [FEW_QUERIES] * 5, [1] * 40])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_in_bfloat16_differ_by_rounding_alone(kind, sizes):
    ours, ids = copy.deepcopy(pair(kind)[1]).bfloat16(), tokens(2, 40)
    found = in_steps(ours, ids, sizes, DynamicCache(config=ours.config)).float()
    exact, library = logits(pair(kind)[0], ids), logits(copy.deepcopy(pair(kind)[0]).bfloat16(), ids).float()
    assert (found - exact).std() < 1.5 * (library - exact).std() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_static_cache_gives_the_same_logits(kind):
    # beside the library's growing cache: with ALiBi its masks of a static cache have the wrong size
    plain, ours = pair(kind)
    ids, mask, positions = left_padded((40, 32, 24, 18))
    for options in ({}, {"mask": mask, "positions": positions}):
        sizes = [16, 5, *[1] * 19]
        expected = in_steps(plain, ids, sizes, DynamicCache(config=plain.config), **options)
        static = StaticCache(config=ours.config, max_cache_len=64)
        found = in_steps(ours, ids, sizes, static, **options)
        seen = mask.bool() if options else torch.ones_like(mask).bool()
        assert_same(found[seen], expected[seen])
        assert static.layers[0].keys.shape == (4, HEADS.get(kind, 4), 64, 16)


@pytest.mark.parametrize("kind", MAIN)
def test_what_the_library_takes_besides(kind):
    plain, ours = pair(kind)
    ids = tokens(2, 10)
    embeds = plain.get_input_embeddings()(ids).detach()
    assert_same(logits(ours, None, inputs_embeds=embeds), logits(plain, ids))
    with torch.no_grad():
        expected, found = (model(ids, output_hidden_states=True, return_dict=False) for model in (plain, ours))
    assert len(found) == len(expected) == 3
    assert_same(found[0], expected[0])
    for each, other in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=1e-5)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            ours(**wrong)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["grouped", "multi-query"])
def test_quantized_layers_give_the_same_logits(kind, precision, checkpoint, monkeypatch):
    monkeypatch.setitem(base.DTYPES, precision, "float32")
    ref = checkpoint(kind)
    ours, library = (loading.load(ref, precision, unpacked=True, grouped_cache=on) for on in (True, False))
    assert (ours.report.grouped_cache, library.report.grouped_cache) == (True, False)
    ids, sizes = tokens(1, 60), [40, *[1] * 20]
    expected = in_steps(library.model, ids, sizes, DynamicCache(config=library.model.config))
    found = in_steps(ours.model, ids, sizes, DynamicCache(config=ours.model.config))
    assert_same(found, expected)
    assert (expected - in_steps(pair(kind)[0], ids, [60], None)).abs().max() > 0.01  # quantized indeed


@pytest.mark.parametrize("kind", ROTARY)
def test_gradients_reach_the_attention_weights(kind):
    """E9: the gradient of the weights that are returned is the library's (its eager one, which is causal), not None."""
    shared, gradients = pair(kind)[0], []
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(shared.config), attn_implementation="eager")
    eager.load_state_dict(shared.state_dict())
    for model in (eager.eval(), copy.deepcopy(pair(kind)[1])):
        with torch.enable_grad():
            outputs = model(tokens(2, 7), output_attentions=True)
            outputs.attentions[1].retain_grad()
            outputs.logits.square().sum().backward()
        gradients.append(outputs.attentions[1].grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    assert gradients[1].abs().sum() > 0


def test_prefix_tuning_is_refused_with_the_ways_round_which_work():
    """E9: peft makes keys for all query heads."""
    plain, ours = pair("grouped")
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    tuned = get_peft_model(copy.deepcopy(ours), PrefixTuningConfig(**common))
    with pytest.raises(base.WorkbookError, match=r"12 heads.* 4 key-value heads alone. Load .* grouped_cache=False"):
        tuned(input_ids=tokens(1, 5))
    for model, settings in ((plain, {}), (ours, {"num_attention_heads": 4, "token_dim": 64})):
        tuned = get_peft_model(copy.deepcopy(model), PrefixTuningConfig(**common, **settings))
        loss = tuned(input_ids=tokens(1, 5), labels=tokens(1, 5)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())


@pytest.mark.parametrize("kind", ["grouped", "multi-query"])
def test_lora_gives_the_same_logits(kind):
    plain, ours = (copy.deepcopy(model) for model in pair(kind))
    lora = LoraConfig(r=4, target_modules=["query_key_value", "dense"], init_lora_weights=False)
    adapted, other = (get_peft_model(model, lora).eval() for model in (plain, ours))
    other.load_state_dict(adapted.state_dict())
    ids, sizes = tokens(1, 40), [20, *[1] * 20]
    expected = in_steps(adapted, ids, sizes, DynamicCache(config=plain.config))
    assert_same(in_steps(other, ids, sizes, DynamicCache(config=ours.config)), expected)
    assert (expected - logits(pair(kind)[0], ids)).abs().max() > 0.01  # the adapter is not empty
    assert _has_grouped_cache(other)


# Texts


GENERATES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 7},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@torch.no_grad()
def generated(model, ids, mask=None, assistant=None, **options):
    config = GenerationConfig(max_new_tokens=40, pad_token_id=0, **options)
    mask = torch.ones_like(ids) if mask is None else mask
    torch.manual_seed(7)
    with torch.random.fork_rng():
        return model.generate(ids, attention_mask=mask, generation_config=config, assistant_model=assistant)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("way", GENERATES)
def test_generate_says_the_same(kind, way):
    plain, ours = pair(kind)
    options = GENERATES[way]
    # transformers' own ALiBi does not run over a static cache
    library = {} if way == "static" and kind == "alibi" else options
    ids = tokens(1, 30)
    expected = generated(plain, ids, **library)
    assert len(set(expected[0, 30:].tolist())) > 1
    assert torch.equal(generated(ours, ids, **options), expected)
    if way != "lookup":  # which takes one text at a time
        ids, mask, _ = left_padded()
        assert torch.equal(generated(ours, ids, mask, **options), generated(plain, ids, mask, **library))


@pytest.mark.parametrize("kind", MAIN)
def test_assisted_generation_says_the_same(kind):
    plain, ours = pair(kind)
    small = build(kind, num_hidden_layers=1)
    small.load_state_dict(plain.state_dict(), strict=False)  # the first layer: often right
    for ids in (tokens(1, 20), tokens(1, 5, seed=3)):
        expected = generated(plain, ids, assistant=small)
        assert torch.equal(generated(ours, ids, assistant=regroup(small)), expected)
        assert torch.equal(expected, generated(ours, ids))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("falcon-mini", ("Once upon a time", "1, 2, 3,")),
        ("falcon-mini-chat", ("User: What is a saddle?\nFalcon:", "The dog and the cat")),
    ],
)
def test_the_miniatures_say_the_same(name, texts):
    folder = ROOT / "env/models" / name
    ref = ModelRef(id=str(folder), family="falcon", format="plain", source="embedded")
    loaded = loading.load(ref, "fp32")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert loaded.report.grouped_cache
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        said = [tokenizer.decode(generated(model, ids)[0]) for model in (loaded.model, plain)]
        assert said[0] == said[1]
        assert len(said[0]) > len(text)


# What the cache takes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_holds_the_key_value_heads_alone(kind, dtype):
    ours = copy.deepcopy(pair(kind)[1]).to(dtype)
    cache = ours(tokens(2, 11), use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 11 * (2 * 3 * HEADS.get(kind, 4) * 16 * dtype.itemsize)


def test_what_is_reported_is_what_the_tensors_take(checkpoint):
    for grouped, heads in ((True, 4), (False, 12)):
        loaded = loading.load(checkpoint("grouped"), "bf16", grouped_cache=grouped)
        cache = loaded.model(tokens(1, 9), use_cache=True).past_key_values
        assert cache_bytes(cache) / 9 == loaded.report.cache_bytes_per_token == 2 * 3 * heads * 16 * 2


@pytest.mark.parametrize(("grouped", "expected"), [(True, 163_840), (False, 4_751_360)])
def test_bytes_a_token_of_180b(grouped, expected):
    config = published_config("tiiuae/falcon-180B")
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        if grouped:
            with grouped_cache():
                model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache_bytes(cache) / 3 == expected


# Training


def trained(model, ids, *, labels=None, **options):
    """The loss and the gradients by name."""
    model.zero_grad()
    loss = model(ids, labels=ids if labels is None else labels, **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_training(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-5 * max(1, gradient.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_gives_the_same_loss_and_gradients(kind):
    plain, ours = (copy.deepcopy(model).train() for model in pair(kind))
    ids, mask, _ = left_padded((30, 3))
    expected = trained(plain, ids[:1])
    assert_same_training(trained(ours, ids[:1]), expected)
    ours.gradient_checkpointing_enable()
    assert_same_training(trained(ours, ids[:1]), expected)
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)  # a text's first token follows nothing
    for part in (slice(None), slice(-4, None)):  # many tokens, and few
        padded = {"attention_mask": mask[:, part], "labels": labels[:, part]}
        assert_same_training(trained(ours, ids[:, part], **padded), trained(plain, ids[:, part], **padded))


@pytest.mark.parametrize("kind", MAIN)
def test_training_on_packed_texts_equals_training_on_the_texts(kind):
    plain, ours = (copy.deepcopy(model).train() for model in pair(kind))
    lengths = (23, 41)
    ids, positions = tokens(1, sum(lengths)), torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.clone()
    labels[0, lengths[0]] = -100  # as above
    weights = [(n - 1) / (sum(lengths) - 2) for n in lengths]
    alone = [trained(plain, text) for text in ids.split(lengths, dim=1)]
    loss = sum(weight * one[0] for weight, one in zip(weights, alone, strict=True))
    gradients = {
        name: sum(weight * one[1][name] for weight, one in zip(weights, alone, strict=True)) for name in alone[0][1]
    }
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        assert_same_training(trained(ours, ids, labels=labels, position_ids=positions), (loss, gradients))
    assert abs(trained(plain, ids, labels=labels, position_ids=positions)[0] - loss) > 0.01  # the library mixes them


@pytest.mark.parametrize("kind", ["alibi", "grouped"])
def test_dropout_is_applied_where_the_library_applies_it(kind):
    plain = build(kind, attention_dropout=0.5).train()
    ours, ids = regroup(plain).train(), tokens(1, 50)
    for model in (plain, ours):
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(logits(model, ids))
        assert torch.equal(*results) is (kind == "grouped")
    for attentions in (False, True):
        kept = [logits(ours.eval(), ids, output_attentions=attentions) for _ in range(2)]
        assert torch.equal(*kept)


# Packed texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_texts_do_not_see_each_other(kind, implementation, use_cache):
    plain = pair(kind)[0]
    ours = regroup(plain, implementation)
    lengths = (300, 7, 60)  # positions over 256 are no longer exact in bfloat16
    ids, positions = tokens(1, sum(lengths)), torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([logits(plain, text) for text in ids.split(lengths, dim=1)], dim=1)
    assert_same(logits(ours, ids, position_ids=positions, use_cache=use_cache), alone)
    mixed = logits(plain, ids, position_ids=positions, use_cache=use_cache)
    assert (mixed - alone).abs().max() > 0.1  # transformers' Falcon lets a text see those before it


def test_packed_texts_of_a_batch_with_other_borders():
    plain, ours = pair()
    ids = tokens(2, 20)
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(20 - n)]) for n in (5, 12)])
    found = logits(ours, ids, position_ids=positions)
    for row, border in enumerate((5, 12)):
        alone = [logits(plain, text)[0] for text in ids[row : row + 1].split((border, 20 - border), dim=1)]
        assert_same(found[row], torch.cat(alone))


# Attention weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights(kind, implementation):
    plain = pair(kind)[0]
    ours = regroup(plain, implementation)
    ids, mask, positions = left_padded((24, 15))
    for options in ({}, {"attention_mask": mask, "position_ids": positions}):
        seen = mask.bool() if options else torch.ones_like(mask).bool()
        with torch.no_grad():
            found = ours(ids, output_attentions=True, **options)
        assert_same(found.logits[seen], logits(plain, ids, **options)[seen])
        assert len(found.attentions) == 3
        allowed = torch.ones(24, 24).tril().bool() & seen[:, None, None, :]
        for weights in found.attentions:
            assert weights.shape == (2, 12, 24, 24)
            rows = weights.transpose(1, 2)[seen]
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]), rtol=0, atol=1e-5)
            assert (rows[~allowed.expand(2, 12, 24, 24).transpose(1, 2)[seen]] == 0).all()
    assert_same(logits(ours, ids), logits(plain, ids))


@pytest.mark.parametrize("kind", ROTARY)
def test_attention_weights_equal_the_librarys_eager_ones(kind):
    plain = regroup(pair(kind)[0], "eager", block=nullcontext)
    assert not _has_grouped_cache(plain)
    with torch.no_grad():
        expected, found = (model(tokens(2, 24), output_attentions=True) for model in (plain, pair(kind)[1]))
    for weights, library in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(weights, library, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["alibi", "alibi, sequential"])
def test_alibi_weights_are_softmax_of_scores_and_biases(kind):
    # by hand: the library's eager ALiBi adds the biases twice
    ours, ids = pair(kind)[1], tokens(1, 20)
    block = ours.transformer.h[0]
    normed = (block.ln_attn if kind == "alibi" else block.input_layernorm)(ours.get_input_embeddings()(ids))
    query, key, _ = block.self_attention._split_heads(block.self_attention.query_key_value(normed))
    slopes = [2.0**-n for n in range(1, 9)] + [2.0 ** -(n / 2) for n in (1, 3, 5, 7)]  # Press et al., 12 heads
    biases = torch.tensor(slopes).bfloat16().float()[:, None, None] * torch.arange(20)
    scores = (query[0] @ key[0].repeat_interleave(12 // key.shape[1], dim=0).mT + biases.bfloat16()) / 4
    expected = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf")).softmax(-1)
    with torch.no_grad():
        found = ours(ids, output_attentions=True).attentions[0][0]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)


# Where it applies


def test_models_built_outside_stay_transformers_own():
    classes = dict(modeling_falcon.FALCON_ATTENTION_CLASSES)
    before = build()
    with grouped_cache(), grouped_cache():
        inside = build()
    after = build()
    assert [_has_grouped_cache(model) for model in (before, inside, after)] == [False, True, False]
    assert [type(model.transformer) is _GroupedFalconModel for model in (before, inside, after)] == [False, True, False]
    assert {type(block.self_attention) for block in after.transformer.h} == {classes["sdpa"]}
    assert classes == modeling_falcon.FALCON_ATTENTION_CLASSES
    assert before(tokens(1, 3)).past_key_values.layers[0].keys.shape[1] == 12


def test_transformers_own_classes_are_back_after_an_exception():
    classes, model = dict(modeling_falcon.FALCON_ATTENTION_CLASSES), modeling_falcon.FalconModel

    @grouped_cache()
    def fail():
        assert modeling_falcon.FALCON_ATTENTION_CLASSES["sdpa"] is _GroupedFalconAttention
        assert modeling_falcon.FalconModel is _GroupedFalconModel
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert classes == modeling_falcon.FALCON_ATTENTION_CLASSES
    assert modeling_falcon.FalconModel is model


def test_what_is_saved_is_transformers_own(tmp_path):
    plain, ours = pair()
    ours.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    config = (tmp_path / "ours/config.json").read_text(encoding="utf-8")
    assert config == (tmp_path / "plain/config.json").read_text(encoding="utf-8")
    assert '"FalconForCausalLM"' in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert not _has_grouped_cache(again)
    assert torch.equal(logits(again, tokens(1, 9)), logits(plain, tokens(1, 9)))


@pytest.mark.parametrize("places", [{"": "cpu"}, "part on disk"])
def test_models_spread_over_devices(places, checkpoint, tmp_path):
    if places == "part on disk":
        places = {"transformer.word_embeddings": "cpu", "transformer.rotary_emb": "cpu", "transformer.ln_f": "cpu"}
        places |= {"lm_head": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"}
    with grouped_cache():
        ours = AutoModelForCausalLM.from_pretrained(
            checkpoint("grouped").id, dtype=torch.float32, device_map=places, offload_folder=tmp_path
        )
    if len(places) > 1:
        assert ours.transformer.h[1].mlp.dense_h_to_4h.weight.is_meta
    ids, sizes = tokens(1, 30), [20, *[1] * 10]
    plain = pair()[0]
    assert _has_grouped_cache(ours)
    assert_same(in_steps(ours, ids, sizes, DynamicCache(config=ours.config)), logits(plain, ids))
    assert torch.equal(generated(ours, ids), generated(plain, ids))


@pytest.mark.parametrize("kind", MAIN)
def test_compiles_into_one_graph(kind):
    plain, ours = pair(kind)
    ids, static = tokens(1, 30), StaticCache(config=ours.config, max_cache_len=64)
    found = [in_steps(ours, ids[:, :20], [20], static)]
    step = torch.compile(ours, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        for at in range(20, 30):
            found.append(step(ids[:, at : at + 1], past_key_values=static, use_cache=True).logits)
    assert_same(torch.cat(found, dim=1), logits(plain, ids))


# Speed


@pytest.fixture(scope="module")
def many_heads():
    """(transformers' own model, the same with the grouped cache): 64 heads, 4 of them with keys and values."""
    plain = build(hidden_size=1024, num_hidden_layers=4, num_attention_heads=64, num_kv_heads=4).bfloat16()
    return plain, regroup(plain).bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_decoding_is_faster_and_its_cache_a_tenth(batch, many_heads):
    # processor time of one thread, by turns: what else runs on the machine counts little
    seen, steps, heads = 1900, 16, {"library": 64, "grouped": 4}
    plain, grouped = many_heads
    models = {"library": plain, "grouped": grouped}
    caches, seconds = {name: DynamicCache(config=plain.config) for name in models}, {name: [] for name in models}
    for name, cache in caches.items():
        for layer in range(4):
            states = torch.randn(batch, heads[name], seen, 16, dtype=torch.bfloat16)
            cache.update(states, states.clone(), layer)
    for _ in range(steps):
        for name, model in models.items():
            started = time.thread_time()
            logits(model, tokens(batch, 1), past_key_values=caches[name], use_cache=True)
            seconds[name].append(time.thread_time() - started)
    ratio = statistics.median(seconds["library"]) / statistics.median(seconds["grouped"])
    print(f"batch {batch}: decoding {ratio:.2f} times as fast")
    assert ratio >= 1.3
    assert cache_bytes(caches["grouped"]) * 10 <= cache_bytes(caches["library"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """kind -> where ``load`` finds the model of that kind, with a tokenizer of as many words as it has rows."""
    words = Tokenizer(WordLevel({f"word{row}": row for row in range(97)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word0")

    @functools.cache
    def saved(kind):
        folder = tmp_path_factory.mktemp("models") / "tiny"
        pair(kind)[0].save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return ModelRef(id=str(folder), family="falcon", format="plain", source="embedded")

    return saved
