"""Files of a training: checkpoints, adapters and their base; whole and the right ones, or refused by name."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import models
from helpers.base.files import ROOT
from helpers.models import ModelRef
from helpers.training import Recipe, TrainingStoppedError, finetune, merge, reload

from .judge import Fault, refused, same

DATA = [
    [{"role": "user", "content": f"Is {thing} an animal?"}, {"role": "assistant", "content": answer}]
    for thing, answer in (("a dog", "Yes."), ("a box", "No."), ("a fly", "Yes."), ("a key", "No."), ("an ox", "Yes."))
]
RECIPE = Recipe(steps=5, batch_size=2, log_every=1, warmup_steps=1, rank=4, alpha=8, evaluate_every=2, dropout=0.1)
WEIGHTS, CONFIG, IDENTITY = "adapter_model.safetensors", "adapter_config.json", "fine_tune.json"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tiny_loaded, tmp_path_factory):
    """The two-layer model in a folder of its own."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny_loaded.model.save_pretrained(folder)
    tiny_loaded.tokenizer.save_pretrained(folder)
    return ModelRef(id=str(folder), family="falcon", format="falcon-chat", source="embedded")


def trained(base, folder, recipe=RECIPE, data=DATA, **options):
    return finetune(models.load(base, "fp32"), data, recipe, folder, **options)


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A finished fine-tune: its folder and its losses."""
    folder = tmp_path_factory.mktemp("done") / "adapter"
    return folder, trained(base, folder).history


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """The same fine-tune, stopped by Ctrl-C in its fourth step: two checkpoints are there, and no adapter."""

    def stop(history):
        if history[-1].step == 4:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "adapter"
    with pytest.raises(KeyboardInterrupt):
        trained(base, folder, on_point=stop)
    same(sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")), ["checkpoint-2", "checkpoint-3"])
    return folder


def copied(folder, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(folder, copy)
    return copy


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def equals(folder, done, base):
    """Judge that the same call ends as the uninterrupted training did, to the last bit."""
    same(trained(base, folder).history, done[1])
    one, two = load_file(folder / WEIGHTS), load_file(done[0] / WEIGHTS)
    same(one.keys(), two.keys())
    same([name for name in one if not torch.equal(one[name], two[name])], [])


# --- checkpoints ------------------------------------------------------------------------------------------------------

NEWEST, OLDER = "checkpoints/checkpoint-3", "checkpoints/checkpoint-2"
DAMAGE = {
    "C5-weights-cut": lambda folder: cut(folder / NEWEST / WEIGHTS),
    "C5-weights-missing": lambda folder: (folder / NEWEST / WEIGHTS).unlink(),
    "C5-optimizer-missing": lambda folder: (folder / NEWEST / "optimizer.pt").unlink(),
    "C5-optimizer-flipped": lambda folder: flip(folder / NEWEST / "optimizer.pt"),
    "C5-scheduler-missing": lambda folder: (folder / NEWEST / "scheduler.pt").unlink(),
    "C5-random-state-missing": lambda folder: (folder / NEWEST / "rng_state.pth").unlink(),
    "C5-state-cut": lambda folder: cut(folder / NEWEST / "trainer_state.json"),
    "C5-state-of-the-older": lambda folder: shutil.copy(folder / OLDER / "trainer_state.json", folder / NEWEST),
    "C5-hashes-missing": lambda folder: (folder / NEWEST / "hashes.json").unlink(),
    "C5-hashes-cut": lambda folder: cut(folder / NEWEST / "hashes.json"),
    "C5-nothing-in-it": lambda folder: shutil.rmtree(folder / NEWEST) or (folder / NEWEST).mkdir(),
    "C5-a-file-in-its-place": lambda folder: shutil.rmtree(folder / NEWEST) or (folder / NEWEST).write_text(""),
    "C5-both-damaged": lambda folder: [cut(folder / name / "optimizer.pt") for name in (NEWEST, OLDER)],
    "C5-a-foreign-one": lambda folder: (folder / "checkpoints/checkpoint-99").mkdir(),
    "C5-identity-cut": lambda folder: cut(folder / IDENTITY),
    "C5-identity-empty": lambda folder: empty(folder / IDENTITY),
    "C5-identity-missing": lambda folder: (folder / IDENTITY).unlink(),
}


@pytest.mark.whole
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_same_call_goes_on_from_what_is_whole_to_the_same_losses(damage, stopped, done, base, tmp_path):
    folder = copied(stopped, tmp_path)
    damage(folder)
    equals(folder, done, base)


@contextmanager
def full_disk(limit: int):
    """No file may grow beyond ``limit`` bytes: writing more fails, as on a full disk."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.whole
@pytest.mark.parametrize("limit", [100, 5_000, 40_000, 100_000], ids=lambda limit: f"C5-full-after-{limit}")
def test_a_full_disk_stops_with_a_sentence_and_loses_nothing(limit, stopped, done, base, tmp_path):
    folder = copied(stopped, tmp_path)
    with full_disk(limit):
        message = refused(lambda: trained(base, folder), "could not be written", error=TrainingStoppedError)
    if str(folder) not in message:
        raise Fault("wrong", f"no folder in the message: {message}")
    same((folder / NEWEST / "hashes.json").exists(), True)
    equals(folder, done, base)


