"""Falcon's shapes with random weights on one device: memory against the plan, speed against the memory's bandwidth.

The weights are drawn and quantized matrix by matrix, straight onto the device, so that Falcon-180B in nf4 (95 GiB)
comes about on one 141 GB GPU that could never hold it in bf16 (333 GiB). Speed and memory do not depend on what the
weights are. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base.units import QUANTIZED
from helpers.machine import Machine, anatomy, hardware, memory
from helpers.models import LoadError, bnb_config, device_map_for, stored_bytes, verify_quantized
from helpers.models.workarounds.falcon_linear import falcon_repair

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

SHAPES = {"180b": "tiiuae/falcon-180B", "40b": "tiiuae/falcon-40b", "7b": "tiiuae/falcon-7b"}
PRECISIONS = {"180b": ["nf4"], "40b": ["int8", "nf4"], "7b": ["bf16", "int8", "nf4"], "tiny": ["bf16", "int8", "nf4"]}
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate")
SPREAD = 0.02  # standard deviation of the weights, as Falcon's are initialized


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for and write it as JSON."""
    asked = _parser().parse_args(arguments)
    config = shape(asked.shape, asked.width, asked.layers)
    machine = _one_device(asked.device)
    work = {"device": asked.device, "context_tokens": asked.context, "new_tokens": asked.new_tokens}
    figures = [
        {"shape": asked.shape} | measure(config, precision, machine, **work)
        for precision in asked.precision or PRECISIONS[asked.shape]
    ]
    result = {
        "device": machine.gpus[0].name if machine.gpus else machine.cpu_name,
        "device_bytes": machine.gpus[0].total_bytes if machine.gpus else machine.ram_bytes,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if arguments is None else arguments)]),
        "versions": {"python": machine.python, **{name: version(name) for name in PACKAGES}},
        "system": machine.system,
        "figures": figures,
    }
    text = json.dumps(result, indent=2)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def shape(name: str, width: int = 256, layers: int = 2) -> PretrainedConfig:
    """The published configuration of a size; "tiny": Falcon-180B's with this width (a multiple of 128) and depth."""
    if name != "tiny":
        return anatomy.published_config(SHAPES[name])
    config = anatomy.published_config(SHAPES["180b"])
    config.hidden_size, config.ffn_hidden_size, config.num_hidden_layers = width, 4 * width, layers
    config.num_attention_heads, config.num_kv_heads, config.vocab_size = width // 64, 2, 1024
    return config


def measure(
    config: PretrainedConfig,
    precision: str,
    machine: Machine,
    *,
    device: str,
    context_tokens: int,
    new_tokens: int,
) -> dict[str, Any]:
    """One row of figures: bytes, seconds and tokens a second; where the plan says that it does not fit, why."""
    row = {"precision": precision, "parameters": anatomy.count_parameters(config)}
    workload = memory.Workload(context_tokens=context_tokens + new_tokens + 1)
    try:
        device_map_for(config, precision, machine, workload)
    except LoadError as error:
        return row | {"skipped": str(error)}
    build(shape("tiny"), precision, device)  # what is loaded once, the device's context above all
    start = time.perf_counter()
    with peak_memory(device) as building:
        model = build(config, precision, device)
    row["build_seconds"] = time.perf_counter() - start
    held = stored_bytes(model)
    with peak_memory(device) as running:
        row |= speed(model, context_tokens, new_tokens)
    planned = memory.estimate(config, precision, workload=workload)
    moved = held - _idle_embeddings(model) + context_tokens * memory.kv_bytes_per_token(config, precision)
    bandwidth = hardware.memory_bandwidth(device=device).best
    del model
    _collect()
    return row | {
        "weights_bytes": held,
        "planned_weights_bytes": planned.weights,
        "build_peak_bytes": building[0],
        "peak_bytes": held + running[0] if device == "cpu" else running[0],
        "planned_peak_bytes": planned.total,
        "bytes_moved_per_token": moved,
        "bandwidth_bytes_per_second": bandwidth,
        "limit_tokens_per_second": bandwidth / moved,
        "share_of_limit": row["tokens_per_second"] * moved / bandwidth,
    }


