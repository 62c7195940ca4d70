"""Secrets: what looks like one stands in no file and on no screen, and what does not is never touched (D1, D2, F9)."""

import base64
import hashlib
import json
import os
import pickle
import subprocess
import zipfile

import numpy as np
import pytest

from helpers.runs.redaction import _redact
from helpers.runs.secrecy import _find_secrets
from helpers.runs.sweeping import _sweep

from .judge import Fault, kept, no_secret, same, workbook

# Made up, of the real shapes.
TOKEN = "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"
STORED = "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"
PASSWORD = "n0t-s0-$imple!9x"
DOCUMENT = {
    "163840": {"weight": [163840, 0.5, True, None], "notebooks": "weight of 163840 in laptop notebooks"},
    "values": {"model.layers.0.weight": {"value": 10.0, "unit": "tokens", "source": "run 20260131T120000Z-laptop"}},
    "profile": "laptop",
    "paths": ["/data/models/falcon", "notebooks/00_start_here.ipynb", "https://huggingface.co/tiiuae/falcon-180B"],
    "text": "hf_hub_download, sk-learn, task-token, eyJ, max_new_tokens=100000, ?key=value, 10.0.0.1:8080",
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "code": "generate(prompt, max_new_tokens=163840); password = getpass(); token = tokenizer.eos_token",
}


# --- D1, F9: what is no secret ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"OPENAI_MAX_TOKENS": "163840"}, id="D1-number"),
        pytest.param({"APP_KEY": "weight"}, id="D1-tensor"),
        pytest.param({"CACHE_KEY": "notebooks"}, id="D1-word"),
        pytest.param({"max_new_tokens": "100000"}, id="D1-parameter"),
        pytest.param({"DB_PASSWORD": "laptop"}, id="F9-password"),
        pytest.param({"JUPYTER_TOKEN": "notebook"}, id="F9-token"),
        pytest.param({"SECRET": "true", "TOKEN": "10.0", "PASSWORD": "1"}, id="D1-short"),
        pytest.param({"MODEL_KEY": "model.layers.0.weight"}, id="D1-layer"),
        pytest.param({"RUN_KEY": "20260131T120000Z-laptop"}, id="D1-run"),
        pytest.param({"DATA_KEY": "/data/models/falcon", "AUTH": "notebooks/00_start_here.ipynb"}, id="D1-path"),
        pytest.param({"HOST_AUTH": "10.0.0.1:8080"}, id="D1-address"),
        pytest.param({"EOS_TOKEN": "tokens", "PAD_TOKEN": "value"}, id="D1-special-tokens"),
        pytest.param({"REPO_PAT": "tiiuae/falcon-180B"}, id="D1-repository"),
        pytest.param({}, id="D1-nothing"),
    ],
)
def test_a_run_s_values_are_as_without(environment, tmp_path):
    secrets = _find_secrets(environment, public=["laptop"])
    same(_redact(DOCUMENT, secrets), DOCUMENT)
    np.savez(tmp_path / "a.npz", weight=np.arange(163840, 163845), notebooks=np.array("laptop"))
    (tmp_path / "results.json").write_text(json.dumps(DOCUMENT))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    same(_sweep(tmp_path, secrets), [])
    for path, content in before.items():
        kept(path, content)


