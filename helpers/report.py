"""A finished run as one HTML page, made from the files of its run folder alone."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from helpers import results
from helpers.runner import read_manifest, read_status
from helpers.types import gib

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAIN_PACKAGES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "peft", "trl", "safetensors", "tokenizers", "numpy"),
    *("papermill", "ipykernel", "ipywidgets", "jupyterlab", "matplotlib"),
)
ROLES = {"falcon": "Falcon, base", "falcon_chat": "Falcon, chat", "llama_chat": "Llama, chat"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path. Raises RunFolderError where there is no run."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    target = run_dir / "report.html"
    results.write_text(target, template.render(context(run_dir)))
    return target


def context(run_dir: Path) -> dict[str, Any]:
    """What the page shows, ready for display."""
    status, manifest, recorded = read_status(run_dir), read_manifest(run_dir), results.read(run_dir)
    notebooks = [_notebook(name, entry, recorded) for name, entry in status["notebooks"].items()]
    return {
        "name": run_dir.resolve().name,
        "manifest": manifest,
        "outcome": _outcome(status),
        "notebooks": notebooks,
        "models": [_model(role, ref) for role, ref in manifest["models"].items()],
        "stand_ins": sorted({ref["label"] for ref in manifest["models"].values() if ref["stand_in_for"]}),
        "facts": _facts(manifest, notebooks),
        "verdicts": Counter(value["verdict"] for notebook in notebooks for value in notebook["values"]),
        "values": [notebook for notebook in notebooks if notebook["values"]],
        "figures": _figures(run_dir, recorded["figures"]),
        "packages": {name: manifest["packages"][name] for name in MAIN_PACKAGES if name in manifest["packages"]},
        "hashes": {label: files for label, files in _hashes(manifest).items() if files},
    }


def duration(seconds: float | None) -> str:
    """Seconds for people: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    large, small = (whole // 60, whole % 60) if whole < 7200 else (whole // 3600, whole % 3600 // 60)
    units = ("min", "s") if whole < 7200 else ("h", "min")
    return f"{large} {units[0]} {small} {units[1]}" if small else f"{large} {units[0]}"


def _outcome(status: Mapping[str, Any]) -> dict[str, str]:
    counts = Counter(entry["status"] for entry in status["notebooks"].values())
    total = sum(counts.values())
    if status["state"] != "finished":
        return {"mark": "failed", "text": f"{status['state']}: {counts['passed']} of {total} notebooks passed"}
    if counts["passed"] == total:
        return {"mark": "passed", "text": f"all {total} notebooks passed"}
    return {"mark": "failed", "text": f"{total - counts['passed']} of {total} notebooks did not pass"}


def _notebook(name: str, entry: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "status": entry["status"],
        "reason": entry["reason"],
        "line": entry["line"],
        "progress": f"{entry['cell']} of {entry['cells']}" if entry["cells"] else "–",
        "seconds": entry["seconds"],
        "time": duration(entry["seconds"]) if entry["started"] else "–",
        "expected": duration(entry["expected_seconds"]),
        "budget": duration(entry["budget_seconds"]),
        "share": min(100, round(100 * entry["seconds"] / entry["budget_seconds"])),
        "memory": gib(entry["peak_bytes"]) if entry["peak_bytes"] else "–",
        "values": [_value(key, value) for key, value in recorded["values"].get(name, {}).items()],
    }


def _value(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": name,
        "claim": entry["claim"] or "",
        "value": results.with_unit(entry["value"], entry["unit"]),
        "expected": results.with_tolerance(entry["expected"], entry["tolerance"], entry["unit"]),
        "source": entry["source"] or "",
        "verdict": entry["verdict"],
        "mark": entry["verdict"].replace(" ", "-"),
    }


def _model(role: str, ref: Mapping[str, Any]) -> dict[str, str]:
    return {
        "role": ROLES.get(role, role),
        "name": ref["id"],
        "stand_in_for": ref["stand_in_for"] or "",
        "revision": {"embedded": "in this repository", "package": ref["file"]}.get(ref["source"], ref["revision"]),
        "licence": ref["licence"] or "–",
    }


def _facts(manifest: Mapping[str, Any], notebooks: list[dict[str, Any]]) -> dict[str, str]:
    """The lines of the page's head, by label."""
    hardware, git = manifest["hardware"], manifest["git"]
    changed = " with uncommitted changes" if git["dirty"] else ""
    facts = {
        "Profile": f"{manifest['profile']}: {manifest['description']}",
        "Started": _moment(manifest["started"]),
        "Finished": _moment(manifest["finished"]),
        "Notebooks took": duration(sum(notebook["seconds"] for notebook in notebooks)),
        "Command": " ".join(manifest["command"]) or "–",
        "Commit": f"{git['commit'][:12]}{changed}" if git["commit"] else "not a git checkout",
        "Python": manifest["python"],
    }
    if "error" in hardware:
        return facts | {"Machine": f"unknown ({hardware['error']})"}
    gpus = Counter(f"{gpu['name']} ({gib(gpu['total_bytes'])})" for gpu in hardware["gpus"])
    return facts | {
        "Processor": f"{hardware['cpu_name']}, {hardware['cpu_count']} cores",
        "Memory": gib(hardware["ram_bytes"]),
        "GPUs": ", ".join(f"{count} × {name}" for name, count in gpus.items()) or "none",
        "System": hardware["system"],
    }


def _figures(run_dir: Path, figures: Mapping[str, Mapping[str, str]]) -> list[dict[str, str]]:
    return [
        {"notebook": notebook, "name": name, "uri": _data_uri(run_dir / path)}
        for notebook, named in sorted(figures.items())
        for name, path in named.items()
    ]


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _hashes(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    notebooks = {f"{name}.ipynb": entry["sha256"] for name, entry in manifest["notebooks"].items()}
    return {ref["label"]: ref["sha256"] for ref in manifest["models"].values()} | {"Notebooks": notebooks}


def _moment(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC" if text else "–"
