"""Model files that are not what they were, hubs that fail, folders without rights: refused by name, or mended."""

import email.utils
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

from helpers import models
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.base.hub_variables import check_connection_variables, check_hub_variables
from helpers.machine import anatomy
from helpers.models import LoadOptions, ModelRef, finding, hub_cache, loading

from .hub import COMMIT, serving
from .judge import Outcome, kept, refused, same, workbook

MINI = ROOT / "env/models/falcon-mini"
DRAFT = ModelRef("env/models/falcon-mini-draft", "falcon", "plain", "embedded")


def flip(file: Path, position: int = -1) -> None:
    """Change one bit, and keep size and time."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def swap_two_tokens(file: Path) -> None:
    fields = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = fields["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(fields), encoding="utf-8")


def take_over(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


# C1: what the project embeds


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A project folder with the smallest embedded model, which ``DRAFT`` then names."""
    folder = tmp_path / DRAFT.id
    shutil.copytree(ROOT / DRAFT.id, folder)
    monkeypatch.setattr(finding, "ROOT", tmp_path)
    return folder


WEIGHTS, TOKENS = "model.safetensors", "tokenizer.json"
CHANGED = {
    "C1-last-bit": (lambda folder: flip(folder / WEIGHTS), WEIGHTS),
    "C1-first-weight": (lambda folder: flip(folder / WEIGHTS, 5000), WEIGHTS),
    "C1-header": (lambda folder: flip(folder / WEIGHTS, 20), WEIGHTS),
    "C1-cut": (lambda folder: os.truncate(folder / WEIGHTS, 1_000_000), WEIGHTS),
    "C1-empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), WEIGHTS),
    "C1-foreign-weights": (lambda folder: shutil.copy(MINI / WEIGHTS, folder), WEIGHTS),
    "C1-rotary-base": (lambda folder: edit(folder / "config.json", rope_theta=500000.0), "config.json"),
    "C1-epsilon": (lambda folder: edit(folder / "config.json", layer_norm_epsilon=1e-6), "config.json"),
    "C1-activation": (lambda folder: edit(folder / "config.json", activation="relu"), "config.json"),
    "C1-end-token": (lambda folder: edit(folder / "generation_config.json", eos_token_id=5), "generation_config.json"),
    "C1-two-tokens": (lambda folder: swap_two_tokens(folder / TOKENS), TOKENS),
    "C1-merges": (lambda folder: flip(folder / TOKENS, -500), TOKENS),
    "C1-tokenizer-gone": (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json"),
    "C1-adapter-beside": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "C1-template-beside": (lambda folder: (folder / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
    "C1-index-beside": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json",
    ),
    "C1-log": (lambda folder: flip(folder / "training_log.jsonl"), "training_log.jsonl"),
    "C1-no-record": (lambda folder: (folder / "hashes.json").unlink(), "hashes.json is missing"),
    "C1-cut-record": (lambda folder: os.truncate(folder / "hashes.json", 60), "hashes.json is damaged"),
    "C1-record-of-nothing": (lambda folder: edit(folder / "hashes.json", sha256={}), "hashes.json is damaged"),
    "C1-another-model": (lambda folder: take_over(folder, MINI), "hashes.json is of falcon-mini,"),
    "C1-folder-gone": (shutil.rmtree, "git restore"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_an_embedded_model_that_is_not_the_project_s_is_refused(case, embedded):
    models.resolve(DRAFT)  # a first load, so that sizes and times are known
    change, words = CHANGED[case]
    change(embedded)
    for ask in (models.resolve, models.config, models.load):
        refused(lambda ask=ask: ask(DRAFT), words, "estore")


def moved_behind_a_link(folder: Path, change=lambda folder: None) -> None:
    """The folder on a larger disk, and a link in its place."""
    elsewhere = folder.parents[2] / "disk"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    change(elsewhere)


LINKED = {
    "C1-link-to-changed": (
        lambda folder: moved_behind_a_link(folder, lambda there: flip(there / WEIGHTS)),
        f"{WEIGHTS} is not the file",
    ),
    "C1-link-to-another": (
        lambda folder: [shutil.copytree(MINI, folder.parent / MINI.name), shutil.rmtree(folder),
                        folder.symlink_to(folder.parent / MINI.name)],
        "hashes.json is of falcon-mini,",
    ),
    "C1-link-to-foreign-weights": (
        lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(MINI / WEIGHTS)],
        f"{WEIGHTS} is not the file",
    ),
    "C1-link-to-nothing": (
        lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to("nowhere")],
        f"{WEIGHTS} is missing",
    ),
    "C1-record-of-another": (
        lambda folder: shutil.copy(MINI / "hashes.json", folder),
        "hashes.json is of falcon-mini,",
    ),
    "C1-record-without-a-file": (
        lambda folder: edit(folder / "hashes.json", sha256={WEIGHTS: "0"}),
        "config.json does not belong there",
    ),
    "C1-templates-beside": (
        lambda folder: [(folder / "additional_chat_templates").mkdir()],
        "additional_chat_templates does not belong there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKED)
def test_an_embedded_model_is_known_by_its_place_and_its_content_behind_links(case, embedded):
    change, words = LINKED[case]
    change(embedded)
    refused(lambda: models.load(DRAFT), words, "estore")


def test_c1_an_embedded_model_may_lie_on_another_disk(embedded):
    moved_behind_a_link(embedded)
    same(models.resolve(DRAFT), embedded)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("_check_config", id="C1-changed-before-the-tokenizer"),
        pytest.param("_check_layers", id="C1-changed-before-the-weights"),
    ],
)
@pytest.mark.parametrize("restored", [False, True], ids=["left", "restored"])
def test_a_file_that_changes_between_the_check_and_the_load_is_noticed(moment, restored, embedded, monkeypatch):
    """Somebody else writes there at that moment; a file that was put back in time may have been read meanwhile."""
    step, wrong = getattr(loading, moment), embedded / WEIGHTS

    def interfere(*arguments):
        flip(wrong)
        if restored:
            flip(wrong)
        return step(*arguments)

    monkeypatch.setattr(loading, moment, interfere)
    refused(lambda: models.load(DRAFT), WEIGHTS)


HARMLESS = {
    "C1-touched": lambda folder: [os.utime(file) for file in folder.iterdir()],
    "C1-rights": lambda folder: [file.chmod(0o600) for file in folder.iterdir()],
    "C1-written-again": lambda folder: [file.write_bytes(file.read_bytes()) for file in folder.iterdir()],
    "C1-documentation": lambda folder: (folder / "README.md").write_text("other words"),
    "C1-editor": lambda folder: (folder / ".config.json.swp").write_text("x"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_an_embedded_model_whose_content_is_the_project_s_is_taken(case, embedded):
    HARMLESS[case](embedded)
    same(models.resolve(DRAFT), embedded)


def test_a_copy_elsewhere_may_be_changed_freely(embedded, tmp_path):
    """C1: what is trusted is known by its place; a user's own model is the user's."""
    copy = shutil.copytree(embedded, tmp_path / "mine")
    edit(copy / "config.json", layer_norm_epsilon=1e-6)
    same(models.load(replace(DRAFT, id=str(copy))).model.config.layer_norm_epsilon, 1e-6)
    edit(embedded / "config.json", layer_norm_epsilon=1e-6)
    link = tmp_path / "link"
    link.symlink_to(embedded)
    refused(lambda: models.resolve(replace(DRAFT, id=str(link))), "config.json")


def test_a_published_configuration_that_was_changed_is_refused(tmp_path, monkeypatch):
    """C1: one layer more than the published Falcon-180B has."""
    folder = shutil.copytree(anatomy.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(anatomy, "CONFIGS", folder)
    anatomy.published_config("tiiuae/falcon-180B")
    edit(folder / "tiiuae--falcon-180B.json", num_hidden_layers=81)
    refused(lambda: anatomy.published_config("tiiuae/falcon-180B"), "tiiuae--falcon-180B.json", "restore")


@pytest.mark.whole
def test_a_run_over_a_changed_model_is_refused(tmp_path):
    """C1: the whole command, in a checkout of its own."""
    for part in ("helpers", "notebooks", "env"):
        shutil.copytree(ROOT / part, tmp_path / part)
    flip(tmp_path / "env/models/falcon-mini" / WEIGHTS)
    run = workbook("run", "--only", "01", "--folder", tmp_path / "run", root=tmp_path)
    run.ends(1, "model.safetensors is not the file that was recorded", "git -C")


# C2, E5: what is made from a package


@pytest.fixture
def packaged(tmp_path, monkeypatch, write_gguf):
    """A package with a tiny GGUF file, and an empty cache."""
    package = tmp_path / "site" / "tiny_llama"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("WORKBOOK_CACHE", str(tmp_path / "cache"))
    return ModelRef("tests/tiny-llama", "llama", "chatml", "package", file="tiny_llama/tiny.gguf")


def in_its_place(folder: Path, make) -> None:
    shutil.rmtree(folder)
    make(folder)


DAMAGED = {
    "C2-flipped": lambda folder: flip(folder / WEIGHTS),
    "C2-cut": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "C2-half-there": lambda folder: (folder / "tokenizer.json").unlink(),
    "C2-empty": lambda folder: in_its_place(folder, Path.mkdir),
    "C2-a-file": lambda folder: in_its_place(folder, Path.touch),
    "C2-a-dead-link": lambda folder: in_its_place(folder, lambda path: path.symlink_to("nowhere")),
    "C2-rotary-base": lambda folder: edit(folder / "config.json", rope_theta=5.0),
    "C2-no-record": lambda folder: (folder / "hashes.json").unlink(),
    "C2-left-over": lambda folder: in_its_place(folder, lambda path: path.with_name(f"{path.name}.partial").mkdir()),
}


@pytest.mark.whole
@pytest.mark.parametrize("case", DAMAGED)
def test_an_unpacked_model_that_is_damaged_is_made_again(case, packaged):
    folder = models.resolve(packaged)
    right = {file.name: file.read_bytes() for file in folder.iterdir()}
    DAMAGED[case](folder)
    same(models.resolve(packaged), folder)
    for name, content in right.items():
        kept(folder / name, content)
    same(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()), [folder.name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(lambda file: flip(file, -100), "is not the file that the profile names", id="C2-gguf-flipped"),
        pytest.param(lambda file: os.truncate(file, 2000), "is not the file that the profile", id="C2-gguf-cut"),
        pytest.param(lambda file: file.write_bytes(b""), "is not the file that the profile", id="C2-gguf-empty"),
        pytest.param(lambda file: file.unlink(), "make setup", id="C2-gguf-gone"),
    ],
)
def test_a_packaged_file_that_is_not_the_profile_s_is_refused(change, words, packaged):
    file = models.unpacking.packaged_file(packaged)
    known = replace(packaged, file_sha256=models.unpacking.file_hash(file))
    change(file)
    refused(lambda: models.resolve(known), words)


@pytest.mark.parametrize("size", [0, 3, 100, 2000])
def test_a_packaged_file_of_one_s_own_that_is_cut_is_refused(size, packaged):
    """C2: without a hash in the profile it is the reader that notices."""
    os.truncate(models.unpacking.packaged_file(packaged), size)
    refused(lambda: models.resolve(packaged), "tiny.gguf")


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param("/proc/nobody", id="E5-no-right"),
        pytest.param("/dev/null/cache", id="E5-under-a-file"),
        pytest.param("/sys/kernel/cache", id="E5-read-only"),
        pytest.param("x" * 300, id="E5-too-long"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_sentence(cache, packaged, monkeypatch):
    monkeypatch.setenv("WORKBOOK_CACHE", cache)
    refused(lambda: models.resolve(packaged), "could not be unpacked", "WORKBOOK_CACHE")


# C3: what the hub's cache holds


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A model of the hub in the cache, hashed once, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    files = {"config.json": b'{"model_type": "falcon"}', WEIGHTS: b"w" * 5000, TOKENS: b"{}"}
    hub_cache.repository("org/tiny").store(files, COMMIT)
    ref = ModelRef("org/tiny", "falcon", "plain", revision=COMMIT)
    models.resolve(ref)
    return ref


def exchange(folder: Path) -> None:
    one, other = (folder / WEIGHTS).resolve(), (folder / TOKENS).resolve()
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: flip((folder / WEIGHTS).resolve()), id="C3-flipped"),
        pytest.param(lambda folder: os.truncate((folder / WEIGHTS).resolve(), 4999), id="C3-cut"),
        pytest.param(lambda folder: (folder / WEIGHTS).resolve().write_bytes(b""), id="C3-emptied"),
        pytest.param(exchange, id="C3-exchanged"),
    ],
)
def test_a_blob_that_changed_after_it_was_verified_is_refused_and_removed(change, cached):
    folder = models.resolve(cached)
    change(folder)
    refused(lambda: models.resolve(cached), "damaged, and removed", WEIGHTS)
    same((folder / WEIGHTS).exists(), False)


# C4, E8, E10: a checkpoint of one's own


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = FalconConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_kv_heads=1,
        new_decoder_architecture=True, bias=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
    return folder


def at(folder: Path, **changes) -> ModelRef:
    return replace(ModelRef(str(folder), "falcon", "plain", "embedded"), **changes)


def add_token(folder: Path) -> None:
    fields = json.loads((folder / TOKENS).read_text(encoding="utf-8"))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    fields["added_tokens"].append(token | {"id": 4096, "content": "<pad>"})
    (folder / TOKENS).write_text(json.dumps(fields), encoding="utf-8")


def model_of(folder: Path, **changes) -> None:
    fields = json.loads((folder / TOKENS).read_text(encoding="utf-8"))
    fields["model"] |= changes
    (folder / TOKENS).write_text(json.dumps(fields), encoding="utf-8")


def without_end(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del fields["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")


ODD = {
    "C4-id-beyond": (add_token, ("4,096", "4,096 rows", "<pad>")),
    "C4-newer-model": (lambda folder: model_of(folder, type="Quantum"), (TOKENS, "newer library")),
    "C4-newer-splitter": (lambda folder: edit(folder / TOKENS, pre_tokenizer={"type": "Quantum"}), ("newer library",)),
    "C4-no-end": (without_end, ("no end token",)),
    "C4-no-tokenizer": (lambda folder: (folder / TOKENS).unlink(), (TOKENS, "missing")),
    "C4-cut-tokenizer": (lambda folder: os.truncate(folder / TOKENS, 5000), (TOKENS,)),
    "C4-empty-tokenizer": (lambda folder: (folder / TOKENS).write_text(""), (TOKENS,)),
    "C4-end-beyond": (lambda folder: edit(folder / "generation_config.json", eos_token_id=4096), ("4096", "4,096")),
    "C4-end-in-config": (lambda folder: edit(folder / "config.json", eos_token_id=[0, 9999]), ("9999",)),
    "C4-cut-generation": (lambda folder: (folder / "generation_config.json").write_text("{"), ("generation_config",)),
    "C4-vocab-size": (lambda folder: edit(folder / "config.json", vocab_size=4000), ("4,000", "4,096 rows")),
    "E10-RefinedWeb": (lambda folder: edit(folder / "config.json", model_type="RefinedWeb"), ("RefinedWeb", "n_head")),
    "E10-RefinedWebModel": (lambda folder: edit(folder / "config.json", model_type="RefinedWebModel"), ("false",)),
    "E10-newer-type": (lambda folder: edit(folder / "config.json", model_type="falcon9"), ("falcon9", "does not know")),
    "E10-other-family": (lambda folder: edit(folder / "config.json", model_type="mamba"), ("mamba", "Correct")),
    "E10-no-type": (lambda folder: (folder / "config.json").write_text("[]"), ("model_type",)),
    "E10-cut-config": (lambda folder: os.truncate(folder / "config.json", 50), ("config.json",)),
    "E10-wrong-type": (lambda folder: edit(folder / "config.json", hidden_size="32"), ("hidden_size", "Correct")),
    "E10-one-layer-more": (lambda folder: edit(folder / "config.json", num_hidden_layers=4), ("layer 3",)),
    "E10-one-layer-less": (lambda folder: edit(folder / "config.json", num_hidden_layers=2), ("3 layers",)),
}


@pytest.mark.parametrize("case", ODD)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(case, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "odd")
    change, words = ODD[case]
    change(folder)
    refused(lambda: models.load(at(folder)), *words)


@pytest.mark.parametrize(("form", "words"), [("chatml", "<|im_start|>"), ("llama-2", "</s>")])
def test_a_chat_format_whose_tokens_are_missing_is_refused(form, words, tiny):
    """C4: the tokenizer's vocabulary of 4,096 tokens does not have those of the format."""
    refused(lambda: models.load(at(tiny, format=form)), words, "4,096")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: None, "does not exist", id="E10-no-folder"),
        pytest.param(Path.mkdir, "no config.json", id="E10-empty-folder"),
        pytest.param(Path.touch, "is a file", id="E10-a-file"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "does not exist", id="E10-a-dead-link"),
    ],
)
def test_a_path_that_is_no_model_says_what_it_is(make, words, tmp_path):
    make(tmp_path / "it")
    message = refused(lambda: models.load(at(tmp_path / "it")), words)
    same("git" in message, False)