# --- D2: what is one --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{}", id="D2-bare"),
        pytest.param("Authorization: Bearer {}", id="D2-header"),
        pytest.param("https://user:{}@huggingface.co/x", id="D2-address"),
        pytest.param("https://{}@huggingface.co/x", id="D2-user"),
        pytest.param("https://host/x?token={}&y=1", id="D2-query"),
        pytest.param('{{"a": "{}"}}', id="D2-json"),
        pytest.param('"{{\\"a\\": \\"\\n{}\\"}}"', id="D2-json-in-json"),
        pytest.param("machine huggingface.co login me password {}", id="D2-netrc"),
        pytest.param("\x1b[0;31m{}\x1b[0m", id="D2-coloured"),
        pytest.param("ValueError: bad token '{}' in /tmp/{}/x", id="D2-exception"),
        pytest.param("--token={} -p name={}", id="D2-command"),
        pytest.param("a%20{}%20b", id="D2-percent"),
        pytest.param("x" * 100_000 + " {} " + "x" * 100_000, id="D2-long-line"),
        pytest.param("<b title='{}'>x</b>", id="D2-html"),
        pytest.param("{}" * 3, id="D2-three"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_planted_token_is_nowhere(text, known, tmp_path):
    secrets = _find_secrets({"HF_TOKEN": TOKEN} if known else {})
    content = text.format(TOKEN, TOKEN) if text.count("{}") != 3 else f"{TOKEN}\n{TOKEN} {TOKEN}"
    for name in ("a.txt", "b.log", "c.html"):
        (tmp_path / name).write_text(content)
    (tmp_path / "d.json").write_text(json.dumps({"deep": [content], content: 1}))
    (tmp_path / f"{TOKEN}.txt").write_text("x")
    (tmp_path / f"folder {TOKEN}").mkdir()
    _sweep(tmp_path, secrets)
    no_secret(TOKEN, tmp_path, _redact(content, secrets))
    same(len(list(tmp_path.iterdir())), 6)
    json.loads((tmp_path / "d.json").read_text())


def coded(pattern):
    return lambda secret: "".join(pattern % ord(letter) for letter in secret)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda secret: base64.b64encode(secret.encode()).decode(), id="D2-base64"),
        pytest.param(lambda secret: base64.b64encode(b"user:" + secret.encode()).decode(), id="D2-basic"),
        pytest.param(lambda secret: secret.encode().hex(), id="D2-hex"),
        pytest.param(lambda secret: json.dumps(json.dumps(secret)), id="D2-json-twice"),
        pytest.param(repr, id="D2-repr"),
        pytest.param(ascii, id="D2-ascii"),
        pytest.param(coded("%%%02x"), id="D2-percent-small"),
        pytest.param(coded("&#%d;"), id="D2-entities"),
    ],
)
@pytest.mark.parametrize("secret", [TOKEN, PASSWORD], ids=["token", "password"])
def test_a_known_secret_is_nowhere_in_another_way_of_writing(write, secret):
    secrets = _find_secrets({"DB_PASSWORD": secret})
    written = write(secret)
    if written.strip("'\"\\") in _redact(f"a {written} b", secrets):
        raise Fault("leak", f"{written} is shown")


