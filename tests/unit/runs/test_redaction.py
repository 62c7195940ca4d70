"""What is a secret, and that it stands in no text and no file afterwards, while everything else stays as it was."""

import base64
import html
import io
import json
import os
import struct
import time
import zipfile
import zlib
from urllib.parse import quote

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helpers.runs.redaction import _redact, for_screen
from helpers.runs.secrecy import _find_secrets
from helpers.runs.sweeping import _sweep

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"  # the shape of a real one: hf_ and 34 letters
PASSWORD = "Zx81kQ0pLmN3vB7t"


# --- what is a secret -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", TOKEN),
        ("HF_TOKEN", PASSWORD),
        ("ANYTHING", TOKEN),
        ("ANYTHING", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
        ("ANYTHING", "AKIAIOSFODNN7EXAMPLE"),
        ("ANYTHING", "AIzaSyA-0123456789abcdefghijklmnopqrstu"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        ("OPENAI_API_KEY", "0123abcd4567efgh"),
        ("DB_PASSWORD", "hunter22"),
        ("MYSQL_PWD", "hunter22"),
        ("TOKEN1", "abc123"),
        ("dbPassword", "Tr0ub4dor&3"),
        ("VAULT_PASSPHRASE", "correct-horse-battery-staple"),
        ("VAULT_PASSPHRASE", "correcthorsebatterystaple"),
        ("CACHE_KEY", "3fa85f64-5717-4562-b3fc-2c963f66afa6"),
        ("GOOGLE_CREDENTIALS", "{'a': 1}"),
    ],
)
def test_a_value_with_the_shape_of_a_secret_is_one(name, value):
    assert _find_secrets({name: value}) == (value,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_MAX_TOKENS", "163840"),  # D1
        ("APP_KEY", "weight"),
        ("CACHE_KEY", "notebooks"),
        ("DB_PIN_PASSWORD", "12345678"),
        ("APP_KEY", "model.layers.0.self_attn.q_proj.weight"),
        ("APP_KEY", "LlamaForCausalLM"),
        ("APP_KEY", "falcon-180B-chat"),
        ("APP_KEY", "float32"),
        ("RUN_KEY", "20260131T120000Z-laptop"),
        ("TIME_KEY", "2026-01-31T12:00:00Z"),
        ("HOST_AUTH", "10.0.0.1:8080"),
        ("RATE_KEY", "1e-4"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-agent/agent.123"),
        ("TOKENIZERS_PARALLELISM", "false_false"),
        ("PYTHONPATH", PASSWORD),
        ("PWD", "/gone/away"),
        ("OLDPWD", "/gone/away"),
        ("CACHE", "/data/hf_downloads"),
        ("CACHE", "hf_downloads/models"),
        ("LIBRARY", "sk-learn-and-its-many-neighbours"),
        ("REMOTE", "ssh://somebody@example.org/x"),
    ],
)
def test_numbers_words_paths_and_names_are_no_secrets(name, value):
    assert _find_secrets({name: value}) == ()


@pytest.mark.parametrize(
    ("name", "value"), [("JUPYTER_TOKEN", "notebook"), ("DB_PASSWORD", "laptop"), ("HF_TOKEN", "short")]
)
def test_a_word_is_hidden_beside_its_own_name_only(name, value):
    """F9: the trade-off for a password that is a word."""
    secrets = _find_secrets({name: value})
    data = {value: [value, f"a {value} b", 1], "text": f"export {name}={value}; {{'{name}': '{value}'}}"}
    assert _redact(data, secrets) == {
        value: [value, f"a {value} b", 1],
        "text": f"export {name}=[redacted]; {{'{name}': '[redacted]'}}",
    }


def test_a_name_of_the_workbook_is_no_secret():
    assert _find_secrets({"DB_PASSWORD": "falcon180b"})[0] == "falcon180b"
    (beside,) = _find_secrets({"DB_PASSWORD": "falcon180b"}, public=["Falcon180B"])
    assert _redact("falcon180b", [beside]) == "falcon180b"


@pytest.mark.parametrize(
    ("value", "secrets"),
    [
        (f"https://{TOKEN}@example.org/simple", {TOKEN}),
        (f"Authorization: Bearer {TOKEN}", {TOKEN}),
        ("https://me:p%40ssw%2Frd@example.org", {"p%40ssw%2Frd", "p@ssw/rd"}),
        ("https://a:hunter22@x https://b:hunter33@y", {"hunter22", "hunter33"}),
        (f'{{"private_key_id": "{PASSWORD}", "type": "service_account"}}', {PASSWORD}),
    ],
)
def test_secrets_inside_a_value_are_found(value, secrets):
    assert secrets <= set(_find_secrets({"CREDENTIALS": value}))


