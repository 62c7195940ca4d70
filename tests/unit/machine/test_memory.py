"""helpers.machine against transformers on the meta device, tensors that are held, accelerate, and brute force."""

import itertools
import json
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig

from helpers.base import GIB, WorkbookError
from helpers.machine import Devices, Gpu, Machine, Resident, Shortfall, Workload, anatomy, memory, packing, sharding
from helpers.machine import placement as machine_placement
from helpers.machine.placement import RESERVED, largest_context, least_gpus, parts_by_device, place_together, shortfall
from helpers.machine.step import FRAGMENTS, Training
from helpers.models import grouped_cache, loading, profiles

pytestmark = pytest.mark.usefixtures("one_thread")

FALCON_180B = "tiiuae/falcon-180B"
PUBLISHED = anatomy.published_models()
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def falcon(**changes):
    fields = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_kv_heads": 2,
        "new_decoder_architecture": True,
    }  # fmt: skip
    return FalconConfig(**(fields | changes))


def old_falcon(**changes):
    return falcon(**({"new_decoder_architecture": False, "num_kv_heads": None} | changes))


def llama(**changes):
    fields = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 176, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**(fields | changes))


SMALL = {
    "180B's architecture": falcon(),
    "one norm": falcon(num_ln_in_parallel_attn=1),
    "biases": falcon(bias=True),
    "wide": falcon(ffn_hidden_size=192, num_kv_heads=8),
    "untied": falcon(tie_word_embeddings=False),
    "7B's architecture": old_falcon(),
    "1B's architecture": old_falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "Llama": llama(),
    "Llama, tied": llama(tie_word_embeddings=True, num_key_value_heads=8),
    "Llama, biases and wide heads": llama(attention_bias=True, mlp_bias=True, head_dim=16),
}
by_heads = pytest.mark.parametrize("heads", ["kv", "library"])
small = pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def real(config, dtype=torch.float32, cache_heads="library"):
    torch.manual_seed(0)
    with grouped_cache() if cache_heads == "kv" else nullcontext():
        return AutoModelForCausalLM.from_config(config).to(dtype)


