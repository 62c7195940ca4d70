"""The safetensors files of a checkpoint: all there, none cut off, and byte for byte as recorded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from helpers.base.errors import WorkbookError, first_names
from helpers.base.hashes import file_hash
from helpers.base.progress import bytes_bar
from helpers.base.units import human
from helpers.models.hub_cache import _blob_hashes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from huggingface_hub import SafetensorsFileMetadata

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READERS = 4  # threads that hash: more files at once than one core can hash, few enough for a spinning disk


class LoadError(WorkbookError):
    """A model cannot be found or loaded, or what was loaded is not what was asked for."""

    exit_code = 1


class _Metadata(TypedDict, total=False):
    total_size: int
    sha256: dict[str, str]  # by file name: written by ``record``


class _Index(TypedDict, total=False):
    """The index of a sharded checkpoint: the file that holds each tensor."""

    metadata: _Metadata
    weight_map: dict[str, str]


@dataclass(frozen=True)
class _Shards:
    """What the files of a checkpoint hold, by tensor name: the file, the bytes there and the shape.

    ``hashes`` are the SHA-256 by file name, if the index records them.
    """

    folder: Path
    files: dict[str, str]
    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    hashes: dict[str, str]


def _inspect(folder: Path) -> _Shards:
    """Read the index and the header of every file, but no weights: this takes a moment, whatever the size.

    Raises LoadError, naming the file, if one is missing, cut off, not in the safetensors format, or without a tensor
    that the index says it holds.
    """
    index = _read_index(folder)
    names = _file_names(index)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise LoadError(_missing_files(folder, missing, len(names)))
    headers = {name: _read_header(folder / name) for name in names}
    shards = _Shards(folder, files={}, sizes={}, shapes={}, hashes=_recorded_hashes(index))
    for name, header in headers.items():
        for tensor, info in header.tensors.items():
            shards.files[tensor] = name
            shards.sizes[tensor] = info.data_offsets[1] - info.data_offsets[0]
            shards.shapes[tensor] = tuple(info.shape)
    for tensor, name in _weight_map(index).items():
        if tensor not in headers[name].tensors:
            file = folder / name
            raise LoadError(f"{file} does not hold {tensor}, although {INDEX} says so. {_advice(file)}")
    return shards


def _checked(folder: Path, verify: bool | None) -> _Shards:
    """Inspect a checkpoint, and hash its files if asked to (``verify`` None: if the index records hashes).

    Raises LoadError for missing or damaged files.
    """
    shards = _inspect(folder)
    if verify is None:
        verify = bool(shards.hashes)
    if verify and (damaged := _damaged_files(folder)):
        paths = [folder / name for name in damaged]
        raise LoadError(f"{', '.join(map(str, paths))}: not the bytes that were recorded. {_advice(*paths)}")
    return shards


def _damaged_files(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """Hash the files of a checkpoint (or only those of ``names``) and return those that differ from their record.

    The record is the SHA-256 in the index's metadata (see ``record``) and, in the Hugging Face cache, the name of the
    blob: its SHA-256, or git's SHA-1 for small files. Every byte is read; a bar shows the progress.
    Raises LoadError if nothing is recorded.
    """
    recorded = _blob_hashes(folder) | _recorded_hashes(_read_index(folder))
    if not recorded and names is None:
        raise LoadError(f"{folder} cannot be verified: neither {INDEX} nor a Hugging Face cache records its hashes.")
    wanted = recorded.keys() if names is None else names
    expected = {name: recorded[name] for name in wanted if name in recorded}
    sizes = {name: (folder / name).stat().st_size for name in expected}

    def is_damaged(name: str) -> bool:
        is_sha1 = len(expected[name]) == 40
        actual = _git_hash(folder / name) if is_sha1 else file_hash(folder / name)
        bar.update(sizes[name])
        return actual != expected[name]

    with bytes_bar(sum(sizes.values()), "Verifying files") as bar, ThreadPoolExecutor(_READERS) as pool:
        results = list(pool.map(is_damaged, expected))
    return [name for name, damaged in zip(expected, results, strict=True) if damaged]


def record(folder: Path) -> None:
    """Write the SHA-256 of a sharded checkpoint's files into its index: ``{"metadata": {"sha256": {file: hash}}}``.

    From then on every load of a copy notices damage.
    """
    index = _read_index(folder)
    if not index:
        raise LoadError(f"{folder} has no {INDEX} to record hashes in. Save the model in several shards.")
    metadata: _Metadata = {**index.get("metadata", {})}
    metadata["sha256"] = {name: file_hash(folder / name) for name in _file_names(index)}
    index["metadata"] = metadata
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, sharded or not."""
    from safetensors import safe_open

    file = _weight_map(_read_index(folder)).get(name, _SINGLE)
    with safe_open(folder / file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def content_hashes(folder: Path) -> dict[str, str]:
    """The hash of each file that decides what a model computes: weights, configuration, tokenizer; by file name.

    In the Hugging Face cache it is the name of the blob, which was compared when it was downloaded; elsewhere the
    SHA-256 of the file.
    """
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    files = [file for file in sorted(folder.iterdir()) if file.suffix == ".safetensors" or file.name in names]
    blobs = _blob_hashes(folder)
    return {file.name: blobs.get(file.name) or file_hash(file) for file in files}


def _git_hash(file: Path) -> str:
    from huggingface_hub.utils.sha import git_hash

    return git_hash(file.read_bytes())


def _read_index(folder: Path) -> _Index | None:
    """The index; None for a checkpoint of one file, which transformers prefers if both are there."""
    path = folder / INDEX
    if (folder / _SINGLE).exists() or not path.exists():
        return None
    try:
        index: _Index = json.loads(path.read_text(encoding="utf-8"))
        return index if index["weight_map"] else None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is not a valid index of a checkpoint: {error!r}. {_advice(path)}") from error


def _weight_map(index: _Index | None) -> dict[str, str]:
    return index["weight_map"] if index else {}


def _file_names(index: _Index | None) -> list[str]:
    return sorted(set(_weight_map(index).values())) or [_SINGLE]


def _recorded_hashes(index: _Index | None) -> dict[str, str]:
    if index is None:
        return {}
    # Some indexes have "metadata": null.
    return (index.get("metadata") or {}).get("sha256") or {}


def _missing_files(folder: Path, names: Sequence[str], total: int) -> str:
    if names[0] == _SINGLE:
        return f"{folder} has no file named {_SINGLE} or {INDEX}. Other formats are not read."
    return f"{len(names)} of {total} files are missing in {folder}: {first_names(names)}. Download or copy them again."


def _read_header(path: Path) -> SafetensorsFileMetadata:
    """What a file says that it holds. Raises LoadError if the file is shorter or longer than that."""
    from huggingface_hub import parse_local_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        header = parse_local_safetensors_file_metadata(path)
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
    except SafetensorsParsingError as error:
        raise LoadError(f"{path} is damaged: {error} {_advice(path)}") from error
    # The format: 8 bytes for the length of the header, the header, then the tensors to the end of the last one.
    tensor_bytes = max((info.data_offsets[1] for info in header.tensors.values()), default=0)
    expected = 8 + length + tensor_bytes
    size = path.stat().st_size
    if size < expected:
        raise LoadError(f"{path} is cut off: {human(size)} of {human(expected)} are there. {_advice(path)}")
    if size > expected:
        raise LoadError(f"{path} is damaged: {size - expected:,} bytes more than its header says. {_advice(path)}")
    return header


def _advice(*paths: Path) -> str:
    """What to do about damaged files."""
    # In the Hugging Face cache a file is a link: deleting the link alone would bring the damaged blob back.
    blobs = ", ".join(str(path.resolve()) for path in paths)
    return f"Delete {blobs} and download or copy it again."
