"""A finished run as HTML pages, made from the files of its run folder alone: the report, and its notebooks' pages.

The report holds the claims ledger: every numbered statement of the article (``notebooks/data/claims.yaml``) beside what
the run recorded for it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from helpers import results
from helpers.pages import write_pages
from helpers.runner import read_manifest, read_status
from helpers.types import GIB, ROOT, gib

TEMPLATES = Path(__file__).parent
CLAIMS = ROOT / "notebooks" / "data" / "claims.yaml"
MAIN_PACKAGES = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "peft", "trl", "safetensors", "tokenizers", "numpy"),
    *("papermill", "ipykernel", "ipywidgets", "jupyterlab", "matplotlib"),
)
JUDGED = ("passed", "failed", "on-stand-in")
ROLES = {"falcon": "Falcon, base", "falcon_chat": "Falcon, chat", "llama_chat": "Llama, chat"}


class Verdict(NamedTuple):
    """What a run says of a claim: in words, the mark to show it with, and what it rests on or why there is none."""

    text: str
    mark: str
    basis: str = ""


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and its notebooks' pages (``html/``) into a run folder and return the report's path.

    A notebook's page is written again only when the executed notebook is newer. Raises RunFolderError where there is no
    run.
    """
    target = run_dir / "report.html"
    results.write_text(target, page("report.html.j2", context(run_dir)))
    return target


def page(template: str, content: Mapping[str, Any]) -> str:
    """A template of this folder filled with ``content``, which is escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(content)


def context(run_dir: Path) -> dict[str, Any]:
    """What the page shows, ready for display. Writes the notebooks' pages that are missing or old, to link to them."""
    status, manifest, recorded = read_status(run_dir), read_manifest(run_dir), results.read(run_dir)
    pages = write_pages(run_dir, status["notebooks"])
    notebooks = [_notebook(name, entry, recorded, pages) for name, entry in status["notebooks"].items()]
    claims = _claims(notebooks, manifest)
    return {
        "name": run_dir.resolve().name,
        "manifest": manifest,
        "outcome": _outcome(status),
        "machine": machine(manifest["hardware"]),
        "date": f"{datetime.fromisoformat(manifest['started']):%-d %B %Y}",
        "labels": sorted({ref["label"] for ref in manifest["models"].values()}),
        "stand_ins": _stand_ins(manifest),
        "rehearsal": _rehearsal(manifest),
        "tiles": _tiles(status, notebooks, claims),
        "facts": _facts(manifest),
        "models": [_model(role, ref) for role, ref in manifest["models"].items()],
        "notebooks": notebooks,
        "claims": claims,
        "judged": Counter(claim["mark"] for claim in claims),
        "in_part": sum(claim["mark"] == "passed" and claim["reach"] != "" for claim in claims),
        "verdicts": _verdicts(notebooks),
        "values": [_differing_first(notebook) for notebook in notebooks if notebook["values"]],
        "figures": _figures(run_dir, recorded["figures"], notebooks),
        "packages": {name: manifest["packages"][name] for name in MAIN_PACKAGES if name in manifest["packages"]},
        "hashes": {label: files for label, files in _hashes(manifest).items() if files},
    }


def read_claims() -> dict[str, dict[str, Any]]:
    """The article's statements by number; the head of the file says what each entry holds."""
    import yaml

    return yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """All claims of the article in order, each with ``verdict``, ``mark`` and ``basis`` as this run gives them.

    Raises RunFolderError where there is no run.
    """
    status, manifest, recorded = read_status(run_dir), read_manifest(run_dir), results.read(run_dir)
    notebooks = [_notebook(name, entry, recorded, {}) for name, entry in status["notebooks"].items()]
    return _claims(notebooks, manifest)


def claim_verdict(values: Iterable[Mapping[str, Any]], stand_ins: Mapping[str, str]) -> Verdict:
    """What a claim's values say of it.

    ``values`` have ``agrees`` (bool or None) and ``model`` (a label or None); ``stand_ins`` gives the short name of a
    stand-in by its label. Values computed, or measured on the real model, decide, and one that disagrees is enough.
    What was measured on stand-ins says nothing about the real model: it is named as theirs.
    """
    values = list(values)
    theirs = [value for value in values if value["model"] in stand_ins]
    real = [value for value in values if value["model"] not in stand_ins and value["agrees"] is not None]
    if real:
        agrees = all(value["agrees"] for value in real)
        deciding = dict.fromkeys(value["model"] for value in real if value["agrees"] == agrees)
        basis = " and ".join(f"measured on {model}" if model else "computed" for model in deciding)
        return Verdict("confirmed", "passed", basis) if agrees else Verdict("not confirmed", "failed", basis)
    judged = [value for value in theirs if value["agrees"] is not None]
    if not judged and len(theirs) < len(values):
        return Verdict("shown, not judged", "shown")
    names = dict.fromkeys(stand_ins[value["model"]] for value in judged or theirs)
    where = f"on the stand-in{'s' if len(names) > 1 else ''} {' and '.join(names)}"
    if not judged:
        return Verdict(f"shown {where}", "shown")
    agrees = all(value["agrees"] for value in judged)
    return Verdict(f"{where}: {'agrees' if agrees else 'does not agree'}", "on-stand-in")


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


