"""The manager of child processes, with real processes: what they say, when they pause, and that none is left."""

import os
import signal
import sys

import psutil
import pytest
from process_tools import processes_with, wait_for

from helpers.base import processes
from helpers.base.processes import ChildProcess

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


@pytest.fixture
def sleeper():
    """How to find the sleeps of this test: by seconds that nobody else sleeps. None outlives the test."""
    seconds = "813579"
    yield seconds
    for process in processes_with(seconds):
        process.kill()


def test_messages_come_back_until_the_input_is_closed():
    with ChildProcess([sys.executable, "-c", ECHO]) as child:
        child.send({"text": "ü\n", "number": 1.5})
        assert child.receive(30) == {"text": "ü\n", "number": 1.5}
        with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
            child.receive(0.1)
        assert child.returncode is None
        child.close_input()
        with pytest.raises(EOFError):
            child.receive(30)
        assert child.wait(30) == 0


def test_a_paused_child_says_nothing():
    with ChildProcess([sys.executable, "-c", ECHO]) as child:
        child.send({"number": 1})
        child.receive(30)
        child.pause()
        wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
        child.send({"number": 2})
        with pytest.raises(TimeoutError):
            child.receive(0.5)
        child.resume()
        assert child.receive(30) == {"number": 2}


def test_errors_go_to_a_file_that_is_appended_to_or_line_by_line_to_a_reader(tmp_path):
    log, lines = tmp_path / "log", []
    log.write_text("before\n")
    command = ["sh", "-c", "echo one >&2; echo two >&2"]
    for errors in (log, lines.append):
        with ChildProcess(command, errors=errors) as child:
            assert child.wait(30) == 0
    assert log.read_text() == "before\none\ntwo\n"
    assert lines == [b"one\n", b"two\n"]


def test_a_child_that_does_not_read_is_told():
    with ChildProcess(["false"]) as child:
        child.wait(30)
        with pytest.raises(BrokenPipeError):
            child.send({"text": "x" * 2**20})


def test_end_kills_descendants_by_mark_by_session_and_by_descent(sleeper):
    """One keeps the session, one has a session of its own, one has another environment."""
    command = f"sleep {sleeper} & setsid sleep {sleeper} & env -i sleep {sleeper} & wait"
    child = ChildProcess(["sh", "-c", command])
    wait_for(lambda: len(processes_with(sleeper)) == 4)
    assert child.end() == 4
    assert child.returncode == -signal.SIGKILL
    assert processes_with(sleeper) == []
    assert child.end() == 0


def test_descendants_once_seen_are_killed_after_their_parent_s_death(sleeper):
    """Without a mark, in a session of their own or not."""
    command = f"env -i setsid sh -c 'sleep {sleeper} & wait' & env -i sleep {sleeper} & wait"
    child = ChildProcess(["sh", "-c", command])
    wait_for(lambda: len([one for one in processes_with(sleeper) if one.name() == "sleep"]) == 2)
    assert child.resident_bytes() > 2**16
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert len(processes_with(sleeper)) == 3
    assert child.end() == 3
    assert processes_with(sleeper) == []
    assert child.resident_bytes() == 0


def test_orphans_of_the_session_are_killed_though_never_seen(sleeper):
    with ChildProcess(["sh", "-c", f"env -i sleep {sleeper} >/dev/null & exit 3"]) as child:
        assert child.wait(30) == 3
        wait_for(lambda: len(processes_with(sleeper)) == 1)
    assert processes_with(sleeper) == []


def test_a_marked_process_kills_the_others_and_lives(sleeper):
    code = (
        "import subprocess\nfrom helpers.base import families\nfrom helpers.base.parent import Parent\n"
        "parent = Parent()\nmark = parent.receive()['mark']\n"
        "with families.ending_descendants(mark):\n"
        f"    subprocess.Popen(['setsid', 'sleep', '{sleeper}'])\n"
        f"    subprocess.Popen(['sleep', '{sleeper}'], env={{}})\n"
        "    print('noise')\n    parent.send({})\n    parent.receive()\n"
        "parent.send({})\nparent.receive()"
    )
    lines = []
    with ChildProcess([sys.executable, "-c", code], errors=lines.append) as child:
        child.send({"mark": child.mark})
        child.receive(30)
        wait_for(lambda: len([process for process in processes_with(sleeper) if process.name() == "sleep"]) == 2)
        child.send({})
        child.receive(30)
        assert processes_with(sleeper) == [psutil.Process(child.pid)]  # its command line holds the seconds, too
        child.send({})
        assert child.wait(30) == 0
    assert lines == [b"noise\n"]


def test_a_child_ends_with_its_parent_and_what_carries_the_mark_too(sleeper):
    code = (
        "import subprocess, time\nfrom helpers.base.parent import Parent\nparent = Parent()\n"
        "parent.end_with_it(parent.receive()['mark'])\n"
        f"subprocess.Popen(['sleep', '{sleeper}'], start_new_session=True)\n"
        "parent.send({})\ntime.sleep(60)"
    )
    with ChildProcess([sys.executable, "-c", code]) as child:
        child.send({"mark": child.mark})
        child.receive(30)
        wait_for(lambda: processes_with(sleeper))
        child.close_input()
        assert child.wait(30) == 1
        assert processes_with(sleeper) == []


@pytest.mark.timeout(30)
def test_who_holds_the_pipe_does_not_hold_the_parent(sleeper, monkeypatch):
    """The child ends, and an unreachable process of it keeps the write ends of its output open."""
    monkeypatch.setattr(processes, "_kill", lambda *_: 0)
    monkeypatch.setattr(processes, "_READER_SECONDS", 0.2)
    with ChildProcess(["sh", "-c", f"setsid sleep {sleeper} & exit 3"], errors=lambda _: None) as child:
        wait_for(lambda: processes_with(sleeper))
        assert child.wait(30) == 3


def test_a_command_is_run_and_what_it_wrote_is_told(sleeper):
    done = processes.run(["sh", "-c", f"cat; echo out; echo a >&2; echo last >&2; setsid sleep {sleeper} & exit 2"])
    assert (done.returncode, done.output, done.errors, done.last_words) == (2, "out\n", "a\nlast\n", "last")
    assert processes_with(sleeper) == []
    assert processes.run(["false"]).last_words == "exit code 1"
    large = processes.run([sys.executable, "-c", "print('x' * 1_000_000)"])
    assert len(large.output) == 1_000_001


def test_a_command_over_its_time_is_killed(sleeper):
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        processes.run(["sh", "-c", f"sleep {sleeper} & wait"], seconds=0.5)
    assert processes_with(sleeper) == []
