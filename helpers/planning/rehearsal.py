"""Rehearse a profile without its machine: plan at full size, and run its code on tiny random checkpoints.

A rehearsal's folder holds ``machine.json`` (the machine that ``hardware.detect`` then reports) and ``hub``, a Hugging
Face cache in the hub's own layout, with a checkpoint of random weights for each model of the hub. It has the real
flags, tensor names, number of shards and files, and is shrunk in width, depth and vocabulary. ``environment`` points a
notebook at both. ``substitutions`` lists everything that differs from the real machine.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import WorkbookError
from helpers.base.units import GIB
from helpers.machine import anatomy, hardware
from helpers.machine.hardware import Gpu, Machine
from helpers.machine.placement import Devices, Resident, place_together
from helpers.models.finding import config, resolve
from helpers.models.hub_cache import repository
from helpers.models.profiles import load_profile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from helpers.machine.placement import Placement
    from helpers.models.references import ModelRef, Profile

# The tiny checkpoints keep the 8 key-value heads of Falcon-180B and Llama-2-70B, so their heads are grouped alike.
HEADS, KV_HEADS, HEAD_SIZE = 16, 8, 8
LEAST_LAYERS = 2
_TENSORS_PER_LAYER = 8  # a layer of either family has at least as many
_TOKENIZERS = {"falcon": "falcon_chat", "llama": "llama_chat"}  # family: the laptop's role whose tokenizer it takes
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class RehearsalError(WorkbookError):
    """The profile would not run on its machine."""

    exit_code = 1


@dataclass(frozen=True)
class _Substitution:
    """One substitution: its name, the real value and the rehearsal's value."""

    what: str
    real: str
    here: str


@dataclass(frozen=True)
class _Planned:
    """A model at full size, in the profile's precision, on the profile's machine: bytes on each device.

    ``modules`` are those of the placement; ``limit_bytes`` is the memory of one device.
    """

    model: str
    precision: str
    parameters: int
    modules: int
    device_bytes: tuple[int, ...]
    limit_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """A prepared rehearsal in ``folder``."""

    folder: Path
    machine: Machine
    plans: tuple[_Planned, ...]
    substitutions: tuple[_Substitution, ...]

    def described(self) -> dict[str, object]:
        """The entry in the manifest of a run."""
        return {
            "machine": asdict(self.machine),
            "plans": [asdict(plan) for plan in self.plans],
            "substitutions": [asdict(substitution) for substitution in self.substitutions],
        }

    def environment(self) -> dict[str, str]:
        """The variables that point a process at this rehearsal, without the hub and without this machine's GPUs."""
        return {
            "WORKBOOK_REHEARSAL": str(self.folder),
            "HF_HUB_CACHE": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }


def prepare(profile: Profile, folder: Path) -> Rehearsal:
    """Plan the profile's models at full size and write their tiny checkpoints to ``folder``.

    Raises RehearsalError if a model does not fit on the profile's machine.
    """
    machine = _machine_of(profile)
    # Planned first: a profile that does not fit leaves an earlier rehearsal as it is.
    plans = _plan(profile, machine)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text(json.dumps(asdict(machine)), encoding="utf-8")
    refs = [ref for ref in dict.fromkeys(profile.models.values()) if ref.source == "hub"]
    shrunk = {}
    for seed, ref in enumerate(refs):
        shrunk[ref] = _write_checkpoint(ref, folder / "hub", seed)
    return Rehearsal(folder, machine, tuple(plans), tuple(_substitutions(profile, shrunk)))


def _machine_of(profile: Profile) -> Machine:
    """The smallest machine of a profile, as ``hardware.detect`` would report it with nothing else running on it."""
    need = profile.requires
    # Compute capability 8.0, that of an A100: the oldest that computes in bfloat16.
    name = f"rehearsed GPU of {need.gpu_bytes / 1e9:.0f} GB"
    gpus = [Gpu(index, name, need.gpu_bytes, need.gpu_bytes, (8, 0)) for index in range(need.gpus)]
    here = hardware.detect()
    return replace(
        here,
        gpus=tuple(gpus),
        ram_bytes=need.ram_bytes,
        ram_available_bytes=need.ram_bytes,
        disk_free_bytes=need.disk_bytes,
        cache_free_bytes=need.disk_bytes,
        cpu_count=need.cpus,
        rehearsed=True,
    )


def _plan(profile: Profile, machine: Machine) -> list[_Planned]:
    """Plan every model at full size on the meta device, together with those in memory at the same time.

    Uses ``machine.place_together``, as ``workbook plan`` does. Raises RehearsalError if a model does not fit, or if the
    placement leaves out a weight.
    """
    devices, plans = Devices.free(machine), []
    for group in profile.resident:
        refs = [profile.models[role] for role in group]
        residents = [Resident(config(ref), profile.precision, ref.id) for ref in refs]
        placements = place_together(residents, devices)
        for ref, placement in zip(refs, placements, strict=True):
            if placement.shortfall:
                raise RehearsalError(
                    f"{ref.id} in {profile.precision} would not fit on this profile's machine: "
                    f"it {placement.shortfall}. Run workbook plan to see what would fit."
                )
            plans.append(_planned(ref, profile, placement))
    return plans


