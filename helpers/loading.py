"""Load a profile's model in a precision: find it, load it, verify it and report on it."""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from helpers import hardware, memory, settings, shards
from helpers.hub_cache import VERIFIED, CachedRepository, recorded_hashes, repository
from helpers.layers import quantizable_layers, quantized_layers, stored_bytes, weights_in
from helpers.loads import note_load
from helpers.memory import (
    Devices,
    Resident,
    Workload,
    kv_bytes_per_token,
    published_config,
    published_models,
)
from helpers.progress import bar_class, bars, human, waiting, weights_bar
from helpers.prompts import format_for
from helpers.quantization import QuantizationError, bnb_config, verify_against_checkpoint, verify_quantized
from helpers.shards import LoadError, Shards, file_hash
from helpers.types import (
    PRECISIONS,
    QUANTIZED,
    ROOT,
    Loaded,
    LoadReport,
    Machine,
    ModelRef,
    Profile,
    choose,
    first_names,
)
from helpers.workarounds.bitsandbytes_messages import quiet_bitsandbytes
from helpers.workarounds.falcon_linear import falcon_repair
from helpers.workarounds.gguf import no_conversion_bar, restore_pre_tokenizer
from helpers.workarounds.nf4_repacking import keep_unpacked, was_repacked
from helpers.workarounds.renamed_names import ignore_renamed_names

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from huggingface_hub import DryRunFileInfo
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DeviceMap = str | dict[str, int | str]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16"}
ONE_SEQUENCE = Workload()  # what a placement keeps memory for unless told otherwise: 2048 tokens
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_DEVICE_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate chooses the devices


class LoadingInfo(TypedDict):
    """What transformers reports about the weights of a load (``output_loading_info``)."""

    missing_keys: Collection[str]
    unexpected_keys: Collection[str]
    mismatched_keys: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]]
    error_msgs: Collection[str]


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    ref: ModelRef,
    precision: str = "bf16",
    *,
    device_map: DeviceMap | None = None,
    offload: bool = False,
    verify: bool | None = None,
    double_quant: bool = False,
    unpacked: bool = False,
    grouped_cache: bool = True,
) -> Loaded:
    """Load a model in a precision (fp32, bf16, fp16, int8, nf4) and verify it; with its tokenizer and chat format.

    ``device_map``: default, that of ``device_map_for`` this machine; each of several processes started by torchrun
    takes the GPU of its local rank. ``offload`` keeps in memory and on disk what the GPUs cannot hold; this is slow and
    impossible for int8 and nf4. ``verify`` hashes the files first, as far as hashes are recorded
    (``shards.damaged_files``); default: if the checkpoint's index records them. ``double_quant``: see ``bnb_config``; a
    checkpoint that is quantized already stays as it is. The layers that int8 and nf4 do not quantize are in bfloat16.
    ``unpacked``: see ``keep_unpacked``. ``grouped_cache``: Falcon gets the KV cache of ``helpers.grouped_cache``; if
    False, that of transformers. Only safetensors are read, code of a repository never runs, and only the cache of
    downloads is written.

    Memory of this process, besides the weights that stay on the CPU (weights kept in their stored type are mapped from
    their files, which counts as file cache): at most four of the checkpoint's largest tensors in the type they are
    loaded in, two of them if a part goes to disk. Quantization on a CPU takes eight times the largest tensor.
    Raises LoadError if the model cannot be downloaded or does not fit, if a file is missing, cut off or damaged, or if
    a weight is missing, left over, or of another shape, type or device; QuantizationError if a layer is unquantized.
    """
    choose(precision, PRECISIONS, "precision", LoadError)
    started = time.perf_counter()
    checkpoint = resolve(ref)
    config = read_config(ref, checkpoint)
    _check_config(ref, config, precision)
    files = shards.checked(checkpoint, verify)
    workload = Workload(cache_heads="kv" if grouped_cache else "library", double_quant=double_quant)
    places = device_map or _default_device_map(config, precision, workload, offload=offload)
    with _repair(ref, precision) as repaired, _grouping(ref, wanted=grouped_cache), load_errors(ref, checkpoint):
        model = _verified_model(files, config, precision, places, double_quant)
        tokenizer = read_tokenizer(checkpoint)
    if unpacked:
        keep_unpacked(model)
    seconds = time.perf_counter() - started
    report = replace(
        build_report(ref, precision, model, places),
        seconds=seconds,
        repaired=repaired,
        commit=describe_commit(ref, checkpoint),
    )
    note_load(ref, precision, checkpoint)
    return Loaded(model, tokenizer, format_for(ref.format), report, ref)


