"""Load a model in a precision, prove that what is in memory is what was asked for, save it and drop it again.

``load`` finds the checkpoint (``finding``), checks its files (``checkpoint``), chooses the devices (``devices``), lets
transformers load it with the repairs of ``workarounds``, compares names, shapes, types and devices of all parameters,
proves the quantization (``quantization``) and reports on the result (``loaded``).
"""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from helpers.base.errors import choose, first_names
from helpers.base.hashes import unchanged
from helpers.base.progress import bar_class, bars, weights_bar
from helpers.base.units import DTYPES, PRECISIONS, QUANTIZED
from helpers.machine.memory import Workload
from helpers.models.checkpoint import LoadError, _checked, _inspect
from helpers.models.devices import (
    STRATEGIES,
    DeviceMap,
    _chosen_device_map,
    _default_device_map,
    _device_name,
    _device_of,
)
from helpers.models.finding import _load_errors, _read_config, _read_tokenizer, _recheck, resolve
from helpers.models.formats import format_for
from helpers.models.hub import _describe_commit
from helpers.models.kept import _find_copy, _save_copy
from helpers.models.layers import _quantized_layers
from helpers.models.loaded import Loaded, _build_report, _dtype, _note_load
from helpers.models.matching import _check_layers
from helpers.models.quantization import QuantizationError, _verify_against_checkpoint, bnb_config, verify_quantized
from helpers.models.workarounds.bitsandbytes_messages import quiet_bitsandbytes
from helpers.models.workarounds.falcon_linear import falcon_repair
from helpers.models.workarounds.nf4_repacking import _keep_unpacked, _was_repacked
from helpers.models.workarounds.renamed_names import _ignore_renamed_names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    import torch  # noqa: TC004 (it takes seconds to import)
    from transformers import PreTrainedConfig, PreTrainedModel

    from helpers.models.checkpoint import _Shards
    from helpers.models.references import ModelRef


class _LoadingInfo(TypedDict):
    """What transformers reports about the weights of a load (``output_loading_info``)."""

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]]
    error_msgs: Collection[str]


@dataclass(frozen=True)
class LoadOptions:
    """What a load is seldom told.

    ``device_map``: where the modules go, instead of what ``device_map_for`` this machine says: a device for all of
    them (0, "cpu", "cuda:1", "disk" or a torch.device), a device for each module, or a strategy of accelerate such as
    "auto". ``verify``: whether to
    hash the files first, as far as hashes are recorded; None: if the checkpoint's index records them. ``double_quant``:
    whether nf4 quantizes its scales too, see ``bnb_config``.
    """

    device_map: DeviceMap | int | torch.device | None = None
    verify: bool | None = None
    double_quant: bool = False


_DEFAULTS = LoadOptions()


def load(
    ref: ModelRef,
    precision: str = "bf16",
    *,
    offload: bool = False,
    unpacked: bool = False,
    grouped_cache: bool = True,
    options: LoadOptions = _DEFAULTS,
) -> Loaded:
    """Load a model in a precision (fp32, bf16, fp16, int8, nf4) and verify it; with its tokenizer and chat format.

    The layers go where ``device_map_for`` this machine says; each of several processes started by torchrun takes the
    GPU of its local rank. ``offload`` keeps in memory and on disk what the GPUs cannot hold; this is slow and
    impossible for int8 and nf4. ``unpacked`` keeps nf4 weights as they are stored, for training, merging and saving
    (``workarounds.nf4_repacking``). ``grouped_cache``: Falcon gets a KV cache of its key-value heads
    (``workarounds.grouped_cache``); if False, that of transformers. ``options`` holds the rest.

    Layers that int8 and nf4 do not quantize are in bfloat16; a checkpoint that is quantized already stays as it is.
    Only safetensors are read, code of a repository never runs, and only the cache of downloads is written, and that of
    the workbook, if the profile keeps quantized copies of the model (``keep``): later loads read these.

    Memory of this process, besides the weights that stay on the CPU (weights kept in their stored type are mapped from
    their files, which counts as file cache): at most four of the checkpoint's largest tensors in the type they are
    loaded in, two of them if a part goes to disk. Quantization on a CPU takes eight times the largest tensor.
    Raises LoadError if the model cannot be downloaded or does not fit, if a file is missing, cut off or damaged, or if
    a weight is missing, left over, or of another shape, type or device; QuantizationError if a layer is unquantized.
    """
    choose(precision, PRECISIONS, "precision", LoadError)
    started = time.perf_counter()
    checkpoint = resolve(ref)
    with unchanged(checkpoint, LoadError):
        config = _read_config(ref, checkpoint)
        _check_config(ref, config, precision)
        files = _checked(checkpoint, options.verify)
        _check_layers(ref, config, files)
        # Before the weights: what is wrong with the tokenizer should not be found minutes later.
        tokenizer = _read_tokenizer(ref, checkpoint, config, files)
        workload = Workload(cache_heads="kv" if grouped_cache else "library", double_quant=options.double_quant)
        places = _chosen_device_map(options.device_map, config)
        if places is None:
            places = _default_device_map(config, precision, workload, offload=offload)
        with _repair(ref, precision) as repaired, _grouping(ref, wanted=grouped_cache), _load_errors(ref, checkpoint):
            model, copied, read = _from_files_or_copy(ref, files, config, precision, places, options.double_quant)
    _recheck(ref, checkpoint)
    if unpacked:
        _keep_unpacked(model)
    seconds = time.perf_counter() - started
    report = replace(
        _build_report(ref, precision, model, places),
        seconds=seconds,
        repaired=repaired,
        copied=copied,
        read_bytes=read,
        commit=_describe_commit(ref, checkpoint),
    )
    _note_load(ref, precision, checkpoint)
    return Loaded(model, tokenizer, format_for(ref.format), report, ref)


