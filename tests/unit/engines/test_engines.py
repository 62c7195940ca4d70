"""workbook bench: rows that follow from recorded times, real workers on a tiny checkpoint, and nothing left behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from helpers import figures, machine, models
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.base.processes import _Completed
from helpers.cli import app
from helpers.engines import EngineError, catalogue, convert, worker
from helpers.engines.catalogue import KINDS, Job
from helpers.engines.child import Child, WorkerEndedError, WorkerLateError
from helpers.models import load_profile
from helpers.speed import cases, rounds, session
from helpers.speed.benchmark import _Spread
from helpers.speed.cases import _Case, _Subject

NEW = 6
CASE = _Case(20, 3, NEW)
KEY_AND_VALUE = 2 * 2 * 16 * 4  # of one head: both, 2 layers, 16 numbers, fp32


@pytest.fixture(scope="module")
def tiny(tiny_loaded, tmp_path_factory):
    """The tiny Falcon as a checkpoint: 4 query heads, 2 key-value heads, context 128, fp32."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-falcon"
    ref = models.save(tiny_loaded, folder)
    return _Subject(ref, folder, tiny_loaded.model.config, "tiny")


@pytest.fixture
def setup(tmp_path):
    return rounds._Setup(
        precision="fp32", repeats=2, threads=1, bandwidth=1e9, machine=machine.detect(), cache=tmp_path / "cache",
        logs=tmp_path, peers=session.PEERS, limit_seconds=120,
    )  # fmt: skip


@pytest.fixture
def leaves_no_process():
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def row(**changes):
    return rounds._Row(**{
        "model": "a model", "engine": "plain", "precision": "fp32", "context": 20, "batch_size": 3, "prompt_tokens": 14,
        "new_tokens": NEW, "repeats": 2, "interleaved": True, "step_bytes": 10**6, "limit": 3000.0, **changes,
    })  # fmt: skip


def measured(subject, names, setup, sizes=(CASE,)):
    """The rows by size and engine."""
    found = rounds._rows(subject, sizes, catalogue.chosen(names), setup, {})
    return {(each.context, each.batch_size, each.engine): each for rows in found for each in rows}


# What follows from the times


def test_figures_follow_from_recorded_times():
    found = rounds._timed(row(), [(0.5, 1.5), (0.4, 2.4), (0.7, 1.3)])
    assert found.first_token == _Spread(0.5, 0.4, 0.7)
    assert found.prefill == _Spread(
        84, pytest.approx(60), pytest.approx(105)
    )  # 3 prompts of 14 tokens in half a second
    # 3 sequences of 5 tokens after the first: in 1.5 - 0.5, 1.3 - 0.5 and 2.4 - 0.5 seconds
    assert found.decode == _Spread(15, pytest.approx(15 / 1.9), pytest.approx(15 / 0.8))
    assert found.missing == found.note == ""


def test_times_that_tell_nothing_of_decoding_give_no_figure_for_it():
    found = rounds._timed(row(note="a note"), [(0.5, 1.5), (0.5, 0.4)])
    assert found.first_token
    assert found.decode is None
    assert found.note == f"a note; {rounds.TOO_NOISY}"


def test_tokens_agree_up_to_the_first_that_differs():
    assert rounds._agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == 3 + 1


def test_a_step_reads_the_weights_once_and_the_key_value_heads_of_half_a_reply(tiny, tiny_loaded):
    weights = 4 * tiny_loaded.model.num_parameters()
    assert tiny.step_bytes(CASE, "fp32") == weights + 3 * (20 - 3) * 2 * KEY_AND_VALUE
    untied = replace(tiny, config=tiny.config.from_dict({**tiny.config.to_dict(), "tie_word_embeddings": False}))
    assert untied.step_bytes(CASE, "fp32") == tiny.step_bytes(CASE, "fp32")  # the head comes, the embeddings go


def test_prompts_are_of_the_exact_length_and_differ(tiny):
    prompts = tiny.prompts(CASE)
    assert [len(each) for each in prompts] == [14] * 3
    assert len({tuple(each) for each in prompts}) == 3