@pytest.mark.parametrize(
    ("variables", "file", "content", "secret"),
    [
        ({"HF_TOKEN_PATH": "{home}/mine"}, "mine", f"{PASSWORD}\n", PASSWORD),
        ({"HF_HOME": "{home}/hf"}, "hf/token", f"{PASSWORD}\n", PASSWORD),
        ({}, ".cache/huggingface/token", f"{PASSWORD}", PASSWORD),
        ({"XDG_CACHE_HOME": "{home}/c"}, "c/huggingface/stored_tokens", f"[mine]\nhf_token = {PASSWORD}\n", PASSWORD),
        ({}, ".netrc", "machine huggingface.co\n  login me\n  password s3cr3t-pass\n", "s3cr3t-pass"),
        ({"NETRC": "{home}/n"}, "n", "default login me password hunter22", "hunter22"),
        ({}, ".git-credentials", "https://me:hunter22@huggingface.co\n", "hunter22"),
        ({}, ".config/gh/hosts.yml", f"github.com:\n  oauth_token: {PASSWORD}\n", PASSWORD),
        ({}, ".kaggle/kaggle.json", f'{{"username": "me", "key": "{PASSWORD}"}}', PASSWORD),
        ({}, ".pypirc", f"[pypi]\nusername = __token__\npassword = {PASSWORD}\n", PASSWORD),
    ],
)
def test_the_files_of_tokens_are_known(tmp_path, variables, file, content, secret):
    """D2: what ``hf auth login`` and others keep in a file, printed by a cell."""
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    named = {"HOME": str(tmp_path)} | {name: value.format(home=tmp_path) for name, value in variables.items()}
    assert secret in _find_secrets(named)
    assert _find_secrets({"HOME": str(tmp_path / "nobody")}) == ()


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_known_secret_is_found_in_every_way_of_writing():
    secret = 'p"w<&>\\ü d/e+f'
    written = [
        secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret), html.escape(secret),
        html.escape(secret).replace("&quot;", "&#34;"), quote(secret, safe=""), quote(secret), secret.encode().hex(),
        *(base64.b64encode(before + secret.encode() + b"behind").decode() for before in (b"", b"a", b"ab")),
        base64.urlsafe_b64encode(b"user:" + secret.encode()).decode(),
    ]  # fmt: skip
    for text in written:
        assert "[redacted]" in _redact(f"a {text} b", [secret]), text
        assert text not in _redact(f"a {text} b", [secret])


@pytest.mark.parametrize(
    "text",
    [
        "{}", "'{}'", "a\\n{}", "\x1b[31m{}\x1b[0m", "%22{}%22", "run_{}.txt", "https://host/{}/x", "token={}", "/{}",
        "\\u0027{}", "<b>{}</b>",
    ],
)  # fmt: skip
def test_a_token_that_nobody_knows_is_hidden_wherever_it_stands(text):
    assert _redact(text.format(TOKEN), []) == text.format("[redacted]")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("http://me:laptop@proxy:3128", "http://me:[redacted]@proxy:3128"),
        ("https://me:p@ss@host/x", "https://me:[redacted]@host/x"),
        ("f'https://{user}:{password}@host'", "f'https://{user}:{password}@host'"),
        ("git@github.com:a/b and ssh://git@host/x", "git@github.com:a/b and ssh://git@host/x"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted]"),
        ("{'Authorization': 'Bearer abc123def'}", "{'Authorization': 'Bearer [redacted]'}"),
        ("Authorization: Bearer token", "Authorization: Bearer token"),
        ("http://localhost:8888/lab?token=0123abcd45ef&x=1", "http://localhost:8888/lab?token=[redacted]&x=1"),
        ("https://s3/x?a=1&X-Amz-Signature=0123abcd45ef67", "https://s3/x?a=1&X-Amz-Signature=[redacted]"),
        ("generate(x, max_new_tokens=163840)", "generate(x, max_new_tokens=163840)"),
        ("a?key=falcon", "a?key=falcon"),
        ("machine h login me password laptop", "machine h login me password [redacted]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nend", "[redacted]\nend"),
        (f"-----BEGIN PRIVATE KEY-----\n{'A' * 64}\n{'B' * 64} and more", "[redacted] and more"),
        ("a line -----BEGIN PRIVATE KEY----- begins a key", "a line -----BEGIN PRIVATE KEY----- begins a key"),
        (base64.b64encode(TOKEN.encode()).decode(), "[redacted]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdefgh", "[redacted]"),
        ("hf_hub_download(repo_id='x')", "hf_hub_download(repo_id='x')"),
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden_in_its_place(text, right):
    assert _redact(text, []) == right


