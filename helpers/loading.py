"""A profile's model in a precision: found, loaded, verified, and reported."""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import hardware, settings, shards
from helpers.memory import CacheHeads, kv_bytes_per_token, place, published_config, published_models
from helpers.progress import bar_class, bars, human, waiting, weights_bar
from helpers.prompts import format_for
from helpers.quantization import (
    QuantizationError,
    bnb_config,
    falcon_repair,
    keep_unpacked,
    quantizable_layers,
    quantized_layers,
    quiet_bitsandbytes,
    rebound,
    stored_bytes,
    verify_against_checkpoint,
    verify_quantized,
    was_repacked,
    weights_in,
)
from helpers.shards import LoadError, Shards, file_hash
from helpers.types import PRECISIONS, QUANTIZED, ROOT, Loaded, LoadReport, Machine, ModelRef, Profile

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from huggingface_hub import DryRunFileInfo
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "bfloat16", "nf4": "bfloat16"}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
DeviceMap = str | dict[str, int | str]
TOKENS = "https://huggingface.co/settings/tokens"
VERIFIED = "workbook-verified.txt"  # in a model's folder of the Hugging Face cache: the blobs that were hashed here


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
    """A model in a precision (fp32, bf16, fp16, int8, nf4), verified, with its tokenizer and chat format.

    ``device_map``: unless given, ``device_map_for`` this machine; each of several processes started by torchrun takes
    the GPU of its local rank. ``offload`` lets what the GPUs do not hold lie in memory and on disk, which is slow and
    not for int8 and nf4. ``verify`` hashes the files first, as far as hashes are recorded (``shards.verify``): unless
    given, where the checkpoint's index records them. The parts that int8 and nf4 do not quantize are in bfloat16.
    ``double_quant``: see ``bnb_config``; what is quantized already stays as it is. ``unpacked``: see ``keep_unpacked``.
    ``grouped_cache``: Falcon's KV cache is that of ``helpers.grouped_cache``; otherwise it is transformers' own.
    Only safetensors are read, no code of a repository is run, and nothing is written but the download's cache.

    Memory of this process, beside the weights that stay on the CPU (those kept in the type they are stored in are read
    from their files as mapped, which counts as file cache): at most four of the checkpoint's largest tensors in the
    type they are loaded in, two of them where a part goes to disk; on a CPU quantization takes eight times the largest.
    Raises LoadError when the model cannot be had or does not fit, when a file is missing, cut off or damaged, when a
    weight is missing, left over, or of another shape, type or device; QuantizationError where a layer is unquantized.
    """
    if precision not in PRECISIONS:
        raise LoadError(f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    started = time.perf_counter()
    checkpoint = resolve(ref)
    found = _read_config(ref, checkpoint)
    _check_config(ref, found, precision)
    files = _checked_files(checkpoint, verify)
    room = {"offload": offload, "double_quant": double_quant, "cache_heads": "kv" if grouped_cache else "library"}
    places = device_map or _default_device_map(found, precision, **room)
    repair = falcon_repair() if ref.family == "falcon" and precision in QUANTIZED else nullcontext(False)
    with repair as repaired, _grouping(ref, wanted=grouped_cache), _load_errors(ref, checkpoint):
        model = _verified_model(files, found, precision, places, double_quant)
        tokenizer = _tokenizer(checkpoint)
    if unpacked:
        keep_unpacked(model)
    known = {"seconds": time.perf_counter() - started, "repaired": repaired, "commit": _commit(ref, checkpoint)}
    report = _report(ref, precision, model, places, **known)
    return Loaded(model, tokenizer, format_for(ref.format), report, ref)


def resolve(ref: ModelRef) -> Path:
    """The folder that holds a model's safetensors, configuration and tokenizer.

    "embedded": a folder of this project. "package": made once from the GGUF file of an installed package, then kept
    in ``.cache/models`` (or ``$WORKBOOK_CACHE/models``). "hub": downloaded at the pinned revision into the Hugging
    Face cache; what ``$WORKBOOK_REVISIONS`` names (JSON, id: commit), at that commit instead. Each file is checked once
    against the hash the hub names, whoever downloaded it; after an interruption, files that are whole are kept. Only
    "hub" uses the network. Raises LoadError, which says what to do.
    """
    if ref.source == "hub":
        return _from_hub(ref)
    return _from_package(ref) if ref.source == "package" else _from_project(ref)


def config(ref: ModelRef) -> PreTrainedConfig:
    """A model's configuration at its true size, without its weights. Raises LoadError as ``resolve`` does.

    Of a hub's model the published one that this project keeps (a chat model has its base's shape); only what is not
    kept is asked of the hub.
    """
    if ref.source != "hub":
        return _read_config(ref, resolve(ref))
    for name in (ref.id, ref.id.removesuffix("-chat"), ref.id.removesuffix("-instruct")):
        if name in published_models():
            return published_config(name)
    from huggingface_hub import hf_hub_download

    with _hub_errors(ref):
        file = hf_hub_download(ref.id, "config.json", revision=_revision(ref))
    return _read_config(ref, Path(file).parent)


def prepare(profile: Profile, *, roles: Collection[str] | None = None, verify: bool | None = None) -> dict[str, str]:
    """Fetch or make all that loading a profile's models (of ``roles``, if given) needs, saying how far it is.

    No file may be missing or cut off; ``verify`` hashes those of the hub, as in ``load``. Returns the commit of each
    model of a hub, by its id. Raises LoadError.
    """
    from rich.console import Console

    console, commits = Console(), {}
    for ref in dict.fromkeys(ref for role, ref in profile.models.items() if roles is None or role in roles):
        started = time.perf_counter()
        console.print(f"{ref.label}: getting it ready ...", highlight=False, soft_wrap=True)
        folder = resolve(ref)
        _checked_files(folder, verify if ref.source == "hub" else None)
        size = sum(file.stat().st_size for file in folder.iterdir())
        seconds = time.perf_counter() - started
        commit = f", {_commit(ref, folder)}" if ref.source == "hub" else ""
        console.print(f"{ref.label}: ready, {human(size)}, {seconds:.1f} s{commit}", highlight=False, soft_wrap=True)
        commits |= {ref.id: folder.name} if ref.source == "hub" else {}
    return commits


def is_here(ref: ModelRef) -> bool:
    """Whether all of a hub's model lies in the Hugging Face cache, by names and lengths; no hub is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(ref.id, revision=_revision(ref), allow_patterns=HUB_FILES, local_files_only=True)
        shards.inspect(Path(folder))
    except (LocalEntryNotFoundError, LoadError):
        return False
    return (Path(folder) / "config.json").exists()


def save(loaded: Loaded, folder: Path) -> ModelRef:
    """Write a model, quantized or not, with its tokenizer, and return where ``load`` finds it, in its precision only.

    Raises QuantizationError for nf4 weights that a forward pass on this processor repacked: their scales are rounded to
    bfloat16 by then, and so what is saved would not be what was loaded.
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


def report_table(loaded: Loaded) -> pd.DataFrame:
    """The load report for a notebook: property and value."""
    import pandas as pd

    report = loaded.report
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
        "KV cache": f"{report.cache_bytes_per_token:,} bytes a token" + (", grouped" if report.grouped_cache else ""),
    }
    if report.commit:
        rows["commit"] = report.commit
    return pd.DataFrame(list(rows.items()), columns=["property", "value"])


