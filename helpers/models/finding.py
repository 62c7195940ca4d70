"""Find a model: the folder with its files, wherever it comes from, and its configuration alone.

A model comes with this project, inside an installed Python package (as a GGUF file that is unpacked once), or from the
Hugging Face Hub (``hub``). ``resolve`` gives the folder of each; ``prepare`` makes those of a whole profile ready.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.files import ROOT
from helpers.base.progress import bars, waiting
from helpers.base.units import human
from helpers.machine.anatomy import published_config, published_models
from helpers.models.checkpoint import LoadError, _checked, file_hash
from helpers.models.hub import _describe_commit, _download, _download_config, _full_disk
from helpers.models.workarounds.gguf import _no_conversion_bar, _restore_pre_tokenizer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from transformers import PreTrainedConfig, PretrainedConfig, PreTrainedTokenizerBase

    from helpers.models.references import ModelRef, Profile


def resolve(ref: ModelRef) -> Path:
    """The folder that holds a model's safetensors, configuration and tokenizer.

    "embedded": a folder of this project. "package": made once from the GGUF file of an installed package, then kept
    in ``.cache/models`` (or ``$WORKBOOK_CACHE/models``). "hub": downloaded at the pinned revision into the Hugging
    Face cache, or at the commit that ``$WORKBOOK_REVISIONS`` names (JSON, id: commit). Each file is checked once
    against the hash that the hub names, whoever downloaded it; after an interruption, complete files are kept. Only
    "hub" uses the network. Raises LoadError, which says what to do.
    """
    if ref.source == "hub":
        return _download(ref)
    if ref.source == "package":
        return _from_package(ref)
    return _from_project(ref)


def config(ref: ModelRef) -> PretrainedConfig:
    """A model's configuration at full size, without its weights. Raises LoadError as ``resolve`` does.

    For a hub's model it is the published one that this project keeps, its own or that of a sister of the same shape;
    the hub is asked only for models that are not kept.
    """
    if ref.source != "hub":
        return _read_config(ref, resolve(ref))
    shape = published_shape(ref.id)
    if shape:
        return published_config(shape)
    return _read_config(ref, _download_config(ref))


def published_shape(model_id: str) -> str | None:
    """The published model, itself or its base or chat sister, that has a model's configuration; None without one."""
    base = re.sub("-(chat|instruct)$", "", model_id)
    for name in (model_id, base, f"{base.removesuffix('-hf')}-chat-hf"):
        if name in published_models():
            return name
    return None


def prepare(profile: Profile, *, roles: Collection[str] | None = None, verify: bool | None = None) -> dict[str, str]:
    """Download or make all that loading a profile's models needs (default: of all ``roles``), and report progress.

    No file may be missing or cut off; ``verify`` hashes the files of the hub, as in ``load``. Returns the commit of
    each model of a hub, by its id. Raises LoadError.
    """
    from helpers.base.terminal import Terminal

    console = Terminal()
    commits = {}
    for ref in _wanted(profile, roles):
        started = time.perf_counter()
        console.print(f"{ref.label}: getting it ready ...", soft_wrap=True)
        folder = resolve(ref)
        _checked(folder, verify if ref.source == "hub" else None)
        size = human(sum(file.stat().st_size for file in folder.iterdir()))
        seconds = time.perf_counter() - started
        line = f"{ref.label}: ready, {size}, {seconds:.1f} s"
        if ref.source == "hub":
            line += f", {_describe_commit(ref, folder)}"
            commits[ref.id] = folder.name
        console.print(line, soft_wrap=True)
    return commits


def _wanted(profile: Profile, roles: Collection[str] | None) -> list[ModelRef]:
    """The models of some roles, or of all three, each once: one model may play several roles."""
    wanted = [ref for role, ref in profile.models.items() if roles is None or role in roles]
    # The draft is fetched only for a notebook that declares it.
    if roles is not None and "falcon_draft" in roles and profile.falcon_draft is not None:
        wanted.append(profile.falcon_draft)
    return list(dict.fromkeys(wanted))


def packaged_file(ref: ModelRef) -> Path:
    """The file ``package/file`` of an installed package, found without importing it. Raises LoadError."""
    package, _, name = (ref.file or "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec:
        for folder in spec.submodule_search_locations or []:
            if (Path(folder) / name).is_file():
                return Path(folder) / name
    raise LoadError(f"{ref.label} comes in {ref.file} of an installed package, which is missing. Run `make setup`.")


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

    with bars(EmptyTqdm), _no_conversion_bar():
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
        _restore_pre_tokenizer(tokenizer, gguf)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_config(ref: ModelRef, folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint's folder. Raises LoadError."""
    from transformers import AutoConfig

    with _load_errors(ref, folder):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return config


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return tokenizer


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