def test_sizes_that_make_no_sense_are_refused():
    assert [(case.context, case.batch_size) for case in cases._grid((64, 48), (4, 1))] == [
        (48, 1), (48, 4), (64, 1), (64, 4),
    ]  # fmt: skip
    for contexts, batches, new in [((32,), (1,), 32), ((64,), (0,), 8), ((64,), (1,), 1), ((), (1,), 8)]:
        with pytest.raises(WorkbookError, match="longer than"):
            cases._grid(contexts, batches, new)


# Workers


@pytest.mark.usefixtures("leaves_no_process")
def test_plain_and_default_give_the_same_tokens_over_caches_of_different_size(tiny, setup):
    """Real workers. transformers caches 4 heads, the workbook 2; the last token is never cached."""
    found = measured(tiny, ["plain", "default"], setup, [CASE, _Case(200, 1, NEW)])
    plain, default = found[20, 3, "plain"], found[20, 3, "default"]
    for each in (plain, default):
        assert each.missing == each.note.removeprefix("a cache of the key-value heads") == ""
        assert each.same_tokens == 3 * NEW
        assert each.limit == pytest.approx(3 * 1e9 / tiny.step_bytes(CASE, "fp32"))
        assert each.peak_bytes > 100 * 2**20  # Python with torch takes more than that
        assert "VmHWM" in each.peak_definition or sys.platform != "linux"
        assert each.interleaved
    assert plain.cache_bytes == 3 * (20 - 1) * 4 * KEY_AND_VALUE
    assert default.cache_bytes == plain.cache_bytes // 2
    for engine in ("plain", "default"):
        assert found[200, 1, engine].missing == "the model's context ends at 128 tokens"
        assert found[200, 1, engine].first_token is None


class Requests:
    """A parent at hand: it has these requests, and keeps the answers."""

    def __init__(self, *requests):
        self.requests, self.answers = requests, []

    def __iter__(self):
        return iter(self.requests)

    def send(self, answer):
        self.answers.append(answer)


@pytest.mark.parametrize("engine", ["plain", "default"])
def test_a_worker_gives_the_tokens_that_the_library_gives_and_continues_after_an_error(
    tiny, tiny_loaded, setup, engine
):
    import torch

    prompts = tiny.prompts(CASE)
    ids = torch.tensor(prompts)
    expected = tiny_loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=-1,
                                          max_new_tokens=NEW, pad_token_id=0)[:, 14:]  # fmt: skip
    job = asdict(rounds._Seat.of(KINDS[engine], tiny, [CASE], setup).job)
    parent = Requests(
        {"do": "load", "job": job},
        {"do": "case", "prompts": prompts, "new_tokens": NEW},
        {"do": "run", "new_tokens": 1},
        {"do": "nonsense"},
        {"do": "load", "job": {**job, "folder": "/nowhere", "ref": {**job["ref"], "id": "/nowhere"}}},
        {"do": "run", "new_tokens": NEW},
    )
    worker._serve(worker._Worker(KINDS[engine].make()), parent)
    loaded, told, first, nonsense, nowhere, whole = parent.answers
    assert loaded["versions"].keys() == {"torch", "transformers"}
    assert told["tokens"] == expected.tolist()
    assert first["seconds"] > 0
    assert nonsense["error"] == "KeyError: 'nonsense'"
    assert "nowhere" in nowhere["error"]
    assert whole["seconds"] > 0  # it goes on after an error


