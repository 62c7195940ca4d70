"""The safetensors files of a checkpoint: all there, none cut off, and byte for byte as recorded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.progress import bytes_bar, human
from helpers.types import WorkbookError

if TYPE_CHECKING:
    from huggingface_hub import SafetensorsFileMetadata

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
READERS = 4  # threads that hash: more files at once than one core can hash, few enough for a spinning disk


class LoadError(WorkbookError):
    """A model cannot be found or loaded, or what was loaded is not what was asked for."""

    exit_code = 1


@dataclass(frozen=True)
class Shards:
    """What a checkpoint's files hold, by tensor name: the file, the bytes there, the shape.

    ``hashes`` are the SHA-256 by file name that the index records, if it does.
    """

    folder: Path
    files: dict[str, str]
    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    hashes: dict[str, str]


def inspect(folder: Path) -> Shards:
    """Read the index and the header of every file, and no weights: a moment, whatever the size.

    Raises LoadError, naming the file, where one is missing, cut off or no safetensors, or lacks what the index says.
    """
    index = _index(folder)
    names = sorted(set(index["weight_map"].values()) if index else {SINGLE})
    if absent := [name for name in names if not (folder / name).exists()]:
        raise LoadError(_absent(folder, absent, len(names), sharded=bool(index)))
    headers = {name: _header(folder / name) for name in names}
    files = {tensor: name for name, header in headers.items() for tensor in header.tensors}
    for tensor, name in (index["weight_map"] if index else {}).items():
        if tensor not in headers[name].tensors:
            raise LoadError(f"{folder / name} lacks {tensor}, which {INDEX} says is there. {_again(folder / name)}")
    tensors = {tensor: info for header in headers.values() for tensor, info in header.tensors.items()}
    return Shards(
        folder=folder,
        files=files,
        sizes={tensor: info.data_offsets[1] - info.data_offsets[0] for tensor, info in tensors.items()},
        shapes={tensor: tuple(info.shape) for tensor, info in tensors.items()},
        hashes=_recorded(index),
    )


def verify(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Hash a checkpoint's files (of ``names`` only, if given) and return those that are not as recorded.

    Recorded are the SHA-256 in the index's metadata (see ``record``), and in the Hugging Face cache the name under
    which a file is kept: its SHA-256, or for small files git's SHA-1. Reads every byte, so it takes as long as that;
    a bar says how far it is. Raises LoadError where nothing is recorded.
    """
    hashes = cached_hashes(folder) | _recorded(_index(folder))
    wanted = {name: hashes[name] for name in (hashes if names is None else names) if name in hashes}
    if not wanted and names is None:
        raise LoadError(f"{folder} cannot be verified: neither {INDEX} nor a Hugging Face cache records its hashes.")
    sizes = {name: (folder / name).stat().st_size for name in wanted}

    def differs(name: str) -> bool:
        found = _git_hash(folder / name) if len(wanted[name]) == 40 else file_hash(folder / name)
        bar.update(sizes[name])
        return found != wanted[name]

    with bytes_bar(sum(sizes.values()), "Verifying files") as bar, ThreadPoolExecutor(READERS) as pool:
        return [name for name, wrong in zip(wanted, pool.map(differs, wanted), strict=True) if wrong]


def damaged(folder: Path, names: Iterable[str]) -> str:
    """The text that says which files are damaged, and what to do."""
    paths = [folder / name for name in names]
    return f"{', '.join(map(str, paths))}: not the bytes that were recorded. {_again(*paths)}"


def record(folder: Path) -> None:
    """Write the SHA-256 of a sharded checkpoint's files into its index: ``{"metadata": {"sha256": {file: hash}}}``.

    From then on every load of a copy notices damage.
    """
    index = _index(folder)
    if not index:
        raise LoadError(f"{folder} has no {INDEX} to record hashes in: save the model with several shards.")
    hashes = {name: file_hash(folder / name) for name in sorted(set(index["weight_map"].values()))}
    index["metadata"] = {**index.get("metadata", {}), "sha256": hashes}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def cached_hashes(folder: Path) -> dict[str, str]:
    """The hashes that the Hugging Face cache keeps a snapshot's files under, by file name; empty elsewhere.

    A blob may itself be a link, into a store that the repositories share and that counts by other hashes.
    """
    kept = {
        path.name: Path(os.path.abspath(folder / path.readlink())) for path in folder.iterdir() if path.is_symlink()
    }
    return {
        name: path.name
        for name, path in kept.items()
        if path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", path.name)
    }


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_hash(file: Path) -> str:
    from huggingface_hub.utils.sha import git_hash

    return git_hash(file.read_bytes())


def _index(folder: Path) -> dict[str, Any] | None:
    """The index; None for a checkpoint of one file, which counts where both are there, as in transformers."""
    path = folder / INDEX
    if (folder / SINGLE).exists() or not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return index if index["weight_map"] else None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is no index of a checkpoint: {error!r}. {_again(path)}") from error


def _recorded(index: Mapping[str, Any] | None) -> dict[str, str]:
    return ((index or {}).get("metadata") or {}).get("sha256") or {}


def _absent(folder: Path, names: list[str], total: int, *, sharded: bool) -> str:
    if not sharded:
        return f"{folder} has no file named {SINGLE} or {INDEX}: other formats are not read."
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} of {total} files are missing in {folder}: {shown}. Download or copy them again."


def _header(path: Path) -> SafetensorsFileMetadata:
    """What a file says it holds, once it is as long as that takes."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = parse_local_safetensors_file_metadata(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
    except SafetensorsParsingError as error:
        raise LoadError(f"{path} is damaged: {error} {_again(path)}") from error
    wanted = 8 + length + max((info.data_offsets[1] for info in header.tensors.values()), default=0)
    found = path.stat().st_size
    if found < wanted:
        raise LoadError(f"{path} is cut off: {human(found)} of {human(wanted)} are there. {_again(path)}")
    if found > wanted:
        raise LoadError(f"{path} is damaged: {found - wanted:,} bytes more than its header says. {_again(path)}")
    return header


def _again(*paths: Path) -> str:
    """What to do about damaged files; of a file in the Hugging Face cache, that which its link points to must go."""
    real = ", ".join(str(path.resolve()) for path in paths)
    return f"Delete {real} and download or copy it again."