def in_base64(before, behind=""):
    return lambda secret: base64.b64encode(f"{before}{secret}{behind}".encode()).decode()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(in_base64("x"), id="D2-base64-second"),
        pytest.param(in_base64("user:"), id="D2-base64-third"),
        pytest.param(in_base64('{"auth": "', '", "more": "of it"}'), id="D2-base64-json"),
        pytest.param(lambda secret: base64.encodebytes(b"y" * 30 + secret.encode()).decode(), id="D2-base64-lines"),
        pytest.param(lambda secret: repr(base64.encodebytes(b"y" * 31 + secret.encode())), id="D2-base64-repr"),
        pytest.param(lambda secret: base64.urlsafe_b64encode(b"?" + secret.encode()).decode(), id="D2-base64-url"),
        pytest.param(lambda secret: secret.encode().hex(), id="D2-hex"),
        pytest.param(lambda secret: secret.encode().hex().upper(), id="D2-hex-upper"),
        pytest.param(lambda secret: secret.encode().hex(" "), id="D2-hex-dump"),
        pytest.param(coded("%%%02X"), id="D2-percent"),
        pytest.param(coded("%%%02x"), id="D2-percent-small"),
        pytest.param(lambda secret: f"x?a={secret.replace('_', '%5F')}&b=1", id="D2-percent-one"),
        pytest.param(coded("\\u%04x"), id="D2-unicode"),
        pytest.param(coded("\\x%02x"), id="D2-bytes"),
        pytest.param(coded("&#%d;"), id="D2-entities"),
        pytest.param(coded("&#x%x;"), id="D2-entities-hex"),
        pytest.param(lambda secret: f"<p>{secret.replace('_', '&lowbar;')}</p>", id="D2-entity"),
        pytest.param(lambda secret: secret.replace("_", "\\_"), id="D2-markdown"),
        pytest.param(lambda secret: f"0  Authorization: Bearer {secret[:24]}...", id="D2-cut"),
        pytest.param(lambda secret: f"│ {secret[:12]}… │", id="D2-cut-table"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_token_written_in_codes_is_nowhere(write, known, tmp_path):
    """Also if nobody knows whose it is, as if it was read from some file."""
    secrets, written = _find_secrets({"A_TOKEN": TOKEN} if known else {}), write(TOKEN)
    shown = _redact(f"a {written} b", secrets)
    (tmp_path / "a.txt").write_text(f"a {written} b")
    _sweep(tmp_path, secrets)
    same((tmp_path / "a.txt").read_text(), shown)
    if "[redacted]" not in shown or any(part in shown for part in written.split("=")[0].splitlines() if len(part) > 20):
        raise Fault("leak", shown)
    same((shown[:2], shown[-2:]), ("a ", " b"))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(base64.b64encode(bytes(range(256)) * 20).decode(), id="D1-base64"),
        pytest.param(hashlib.sha256(b"x").hexdigest(), id="D1-hash"),
        pytest.param("3f2504e0-4f89-11d3-9a0c-0305e82c3301", id="D1-uuid"),
        pytest.param(
            "https://x/a%20b%5Fc?d=%68%66 &#95;&lt;b&gt; \\u0068\\x5f a\\_b hf_transfer... hf_hub…", id="D1-codes"
        ),
        pytest.param("aGZf and hmX oZl8 68665f", id="D1-hints"),
        pytest.param(
            "?api_key={api_key}&token=${TOKEN} Authorization: Bearer <your-token-goes-here-1>", id="D1-examples"
        ),
        pytest.param("1" * 400 + " 0.1234567890123456789 1e-300", id="D1-long-number"),
    ],
)
def test_what_only_resembles_a_token_is_not_touched(text):
    same(_redact(text, _find_secrets({"A_TOKEN": TOKEN, "JUPYTER_TOKEN": "notebook"})), text)


@pytest.mark.parametrize(
    "value",
    ["python3", "float32", "bfloat16", "sha256", "LlamaForCausalLM", "query_key_value.weight", "falcon-mini-chat",
     "model.layers.0.self_attn.q_proj.weight", "SmolLM2-135M-Instruct", "learning_rate", "transformers"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["JUPYTER_TOKEN", "DB_PASSWORD"])
def test_a_name_of_the_workbook_is_hidden_beside_its_variable_only(name, value):
    """D1, F9: also names with digits, and long ones."""
    secrets = _find_secrets({name: value})
    same(_redact({"kernelspec": {"name": value}, value: f"of {value}."}, secrets),
         {"kernelspec": {"name": value}, value: f"of {value}."})  # fmt: skip
    same(_redact(f"{name}={value}", secrets), f"{name}=[redacted]")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param("utf16", lambda path: path.write_text(f"a {TOKEN}", encoding="utf-16"), id="D2-utf16"),
        pytest.param("utf16be", lambda path: path.write_text(TOKEN, encoding="utf-16-be"), id="D2-utf16-big"),
        pytest.param("utf32", lambda path: path.write_text(TOKEN, encoding="utf-32"), id="D2-utf32"),
        pytest.param("npy", lambda path: np.save(path, np.array([TOKEN, "b"])), id="D2-npy"),
        pytest.param("pkl", lambda path: path.write_bytes(pickle.dumps({PASSWORD: [TOKEN, 5]})), id="D2-pickle"),
    ],
)
def test_a_token_in_wide_letters_or_a_pickle_is_nowhere(kind, make, tmp_path):
    path = tmp_path / f"a.{kind}"
    make(path)
    size = path.stat().st_size
    _sweep(tmp_path, _find_secrets({"DB_PASSWORD": PASSWORD}))
    content = path.read_bytes().replace(b"\0", b"")
    same((TOKEN.encode() in content, PASSWORD.encode() in content, path.stat().st_size), (False, False, size))
    if kind == "npy":
        same(np.load(path).tolist(), ["*" * len(TOKEN), "b"])
    if kind == "pkl":
        same(next(iter(pickle.loads(path.read_bytes()).values()))[1], 5)


