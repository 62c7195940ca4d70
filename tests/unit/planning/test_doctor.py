"""The doctor: each check by what it reads, the hub by a server on this machine, and the command as a person runs it."""

import json
import os
import re
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from helpers import models, planning
from helpers.base import GIB
from helpers.base.files import ROOT
from helpers.cli import app
from helpers.machine import Driver, DriverError, Gpu, Machine, ask_driver, hardware, memory
from helpers.machine.driver import _GpuProcess, _read_driver
from helpers.models import profiles
from helpers.models.workarounds.falcon_linear import needs_repair
from helpers.planning import Finding, doctor, plan, planner, rehearsal
from helpers.planning import findings as findings_module
from helpers.planning.findings import _check_quantization, _check_versions, _product_error

BOX = models.load_profile("8x80gb")
LAPTOP = models.load_profile("laptop")
TOKEN = "hf_" + "Secret" * 6

# `nvidia-smi -q -x`, cut down to what is read and its surroundings.
SMI_HEAD = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<timestamp>Tue Nov 24 05:00:00 2026</timestamp>
	<driver_version>580.95.05</driver_version>
	<cuda_version>13.0</cuda_version>
	<attached_gpus>2</attached_gpus>
"""
SMI_GPU = """	<gpu id="00000000:0{index}:00.0">
		<product_name>NVIDIA A100-SXM4-80GB</product_name>
		<product_brand>NVIDIA</product_brand>
		<uuid>GPU-0000000{index}-0000-0000-0000-000000000000</uuid>
		<fb_memory_usage>
			<total>81920 MiB</total>
			<reserved>634 MiB</reserved>
			<used>{used} MiB</used>
			<free>{free} MiB</free>
		</fb_memory_usage>
		<bar1_memory_usage>
			<total>131072 MiB</total>
			<used>1 MiB</used>
			<free>131071 MiB</free>
		</bar1_memory_usage>
		<processes>{processes}
		</processes>
	</gpu>
"""
SMI_PROCESS = """
			<process_info>
				<gpu_instance_id>N/A</gpu_instance_id>
				<compute_instance_id>N/A</compute_instance_id>
				<pid>{pid}</pid>
				<type>C</type>
				<process_name>{name}</process_name>
				<used_memory>{used}</used_memory>
			</process_info>"""
SMI = (
    SMI_HEAD
    + SMI_GPU.format(index=0, used=0, free=81286, processes="")
    + SMI_GPU.format(
        index=1,
        used=40010,
        free=41276,
        processes=SMI_PROCESS.format(pid=4711, name="/opt/conda/bin/python3", used="40000 MiB")
        + SMI_PROCESS.format(pid=12, name="/usr/lib/xorg/Xorg", used="10 MiB"),
    )
    + "</nvidia_smi_log>\n"
)


def machine(gpus=8, free=79e9, cpus=64, ram=1e12, disk=2e12):
    cards = tuple(Gpu(index, "NVIDIA A100-SXM4-80GB", 85_899_345_920, int(free), (8, 0)) for index in range(gpus))
    return Machine(cards, int(ram), int(ram * 0.9), int(disk), cpus, "EPYC", "Linux", "3.11.2")


def only(findings):
    (finding,) = findings
    return finding


# --- driver and GPUs --------------------------------------------------------------------------------------------------


def test_what_nvidia_smi_says_is_read():
    driver = _read_driver(SMI)
    assert (driver.version, driver.cuda) == ("580.95.05", "13.0")
    assert [gpu.total_bytes for gpu in driver.gpus] == [80 * GIB] * 2
    assert driver.gpus[0].free_bytes == 81286 * 2**20
    assert driver.gpus[0].processes == ()
    assert driver.gpus[1].processes == (
        _GpuProcess(4711, "python3", 40000 * 2**20),
        _GpuProcess(12, "Xorg", 10 * 2**20),
    )


def test_a_memory_that_the_driver_does_not_tell_is_unknown():
    text = SMI.replace("40000 MiB", "N/A")
    assert _read_driver(text).gpus[1].processes[0].used_bytes is None


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program called nvidia-smi, alone, on the path."""

    def put(script):
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "smi.xml").write_text(SMI)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return ask_driver()

    return put


