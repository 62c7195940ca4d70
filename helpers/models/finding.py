"""Find a model: the folder with its files, wherever it comes from, and its configuration alone.

A model comes with this project, inside an installed Python package (as a GGUF file that is unpacked once), or from the
Hugging Face Hub (``hub``). ``resolve`` gives the folder of each; ``prepare`` makes those of a whole profile ready.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.errors import first_names
from helpers.base.files import ROOT
from helpers.base.hashes import changes
from helpers.base.hub_variables import check_hub_variables
from helpers.base.units import human
from helpers.machine.anatomy import published_config, published_models
from helpers.models.checkpoint import LoadError, _checked
from helpers.models.hub import _describe_commit, _download, _download_config
from helpers.models.matching import _check_model_type, _check_special_ids, _check_tokenizer
from helpers.models.unpacking import _from_package, packaged_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from transformers import PreTrainedConfig, PretrainedConfig, PreTrainedTokenizerBase

    from helpers.models.checkpoint import _Shards
    from helpers.models.references import ModelRef, Profile


def resolve(ref: ModelRef, *, verify: bool = False) -> Path:
    """The folder that holds a model's safetensors, configuration and tokenizer.

    "embedded": a folder of this project. "package": made once from the GGUF file of an installed package, then kept
    in ``.cache/models`` (or ``$WORKBOOK_CACHE/models``). "hub": downloaded at the pinned revision into the Hugging
    Face cache, or at the commit that ``$WORKBOOK_REVISIONS`` names (JSON, id: commit). Each file is checked once
    against the hash that the hub names, whoever downloaded it, and again if it has changed, or with ``verify``; after
    an interruption, complete files are kept. Only "hub" uses the network. Raises LoadError, which says what to do.
    """
    check_hub_variables()
    if ref.source == "hub":
        return _download(ref, verify=verify)
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


def prepare(profile: Profile, *, roles: Collection[str] | None = None, verify: bool = True) -> dict[str, str]:
    """Download or make all that loading a profile's models needs (default: of all ``roles``), and report progress.

    No file may be missing or cut off; ``verify`` hashes all files of the hub, which a run does once: models that take
    minutes to load take a fraction of that to hash. Returns the commit of each model of a hub, by its id. Raises
    LoadError.
    """
    from helpers.base.terminal import Terminal, tell

    console = Terminal()
    commits = {}
    for ref in _wanted(profile, roles):
        started = time.perf_counter()
        tell(console, f"{ref.label}: getting it ready ...")
        folder = resolve(ref, verify=verify)
        _checked(folder, None)
        size = human(sum(file.stat().st_size for file in folder.iterdir()))
        seconds = time.perf_counter() - started
        line = f"{ref.label}: ready, {size}, {seconds:.1f} s"
        if ref.source == "hub":
            line += f", {_describe_commit(ref, folder)}"
            commits[ref.id] = folder.name
        tell(console, line)
    return commits


def check_files(profile: Profile, roles: Collection[str]) -> None:
    """Compare the models that come with the project or a package with their records. Raises LoadError.

    Nothing is downloaded or unpacked, and files that were hashed before cost nothing.
    """
    for ref in _wanted(profile, roles):
        if ref.source == "embedded":
            resolve(ref)
        elif ref.source == "package":
            packaged_file(ref)


def _wanted(profile: Profile, roles: Collection[str] | None) -> list[ModelRef]:
    """The models of some roles, or of all three, each once: one model may play several roles."""
    wanted = [ref for role, ref in profile.models.items() if roles is None or role in roles]
    # The draft is fetched only for a notebook that declares it.
    if roles is not None and "falcon_draft" in roles and profile.falcon_draft is not None:
        wanted.append(profile.falcon_draft)
    return list(dict.fromkeys(wanted))


def _from_project(ref: ModelRef) -> Path:
    """A folder of this project, whose files must be those that were recorded; or any other, which is the user's own."""
    folder = ROOT / ref.id
    if not folder.is_dir() and not Path(ref.id).is_absolute():
        raise LoadError(f"{ref.label} should be in {ref.id}, which is missing. Run: git restore {ref.id}")
    if name := _embedded_name(folder):
        _check_embedded(ref, folder, name)
    elif not (folder / "config.json").is_file():
        raise LoadError(_no_model(folder))
    return folder