def held(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.fixture(scope="module")
def published_180b():
    return anatomy.published_config(FALCON_180B)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", PUBLISHED)
def test_counts_of_published_models(repo_id):
    config = anatomy.published_config(repo_id)
    model = on_meta(config)
    assert anatomy.count_parameters(config) == model.num_parameters()
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    separate = model.num_parameters() + (head.numel() if head is embeddings else 0)
    assert anatomy.count_parameters(config, tied=False) == separate


@small
def test_counts_of_every_architecture(config):
    assert anatomy.count_parameters(config) == on_meta(config).num_parameters()


@pytest.mark.parametrize(
    ("repo_id", "parameters"),
    [
        (FALCON_180B, 178_557_088_768),
        ("tiiuae/falcon-40b", 41_303_293_952),
        ("tiiuae/falcon-7b", 6_921_720_704),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
    ],
)
def test_counts_of_the_published_configurations_to_the_parameter(repo_id, parameters):
    assert anatomy.count_parameters(anatomy.published_config(repo_id)) == parameters
    assert (
        json.loads((anatomy.CONFIGS / f"{repo_id.replace('/', '--')}.json").read_text())["model_type"]
        in repo_id.lower()
    )


def test_figures_of_falcon_180b(published_180b):
    assert anatomy.count_parameters(published_180b) == 178_557_088_768
    assert anatomy.count_parameters(published_180b, tied=False) == 179_522_565_120
    assert sum(linear.weights for linear in anatomy.anatomy(published_180b).linears) * 80 == 177_586_831_360


@pytest.mark.parametrize("repo_id", PUBLISHED)
def test_published_fields_survive_as_published(repo_id):
    fields = json.loads((anatomy.CONFIGS / f"{repo_id.replace('/', '--')}.json").read_text())
    config = anatomy.published_config(repo_id).to_dict()
    renamed = {"torch_dtype", "transformers_version", "rope_scaling", "_name_or_path"}
    assert {key: config.get(key) for key in fields if key not in renamed} == {
        key: value for key, value in fields.items() if key not in renamed
    }
    assert config["dtype"] == fields["torch_dtype"]


def test_the_largest_published_models_are_there():
    assert {FALCON_180B, "tiiuae/falcon-40b", "tiiuae/falcon-7b", "meta-llama/Llama-2-70b-chat-hf"} <= set(PUBLISHED)
    with pytest.raises(WorkbookError, match=r"falcon-180b'. Choose one of: .*tiiuae/falcon-180B"):
        anatomy.published_config("tiiuae/falcon-180b")


def test_a_family_without_formulas_is_refused():
    from transformers import GPT2Config

    with pytest.raises(WorkbookError, match=r"'gpt2' is not supported. Supported are falcon, llama"):
        anatomy.count_parameters(GPT2Config())


@small
def test_parameter_table_adds_up_to_the_models_tensors(config):
    parts = {
        "embeddings": ("word_embeddings", "embed_tokens"),
        "attention qkv": ("query_key_value", "q_proj", "k_proj", "v_proj"),
        "attention out": ("self_attention.dense", "o_proj"),
        "mlp up": ("h_to_4h", "gate_proj", "up_proj"),
        "mlp down": ("4h_to_h", "down_proj"),
        "norms": ("norm", ".ln_"),
        "head": ("lm_head",),
    }
    counted = dict.fromkeys(parts, 0)
    for name, tensor in on_meta(config).named_parameters():
        (part,) = [part for part, words in parts.items() if any(word in name for word in words)]
        counted[part] += tensor.numel()
    table = anatomy.parameter_table(config)
    assert table["parameters"].to_dict() == counted
    assert table["share"].sum() == pytest.approx(1)
    layers = table.drop(index=["embeddings", "head", "norms"])
    assert (layers["per_layer"] * config.num_hidden_layers == layers["parameters"]).all()


# --- weights ----------------------------------------------------------------------------------------------------------


@small
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weight_bytes_are_what_torch_holds(config, precision, dtype):
    assert memory.weight_bytes(config, precision) == held(real(config, dtype).parameters())


def test_bf16_bytes_of_the_whole_model_are_those_of_the_model_built_on_the_meta_device(published_180b):
    model = on_meta(published_180b).to(torch.bfloat16)
    assert memory.weight_bytes(published_180b, "bf16") == held(model.parameters()) == 357_114_177_536


@pytest.mark.parametrize(
    ("precision", "double_quant"), [("int8", False), ("nf4", False), ("nf4", True)], ids=["int8", "nf4", "nf4 double"]
)
def test_quantized_bytes_at_the_true_width_are_what_bitsandbytes_holds(published_180b, precision, double_quant):
    """Rows of Falcon-180B's width are really quantized, a 64th and a 32nd of each matrix: what they add is linear."""
    model = on_meta(published_180b).to(torch.bfloat16)
    layers = [module.weight for module in model.transformer.h.modules() if isinstance(module, torch.nn.Linear)]
    others = held(model.parameters()) - held(layers)
    stored = 0
    for weight in layers[:4]:
        rows, columns = weight.shape[0] // 64, weight.shape[1]
        few, twice = (quantized_bytes(count, columns, precision, double_quant) for count in (rows, 2 * rows))
        stored += few + 63 * (twice - few)
    built = 80 * stored + others
    assert memory.weight_bytes(published_180b, precision, double_quant=double_quant) == pytest.approx(built, rel=1e-5)


def quantized_bytes(rows, columns, precision, double_quant):
    """What bitsandbytes holds of a matrix, with the scales and tables that it needs to read it."""
    from bitsandbytes.nn import Int8Params, Params4bit

    weight = torch.ones(rows, columns, dtype=torch.bfloat16)
    if precision == "int8":
        quantized = Int8Params(weight.half(), requires_grad=False).to("cpu")
    else:
        how = {"quant_type": "nf4", "compress_statistics": double_quant}
        quantized = Params4bit(weight, requires_grad=False, **how).to("cpu")
    states = quantization_states(quantized)
    assert states
    return quantized.nbytes + held(states)


def test_published_weight_sizes(published_180b):
    sizes = {precision: memory.weight_bytes(published_180b, precision) / GIB for precision in ("bf16", "int8", "nf4")}
    assert sizes == pytest.approx({"bf16": 332.59, "int8": 167.2, "nf4": 94.84}, abs=0.05)
    assert memory.weight_bytes(published_180b, "nf4", double_quant=True) / GIB == pytest.approx(87.13, abs=0.01)
    assert memory.estimate(published_180b, "nf4", workload=Workload(double_quant=True)).weights / GIB == pytest.approx(
        87.13, abs=0.01
    )


def quantization_states(parameter):
    """All that bitsandbytes keeps beside a quantized weight."""
    state = getattr(parameter, "quant_state", None)
    scale = getattr(parameter, "SCB", None)
    if scale is not None:
        return [scale]
    if state is None:
        return []
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


@pytest.mark.parametrize(
    ("precision", "double_quant"), [("int8", False), ("nf4", False), ("nf4", True)], ids=["int8", "nf4", "nf4 double"]
)
@pytest.mark.parametrize(
    "config", [falcon(), falcon(hidden_size=192, bias=True), llama()], ids=["Falcon", "biases", "Llama"]
)
def test_quantized_bytes_are_what_bitsandbytes_holds(config, precision, double_quant, tmp_path, monkeypatch):
    import transformers.models.falcon.modeling_falcon as falcon_modeling
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(falcon_modeling, "FalconLinear", torch.nn.Linear)  # else transformers quantizes nothing
    real(config, torch.bfloat16).save_pretrained(tmp_path)
    how = {"load_in_8bit": True} if precision == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantization = BitsAndBytesConfig(**how, bnb_4bit_use_double_quant=double_quant)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    states = [state for parameter in model.parameters() for state in quantization_states(parameter)]
    assert states
    stored = held(model.parameters()) + held(states)
    assert memory.weight_bytes(config, precision, double_quant=double_quant) == stored


def test_an_unknown_precision_lists_the_known_ones(published_180b):
    with pytest.raises(WorkbookError, match=r"There is no precision 'int4'\. Choose one of: fp32, bf16"):
        memory.weight_bytes(published_180b, "int4")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_published_cache_sizes(published_180b):
    assert memory.kv_bytes_per_token(published_180b) == 163_840
    assert memory.kv_bytes_per_token(published_180b, heads="library") == 4_751_360
    assert memory.kv_bytes_per_token(published_180b, "nf4") == 163_840
    assert memory.kv_bytes_per_token(published_180b, "fp32") == 327_680
    assert memory.estimate(published_180b, "bf16").kv_cache == 2048 * 163_840
    library = memory.estimate(published_180b, "bf16", workload=Workload(cache_heads="library")).kv_cache
    assert library / GIB == pytest.approx(9.06, abs=0.01)
    # 2 (keys and values) x 80 layers x 8 heads x 128 x 2 bytes, Llama 2 70B
    assert memory.kv_bytes_per_token(anatomy.published_config("meta-llama/Llama-2-70b-chat-hf")) == 327_680


@small
@by_heads
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_real_cache_holds_the_estimated_bytes(config, precision, dtype, heads):
    batch_size, tokens = 2, 11
    with torch.inference_mode():
        ids = torch.zeros(batch_size, tokens, dtype=torch.long)
        cache = real(config, dtype, heads)(ids, use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    workload = Workload(batch_size, tokens, heads)
    assert memory.estimate(config, precision, workload=workload).kv_cache == stored
    assert memory.kv_bytes_per_token(config, precision, heads=heads) == stored // (batch_size * tokens)


# --- training ---------------------------------------------------------------------------------------------------------


def one_step(model, parameters, vocabulary=96):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.randint(0, vocabulary, (1, 8))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return optimizer


def moments(optimizer):
    """AdamW's two moments, without its step counters of a few bytes."""
    return [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]


@small
def test_a_step_in_fp32_holds_the_estimated_bytes(config):
    model = real(config)
    optimizer = one_step(model, model.parameters())
    optimizer.step()
    estimate = memory.estimate(config, "fp32", mode="full")
    assert estimate.weights == held(model.parameters())
    assert estimate.gradients == held(parameter.grad for parameter in model.parameters())
    assert estimate.optimizer == held(moments(optimizer))


@small
def test_a_mixed_precision_step_holds_sixteen_bytes_a_parameter(config):
    model = real(config, torch.bfloat16)
    masters = [parameter.detach().float().requires_grad_() for parameter in model.parameters()]
    optimizer = one_step(model, masters)
    gradients = held(parameter.grad for parameter in model.parameters())
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad = parameter.grad.float()
    optimizer.step()
    estimate = memory.estimate(config, "bf16", mode="full")
    assert estimate.gradients == gradients
    assert estimate.optimizer == held(masters) + held(moments(optimizer))
    assert estimate.weights + estimate.gradients + estimate.optimizer == 16 * model.num_parameters()


@pytest.mark.parametrize("config", [falcon(), old_falcon(), llama()], ids=["new", "old", "Llama"])
@pytest.mark.parametrize("rank", [4, 8])
def test_a_lora_step_holds_the_estimated_bytes(config, rank):
    from peft import LoraConfig, get_peft_model

    targets = LINEARS if config.model_type == "falcon" else "all-linear"
    model = get_peft_model(real(config, torch.bfloat16), LoraConfig(r=rank, target_modules=targets))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = one_step(model, adapters)
    optimizer.step()
    estimate = memory.estimate(config, "bf16", mode="lora", training=Training(rank=rank))
    assert estimate.gradients == held(adapter.grad for adapter in adapters)
    assert estimate.optimizer == held(moments(optimizer))
    assert estimate.weights == held(model.parameters())


def test_qlora_is_the_quantized_base_and_the_same_adapters():
    config = falcon()
    lora, qlora = memory.estimate(config, "bf16", mode="lora"), memory.estimate(config, "nf4", mode="qlora")
    assert (qlora.gradients, qlora.optimizer) == (lora.gradients, lora.optimizer)
    assert qlora.weights - lora.weights == memory.weight_bytes(config, "nf4") - memory.weight_bytes(config, "bf16")
    assert qlora.kv_cache == lora.kv_cache == 0


@pytest.mark.parametrize(
    ("precision", "mode", "says"),
    [
        ("nf4", "full", "mode='qlora'"),
        ("int8", "lora", "mode='qlora'"),
        ("bf16", "qlora", "mode='lora'"),
        ("bf16", "training", "inference, full, lora, qlora"),
        ("bf17", "full", "fp32, bf16"),
    ],
)
def test_work_that_is_not_possible_is_refused(precision, mode, says, published_180b):
    with pytest.raises(WorkbookError, match=says):
        memory.estimate(published_180b, precision, mode=mode)


@pytest.mark.parametrize("size", [0, -1, 1.5, float("nan"), float("inf"), True, "8"])
def test_sizes_below_one_are_refused(size):
    """B8: a negative batch gave negative bytes."""
    with pytest.raises(WorkbookError, match="batch_size must be a whole number of at least 1"):
        Workload(batch_size=size)
    with pytest.raises(WorkbookError, match="rank must be a whole number of at least 1"):
        memory.estimate(falcon(), "bf16", mode="lora", training=Training(rank=size))
    if size != 0:  # without a token, the weights alone are planned for
        with pytest.raises(WorkbookError, match="context_tokens must be a whole number of at least 0"):
            Workload(context_tokens=size)


@pytest.mark.parametrize("size", [0, -80e9, float("nan"), float("inf")])
def test_a_device_has_a_finite_size(size):
    """B8"""
    for refused in (
        lambda: machine_placement.place(falcon(), "bf16", [size]),
        lambda: sharding.shard(falcon(), "bf16", [size], mode="full"),
    ):
        with pytest.raises(WorkbookError, match="finite size above 0 bytes"):
            refused()
    with pytest.raises(WorkbookError, match="at least one device"):
        sharding.shard(falcon(), "bf16", [], mode="full")


class Peak(TorchDispatchMode):
    """The most bytes alive at once of the storages that torch makes, ``known`` tensors left out."""

    def __init__(self, known):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage):
        self.seen.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key, size):
        self.seen.discard(key)
        self.alive -= size


