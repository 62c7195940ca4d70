"""A profile rehearsed where its machine is missing: plans at the true size, and tiny checkpoints to run its code on.

A rehearsal's folder holds ``machine.json`` (the machine that ``hardware.detect`` then reports) and ``hub``, a Hugging
Face cache in the hub's own layout, with a checkpoint of random weights for each model of a hub: the real flags, tensor
names, number of shards and files, shrunk in width, depth and vocabulary. ``environment`` points a notebook at both.
What else is not as on the real machine is in ``substitutions``.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import hardware, memory
from helpers.hub_cache import repository
from helpers.loading import config, resolve
from helpers.profiles import load_profile
from helpers.types import GIB, Gpu, Machine, ModelRef, Placement, Profile, WorkbookError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HEADS, KV_HEADS, HEAD_SIZE = 16, 8, 8  # of the tiny checkpoints, where the real ones have as many key-value heads
LEAST_LAYERS = 2
TOKENIZERS = {"falcon": "falcon_chat", "llama": "llama_chat"}  # family: the role on the laptop whose tokenizer it takes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class RehearsalError(WorkbookError):
    """The profile would not run on its machine."""

    exit_code = 1


@dataclass(frozen=True)
class Substitution:
    """One thing that is not as it will be: what, how it really is, and how it is in the rehearsal."""

    what: str
    real: str
    here: str


@dataclass(frozen=True)
class Planned:
    """A model at its true size, in the profile's precision, on the profile's machine: bytes on each device.

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
    """What was prepared in ``folder``."""

    folder: Path
    machine: Machine
    plans: tuple[Planned, ...]
    substitutions: tuple[Substitution, ...]

    def described(self) -> dict[str, Any]:
        """For the manifest of a run."""
        return {
            "machine": asdict(self.machine),
            "plans": [asdict(plan) for plan in self.plans],
            "substitutions": [asdict(each) for each in self.substitutions],
        }

    def environment(self) -> dict[str, str]:
        """The variables that point a process at this rehearsal; it asks no hub, and sees no GPU that is really here."""
        hub = str(self.folder / "hub")
        alone = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {"WORKBOOK_REHEARSAL": str(self.folder), "HF_HUB_CACHE": hub, **alone}


def prepare(profile: Profile, folder: Path) -> Rehearsal:
    """Plan the profile's models at their true size and lay out their tiny checkpoints in ``folder``.

    Raises RehearsalError where a model does not fit on the profile's machine.
    """
    machine = machine_of(profile)
    plans = plan(profile, machine)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "machine.json").write_text(json.dumps(asdict(machine)), encoding="utf-8")
    refs = [ref for ref in dict.fromkeys(profile.models.values()) if ref.source == "hub"]
    shrunk = {ref: lay_out(ref, folder / "hub", seed) for seed, ref in enumerate(refs)}
    return Rehearsal(folder, machine, tuple(plans), tuple(_substitutions(profile, shrunk)))


def machine_of(profile: Profile) -> Machine:
    """The least machine of a profile, as ``hardware.detect`` would find it with nothing else running on it."""
    need = profile.requires
    gpus = [
        Gpu(index, f"rehearsed GPU of {need.gpu_bytes / 1e9:.0f} GB", need.gpu_bytes, need.gpu_bytes, (8, 0))
        for index in range(need.gpus)
    ]
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


def plan(profile: Profile, machine: Machine) -> list[Planned]:
    """Every model at its true size on the meta device, placed beside those that are in memory at the same time.

    That is ``memory.place_together``, as in ``workbook plan``. Raises RehearsalError if one does not fit, or if the
    placement leaves a weight out.
    """
    devices, plans = memory.Devices.free(machine), []
    for group in profile.resident:
        refs = [profile.models[role] for role in group]
        residents = [memory.Resident(config(ref), profile.precision, ref.id) for ref in refs]
        placements = memory.place_together(residents, devices)
        for ref, placement in zip(refs, placements, strict=True):
            if placement.shortfall:
                raise RehearsalError(
                    f"{ref.id} in {profile.precision} would not fit on this profile's machine: "
                    f"it {placement.shortfall}. Run workbook plan to see what would fit."
                )
            plans.append(_planned(ref, profile, placement))
    return plans


