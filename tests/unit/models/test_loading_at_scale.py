"""Placement, offload, damaged files, a hub of our own, bars and memory: what a load of hundreds of GiB stands on."""

import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import traceback
import warnings
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from urllib.parse import unquote, urlparse

import huggingface_hub
import huggingface_hub.file_download
import pytest
import torch
from accelerate.utils.modeling import check_device_map
from huggingface_hub.utils.sha import git_hash
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    core_model_loading,
)
from transformers.models.falcon import modeling_falcon
from transformers.utils import logging

from helpers import generation, models
from helpers.base import GIB, WorkbookError
from helpers.base.files import ROOT
from helpers.generation import Sampling
from helpers.machine import Gpu, Machine, anatomy, hardware, memory, placement
from helpers.models import (
    LoadError,
    LoadOptions,
    ModelRef,
    Profile,
    Requirement,
    checkpoint,
    device_map_for,
    hub_cache,
    hub_errors,
    load,
    prepare,
    report_table,
    resolve,
)
from helpers.models import devices as models_devices
from helpers.models import hub as models_hub
from helpers.models.devices import _default_device_map

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 2, 77, 3]])
MINI = ROOT / "env/models/falcon-mini"


def at(folder, **changes) -> ModelRef:
    return replace(ModelRef(id=str(folder), family="falcon", format="falcon-chat", source="embedded"), **changes)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def machine(*gpu_gib: float, ram_gib: float = 64.0) -> Machine:
    gpus = tuple(Gpu(i, "virtual", int(x * GIB), int(x * GIB), (8, 0)) for i, x in enumerate(gpu_gib))
    ram = int(ram_gib * GIB)
    return Machine(gpus, ram, ram, 10**12, 8, "virtual", "Linux", "3.11")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A random Falcon of 180B's flags, 4 layers in bf16 over several files, with falcon-mini's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-falcon"
    config = FalconConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, num_ln_in_parallel_attn=2, alibi=False, bias=False,
        bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
    assert len(list(folder.glob("model-0000*-of-00005.safetensors"))) == 5
    return folder


@pytest.fixture
def copied(sharded, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / sharded.name))


def third(folder: Path) -> Path:
    return folder / "model-00003-of-00005.safetensors"


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