def unload(loaded: Loaded) -> None:
    """Drop the model and give its memory back; of ``loaded``, all but ``.model`` stays usable."""
    import torch

    loaded.__dict__.pop("model", None)
    loaded.decoder = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tidy_output() -> None:
    """For notebooks: bars that leave one line of text, no harmless warnings, tables that show long texts whole.

    A bar shows after two seconds. In a notebook it is plain text that updates in place, so that a saved notebook
    shows how it ended; in a terminal it goes when it is done; written to a file, there is none.
    """
    import warnings

    import pandas as pd
    from transformers.utils import logging

    pd.set_option("display.max_colwidth", None)
    quiet_bitsandbytes()
    # peft and trl still use names that transformers renamed; nothing a reader could change
    warnings.filterwarnings("ignore", r".* is deprecated and will be removed in v6", FutureWarning, "transformers")
    logging.set_tqdm_hook(lambda factory, args, options: bar_class()(*args, **options))


# --- finding the checkpoint -------------------------------------------------------------------------------------------


def _from_project(ref: ModelRef) -> Path:
    folder = ROOT / ref.id
    if not (folder / "config.json").is_file():
        raise LoadError(f"{ref.label} should be in {ref.id}, but no config.json is there. Restore it with git.")
    return folder


def _from_package(ref: ModelRef) -> Path:
    gguf = packaged_file(ref)
    folder = _cache() / f"{ref.name}-{file_hash(gguf)[:12]}"
    if not folder.is_dir():
        with waiting(f"Unpacking {ref.name} (once, under a minute)"), _full_disk(ref, "WORKBOOK_CACHE", folder):
            _build_once(gguf, folder)
    return folder