def test_nvidia_smi_is_asked_for_xml(nvidia_smi, tmp_path):
    assert nvidia_smi(f'[ "$*" = "-q -x" ] && cat {tmp_path}/smi.xml') == _read_driver(SMI)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "Driver/library version mism"),
        ("echo 'NVIDIA-SMI has failed because it could not communicate' >&2; exit 9", "could not communicate"),
        ("exit 3", "exit code 3"),
        ("echo 'No devices were found'", "no XML"),
    ],
)
def test_a_driver_that_fails_is_named_with_its_own_words(nvidia_smi, script, words):
    error = nvidia_smi(script)
    assert isinstance(error, DriverError)
    assert words in str(error)
    finding = only(doctor._check_driver(BOX, error, 0, "2.13.0", "13.0"))
    assert (finding.status, finding.found) == ("fail", str(error))


def test_without_a_driver_a_profile_for_gpus_fails_and_the_laptop_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = ask_driver()
    assert "no NVIDIA driver" in str(error)
    assert only(doctor._check_driver(LAPTOP, error, 0, "2.13.0+cpu", None)).status == "skipped"
    assert only(doctor._check_driver(BOX, error, 0, "2.13.0+cpu", None)).status == "fail"


@pytest.mark.parametrize(
    ("cuda", "usable", "status", "words"),
    [
        ("13.0", 2, "ok", "built for CUDA 13.0"),
        ("13.4", 2, "ok", "built for CUDA 13.4"),  # minor versions are compatible
        ("14.0", 2, "fail", "needs CUDA 14.0"),
        (None, 0, "fail", "uses no GPU"),
        ("13.0", 1, "warn", "sees 1 of 2 GPUs"),
    ],
)
def test_torch_and_driver_must_fit(cuda, usable, status, words):
    finding = only(doctor._check_driver(BOX, _read_driver(SMI), usable, "2.13.0", cuda))
    assert finding.status == status
    assert words in finding.found
    assert bool(finding.advice) == (status != "ok")


@pytest.mark.parametrize("name", models.available())
@pytest.mark.parametrize(
    "here",
    [machine(), machine(gpus=0, cpus=2, ram=25e9), machine(gpus=2), machine(cpus=1), machine(ram=4e9)],
)
def test_the_machine_fails_exactly_where_the_runner_would_refuse_it(name, here):
    profile = models.load_profile(name)
    failed = [finding.found for finding in doctor._check_machine(profile, here) if finding.status == "fail"]
    assert failed == [text for text in models.missing(profile, here) if "disk" not in text]


def test_enough_free_memory_is_ok_and_another_process_is_named():
    idle = Driver("580.95.05", "13.0", (_read_driver(SMI).gpus[0],) * 8)
    assert only(doctor._check_free_memory(BOX, machine(), idle)).status == "ok"
    busy = replace(idle, gpus=(*idle.gpus[:7], _read_driver(SMI).gpus[1]))
    finding = only(doctor._check_free_memory(BOX, machine(), busy))
    assert finding.status == "warn"
    assert "python3 (process 4711) holds 39.1 GiB of GPU 7" in finding.found
    assert "Xorg" not in finding.found  # ten MiB are not worth a word


def test_too_little_free_memory_fails_and_says_by_how_much():
    finding = only(doctor._check_free_memory(BOX, machine(free=40e9), _read_driver(SMI)))
    assert finding.status == "fail"
    assert "falcon-180B needs" in finding.found
    assert "falcon-180B-chat needs" in finding.found


@pytest.mark.parametrize("free", [52e9, 58e9, 62e9, 70e9, 76e9])
def test_models_that_share_the_gpus_must_fit_together_as_in_the_plan_and_the_rehearsal(free):
    """In bf16 both chat models hold 510e9 bytes: eight GPUs with 62e9 free hold either, not both."""
    here = machine(free=free)
    finding = only(doctor._check_free_memory(BOX, here, DriverError("not asked")))
    smaller = replace(BOX, requires=replace(BOX.requires, gpu_bytes=int(free)))
    planned = planner._plan_profile(smaller, plan._Here("/", 0, None))
    assert (finding.status == "ok") == planned.fits == (free >= 70e9)
    if finding.status == "fail":
        said = finding.found.partition("Llama-2-70b-chat-hf ")[2]
        assert re.match(
            r"needs [\d.]+ GiB more than 8 devices of [\d.]+ .*GiB left by falcon-180B-chat can hold$", said
        )
        assert said in planned.remedies[-1]
        with pytest.raises(rehearsal.RehearsalError, match=r"needs .* left by tiiuae/falcon-180B-chat can hold"):
            rehearsal._plan(BOX, here)