FAKE = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    prompts, new = request.get("prompts", []), request.get("new_tokens", 0)
    answers = {
        "load": {"note": "", "versions": {}},
        "case": {"warm_up": 0.1, "tokens": [[1] * new for _ in prompts], "cache_bytes": None},
        "run": {"seconds": new / 10},
        "peak": {"bytes": 5, "definition": "x"},
    }
    {extra}
    print(json.dumps(answers[request["do"]]), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Starts a program that answers at once instead of a worker; its loop may do something extra."""

    def use(extra=""):
        (tmp_path / "fake.py").write_text(FAKE.replace("{extra}", extra), encoding="utf-8")
        program = tmp_path / "fake"
        # through a shell: the path of a program in a first line may not hold a space
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/fake.py" "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return use


@pytest.mark.usefixtures("leaves_no_process")
def test_a_worker_killed_in_a_run_is_a_row_that_says_so_and_the_next_case_has_a_new_one(tiny, setup, fake_worker):
    fake_worker()
    calls = []

    def kill_default(text, runs):
        calls.append(text)
        if text.endswith("20 x 3: plain") and calls.count(text) == 2:  # the first timed round
            for child in psutil.Process().children():
                if "default" in child.cmdline():
                    child.kill()

    later = _Case(24, 1, NEW)
    found = measured(tiny, ["plain", "default"], replace(setup, done=kill_default), [CASE, later])
    assert "SIGKILL" in found[20, 3, "default"].missing
    assert found[20, 3, "default"].first_token is None
    assert found[20, 3, "plain"].first_token
    assert found[24, 1, "default"].first_token
    assert found[24, 1, "default"].same_tokens == NEW


@pytest.mark.usefixtures("leaves_no_process")
def test_a_worker_over_its_time_is_ended_and_larger_cases_are_not_tried(tiny, setup, fake_worker):
    fake_worker('if request["do"] == "case": time.sleep(60)')
    start = time.monotonic()
    sizes = [CASE, _Case(20, 1, NEW), _Case(24, 3, NEW)]
    found = measured(tiny, ["plain"], replace(setup, limit_seconds=1), sizes)
    assert time.monotonic() - start < 20
    assert [each.missing for each in found.values()] == ["ran over 1 s"] * 2 + ["a smaller case ran over its time"]


@pytest.mark.usefixtures("leaves_no_process")
def test_a_checkpoint_that_cannot_be_loaded_is_a_row_with_the_reason(tiny, setup, fake_worker):
    fake_worker('answers["load"] = {"error": "OSError: nothing at " + request.get("job", {}).get("folder", "")}')
    seat = rounds._Seat.of(KINDS["plain"], replace(tiny, folder=Path("/nowhere")), [CASE], setup)
    with pytest.raises(EngineError, match="nowhere"):
        seat.ask({"do": "run", "new_tokens": 1}, CASE)
    assert "nowhere" in seat.missing
    assert seat.child is None


def answered(monkeypatch) -> list[tuple]:
    """Every request is answered at once, without a worker; the list of them grows as they are made."""
    calls = []

    def ask(seat, request, case):
        calls.append((seat.kind.name[0], request["do"], request.get("new_tokens")))
        told = {"tokens": [[1] * NEW] * 3, "warm_up": 0.1, "cache_bytes": None, "bytes": 5, "definition": "x"}
        return told | {"seconds": request.get("new_tokens", 0) / 10}

    monkeypatch.setattr(rounds._Seat, "start", lambda seat: None)
    monkeypatch.setattr(rounds._Seat, "ask", ask)
    return calls


def test_engines_take_turns_run_by_run(tiny, setup, monkeypatch):
    calls = answered(monkeypatch)
    found = measured(tiny, ["plain", "default"], setup)
    turn = [("p", "run", 1), ("p", "run", NEW), ("d", "run", 1), ("d", "run", NEW)]
    warm = [("p", "case", NEW), ("d", "case", NEW)]
    assert calls == [*warm, *turn, *turn, ("p", "peak", None), ("d", "peak", None)]
    assert [each.decode.median for each in found.values()] == pytest.approx([3 * 5 / 0.5] * 2)


def test_what_does_not_fit_together_is_measured_one_after_the_other(tiny, setup, monkeypatch):
    calls = answered(monkeypatch)
    small = replace(setup, machine=replace(setup.machine, gpus=(), ram_available_bytes=10**6))
    found = measured(tiny, ["plain", "default"], small)
    assert "".join(name for name, *_ in calls) == "p" * 6 + "d" * 6  # warm-up, twice two runs, and the peak
    assert not any(each.interleaved for each in found.values())


# Processes


@pytest.mark.usefixtures("leaves_no_process")
def test_a_worker_sleeps_between_answers_and_ends_with_its_family(tmp_path):
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60'])\nfor line in sys.stdin: print('{}', flush=True)"
    child = Child([sys.executable, "-c", code], os.environ, tmp_path / "log")
    assert child.ask({"do": "x"}, 30) == {}
    time.sleep(0.1)
    process = psutil.Process(child.process.pid)
    assert process.status() == psutil.STATUS_STOPPED
    grandchild, = process.children()  # fmt: skip
    child.end()
    assert not process.is_running()
    with suppress(psutil.NoSuchProcess):
        assert grandchild.wait(5) is None


@pytest.mark.usefixtures("leaves_no_process")
def test_how_a_worker_ended_is_told(tmp_path):
    child = Child([sys.executable, "-c", "raise SystemExit('out of luck')"], os.environ, tmp_path / "log")
    with pytest.raises(WorkerEndedError, match="exit code 1: out of luck"):
        child.ask({"do": "x"}, 30)
    late = Child([sys.executable, "-c", "import time; time.sleep(60)"], os.environ, tmp_path / "log")
    with pytest.raises(WorkerLateError, match="ran over 0 s"):
        late.ask({"do": "x"}, 0.2)
    assert late.process.returncode == -signal.SIGKILL


NOISY = """
import os, sys
from helpers.engines import catalogue, worker
class Noisy:
    def load(self, job):
        print("python's noise"); os.write(1, b"a library's noise\\n")
        return catalogue._Started(job.precision, {})
catalogue.Kind.make = lambda kind: Noisy()
sys.argv = ["worker", "plain"]
worker._main()
"""


def test_what_libraries_print_does_not_reach_the_answers(tmp_path):
    child = Child([sys.executable, "-c", NOISY], os.environ, tmp_path / "log")
    job = vars(Job({}, "", "bf16", 1, 1, 1, ""))
    assert child.ask({"do": "load", "job": job}, 30) == {"note": "bf16", "versions": {}}
    child.end()
    assert "a library's noise" in (tmp_path / "log").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_sleeping_worker_dies_with_a_parent_that_is_killed(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from helpers.engines.child import Child
child = Child([sys.executable, "-c", {NOISY!r}], os.environ, Path({str(tmp_path / "log")!r}))
child.ask({{"do": "load", "job": {vars(Job({}, "", "bf16", 1, 1, 1, ""))!r}}}, 30)
print(child.process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


# The worker of vLLM runs under another Python, of which nothing but the standard library is certain.
BARE = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in ("worker", "catalogue", "peak", "vllm"):
    importlib.import_module("helpers.engines." + name)
import helpers.engines
helpers.engines.EngineError
print(helpers.engines.catalogue.KINDS["vllm"].make().__class__.__name__)
"""


def test_the_worker_is_imported_where_only_the_standard_library_is(tmp_path):
    (tmp_path / "helpers").symlink_to(ROOT / "helpers")
    python = Path(sys.executable).resolve()  # past the virtual environment
    done = subprocess.run(
        [python, "-I", "-S", "-c", BARE, tmp_path], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "_Vllm"


PEAK = """
from helpers.engines.peak import _read_peak, _reset_peak
held = bytearray(64 * 2**20); base = _read_peak()[0]
more = bytearray(128 * 2**20); high = _read_peak()[0]
del more; _reset_peak()
print(base, high, *_read_peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset through /proc")
def test_the_peak_is_that_since_the_reset():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT)
    base, high, after, definition = done.stdout.split(maxsplit=3)
    assert int(high) - int(base) == pytest.approx(128 * 2**20, rel=0.02)
    assert int(after) == pytest.approx(int(base), abs=8 * 2**20)
    assert "VmHWM" in definition


# Peers


def test_what_is_not_installed_is_named(tiny, setup, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nothing = replace(setup, peers=tmp_path)
    found = measured(tiny, ["llama.cpp", "ctranslate2", "vllm"], nothing)
    assert [each.missing.split(":")[0] for each in found.values()] == ["not installed"] * 3
    assert "--vllm-python" in found[20, 3, "vllm"].missing
    assert rounds._missing(KINDS["plain"], replace(nothing, precision="nf4")) == "takes no nf4 weights"
    with pytest.raises(WorkbookError, match=r"no engine 'tgi'\. Choose one of: plain, default, fastest, llama\.cpp"):
        catalogue.chosen(["tgi"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama.cpp", "ctranslate2"])
@pytest.mark.usefixtures("leaves_no_process")
def test_a_peer_gives_the_same_tokens_in_fp32(tiny, setup, name):
    """Through its converter; both take the grouped heads of Falcon's new decoder architecture."""
    if why := rounds._missing(KINDS[name], setup):
        pytest.skip(why)
    found = measured(tiny, ["plain", name], setup, [_Case(20, 1, NEW), CASE])
    for size in (1, 3):
        each = found[20, size, name]
        assert each.missing == ""
        assert each.same_tokens == size * NEW
    told = found[20, 3, "llama.cpp"].cache_bytes if name == "llama.cpp" else None
    # 256 tokens of each sequence, 2 heads, in float16; the log rounds to hundredths of a MiB
    assert told is None or told == pytest.approx(3 * 256 * 2 * KEY_AND_VALUE // 2, abs=2**20 / 100)


@pytest.mark.slow
@pytest.mark.usefixtures("leaves_no_process")
def test_vllm_gives_the_same_tokens_in_fp32(setup):
    python = os.environ.get("WORKBOOK_VLLM_PYTHON")
    if not python:
        pytest.skip("not installed: WORKBOOK_VLLM_PYTHON names the Python of an environment with vLLM")
    ref = load_profile("laptop").falcon_chat
    subject = _Subject(ref, models.resolve(ref), models.config(ref), "mini")
    found = measured(subject, ["plain", "vllm"], replace(setup, vllm_python=Path(python)), [_Case(64, 2, 8)])
    assert found[64, 2, "vllm"].missing == ""
    assert found[64, 2, "vllm"].same_tokens == 2 * 8


def test_a_converter_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.processes, "run", lambda *_: _Completed(1, "", "a\nValueError: no"))
    (tmp_path / "model").mkdir()
    job = Job({}, str(tmp_path / "model"), "bf16", 1, 1, 1, str(tmp_path / "cache"))
    with pytest.raises(EngineError, match="does not take this checkpoint: ValueError: no"):
        convert._converted(job, "gguf", "bf16")


# The command


def test_the_command_writes_json_table_and_figure(tmp_path):
    out = tmp_path / "results"
    command = ["bench", "--models", "falcon_chat", "--engines", "plain,vllm", "--context", "24,600", "--batch", "1"]
    options = ["--new-tokens", "4", "--repeats", "1", "--vllm-python", str(tmp_path / "none"), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    written = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert {"device", "cpus", "date", "command", "versions", "precision", "repeats", "interrupted"} <= written.keys()
    assert written["bandwidth_bytes_per_second"][0] > 0
    assert written["versions"].keys() == {"python", "torch", "transformers"}
    assert [(each["engine"], each["context"]) for each in written["rows"]] == [
        ("plain", 24), ("vllm", 24), ("plain", 600), ("vllm", 600),
    ]  # fmt: skip
    for each in written["rows"]:
        assert each.keys() == {field.name for field in fields(rounds._Row)}
        assert bool(each["missing"]) == (each["first_token"] is None)
    text = (out / "bench.md").read_text(encoding="utf-8")
    assert "falcon-mini-chat (stand-in for tiiuae/falcon-180B-chat)" in text
    assert "- vllm, context 24, batch 1: not installed" in text
    assert "- all engines, context 600, batch 1: the model's context ends at 512 tokens" in text
    assert str(tmp_path) not in (out / "bench.json").read_text(encoding="utf-8")
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engines", "tgi"], "no engine 'tgi'"),
        (["--models", "gpt"], "no model 'gpt'"),
        (["--context", "many"], "Not a whole number: many"),
        (["--context", "16"], "longer than the 32 new tokens"),
        (["--precision", "fp4"], "no precision 'fp4'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["bench", "--out", str(out), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert not out.exists()


def test_an_interrupt_keeps_what_was_measured_and_leaves_no_process(tmp_path):
    code = f"""
import signal
from helpers.cli import app
signal.signal(signal.SIGINT, signal.default_int_handler)
app(["bench", "--models", "falcon_chat", "--engines", "plain", "--context", "24,400", "--batch", "1,16",
     "--new-tokens", "8", "--repeats", "20", "--out", {str(tmp_path)!r}])
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 100
        while not (tmp_path / "bench.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        workers = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "Interrupted; measured so far" in output
    assert workers
    assert not any(worker.is_running() for worker in workers)
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert written["interrupted"]
    assert 1 <= len(written["rows"]) < 4


def test_the_quick_run_leaves_out_what_starts_slowly():
    def names(model, **wish):
        return [kind.name for kind in session._kinds(session.Wish(quick=True, **wish), model)]

    assert names("llama_chat") == ["plain", "default", "llama.cpp", "ctranslate2"]
    assert names("shape") == ["plain", "default"]
    assert names("shape", engines=["vllm"]) == ["vllm"]


# Table and figure


def test_rows_are_told_apart_in_the_table():
    full = replace(rounds._timed(row(), [(0.5, 1.5)]), warm_up_seconds=2.0, same_tokens=18, peak_bytes=2**30)
    lacking = [row(engine="vllm", context=context, missing="not installed") for context in (20, 40)]
    conditions = session._Conditions(
        device="CPU: x", cpus=2, ram_bytes=2**33, system="Linux", date="today", command="workbook", profile="laptop",
        precision="fp32", quick=False, repeats=1, versions={"torch": "2"}, threads=2,
        bandwidth_bytes_per_second=[1.5e10],
        slowest_copy_bytes_per_second=[1.2e10],
    )  # fmt: skip
    text = session._page(conditions, [full, *lacking])
    cells = (
        "| 20 | 3 | plain | 500 (500 to 500) | 84 (84 to 84) | 15 (15 to 15) | 3,000 | 1.00 GiB | not told | 18 of 18 |"
    )
    assert cells in text
    assert "- vllm, context 20, batch 3; context 40, batch 3: not installed" in text
    assert "15.0 (slowest copy 12.0) GB/s" in text


def test_the_figure_shows_each_engine_with_its_spread_and_the_limit():
    rows = [
        rounds._timed(row(engine=engine, context=context, batch_size=size, limit=99), [(0.5, 1.5), (0.5, 1.75)])
        for engine in ("plain", "default") for context in (128, 1900) for size in (1, 4)
    ]  # fmt: skip
    figure = figures.engine_speeds([*rows, row(engine="vllm", missing="not installed")], session._titles(), "two cores")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["batch 1", "batch 4", "batch 3"]
    first = figure.axes[0]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["context 128", "context 1,900"]
    heights = sorted({float(container[0].get_ydata()[0]) for container in first.containers})
    assert heights == pytest.approx([5 / 1.125])
    assert {line.get_ydata()[0] for line in first.lines if line.get_linestyle() == "--"} == {99}
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {KINDS["plain"].title, KINDS["default"].title, "limit by the memory's bandwidth"}


def test_the_shape_has_falcon_180bs_proportions_and_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "SHAPE", cases.SHAPE | {"hidden_size": 256, "num_hidden_layers": 1})
    ref = cases._shape_ref(tmp_path)
    config = models.config(ref)
    assert (config.num_attention_heads, config.num_kv_heads, config.max_position_embeddings) == (64, 4, 2048)
    assert str(config.dtype) == "torch.bfloat16"
    weights = models.resolve(ref) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert cases._shape_ref(tmp_path) == ref
    assert weights.stat().st_mtime_ns == before
    assert "random weights" in _Subject(ref, weights.parent, config, "shape").label