@pytest.mark.whole
def test_d2_a_large_log_holds_no_token_anywhere(tmp_path):
    path = tmp_path / "a.log"
    line = b"step 1: loss 2.5\n" * 1000
    with path.open("wb") as file:
        for number in range(4000):
            file.write(line)
            if number in (0, 1234, 2000, 3999):
                file.write(TOKEN.encode() + b"\n")
    size = path.stat().st_size
    _sweep(tmp_path, [])
    content = path.read_bytes()
    same((content.count(b"*" * len(TOKEN)), TOKEN.encode() in content, len(content)), (4, False, size))


def test_d2_a_link_to_a_path_with_a_token_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(f"/nowhere/{TOKEN}/x")
    _sweep(tmp_path, [])
    same(os.readlink(tmp_path / "link"), "/nowhere/[redacted]/x")


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        pytest.param("text/html", f"<p>{TOKEN.replace('_', '&#95;')}</p>", id="D2-page-html"),
        pytest.param("text/html", f"<p>{TOKEN}</p>", id="D2-page-older-run"),
        pytest.param("text/markdown", TOKEN.replace("_", "\\_"), id="D2-page-markdown"),
        pytest.param("text/plain", TOKEN, id="D2-page-plain"),
    ],
)
def test_a_token_that_a_page_would_decode_is_on_no_page(kind, source, tmp_path):
    import nbformat
    from nbformat import v4

    from helpers.runs.report import write_report
    from tests.unit.runs.test_report import make_run

    run = tmp_path / "20260131T120000Z-laptop"
    make_run(run)
    (run / "notebooks").mkdir(exist_ok=True)
    output = v4.new_output("display_data", data={kind: source, "text/plain": "x"} | {kind: source})
    nbformat.write(v4.new_notebook(cells=[v4.new_code_cell("1", outputs=[output])]), run / "notebooks/00_a.ipynb")
    write_report(run)
    no_secret(TOKEN, run / "html")
    same("[redacted]" in (run / "html/00_a.html").read_text(), True)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        pytest.param(
            "npz", lambda path: np.savez(path, note=np.array(TOKEN.encode()), values=np.arange(3)), id="D2-npz"
        ),
        pytest.param("zip", lambda path: zipfile.ZipFile(path, "w").writestr("a", TOKEN), id="D2-zip"),
        pytest.param("bin", lambda path: path.write_bytes(b"\x00\xff" + TOKEN.encode()), id="D2-binary"),
        pytest.param("txt", lambda path: path.write_bytes(b"Jos\xe9 " + TOKEN.encode()), id="D2-latin"),
    ],
)
def test_a_binary_file_loses_a_token_and_nothing_else(kind, make, tmp_path):
    path = tmp_path / f"a.{kind}"
    make(path)
    _sweep(tmp_path, [])
    no_secret(TOKEN, tmp_path)
    if kind == "npz":
        same(np.load(path)["values"].tolist(), [0, 1, 2])
    if zipfile.is_zipfile(path):
        same(zipfile.ZipFile(path).testzip(), None)


# --- whole runs -------------------------------------------------------------------------------------------------------

SETTING = {"OPENAI_MAX_TOKENS": "163840", "APP_KEY": "weight", "CACHE_KEY": "notebooks", "DB_PASSWORD": "laptop",
           "JUPYTER_TOKEN": "notebook"}  # fmt: skip