WIDE = {
    "180B's architecture": falcon(hidden_size=256),
    "7B's architecture": old_falcon(hidden_size=256),
    "Llama": llama(hidden_size=256, intermediate_size=704),
}
wide = pytest.mark.parametrize("config", WIDE.values(), ids=WIDE.keys())


def allocated_peak(work):
    """The most bytes that torch's CPU allocator holds at once above what it held before, and what ``work`` returns."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)), result


def cache_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@wide
@by_heads
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("shape", [(1, 256), (2, 512)])
def test_activations_of_inference_are_the_measured_peak(config, precision, dtype, shape, heads):
    """The embeddings to the last token's logits, cache apart, on real tensors."""
    model, ids = real(config, dtype, heads).eval(), torch.zeros(shape, dtype=torch.long)
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        peak, out = allocated_peak(lambda: model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1))
    estimate = memory.estimate(config, precision, workload=Workload(*shape, heads))
    several = (
        0.07 if anatomy.anatomy(config, heads).activations.scores else 0.01
    )  # unfused attention makes further small copies
    assert estimate.activations == pytest.approx(peak - cache_bytes(out.past_key_values), rel=several)


def test_activations_of_falcon_180b_by_hand(published_180b):
    """A prompt of 2048 tokens: embeddings, input, two norms and attention's result, then the MLP's tensors."""
    token, others = 2048 * 14848, 2 * 2 * 2048 * 64  # cosines and sines
    by_precision = {name: memory._activation_bytes(published_180b, name) for name in ("bf16", "int8", "nf4")}
    assert by_precision == {
        "bf16": (5 + 2 * 4) * 2 * token + others,
        "int8": 5 * 2 * token + (2 + 2 + 1 + 2 + 1) * 4 * token + others,
        "nf4": (5 + 4) * 2 * token + 2 * 59392 * 14848 + others,
    }
    library = memory._activation_bytes(published_180b, "bf16", workload=Workload(cache_heads="library"))
    assert library == by_precision["bf16"] + 2048**2  # its mask