def test_models_on_a_laptop_share_its_memory():
    needed = sum(
        memory.estimate(config, "bf16", workload=memory.Workload(context_tokens=None)).total
        for config in map(models.config, LAPTOP.models.values())
    )
    for ram, status in [(needed / 0.95 + 1e6, "ok"), (needed / 0.95 - 1e6, "fail")]:
        here = replace(machine(gpus=0), ram_available_bytes=int(ram))
        finding = only(doctor._check_free_memory(LAPTOP, here, DriverError("none")))
        assert finding.status == status
    assert "of memory left by falcon-mini" in finding.found


def test_memory_that_nobody_visible_holds_is_told():
    hidden = replace(_read_driver(SMI).gpus[1], processes=())
    finding = only(doctor._check_free_memory(BOX, machine(), Driver("580", "13.0", (hidden,) * 8)))
    assert finding.status == "warn"
    assert "39.7 GiB of GPU 0 are held by nothing that can be seen from here" in finding.found


# --- disk and models --------------------------------------------------------------------------------------------------


def test_what_is_downloaded_already_is_not_counted_again(tmp_path):
    whole = sum(ref.download_bytes for ref in BOX.models.values())
    assert doctor._left_to_download(BOX, tmp_path / "none") == whole == 856_043_556_864
    snapshot = tmp_path / "models--tiiuae--falcon-180B" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(bytes(2000))
    (snapshot / "pytorch_model.bin").write_bytes(bytes(3000))
    pointer = snapshot.parents[1] / "refs" / "main"
    pointer.parent.mkdir()
    pointer.write_text("0" * 40)
    assert doctor._left_to_download(BOX, tmp_path) == whole - 2000
    one = replace(BOX, falcon_chat=replace(BOX.falcon, format="falcon-chat"))
    assert doctor._left_to_download(one, tmp_path) == 359_045_130_240 + 137_953_296_384 - 2000


@pytest.mark.parametrize(
    ("left", "disk", "status", "words"),
    [
        (10**9, 2e12, "ok", "0.9 GiB to download"),
        (10**18, 2e12, "fail", "931322574.6 GiB to download"),
        (10**9, 1e9, "fail", "of free disk, this machine has 0.9 GiB"),
    ],
)
def test_disk(left, disk, status, words):
    finding = only(doctor._check_disk(BOX, machine(disk=disk), left))
    assert finding.status == status
    assert words in finding.found


def test_a_model_that_is_not_here_is_named():
    assert only(doctor._check_models(LAPTOP, 0)).status == "ok"
    gone = replace(LAPTOP, falcon=replace(LAPTOP.falcon, id="env/models/gone"))
    finding = only(doctor._check_models(gone, 0))
    assert finding.status == "fail"
    assert "env/models/gone" in finding.found