def save(loaded: Loaded, folder: Path) -> ModelRef:
    """Write a model, quantized or not, with its tokenizer; returns the entry to ``load`` it with, in its precision.

    Raises QuantizationError for nf4 weights that a forward pass on this CPU has repacked: their scales are rounded to
    bfloat16, so the saved model would not be the loaded one.
    """
    if was_repacked(loaded.model):
        raise QuantizationError(
            f"{loaded.ref.label} has been run since it was loaded, which repacked its nf4 weights. Save it before its "
            "first forward pass, or load it with unpacked=True."
        )
    with bars(bar_class()):
        loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return replace(loaded.ref, id=str(Path(folder).absolute()), source="embedded", file=None, revision=None)


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
    ignore_renamed_names()
    logging.set_tqdm_hook(lambda factory, args, options: bar_class()(*args, **options))


def read_config(ref: ModelRef, folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint's folder. Raises LoadError."""
    from transformers import AutoConfig

    with load_errors(ref, folder):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


@contextmanager
def load_errors(ref: ModelRef, checkpoint: Path) -> Iterator[None]:
    """Turn the libraries' errors into LoadErrors."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(f"{ref.label} does not fit into the GPUs' memory. Choose a smaller precision.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{ref.label} cannot be loaded from {checkpoint}: {error}") from error


def _verified_model(
    files: Shards, config: PreTrainedConfig, precision: str, device_map: DeviceMap, double_quant: bool
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
    info: LoadingInfo
    with bars(weights_bar(files.files, files.sizes, lambda name: device_name(device_of(name, device_map)))):
        model, info = from_pretrained(
            files.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            # transformers would raise for the first shape; ``problems`` names all of them.
            ignore_mismatched_sizes=True,
        )
    found = problems(model, info, files.shapes, precision, device_map)
    if found:
        raise LoadError(f"{files.folder} did not load as asked:\n  " + "\n  ".join(found))
    if precision in QUANTIZED:
        verify_quantized(model, precision)
        verify_against_checkpoint(model, files.folder)
    return model


def _check_config(ref: ModelRef, config: PreTrainedConfig, precision: str) -> None:
    """Refuse another family, and files that hold quantized weights of another precision."""
    if config.model_type != ref.family:
        raise LoadError(f"{ref.label} should be of the family {ref.family}, but its files say {config.model_type}.")
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
    from helpers.grouped_cache import grouped_cache

    return grouped_cache()


# --- finding the checkpoint -------------------------------------------------------------------------------------------


def resolve(ref: ModelRef) -> Path:
    """The folder that holds a model's safetensors, configuration and tokenizer.

    "embedded": a folder of this project. "package": made once from the GGUF file of an installed package, then kept
    in ``.cache/models`` (or ``$WORKBOOK_CACHE/models``). "hub": downloaded at the pinned revision into the Hugging
    Face cache, or at the commit that ``$WORKBOOK_REVISIONS`` names (JSON, id: commit). Each file is checked once
    against the hash that the hub names, whoever downloaded it; after an interruption, complete files are kept. Only
    "hub" uses the network. Raises LoadError, which says what to do.
    """
    if ref.source == "hub":
        return download(ref)
    if ref.source == "package":
        return _from_package(ref)
    return _from_project(ref)


def config(ref: ModelRef) -> PreTrainedConfig:
    """A model's configuration at full size, without its weights. Raises LoadError as ``resolve`` does.

    For a hub's model it is the published one that this project keeps (a chat model has the shape of its base); the hub
    is asked only for models that are not kept.
    """
    if ref.source != "hub":
        return read_config(ref, resolve(ref))
    for name in (ref.id, ref.id.removesuffix("-chat"), ref.id.removesuffix("-instruct")):
        if name in published_models():
            return published_config(name)
    return read_config(ref, download_config(ref))


def prepare(profile: Profile, *, roles: Collection[str] | None = None, verify: bool | None = None) -> dict[str, str]:
    """Download or make all that loading a profile's models needs (default: of all ``roles``), and report progress.

    No file may be missing or cut off; ``verify`` hashes the files of the hub, as in ``load``. Returns the commit of
    each model of a hub, by its id. Raises LoadError.
    """
    from rich.console import Console

    wanted = [ref for role, ref in profile.models.items() if roles is None or role in roles]
    console = Console()
    commits = {}
    for ref in dict.fromkeys(wanted):  # one model may play several roles
        started = time.perf_counter()
        console.print(f"{ref.label}: getting it ready ...", highlight=False, soft_wrap=True)
        folder = resolve(ref)
        shards.checked(folder, verify if ref.source == "hub" else None)
        size = human(sum(file.stat().st_size for file in folder.iterdir()))
        seconds = time.perf_counter() - started
        line = f"{ref.label}: ready, {size}, {seconds:.1f} s"
        if ref.source == "hub":
            line += f", {describe_commit(ref, folder)}"
            commits[ref.id] = folder.name
        console.print(line, highlight=False, soft_wrap=True)
    return commits


def _from_project(ref: ModelRef) -> Path:
    folder = ROOT / ref.id
    if not (folder / "config.json").is_file():
        raise LoadError(f"{ref.label} should be in {ref.id}, but no config.json is there. Restore it with git.")
    return folder


def _from_package(ref: ModelRef) -> Path:
    gguf = packaged_file(ref)
    folder = _cache() / f"{ref.name}-{file_hash(gguf)[:12]}"
    if not folder.is_dir():
        with waiting(f"Unpacking {ref.name} (once, under a minute)"), full_disk(ref, "WORKBOOK_CACHE", folder):
            _build_once(gguf, folder)
    return folder


def packaged_file(ref: ModelRef) -> Path:
    """The file ``package/file`` of an installed package, found without importing it. Raises LoadError."""
    package, _, name = (ref.file or "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec:
        for folder in spec.submodule_search_locations or []:
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    raise LoadError(f"{ref.label} comes in {ref.file} of an installed package, which is missing. Run `make setup`.")


def _cache() -> Path:
    return settings.cache_folder() / "models"


def _build_once(gguf: Path, folder: Path) -> None:
    """Make ``folder`` from a GGUF file; of several processes one does it, and an unfinished one is never seen."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _unpack_gguf(gguf, partial)
        partial.rename(folder)


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import EmptyTqdm
    from transformers.utils.quantization_config import GgufConfig

    with bars(EmptyTqdm), no_conversion_bar():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            # The weights were published in bfloat16: rounding to it is over thirty times finer than the steps of a
            # 4-bit file, while float32 would double the file and slow each load.
            dtype=torch.bfloat16,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        restore_pre_tokenizer(tokenizer, gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def full_disk(ref: ModelRef, variable: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a disk that fills up into LoadErrors; ``variable`` names the folder in the environment."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Libraries written in Rust give only the system's text, no error number.
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise LoadError(
            f"{ref.label}: the disk of {folder} is full. Free some space, or set {variable} to a folder on a larger "
            "disk, and try again: complete files are kept."
        ) from error


# --- the hub ----------------------------------------------------------------------------------------------------------


def download(ref: ModelRef) -> Path:
    """The folder of a hub's model in the Hugging Face cache, downloaded if necessary. Raises LoadError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    cached = repository(ref.id)
    cached.forget_missing()
    fetch: Callable[..., Any] = partial(  # with dry_run it returns a list of files, else the folder
        snapshot_download, ref.id, revision=_revision(ref), allow_patterns=_HUB_FILES, tqdm_class=bar_class()
    )
    with _hub_errors(ref), full_disk(ref, "HF_HOME", hardware.download_folder()):
        # If the hub is out of reach, an earlier download may do: if not, the next line says so.
        with suppress(DryRunError):
            _check_disk(ref, fetch(dry_run=True))
        folder = Path(fetch())
    if damaged := _verify_once(cached, folder):
        raise LoadError(f"{ref.label}: damaged during the download, and removed: {', '.join(damaged)}. Load it again.")
    return folder


def download_config(ref: ModelRef) -> Path:
    """The folder of a hub's model with its configuration alone. Raises LoadError."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(ref):
        file = hf_hub_download(ref.id, "config.json", revision=_revision(ref))
    return Path(file).parent


def is_here(ref: ModelRef) -> bool:
    """Whether a hub's model is complete in the Hugging Face cache, by names and lengths; the hub is not asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(ref.id, revision=_revision(ref), allow_patterns=_HUB_FILES, local_files_only=True)
        shards.inspect(Path(folder))
    except (LocalEntryNotFoundError, LoadError):
        return False
    return (Path(folder) / "config.json").exists()


def describe_commit(ref: ModelRef, folder: Path) -> str | None:
    """Which commit of a hub's repository a folder holds, and whether the profile pins it; None for other sources."""
    if ref.source != "hub":
        return None
    if ref.revision == folder.name:
        return f"commit {folder.name} (as pinned)"
    return f"commit {folder.name} (what {ref.revision} was: the profile pins no commit)"


def _revision(ref: ModelRef) -> str | None:
    """What to ask the hub for: the commit that a run keeps to, else the profile's revision."""
    return settings.kept_commits().get(ref.id, ref.revision)


def _verify_once(cached: CachedRepository, snapshot: Path) -> list[str]:
    """Hash the files of a snapshot that were not hashed yet; returns those that are damaged, which are removed."""
    from filelock import FileLock

    # In a cache that is read-only nothing could be recorded or repaired: there only ``verify=True`` hashes.
    if not os.access(cached.folder, os.W_OK):
        return []
    # Of several processes one hashes, and the others read its record.
    with FileLock(cached.folder / f"{VERIFIED}.lock"):
        verified = cached.verified()
        new = {name: blob for name, blob in recorded_hashes(snapshot).items() if blob not in verified}
        damaged = shards.damaged_files(snapshot, new) if new else []
        for name in damaged:
            cached.remove(snapshot / name, new[name])
        intact = {blob for name, blob in new.items() if name not in damaged}
        if intact:
            cached.keep_verified(verified | intact)
    return damaged


def _check_disk(ref: ModelRef, files: Iterable[DryRunFileInfo]) -> None:
    cache = hardware.download_folder()
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = hardware.disk_free(cache)
    if needed > free:
        raise LoadError(
            f"{ref.label} needs {human(needed)} more on disk, and {cache} has {human(free)}. "
            "Free some space, or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the hub's errors into LoadErrors that say what to do."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the base of all of them

    try:
        yield
    except (OSError, RuntimeError, HTTPError) as error:
        advice = _refused_token(error) or _hub_advice(ref, error)
        raise LoadError(f"Could not download {ref.label}: {advice} ({type(error).__name__})") from error


def _refused_token(error: Exception) -> str | None:
    """What to do about a token that the hub refuses; None for other errors."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in (error, error.__cause__):
        # The exact class: its subclasses, such as a licence to accept, come with the same status and other advice.
        if type(cause) is HfHubHTTPError and cause.response.status_code == 401:
            return (
                f"the hub does not know this token. Make a new one on {_TOKEN_PAGE}, then run `hf auth login`, or "
                "correct HF_TOKEN."
            )
        if type(cause) is HfHubHTTPError and cause.response.status_code == 403:
            return f"this token may not read it. Give it read access to gated repositories on {_TOKEN_PAGE}."
    return None


def _hub_advice(ref: ModelRef, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{ref.id}"
    # The first class that fits counts, so a subclass must come before its base.
    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: f"its licence must be accepted. Do so on {page}, then run `hf auth login` with a token "
        "of the same account.",
        errors.RepositoryNotFoundError: f"{page} does not exist or is private. Check the profile, or run "
        "`hf auth login`.",
        errors.RevisionNotFoundError: f"{page} has no revision {ref.revision}. Correct the profile.",
        errors.IncompleteSnapshotError: "its download is not complete and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE): complete files are kept.",
        errors.LocalEntryNotFoundError: "it was not downloaded yet and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE), or use the profile laptop, which needs no network.",
        errors.HfHubHTTPError: str(error),
        errors.HTTPError: (  # type: ignore[attr-defined]
            f"the connection to the hub broke. Load it again: complete files are kept. {error}"
        ),
    }
    for kind, text in advice.items():
        if isinstance(error, kind):
            return text
    return str(error)


# --- devices ----------------------------------------------------------------------------------------------------------


def device_map_for(
    config: PreTrainedConfig,
    precision: str,
    machine: Machine,
    workload: Workload = ONE_SEQUENCE,
    *,
    offload: bool = False,
) -> dict[str, int | str]:
    """Where the modules of a model go on a machine: whole layers over the free memory of its GPUs, or all on the CPU.

    That is ``memory.place_together``'s answer for this workload. With ``offload``, what the GPUs do not hold lies in
    free memory, and what that does not hold is read from disk each time it is used.
    Raises LoadError if it does not fit, with the shortfall and what would fit, and WorkbookError if int8 or nf4
    weights would have to be offloaded.
    """
    devices = Devices.free(machine, offload=offload)
    (placement,) = memory.place_together([Resident(config, precision)], devices, workload)
    if placement.shortfall is None:
        # Without GPUs or offloading there is nothing to split: one entry stands for the whole model.
        return placement.device_map if machine.gpus or offload else {"": "cpu"}
    advice = "Choose a larger machine: no precision fits"
    for other in PRECISIONS:
        # What is offered fits without offloading, which is slow.
        if other != precision and memory.shortfall(config, other, machine, workload) is None:
            advice = f"Choose {other}, which fits"
            break
    if not offload and precision not in QUANTIZED:
        advice += "; or load with offload=True, which is slow"
    raise LoadError(f"The model does not fit in {precision}: it {placement.shortfall}. {advice}.")


def _default_device_map(
    config: PreTrainedConfig, precision: str, workload: Workload = ONE_SEQUENCE, *, offload: bool = False
) -> dict[str, int | str]:
    """This machine's; of several processes (torchrun) on GPUs, each its own; in a rehearsal all devices are the CPU."""
    import torch

    several = int(os.environ.get("WORLD_SIZE") or "1") > 1
    if several and settings.rehearsal_folder() is None and torch.cuda.is_available():
        return _on_own_gpu(config, precision, workload, offload=offload)
    machine = hardware.detect()
    device_map = device_map_for(config, precision, machine, workload, offload=offload)
    return dict.fromkeys(device_map, "cpu") if machine.rehearsed else device_map


def _on_own_gpu(config: PreTrainedConfig, precision: str, workload: Workload, *, offload: bool) -> dict[str, int | str]:
    """The map of one of several processes: the GPU of its local rank; the others are not even looked at."""
    import torch

    rank, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not rank.isdecimal() or int(rank) >= count:
        raise LoadError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, LOCAL_RANK is {rank or 'not set'}, and there are {count} GPUs "
            f"here. Start one process per GPU, with torchrun --nproc-per-node {count}, or unset WORLD_SIZE."
        )
    own = int(rank)
    machine = hardware.detect(gpus=[own])
    device_map = device_map_for(config, precision, machine, workload, offload=offload)
    if set(device_map.values()) == {0}:
        return {"": own}
    # The placement counts the GPUs it was given, and this process gave one: its 0 is the own GPU.
    return {name: own if device == 0 else device for name, device in device_map.items()}


def device_of(name: str, device_map: DeviceMap) -> int | str | None:
    """What the map says of a parameter: the entry with the longest prefix of its name."""
    if isinstance(device_map, str):
        return device_map
    prefixes = [prefix for prefix in device_map if not prefix or f"{name}.".startswith(f"{prefix}.")]
    return device_map[max(prefixes, key=len)] if prefixes else None


def device_name(device: int | str | None) -> str:
    """A device of a map as text, such as "GPU 0"."""
    if isinstance(device, int):
        return f"GPU {device}"
    return "CPU" if device in ("cpu", None) else str(device)


# --- problems found after a load --------------------------------------------------------------------------------------


def problems(
    model: PreTrainedModel,
    info: LoadingInfo,
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


def _weight_problems(info: LoadingInfo) -> list[str]:
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
    quantized = {f"{name}.weight" for name in quantized_layers(model)} if precision in QUANTIZED else set()
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

    if device_map in _DEVICE_STRATEGIES:
        return device.type != "meta"
    wanted = device_of(name, device_map)
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


# --- the report of a load ---------------------------------------------------------------------------------------------


def build_report(ref: ModelRef, precision: str, model: PreTrainedModel, device_map: DeviceMap) -> LoadReport:
    """What is in memory and on disk; time, repair and commit are for ``load`` to add."""
    from helpers.grouped_cache import has_grouped_cache

    dtypes: Counter[str] = Counter()
    devices: Counter[str] = Counter()
    bytes_on_disk = 0
    for name, parameter in model.named_parameters():
        # An offloaded parameter is on the device "meta"; the map knows where its values are.
        device = str(device_of(name, device_map) if parameter.is_meta else parameter.device)
        dtypes[_dtype(parameter)] += weights_in(parameter)
        devices[device] += weights_in(parameter)
        if device == "disk":
            bytes_on_disk += parameter.nbytes
    grouped = ref.family == "falcon" and has_grouped_cache(model)
    return LoadReport(
        model=ref.label,
        stand_in_for=ref.stand_in_for,
        precision=precision,
        parameters=dtypes.total(),
        stored_bytes=stored_bytes(model) - bytes_on_disk,
        linear_layers=len(quantizable_layers(model)),
        quantized_layers=len(quantized_layers(model)),
        dtypes=dict(dtypes),
        devices=dict(devices),
        seconds=0.0,
        repaired=False,
        cache_bytes_per_token=kv_bytes_per_token(model.config, precision, heads="kv" if grouped else "library"),
        grouped_cache=grouped,
    )


def report_table(loaded: Loaded) -> pd.DataFrame:
    """The load report for a notebook: property and value."""
    import pandas as pd

    report = loaded.report
    cache = f"{report.cache_bytes_per_token:,} bytes per token"
    rows = {
        "model": report.model,
        "stands in for": report.stand_in_for or "nothing: it is the model itself",
        "precision": report.precision,
        "parameters": f"{report.parameters:,}",
        "weights in memory": human(report.stored_bytes),
        "linear layers": f"{report.linear_layers}, of them quantized: {report.quantized_layers}",
        "types": _shares(report.dtypes),
        "devices": _shares(report.devices),
        "loaded in": f"{report.seconds:.1f} s",
        "Falcon repair": "applied while loading" if report.repaired else "not needed",
        "KV cache": f"{cache}, grouped" if report.grouped_cache else cache,
    }
    if report.commit:
        rows["commit"] = report.commit
    return pd.DataFrame(list(rows.items()), columns=["property", "value"])


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items())
