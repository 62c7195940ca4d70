"""The fault campaign's fixtures, and the summary at its end."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from .judge import KINDS, Fault

_PLURALS = {"lost": "lost", "wrong": "wrong", "survivor": "survivors", "leak": "leaks", "execution": "executions",
            "traceback": "tracebacks"}  # fmt: skip


@pytest.fixture
def moments(request):
    """Random moments, seeded by the case's name and FAULTS_SEED, which a failure prints."""
    seed = f"{os.environ.get('FAULTS_SEED', '0')} {request.node.name}"
    print(f"seed: {seed}")
    return random.Random(seed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Note the kind of a failure in the report, which travels from xdist's workers."""
    report = (yield).get_result()
    if report.failed:
        error = call.excinfo.value
        report.user_properties.append(("fault", error.kind if isinstance(error, Fault) else "traceback"))


def pytest_terminal_summary(terminalreporter):
    """How many cases there were, and how many failed in each of the six ways."""
    ours = {
        outcome: [report for report in reports if "tests/faults/" in getattr(report, "nodeid", "")]
        for outcome, reports in terminalreporter.stats.items()
    }
    failures = ours.get("failed", []) + ours.get("error", [])
    cases = len(ours.get("passed", [])) + len(failures)
    if not cases:
        return
    kinds: Counter[str] = Counter()
    for report in failures:
        # a file that cannot be imported fails with a report that has no properties
        kinds.update(value for name, value in getattr(report, "user_properties", ()) if name == "fault")
    counts = ", ".join(f"{kinds[kind]} {_PLURALS[kind]}" for kind in KINDS)
    terminalreporter.write_line(f"fault campaign: {cases} cases: {counts}; {len(ours.get('skipped', []))} skipped")