NOWHERE = ["gpu", "", "CPU", "meta", "cuda:99", 99, -1, 1.5, True, ["cpu"], {}, {"": "meta"}, {"": None}, {"": 99},
           {"": "cpu", "transformer.h.7": "cpu"}, {"transformer.h.0": "cpu"}, {0: "cpu"},
           torch.device("cuda", 99)]  # fmt: skip


@pytest.mark.parametrize("device_map", NOWHERE, ids=lambda value: f"E8-{value!r}".replace(" ", ""))
def test_a_device_that_is_not_there_is_refused(device_map, tiny):
    refused(lambda: models.load(at(tiny), options=LoadOptions(device_map=device_map)), "device map")


# F13, F16: what the environment says


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "abc"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5"),
        ("HF_HUB_ETAG_TIMEOUT", "-1"),
        ("HF_HUB_ETAG_TIMEOUT", "10 s"),
        ("HF_HUB_ETAG_TIMEOUT", "0"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "99999999999999999999"),
        ("HF_ENDPOINT", "huggingface.co"),
        ("HF_ENDPOINT", "http://127.0.0.1:abc"),
        ("HF_ENDPOINT", "http://"),
        ("HF_ENDPOINT", "ftp://hub"),
        ("HF_ENDPOINT", "http://[::1"),
    ],
)
def test_a_variable_that_breaks_the_library_is_named(name, value, monkeypatch):
    """F13: times that are no whole number above 0, and addresses that are none."""
    monkeypatch.setenv(name, value)
    refused(check_hub_variables, name)
    refused(models.load_profile, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "socks5://me:hunter2hunter2@127.0.0.1:1080"),
        ("all_proxy", "socks5h://127.0.0.1:1080"),
        ("HTTP_PROXY", "proxy.example:3128"),
        ("https_proxy", "quantum://127.0.0.1"),
        ("SSL_CERT_FILE", "/nowhere/certificates.pem"),
        ("SSL_CERT_FILE", "/etc/passwd"),
        ("SSL_CERT_DIR", "/nowhere"),
    ],
)
def test_a_connection_that_cannot_be_made_is_named(name, value, monkeypatch):
    """F16: a proxy or certificates that cannot be used; the password of the proxy is not shown."""
    monkeypatch.setenv(name, value)
    same("hunter2" in refused(check_connection_variables, name), False)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_DOWNLOAD_TIMEOUT", "abc"), ("HF_ENDPOINT", "http://hub:x"), ("TQDM_MININTERVAL", "abc")],
)
@pytest.mark.parametrize("command", ["run", "fetch", "doctor"])
def test_every_command_names_it(command, name, value, tmp_path):
    """F13: the whole command, with one variable set."""
    workbook(command, environment={name: value}, folder=tmp_path).ends(2, name)