def save(loaded: Loaded, folder: Path) -> ModelRef:
    """Write a model, quantized or not, with its tokenizer; returns the entry to ``load`` it with, in its precision.

    Raises QuantizationError for nf4 weights that a forward pass on this CPU has repacked: their scales are rounded to
    bfloat16, so the saved model would not be the loaded one.
    """
    if _was_repacked(loaded.model):
        raise QuantizationError(
            f"{loaded.ref.label} has been run since it was loaded, which repacked its nf4 weights. Save it before its "
            "first forward pass, or load it with unpacked=True."
        )
    with bars(bar_class()):
        loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return replace(loaded.ref, id=str(folder.absolute()), source="embedded", file=None, revision=None)


def unload(loaded: Loaded) -> None:
    """Drop the model and free its memory. All of ``loaded`` except ``.model`` stays usable."""
    import torch

    loaded.__dict__.pop("model", None)
    loaded.decoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tidy_output() -> None:
    """For notebooks: bars that leave one line of text, no harmless warnings, tables that show long texts whole.

    A bar appears after two seconds. In a notebook it is plain text that updates in place, so that a saved notebook
    shows how it ended; in a terminal it disappears when done; output to a file has no bars.
    """
    import pandas as pd
    from transformers.utils import logging

    pd.set_option("display.max_colwidth", None)
    quiet_bitsandbytes()
    _ignore_renamed_names()
    logging.set_tqdm_hook(lambda _, args, options: bar_class()(*args, **options))


def _from_files_or_copy(
    ref: ModelRef, files: _Shards, config: PreTrainedConfig, precision: str, places: DeviceMap, double_quant: bool
) -> tuple[PreTrainedModel, bool, int]:
    """The model, whether it comes from a quantized copy (``kept``), and the bytes of the tensors that were read."""
    copy = _find_copy(ref, files.folder, precision, double_quant=double_quant)
    if copy is None:
        model = _verified_model(files, config, precision, places, double_quant)
        _save_copy(model, ref, files.folder, precision, double_quant=double_quant)
        return model, False, sum(files.sizes.values())
    shards = _inspect(copy)
    model = _verified_model(shards, _read_config(ref, copy), precision, places, double_quant)
    # The copy was compared with itself; the published weights show that it is theirs.
    _verify_against_checkpoint(model, files.folder)
    return model, True, sum(shards.sizes.values())