def test_peak_of_a_real_model_with_a_long_context_and_batch_4():
    """The first ten layers of SmolLM2 generate the last of 1024 tokens for four sequences at once.

    Counted: all that torch allocates after the load, so cache, activations and logits, and not the weights.
    """
    model = loading.load(profiles.load_profile("laptop").llama_chat, "bf16").model
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:10], 10
    ids = torch.randint(10, 40_000, (4, 1020), generator=torch.Generator().manual_seed(0))
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.inference_mode():
        peak, out = allocated_peak(lambda: model.generate(ids, **how, return_dict_in_generate=True))
    assert out.sequences.shape == (4, 1024)
    estimate = memory.estimate(model.config, "bf16", workload=Workload(4, 1024))
    assert estimate.kv_cache == pytest.approx(cache_bytes(out.past_key_values), rel=0.002)  # the last token is not kept
    assert estimate.total - estimate.weights == pytest.approx(peak, rel=0.05)
    assert estimate.activations > 0.3 * peak


def training_peak(config, mode, checkpointing, heads):
    from peft import LoraConfig, get_peft_model

    model, ids = real(config, torch.bfloat16, heads).train(), torch.zeros(1, 256, dtype=torch.long)
    if mode == "lora":
        targets = LINEARS if config.model_type == "falcon" else "all-linear"
        model = get_peft_model(model, LoraConfig(target_modules=targets))
        model.enable_input_require_grads()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained]
    with Peak([*model.parameters(), *model.buffers(), *gradients]) as peak:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return peak.peak


@wide
@by_heads
@pytest.mark.parametrize("vocabulary", [96, 8192], ids=["layers peak", "loss peaks"])
@pytest.mark.parametrize(("mode", "checkpointing"), [("full", True), ("full", False), ("lora", True), ("lora", False)])
def test_activations_of_training_are_near_the_measured_peak(config, vocabulary, checkpointing, mode, heads):
    changed = type(config)(**(config.to_dict() | {"vocab_size": vocabulary}))
    workload = Workload(context_tokens=256, cache_heads=heads)
    estimate = memory.estimate(
        changed, "bf16", mode=mode, workload=workload, training=Training(checkpointing=checkpointing)
    )
    lowest, highest = (0.95, 1.06) if heads == "kv" else (0.7, 1.15)
    if heads == "kv" and (config.model_type == "llama" or mode == "lora"):
        lowest = 0.93
    assert lowest < training_peak(changed, mode, checkpointing, heads) / estimate.activations < highest


@pytest.mark.parametrize(("heads", "elements"), [("kv", 14 * 14848 + 3 * 8 * 64), ("library", 15 * 14848)])
def test_what_falcons_layer_keeps_of_a_token(published_180b, heads, elements):
    """Korthikanti et al. count 34sbh with dropout and a sequential block; 28sbh or 30sbh is left for Falcon-180B's."""
    workload = Workload(cache_heads=heads)
    kept = memory.estimate(
        published_180b, "bf16", mode="full", workload=workload, training=Training(checkpointing=False)
    )
    checkpointed = memory.estimate(published_180b, "bf16", mode="full", workload=workload)
    assert anatomy.anatomy(published_180b, heads).activations.kept == elements
    loss = 12 * 2048 * 65024
    assert checkpointed.activations == 80 * 2 * 2048 * 14848 + loss
    assert kept.activations == 80 * 2 * 2048 * elements + loss


# --- placement --------------------------------------------------------------------------------------------------------


def limits_of(config, precision, gpus, context_tokens=2048):
    """What place may use of each device, by its own rule: a share reserved, one layer's activations free."""
    activations = memory._activation_bytes(config, precision, workload=Workload(context_tokens=context_tokens))
    return [gpu * (1 - RESERVED) - activations for gpu in gpus]


def test_bf16_falcon_180b_on_eight_gpus(published_180b):
    placement = machine_placement.place(published_180b, "bf16", [80e9] * 8)
    assert placement.fits
    assert placement.shortfall is None
    layers = [placement.device_map[f"transformer.h.{i}"] for i in range(80)]
    assert layers == sorted(layers)
    assert [layers.count(device) for device in range(8)] == [10] * 8
    assert placement.device_map["transformer.word_embeddings"] == placement.device_map["lm_head"] == 0
    assert placement.device_map["transformer.ln_f"] == 7