def _notebook(
    name: str, entry: Mapping[str, Any], recorded: Mapping[str, Any], pages: Mapping[str, str]
) -> dict[str, Any]:
    values = [_value(key, value) for key, value in recorded["values"].get(name, {}).items()]
    return {
        "name": name,
        "page": pages.get(name, ""),
        "status": entry["status"],
        "reason": entry["reason"],
        "line": entry["line"],
        "progress": f"{entry['cell']} of {entry['cells']}" if entry["cells"] else "–",
        "seconds": entry["seconds"],
        "time": duration(entry["seconds"]) if entry["started"] else "–",
        "expected": duration(entry["expected_seconds"]),
        "budget": duration(entry["budget_seconds"]),
        "share": min(100, round(100 * entry["seconds"] / entry["budget_seconds"])),
        "peak_bytes": entry["peak_bytes"] or 0,
        "memory": gib(entry["peak_bytes"]) if entry["peak_bytes"] else "–",
        "values": values,
    }


def _value(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": name,
        "name": name.replace("_", " "),
        "claim": entry["claim"] or "",
        "value": results.with_unit(entry["value"], entry["unit"]),
        "expected": results.with_tolerance(entry["expected"], entry["tolerance"], entry["unit"]),
        "source": entry["source"] or "",
        "verdict": entry["verdict"],
        "mark": entry["verdict"].replace(" ", "-"),
        "agrees": entry.get("agrees"),
        "model": entry.get("model"),
    }


def _differing_first(notebook: Mapping[str, Any]) -> dict[str, Any]:
    return {**notebook, "values": sorted(notebook["values"], key=lambda value: value["verdict"] != results.DIFFERS)}


def _verdicts(notebooks: Iterable[Mapping[str, Any]]) -> Counter[str]:
    return Counter(value["verdict"] for notebook in notebooks for value in notebook["values"])


