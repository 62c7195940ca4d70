"""B7 and table G of the field reports: the plan compared with what others measured and published, within 10%.

Sizes are GB of 1e9. "allocated" is torch's max_memory_allocated, "reserved" what its allocator took (or nvidia-smi
shows). Each set-up is what the source's own code and configuration say.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.machine import Workload, anatomy, memory, sharding
from helpers.machine.step import Training, _Code, _reserved

GIB = 2**30
LLAMA_7B, LLAMA_13B, LLAMA_70B = (f"meta-llama/Llama-2-{size}-chat-hf" for size in ("7b", "13b", "70b"))
FALCON_7B, FALCON_40B = "tiiuae/falcon-7b", "tiiuae/falcon-40b"
WITHIN = 0.1


def shape(name, **changes):
    config = anatomy.published_config(name)
    for field, value in changes.items():
        setattr(config, field, value)
    return config


def near(measured):
    return pytest.approx(measured * 1e9, rel=WITHIN)


# litgpt's resource-tables.md and quantize.md. It stores a head of its own for Falcon, though Falcon ties it.
INFERENCE = [
    (FALCON_7B, "bf16", False, 256, 14.50),
    (FALCON_40B, "nf4", False, 256, 26.55),
    (FALCON_40B, "nf4", True, 256, 24.63),
    (LLAMA_7B, "bf16", False, 256, 13.52),
    (LLAMA_7B, "nf4", False, 256, 4.57),
    (LLAMA_7B, "nf4", True, 256, 4.26),
    (LLAMA_13B, "bf16", False, 256, 26.21),
    (LLAMA_13B, "nf4", False, 256, 8.32),
    (LLAMA_13B, "nf4", True, 256, 7.72),
    (LLAMA_70B, "nf4", True, 256, 37.21),
    (FALCON_40B, "int8", False, 1000, 42.7),  # CTranslate2, issue 1299
]


@pytest.mark.parametrize(("name", "precision", "double_quant", "tokens", "measured"), INFERENCE)
def test_inference_is_within_a_tenth_of_what_was_measured(name, precision, double_quant, tokens, measured):
    workload = Workload(context_tokens=tokens, double_quant=double_quant)
    tied = {} if precision == "int8" or name not in (FALCON_7B, FALCON_40B) else {"tie_word_embeddings": False}
    assert memory.estimate(shape(name, **tied), precision, workload=workload).total == near(measured)


# litgpt's finetune/lora.py at the time of its tables: adapters in bf16 on queries and values, dropout 0.05, no
# checkpointing, the loss in chunks of 16 bit; bitsandbytes 0.41.1, which keeps inputs and unpacks by way of fp16.
LITGPT = Training(
    targets=("attention qkv",),
    queries_and_values=True,
    adapter_bytes=2,
    dropout=True,
    checkpointing=False,
    logit_bytes=6,
    code=_Code(joint_values=True, quantized_head=True, keeps_quantized_inputs=True, unpacked_copies=2),
)
# Its Falcon-7B copies the one key-value head to all query heads.
LITGPT_FALCON = replace(LITGPT, code=replace(LITGPT.code, joint_values=False, copied_heads=True))
RANK_32 = replace(LITGPT_FALCON, rank=32)  # config_hub/finetune/falcon-7b
# 1079 is no multiple of 8, which the fused kernels for a mask need: attention keeps a 16-bit score for each pair.
UNFUSED = replace(LITGPT_FALCON, code=replace(LITGPT_FALCON.code, score_bytes=2))
FINE_TUNING = [
    (LLAMA_7B, "bf16", 1, 1304, LITGPT, 21.30),
    (LLAMA_7B, "bf16", 2, 1304, LITGPT, 29.07),
    (LLAMA_13B, "bf16", 1, 1304, LITGPT, 38.12),
    (FALCON_7B, "bf16", 1, 256, LITGPT_FALCON, 15.73),
    (FALCON_7B, "bf16", 1, 512, RANK_32, 16.69),
    (FALCON_7B, "bf16", 1, 1079, UNFUSED, 23.52),
    (LLAMA_7B, "nf4", 1, 1304, LITGPT, 14.14),
    (LLAMA_13B, "nf4", 1, 1304, LITGPT, 23.14),
]


def fine_tuned(name, precision, batch, tokens, training, double_quant=False):
    tied = {"tie_word_embeddings": False} if name == FALCON_7B else {}
    mode = "lora" if precision == "bf16" else "qlora"
    workload = Workload(batch, tokens, double_quant=double_quant)
    return memory.estimate(shape(name, **tied), precision, mode=mode, workload=workload, training=training)


@pytest.mark.parametrize(("name", "precision", "batch", "tokens", "training", "measured"), FINE_TUNING)
def test_litgpts_fine_tuning_allocates_what_the_plan_says(name, precision, batch, tokens, training, measured):
    assert fine_tuned(name, precision, batch, tokens, training).total == near(measured)


@pytest.mark.parametrize(("name", "measured"), [(LLAMA_7B, 13.84), (LLAMA_13B, 22.55)])
def test_litgpts_fine_tuning_with_double_quantization(name, measured):
    assert fine_tuned(name, "nf4", 1, 1304, LITGPT, double_quant=True).total == near(measured)


def test_litgpts_qlora_of_falcon_7b_is_the_row_that_is_not_met():
    """11% too low: 1.04 GB of 9.44 are not explained. A third copy of the unpacked head would be 0.59 of them, but
    nothing in litgpt's or bitsandbytes' code was found to make one.
    """
    planned = fine_tuned(FALCON_7B, "nf4", 1, 512, RANK_32).total / 9.44e9
    assert 0.88 < planned < 0.9


# Answer.AI's fsdp_qlora, train.py: rank 64, dropout 0.1, all in bf16; its loop holds the output, with fp32 logits.
ANSWER = Training(
    rank=64,
    targets=("attention qkv", "mlp up", "mlp down"),
    adapter_bytes=2,
    dropout=True,
    logit_bytes=16,
)
# peft's examples/sft with ZeRO-3: rank 8 on all matrices, dropout 0.1, adapters in bf16 with fp32 masters.
ZERO = Training(dropout=True, adapter_bytes=2)
# With FSDP, accelerate raises what is trained to fp32.
FSDP = Training(dropout=True)
# torchtune's 7B_lora_single_device.yaml: queries and values, checkpointing; packed to 512 tokens, assumed.
TORCHTUNE = Training(targets=("attention qkv",), queries_and_values=True, adapter_bytes=2, dropout=True)
RESERVED = [
    ("Answer.AI, QLoRA on one", (LLAMA_7B, "nf4", 1, (8, 2048, False), ANSWER), 20.94 * GIB / 1e9),
    ("Answer.AI, LoRA on one", (LLAMA_7B, "bf16", 1, (4, 2048, False), ANSWER), 22.04 * GIB / 1e9),
    ("Answer.AI, QLoRA on two, batch 4", (LLAMA_7B, "nf4", 2, (4, 2048, False), ANSWER), 11.22 * GIB / 1e9),
    ("Answer.AI, LoRA on two, batch 4", (LLAMA_7B, "bf16", 2, (4, 2048, False), ANSWER), 16.14 * GIB / 1e9),
    ("Answer.AI, LoRA on two, batch 6", (LLAMA_7B, "bf16", 2, (6, 2048, False), ANSWER), 21.35 * GIB / 1e9),
    ("peft, LoRA, ZeRO-3", (LLAMA_70B, "bf16", 8, (8, 2048, False), ZERO), 64),
    ("peft, LoRA, FSDP", (LLAMA_70B, "bf16", 8, (8, 2048, False), FSDP), 72),
    ("peft, QLoRA, ZeRO-3", (LLAMA_70B, "nf4", 2, (2, 2048, True), ZERO), 36.6),
    ("peft, QLoRA, FSDP", (LLAMA_70B, "nf4", 2, (2, 2048, True), FSDP), 35.6),
    ("torchtune, LoRA", (LLAMA_7B, "bf16", 1, (2, 512, False), TORCHTUNE), 15.57),
]


def held(name, precision, gpus, work, training):
    batch, tokens, double_quant = work
    workload = Workload(batch * gpus, tokens, double_quant=double_quant)
    mode = "lora" if precision == "bf16" else "qlora"
    gpu = [80e9] * gpus
    placed = sharding.shard(shape(name), precision, gpu, mode=mode, workload=workload, training=training)
    return placed.per_device_bytes[0]


@pytest.mark.parametrize(("set_up", "measured"), [row[1:] for row in RESERVED], ids=[row[0] for row in RESERVED])
def test_what_a_gpu_reserves_is_what_the_plan_says(set_up, measured):
    assert held(*set_up) == near(measured)


def test_near_the_end_of_a_card_the_allocator_gives_fragments_back():
    """Answer.AI's QLoRA with batch 10 on two cards of 24 GiB: 20.97 GiB reserved. The plan, which does not know that
    torch frees its unused blocks before it fails, says 24.0; without any fragments it would be 19.1.
    """
    planned = held(LLAMA_7B, "nf4", 2, (10, 2048, False), ANSWER)
    assert 20.97 * GIB < planned < 24.1 * GIB


def test_llama_65b_is_fine_tuned_on_a_gpu_of_48_gb():
    """QLoRA paper, section 1 and scripts/finetune_guanaco_65b.sh: one sequence of 528 tokens, rank 64, paged AdamW."""
    config = shape(LLAMA_70B, num_key_value_heads=64, intermediate_size=22016)
    training = Training(rank=64, dropout=True, adapter_bytes=2, paged_optimizer=True, logit_bytes=16)
    placed = sharding.shard(
        config, "nf4", [48e9], mode="qlora", workload=Workload(1, 528, double_quant=True), training=training
    )
    assert placed.fits
    assert placed.per_device_bytes[0] > 36e9


def test_fragments_are_counted_for_what_comes_and_goes():
    """Answer.AI's LoRA on two GPUs, 2048 tokens: 9.16 GiB allocated and 10.22 reserved, 6.28 of them weights."""
    assert _reserved(6.28, 9.16 - 6.28) == pytest.approx(10.22, rel=0.01)