def test_a_model_of_the_hub_is_here_only_with_all_its_files(tmp_path, monkeypatch):
    """Its index and one of its two shards, which is as long as all that was to be downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    names = {f"{number}.weight": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (snapshot / "config.json").write_text("{}")
    save_file({"1.weight": torch.zeros(9)}, snapshot / names["1.weight"])
    ref = replace(BOX.falcon, id="org/tiny", revision="0" * 40, download_bytes=36)
    one = replace(BOX, falcon=ref, falcon_chat=ref, llama_chat=ref)
    left = doctor._left_to_download(one)
    assert left == 0
    finding = only(doctor._check_models(one, left))
    assert (finding.status, finding.advice) == ("warn", "Fetch them: workbook fetch --profile 8x80gb")
    assert "tiny: not all files are here" in finding.found
    save_file({"2.weight": torch.zeros(9)}, snapshot / names["2.weight"])
    assert only(doctor._check_models(one, left)) == Finding("models", "ok", "tiny: here")


def test_a_gpu_that_gives_no_context_and_a_cache_that_cannot_be_read_are_findings(monkeypatch):
    def busy(index):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")

    def unreadable(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(hardware, "_gpu", busy)
    monkeypatch.setattr(profiles, "downloaded_bytes", unreadable)
    monkeypatch.setattr(doctor, "_check_hub", lambda *_: [])
    monkeypatch.setattr(doctor, "_check_quantization", lambda *_: [])
    findings = doctor.examine(BOX)
    assert [(each.name, each.status) for each in findings[:2]] == [("GPUs", "fail"), ("models", "fail")]
    assert findings[0].found.endswith("RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable")
    assert "CUDA_VISIBLE_DEVICES" in findings[0].advice
    assert "Permission denied" in findings[1].found
    assert "797.3 GiB to download" in " ".join(each.found for each in findings)


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The hub's two endpoints that the doctor asks, with the headers by which its client tells errors apart."""

    def do_GET(self):
        if not self.path.endswith(("/whoami-v2", "/auth-check")):  # the client asks for more of its own accord
            self.send_error(404)
            return
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        key = "whoami" if self.path == "/api/whoami-v2" else self.path.split("/")[4]
        status, code = self.server.answers.get(key, (200, ""))
        if status == "hang":
            self.server.over.wait(10)
            return
        body = json.dumps({"type": "user", "name": "ada"} if key == "whoami" else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, asked by the real client; ``answers`` maps whoami or a model's name to (status, code)."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.answers, server.over = [], {}, threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


def ask(left=10**9):
    found = {finding.name: finding for finding in doctor._check_hub(BOX, left)}
    assert TOKEN not in repr(found)
    return found


def test_a_valid_token_and_accepted_licences(hub):
    found = ask()
    assert (found["login"].status, found["login"].found) == ("ok", "the token is ada's")
    assert found["licences"].status == "ok"
    names = ["tiiuae/falcon-180B", "tiiuae/falcon-180B-chat", "meta-llama/Llama-2-70b-chat-hf"]
    assert hub.asked == [
        ("/api/whoami-v2", f"Bearer {TOKEN}"),
        *((f"/api/models/{name}/auth-check", f"Bearer {TOKEN}") for name in names),
    ]


def test_a_licence_that_is_not_accepted_is_named_with_its_page(hub):
    hub.answers = {"falcon-180B": (403, "GatedRepo"), "falcon-180B-chat": (404, "RepoNotFound")}
    finding = ask()["licences"]
    assert finding.status == "fail"
    assert finding.found == (
        "tiiuae/falcon-180B: its licence is not accepted; tiiuae/falcon-180B-chat: the hub answers 404"
    )
    assert "https://huggingface.co/tiiuae/falcon-180B" in finding.advice


def test_a_token_that_the_hub_does_not_know(hub):
    hub.answers = {"whoami": (401, "")}
    found = ask()
    assert list(found) == ["login"]
    assert (found["login"].status, found["login"].found) == ("fail", "the hub does not know the token (401)")


def test_without_a_token_the_hub_still_says_which_licences_need_one(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub.answers = {"falcon-180B": (401, "GatedRepo")}
    found = ask()
    assert (found["login"].status, found["licences"].status) == ("warn", "fail")
    assert {header for _, header in hub.asked} == {None}


def test_a_token_that_cannot_be_one_is_not_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_schlüssel")
    finding = ask()["login"]
    assert finding.status == "fail"
    assert "schl" not in repr(finding)
    assert hub.asked == []


@pytest.mark.parametrize(("left", "status"), [(10**9, "fail"), (0, "skipped")])
def test_a_hub_out_of_reach_matters_only_where_something_is_left_to_download(hub, monkeypatch, left, status):
    from huggingface_hub import constants

    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.3)
    hub.answers = {"whoami": ("hang", "")}
    found = ask(left)
    assert [(name, each.status, each.found) for name, each in found.items()] == [
        ("login", status, "the hub cannot be reached (ReadTimeout)")
    ]
    hub.answers = {"falcon-180B-chat": ("hang", "")}
    assert ask(left)["licences"].status == status
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert ask(left)["login"].found == "the hub cannot be reached (ConnectError)"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ask(left)["login"].found == "HF_HUB_OFFLINE is set: not asked"
    assert ask(left)["login"].status == status


def test_a_hub_with_trouble_of_its_own_is_a_warning(hub):
    hub.answers = {"whoami": (503, "")}
    assert (ask()["login"].status, ask()["licences"].status) == ("warn", "ok")


def test_a_profile_without_the_hub_asks_nobody(hub):
    assert only(doctor._check_hub(LAPTOP, 0)).status == "skipped"
    assert hub.asked == []


# --- the software -----------------------------------------------------------------------------------------------------


def test_the_packages_here_are_those_of_the_lock():
    finding = only(_check_versions())
    assert (finding.status, finding.advice) == ("ok", ""), finding.found


def test_packages_that_differ_or_are_missing_are_named(tmp_path):
    lock = tmp_path / "cpu.txt"
    lock.write_text("# head\n--extra-index-url x\npip==0.1  # via y\nno-such-thing==2 ; sys_platform == 'win32'\n")
    finding = only(_check_versions(lock))
    assert finding.status == "warn"
    assert finding.found.startswith("pip ")
    assert finding.found.endswith(", not 0.1")
    lock.write_text("no-such-thing==2\npip==0.1\n")
    finding = only(_check_versions(lock))
    assert finding.status == "fail"
    assert finding.found.startswith("no-such-thing 2 is not installed, pip ")


# The 16 values of nf4: Dettmers et al. 2023 (arXiv:2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def rounded(weight, precision):
    """A weight as the format stores it, by hand: blocks of 64 for nf4, rows for int8, each scaled by its largest."""
    blocks = weight.reshape(-1, 64) if precision == "nf4" else weight
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    code = np.array(NF4) if precision == "nf4" else np.arange(-127, 128) / 127
    nearest = np.abs(blocks[..., None] / largest[..., None] - code).argmin(-1)
    return (code[nearest] * largest).reshape(weight.shape)


@pytest.mark.parametrize(("precision", "rest"), [("nf4", 0.005), ("int8", 0.006)])
def test_the_error_of_a_product_is_that_of_the_format(precision, rest):
    """``rest``: bfloat16 inputs and outputs, and for int8 the inputs' own rounding."""
    random = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 256, generator=random).numpy().astype(float) for rows in (256, 16))
    exact = inputs @ weight.T
    by_hand = np.linalg.norm(inputs @ rounded(weight, precision).T - exact) / np.linalg.norm(exact)
    measured = _product_error(precision)
    assert abs(measured - by_hand) < rest
    low, high = planning.PRODUCT_ERRORS[precision]
    assert low < measured < high