@pytest.mark.whole
def test_a_killed_training_goes_on_to_the_same_losses(base, moments, tmp_path):
    """C5: SIGKILL at random moments, among them those in which a checkpoint is written."""
    script = (
        "import sys, torch\n"
        "from helpers import models, training\n"
        "torch.set_num_threads(1)\n"
        f"ref = models.ModelRef(**{asdict(base)!r})\n"
        f"recipe = training.Recipe(**{asdict(replace(RECIPE, steps=30))!r})\n"
        f"training.finetune(models.load(ref, 'fp32'), {DATA!r}, recipe, sys.argv[1])\n"
    )
    folder = tmp_path / "adapter"
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", script, folder],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 90
        before = set((folder / "checkpoints").glob("checkpoint-*"))
        while child.poll() is None and set((folder / "checkpoints").glob("checkpoint-*")) <= before:
            same(time.monotonic() < end, True)
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        child.kill()
        child.wait()
    whole = trained(base, tmp_path / "whole", replace(RECIPE, steps=30))
    same(trained(base, folder, replace(RECIPE, steps=30)).history, whole.history)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("when", ["B1-from-the-first-step", "B1-from-a-later-step", "B1-held-out"])
def test_a_loss_that_is_not_finite_stops_the_training_and_saves_nothing(when, base, tmp_path):
    recipe, options = replace(RECIPE, steps=20, learning_rate=1, alpha=10**15), {}
    loaded = models.load(base, "fp32")
    words = ["step", "not finite"]
    if when != "B1-from-a-later-step":
        recipe = RECIPE
        with torch.no_grad():
            loaded.model.transformer.h[1].mlp.dense_h_to_4h.weight[3, 3] = math.nan
        words = ["step 1", "h.1.mlp.dense_h_to_4h", "base model"]
    if when == "B1-held-out":
        options, words = {"held_out": DATA[:1]}, ["step 0", "held-out loss is nan"]
    refused(lambda: finetune(loaded, DATA, recipe, tmp_path / "a", **options), *words, error=TrainingStoppedError)
    same(list((tmp_path / "a").glob("adapter*")), [])
    wrong = [
        file
        for file in (tmp_path / "a").rglob("*.safetensors")
        if not all(tensor.isfinite().all() for tensor in load_file(file).values())
    ]
    same(wrong, [])


# --- adapters ---------------------------------------------------------------------------------------------------------


def tensors_changed(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors)
        save_file(tensors if changed is None else changed, folder / WEIGHTS, {"format": "pt"})

    return damage


def json_changed(name, **values):
    def damage(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **values}, indent=2))

    return damage


def set_first(value):
    def change(tensors):
        next(iter(tensors.values()))[0, 0] = value

    return tensors_changed(change)


ADAPTERS = {
    "C6-half-of-the-tensors": (tensors_changed(lambda t: dict(list(t.items())[::2])), "8 of 16 tensors are missing"),
    "C6-one-tensor-less": (tensors_changed(lambda t: dict(list(t.items())[1:])), "1 of 16 tensors are missing"),
    "C6-no-tensor": (tensors_changed(lambda t: {"x": torch.ones(1)}), "16 of 16 tensors are missing"),
    "C6-a-tensor-more": (tensors_changed(lambda t: {**t, "x": torch.ones(1)}), "tensors are not its own: x"),
    "C6-other-names": (
        tensors_changed(lambda t: {name.replace("base_model.model.", ""): t[name] for name in t}),
        "16 of 16 tensors are missing",
    ),
    "C6-layers-swapped": (
        tensors_changed(
            lambda t: {name.replace("h.0", "h.x").replace("h.1", "h.0").replace("h.x", "h.1"): t[name] for name in t}
        ),
        WEIGHTS,
    ),
    "C6-another-shape": (
        tensors_changed(lambda t: {name: (w[:2] if "lora_A" in name else w).contiguous() for name, w in t.items()}),
        "8 of 16 tensors are of another shape",
    ),
    "C6-another-type": (tensors_changed(lambda t: {name: w.half() for name, w in t.items()}), WEIGHTS),
    "C6-other-values": (tensors_changed(lambda t: {name: w * 2 for name, w in t.items()}), WEIGHTS),
    "C6-nan": (set_first(math.nan), "nan or an infinity"),
    "C6-infinity": (set_first(math.inf), "nan or an infinity"),
    "C6-weights-cut": (lambda folder: cut(folder / WEIGHTS), ""),
    "C6-weights-empty": (lambda folder: empty(folder / WEIGHTS), ""),
    "C6-weights-flipped": (lambda folder: flip(folder / WEIGHTS), ""),
    "C6-weights-missing": (lambda folder: (folder / WEIGHTS).unlink(), ""),
    "C6-weights-a-folder": (lambda folder: (folder / WEIGHTS).unlink() or (folder / WEIGHTS).mkdir(), ""),
    "C6-alpha": (json_changed(CONFIG, lora_alpha=16), "alpha is 16"),
    "C6-rank": (json_changed(CONFIG, r=8), "rank is 8"),
    "C6-rslora": (json_changed(CONFIG, use_rslora=True), CONFIG),
    "C6-targets": (json_changed(CONFIG, target_modules=["dense"]), CONFIG),
    "C6-base-of-the-configuration": (json_changed(CONFIG, base_model_name_or_path="gpt2"), CONFIG),
    "C6-configuration-cut": (lambda folder: cut(folder / CONFIG), CONFIG),
    "C6-configuration-a-list": (lambda folder: (folder / CONFIG).write_text("[]"), ""),
    "C6-configuration-missing": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "C6-identity-cut": (lambda folder: cut(folder / IDENTITY), IDENTITY),
    "C6-identity-a-list": (lambda folder: (folder / IDENTITY).write_text("[1]"), IDENTITY),
    "C6-identity-deep": (lambda folder: (folder / IDENTITY).write_text("[" * 99_999), IDENTITY),
    "C6-precision": (json_changed(IDENTITY, precision="bf16"), ""),
    "C6-base": (json_changed(IDENTITY, base={"id": "gpt2"}), ""),
    "C6-base-null": (json_changed(IDENTITY, base=None, recipe=None), ""),
    "C6-tensors-null": (json_changed(IDENTITY, tensors=None), "not finished"),
    "C6-hashes-missing": (lambda folder: (folder / "hashes.json").unlink(), "hashes.json"),
    "C6-hashes-cut": (lambda folder: cut(folder / "hashes.json"), "hashes.json"),
}


