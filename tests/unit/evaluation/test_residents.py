"""Which precisions of a model are in memory together, and that none stays behind."""

import gc
from dataclasses import replace

import pytest

from helpers.evaluation.residents import _fit_together, _residents, _shortfalls
from helpers.machine import Gpu, anatomy, hardware
from helpers.models import load_profile

pytestmark = pytest.mark.usefixtures("one_thread")
MIB = 2**20


def machine(gpus=0, gpu_bytes=80_000_000_000, ram_bytes=8 * 2**30):
    found = [Gpu(index, "a GPU", gpu_bytes, gpu_bytes, (8, 0)) for index in range(gpus)]
    return replace(hardware.detect(), gpus=tuple(found), ram_available_bytes=ram_bytes)


@pytest.mark.parametrize(
    ("precisions", "together"),
    [(["bf16"], True), (["bf16", "nf4"], True), (["int8", "nf4"], True), (["bf16", "int8", "nf4"], False)],
)
def test_180b_on_eight_gpus(precisions, together):
    """333, 167 and 95 GiB, on 8 x 74.5 GiB of which a twentieth is kept free."""
    config = anatomy.published_config("tiiuae/falcon-180B")
    assert _fit_together(config, precisions, machine(8)) == together


def test_a_processors_memory_is_shared():
    config = anatomy.published_config("tiiuae/falcon-7b")  # 13.4 GiB in bf16, 26.9 in fp32
    assert _fit_together(config, ["fp32", "bf16"], machine(ram_bytes=48 * 2**30))
    assert not _fit_together(config, ["fp32", "bf16"], machine(ram_bytes=36 * 2**30))


def test_what_is_missing_is_named():
    falcon = load_profile("8x80gb").falcon
    assert _shortfalls(falcon, ["fp32", "bf16", "nf4"], machine(8)).keys() == {"fp32"}
    assert "GiB" in _shortfalls(falcon, ["bf16"], machine(2))["bf16"]


@pytest.mark.parametrize(("ram_bytes", "groups"), [(8 * 2**30, [["bf16", "nf4"]]), (60 * MIB, [["bf16"], ["nf4"]])])
def test_residents_come_together_where_they_fit(monkeypatch, ram_bytes, groups):
    falcon, seen, handed_out, here = load_profile().falcon, [], [], machine(ram_bytes=ram_bytes)
    monkeypatch.setattr(hardware, "detect", lambda: here)
    for group in _residents(falcon, ["bf16", "nf4"]):
        assert all("model" not in vars(one) for one in handed_out)
        assert all(one.report.precision == precision for precision, one in group.items())
        seen.append(list(group))
        handed_out += group.values()
    assert seen == groups
    assert all("model" not in vars(one) for one in handed_out)


def test_residents_are_unloaded_when_the_work_fails():
    falcon, kept = load_profile().falcon, []

    def work():
        for group in _residents(falcon, ["bf16"]):
            kept.extend(group.values())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    gc.collect()  # the generator ends when it is collected
    assert "model" not in vars(kept[0])