NUMBERS = [
    "from helpers import runs\nimport numpy as np, os\n"
    "runs.record_all({'weight': 163840, 'notebooks': 0.5, 'name': 'laptop', 'text': 'weight of notebooks'})",
    "print({'weight': 163840}, 'laptop', 'notebook')",
    "np.savez(os.environ['WORKBOOK_RUN_DIR'] + '/a.npz', weight=np.arange(3))",
]
LEAKS = [
    "import os, sys, base64, logging, json\nfrom pathlib import Path\n"
    "from IPython.display import HTML, Markdown, display\ntoken = os.environ['MY_TOKEN']\n"
    "stored = (Path(os.environ['HF_HOME']) / 'token').read_text().strip()\nprint(stored)",
    "print(token[:11], end='', flush=True)\nprint(token[11:])",
    "print(base64.b64encode(token.encode()).decode(), json.dumps({'a': token}), repr(token), file=sys.stderr)",
    "display(HTML(f'<a href=\"https://x/?token={token}\">x</a>'), Markdown(f'`{stored}`'), {'a': [token, stored]})",
    "print(os.environ['HF_ENDPOINT'], os.environ['https_proxy'], f'Authorization: Bearer {token}')",
    "run = Path(os.environ['WORKBOOK_RUN_DIR'])\n(run / f'{token}.txt').write_text(stored)\n(run / stored).mkdir()\n"
    "(run / stored / 'a.bin').write_bytes(b'\\x00\\xff' + token.encode())",
    "os.system(f'echo {token} >&2')\nlogging.warning('with %s', stored)\nos.write(2, token.encode())",
    "from helpers import runs\nruns.record(f'value of {token}', stored)",
    "import matplotlib.figure\nfigure = matplotlib.figure.Figure(figsize=(1, 1))\nruns.record_figure(token, figure);",
    "import ipywidgets as w\nout = w.Output()\nwith out: print(stored)\nw.VBox([w.Text(token), out])",
    "print(dict(os.environ))",
    "raise ValueError(f'cannot log in with {token} at {os.environ[\"HF_ENDPOINT\"]}: ' + stored)",
]


def own_notebook(folder, *cells):
    folder.mkdir(exist_ok=True)
    sources = [("profile = 'laptop'\nseed = 0\nname = 'x'", ["parameters"]), *((cell, []) for cell in cells)]
    document = {
        "nbformat": 4, "nbformat_minor": 5, "metadata": {},
        "cells": [
            {"cell_type": "code", "id": f"c{number}", "metadata": {"tags": tags}, "source": source, "outputs": [],
             "execution_count": None}
            for number, (source, tags) in enumerate(sources)
        ],
    }  # fmt: skip
    path = folder / "mine.ipynb"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.whole