def _recheck(ref: ModelRef, folder: Path) -> None:
    """Compare a model with its record once more after it was loaded. Raises LoadError.

    This finds a file that was exchanged between the check and the load; files that are as they were cost nothing.
    """
    if ref.source == "embedded":
        _from_project(ref)
    elif ref.source == "package" and (found := changes(folder, folder.name)):
        raise LoadError(f"{ref.label} changed while it was loaded. In {folder}: {'; '.join(found)}. Load it again.")


def _embedded_name(folder: Path) -> str | None:
    """The name of the project's own model that a folder is; None for a copy elsewhere, which may be changed freely.

    The folder of a model may be a link, to a larger disk or to another model: it stands for the model of its own name.
    """
    own = ROOT / "env" / "models"
    named = Path(os.path.normpath(folder))
    if named.parent == own or named.parent.resolve() == own.resolve():
        return named.name
    actual = folder.resolve()
    return actual.name if actual.parent == own.resolve() else None


def _check_embedded(ref: ModelRef, folder: Path, name: str) -> None:
    # Another model, whole and with its record, is not this one.
    if found := changes(folder, name):
        raise LoadError(
            f"{ref.label} is not the model of this project. In {folder}: {'; '.join(found)}. Restore it with: "
            f"git -C {ROOT} restore env/models, and move away what does not belong there. If the change is yours, keep "
            f"the model in another folder, or record it with: workbook record-hashes {folder}"
        )


def _no_model(folder: Path) -> str:
    """What to do about a folder, named by the user, that holds no model."""
    if folder.is_file():
        return f"{folder} is a file. Give the folder of a checkpoint: its config.json, tokenizer and safetensors."
    if not folder.is_dir():
        return f"{folder} does not exist. Check the path: it must be the folder of a checkpoint."
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds an adapter, not a model: no config.json is there. Load it over its base with "
            "training.reload, or make a model of both with training.merge."
        )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f"{folder} holds no config.json, but its folders do: {first_names(inner)}. Give one of these."
    return f"{folder} holds no config.json, so it is not the folder of a checkpoint. Check the path."


def _read_config(ref: ModelRef, folder: Path) -> PreTrainedConfig:
    """The configuration in a checkpoint's folder. Raises LoadError."""
    from transformers import AutoConfig

    _check_model_type(ref, folder, _read_fields(ref, folder / "config.json"))
    with _read_errors(ref, folder / "config.json"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return config


def _read_tokenizer(ref: ModelRef, folder: Path, config: PreTrainedConfig, files: _Shards) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint's folder, which must belong to its weights. Raises LoadError."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _check_special_ids(ref, _read_fields(ref, folder / name), folder / name, config.vocab_size)
    _check_special_ids(ref, config.to_dict(), folder / "config.json", config.vocab_size)
    with _read_errors(ref, folder / "tokenizer.json"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    _check_tokenizer(ref, config, files, tokenizer)
    return tokenizer


def _read_fields(ref: ModelRef, file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{ref.label}: {file} cannot be read ({error}). Download or copy it again.") from error


@contextmanager
def _read_errors(ref: ModelRef, file: Path) -> Iterator[None]:
    """Turn what the libraries raise over a file into LoadErrors; tokenizers raises bare exceptions."""
    from tokenizers import __version__

    try:
        yield
    except Exception as error:
        if not file.is_file():
            raise LoadError(f"{ref.label}: {file} is missing. Take it from the model's repository.") from error
        advice = "Correct it, or download or copy it again."
        if "untagged enum" in str(error):
            advice = f"It was written by a newer library than tokenizers {__version__}: save it again with this one."
        raise LoadError(f"{ref.label}: {file} cannot be read ({error}). {advice}") from error


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
