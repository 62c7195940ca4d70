"""The layout of the Hugging Face cache, against huggingface_hub's own reading of it."""

import hashlib
import os
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub import scan_cache_dir, try_to_load_from_cache

from helpers import machine
from helpers.models import ModelRef, hub_cache
from helpers.runs.folder import _hub_commit

COMMIT = "5f" * 20
REF = ModelRef("org/tiny", "falcon", "plain", revision=COMMIT)
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 100, "pytorch_model.bin": b"y" * 7}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("revision", [COMMIT, "main", None])
def test_what_is_stored_is_what_the_library_finds(cache, revision):
    repository = hub_cache.repository(REF.id)
    repository.store(FILES, revision)
    (found,) = scan_cache_dir(cache).repos
    (stored,) = found.revisions
    assert (found.repo_id, found.size_on_disk) == (REF.id, sum(map(len, FILES.values())))
    assert {file.file_name for file in stored.files} == set(FILES)
    assert stored.commit_hash == repository.commit(revision) == repository.snapshot(revision).name
    assert stored.refs == (set() if revision == COMMIT else {"main"})
    config = try_to_load_from_cache(REF.id, "config.json", revision=revision)
    assert config == str(repository.snapshot(revision) / "config.json")


def test_hashes_are_the_names_of_the_blobs_and_other_folders_have_none(cache, tmp_path):
    repository = hub_cache.repository(REF.id)
    repository.store(FILES, COMMIT)
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert hub_cache._blob_hashes(repository.snapshot(COMMIT)) == expected
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert hub_cache._blob_hashes(plain) == {}


def test_the_commit_of_a_model_is_known_once_it_is_there(cache):
    repository = hub_cache.repository(REF.id)
    assert repository.commit_here(COMMIT) is None
    repository.store(FILES, COMMIT)
    assert repository.commit_here(COMMIT) == COMMIT
    assert repository.commit_here("main") is None
    assert _hub_commit(REF) == COMMIT
    assert _hub_commit(replace(REF, source="embedded")) is None


def test_downloaded_bytes_are_those_of_safetensors_up_to_what_is_published(cache, tmp_path):
    hub_cache.repository(REF.id).store(FILES, COMMIT)
    assert hub_cache._downloaded_bytes(REF) == hub_cache._downloaded_bytes(REF, cache) == 100
    assert hub_cache._downloaded_bytes(replace(REF, download_bytes=60)) == 60
    assert hub_cache._downloaded_bytes(REF, tmp_path / "elsewhere") == 0


def test_a_blob_is_verified_as_long_as_it_is_the_file_that_was_hashed(cache):
    """C3: another content, at the same size, and a file of the same content that took its place."""
    repository = hub_cache.repository(REF.id)
    repository.store(FILES, COMMIT)
    snapshot = repository.snapshot(COMMIT)
    blobs = hub_cache._blob_hashes(snapshot)
    assert repository.unverified(snapshot) == blobs
    repository.add_verified(snapshot, blobs)
    assert repository.unverified(snapshot) == {}
    file = (snapshot / "config.json").resolve()
    before = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert repository.unverified(snapshot) == {"config.json": blobs["config.json"]}
    repository.add_verified(snapshot, {"config.json": blobs["config.json"]})
    file.unlink()
    file.write_bytes(FILES["config.json"])
    assert repository.unverified(snapshot) == {"config.json": blobs["config.json"]}


def test_a_list_of_an_earlier_version_counts_for_nothing(cache):
    repository = hub_cache.repository(REF.id)
    repository.store(FILES, COMMIT)
    blobs = hub_cache._blob_hashes(repository.snapshot(COMMIT))
    (repository.folder / hub_cache.VERIFIED).write_text("".join(f"{blob}\n" for blob in blobs.values()))
    assert repository.unverified(repository.snapshot(COMMIT)) == blobs


def test_what_a_killed_download_left_is_removed_and_a_live_one_stays(cache):
    """E4."""
    from filelock import FileLock

    repository = hub_cache.repository(REF.id)
    repository.store(FILES, COMMIT)
    dead, live, old = (repository.folder / "blobs" / f"{name}.1234abcd.incomplete" for name in ("d", "e", "f"))
    locks = repository.folder.parent / ".locks" / repository.folder.name
    for file in (dead, live, old):
        file.write_bytes(b"part")
    repository.remove_partial()
    assert not list(repository.folder.rglob("*.incomplete"))
    locks.mkdir(parents=True)
    for file in (dead, live):
        file.write_bytes(b"part")
    (locks / "d.lock").touch()
    with FileLock(locks / "e.lock"):
        repository.remove_partial()
    assert [file.name for file in repository.folder.rglob("*.incomplete")] == [live.name]


def test_the_folder_is_the_library_s(cache):
    assert machine.download_folder() == cache