def test_what_does_not_fit_says_what_is_missing(published_180b):
    placement = machine_placement.place(published_180b, "bf16", [80e9] * 2)
    missing = sum(placement.per_device_bytes.values()) - sum(limits_of(published_180b, "bf16", [80e9] * 2))
    assert not placement.fits
    assert placement.shortfall == Shortfall(-int(-missing // 1), "2 devices of 74.5 GiB")
    assert str(placement.shortfall) == f"needs {missing / GIB:.1f} GiB more than 2 devices of 74.5 GiB can hold"
    assert missing / GIB == pytest.approx(332.59 + 0.31 - 2 * 74.5 * 0.95 + 2 * 0.74, abs=0.1)


def test_devices_of_different_sizes_and_a_single_one(published_180b):
    mixed = machine_placement.place(published_180b, "bf16", [24e9, 80e9])
    assert mixed.shortfall.devices == "2 devices of 22.4 and 74.5 GiB"
    assert machine_placement.place(published_180b, "nf4", [40e9]).shortfall.devices == "1 device of 37.3 GiB"
    with pytest.raises(WorkbookError, match="at least one device"):
        machine_placement.place(published_180b, "nf4", [])


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("repo_id", [FALCON_180B, "tiiuae/falcon-7b", "meta-llama/Llama-2-70b-chat-hf"])
def test_bytes_of_each_device_are_accelerates(repo_id, precision, dtype):
    from accelerate.utils import compute_module_sizes

    config = anatomy.published_config(repo_id)
    placement = machine_placement.place(config, precision, [80e9] * 8, workload=Workload(context_tokens=1000))
    sizes = compute_module_sizes(on_meta(config).to(dtype))
    layers = config.num_hidden_layers
    cache = 1000 * memory.kv_bytes_per_token(config, precision) // layers
    expected = dict.fromkeys(range(8), 0)
    for name, device in placement.device_map.items():
        if "rotary" in name or (name == "lm_head" and config.tie_word_embeddings):
            continue  # buffers of some hundred bytes; a tied head's matrix is the embeddings'
        expected[device] += sizes[name] + (cache if ".h." in name or ".layers." in name else 0)
    assert placement.per_device_bytes == expected


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_device_bytes_sum_to_weights_and_cache(published_180b, precision):
    placement = machine_placement.place(published_180b, precision, [80e9] * 8, workload=Workload(2, 512))
    estimate = memory.estimate(published_180b, precision, workload=Workload(2, 512))
    assert sum(placement.per_device_bytes.values()) == estimate.weights + estimate.kv_cache


@pytest.mark.parametrize("count", range(4, 9))
def test_what_accelerate_can_place_place_can_too(published_180b, count):
    from accelerate import infer_auto_device_map

    limits = limits_of(published_180b, "bf16", [80e9] * count, context_tokens=0)
    model = on_meta(published_180b).to(torch.bfloat16)
    memory_of_each = {device: int(limit) for device, limit in enumerate(limits)} | {"cpu": 10**12}
    found = infer_auto_device_map(model, max_memory=memory_of_each, no_split_module_classes=["FalconDecoderLayer"])
    placement = machine_placement.place(published_180b, "bf16", [80e9] * count, workload=Workload(context_tokens=0))
    assert placement.fits == (count >= 5)
    assert placement.fits or "cpu" in found.values()
    assert set(placement.device_map) == set(found)


@small
def test_the_device_map_is_one_that_transformers_loads(config, tmp_path):
    model = real(config)
    model.save_pretrained(tmp_path)
    placement = machine_placement.place(config, "fp32", [1e9, 1e9])
    assert set(placement.device_map.values()) == {0, 1}
    from accelerate.utils import check_device_map

    check_device_map(model, placement.device_map)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=dict.fromkeys(placement.device_map, "cpu"))
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def machine(ram=0, gpus=()):
    cards = tuple(Gpu(i, "GPU", int(size), int(size), (8, 0)) for i, size in enumerate(gpus))
    return Machine(cards, ram, ram, 0, 2, "CPU", "Linux", "3.11")


def test_what_is_missing_on_a_machine(published_180b):
    workload = Workload(context_tokens=100)
    needed = memory.estimate(published_180b, "nf4", workload=workload).total
    assert shortfall(published_180b, "nf4", machine(ram=needed), workload)  # 5% stay free
    assert shortfall(published_180b, "nf4", machine(ram=int(needed / 0.95) + 1), workload) is None
    missing = shortfall(published_180b, "nf4", machine(ram=(needed - 3 * GIB) / 0.95), workload)
    assert missing.bytes == pytest.approx(3 * GIB, abs=2)
    assert str(missing).startswith("needs 3.0 GiB more than ")
    assert str(missing).endswith(" GiB of memory can hold")
    assert shortfall(published_180b, "nf4", machine(gpus=[80e9] * 2)) is None
    assert shortfall(published_180b, "nf4", machine(ram=0)).bytes > needed
    two = machine_placement.place(published_180b, "bf16", [80e9] * 2).shortfall
    assert shortfall(published_180b, "bf16", machine(ram=10**13, gpus=[80e9] * 2)) == two
    assert two is not None


configs = st.one_of(
    st.builds(falcon, num_hidden_layers=st.integers(1, 7), vocab_size=st.integers(10, 4000)),
    st.builds(llama, num_hidden_layers=st.integers(1, 7), vocab_size=st.integers(10, 4000)),
)
devices = st.lists(st.integers(10**4, 3 * 10**6), min_size=1, max_size=4)


def every_split(pieces, count):
    """All ways to cut so many pieces, in order, over ``count`` devices."""
    for cuts in itertools.combinations_with_replacement(range(pieces + 1), count - 1):
        yield list(itertools.pairwise([0, *cuts, pieces]))


@settings(max_examples=150, deadline=None)
@given(configs, devices, st.sampled_from(["fp32", "bf16", "int8", "nf4"]), st.integers(0, 40))
def test_placement_of_any_model_on_any_devices(config, gpus, precision, tokens):
    workload = Workload(context_tokens=tokens)
    placement = machine_placement.place(config, precision, gpus, workload=workload)
    shape = anatomy.anatomy(config)
    layers = [f"{shape.names.layers}.{i}" for i in range(shape.layers)]
    others = {shape.names.embeddings, shape.names.rotary, shape.names.final_norm, "lm_head"}
    assert set(placement.device_map) == set(layers) | others
    order = [placement.device_map[name] for name in (shape.names.embeddings, *layers, shape.names.final_norm)]
    assert order == sorted(order)
    estimate = memory.estimate(config, precision, workload=workload)
    assert sum(placement.per_device_bytes.values()) == estimate.weights + estimate.kv_cache
    limits = limits_of(config, precision, gpus, context_tokens=tokens)
    used = [placement.per_device_bytes[device] for device in range(len(gpus))]
    within = all(size <= max(limit, 1) for size, limit in zip(used, limits, strict=True))
    assert placement.fits == within == (placement.shortfall is None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.lists(st.integers(5, 120), min_size=1, max_size=4))
def test_no_split_leaves_the_fullest_device_emptier_or_the_load_more_even(sizes, limits):
    def load(split):
        """(share of the fullest device, unevenness) of a way to cut the pieces."""
        used = [sum(sizes[start:end]) for start, end in split]
        pairs = list(zip(used, limits, strict=True))
        return max(size / free for size, free in pairs), sum(size**2 / free for size, free in pairs)

    found = packing._spread(sizes, limits)
    assert found == sorted(found)
    ends = list(itertools.accumulate(found.count(device) for device in range(len(limits))))
    fullest, uneven = load(itertools.pairwise([0, *ends]))
    splits = [load(split) for split in every_split(len(sizes), len(limits))]
    least = min(share for share, _ in splits)
    assert fullest == pytest.approx(least, rel=1e-9)
    assert uneven == pytest.approx(min(u for share, u in splits if share <= least * (1 + 1e-9)), rel=1e-9)


# --- models in memory together ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(configs, min_size=1, max_size=3), devices, st.sampled_from(["bf16", "nf4"]), st.integers(1, 40))
def test_models_together_stay_below_the_limits_that_hold_for_all_of_them(models, gpus, precision, tokens):
    workload = Workload(context_tokens=tokens)
    placed = place_together([Resident(each, precision) for each in models], Devices(tuple(gpus)), workload)
    assert placed[0] == machine_placement.place(models[0], precision, gpus, workload=workload)
    used = [0.0] * len(gpus)
    for config, each in zip(models, placed, strict=True):
        runs_on = set(each.device_map.values())
        work = memory._activation_bytes(config, precision, workload=workload)
        held_there = [each.per_device_bytes[device] for device in range(len(gpus))]
        needed = [u + h + work * (d in runs_on) for d, (u, h) in enumerate(zip(used, held_there, strict=True))]
        within = [size <= 0.95 * gpu + 1 for size, gpu in zip(needed, gpus, strict=True)]
        assert not each.fits or all(within[device] for device in runs_on)
        assert each.fits == (each.shortfall is None)
        used = needed


def test_falcon_and_llama_together_by_hand(published_180b):
    """Weights and caches of both are 510.5e9 bytes; each GPU also has both models' activations and its reserve."""
    pair = [published_180b, anatomy.published_config("meta-llama/Llama-2-70b-chat-hf")]
    held_by_both = 357_114_177_536 + 137_953_296_384 + 2048 * (163_840 + 327_680)
    work = sum(memory._activation_bytes(config, "bf16") for config in pair)
    assert held_by_both / 8 + work == pytest.approx(63.3e9, rel=0.01)  # if layers were sand
    residents = [Resident(config, "bf16") for config in pair]

    def fits(devices):
        return [each.fits for each in place_together(residents, devices)]

    assert fits(Devices((63.3e9 / 0.95,) * 8)) == [True, False]
    layer = 4_439_789_568 + 2048 * 163_840 // 80
    enough = (held_by_both / 8 + work + layer) / 0.95
    assert all(fits(Devices((enough,) * 8)))
    host = (held_by_both + work) / 0.95
    assert all(fits(Devices(cpu_bytes=host + 10)))
    assert not fits(Devices(cpu_bytes=host - 1e6))[1]


def test_a_model_of_short_context_is_planned_for_that():
    short = falcon(max_position_embeddings=256)
    (placed,) = place_together([Resident(short, "bf16")], Devices((1e9,)))
    assert placed == machine_placement.place(short, "bf16", [1e9], workload=Workload(context_tokens=256))
    own = Workload(context_tokens=None)
    assert own.tokens_for(falcon(max_position_embeddings=4096)) == own.tokens_for(falcon()) == 2048


def test_the_least_number_of_gpus_for_two_is_the_first_that_holds_both(published_180b):
    pair = [published_180b, anatomy.published_config("meta-llama/Llama-2-70b-chat-hf")]
    for precision, size in [("bf16", 80e9), ("nf4", 24e9), ("int8", 40e9)]:
        residents = [Resident(config, precision) for config in pair]
        least = least_gpus(residents, size)
        assert all(each.fits for each in place_together(residents, Devices((size,) * least)))
        assert not all(each.fits for each in place_together(residents, Devices((size,) * (least - 1))))
        assert least > least_gpus(residents[:1], size)
    assert least_gpus([Resident(config, "bf16") for config in pair], 4e9) is None  # smaller than one layer


# --- offload ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "cpu_bytes"), [([80e9], 100e9), ([80e9] * 2, 300e9), ([40e9] * 4, 50e9), ([24e9], 64e9)]
)
def test_what_leaves_the_gpus_is_what_accelerate_takes_off_them(published_180b, gpus, cpu_bytes):
    from accelerate import infer_auto_device_map

    nothing = Workload(context_tokens=0)
    placement = machine_placement.place(published_180b, "bf16", gpus, workload=nothing, cpu_bytes=cpu_bytes, disk=True)
    limits = {
        device: int(limit) for device, limit in enumerate(limits_of(published_180b, "bf16", gpus, context_tokens=0))
    }
    model = on_meta(published_180b).to(torch.bfloat16)
    # accelerate keeps space for a layer on the CPU too, where nothing runs while there are GPUs: one layer more for it
    host = {"cpu": int(cpu_bytes * (1 - RESERVED)) + 4_439_789_568}
    found = infer_auto_device_map(model, max_memory=limits | host, no_split_module_classes=["FalconDecoderLayer"])
    del found["transformer.rotary_emb"]
    assert placement.fits
    assert {name: placement.device_map[name] for name in found} == dict(found)
    assert "cpu" in found.values()