def test_structure_and_numbers_are_never_touched():
    """D1: keys, numbers, truth values, and words that hold a short secret."""
    data = {"hunter22": {"layer.hunter222": [1, 22, 0.5, True, None]}, "n": 163840, "x": "hunter222 xhunter22"}
    assert _redact(data, ["hunter22"]) == data
    assert _redact({"a": "is hunter22."}, ["hunter22"]) == {"a": "is [redacted]."}
    assert _redact({f"k{TOKEN}": 1, f"k{TOKEN[:-1]}x": 2}, []) == {"k[redacted]": 1, "k[redacted] 2": 2}


def test_an_image_is_searched_as_bytes_only():
    """Its base64 may spell anything by chance; what its bytes hold, such as a title, is no chance (D2)."""
    spelled = base64.b64encode(base64.b64decode(f"AAAA{'Zx81kQ0pLmN3vB7t'}AAAA")).decode()
    assert _redact({"image/png": spelled}, ["Zx81kQ0pLmN3vB7t"]) == {"image/png": spelled}
    assert _redact({"image/png": TOKEN}, []) == {"image/png": "[redacted]"}
    written, info = io.BytesIO(), PngInfo()
    info.add_text("Title", TOKEN)
    Image.new("RGB", (2, 2), "red").save(written, "png", pnginfo=info)
    encoded = base64.b64encode(written.getvalue()).decode()
    shown = Image.open(io.BytesIO(base64.b64decode(_redact({"image/png": encoded}, [])["image/png"])))
    assert (shown.text, shown.getpixel((1, 1))) == ({"Title": "*" * len(TOKEN)}, (255, 0, 0))


