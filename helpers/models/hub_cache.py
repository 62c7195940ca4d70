"""The layout of the Hugging Face cache: one folder for each repository, with its references, snapshots and blobs.

    models--tiiuae--falcon-180B/
        refs/main                      the commit that a branch or tag was at when it was last asked for
        snapshots/<commit>/<file>      links into blobs: a repository's files at one commit
        blobs/<hash>                   the contents: SHA-256 for large files, git's SHA-1 for small ones
        blobs/<hash>.*.incomplete      a download that goes on, or was killed
        workbook-verified.txt          written by this project: the blobs that were hashed and found whole, and their
                                       size and times then

Source: "Understand caching" in the documentation of huggingface_hub.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.machine.hardware import download_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from helpers.models.references import ModelRef

VERIFIED = "workbook-verified.txt"
_BLOBS, _REFERENCES, _SNAPSHOTS = "blobs", "refs", "snapshots"
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class _CachedRepository:
    """The folder that the cache keeps for one repository. Nothing of it need exist."""

    folder: Path

    def commit(self, revision: str | None) -> str:
        """The commit that a branch or tag (``main`` for None) refers to; a revision without a reference is a commit."""
        revision = revision or "main"
        reference = self.folder / _REFERENCES / revision
        if reference.is_file():
            return reference.read_text(encoding="utf-8").strip()
        return revision

    def snapshot(self, revision: str | None) -> Path:
        """The folder with the files at a revision."""
        return self.folder / _SNAPSHOTS / self.commit(revision)

    def commit_here(self, revision: str | None) -> str | None:
        """The commit whose files are here for a revision; None if they are missing."""
        snapshot = self.snapshot(revision)
        if not (snapshot / "config.json").is_file():
            return None
        return snapshot.name

    def unverified(self, snapshot: Path) -> dict[str, str]:
        """The files of a snapshot (name: blob) that were never hashed and found whole, or have changed since."""
        verified = self._verified()
        new = {}
        for name, blob in _blob_hashes(snapshot).items():
            if verified.get(blob) != _state(snapshot / name):
                new[name] = blob
        return new

    def add_verified(self, snapshot: Path, files: Mapping[str, str]) -> None:
        """Note that files of a snapshot (name: blob) were hashed as they are now, and found whole."""
        verified = self._verified()
        for name, blob in files.items():
            verified[blob] = _state(snapshot / name)
        partial = self.folder / f"{VERIFIED}.partial"
        lines = [f"{blob} {state}\n" for blob, state in sorted(verified.items())]
        partial.write_text("".join(lines), encoding="ascii")
        # Renamed once it is complete: an interrupted write must not leave half a list.
        partial.replace(self.folder / VERIFIED)

    def _verified(self) -> dict[str, str]:
        """The verified blobs, and the state (size and times) that each had then."""
        file = self.folder / VERIFIED
        verified = {}
        if file.is_file():
            for line in file.read_text(encoding="ascii", errors="replace").splitlines():
                # A line of an earlier version has no state: its blob is hashed again.
                blob, _, state = line.partition(" ")
                verified[blob] = state
        return verified

    def remove_partial(self) -> None:
        """Delete what killed downloads have left: no later one would take it up."""
        from filelock import FileLock, Timeout

        for file in (self.folder / _BLOBS).glob("*.incomplete"):
            blob = file.name.partition(".")[0]
            lock = self.folder.parent / ".locks" / self.folder.name / f"{blob}.lock"
            # Who downloads it now holds its lock.
            with suppress(Timeout, OSError):
                if lock.parent.is_dir():
                    with FileLock(lock, timeout=0):
                        file.unlink(missing_ok=True)
                else:
                    file.unlink(missing_ok=True)

    def remove(self, file: Path, blob: str) -> None:
        """Delete a file of a snapshot and what its link leads to, so that the next download fetches it again."""
        # The blob may itself be a link into a store that several repositories share: that target must go too.
        for path in (file.resolve(), self.folder / _BLOBS / blob, file):
            path.unlink(missing_ok=True)

    def store(self, files: Mapping[str, bytes], revision: str | None) -> None:
        """Write files as a download of ``revision`` would; a branch or tag refers to a made-up commit."""
        revision = revision or "main"
        commit = revision
        snapshots, blobs, references = (self.folder / name for name in (_SNAPSHOTS, _BLOBS, _REFERENCES))
        if not _COMMIT.fullmatch(revision):
            commit = hashlib.sha1(self.folder.name.encode()).hexdigest()
        for folder in (snapshots / commit, blobs, references):
            folder.mkdir(parents=True)
        if commit != revision:
            (references / revision).write_text(commit, encoding="utf-8")
        for name, content in files.items():
            blob = blobs / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshots / commit / name).symlink_to(os.path.relpath(blob, snapshots / commit))


def _state(file: Path) -> str:
    """What changes when a file does: its size and times, and which file it is."""
    status = file.stat()
    # Without the device, whose number differs between the machines that share a cache.
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def repository(model_id: str, cache: Path | None = None) -> _CachedRepository:
    """A model's repository in the Hugging Face cache (``cache``: in another folder with the same layout)."""
    from huggingface_hub.file_download import repo_folder_name

    return _CachedRepository((cache or download_folder()) / repo_folder_name(repo_id=model_id, repo_type="model"))


def _downloaded_bytes(ref: ModelRef, cache: Path | None = None) -> int:
    """Bytes of a hub's safetensors in the cache at the model's revision, at most what is to be downloaded of them."""
    snapshot = repository(ref.id, cache).snapshot(ref.revision)
    # A link whose blob is gone, or was never completed, holds nothing.
    size = sum(path.stat().st_size for path in snapshot.glob("*.safetensors") if path.exists())
    if ref.download_bytes is None:
        return size
    return min(size, ref.download_bytes)


def _blob_hashes(snapshot: Path) -> dict[str, str]:
    """The hashes by which the cache names the blobs of a snapshot's files, by file name; empty for other folders."""
    hashes = {}
    for path in snapshot.iterdir():
        if path.is_symlink():
            # Only the first link is followed: a blob may itself link into a shared store, whose names are other hashes.
            blob = Path(os.path.abspath(snapshot / path.readlink()))  # noqa: PTH100, resolve would follow every link
            if blob.parent.name == _BLOBS and _HASH.fullmatch(blob.name):
                hashes[path.name] = blob.name
    return hashes