def test_a_first_gpu_that_is_too_small_does_not_send_all_to_host_memory():
    config = anatomy.published_config("tiiuae/falcon-40b")
    placement = machine_placement.place(config, "bf16", [2e9, 80e9], cpu_bytes=200e9, disk=True)
    assert placement.fits
    assert placement.per_device_bytes[0] == 0
    alone = machine_placement.place(config, "bf16", [80e9], cpu_bytes=200e9, disk=True)
    moved = {0: 1, "cpu": "cpu"}
    assert placement.device_map == {name: moved[device] for name, device in alone.device_map.items()}
    assert list(placement.device_map.values()).count(1) > 40  # of 60 layers
    parts = parts_by_device(config, "bf16", placement)
    assert parts[1]["kv_cache"] == memory.estimate(config, "bf16").kv_cache  # also of what is offloaded
    assert parts["cpu"]["activations"] == parts[0]["activations"] == 0
    largest = 2 * anatomy.parameter_table(config)["per_layer"].sum()  # a layer in bf16; the final norm is smaller
    assert sum(parts[1].values()) + largest <= 0.95 * 80e9


def test_offload_is_used_only_where_it_is_needed(published_180b):
    plain = machine_placement.place(published_180b, "bf16", [80e9] * 8)
    assert machine_placement.place(published_180b, "bf16", [80e9] * 8, cpu_bytes=64e9, disk=True) == plain


