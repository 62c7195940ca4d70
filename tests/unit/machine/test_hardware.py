"""helpers.machine.hardware against psutil, the kernel's own interfaces, numpy's speed and made-up control groups."""

import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.machine import Gpu, hardware


def files(folder, **texts):
    """Control files in a folder; a double underscore in a name stands for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")
    return folder


def membership(tmp_path, text):
    file = tmp_path / "cgroup"
    file.write_text(text)
    return file


def test_detect_agrees_with_the_system():
    machine = hardware.detect()
    limit, left = hardware._memory_limit()
    assert machine.ram_bytes == min(psutil.virtual_memory().total, limit)
    assert 0 < machine.ram_available_bytes <= min(machine.ram_bytes, left * 1.1)
    assert machine.cpu_count == max(1, int(min(len(os.sched_getaffinity(0)), hardware._cpu_limit())))
    assert abs(machine.disk_free_bytes - shutil.disk_usage(ROOT).free) < 2**30
    assert machine.cache_free_bytes == pytest.approx(shutil.disk_usage(Path.home()).free, abs=2**30)
    assert machine.python == platform.python_version()
    assert machine.cpu_name
    assert len(machine.gpus) == torch.cuda.device_count()


def test_affinity_lowers_the_cpu_count():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from helpers import machine; "
    code += "print(machine.detect(gpus=()).cpu_count)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "1"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpus_as_torch_sees_them():
    for gpu, index in zip(hardware.detect().gpus, range(torch.cuda.device_count()), strict=True):
        assert gpu.name == torch.cuda.get_device_name(index)
        assert gpu.compute_capability == torch.cuda.get_device_capability(index)
        assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert hardware.memory_bandwidth(device="cuda").best > 1e11


def test_version_2_limits_of_the_group_and_its_parents(tmp_path):
    statistic = "anon 100\ninactive_file 300\nactive_file 7"
    files(tmp_path / "job", memory__max=8000, memory__current=1000, cpu__max="400000 100000")
    files(
        tmp_path / "job" / "task",
        memory__max="max",
        memory__current=900,
        memory__stat=statistic,
        cpu__max="150000 100000",
    )
    belongs = membership(tmp_path, "0::/job/task\n")
    assert hardware._memory_limit(tmp_path, belongs) == (8000, 7000)
    assert hardware._cpu_limit(tmp_path, belongs) == 1.5


def test_file_cache_counts_as_free(tmp_path):
    files(tmp_path, memory__max=8000, memory__current=5000, memory__stat="anon 2000\ninactive_file 3000")
    assert hardware._memory_limit(tmp_path, membership(tmp_path, "0::/\n")) == (8000, 6000)


def test_the_smallest_limit_and_the_least_left_may_be_those_of_two_groups(tmp_path):
    files(tmp_path / "a", memory__max=9000, memory__current=8500)
    files(tmp_path / "a" / "b", memory__max=4000, memory__current=1000)
    assert hardware._memory_limit(tmp_path, membership(tmp_path, "0::/a/b\n")) == (4000, 500)


def test_version_1_limits(tmp_path):
    statistic = "inactive_file 1\ntotal_inactive_file 500"
    files(tmp_path / "memory" / "box", memory__limit_in_bytes=6000, memory__usage_in_bytes=2000, memory__stat=statistic)
    files(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=10**6)
    files(tmp_path / "cpu,cpuacct" / "box", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    files(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    belongs = membership(tmp_path, "9:cpu,cpuacct:/box\n4:memory:/box\n1:name=systemd:/box\n0::/\n")
    assert hardware._memory_limit(tmp_path, belongs) == (6000, 4500)
    assert hardware._cpu_limit(tmp_path, belongs) == 0.5


def test_a_container_that_sees_its_group_as_the_root(tmp_path):
    files(tmp_path, memory__max=4000, memory__current=1000, cpu__max="max 100000")
    belongs = membership(tmp_path, "0::/docker/0123abcd\n")
    assert hardware._memory_limit(tmp_path, belongs) == (4000, 3000)
    assert hardware._cpu_limit(tmp_path, belongs) == math.inf


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert hardware._memory_limit(tmp_path, tmp_path / "absent") == (math.inf, math.inf)
    assert hardware._cpu_limit(tmp_path, tmp_path / "absent") == math.inf


def test_a_small_quota_still_leaves_one_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "_cpu_limit", lambda: 0.5)
    assert hardware.detect(gpus=()).cpu_count == 1


def test_bandwidth_is_near_numpys():
    source = np.ones(2**24, dtype=np.float32)
    target = source.copy()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    copied = 2 * source.nbytes / statistics.median(seconds)
    assert copied / 4 < hardware.memory_bandwidth(2**26, repeats=5).best < copied * 4


def test_bandwidth_is_the_best_of_several_copies_with_the_slowest_beside_it():
    """B9: a median moved 2.7 times with what else the machine did, and a limit with it."""
    measured = hardware.memory_bandwidth(2**22, repeats=4)
    assert measured.best >= measured.slowest > 0
    assert measured.copies == 4
    assert str(hardware.Bandwidth(71e9, 26e9, 9)) == "71 GB/s, the best of 9 copies (26 the slowest)"


def test_importing_the_group_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'pandas', 'pydantic', 'yaml', 'huggingface_hub'}"
    modules = "driver, hardware, memory, anatomy, packing, pieces, placement, sharding, step"
    code = f"import sys; from helpers.machine import {modules}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_detecting_apart_finds_the_same_machine():
    here, apart = hardware.detect(), hardware.detect_apart()
    assert (apart.gpus, apart.ram_bytes, apart.cpu_count) == (here.gpus, here.ram_bytes, here.cpu_count)


def test_a_machine_that_cannot_be_looked_at_apart_says_why(monkeypatch):
    monkeypatch.setattr(hardware, "DETECT", "import sys; print('noise', file=sys.stderr); raise RuntimeError('no GPU')")
    with pytest.raises(WorkbookError, match=r"could not be examined: RuntimeError: no GPU. Run workbook doctor"):
        hardware.detect_apart()
    monkeypatch.setattr(hardware, "DETECT", "raise SystemExit(3)")
    with pytest.raises(WorkbookError, match="exit code 3"):
        hardware.detect_apart()


def test_only_the_gpus_that_are_asked_for_are_looked_at(monkeypatch):
    monkeypatch.setattr(hardware, "_gpu", lambda index: Gpu(index, "x", 1, 1, (8, 0)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [gpu.index for gpu in hardware.detect().gpus] == [0, 1, 2]
    assert [gpu.index for gpu in hardware.detect(gpus=[1]).gpus] == [1]
    assert hardware.detect(gpus=()).gpus == ()


def fetched_from_disk():
    """Bytes that this process made the system fetch from the storage itself, not from its page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def in_memory(folder):
    """Whether a folder lies on a file system that is memory, from which nothing is fetched."""
    return subprocess.check_output(["stat", "--file-system", "--format=%T", folder], text=True).strip() == "tmpfs"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count what is read")
@pytest.mark.parametrize("takes_direct", [True, False], ids=["direct", "cache emptied"])
def test_disk_speed_is_of_the_disk_and_not_of_the_page_cache(tmp_path, monkeypatch, takes_direct):
    if in_memory(tmp_path):
        pytest.skip("the folder for temporary files is in memory")
    if not takes_direct:
        monkeypatch.delattr(os, "O_DIRECT")
    before = fetched_from_disk()
    start = time.perf_counter()
    speed = hardware.disk_read_speed(tmp_path, size=2**26)
    took = time.perf_counter() - start
    assert fetched_from_disk() - before >= speed.read_bytes
    assert speed.direct == takes_direct
    assert speed.read_bytes in range(2**24, 2**26 + 1, 2**24)
    assert speed.bytes_per_second > speed.read_bytes / took
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_file_is_an_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        hardware.disk_read_speed(tmp_path / "absent")


def test_disk_speed_keeps_its_time(tmp_path):
    start = time.perf_counter()
    speed = hardware.disk_read_speed(tmp_path, size=2**40, seconds=0.2)
    assert 0 < speed.read_bytes < 2**33
    assert time.perf_counter() - start < 20
