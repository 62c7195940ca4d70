"""Quantized copies: saved once, read by later loads, never another model's, and how many bytes that saves."""

import json
import shutil
import threading
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from transformers import core_model_loading

from helpers import models
from helpers.machine import memory, published_config
from helpers.models import QuantizationError, kept
from helpers.planning import rehearsal


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Tiny checkpoints as the hub has the real ones: 81 shards, the head stored although it is tied."""
    return rehearsal.prepare(models.load_profile("8x80gb"), tmp_path_factory.mktemp("rehearsal") / "here")


@pytest.fixture
def quantized(prepared):
    """Where copies go in a rehearsal; each test begins without any."""
    folder = prepared.folder / "quantized"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def refs(prepared, monkeypatch, quantized):
    """Falcon and its chat model, which keep nf4."""
    from huggingface_hub import constants

    for name, value in prepared.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(prepared.folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    profile = models.load_profile("8x80gb")
    return replace(profile.falcon, keep=("nf4",)), replace(profile.falcon_chat, keep=("nf4",))


@pytest.fixture
def taken(monkeypatch):
    """The bytes of every tensor that transformers takes out of a file, counted where it does so."""
    counted = []
    original = core_model_loading._materialize_copy

    def counting(tensor, device=None, dtype=None):
        whole = tensor[...]
        counted.append(whole.nbytes)
        return original(whole, device, dtype)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", counting)
    return counted


def test_a_copy_is_read_by_other_threads_than_the_one_that_waits(refs, monkeypatch):
    """While it quantizes, transformers reads in one thread; what is quantized already, in up to four."""
    threads = []
    original = core_model_loading._materialize_copy

    def noted(*arguments):
        threads.append(threading.get_ident())
        return original(*arguments)

    monkeypatch.setattr(core_model_loading, "_materialize_copy", noted)
    models.load(refs[0], "nf4")
    assert set(threads) == {threading.get_ident()}
    threads.clear()
    models.load(refs[0], "nf4")
    assert threading.get_ident() not in threads
    assert 1 <= len(set(threads)) <= core_model_loading.GLOBAL_WORKERS


def logits(loaded):
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        return loaded.model(ids).logits


def copies(quantized):
    return sorted(path.name for path in quantized.iterdir())


def test_the_second_load_reads_the_copy_and_gives_the_same_model(refs, taken, quantized):
    falcon, _ = refs
    first = models.load(falcon, "nf4")
    published = sum(taken)
    assert (first.report.copied, first.report.read_bytes) == (False, published)
    expected = logits(first)
    taken.clear()
    second = models.load(falcon, "nf4")
    assert (second.report.copied, second.report.read_bytes) == (True, sum(taken))
    assert torch.equal(logits(second), expected)
    assert second.report.quantized_layers == second.report.linear_layers > 0
    # transformers' own reader counted: the published head is read although it is tied, the copy's is not stored.
    size = 2 * sum(p.numel() for p in models.load(replace(falcon, keep=()), "bf16").model.parameters())
    head = second.model.lm_head.weight.nbytes
    assert published == size + head
    stored = models.stored_bytes(second.model)
    assert stored <= second.report.read_bytes < 1.05 * stored
    assert len(copies(quantized)) == 1


def test_at_full_size_a_copy_is_less_than_a_third_of_the_published_files():
    """The bytes that the loader read above are those of the tensors, so the real ones follow from the shapes."""
    real = published_config("tiiuae/falcon-180B")
    share = memory.weight_bytes(real, "nf4") / models.load_profile("8x80gb").falcon.download_bytes
    assert 0.28 < share < 0.29


def test_each_checkpoint_and_each_kind_of_scales_has_its_own_copy(refs, quantized):
    for ref in refs:
        models.load(ref, "nf4")
    models.load(refs[0], "nf4", options=models.LoadOptions(double_quant=True))
    again = models.load(refs[0], "nf4", options=models.LoadOptions(double_quant=True))
    assert len(copies(quantized)) == 3
    assert again.report.copied
    assert again.model.transformer.h[0].mlp.dense_h_to_4h.weight.quant_state.nested


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_only_the_precisions_that_the_profile_names_are_kept(precision, refs, quantized):
    assert not models.load(refs[0], precision).report.copied
    assert not models.load(refs[0], precision).report.copied
    assert not quantized.exists()


def test_a_copy_that_was_changed_or_cut_is_made_again(refs, quantized):
    expected = logits(models.load(refs[0], "nf4"))
    (folder,) = quantized.iterdir()
    file = next(folder.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    again = models.load(refs[0], "nf4")
    assert not again.report.copied
    assert torch.equal(logits(again), expected)
    (folder / "copy.json").write_text("{")
    assert not models.load(refs[0], "nf4").report.copied
    assert models.load(refs[0], "nf4").report.copied
    assert len(copies(quantized)) == 1


def test_the_copy_of_another_model_does_not_pass_for_this_one(refs, quantized):
    """A folder under the wrong name, its record made to fit: one weight is compared with the published one."""
    falcon, chat = refs
    models.load(falcon, "nf4")
    (mine,) = quantized.iterdir()
    models.load(chat, "nf4")
    (other,) = set(quantized.iterdir()) - {mine}
    shutil.rmtree(mine)
    shutil.copytree(other, mine)
    (mine / "copy.json").write_text(json.dumps(kept._states(mine)))
    with pytest.raises(QuantizationError, match=r"is not .*falcon-180B"):
        models.load(falcon, "nf4")


def test_a_load_that_keeps_nothing_finds_the_copy_too(refs, quantized):
    """As ``training.reload`` does, which knows the model but not the profile."""
    models.load(refs[0], "nf4")
    assert models.load(replace(refs[0], keep=()), "nf4").report.copied
    assert not models.load(replace(refs[1], keep=()), "nf4").report.copied
    assert len(copies(quantized)) == 1


def test_without_space_on_the_disk_the_model_is_loaded_all_the_same(refs, quantized, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _: usage)
    assert models.load(refs[0], "nf4").report.quantized_layers
    assert copies(quantized) == []


def test_a_load_for_training_saves_and_reads_the_weights_as_they_are_stored(refs):
    """The copy is made before any pass, so a CPU that repacks nf4 weights does not spoil it."""
    first = models.load(refs[0], "nf4", unpacked=True)
    again = models.load(refs[0], "nf4", unpacked=True)
    assert again.report.copied
    assert not models.may_repack(again.model)
    assert torch.equal(logits(first), logits(again))