# Where the layers go


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("name", ["tiiuae/falcon-180B", "meta-llama/Llama-2-70b-chat-hf"])
def test_a_machine_of_gpus_is_placed_on_as_planned_and_wholly(name, precision):
    config = anatomy.published_config(name)
    found = device_map_for(config, precision, machine(*[74.5] * 8))
    assert (
        found
        == placement.place(
            config, precision, [int(74.5 * GIB)] * 8, workload=memory.Workload(context_tokens=2048)
        ).device_map
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_device_map(model, found)  # accelerate's: nothing is left out
    owners = [[key for key in found if f"{name}.".startswith(f"{key}.")] for name, _ in model.named_parameters()]
    assert {len(keys) for keys in owners} == {1}
    assert set(found.values()) == set(range(8))


def test_what_does_not_fit_says_what_is_lacking_and_what_would_fit():
    config = anatomy.published_config("tiiuae/falcon-180B")
    planned = placement.place(config, "bf16", [int(74.5 * GIB)] * 4).shortfall
    with pytest.raises(LoadError, match=rf"fit in bf16: it {planned}. Choose int8, which fits.*offload=True"):
        device_map_for(config, "bf16", machine(*[74.5] * 4))
    with pytest.raises(
        LoadError, match=r"needs [\d.]+ GiB more than 1 device of 24.0 GiB can hold. Choose a larger"
    ) as said:
        device_map_for(config, "nf4", machine(24.0))
    assert "offload" not in str(said.value)
    with pytest.raises(
        LoadError, match=r"in bf16: it needs 2\d\d\.\d GiB more than 64.0 GiB of memory .* Choose a larger"
    ):
        device_map_for(config, "bf16", machine(ram_gib=64))


def test_double_quantization_counts_in_the_placement():
    config = anatomy.published_config("tiiuae/falcon-180B")
    tight, short = machine(*[48.2] * 2), memory.Workload(context_tokens=256, double_quant=True)
    with pytest.raises(LoadError, match=r"needs .* can hold"):
        device_map_for(config, "nf4", tight, memory.Workload(context_tokens=256))
    assert set(device_map_for(config, "nf4", tight, short).values()) == {0, 1}
    with pytest.raises(LoadError, match="Choose nf4, which fits"):
        device_map_for(config, "int8", tight, short)
    for refused in (memory.Workload(context_tokens=256), memory.Workload(double_quant=True)):
        with pytest.raises(LoadError, match="Choose a larger machine: no precision fits"):
            device_map_for(config, "nf4", tight, refused)
        with pytest.raises(LoadError, match="Choose a larger machine: no precision fits"):
            device_map_for(config, "int8", tight, refused)


def test_the_cache_that_is_asked_for_counts_in_the_placement(monkeypatch):
    config, two = anatomy.published_config("tiiuae/falcon-180B"), machine(54.0, 54.0)
    assert set(device_map_for(config, "nf4", two).values()) == {0, 1}
    with pytest.raises(LoadError, match=r"needs .* can hold"):
        device_map_for(config, "nf4", two, memory.Workload(cache_heads="library"))
    asked = []
    monkeypatch.setattr(
        models_devices, "device_map_for", lambda *a, **how: asked.append(a[3].cache_heads) or {"": "cpu"}
    )
    for grouped in (True, False):
        load(at(MINI), grouped_cache=grouped)
    assert asked == ["kv", "library"]


def test_offload_fills_gpus_then_memory_then_the_disk_and_never_with_bitsandbytes():
    config = anatomy.published_config("tiiuae/falcon-180B")
    devices = list(device_map_for(config, "bf16", machine(74.5, 74.5, ram_gib=100), offload=True).values())
    assert set(devices) == {0, 1, "cpu", "disk"}
    assert devices == sorted(devices, key=[0, 1, "cpu", "disk"].index)
    with pytest.raises(WorkbookError, match="cannot be offloaded"):
        device_map_for(config, "nf4", machine(24.0, ram_gib=500), offload=True)


def test_the_default_is_this_machine_s(monkeypatch):
    config = anatomy.published_config("tiiuae/falcon-7b")
    assert _default_device_map(AutoConfig.from_pretrained(MINI), "bf16") == {"": "cpu"}
    monkeypatch.setattr(hardware, "detect", lambda: machine(74.5, 74.5))
    assert _default_device_map(config, "bf16") == device_map_for(config, "bf16", machine(74.5, 74.5))


@pytest.fixture
def two_processes(monkeypatch):
    """torchrun's variables for the second of two processes, and two GPUs of 74.5 GiB; lists those that are asked."""
    asked = []

    def gpu(index):
        asked.append(index)
        return machine(74.5, 74.5).gpus[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(hardware, "_gpu", gpu)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    return asked


def test_each_process_of_several_takes_its_own_gpu_and_asks_no_other(two_processes):
    assert _default_device_map(anatomy.published_config("tiiuae/falcon-7b"), "bf16") == {"": 1}
    assert two_processes == [1]


def test_a_process_of_several_is_refused_what_its_one_gpu_cannot_hold(two_processes):
    config = anatomy.published_config("tiiuae/falcon-40b")
    with pytest.raises(LoadError, match=r"needs [\d.]+ GiB more than 1 device of 74.5 GiB can hold. Choose int8"):
        _default_device_map(config, "bf16")
    spread = _default_device_map(config, "bf16", offload=True)
    assert 1 in spread.values()
    assert 0 not in spread.values()


@pytest.mark.parametrize(("rank", "said"), [(None, "not set"), ("2", "2, and there are 2 GPUs"), ("x", "x")])
def test_a_process_of_several_without_a_gpu_of_its_own_is_told_what_to_do(two_processes, monkeypatch, rank, said):
    monkeypatch.delenv("LOCAL_RANK")
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(LoadError, match=rf"LOCAL_RANK is {said}.*torchrun --nproc-per-node 2, or unset WORLD_SIZE"):
        _default_device_map(anatomy.published_config("tiiuae/falcon-7b"), "bf16")


def test_of_several_processes_without_gpus_or_in_a_rehearsal_each_takes_the_processor(
    two_processes, monkeypatch, tmp_path
):
    config = anatomy.published_config("tiiuae/falcon-7b")
    rehearsed = replace(machine(74.5, 74.5), rehearsed=True)
    (tmp_path / "machine.json").write_text(json.dumps(asdict(rehearsed)), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setenv("WORKBOOK_REHEARSAL", str(tmp_path))
        assert set(_default_device_map(config, "bf16").values()) == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "detect", machine)
    assert _default_device_map(config, "bf16") == {"": "cpu"}
    assert two_processes == []


# Layers on disk


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """falcon-mini in files of at most 2 MB."""
    folder = tmp_path_factory.mktemp("mini")
    AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def partly_on_disk(config) -> dict[str, str]:
    """Every second layer on disk."""
    layers = {f"transformer.h.{i}": ("cpu", "disk")[i % 2] for i in range(config.num_hidden_layers)}
    names = ("transformer.word_embeddings", "transformer.rotary_emb", "transformer.ln_f", "lm_head")
    return dict.fromkeys(names, "cpu") | layers


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_model_partly_or_wholly_on_disk_gives_equal_logits_and_replies(mini, precision, whole):
    plain = load(at(mini), precision)
    device_map = {"": "disk"} if whole else partly_on_disk(plain.model.config)
    before = sorted(path.name for path in mini.iterdir())
    loaded = load(at(mini), precision, options=LoadOptions(device_map=device_map))
    assert torch.equal(logits(loaded.model), logits(plain.model))
    sampling = Sampling(temperature=0, max_new_tokens=12)
    texts = [generation.generate(each, "Once upon a time", sampling).token_ids for each in (loaded, plain)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12
    assert sorted(path.name for path in mini.iterdir()) == before


def test_the_report_says_what_is_on_disk_and_does_not_count_it_as_memory(mini):
    plain, loaded = (
        load(at(mini)).report,
        load(at(mini), options=LoadOptions(device_map=partly_on_disk(AutoConfig.from_pretrained(mini)))).report,
    )
    assert loaded.parameters == plain.parameters == sum(loaded.devices.values())
    assert set(loaded.devices) == {"cpu", "disk"}
    assert loaded.stored_bytes == 2 * loaded.devices["cpu"]
    assert plain.stored_bytes == 2 * plain.parameters


def test_offload_on_a_machine_with_too_little_memory_works(mini, monkeypatch):
    config = AutoConfig.from_pretrained(mini)
    small = memory.estimate(config, "bf16").total * 0.9 / GIB
    monkeypatch.setattr(hardware, "detect", lambda: machine(ram_gib=small))
    with pytest.raises(LoadError, match=r"needs .* of memory can hold"):
        load(at(mini), "bf16")
    loaded = load(at(mini), "bf16", offload=True)
    assert loaded.report.devices["disk"] > 0
    monkeypatch.undo()
    assert torch.equal(logits(loaded.model), logits(load(at(mini), "bf16").model))


def test_a_weight_of_another_shape_on_disk_is_refused_and_named(copied):
    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    file = copied / json.loads((copied / checkpoint.INDEX).read_text())["weight_map"][name]
    save_file(load_file(file) | {name: torch.zeros(64, 256, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=rf"1 weights of another shape: {name} \(64, 256\), not \(256, 64\)"):
        load(at(copied), options=LoadOptions(device_map={"": "disk"}))


# Files that are not what they should be


def test_a_shard_cut_in_half_is_named(copied):
    whole = third(copied).read_bytes()
    third(copied).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        LoadError, match=rf"{third(copied)} is cut off: 0\.0 MiB of 0\.1 MiB are there. Delete .* again"
    ):
        load(at(copied))


@pytest.mark.parametrize("length", [0, 5, 200])
def test_a_shard_cut_off_in_its_header_is_named(copied, length):
    third(copied).write_bytes(third(copied).read_bytes()[:length])
    with pytest.raises(LoadError, match=rf"{third(copied)} is damaged: .* Delete"):
        load(at(copied))


def test_a_shard_that_is_too_long_or_no_safetensors_is_named(copied):
    whole = third(copied).read_bytes()
    third(copied).write_bytes(whole + b"\0" * 1500)
    with pytest.raises(LoadError, match=rf"{third(copied)} is damaged: 1,500 bytes more than its header says"):
        load(at(copied))
    third(copied).write_bytes(b"<html>502 Bad Gateway</html>" * 50)
    with pytest.raises(LoadError, match=rf"{third(copied)} is damaged"):
        load(at(copied))


def test_missing_shards_are_named(copied):
    third(copied).unlink()
    with pytest.raises(
        LoadError, match=rf"1 of 5 files are missing in {copied}: {third(copied).name}. Download or copy"
    ):
        load(at(copied))


def test_a_shard_of_another_place_is_named(copied):
    shutil.copy(copied / "model-00002-of-00005.safetensors", third(copied))
    with pytest.raises(LoadError, match=rf"{third(copied)} does not hold transformer\..*, although .*json says so"):
        load(at(copied))


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_an_index_that_is_none_is_named(copied, text):
    (copied / checkpoint.INDEX).write_text(text)
    with pytest.raises(LoadError, match=rf"{checkpoint.INDEX} is not a valid index of a checkpoint"):
        load(at(copied))


def test_one_flipped_byte_is_found_where_the_index_carries_hashes(copied):
    models.record(copied)
    recorded = json.loads((copied / checkpoint.INDEX).read_text())["metadata"]["sha256"]
    assert recorded[third(copied).name] == hashlib.sha256(third(copied).read_bytes()).hexdigest()
    assert len(recorded) == 5
    load(at(copied))
    flip_a_byte(third(copied))
    with pytest.raises(LoadError, match=rf"{third(copied)}: not the bytes that were recorded. Delete") as caught:
        load(at(copied))
    assert "00002" not in str(caught.value)
    load(at(copied), options=LoadOptions(verify=False))


def test_what_has_no_hashes_is_not_called_verified(copied):
    with pytest.raises(LoadError, match="cannot be verified: neither"):
        load(at(copied), options=LoadOptions(verify=True))
    with pytest.raises(LoadError, match="Save the model in several shards"):
        models.record(MINI)


def test_the_headers_are_read_and_nothing_more(copied):
    """What ``inspect`` reads of a file, counted by the system: the header, whatever the size of the weights."""
    big = copied / "model-00001-of-00005.safetensors"
    save_file(
        load_file(big) | {"extra": torch.zeros(2**24)}, big, metadata={"format": "pt"}
    )  # 64 MiB more, all of it unread
    before = _bytes_read()
    found = checkpoint._inspect(copied)
    assert _bytes_read() - before < 2**20
    assert found.sizes["extra"] == 2**26
    assert found.files["extra"] == big.name


def _bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


# A hub


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub, for one repository ``org/tiny`` at one commit, and how a hub refuses.

    ``token``: the one it knows; ``gated``: whether its licence must be accepted, and it is by none.
    ``breaks`` cuts each answer for a file off after so many bytes, as often as its second number says; ``spoils`` names
    a file in which one byte changes on the way.
    """

    folder: Path
    token = "hf_goodgoodgood"
    gated = False
    fault: tuple[int, str] | None = None
    faults: ClassVar[list[int]] = []  # statuses of the next answers, from the last one on
    retry_after = "0"
    page = b""  # what a network answers in the hub's place
    breaks: dict[str, tuple[int, int]]
    spoils = ""
    before_sending = None
    asked: list[tuple[str, str]]
    SHA = "a" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):  # noqa: PLR0911, one for each answer
        path = unquote(urlparse(self.path).path)
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if sent and sent != self.token:
            return self.answer(b"", 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.page:
            return self.answer(self.page, headers={"Content-Type": "text/html"})
        if self.faults and path.startswith("/api/models"):
            return self.answer(b"", self.faults.pop(), {"Retry-After": self.retry_after})
        if self.fault and path.startswith("/api"):
            return self.answer(b"", self.fault[0], {"X-Error-Code": self.fault[1], "Retry-After": "0"})
        if path.startswith("/api/models/org/tiny/tree/"):
            return self.answer(json.dumps([self.row(file) for file in self.folder.iterdir()]).encode())
        if path.startswith("/api/models/org/tiny"):
            return self.answer(json.dumps({"id": "org/tiny", "sha": self.SHA}).encode())
        if self.gated:
            return self.answer(b"", 403 if sent else 401, {"X-Error-Code": "GatedRepo"})
        file = self.folder / path.rsplit("/", 1)[-1]
        return self.send_file(file) if file.is_file() else self.answer(b"", 404)

    def row(self, file):
        large = {"lfs": {"oid": self.etag(file), "size": file.stat().st_size, "pointerSize": 134}}
        row = {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": git_hash(file.read_bytes())}
        return row | (large if file.suffix == ".safetensors" else {})

    @staticmethod
    def etag(file):
        """As on the hub: SHA-256 of large files, git's SHA-1 of the rest."""
        data = file.read_bytes()
        return hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git_hash(data)

    def send_file(self, file):
        data, headers = file.read_bytes(), {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": self.SHA}
        if self.command == "HEAD":
            return self.answer(data, headers=headers)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.asked.append((file.name, self.headers.get("Range") or ""))
        if self.before_sending:
            self.before_sending()
        if file.name == self.spoils:
            data = data[:-1] + bytes([data[-1] ^ 1])
        body, (limit, times) = data[start:], self.breaks.get(file.name, (0, 0))
        if times:
            self.breaks[file.name] = (limit, times - 1)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self.answer(body, 206 if start else 200, headers, limit if times else len(body))

    def answer(self, body, status=200, headers=None, length=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:length])

    def log_message(self, *arguments):
        pass


def point_hub_at(monkeypatch, address: str) -> None:
    """What HF_ENDPOINT does, for a library that is imported already."""
    constants = huggingface_hub.constants
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", address)


HUB_REF = ModelRef(id="org/tiny", family="falcon", format="falcon-chat", revision="main")


@pytest.fixture
def hub(copied, tmp_path, monkeypatch):
    """A hub on this machine that serves the checkpoint, and an empty cache for what is downloaded."""
    (copied / "pytorch_model.bin").write_bytes(b"never wanted")
    (copied / "modeling.py").write_text("raise SystemExit('never run')\n", encoding="utf-8")
    handler = type("Served", (Hub,), {"folder": copied, "asked": [], "breaks": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point_hub_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # The library waits a second before each of its five new tries.
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(hub_errors, "_WAITS", (0, 0))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_downloaded_without_pickles_or_code(hub, sharded):
    loaded = load(HUB_REF)
    folder = resolve(HUB_REF)
    assert torch.equal(logits(loaded.model), logits(load(at(sharded)).model))
    assert (folder.name, len(list(folder.glob("*.safetensors")))) == (Hub.SHA, 5)
    assert not list(folder.glob("*.py")) + list(folder.glob("*.bin"))


def test_a_downloaded_model_loads_when_the_hub_is_gone(hub, monkeypatch):
    resolve(HUB_REF)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load(HUB_REF, "nf4").report.quantized_layers == 16


def test_the_configuration_alone_can_be_had(hub, tmp_path):
    assert models.config(HUB_REF).num_kv_heads == 2
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("main", f"commit {Hub.SHA} (what main was: the profile pins no commit)"),
        (Hub.SHA, f"commit {Hub.SHA} (as pinned)"),
    ],
)
def test_the_commit_that_was_loaded_is_reported(hub, sharded, capsys, revision, said):
    loaded = load(replace(HUB_REF, revision=revision))
    assert loaded.report.commit == said
    assert dict(report_table(loaded).itertuples(index=False))["commit"] == said
    assert load(at(sharded)).report.commit is None


def test_prepare_downloads_says_which_commit_and_verifies_when_asked(hub, sharded, capsys):
    same = {"requires": Requirement(), "budgets": {}, "resident": (), "precision": "bf16", "precisions": ("bf16",)}
    profile = Profile("tiny", "", falcon=HUB_REF, falcon_chat=at(sharded), llama_chat=at(sharded), **same)
    prepare(profile, verify=True)
    said = capsys.readouterr().out
    assert f"s, commit {Hub.SHA} (what main was: the profile pins no commit)\n" in said
    assert said.count("commit") == 2
    assert prepare(profile, verify=False) == {"org/tiny": Hub.SHA}


def test_a_blob_that_changes_later_is_found_removed_and_downloaded_again(hub, copied):
    """C3."""
    folder = resolve(HUB_REF)
    flip_a_byte(third(folder).resolve())
    for ask in (resolve, load):
        with pytest.raises(LoadError, match=f"damaged, and removed: {third(folder).name}"):
            ask(HUB_REF)
        assert third(resolve(HUB_REF)).read_bytes() == third(copied).read_bytes()
        flip_a_byte(third(folder).resolve())


def test_bits_that_a_disk_loses_are_found_once_a_run(hub, tmp_path):
    """C3: nothing changes but the content (here: the record says that this file was hashed as it is)."""
    folder = resolve(HUB_REF)
    flip_a_byte(third(folder).resolve())
    repository = hub_cache.repository("org/tiny")
    repository.add_verified(folder, hub_cache._blob_hashes(folder))
    assert resolve(HUB_REF) == folder
    with pytest.raises(LoadError, match=f"damaged, and removed: {third(folder).name}"):
        resolve(HUB_REF, verify=True)


def test_a_broken_connection_is_taken_up_where_it_broke(hub, copied, monkeypatch):
    """The rest of the file is asked for, from the last piece of 10,000 bytes on (of 10 MB, outside of this test)."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    name = third(copied).name
    hub.breaks[name] = (45_000, 1)
    folder = resolve(HUB_REF)
    assert [sent for file, sent in hub.asked if file == name] == ["", "bytes=40000-"]
    assert (folder / name).read_bytes() == third(copied).read_bytes()


@pytest.mark.slow
def test_an_interrupted_download_goes_on_with_the_files_that_are_missing(hub, copied, tmp_path):
    name = third(copied).name
    hub.breaks[name] = (0, 100)
    with pytest.raises(LoadError, match=r"connection to the hub broke. Load it again: complete files are kept"):
        resolve(HUB_REF)
    whole = {path.name for path in (tmp_path / "hub").rglob("*.safetensors")}
    assert name not in whole
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.breaks.clear()
    hub.asked.clear()
    folder = resolve(HUB_REF)
    assert {file for file, _ in hub.asked}.isdisjoint(whole)
    assert (folder / name).read_bytes() == third(copied).read_bytes()


def test_a_file_damaged_on_the_way_is_removed_named_and_fetched_again(hub, copied):
    hub.spoils = third(copied).name
    with pytest.raises(LoadError, match=f"damaged, and removed: {hub.spoils}. Load it again"):
        load(HUB_REF)
    hub.spoils = ""
    hub.asked.clear()
    load(HUB_REF)
    assert [file for file, _ in hub.asked] == [third(copied).name]


def verified(tmp_path) -> set[str]:
    lines = (tmp_path / "hub" / "models--org--tiny" / hub_cache.VERIFIED).read_text().splitlines()
    return {line.split()[0] for line in lines}


def test_a_file_damaged_before_an_interruption_is_found_after_it(hub, copied, tmp_path):
    hub.breaks[third(copied).name] = (0, 100)
    hub.spoils = "model-00001-of-00005.safetensors"
    with pytest.raises(LoadError, match="connection to the hub broke"):
        resolve(HUB_REF)
    assert list((tmp_path / "hub").rglob(hub.spoils))  # complete, by its length
    hub.breaks.clear()
    spoiled, hub.spoils = hub.spoils, ""
    with pytest.raises(LoadError, match=f"damaged, and removed: {spoiled}. Load it again"):
        resolve(HUB_REF)
    assert checkpoint._damaged_files(resolve(HUB_REF)) == []


def test_each_file_is_hashed_once_until_it_is_downloaded_again(hub, copied, tmp_path, monkeypatch):
    hashed, original = [], models_hub._damaged_files
    monkeypatch.setattr(
        models_hub, "_damaged_files", lambda *args: (hashed.append(sorted(args[1])), original(*args))[1]
    )
    folder = resolve(HUB_REF)
    assert resolve(HUB_REF) == folder
    assert hashed == [sorted(path.name for path in folder.iterdir())]
    assert verified(tmp_path) == {path.resolve().name for path in folder.iterdir()}
    third(folder).resolve().unlink()
    hub.spoils = third(copied).name
    with pytest.raises(LoadError, match=f"removed: {hub.spoils}"):
        resolve(HUB_REF)
    assert hashed[1:] == [[third(copied).name]]
    hub.spoils = ""
    assert resolve(HUB_REF) == folder
    assert hashed[2:] == [[third(copied).name]]
    assert models_hub.is_here(HUB_REF)


def test_a_blob_that_is_a_link_into_a_shared_store_is_verified_and_mended(hub, copied, tmp_path):
    """As huggingface_hub lays out what it got through Xet: under another hash, in a folder above the repositories."""
    folder = resolve(HUB_REF)
    (tmp_path / "hub" / "models--org--tiny" / hub_cache.VERIFIED).unlink()
    blob, shared = third(folder).resolve(), tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert resolve(HUB_REF) == folder
    assert blob.name in verified(tmp_path)
    flip_a_byte(shared)
    with pytest.raises(LoadError, match=f"removed: {third(folder).name}"):
        resolve(HUB_REF)
    assert third(resolve(HUB_REF)).read_bytes() == third(copied).read_bytes()


def test_a_run_s_commit_is_asked_for_instead_of_the_profile_s_revision(hub, monkeypatch):
    folder = resolve(HUB_REF)
    hub.SHA = "b" * 40
    monkeypatch.setenv("WORKBOOK_REVISIONS", json.dumps({"org/tiny": folder.name, "org/other": "c" * 40}))
    assert resolve(HUB_REF) == folder
    assert load(HUB_REF).report.commit == f"commit {folder.name} (what main was: the profile pins no commit)"
    monkeypatch.delenv("WORKBOOK_REVISIONS")
    assert resolve(HUB_REF).name == "b" * 40


def test_a_model_is_here_once_all_its_files_are(hub):
    assert not models_hub.is_here(HUB_REF)
    models.config(HUB_REF)
    assert not models_hub.is_here(HUB_REF)
    folder = resolve(HUB_REF)
    assert models_hub.is_here(HUB_REF)
    (folder / "tokenizer.json").unlink()
    assert not models_hub.is_here(HUB_REF)
    resolve(HUB_REF)
    third(folder).resolve().unlink()
    assert not models_hub.is_here(HUB_REF)


def test_the_cache_is_verified_when_asked_and_mended(hub):
    folder = resolve(HUB_REF)
    assert load(HUB_REF, options=LoadOptions(verify=True)).report.commit
    assert set(hub_cache._blob_hashes(folder)) == {path.name for path in folder.iterdir()}
    flip_a_byte(third(folder).resolve())
    flip_a_byte((folder / "tokenizer.json").resolve())
    with pytest.raises(LoadError) as caught:
        load(HUB_REF, options=LoadOptions(verify=True))
    for name in (third(folder).name, "tokenizer.json"):
        assert name in str(caught.value)
    assert load(HUB_REF, options=LoadOptions(verify=True)).report.commit


def test_a_shard_cut_off_in_the_cache_is_mended(hub):
    folder = resolve(HUB_REF)
    blob = third(folder).resolve()
    os.truncate(blob, blob.stat().st_size // 2)
    with pytest.raises(LoadError, match=rf"damaged, and removed: {third(folder).name}"):
        load(HUB_REF)
    assert load(HUB_REF).report.parameters


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        ((404, "RepoNotFound"), "does not exist or is private"),
        ((404, "RevisionNotFound"), "has no revision main"),
        ((404, ""), r"answered 404 \(Not Found\). Check HF_ENDPOINT"),
        ((429, ""), r"answered 429 \(Too Many Requests\). Wait 0 s and try again, or run `hf auth login`"),
        ((500, ""), r"answered 500 \(Internal Server Error\). The hub cannot be reached now: try again later"),
        ((503, "Busy"), r"answered 503 \(Service Unavailable\). The hub cannot be reached now"),
        ((403, "Forbidden"), "token may not read it. Give it read access to gated repositories"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, fault, advice):
    hub.fault = fault
    with pytest.raises(LoadError, match=advice):
        resolve(HUB_REF)


@pytest.mark.parametrize("token", [None, Hub.token])
def test_a_licence_that_is_not_accepted_is_explained(hub, monkeypatch, token):
    """Without a token the hub answers 401, with that of an account that has not accepted 403."""
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    page = "https://huggingface.co/org/tiny"
    for ask in (resolve, models.config, load):
        with pytest.raises(LoadError, match=f"licence must be accepted. Do so on {page}, then run `hf auth login`"):
            ask(HUB_REF)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_hub_that_recovers_is_asked_again_and_the_wait_is_said(hub, status, capsys):
    """F16: three answers of this status (the library itself asks twice), then the right one."""
    hub.faults = [status] * 3
    assert resolve(HUB_REF).name == Hub.SHA
    assert hub.faults == []
    said = capsys.readouterr().err
    assert f"answered {status}" in said
    assert "Trying again in 0 s" in said


def test_a_hub_that_asks_for_an_hour_is_not_waited_for(hub):
    hub.faults, hub.retry_after = [429] * 9, "3600"
    started = time.monotonic()
    with pytest.raises(LoadError, match=r"Wait 3600 s and try again"):
        resolve(HUB_REF)
    assert time.monotonic() - started < 5


def test_a_login_page_is_named(hub):
    hub.page = b"<html><body>Please log in</body></html>"
    for ask in (resolve, models.config):
        with pytest.raises(LoadError, match=r"something that no hub sends, such as the login page"):
            ask(HUB_REF)


def test_a_wrong_token_is_explained_and_never_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    for ask in (resolve, models.config, load):
        with pytest.raises(LoadError, match=r"does not know this token. Make a new one .* `hf auth login`") as caught:
            ask(HUB_REF)
        assert "hf_wrong" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    resolve(HUB_REF)


def test_a_hub_that_cannot_be_reached_is_explained(hub, monkeypatch):
    point_hub_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(LoadError, match=r"hub cannot be reached.*profile laptop"):
        resolve(HUB_REF)


def test_a_download_that_is_not_complete_is_explained_where_there_is_no_hub(hub, monkeypatch):
    third(resolve(HUB_REF)).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="download is not complete and the hub cannot be reached"):
        load(HUB_REF)


# A disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_explained_before_the_download(hub, small_disk, monkeypatch):
    (small_disk / "other").write_bytes(bytes(2**19))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    with pytest.raises(LoadError, match=r"needs \d\.\d MiB more on disk, and .*disk.* has 0\.\d MiB. .*HF_HOME"):
        resolve(HUB_REF)
    assert hub.asked == []


def test_a_disk_that_fills_up_during_the_download_is_explained(hub, small_disk, monkeypatch):
    """There was enough room when it began; another program takes it."""

    def fill():
        with (small_disk / "other").open("wb") as other:
            shutil.copyfileobj(open("/dev/zero", "rb"), other)  # noqa: SIM115

    def fill_once():
        hub.before_sending = None
        with pytest.raises(OSError, match="No space left"):
            fill()

    for file in hub.folder.glob("model-0000[45]*"):
        file.write_bytes(file.read_bytes()[:1000])  # small enough for the disk
    hub.before_sending = staticmethod(fill_once)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(small_disk / "hub"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LoadError, match=r"the disk of .*hub is full. Free some space, or set HF_HOME .* try again"):
            resolve(HUB_REF)


# Interrupted


def test_an_interrupted_load_leaves_nothing_broken(sharded, monkeypatch):
    """A real Ctrl-C, after the fifth weight of a quantizing load, which has the library patched and a bar drawn."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    layer, hook = modeling_falcon.FalconLinear, logging.set_tqdm_hook(None)
    logging.set_tqdm_hook(hook)
    original, seen = core_model_loading.set_param_for_module, []

    def interrupted(*arguments):
        seen.append(arguments[1])
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    before = {path.name: path.stat().st_mtime_ns for path in sharded.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(core_model_loading, "set_param_for_module", interrupted)
        for precision in ("nf4", "bf16"):
            seen.clear()
            with pytest.raises(KeyboardInterrupt):
                load(at(sharded), precision)
            assert len(seen) == 5
    signal.signal(signal.SIGINT, handler)
    assert modeling_falcon.FalconLinear is layer
    assert logging.set_tqdm_hook(hook) is hook
    assert {path.name: path.stat().st_mtime_ns for path in sharded.iterdir()} == before
    assert load(at(sharded), "nf4").report.quantized_layers == 16
    plain = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.bfloat16)
    assert torch.equal(logits(load(at(sharded), "bf16").model), logits(plain))


# What a person sees

SLOW = """
import sys, time
from transformers import core_model_loading
from helpers.models import ModelRef, load
original = core_model_loading.set_param_for_module
def slow(*arguments):
    time.sleep(0.12)
    return original(*arguments)
core_model_loading.set_param_for_module = slow
load(ModelRef(id=sys.argv[1], family="falcon", format="falcon-chat", source="embedded"))
"""


@pytest.mark.slow
def test_a_long_load_shows_the_bytes_the_shard_and_the_device(sharded):
    """In a terminal of its own; 35 weights, each slowed down to 0.12 s."""
    end, terminal = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    command = [sys.executable, "-c", SLOW, str(sharded)]
    with subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=terminal, stdin=terminal) as process:
        os.close(terminal)
        shown = ""
        while process.poll() is None or not shown:
            try:
                shown += os.read(end, 4096).decode()
            except OSError:
                break
    os.close(end)
    assert process.returncode == 0, shown
    steps = re.findall(r"Shard (\d) of 5 to CPU: +(\d+)%\|.*?\| (0\.\d) MiB of 0\.8 MiB \[00:0(\d)<", shown)
    assert len(steps) > 5, shown
    numbers, percents, _, seconds = ([int(float(each)) for each in column] for column in zip(*steps, strict=True))
    assert min(seconds) >= 2
    assert numbers == [*sorted(numbers[:-1]), 1]  # the embeddings, in the first shard, come last
    assert len(set(numbers)) > 1
    assert percents == sorted(percents)
    assert percents[-1] == 100


# Memory of the host

PEAK = """
import json, sys, threading, time
import torch
from helpers.models import LoadOptions, ModelRef, load
from transformers import FalconForCausalLM, AutoTokenizer

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done:
        peaks[-1] = max(peaks[-1], anonymous())
        time.sleep(0.002)

folder, precision, device_map = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ref = ModelRef(id=folder, family="falcon", format="falcon-chat", source="embedded")
load(ModelRef(id=sys.argv[4], family="falcon", format="falcon-chat", source="embedded"), precision)  # warms up
done, peaks, base = False, [0], anonymous()
threading.Thread(target=watch, daemon=True).start()
loaded = load(ref, precision, options=LoadOptions(device_map=device_map))
peaks.append(0)
with torch.inference_mode():
    loaded.model(torch.tensor([[5, 9, 2]]))
done = True
print(json.dumps({"load": peaks[0] - base, "run": peaks[1] - base, "kept": loaded.report.stored_bytes}))
"""
LAYERS, WIDTH = 16, 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """1.4 GB of bf16 in 17 files: a layer each, and the embeddings."""
    folder = tmp_path_factory.mktemp("large")
    config = FalconConfig(
        vocab_size=4096, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=32, num_kv_heads=2,
        new_decoder_architecture=True, num_ln_in_parallel_attn=2, alibi=False, bias=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.architectures = ["FalconForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in FalconForCausalLM(config).named_parameters()}
    names = [[name for name in shapes if name.startswith(f"transformer.h.{i}.")] for i in range(LAYERS)]
    names.append([name for name in shapes if not name.startswith("transformer.h.")])
    files, drawn = {}, {shape: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for shape in set(shapes.values())}
    for number, group in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        save_file({name: drawn[shapes[name]].clone() for name in group}, folder / file)
        files |= dict.fromkeys(group, file)
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "precision"), [("disk", "fp32"), ("cpu", "fp16")])
def test_the_host_s_memory_stays_under_the_stated_bound(large, sharded, where, precision):
    """Anonymous memory (what is not file cache) of a process that loads 1.4 GB in another type than it is stored in.

    Beside what stays: two of the largest tensors with the layers on disk, four on the CPU, and 64 MiB for everything
    else that Python and torch allot. On disk that holds for a forward pass as well.
    """
    names = ("transformer.word_embeddings", "transformer.rotary_emb", "transformer.ln_f", "lm_head")
    device_map = dict.fromkeys(names, "cpu") | {f"transformer.h.{i}": where for i in range(LAYERS)}
    command = [sys.executable, "-c", PEAK, large, precision, json.dumps(device_map), sharded]
    # Freed blocks above 32 MiB, as all matrices of Falcon-180B are, go back to the system at once; here, smaller ones.
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=given_back, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = {"fp32": 4, "fp16": 2}[precision] * 4 * WIDTH * WIDTH
    bound = found["kept"] + (2 if where == "disk" else 4) * largest + 2**26
    assert total > 1.3e9
    assert found["load"] < bound
    if where == "disk":
        assert found["run"] < bound
        assert 5 * bound < total
    print(f"{where}: {found}, bound {bound}, checkpoint {total}")