def _verified_model(
    files: _Shards, config: PreTrainedConfig, precision: str, device_map: DeviceMap, double_quant: bool
) -> PreTrainedModel:
    """Load, check and prove."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, DTYPES[precision])
    from_pretrained: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    # A checkpoint that is quantized already brings its own configuration, which this argument would hide, even as None.
    if getattr(config, "quantization_config", None) is None:
        quantization = bnb_config(precision, dtype, double_quant=double_quant)
        from_pretrained = partial(from_pretrained, quantization_config=quantization)
    model: PreTrainedModel
    info: _LoadingInfo
    with bars(weights_bar(files.files, files.sizes, lambda name: _device_name(_device_of(name, device_map)))):
        model, info = from_pretrained(
            files.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            # transformers would raise for the first shape; ``_problems`` names all of them.
            ignore_mismatched_sizes=True,
        )
    found = _problems(model, info, files.shapes, precision, device_map)
    if found:
        raise LoadError(f"{files.folder} did not load as asked:\n  " + "\n  ".join(found))
    if precision in QUANTIZED:
        verify_quantized(model, precision)
        _verify_against_checkpoint(model, files.folder)
    return model


def _check_config(ref: ModelRef, config: PreTrainedConfig, precision: str) -> None:
    """Refuse another family, and files that hold quantized weights of another precision."""
    if config.model_type != ref.family:
        raise LoadError(
            f"{ref.label} should be of the family {ref.family}, but its files say {config.model_type}. Correct the "
            "family in the profile, or take another model: falcon and llama are loaded."
        )
    stored = getattr(config, "quantization_config", None)
    flag = {"int8": "load_in_8bit", "nf4": "load_in_4bit"}.get(precision)
    if stored and not (flag and stored.get(flag)):
        raise LoadError(f"{ref.label} is already quantized, and not to {precision}: {stored}.")


def _repair(ref: ModelRef, precision: str) -> AbstractContextManager[bool]:
    if ref.family == "falcon" and precision in QUANTIZED:
        return falcon_repair()
    return nullcontext(False)


def _grouping(ref: ModelRef, *, wanted: bool) -> AbstractContextManager[None]:
    if ref.family != "falcon" or not wanted:
        return nullcontext()
    from helpers.models.workarounds.grouped_cache import grouped_cache

    return grouped_cache()


def _problems(
    model: PreTrainedModel,
    info: _LoadingInfo,
    shapes: Mapping[str, tuple[int, ...]],
    precision: str,
    device_map: DeviceMap,
) -> list[str]:
    """What is wrong with a loaded model, a line for each kind; an empty list if it is as asked.

    ``info`` is transformers' own report, ``shapes`` are those of the checkpoint's tensors.
    """
    return [
        *_weight_problems(info),
        *_device_problems(model, device_map),
        *_shape_problems(model, shapes),
        *_dtype_problems(model, precision),
    ]


def _weight_problems(info: _LoadingInfo) -> list[str]:
    """What the library reports about names and shapes; a head tied to the embeddings is not missing."""
    wrong_shape = [f"{name} {tuple(stored)}, not {tuple(own)}" for name, stored, own in info["mismatched_keys"]]
    kinds = {
        "missing from the checkpoint": info["missing_keys"],
        "in the checkpoint but not in the model": info["unexpected_keys"],
        "of another shape": wrong_shape,
        "not loaded": info["error_msgs"],
    }
    found = []
    for kind, names in kinds.items():
        found += _problem(names, kind)
    return found


def _dtype_problems(model: PreTrainedModel, precision: str) -> list[str]:
    """Parameters in another type than asked for; the quantized ones have their own proof."""
    quantized = {f"{name}.weight" for name in _quantized_layers(model)} if precision in QUANTIZED else set()
    wrong = []
    for name, parameter in model.named_parameters():
        if _dtype(parameter) != DTYPES[precision] and name not in quantized:
            wrong.append(f"{name} ({_dtype(parameter)})")
    return _problem(wrong, f"not in {DTYPES[precision]}")


def _device_problems(model: PreTrainedModel, device_map: DeviceMap) -> list[str]:
    """Parameters that are not where the map says, or nowhere (left on disk, for lack of memory)."""
    wrong = []
    for name, parameter in model.named_parameters():
        if not _is_placed(name, parameter.device, device_map):
            wrong.append(f"{name} ({parameter.device})")
    return _problem(wrong, "not on the devices asked for")


def _is_placed(name: str, device: torch.device, device_map: DeviceMap) -> bool:
    import torch

    if device_map in STRATEGIES:
        return device.type != "meta"
    wanted = _device_of(name, device_map)
    if wanted is None or device.type == "meta":
        return wanted in _offload_targets(device_map)
    expected = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
    return device.type == expected.type and expected.index in (None, device.index)


def _offload_targets(device_map: DeviceMap) -> set[int | str | None]:
    """Where accelerate keeps weights that it brings to the computing device only while they are used."""
    # Without a GPU the CPU computes: weights on it stay there, and only the disk is offloaded to.
    if isinstance(device_map, str) or set(device_map.values()) <= {"cpu", "disk"}:
        return {"disk"}
    return {"cpu", "disk"}


def _shape_problems(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Offloaded parameters of another shape than the checkpoint's tensors, which the library does not compare."""
    wrong = []
    for name, parameter in model.named_parameters():
        own = tuple(parameter.shape)
        if parameter.is_meta and shapes.get(name, own) != own:
            wrong.append(f"{name} {shapes[name]}, not {own}")
    return _problem(wrong, "of another shape")


def _problem(wrong: Collection[str], what: str) -> list[str]:
    return [f"{len(wrong)} weights {what}: {first_names(wrong)}"] if wrong else []