def shrink(real: PretrainedConfig, tokens: int, end: int, shards: int) -> PretrainedConfig:
    """A configuration with the same flags, narrow and shallow, that yields at least one tensor for each shard.

    ``tokens`` is the size of the vocabulary, ``end`` the token that begins and ends a text. Raises WorkbookError for a
    family that ``memory`` does not know.
    """
    memory.anatomy(real)
    layers = max(LEAST_LAYERS, math.ceil(shards / 8))  # a layer of either family has at least eight tensors
    same = {"vocab_size": tokens, "bos_token_id": end, "eos_token_id": end, "num_hidden_layers": layers}
    same |= {"hidden_size": HEADS * HEAD_SIZE, "num_attention_heads": HEADS}
    fields = real.to_dict() | same
    if real.model_type == "llama":
        ratio = real.intermediate_size / real.hidden_size
        fields |= {"intermediate_size": round(ratio * HEADS * HEAD_SIZE), "head_dim": HEAD_SIZE}
        fields["num_key_value_heads"] = _kv_heads(real.num_key_value_heads, real.num_attention_heads)
    else:
        fields["ffn_hidden_size"] = 4 * HEADS * HEAD_SIZE
        fields["num_kv_heads"] = _kv_heads(real.num_kv_heads, real.num_attention_heads)
    return type(real).from_dict(fields)


def lay_out(ref: ModelRef, hub: Path, seed: int) -> PretrainedConfig:
    """Make the tiny checkpoint of a hub's model in a Hugging Face cache; its configuration is returned.

    The layout is the hub's: blobs named by their SHA-256, links to them in the snapshot of the revision (or of a
    made-up commit to which the named revision refers), an index, and as many shards as the model is published in.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve(getattr(load_profile(), TOKENIZERS[ref.family]))
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tiny = shrink(config(ref), len(tokenizer), tokenizer.eos_token_id, ref.shards or 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny, dtype=torch.bfloat16)
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    files |= {"config.json": tiny.to_json_string().encode(), **_shard_files(model, ref.shards or 1)}
    repository(ref.id, hub).store(files, ref.revision)
    return tiny


def _planned(ref: ModelRef, profile: Profile, placement: Placement) -> Planned:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(ref), dtype=torch.bfloat16)
    if lost := [name for name, _ in model.named_parameters() if not _covered(name, placement.device_map)]:
        raise RehearsalError(f"the placement of {ref.id} leaves out {len(lost)} weights, such as {lost[0]}")
    return Planned(
        ref.id,
        profile.precision,
        parameters=model.num_parameters(),
        modules=len(placement.device_map),
        device_bytes=tuple(placement.per_device_bytes[device] for device in range(profile.requires.gpus)),
        limit_bytes=profile.requires.gpu_bytes,
    )


def _covered(name: str, device_map: Mapping[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in device_map for length in range(1, len(parts) + 1))


def _kv_heads(real: int, queries: int) -> int:
    """As many as the real model has, where it groups its queries; else one for each query head."""
    return KV_HEADS if real < queries else HEADS


def _shard_files(model: PreTrainedModel, count: int) -> dict[str, bytes]:
    """The weights as ``count`` safetensors files with their index, every tensor under its published name."""
    from numpy import array_split
    from safetensors.torch import save

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    files, places = {}, {}
    for number, names in enumerate(array_split(list(tensors), count), 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        files[file] = save({name: tensors[name] for name in names}, metadata={"format": "pt"})
        places |= dict.fromkeys(map(str, names), file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1).encode()
    return files if count == 1 else files | {"model.safetensors.index.json": index}


def _substitutions(profile: Profile, shrunk: Mapping[ModelRef, PretrainedConfig]) -> Iterator[Substitution]:
    need = profile.requires
    gpus = f"{need.gpus} GPUs of {need.gpu_bytes / GIB:.1f} GiB"
    yield Substitution("devices", gpus, "the processor of this machine, whatever GPUs it has")
    yield Substitution("code for CUDA", "taken", "not taken: where code asks torch for its device, that is a processor")
    yield Substitution(
        "hub", "asked for files, with a token and an accepted licence", "not asked: no download, no token"
    )
    yield Substitution("weights", "published, hashed when they were downloaded", "random, in the hub's cache layout")
    for ref, tiny in shrunk.items():
        real, tokens = config(ref), f"{tiny.vocab_size:,} tokens, the laptop's stand-in's"
        yield Substitution(f"{ref.id}: size", _size(real), _size(tiny))
        yield Substitution(f"{ref.id}: tokenizer", f"{real.vocab_size:,} tokens", tokens)
    yield Substitution("expected values", f"expected/{profile.name}.json", "none: every value is unmeasured")


def _size(config: PretrainedConfig) -> str:
    shape = memory.anatomy(config)
    return (
        f"{memory.count_parameters(config):,} parameters: {shape.layers} layers, hidden size {shape.hidden}, "
        f"{config.num_attention_heads} query and {shape.kv_heads} key-value heads of {shape.head_dim}"
    )