def packaged_file(ref: ModelRef) -> Path:
    """The file ``package/file`` of an installed package, found without importing it. Raises LoadError."""
    package, _, name = (ref.file or "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise LoadError(f"{ref.label} comes in {ref.file} of an installed package, which is not here. Run `make setup`.")


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
    """Write the model of a GGUF file as bfloat16 safetensors with its tokenizer.

    bfloat16 because the weights were published in it: rounding to it is over thirty times finer than the steps of a
    4-bit file, and nothing is lost to those who load bf16, while float32 would double the file and slow each load.
    """
    import torch
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
    from transformers.utils.logging import EmptyTqdm
    from transformers.utils.quantization_config import GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    with bars(EmptyTqdm), rebound(modeling_gguf_pytorch_utils, "tqdm", EmptyTqdm):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
        )
        tokenizer = _tokenizer(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        _restore_pre_tokenizer(tokenizer, gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Split digits before byte-level BPE where the file asks for it ("smollm"), as in training.

    transformers ignores that entry and would read the blank lines and spaces before a digit as other tokens.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field and field.contents() == "smollm":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _from_hub(ref: ModelRef) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.file_download import repo_folder_name

    repo = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=ref.id, repo_type="model")
    wanted = {"revision": _revision(ref), "allow_patterns": HUB_FILES, "tqdm_class": bar_class()}
    _forget_absent(repo)
    with _hub_errors(ref), _full_disk(ref, "HF_HOME", Path(HF_HUB_CACHE)):
        with suppress(DryRunError):  # Out of reach: what was downloaded before may do; if not, the next line says so.
            _check_disk(ref, snapshot_download(ref.id, **wanted, dry_run=True))
        folder = Path(snapshot_download(ref.id, **wanted))
    if wrong := _verify_once(repo, folder):
        raise LoadError(f"{ref.label}: damaged on the way, and removed: {', '.join(wrong)}. Load it again.")
    return folder


def _revision(ref: ModelRef) -> str | None:
    """What to ask the hub for: the commit that a run keeps to, else the profile's revision."""
    return settings.kept_commits().get(ref.id, ref.revision)


def _verify_once(repo: Path, folder: Path) -> list[str]:
    """Hash the files of a snapshot that were not yet; those that are damaged are removed and named.

    Of several processes one does it. In a cache that cannot be written to nothing could be kept, or mended: there
    nothing is hashed, unless ``verify`` asks for it.
    """
    from filelock import FileLock

    if not os.access(repo, os.W_OK):
        return []
    with FileLock(repo / f"{VERIFIED}.lock"):
        known = _verified(repo)
        unknown = {name: blob for name, blob in shards.cached_hashes(folder).items() if blob not in known}
        wrong = shards.verify(folder, unknown) if unknown else []
        for name in wrong:
            for path in ((folder / name).resolve(), repo / "blobs" / unknown[name], folder / name):
                path.unlink(missing_ok=True)
        if fine := {blob for name, blob in unknown.items() if name not in wrong}:
            _keep_verified(repo, known | fine)
    return wrong


def _forget_absent(repo: Path) -> None:
    """Before a download: what was verified and is not here any more is to be verified anew once it is."""
    known = _verified(repo)
    if absent := {blob for blob in known if not (repo / "blobs" / blob).exists()}:
        _keep_verified(repo, known - absent)


def _verified(repo: Path) -> set[str]:
    file = repo / VERIFIED
    return set(file.read_text(encoding="ascii").split()) if file.is_file() else set()


def _keep_verified(repo: Path, blobs: Iterable[str]) -> None:
    partial = repo / f"{VERIFIED}.partial"
    partial.write_text("".join(f"{blob}\n" for blob in sorted(blobs)), encoding="ascii")
    partial.replace(repo / VERIFIED)


def _check_disk(ref: ModelRef, files: Iterable[DryRunFileInfo]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = hardware.disk_free(Path(HF_HUB_CACHE))
    if needed > free:
        raise LoadError(
            f"{ref.label} needs {human(needed)} more on disk, and {HF_HUB_CACHE} has {human(free)}. "
            "Free some space, or set HF_HOME to a folder on a larger disk."
        )


@contextmanager
def _full_disk(ref: ModelRef, variable: str, folder: Path) -> Iterator[None]:
    """Turn the errors of a disk that fills up into LoadErrors; ``variable`` names the folder in the environment."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # Rust libraries give the system's text alone
        if not any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise
        raise LoadError(
            f"{ref.label}: the disk of {folder} is full. Free some space, or set {variable} to a folder on a larger "
            "disk, and try again: what is complete is kept."
        ) from error


@contextmanager
def _hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn the hub's errors into LoadErrors that say what to do."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, RuntimeError, HTTPError) as error:
        raise LoadError(f"{ref.label} cannot be had: {_hub_advice(ref, error)} ({type(error).__name__})") from error


def _hub_advice(ref: ModelRef, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{ref.id}"
    advice = {
        errors.GatedRepoError: f"its licence must be accepted. Do so on {page}, then run `hf auth login` with a token "
        "of the same account.",
        errors.RepositoryNotFoundError: f"{page} does not exist, or is private. Check the profile, or `hf auth login`.",
        errors.RevisionNotFoundError: f"{page} has no revision {ref.revision}. Correct the profile.",
        errors.IncompleteSnapshotError: "its download is not complete and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE); what is complete is kept.",
        errors.LocalEntryNotFoundError: "it was not downloaded yet and the hub cannot be reached. Connect to it "
        "(and unset HF_HUB_OFFLINE), or use the profile laptop, which needs no network.",
        errors.HfHubHTTPError: str(error),
        errors.HTTPError: f"the connection to the hub broke. Load it again: what is complete is kept. {error}",
    }
    refused = {
        401: f"the hub does not know this token. Make a new one on {TOKENS}, then run `hf auth login`, or correct "
        "HF_TOKEN.",
        403: f"this token may not read it. Give it read access to gated repositories on {TOKENS}.",
    }
    for each in (error, error.__cause__):
        if type(each) is errors.HfHubHTTPError and each.response.status_code in refused:
            return refused[each.response.status_code]
    return next((text for kind, text in advice.items() if isinstance(error, kind)), str(error))


def _commit(ref: ModelRef, folder: Path) -> str | None:
    """Which commit of a hub's repository is in the cache, and whether the profile pins it."""
    if ref.source != "hub":
        return None
    pinned = "as pinned" if ref.revision == folder.name else f"what {ref.revision} was: the profile pins no commit"
    return f"commit {folder.name} ({pinned})"


# --- loading and checking ---------------------------------------------------------------------------------------------


def device_map_for(
    config: PreTrainedConfig,
    precision: str,
    machine: Machine,
    *,
    offload: bool = False,
    double_quant: bool = False,
    context_tokens: int = 2048,
    cache_heads: CacheHeads = "kv",
) -> dict[str, int | str]:
    """Where the modules of a model go on a machine: whole layers over the free memory of its GPUs, or all on the CPU.

    That is ``memory.place`` with room for one sequence of ``context_tokens``, ``cache_heads`` of it cached. With
    ``offload``, what the GPUs do not hold lies in free memory, and what that does not hold is read from disk each time
    it is used.
    Raises LoadError where it does not fit, with what is lacking and what would fit, and WorkbookError where int8 or nf4
    weights would have to be offloaded.
    """
    work = {"context_tokens": context_tokens, "double_quant": double_quant, "cache_heads": cache_heads}
    device_map, why_not = _placed(config, precision, machine, offload=offload, **work)
    if why_not:
        others = [each for each in PRECISIONS if each != precision]
        fitting = [each for each in others if not _placed(config, each, machine, **work)[1]]
        first = f"Choose {fitting[0]}, which fits" if fitting else "Choose a larger machine: no precision fits"
        slower = "" if offload or precision in QUANTIZED else "; or load with offload=True, which is slow"
        raise LoadError(f"In {precision} it does not fit: it {why_not}. {first}{slower}.")
    return device_map


def _placed(
    config: PreTrainedConfig,
    precision: str,
    machine: Machine,
    *,
    context_tokens: int,
    double_quant: bool,
    cache_heads: CacheHeads,
    offload: bool = False,
) -> tuple[dict[str, int | str], str]:
    """(device map, what is lacking) as ``device_map_for`` has them; it fits where the text is empty."""
    work = {"context_tokens": context_tokens, "double_quant": double_quant, "cache_heads": cache_heads}
    if machine.gpus or offload:
        free = [gpu.free_bytes for gpu in machine.gpus]
        slower = {"cpu_bytes": machine.ram_available_bytes, "disk": True} if offload else {}
        placed = place(config, precision, free, **work, **slower)
        return placed.device_map, placed.why_not
    placed = place(config, precision, [], cpu_bytes=max(machine.ram_available_bytes, 1), **work)
    return {"": "cpu"}, f"{placed.why_not.partition(' over ')[0]} of memory" if placed.why_not else ""


def _default_device_map(config: PreTrainedConfig, precision: str, **options: Any) -> dict[str, int | str]:
    """This machine's; of several processes (torchrun) on GPUs, each its own; in a rehearsal all devices are the CPU."""
    import torch

    several = int(os.environ.get("WORLD_SIZE") or "1") > 1
    if several and settings.rehearsal_folder() is None and torch.cuda.is_available():
        return _on_own_gpu(config, precision, **options)
    machine = hardware.detect()
    device_map = device_map_for(config, precision, machine, **options)
    return dict.fromkeys(device_map, "cpu") if machine.rehearsed else device_map


def _on_own_gpu(config: PreTrainedConfig, precision: str, **options: Any) -> dict[str, int | str]:
    """The map of one of several processes: the GPU of its local rank, and no other, which is not even looked at."""
    import torch

    rank, count = os.environ.get("LOCAL_RANK", ""), torch.cuda.device_count()
    if not rank.isdecimal() or int(rank) >= count:
        raise LoadError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, LOCAL_RANK is {rank or 'not set'}, and there are {count} GPUs "
            f"here: start one process a GPU, with torchrun --nproc-per-node {count}, or unset WORLD_SIZE."
        )
    own = int(rank)
    found = device_map_for(config, precision, hardware.detect(gpus=[own]), **options)
    return {"": own} if set(found.values()) == {0} else {name: own if at == 0 else at for name, at in found.items()}


def _grouping(ref: ModelRef, *, wanted: bool) -> AbstractContextManager[None]:
    if ref.family != "falcon" or not wanted:
        return nullcontext()
    from helpers.grouped_cache import grouped_cache

    return grouped_cache()


def _is_grouped(model: PreTrainedModel) -> bool:
    from helpers.grouped_cache import has_grouped_cache

    return has_grouped_cache(model)


def _checked_files(checkpoint: Path, verify: bool | None) -> Shards:
    """The checkpoint's files, all whole; hashed where asked to, or where the index records hashes."""
    files = shards.inspect(checkpoint)
    if (verify or (verify is None and files.hashes)) and (wrong := shards.verify(checkpoint)):
        raise LoadError(shards.damaged(checkpoint, wrong))
    return files


def _verified_model(
    files: Shards, found: PreTrainedConfig, precision: str, device_map: DeviceMap, double_quant: bool
) -> PreTrainedModel:
    """Load, check and prove; a checkpoint that is quantized already brings its own configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, DTYPES[precision])
    options: dict[str, Any] = {}
    if getattr(found, "quantization_config", None) is None:  # given as None, it would hide the checkpoint's own
        options = {"quantization_config": bnb_config(precision, dtype, double_quant=double_quant)}
    draw = weights_bar(files.files, files.sizes, lambda name: _device_name(_place(name, device_map)))
    with bars(draw):
        model, info = AutoModelForCausalLM.from_pretrained(
            files.folder,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    problems = [
        *_weight_problems(info),
        *_device_problems(model, device_map),
        *_shape_problems(model, files.shapes),
        *_dtype_problems(model, precision),
    ]
    if problems:
        raise LoadError(f"{files.folder} did not load as asked:\n  " + "\n  ".join(problems))
    if precision in QUANTIZED:
        verify_quantized(model, precision)
        verify_against_checkpoint(model, files.folder)
    return model


def _read_config(ref: ModelRef, folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _load_errors(ref, folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer(folder: Path, **options: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)


@contextmanager
def _load_errors(ref: ModelRef, checkpoint: Path) -> Iterator[None]:
    """Turn the libraries' errors into LoadErrors."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LoadError(f"{ref.label} does not fit into the GPUs' memory. Choose a smaller precision.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(f"{ref.label} cannot be loaded from {checkpoint}: {error}") from error


def _check_config(ref: ModelRef, found: PreTrainedConfig, precision: str) -> None:
    """Refuse another family, and files that hold quantized weights of another precision."""
    if found.model_type != ref.family:
        raise LoadError(f"{ref.label} should be of the family {ref.family}, but its files say {found.model_type}.")
    stored = getattr(found, "quantization_config", None)
    if stored and not stored.get({"int8": "load_in_8bit", "nf4": "load_in_4bit"}.get(precision)):
        raise LoadError(f"The files of {ref.label} hold weights quantized before, and not as {precision}: {stored}.")


def _weight_problems(info: dict[str, Any]) -> list[str]:
    """What the library reports about names and shapes; a head tied to the embeddings is not missing."""
    wrong_shape = [f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    kinds = {
        "missing from the checkpoint": info["missing_keys"],
        "in the checkpoint but not in the model": info["unexpected_keys"],
        "of another shape": wrong_shape,
        "not loaded": info["error_msgs"],
    }
    return [f"{len(names)} weights {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def _dtype_problems(model: PreTrainedModel, precision: str) -> list[str]:
    """Parameters in another type than asked for; the quantized ones have their own proof."""
    quantized = {f"{name}.weight" for name in quantized_layers(model)} if precision in QUANTIZED else set()
    wrong = [
        f"{name} ({_dtype(parameter)})"
        for name, parameter in model.named_parameters()
        if _dtype(parameter) != DTYPES[precision] and name not in quantized
    ]
    return [f"{len(wrong)} weights not in {DTYPES[precision]}: {_some(wrong)}"] if wrong else []


def _device_problems(model: PreTrainedModel, device_map: DeviceMap) -> list[str]:
    """Parameters that are elsewhere than the map says, or nowhere (left on disk, for want of memory)."""
    wrong = [
        f"{name} ({parameter.device})"
        for name, parameter in model.named_parameters()
        if not _is_placed(name, parameter.device, device_map)
    ]
    return [f"{len(wrong)} weights not on the devices asked for: {_some(wrong)}"] if wrong else []


def _is_placed(name: str, device: torch.device, device_map: DeviceMap) -> bool:
    import torch

    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return device.type != "meta"
    place = _place(name, device_map)
    if place is None or device.type == "meta":
        return place in _offloaded_to(device_map)
    wanted = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device.type == wanted.type and wanted.index in (None, device.index)


def _place(name: str, device_map: DeviceMap) -> int | str | None:
    """What the map says of a parameter: the entry with the longest prefix of its name."""
    places: Mapping[str, int | str] = {"": device_map} if isinstance(device_map, str) else device_map
    prefix = max((key for key in places if not key or f"{name}.".startswith(f"{key}.")), key=len, default=None)
    return None if prefix is None else places[prefix]


def _offloaded_to(device_map: DeviceMap) -> set[str]:
    """Where accelerate keeps weights that it brings to the device that computes only while they are used."""
    used = set() if isinstance(device_map, str) else set(device_map.values())
    return {"disk"} if used <= {"cpu", "disk"} else {"cpu", "disk"}


def _device_name(place: int | str | None) -> str:
    return f"GPU {place}" if isinstance(place, int) else "CPU" if place in ("cpu", None) else str(place)


def _shape_problems(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Offloaded parameters of another shape than the checkpoint's tensors, which the library does not compare."""
    wrong = [
        f"{name} {shapes[name]}, not {tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if parameter.is_meta and shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape)
    ]
    return [f"{len(wrong)} weights of another shape: {_some(wrong)}"] if wrong else []


def _report(ref: ModelRef, precision: str, model: PreTrainedModel, device_map: DeviceMap, **known: Any) -> LoadReport:
    dtypes, devices = Counter(), Counter()
    for name, parameter in model.named_parameters():
        dtypes[_dtype(parameter)] += weights_in(parameter)
        devices[_place(name, device_map) if parameter.is_meta else str(parameter.device)] += weights_in(parameter)
    grouped = ref.family == "falcon" and _is_grouped(model)
    heads = "kv" if grouped else "library"
    on_disk = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if parameter.is_meta and _place(name, device_map) == "disk"
    )
    return LoadReport(
        model=ref.label,
        stand_in_for=ref.stand_in_for,
        precision=precision,
        parameters=dtypes.total(),
        stored_bytes=stored_bytes(model) - on_disk,
        linear_layers=len(quantizable_layers(model)),
        quantized_layers=len(quantized_layers(model)),
        dtypes=dict(dtypes),
        devices=dict(devices),
        cache_bytes_per_token=kv_bytes_per_token(model.config, precision, heads=heads),
        grouped_cache=grouped,
        **known,
    )


# --- what a person sees -----------------------------------------------------------------------------------------------


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _shares(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,} parameters" for name, count in counts.items())