def test_working_quantization_and_the_repair_are_reported():
    first, second = _check_quantization(LAPTOP, ["cpu"])
    assert (first.name, first.status) == ("bitsandbytes", "ok")
    assert second.name == "Falcon repair"
    assert ("repairs it" in second.found) == needs_repair()


def test_a_layer_that_is_not_quantized_fails(monkeypatch):
    def plain(_, weight):
        layer = torch.nn.Linear(*weight.shape, bias=False).bfloat16()
        layer.load_state_dict({"weight": weight})
        return layer

    monkeypatch.setattr(findings_module, "_quantized_linear", plain)
    assert next(iter(_check_quantization(LAPTOP, ["cpu"]))).status == "fail"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    driver = ask_driver()
    assert len(driver.gpus) >= torch.cuda.device_count()
    for precision, (low, high) in planning.PRODUCT_ERRORS.items():
        assert low < _product_error(precision, "cuda:0") < high


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_check_that_fails_itself_is_a_finding(monkeypatch):
    def broken(*_):
        raise RuntimeError("libcudart.so is missing\nand more")

    monkeypatch.setattr(doctor, "_check_quantization", broken)
    finding = doctor.examine(LAPTOP)[-1]
    assert (finding.name, finding.status) == ("bitsandbytes", "fail")
    assert finding.found == "this check failed unexpectedly: RuntimeError: libcudart.so is missing"


def test_an_unknown_profile_is_a_usage_error():
    result = CliRunner().invoke(app, ["doctor", "--profile", "9x9gb"])
    assert result.exit_code == 2
    assert "9x9gb" in result.stderr


@pytest.mark.parametrize("columns", [80, 160])
def test_findings_are_shown_whole_at_any_width(monkeypatch, columns):
    long = Finding("login", "warn", "no token", f"Models need one. {doctor.NEW_TOKEN}")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding("memory", "fail", "needs 59.6 GiB", "x"), long])
    result = CliRunner().invoke(app, ["doctor", "--profile", "8x80gb"])
    assert result.exit_code == 1
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert long.advice in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1] == "8x80gb cannot run here: see memory"


@pytest.mark.slow
def test_the_laptop_can_run_here_and_the_output_is_json():
    done = subprocess.run(
        [f"{sys.prefix}/bin/workbook", "doctor", "--json"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert (told["profile"], told["can_run"]) == ("laptop", True)
    assert {finding["status"] for finding in told["findings"]} <= {"ok", "warn", "skipped"}


@pytest.mark.slow
def test_the_eight_gpu_profile_says_what_is_missing_and_never_shows_the_token(hub):
    if not models.missing(BOX, hardware.detect()):
        pytest.skip("this machine is that machine")
    hub.answers = {"falcon-180B-chat": (403, "GatedRepo")}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [f"{sys.prefix}/bin/workbook", "doctor", "--profile", "8x80gb", "--json"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    told = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert {"GPUs", "licences"} <= {name for name, finding in told.items() if finding["status"] == "fail"}
    assert told["login"]["found"] == "the token is ada's"
    assert ("/api/whoami-v2", f"Bearer {TOKEN}") in hub.asked
    assert TOKEN not in done.stdout + done.stderr