def _tiles(
    status: Mapping[str, Any],
    notebooks: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """The summary: a few figures, each with the section that tells more and a mark."""
    passed, verdicts = sum(notebook["status"] == "passed" for notebook in notebooks), _verdicts(notebooks)
    whole = passed == len(notebooks) and status["state"] == "finished"
    apart = max((notebook["peak_bytes"] for notebook in notebooks), default=0)
    peak = status.get("peak_bytes", apart)  # of the whole run, which earlier runs did not record
    judged = sum(claim["mark"] in JUDGED for claim in claims)
    rows = (
        ("notebooks passed", f"{passed} of {len(notebooks)}", "notebooks", "passed" if whole else "failed"),
        ("values as expected", verdicts[results.AS_EXPECTED], "values", ""),
        ("values that differ", verdicts[results.DIFFERS], "values", "failed" if verdicts[results.DIFFERS] else ""),
        ("values unmeasured", verdicts[results.UNMEASURED], "values", ""),
        ("claims with a verdict", f"{judged} of {len(claims)}", "claims", ""),
        ("total time", duration(sum(notebook["seconds"] for notebook in notebooks)), "notebooks", ""),
        ("peak memory", gib(peak) if peak else "–", "notebooks", ""),
    )
    return [{"label": label, "value": str(value), "to": to, "mark": mark} for label, value, to, mark in rows]


def _stand_ins(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The short name of each model that is a stand-in, by label."""
    return {
        ref["label"]: ref["id"].rstrip("/").split("/")[-1] for ref in manifest["models"].values() if ref["stand_in_for"]
    }


def _rehearsal(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What stood in for what, and the plans at the true size; None for a run that was no rehearsal."""
    if not (found := manifest.get("rehearsal")):
        return None
    plans = [
        plan | {"devices": [f"{size / GIB:.1f}" for size in plan["device_bytes"]], "limit": gib(plan["limit_bytes"])}
        for plan in found["plans"]
    ]
    return {"substitutions": found["substitutions"], "plans": plans}


def _verdict(values: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> Verdict:
    """``claim_verdict``, where a model counts as real only if the profile names it and it stands in for nothing.

    What a model of random weights gave says nothing of a claim.
    """
    measured_on = [value["model"] for value in values if value["model"]]
    if "rehearsal" in manifest and measured_on:
        return Verdict("rehearsed: no verdict", "shown")
    real = {ref["label"] for ref in manifest["models"].values() if not ref["stand_in_for"]}
    others = {label: label.split(" (")[0] for label in measured_on if label not in real}
    return claim_verdict(values, others | _stand_ins(manifest))


def _unmeasured(
    claim: Mapping[str, Any], notebooks: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> Verdict:
    """Why there is no value for a claim."""
    if claim["test"] == "citation":
        return Verdict("not testable: cited", "untested", claim["why"])
    falcon = manifest["models"]["falcon"]
    if claim["test"] == "real model" and (falcon["stand_in_for"] or falcon.get("rehearsed")):
        where = "in a rehearsal" if falcon.get("rehearsed") else f"on the profile {manifest['profile']}"
        return Verdict(f"not testable {where}", "untested", claim["why"])
    status = {notebook["name"]: notebook["status"] for notebook in notebooks}
    reasons = [_without_value(number, status) for number in claim.get("notebooks", ())]
    return Verdict("not measured in this run", "untested", "; ".join(reasons) or "no notebook records it")


def _without_value(number: str, status: Mapping[str, str]) -> str:
    """Why a notebook, named by its number, gave no value."""
    name = next((name for name in status if name.startswith(number)), None)
    if name is None:
        return f"notebook {number} was not part of it"
    return f"{name} recorded no value for it" if status[name] == "passed" else f"{name} did not pass"


def _claims(notebooks: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim in numeric order, with the run's verdict, or why there is none, and the values by their source."""
    met: dict[str, list[dict[str, Any]]] = {}
    for notebook in notebooks:
        for value in notebook["values"]:
            if value["claim"]:
                met.setdefault(value["claim"], []).append({**value, "notebook": notebook})
    statements = read_claims()
    unknown = {"statement": "not in the workbook's list of claims", "published": "", "source": "", "how": ""}
    claims = []
    for number in sorted({*statements, *met}, key=lambda number: (len(number), number)):
        claim, values = statements.get(number, unknown), met.get(number, [])
        verdict = _verdict(values, manifest) if values else _unmeasured(claim, notebooks, manifest)
        reach = claim.get("reach", "") if verdict.mark in JUDGED else ""
        text = "confirmed in part" if reach and verdict.mark == "passed" else verdict.text
        own = {"number": number, "sources": _by_source(values), "verdict": text, "mark": verdict.mark}
        claims.append({**claim, **own, "basis": verdict.basis, "reach": reach})
    return claims


def _by_source(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Values in the order of recording, those of one notebook and model together."""
    sources: dict[tuple[str, str | None], dict[str, Any]] = {}
    for value in values:
        notebook, model = value["notebook"], value["model"]
        source = {"notebook": notebook, "model": model, "values": []}
        sources.setdefault((notebook["name"], model), source)["values"].append(value)
    return list(sources.values())


def _model(role: str, ref: Mapping[str, Any]) -> dict[str, str]:
    return {
        "role": ROLES.get(role, role),
        "name": ref["id"],
        "stand_in_for": "itself, in a rehearsal" if ref.get("rehearsed") else ref["stand_in_for"] or "",
        "revision": {"embedded": "in this repository", "package": ref["file"]}.get(ref["source"], ref["revision"]),
        "licence": ref["licence"] or "–",
    }


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What ran and where, by label."""
    hardware, git = manifest["hardware"], manifest["git"]
    changed = " with uncommitted changes" if git["dirty"] else ""
    facts = {
        "Profile": f"{manifest['profile']}: {manifest['description']}",
        "Started": _moment(manifest["started"]),
        "Finished": _moment(manifest["finished"]),
        "Command": " ".join(manifest["command"]) or "–",
        "Commit": f"{git['commit'][:12]}{changed}" if git["commit"] else "not a git checkout",
        "Python": manifest["python"],
    }
    if "error" in hardware:
        return facts | {"Machine": f"unknown ({hardware['error']})"}
    return facts | {
        "Processor": f"{hardware['cpu_name']}, {hardware['cpu_count']} cores",
        "Memory": gib(hardware["ram_bytes"]),
        "GPUs": _gpus(hardware) or "none",
        "System": hardware["system"],
    }


def _gpus(hardware: Mapping[str, Any]) -> str:
    gpus = Counter(f"{gpu['name']} ({gib(gpu['total_bytes'])})" for gpu in hardware["gpus"])
    return ", ".join(f"{count} × {name}" for name, count in gpus.items())


def machine(hardware: Mapping[str, Any]) -> str:
    """The machine that a manifest describes, in half a sentence."""
    if "error" in hardware:
        return "an unknown machine"
    return _gpus(hardware) or f"{hardware['cpu_count']} processor cores without a GPU"


def _figures(
    run_dir: Path, figures: Mapping[str, Mapping[str, str]], notebooks: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The figures in the order of the notebooks, each as a data URI with what its caption says."""
    return [
        {"notebook": notebook, "name": name.replace("_", " "), "uri": _data_uri(run_dir / path)}
        for notebook in notebooks
        for name, path in figures.get(notebook["name"], {}).items()
    ]


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _hashes(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    notebooks = {f"{name}.ipynb": entry["sha256"] for name, entry in manifest["notebooks"].items()}
    return {ref["label"]: ref["sha256"] for ref in manifest["models"].values()} | {"Notebooks": notebooks}


def _moment(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S} UTC" if text else "–"