def build(config: PretrainedConfig, precision: str, device: str) -> PreTrainedModel:
    """A model of random weights on a device, quantized and verified; at no time is more than one matrix in 16 bit.

    The matrices that bitsandbytes quantizes go through the code with which transformers quantizes a checkpoint. The
    cache holds the key-value heads alone, as ``helpers.models.loading.load`` has it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    from helpers.models import grouped_cache

    dtype = torch.float32 if precision == "fp32" else torch.float16 if precision == "fp16" else torch.bfloat16
    repair = falcon_repair() if precision in QUANTIZED else nullcontext()
    with repair, grouped_cache(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if precision in QUANTIZED:
            replace_with_bnb_linear(model, ["lm_head"], bnb_config(precision, dtype))
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # the second name of a tied weight is filled already
                setattr(module, name, _filled(model, f"{path}.{name}", parameter, dtype, generator))
        model.tie_weights()
    model.transformer.rotary_emb = type(model.transformer.rotary_emb)(config).to(device)
    if precision in QUANTIZED:
        verify_quantized(model, precision)
    return model.eval()


def speed(model: PreTrainedModel, context_tokens: int, new_tokens: int) -> dict[str, float]:
    """Seconds to read the context, and tokens a second after it: greedy, one sequence, medians of three."""
    import torch

    device = model.get_input_embeddings().weight.device
    ids = torch.arange(context_tokens, device=device)[None] % model.config.vocab_size
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def seconds(tokens: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        _synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        seconds(2)  # compiles kernels; on some CPUs it repacks nf4 weights
        first = statistics.median(seconds(1) for _ in range(3))
        whole = statistics.median(seconds(1 + new_tokens) for _ in range(3))
    return {
        "context_tokens": context_tokens,
        "new_tokens": new_tokens,
        "prefill_seconds": first,
        "tokens_per_second": new_tokens / (whole - first),
    }


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """The most bytes in use inside the block, in the list's only place once it is over.

    On a GPU what torch has allotted there; on the CPU this process's anonymous memory above that at the start.
    """
    import torch

    found = [0]
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device)
        return
    start, over = _anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            found[0] = max(found[0], _anonymous_bytes() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield found
    over.set()
    watcher.join()


def _filled(
    model: PreTrainedModel, name: str, parameter: nn.Parameter, dtype: torch.dtype, generator: torch.Generator
) -> nn.Parameter:
    """A parameter with random weights (norms: ones, biases: zeros), quantized where its layer is."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

    layer = model.get_submodule(name.rpartition(".")[0])
    if parameter.ndim == 1:
        fill = torch.zeros if name.endswith("bias") else torch.ones
        return torch.nn.Parameter(fill(parameter.shape, dtype=dtype, device=generator.device), requires_grad=False)
    shape = (layer.out_features, layer.in_features) if isinstance(layer, torch.nn.Linear) else tuple(parameter.shape)
    value = torch.empty(shape, dtype=dtype, device=generator.device).normal_(0, SPREAD, generator=generator)
    if isinstance(layer, Linear4bit):
        return Bnb4bitQuantize(None).convert({name: [value]}, model=model)[name]
    if isinstance(layer, Linear8bitLt):
        return Bnb8bitQuantize(None).convert({name: [value]}, model=model)[name]
    return torch.nn.Parameter(value, requires_grad=False)


def _idle_embeddings(model: PreTrainedModel) -> int:
    """Bytes of the embeddings where the head is separate: a step reads one row of them."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return 0 if embeddings is head else embeddings.nbytes


def _one_device(device: str) -> Machine:
    """This machine with the GPU of that name alone, such as "cuda:1", or with none."""
    import torch

    wanted = torch.device(device)
    return hardware.detect(gpus=[] if wanted.type == "cpu" else [wanted.index or 0])


def _collect() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _anonymous_bytes() -> int:
    """Memory of this process that is not file cache."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _parser() -> argparse.ArgumentParser:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], required=True)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16", "int8", "nf4"], help="one or more")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context", type=int, default=1024, help="tokens read before the first new one")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=256, help="of the shape tiny")
    parser.add_argument("--layers", type=int, default=2, help="of the shape tiny")
    parser.add_argument("--out", type=Path, help="a JSON file; without it the figures are only printed")
    return parser


if __name__ == "__main__":
    main()