def test_the_first_gpu_keeps_the_cache_of_what_is_offloaded_and_space_for_one_layer(published_180b):
    placement = machine_placement.place(published_180b, "bf16", [80e9] * 2, cpu_bytes=200e9, disk=True)
    layer, cache = 4_439_789_568, 2048 * 163_840 // 80
    counts = {
        device: sum(place == device for name, place in placement.device_map.items() if ".h." in name)
        for device in placement.per_device_bytes
    }
    assert sum(counts.values()) == 80
    assert counts["cpu"] == int(190e9 // layer)
    away = counts["cpu"] + counts["disk"]
    embeddings = 65024 * 14848 * 2
    held_by_first = counts[0] * (layer + cache) + embeddings + away * cache
    assert placement.per_device_bytes[0] == held_by_first
    first = limits_of(published_180b, "bf16", [80e9])[0]
    assert first - (layer + cache) < held_by_first + layer <= first
    estimate = memory.estimate(published_180b, "bf16")
    assert sum(placement.per_device_bytes.values()) == estimate.weights + estimate.kv_cache


def test_offload_without_enough_host_memory_says_what_is_missing(published_180b):
    placement = machine_placement.place(published_180b, "bf16", [80e9] * 2, cpu_bytes=100e9)
    assert not placement.fits
    missing = (placement.per_device_bytes["cpu"] - 95e9) / GIB
    assert placement.shortfall.bytes / GIB == pytest.approx(missing, abs=1e-6)
    assert placement.shortfall.devices == "2 devices of 74.5 GiB and 93.1 GiB of host memory"
    assert machine_placement.place(published_180b, "bf16", [80e9] * 2, cpu_bytes=100e9 + missing * GIB / 0.95 + 1).fits
    alone = machine_placement.place(published_180b, "bf16", [], cpu_bytes=100e9)
    assert set(alone.device_map.values()) == {"cpu"}
    assert alone.shortfall.devices == "93.1 GiB of memory"


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantized_weights_are_not_offloaded(published_180b, precision):
    with pytest.raises(WorkbookError, match=f"{precision} weights cannot be offloaded.*choose bf16"):
        machine_placement.place(published_180b, precision, [40e9], cpu_bytes=500e9)
    with pytest.raises(WorkbookError, match="cannot be offloaded"):
        machine_placement.place(published_180b, precision, [], cpu_bytes=50e9, disk=True)
    assert machine_placement.place(published_180b, precision, [80e9] * 8, cpu_bytes=500e9, disk=True).fits
    whole = machine_placement.place(published_180b, precision, [], cpu_bytes=500e9, disk=True)
    assert whole.fits
    assert set(whole.device_map.values()) == {"cpu"}


@pytest.mark.parametrize("config", [falcon(), old_falcon(), llama()], ids=["new", "old", "Llama"])
def test_a_model_half_on_the_disk_gives_the_same_logits(config, tmp_path):
    real(config).save_pretrained(tmp_path)
    cpu_bytes = 0.75 * memory.weight_bytes(config, "fp32") / (1 - RESERVED)
    placement = machine_placement.place(config, "fp32", [], workload=Workload(2, 6), cpu_bytes=cpu_bytes, disk=True)
    assert placement.fits
    assert set(placement.device_map.values()) == {"cpu", "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=placement.device_map)
    stays = held(parameter for parameter in offloaded.parameters() if parameter.device.type == "cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    cache = memory.estimate(config, "fp32", workload=Workload(2, 6)).kv_cache
    assert placement.per_device_bytes["cpu"] - cache == stays < held(whole.parameters())
    ids = torch.arange(12).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(offloaded(ids).logits, whole(ids).logits)


@settings(max_examples=100, deadline=None)
@given(configs, st.lists(st.integers(10**4, 10**6), max_size=3), st.integers(10**4, 10**6), st.booleans())
def test_offload_of_any_model_keeps_order_and_limits(config, gpus, cpu_bytes, disk):
    ten = Workload(context_tokens=10)
    placement = machine_placement.place(config, "bf16", gpus, workload=ten, cpu_bytes=cpu_bytes, disk=disk)
    shape = anatomy.anatomy(config)
    layers = [f"{shape.names.layers}.{i}" for i in range(shape.layers)]
    order = [placement.device_map[name] for name in (shape.names.embeddings, *layers, shape.names.final_norm)]
    rank = {"cpu": len(gpus), "disk": len(gpus) + 1}
    ranks = [rank.get(device, device) for device in order]
    assert ranks == sorted(ranks)
    assert disk or "disk" not in order
    estimate = memory.estimate(config, "bf16", workload=ten)
    assert sum(placement.per_device_bytes.values()) == estimate.weights + estimate.kv_cache
    for device, limit in enumerate(limits_of(config, "bf16", gpus, context_tokens=10)):
        assert placement.per_device_bytes[device] <= max(limit, 1)
    runs_there = not any(isinstance(device, int) for device in order)
    on_host = placement.per_device_bytes.get("cpu", 0) + estimate.activations * runs_there
    assert placement.fits == (placement.shortfall is None)
    assert not placement.fits or on_host <= cpu_bytes * (1 - RESERVED)
    if gpus:
        after_none = machine_placement.place(config, "bf16", [1, *gpus], workload=ten, cpu_bytes=cpu_bytes, disk=disk)
        moved = [device - 1 if isinstance(device, int) else device for device in after_none.device_map.values()]
        assert moved == list(placement.device_map.values())


# --- parts and the largest context ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "double_quant", "offload"),
    [("bf16", False, {}), ("nf4", True, {}), ("bf16", False, {"cpu_bytes": 300e9, "disk": True})],
)
def test_parts_of_the_devices_add_up(published_180b, precision, double_quant, offload):
    gpus = [80e9] * (2 if offload else 8)
    workload = Workload(double_quant=double_quant)
    placement = machine_placement.place(published_180b, precision, gpus, workload=workload, **offload)
    parts = parts_by_device(published_180b, precision, placement, workload=workload)
    estimate = memory.estimate(published_180b, precision, workload=workload)
    assert sum(part["weights"] for part in parts.values()) == estimate.weights
    assert sum(part["kv_cache"] for part in parts.values()) == estimate.kv_cache
    for device, held_there in placement.per_device_bytes.items():
        assert parts[device]["weights"] + parts[device]["kv_cache"] == held_there
        runs = isinstance(device, int)
        assert parts[device]["activations"] == (estimate.activations if runs else 0)


@pytest.mark.parametrize("cache_heads", ["kv", "library"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_largest_context_fits_and_one_token_more_does_not(published_180b, double_quant, cache_heads):
    workload = Workload(cache_heads=cache_heads, double_quant=double_quant)
    tokens = largest_context(published_180b, "nf4", [80e9] * 2, workload)
    assert tokens > 2048
    fits, more = (replace(workload, context_tokens=count) for count in (tokens, tokens + 1))
    assert machine_placement.place(published_180b, "nf4", [80e9] * 2, workload=fits).fits
    assert not machine_placement.place(published_180b, "nf4", [80e9] * 2, workload=more).fits


def test_the_least_number_of_gpus_is_the_first_that_place_fills(published_180b):
    for precision, size in (("bf16", 80e9), ("int8", 40e9), ("nf4", 24e9)):
        least = least_gpus([Resident(published_180b, precision)], size)
        assert machine_placement.place(published_180b, precision, [size] * least).fits
        assert not machine_placement.place(published_180b, precision, [size] * (least - 1)).fits
    assert least_gpus([Resident(published_180b, "bf16")], 4e9) is None  # smaller than one layer


def test_no_context_fits_where_the_weights_do_not(published_180b):
    assert largest_context(published_180b, "bf16", [80e9] * 4) == 0


def test_accelerates_balanced_map_is_no_more_even_than_ours(published_180b):
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes, get_balanced_memory

    model = on_meta(published_180b).to(torch.bfloat16)
    limits = {device: int(limit) for device, limit in enumerate(limits_of(published_180b, "bf16", [80e9] * 8))}
    how = {"no_split_module_classes": ["FalconDecoderLayer"]}
    balanced = infer_auto_device_map(model, max_memory=get_balanced_memory(model, max_memory=limits, **how), **how)
    placement = machine_placement.place(published_180b, "bf16", [80e9] * 8, workload=Workload(context_tokens=0))
    assert set(placement.device_map) == set(balanced)
    assert set(balanced.values()) == set(placement.device_map.values()) == set(range(8))
    sizes, theirs = compute_module_sizes(model), dict.fromkeys(range(8), 0)
    for name, device in balanced.items():
        theirs[device] += 0 if name in ("lm_head", "transformer.rotary_emb") else sizes[name]
    ours = placement.per_device_bytes
    assert sum(ours.values()) == sum(theirs.values())
    assert max(ours.values()) <= max(theirs.values())
    assert max(ours.values()) - min(ours.values()) <= max(theirs.values()) - min(theirs.values())


# --- the article's claims ---------------------------------------------------------------------------------------------


def test_hardware_claims_quote_the_article_and_the_estimate(published_180b):
    claims = sharding.hardware_claims().set_index("claim")
    assert claims["published GB"].to_dict() == {"A13": 5120, "A14": 1280, "A15": 160, "A16": 640, "A17": 320}
    assert claims.loc["A16", "estimate GiB"] == round(memory.estimate(published_180b, "bf16").total / GIB)
    assert claims.loc["A13", "estimate GB"] == pytest.approx(16 * 178.557, rel=0.01)
    assert (claims["estimate GB"] < claims["published GB"]).all()
    assert (claims["least 80 GB GPUs"] <= claims["least 40 GB GPUs"]).all()


@pytest.mark.parametrize(("claim", "precision"), [("A16", "bf16"), ("A17", "nf4")])
@pytest.mark.parametrize(("column", "size"), [("least 80 GB GPUs", 80e9), ("least 40 GB GPUs", 40e9)])
def test_the_least_number_of_gpus_fits_and_one_less_does_not(published_180b, claim, precision, column, size):
    least = sharding.hardware_claims().set_index("claim").loc[claim, column]
    assert machine_placement.place(published_180b, precision, [size] * least).fits
    assert not machine_placement.place(published_180b, precision, [size] * (least - 1)).fits


def test_the_least_number_of_gpus_for_full_fine_tuning_by_hand():
    """178.557e9 x 14 bytes over n GPUs of 80e9 stay (weights and optimizer). What comes and goes takes 1.37 times as
    much: 2 bytes of gradients over n, 6.46e9 of activations, three layers of 4.44e9 and twice 1.93e9 of embeddings.
    """
    claims = sharding.hardware_claims().set_index("claim")
    moving = 6.46 + 3 * 4.44 + 2 * 1.93
    assert claims.loc["A13", "least 80 GB GPUs"] == -(-178.557 * (14 + 2 * 1.37) // (80 - 1.37 * moving))
    assert claims.loc["A13", "least 80 GB GPUs"] <= 8 * 8  # "at least eight machines of eight", says the article


def test_training_arithmetic():
    assert sharding.training_flop(180e9, 3.5e12) == pytest.approx(3.78e24)
    assert sharding.training_flop(2, 3) == 36
    # GPT-3, 175B parameters on 300B tokens: 3.14e23 FLOP (Brown et al. 2020, arXiv:2005.14165, table D.1)
    assert sharding.training_flop(175e9, 300e9) == pytest.approx(3.14e23, rel=0.01)
    assert sharding.implied_utilisation(312e12 * 3600 * 10, gpu_hours=20) == pytest.approx(0.5)
    flop = sharding.training_flop(178_557_088_768, 3.5e12)
    assert sharding.implied_utilisation(flop, gpu_hours=7e6, peak=312e12) == pytest.approx(0.477, abs=0.001)


def test_shard_divides_what_training_keeps_and_adds_gathered_layers_and_its_own_sequence():
    falcon = anatomy.published_config("tiiuae/falcon-180B")
    parameters = 178_557_088_768
    layer = 4_439_789_568  # bytes in bf16, counted on the meta device
    own = memory._activation_bytes(falcon, "bf16", mode="full")
    placed = sharding.shard(falcon, "bf16", [80e9] * 64, mode="full", workload=Workload(64))
    assert placed.fits
    assert set(placed.per_device_bytes) == set(range(64))
    moving = 2 * parameters / 64 + own + 3 * layer + 2 * 2 * 65024 * 14848
    expected = 14 * parameters / 64 + (1 + FRAGMENTS) * moving
    assert placed.per_device_bytes[0] == pytest.approx(expected, rel=1e-4)
    crowded = sharding.shard(falcon, "bf16", [80e9] * 32, mode="full")
    assert not crowded.fits
    assert crowded.shortfall.devices == "each of 32 devices of 74.5 GiB"