# E4, F16: hubs. Each case is a process of its own, because the library reads the address once.

ASK = """
import sys
from helpers.base import WorkbookError
from helpers.models import ModelRef, resolve
try:
    print("folder:", resolve(ModelRef("org/tiny", "falcon", "plain", revision="main")))
except WorkbookError as error:
    print("Error:", error)
    sys.exit(2)
"""


def surroundings(address: str, home: Path, **more: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return given | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)} | more


def ask(address: str, home: Path, **more: str) -> Outcome:
    done = subprocess.run([sys.executable, "-c", ASK], env=surroundings(address, home, **more), capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    return Outcome(done.returncode, done.stdout + done.stderr)


NOW = {"Retry-After": "0"}
LOGIN = (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
REFUSALS = {
    "F16-401": ((401, {}, b""), ("does not know this token", "hf auth login")),
    "F16-403": ((403, {}, b""), ("may not read it",)),
    "F16-gated": ((403, {"X-Error-Code": "GatedRepo"}, b""), ("licence must be accepted",)),
    "F16-no-repository": ((404, {"X-Error-Code": "RepoNotFound"}, b""), ("does not exist or is private",)),
    "F16-no-revision": ((404, {"X-Error-Code": "RevisionNotFound"}, b""), ("has no revision main",)),
    "F16-404": ((404, {}, b""), ("404 (Not Found)",)),
    "F16-429": ((429, NOW, b""), ("429 (Too Many Requests)", "Trying again in 0 s")),
    "F16-429-hour": ((429, {"Retry-After": "3600"}, b""), ("Wait 3600 s",)),
    "F16-500": ((500, NOW, b""), ("500 (Internal Server Error)", "try again later")),
    "F16-503": ((503, NOW, b""), ("503 (Service Unavailable)",)),
    "F16-504-html": ((504, NOW, b"<html>Gateway</html>"), ("504 (Gateway Timeout)",)),
    "F16-login-page": (LOGIN, ("login page",)),
    "F16-login-redirect": ((302, {"Location": "/org/tiny/login"}, b""), ("login page",)),
    "F16-other-json": ((200, {}, b'{"hello": "world"}'), ("no hub sends",)),
    "F16-a-list": ((200, {}, b"[1, 2]"), ("no hub sends",)),
    "F16-418": ((418, {}, b""), ("418",)),
    "F16-407": ((407, {}, b""), ("407", "a proxy that asks for a user name")),
    "F16-511": ((511, NOW, b""), ("511", "log in first")),
    "F16-deep-json": ((200, {}, b"[" * 100_000), ("no hub sends",)),
    "F16-redirect-nowhere": ((301, {"Location": "https://hub.invalid/x"}, b""), ("cannot be resolved",)),
    "F16-not-gzip": ((200, {"Content-Encoding": "gzip"}, b"nope"), ("connection to the hub broke",)),
}


@pytest.mark.whole
@pytest.mark.parametrize("case", REFUSALS)
def test_a_hub_that_refuses_is_named(case, tiny, tmp_path):
    answer, words = REFUSALS[case]
    with serving(tiny) as (hub, address):
        hub.forever = answer
        ask(address, tmp_path).ends(2, *words)


@pytest.mark.whole
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_recovers_is_waited_for(status, tiny, tmp_path):
    """F16: four refusals, and then the file."""
    with serving(tiny) as (hub, address):
        hub.answers = [(status, NOW, b"")] * 4
        ask(address, tmp_path).ends(0, f"answered {status}", "Trying again", f"snapshots/{COMMIT}")


@pytest.mark.whole
def test_a_wait_may_be_a_date_or_nonsense(tiny, tmp_path):
    """F16: Retry-After as a date, a date that is over, a word, a negative and a broken number."""
    soon = email.utils.formatdate(time.time() + 1, usegmt=True)
    for number, wait in enumerate((soon, email.utils.formatdate(0), "soon", "-5", "1.5", "²")):
        with serving(tiny) as (hub, address):
            hub.answers = [(503, {"Retry-After": wait}, b"")]
            ask(address, tmp_path / str(number)).ends(0, f"snapshots/{COMMIT}")


@pytest.mark.whole
@pytest.mark.parametrize(
    ("address", "more", "words"),
    [
        pytest.param("http://127.0.0.1:9", {}, "cannot be reached", id="F16-nobody-there"),
        pytest.param("http://hub.invalid", {}, "cannot be resolved", id="F16-no-such-name"),
        pytest.param("http://me:hunter2hunter2@hub.invalid", {}, "http://hub.invalid", id="F16-password"),
        pytest.param("http://hub.invalid", {"HTTP_PROXY": "http://127.0.0.1:9"}, "HTTPS_PROXY", id="F16-dead-proxy"),
        pytest.param("http://hub.invalid", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", id="F16-offline"),
        pytest.param("http://hub.invalid", {"HF_HOME": "/dev/null/home"}, "HF_HOME", id="F13-home-under-a-file"),
        pytest.param("http://127.0.0.1:9", {"HF_TOKEN": "hf_hunter2ü"}, "HF_TOKEN", id="F13-token-not-ASCII"),
    ],
)
def test_a_hub_that_is_not_there_is_named(address, more, words, tmp_path):
    outcome = ask(address, tmp_path, **more).ends(2, words)
    same("hunter2" in outcome.screen, False)


@pytest.mark.whole
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_download_that_was_killed_leaves_nothing_for_the_next(how, tiny, tmp_path):
    """E4: the part of a file that a killed process leaves is removed by the next download."""
    with serving(tiny) as (hub, address):
        hub.stall_after = 1000
        command = [sys.executable, "-c", ASK]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=surroundings(address, tmp_path), **quiet) as process:
            same(hub.stalled.wait(60), True)
            process.send_signal(how)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        same(bool(list(tmp_path.rglob("*.incomplete"))), True)
        hub.stall_after = None
        ask(address, tmp_path).ends(0, f"snapshots/{COMMIT}")
        same(list(tmp_path.rglob("*.incomplete")), [])


def test_every_file_that_the_profiles_take_from_a_package_has_its_hash():
    """C1: so that a changed one is noticed."""
    for name in models.available():
        for ref in models.load_profile(name).models.values():
            same((ref.source == "package") == bool(ref.file_sha256), True)
    with pytest.raises(WorkbookError):
        models.resolve(replace(models.load_profile("laptop").llama_chat, file_sha256="0" * 64))