def _shrink(real: PretrainedConfig, tokens: int, end: int, shards: int) -> PretrainedConfig:
    """Return a configuration with the same flags, narrow and shallow, with at least one tensor for each shard.

    ``tokens`` is the size of the vocabulary, ``end`` the token that begins and ends a text. Raises WorkbookError for a
    family that ``anatomy`` does not know.
    """
    anatomy.anatomy(real)  # raises for an unknown family, whose widths the lines below would not shrink
    hidden = HEADS * HEAD_SIZE
    fields = real.to_dict()
    fields["vocab_size"] = tokens
    fields["bos_token_id"] = fields["eos_token_id"] = end
    fields["num_hidden_layers"] = max(LEAST_LAYERS, math.ceil(shards / _TENSORS_PER_LAYER))
    fields["hidden_size"], fields["num_attention_heads"] = hidden, HEADS
    if real.model_type == "llama":
        ratio = real.intermediate_size / real.hidden_size
        fields["intermediate_size"], fields["head_dim"] = round(ratio * hidden), HEAD_SIZE
        fields["num_key_value_heads"] = _kv_heads(real.num_key_value_heads, real.num_attention_heads)
    else:
        fields["ffn_hidden_size"] = 4 * hidden
        fields["num_kv_heads"] = _kv_heads(real.num_kv_heads, real.num_attention_heads)
    return type(real).from_dict(fields)


def _write_checkpoint(ref: ModelRef, hub: Path, seed: int) -> PretrainedConfig:
    """Write the tiny checkpoint of a hub's model to a Hugging Face cache and return its configuration.

    The layout is the hub's: blobs named by their SHA-256, links to them in the snapshot of the revision (or of a
    made-up commit to which the named revision refers), an index, and as many shards as the model is published in.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(load_profile().models[_TOKENIZERS[ref.family]])
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tiny = _shrink(config(ref), len(tokenizer), tokenizer.eos_token_id, ref.shards or 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16)
    files = _shard_files(model, ref.shards or 1)
    files["config.json"] = tiny.to_json_string().encode()
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            files[name] = (source / name).read_bytes()
    repository(ref.id, hub).store(files, ref.revision)
    return tiny


def _planned(ref: ModelRef, profile: Profile, placement: Placement) -> _Planned:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(ref), dtype=torch.bfloat16)
    lost = [name for name, _ in model.named_parameters() if not _is_placed(name, placement.device_map)]
    if lost:
        raise RehearsalError(f"The placement of {ref.id} leaves out {len(lost)} weights, such as {lost[0]}.")
    return _Planned(
        ref.id,
        profile.precision,
        parameters=model.num_parameters(),
        modules=len(placement.device_map),
        device_bytes=tuple(placement.per_device_bytes[device] for device in range(profile.requires.gpus)),
        limit_bytes=profile.requires.gpu_bytes,
    )


def _is_placed(name: str, device_map: Mapping[str, int | str]) -> bool:
    """True if the map names the weight itself or a module around it."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in device_map for length in range(1, len(parts) + 1))


def _kv_heads(real: int, queries: int) -> int:
    """8 key-value heads if the real model groups its queries, otherwise one for each query head."""
    return KV_HEADS if real < queries else HEADS


def _shard_files(model: PreTrainedModel, count: int) -> dict[str, bytes]:
    """The weights as ``count`` safetensors files with their index, every tensor under its published name."""
    from numpy import array_split
    from safetensors.torch import save

    # Copies: safetensors refuses tensors that share memory, such as the tied head and embeddings.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    if count == 1:
        return {"model.safetensors": save(tensors, metadata={"format": "pt"})}
    files, shard_names = {}, {}
    for number, names in enumerate(array_split(list(tensors), count), 1):
        shard = f"model-{number:05}-of-{count:05}.safetensors"
        # numpy turned the names into its own strings.
        contents = {str(name): tensors[str(name)] for name in names}
        files[shard] = save(contents, metadata={"format": "pt"})
        shard_names.update(dict.fromkeys(contents, shard))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": shard_names}, indent=1)
    files["model.safetensors.index.json"] = index.encode()
    return files


def _substitutions(profile: Profile, shrunk: Mapping[ModelRef, PretrainedConfig]) -> Iterator[_Substitution]:
    need = profile.requires
    gpus = f"{need.gpus} GPUs of {need.gpu_bytes / GIB:.1f} GiB"
    yield _Substitution("devices", gpus, "the CPU of this machine, whatever GPUs it has")
    yield _Substitution("code for CUDA", "taken", "not taken: if code asks torch for its device, that is the CPU")
    yield _Substitution(
        "hub", "asked for files, with a token and an accepted licence", "not asked: no download, no token"
    )
    yield _Substitution("weights", "published, hashed when they were downloaded", "random, in the hub's cache layout")
    for ref, tiny in shrunk.items():
        real, tokens = config(ref), f"{tiny.vocab_size:,} tokens, the laptop's stand-in's"
        yield _Substitution(f"{ref.id}: size", _size(real), _size(tiny))
        yield _Substitution(f"{ref.id}: tokenizer", f"{real.vocab_size:,} tokens", tokens)
    yield _Substitution("expected values", f"expected/{profile.name}.json", "none: every value is unmeasured")


def _size(config: PretrainedConfig) -> str:
    shape = anatomy.anatomy(config)
    return (
        f"{anatomy.count_parameters(config):,} parameters: {shape.layers} layers, hidden size {shape.hidden}, "
        f"{config.num_attention_heads} query and {shape.kv_heads} key-value heads of {shape.head_dim}"
    )
