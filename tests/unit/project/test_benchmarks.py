"""The GPU script runs, on the CPU and in the small: its model is the plan's, and never whole in 16 bit."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from helpers import machine
from helpers.base.files import ROOT
from helpers.machine import Gpu, hardware

FOLDER = ROOT / "env" / "benchmarks"
SCRIPT = FOLDER / "falcon_shapes.py"


def run(*options: str) -> dict:
    command = [sys.executable, SCRIPT, "--device", "cpu", *options]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory returns to the system at once
    done = subprocess.run(command, cwd=ROOT, env=given_back, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_tiny_shape_is_measured_in_every_precision(tmp_path):
    out = tmp_path / "tiny.json"
    result = run("--shape", "tiny", "--context", "32", "--new-tokens", "8", "--out", str(out))
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert [row["precision"] for row in result["figures"]] == ["bf16", "int8", "nf4"]
    for row in result["figures"]:
        assert row["weights_bytes"] == row["planned_weights_bytes"]
        assert row["tokens_per_second"] > 0
        assert row["share_of_limit"] == pytest.approx(row["tokens_per_second"] / row["limit_tokens_per_second"])
        moved = row["weights_bytes"] + 32 * 2 * 2 * 2 * 64 * 2  # context, layers, keys and values, heads of 64, bf16
        assert row["bytes_moved_per_token"] == moved
        assert row["limit_tokens_per_second"] == pytest.approx(row["bandwidth_bytes_per_second"] / moved)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", result["date"])
    assert result["device"]
    assert {"torch", "transformers", "bitsandbytes"} <= set(result["versions"])
    assert result["command"].startswith("falcon_shapes.py --device cpu --shape tiny --context 32")


@pytest.mark.slow
def test_a_model_is_quantized_while_it_is_built_and_never_whole_in_16_bit():
    """16 layers of width 1024 take 0.32 GiB in bf16; in nf4 their weights and the work on one matrix stay under 0.2."""
    row, = run("--shape", "tiny", "--precision", "nf4", "--width", "1024", "--layers", "16", "--context", "8",
               "--new-tokens", "2")["figures"]  # fmt: skip
    whole, largest = 2 * row["parameters"], 2 * 4 * 1024 * 1024
    assert whole > 0.3 * 2**30
    assert row["weights_bytes"] == row["planned_weights_bytes"]
    assert row["weights_bytes"] < row["build_peak_bytes"] < row["weights_bytes"] + 8 * largest + 2**25
    assert row["weights_bytes"] + 8 * largest + 2**25 < whole / 1.7
    assert row["peak_bytes"] < whole


def test_what_does_not_fit_is_a_row_that_says_so():
    row, = run("--shape", "180b", "--precision", "fp32")["figures"]  # fmt: skip
    assert row["parameters"] == 178_557_088_768
    assert re.search(r"needs [\d.]+ GiB more than [\d.]+ GiB of memory can hold", row["skipped"])
    assert "tokens_per_second" not in row


@pytest.mark.parametrize(("device", "index"), [("cuda:1", 1), ("cuda", 0), ("cpu", None)])
def test_the_device_that_is_asked_for_is_the_one_reported_and_planned_for(monkeypatch, device, index):
    spec = importlib.util.spec_from_file_location("falcon_shapes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    sizes = [80 * 2**30, 141 * 2**30]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(hardware, "_gpu", lambda i: Gpu(i, f"GPU of kind {i}", sizes[i], sizes[i], (9, 0)))
    found = [(gpu.name, gpu.free_bytes) for gpu in script._one_device(device).gpus]
    assert found == ([] if index is None else [(f"GPU of kind {index}", sizes[index])])


def test_figures_are_named_after_what_gave_them():
    """No GPU's figures without a GPU: a result here must name one, and the README must not call it unmeasured."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert ("**Unmeasured on a GPU so far.**" in readme) == (not results)
    for result in results:
        assert {"device", "date", "versions", "command", "figures"} <= result.keys()
    planned = machine.weight_bytes(machine.published_config("tiiuae/falcon-180B"), "nf4")
    assert f"{planned / 2**30:.2f} GiB" in readme