@pytest.mark.parametrize(("damage", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_is_not_what_was_saved_is_refused(damage, words, done, tmp_path):
    folder = copied(done[0], tmp_path)
    damage(folder)
    refused(lambda: reload(folder), str(folder), words)
    refused(lambda: merge(folder, tmp_path / "merged"), str(folder), words)
    same((tmp_path / "merged").exists(), False)


def test_an_adapter_that_is_whole_is_loaded_and_merged(done, tmp_path):
    """C6: also one that was moved, and has a note of its owner's beside it."""
    folder = copied(done[0], tmp_path)
    (folder / "notes.txt").write_text("mine")
    shutil.rmtree(folder / "checkpoints")
    same("lora_A" in " ".join(name for name, _ in reload(folder).model.named_parameters()), True)
    merged = merge(folder, tmp_path / "merged")
    same(models.load(merged, "bf16").report.parameters > 0, True)
    refused(lambda: merge(folder, tmp_path / "merged"), "is there already")


BASES = {
    "C7-weights-flipped": lambda folder: flip(folder / "model.safetensors"),
    "C7-epsilon": json_changed("config.json", layer_norm_epsilon=1e-3),
    "C7-rotary-base": json_changed("config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "C7-tokenizer": lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace('"dog"', '"god"', 1) + "\n"
    ),
    "C7-gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", BASES.values(), ids=BASES)
def test_an_adapter_does_not_meet_another_base(damage, done, base, tmp_path):
    folder, identity = copied(done[0], tmp_path), json.loads((done[0] / IDENTITY).read_text())
    kept = tmp_path / "kept"
    shutil.copytree(base.id, kept)
    same(identity["base"]["id"], base.id)
    try:
        damage(ROOT / base.id)
        refused(lambda: reload(folder), "tiny")
        refused(lambda: merge(folder, tmp_path / "merged"), "tiny")
    finally:
        shutil.rmtree(base.id, ignore_errors=True)
        shutil.copytree(kept, base.id)


@pytest.mark.whole
@pytest.mark.parametrize("what", ["C7-resumed", "C6-another-recipe", "C5-an-adapter-of-nobody", "C5-a-file", "A7-name"])
def test_a_folder_of_another_training_is_refused_and_kept(what, done, base, tmp_path):
    folder, recipe, ref = copied(done[0], tmp_path), RECIPE, base
    weights = (folder / WEIGHTS).read_bytes()
    words = "Choose"
    if what == "C7-resumed":
        shutil.copytree(base.id, tmp_path / "base")
        ref = replace(base, id=str(tmp_path / "base"))
        words = "another base"
    elif what == "C6-another-recipe":
        recipe, words = replace(RECIPE, seed=1), "another recipe"
    elif what == "C5-an-adapter-of-nobody":
        (folder / IDENTITY).unlink()
        (folder / "hashes.json").unlink()
        words = "nobody knows"
    elif what == "C5-a-file":
        folder = folder / WEIGHTS
        words = "is a file"
    else:
        folder = tmp_path / os.fsdecode(b"name-\xff")
        words = "not UTF-8"
    refused(lambda: trained(ref, folder, recipe), words)
    same((tmp_path / "adapter" / WEIGHTS).read_bytes() == weights, True)