def test_d1_a_run_with_innocent_variables_gives_the_same_values_and_can_be_resumed(tmp_path):
    notebook = own_notebook(tmp_path, *NUMBERS)
    values = []
    for name, environment in (("with", SETTING), ("without", {})):
        run = tmp_path / name
        workbook("run", "--notebook", notebook, "--folder", run, environment=environment).ends(0, "passed")
        values.append(json.loads((run / "results.json").read_text())["values"])
        same(np.load(run / "a.npz")["weight"].tolist(), [0, 1, 2])
        for file in ("manifest.json", "status.json", "results.json", "notebooks/mine.ipynb"):
            if "[redacted]" in (run / file).read_text():
                raise Fault("lost", f"{file} holds [redacted]")
    same(values[0], values[1])
    workbook("run", "--resume", tmp_path / "with", "--notebook", notebook, environment=SETTING).ends(0, "passed")


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A run whose cells put three secrets wherever a cell can put them; its folder and its screen."""
    folder = tmp_path_factory.mktemp("leaky")
    home = folder / "home"
    home.mkdir()
    (home / "token").write_text(f"{STORED}\n")
    notebook = own_notebook(folder / "own", *LEAKS)
    environment = {
        "HF_HOME": str(home), "MY_TOKEN": TOKEN, "HF_ENDPOINT": f"https://me:{PASSWORD}@hub.example.org",
        "https_proxy": f"http://me:{PASSWORD}@proxy.example.org:3128",
    }  # fmt: skip
    run = folder / "run"
    outcome = workbook("run", "--notebook", notebook, "--folder", run, "-p", f"name={TOKEN}", environment=environment)
    return run, outcome


@pytest.mark.whole
@pytest.mark.parametrize("secret", [TOKEN, STORED, PASSWORD], ids=["D2-environment", "D2-file", "D2-address"])
def test_a_secret_stands_in_no_file_of_a_run_and_not_on_the_screen(leaky, secret):
    run, outcome = leaky
    outcome.ends(1, "FAILED", "[redacted]", "Report:")
    no_secret(secret, run, outcome.screen)
    no_secret(base64.b64encode(secret.encode()).decode().rstrip("=")[:-1], run, outcome.screen)
    no_secret(secret[3:], run, outcome.screen)


@pytest.mark.whole
def test_d2_what_is_left_of_the_run_is_whole(leaky):
    run, _ = leaky
    for file in run.rglob("*.json"):
        json.loads(file.read_text())
    same((run / "report.html").exists(), True)
    same(json.loads((run / "manifest.json").read_text())["notebooks"]["mine"]["parameters"]["name"], "[redacted]")
    figures = json.loads((run / "results.json").read_text())["figures"]["mine"]
    same([(run / path).is_file() for path in figures.values()], [True])


@pytest.mark.whole
def test_d2_a_token_in_an_address_is_on_no_screen_of_doctor(tmp_path):
    environment = {"HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    screen = workbook("doctor", "--profile", "1x24gb", environment=environment, without=["HF_HUB_OFFLINE"]).screen
    no_secret(PASSWORD, tmp_path, screen)
    no_secret(TOKEN, tmp_path, screen)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["run", "-p", f"seed={TOKEN}"], id="D2-parameter"),
        pytest.param(["run", "--profile", TOKEN], id="D2-profile"),
        pytest.param(["run", "--only", TOKEN], id="D2-only"),
        pytest.param(["report", f"runs/{TOKEN}"], id="D2-folder"),
        pytest.param(["run", "--notebook", f"{TOKEN}.ipynb"], id="D2-notebook"),
        pytest.param([TOKEN], id="D2-no-such-command"),
        pytest.param(["run", f"--{TOKEN}"], id="D2-no-such-option"),
        pytest.param(["run", "--only", "00", TOKEN], id="D2-extra-argument"),
        pytest.param(["plan", "--batch", TOKEN], id="D2-no-number"),
    ],
)
def test_an_error_does_not_repeat_a_token(arguments, tmp_path):
    from typer.testing import CliRunner

    from helpers.cli import app

    result = CliRunner().invoke(app, arguments)
    same(result.exit_code, 2)
    no_secret(TOKEN, tmp_path, result.output)


def test_d2_a_run_folder_named_by_a_token_is_refused(tmp_path):
    outcome = workbook("run", "--only", "00", "--folder", tmp_path / TOKEN)
    outcome.ends(2, "holds a token or a password")
    no_secret(TOKEN, tmp_path, outcome.screen)


def test_d2_the_log_of_a_child_is_redacted_line_by_line(tmp_path):
    from helpers.runs.supervision import _Log

    with _Log(tmp_path / "a.log", _find_secrets({"HF_TOKEN": PASSWORD})) as log:
        for line in (TOKEN, PASSWORD, "plain"):
            log.write(f"says {line}\n".encode())
        same((tmp_path / "a.log").read_text().splitlines()[-1], "says plain")
    no_secret(TOKEN, tmp_path)
    no_secret(PASSWORD, tmp_path)


def test_d2_a_link_is_not_followed_by_the_sweep(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text(TOKEN)
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.txt").symlink_to(outside)
    os.link(outside, run / "hard.txt")
    _sweep(run, [])
    kept(outside, TOKEN.encode())
    same(subprocess.run(["grep", "-c", TOKEN, run / "hard.txt"], capture_output=True, check=False).stdout, b"0\n")