@pytest.mark.parametrize(
    "piece", ["A", "hf_", "://a:", "eyJ.", "-----BEGIN PRIVATE KEY-----", "?token=", "the quick ", "\n", "<", "sk-a"]
)
def test_a_long_text_takes_linear_time(piece):
    """E6: four times the text may take ten times the time, on a busy machine too; the square would be sixteen."""
    secrets = _find_secrets({"HF_TOKEN": PASSWORD, "DB_PASSWORD": "hunter22", "X_TOKEN": "word"})

    def seconds(length):
        text = piece * (length // len(piece))
        begun = time.process_time()
        _redact(text, secrets)
        return time.process_time() - begun

    assert seconds(800_000) < 10 * max(seconds(200_000), 0.02)


def test_a_message_on_the_screen_has_no_secret_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter22@example.org")
    from helpers.runs import redaction

    redaction._own_secrets.cache_clear()
    assert for_screen("cannot reach https://me:hunter22@example.org (hunter22)") == (
        "cannot reach https://me:[redacted]@example.org ([redacted])"
    )
    redaction._own_secrets.cache_clear()


# --- files ------------------------------------------------------------------------------------------------------------


def test_sweep_changes_only_files_with_secrets_and_keeps_json_valid(tmp_path):
    (tmp_path / "deep").mkdir()
    contents = {
        "a.json": json.dumps({"x": 'quo"te1-quo"te2', "n": 7654321}),
        "deep/b.html": "<b>quo&quot;te1-quo&quot;te2</b>",
        "c.txt": "clean",
        "d.json": '{"x": "\\u0068f_' + TOKEN[3:] + '"}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    changed = _sweep(tmp_path, ['quo"te1-quo"te2', "7654321"])
    assert [path.name for path in changed] == ["a.json", "d.json", "b.html"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": "[redacted]", "n": 7654321}
    assert (tmp_path / "deep" / "b.html").read_text() == "<b>[redacted]</b>"
    assert json.loads((tmp_path / "d.json").read_text()) == {"x": "[redacted]"}


@pytest.mark.parametrize(
    "content", [f'{{"x": "{TOKEN}', f'{{"x": NaN, "y": "{TOKEN}"}}', f'{{"x": "\\ud800 {TOKEN}"}}']
)
def test_sweep_cleans_json_that_cannot_be_written_again_as_text(tmp_path, content):
    (tmp_path / "a.ipynb").write_text(content)
    assert len(_sweep(tmp_path, [])) == 1
    assert (tmp_path / "a.ipynb").read_text() == content.replace(TOKEN, "[redacted]")
    assert len(list(tmp_path.iterdir())) == 1


def test_binary_files_of_numbers_are_not_touched(tmp_path):
    """D1: a word or a number in the environment is in every file of tensors, by name or by chance."""
    np.savez(tmp_path / "a.npz", weight=np.arange(5))
    torch.save({"weight": torch.ones(3), "notebooks": 163840}, tmp_path / "b.pt")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "c.png")
    (tmp_path / "d.bin").write_bytes(b"\x00hunter22\xff weight")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    named = {"APP_KEY": "weight", "CACHE_KEY": "notebooks", "MAX_TOKENS": "163840", "DB_PASSWORD": "hunter22"}
    assert _sweep(tmp_path, _find_secrets(named)) == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_binary_files_with_a_token_lose_it_and_can_still_be_read(tmp_path):
    pixels = (np.arange(64).reshape(8, 8) * 3).astype(np.uint8)
    figure = Figure(figsize=(1, 1))
    figure.savefig(tmp_path / "a.png", metadata={"Title": f"made with {TOKEN}"})
    np.savez_compressed(tmp_path / "b.npz", values=pixels, note=np.array(TOKEN.encode()))
    torch.save({"hub_token": TOKEN, "weight": torch.ones(3)}, tmp_path / "c.pt")
    (tmp_path / "d.bin").write_bytes(b"\x00\xff" + TOKEN.encode() + b"\x00end")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr(f"{TOKEN}.txt", "x")
    shape = Image.open(tmp_path / "a.png").size
    assert len(_sweep(tmp_path, [])) == 5
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == shape
        image.load()
        assert image.info["Title"] == "made with " + "*" * len(TOKEN)
    assert np.load(tmp_path / "b.npz")["values"].tolist() == pixels.tolist()
    assert np.load(tmp_path / "b.npz")["note"].item() == b"*" * len(TOKEN)
    assert torch.load(tmp_path / "c.pt")["weight"].tolist() == [1, 1, 1]
    assert (tmp_path / "d.bin").read_bytes() == b"\x00\xff" + b"*" * len(TOKEN) + b"\x00end"


def test_the_check_sums_of_a_png_are_right_again(tmp_path):
    Figure(figsize=(1, 1)).savefig(tmp_path / "a.png", metadata={"Comment": TOKEN})
    _sweep(tmp_path, [])
    content, place = (tmp_path / "a.png").read_bytes(), 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind_and_data = content[place + 4 : place + 8 + length]
        assert content[place + 8 + length : place + 12 + length] == struct.pack(">I", zlib.crc32(kind_and_data))
        place += 12 + length


def test_a_file_or_folder_named_by_a_token_gets_another_name(tmp_path):
    """D2: a token as a file's name, also with the dash that a figure's file has in the place of an underscore."""
    (tmp_path / f"x{TOKEN[:-1]}" / "deep").mkdir(parents=True)
    dashed = TOKEN.replace("_", "-")
    for path in (f"{TOKEN}.txt", f"nb_{dashed}.png", f"{TOKEN[:-1]}z.txt", f"d_{TOKEN}/deep.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path.removeprefix("d_")[-8:])
    _sweep(tmp_path, [])
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert not any(TOKEN[3:20] in name for name in names if not name.startswith("x"))
    assert {"[redacted].txt", "[redacted]-2.txt", "nb_[redacted].png", "d_[redacted]/deep.txt"} <= set(names)


def test_sweep_leaves_links_and_what_they_lead_to(tmp_path):
    """D5: a link, and another name of a file outside."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (outside / name).write_text(TOKEN)
    (folder / "link.txt").symlink_to(outside / "a.txt")
    (folder / "folder").symlink_to(outside)
    os.link(outside / "b.txt", folder / "hard.txt")
    _sweep(folder, [])
    assert {path.read_text() for path in outside.iterdir()} == {TOKEN}
    assert (folder / "hard.txt").read_text() == "[redacted]"


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    seen = {}
    _sweep(tmp_path, [], seen)
    (path,) = seen
    before = path.stat()
    path.write_text(TOKEN.ljust(100))  # of the same size; with the old time it looks the same
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert _sweep(tmp_path, [], seen) == []
    path.write_text(TOKEN)
    assert _sweep(tmp_path, [], seen) == [path]


def test_large_files_of_weights_are_looked_at_at_both_ends(tmp_path, monkeypatch):
    from helpers.runs import sweeping

    monkeypatch.setattr(sweeping, "_LARGE", 4000)
    monkeypatch.setattr(sweeping, "_END", 1000)
    (tmp_path / "a.bin").write_bytes(io.BytesIO(b"\x00" + TOKEN.encode() + b"\x00" * 9000 + TOKEN.encode()).getvalue())
    assert len(_sweep(tmp_path, [])) == 1
    assert TOKEN.encode() not in (tmp_path / "a.bin").read_bytes()
