"""The claims ledger: every numbered statement of the article, with what a run recorded for it and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from helpers.base.files import ROOT
from helpers.runs import store
from helpers.runs.expected import _with_unit
from helpers.runs.holding import _status_now
from helpers.runs.schema import _Claim, _ClaimPart, _RecordedValue
from helpers.runs.store import _read_claims_file, _read_results
from helpers.runs.wording import TOO_CLOSE, _agrees, _answer, _judged_parts, _meets, _plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from helpers.runs.schema import _Manifest, _Results, _Status

CLAIMS = ROOT / "notebooks" / "data" / "claims.yaml"
_JUDGED = ("passed", "failed", "on-stand-in")
# A value may name a claim that the list does not hold, such as in a run of another version of the workbook.
_UNKNOWN = _Claim(
    statement="not in the workbook's list of claims", published="", source="", test="citation", how="", why="unknown"
)


@dataclass(frozen=True)
class _Verdict:
    """What a run says of a claim: in words, the mark to show it with, and what it rests on or why there is none."""

    text: str
    mark: str
    basis: str = ""


@dataclass(frozen=True)
class _ClaimValue:
    """One value that a notebook of the run recorded for a claim; ``answer`` is what it says to it, in words."""

    notebook: str
    name: str
    content: _RecordedValue
    answer: str


@dataclass(frozen=True)
class _JudgedPart:
    """One reading of a statement with its own verdict; ``found`` are the values that it is judged by, in words."""

    part: _ClaimPart
    verdict: _Verdict
    found: str = ""

    @property
    def compared(self) -> str:
        """What the wording demands beside what this run found; empty if there is nothing to compare."""
        if not self.found:
            return ""
        number = _plain(self.part.number)
        if self.part.wording == "at least" and self.verdict.mark == "failed":
            return f"{self.found} will do, so at least {number} is refuted"
        demanded = f"{number} or less" if self.part.wording == "enough" else f"{self.part.wording} {number}"
        sure = f", sure to {self.part.margin:.0%}" if self.verdict.text == TOO_CLOSE and self.part.margin else ""
        return f"{demanded}; this run: {self.found}{sure}"


@dataclass(frozen=True)
class _JudgedClaim:
    """A statement of the article with the verdict of a run and the values that the run recorded for it."""

    number: str
    claim: _Claim
    verdict: _Verdict
    values: tuple[_ClaimValue, ...]
    parts: tuple[_JudgedPart, ...] = ()

    @property
    def reach(self) -> str:
        """What part of the statement the verdict is about; empty if it is about the whole, or if there is none."""
        return self.claim.reach if self.judged else ""

    @property
    def judged(self) -> bool:
        """True if the values say whether the claim holds, of the real model or of a stand-in."""
        return self.verdict.mark in _JUDGED

    @property
    def confirmed_in_part(self) -> bool:
        """True if a part of the statement was confirmed, or one reading of it and not another."""
        split = any(part.found and part.verdict.mark != "passed" for part in self.parts)
        return self.verdict.mark == "passed" and (split or self.claim.reach != "")

    @property
    def text(self) -> str:
        """The verdict in words."""
        # A split verdict names the reading that it is about.
        whole = self.verdict.text == "confirmed"
        return "confirmed in part" if whole and self.confirmed_in_part else self.verdict.text


def _ledger(run_dir: Path) -> list[_JudgedClaim]:
    """Judge all claims of the article, in numeric order, by what a run recorded.

    Raises RunFolderError if there is no run in the folder.
    """
    return _judged_claims(_status_now(run_dir), store.read_manifest(run_dir), _read_results(run_dir))


def _judged_claims(status: _Status, manifest: _Manifest, recorded: _Results) -> list[_JudgedClaim]:
    """Judge all claims in numeric order: each has the run's verdict, or says why there is none."""
    if manifest.of_own_notebooks:  # they are not asked about the article
        return []
    statements = _read_claims()
    by_claim = _values_by_claim(status, recorded, statements)
    claims = []
    # A10 comes after A9: the shorter number is the smaller one.
    for number in sorted({*statements, *by_claim}, key=lambda number: (len(number), number)):
        claim, values = statements.get(number, _UNKNOWN), by_claim.get(number, [])
        parts = [_judged_part(part, values, manifest) for part in claim.parts]
        verdict = _whole_verdict(claim, parts, values, manifest) if values else _unmeasured(claim, status, manifest)
        claims.append(_JudgedClaim(number, claim, verdict, tuple(values), tuple(parts)))
    return claims


def _values_by_claim(
    status: _Status, recorded: _Results, statements: Mapping[str, _Claim]
) -> dict[str, list[_ClaimValue]]:
    """The values of a run by claim, judged by its wording of today, also if an earlier workbook recorded them."""
    by_claim: dict[str, list[_ClaimValue]] = {}
    for notebook in status.notebooks:
        for name, value in recorded.values.get(notebook, {}).items():
            if value.claim:
                claim = statements.get(value.claim)
                content = value.model_copy(update={"agrees": _agrees(claim, name, value)})
                answered = _ClaimValue(notebook, name, content, _answer(claim, name, value))
                by_claim.setdefault(value.claim, []).append(answered)
    return by_claim


def _read_claims() -> dict[str, _Claim]:
    """Read the article's statements by number; the head of the file says what each field holds."""
    return _read_claims_file(CLAIMS)


def _claims_for_recording() -> Mapping[str, _Claim]:
    """The article's statements, read once in a process: a notebook records dozens of times."""
    return _claims_at(CLAIMS)


@lru_cache(maxsize=1)
def _claims_at(path: Path) -> Mapping[str, _Claim]:
    return _read_claims_file(path)


def _judged_part(part: _ClaimPart, values: Sequence[_ClaimValue], manifest: _Manifest) -> _JudgedPart:
    """One reading of a statement with its verdict, by the values that it names."""
    if part.cited:
        return _JudgedPart(part, _Verdict("cited", "untested", part.cited))
    own = []
    for value in values:
        if value.name in part.values:
            content = value.content.model_copy(update={"agrees": _meets(part, value.content.value)})
            own.append(replace(value, content=content))
    if not own:
        return _JudgedPart(part, _Verdict("not measured in this run", "untested"))
    verdict = _verdict(own, manifest)
    # A value that was measured keeps the words of its model: a stand-in's or a rehearsal's value tells nothing anyway.
    if all(value.content.agrees is None for value in own) and not any(value.content.model for value in own):
        verdict = _Verdict(TOO_CLOSE, "shown")
    found = " and ".join(_with_unit(value.content.value, value.content.unit) for value in own)
    return _JudgedPart(part, verdict, found)


def _whole_verdict(
    claim: _Claim, parts: Sequence[_JudgedPart], values: Sequence[_ClaimValue], manifest: _Manifest
) -> _Verdict:
    """The verdict of a claim: that of its values or, if it has readings, the one that they share.

    If they differ, it is the first reading's, and says so: the first is the statement as it was worded.
    """
    if not _judged_parts(claim):
        return _verdict(values, manifest)
    judged = [part for part in parts if part.part.wording is not None]
    answered = [part for part in judged if part.verdict.mark != "untested"]
    if not answered:
        return _Verdict("shown, not judged", "shown")
    first = answered[0]
    if len(answered) == len(judged) and len({part.verdict.mark for part in judged}) == 1:
        return first.verdict
    return replace(first.verdict, text=f"{first.verdict.text} {first.part.name}".rstrip())


def _verdict(values: Sequence[_ClaimValue], manifest: _Manifest) -> _Verdict:
    """``_claim_verdict``, in which a model counts as real only if the profile names it and it stands in for nothing.

    What a model of random weights gave says nothing of a claim.
    """
    real = {ref.label for ref in manifest.models.values() if not ref.stand_in_for}
    not_real = {}
    for value in values:
        label = value.content.model
        if label and manifest.rehearsal is not None:
            return _Verdict("rehearsed: no verdict", "shown")
        if label and label not in real:
            # A label reads "falcon-mini (stand-in for ...)".
            not_real[label] = label.split(" (")[0]
    return _claim_verdict([value.content for value in values], not_real | _stand_ins(manifest))


def _claim_verdict(values: Iterable[_RecordedValue], stand_ins: Mapping[str, str]) -> _Verdict:
    """Judge a claim by its values.

    ``stand_ins`` gives the short name of a stand-in by its label. Values computed, or measured on the real model,
    decide, and one that disagrees is enough. What was measured on stand-ins says nothing about the real model: it is
    named as theirs.
    """
    real: list[_RecordedValue] = []
    on_stand_ins: list[_RecordedValue] = []
    for value in values:
        if value.model in stand_ins:
            on_stand_ins.append(value)
        else:
            real.append(value)
    if judged := _judging(real):
        return _real_verdict(judged)
    judged = _judging(on_stand_ins)
    # A computed value that only illustrates the claim says more about the real model than a stand-in's.
    if real and not judged:
        return _Verdict("shown, not judged", "shown")
    where = _named(judged or on_stand_ins, stand_ins)
    if not judged:
        return _Verdict(f"shown {where}", "shown")
    agreement = "agrees" if all(value.agrees for value in judged) else "does not agree"
    return _Verdict(f"{where}: {agreement}", "on-stand-in")


def _judging(values: Iterable[_RecordedValue]) -> list[_RecordedValue]:
    return [value for value in values if value.agrees is not None]


def _named(values: Iterable[_RecordedValue], stand_ins: Mapping[str, str]) -> str:
    # A dict, because several values of one stand-in name it once, in the order of recording.
    names: dict[str, None] = {}
    for value in values:
        if value.model is not None:
            names[stand_ins[value.model]] = None
    plural = "s" if len(names) > 1 else ""
    return f"on the stand-in{plural} {' and '.join(names)}"


def _real_verdict(values: Sequence[_RecordedValue]) -> _Verdict:
    """The verdict of values that are computed or measured on the real model."""
    agrees = all(value.agrees for value in values)
    deciding = dict.fromkeys(value.model for value in values if value.agrees == agrees)
    basis = " and ".join(f"measured on {model}" if model else "computed" for model in deciding)
    if agrees:
        return _Verdict("confirmed", "passed", basis)
    return _Verdict("not confirmed", "failed", basis)


def _unmeasured(claim: _Claim, status: _Status, manifest: _Manifest) -> _Verdict:
    """Why there is no value for a claim."""
    if claim.test == "citation":
        return _Verdict("not testable: cited", "untested", claim.why)
    falcon = manifest.models.get("falcon")
    if falcon is not None and claim.test == "real model" and (falcon.stand_in_for or falcon.rehearsed):
        where = "in a rehearsal" if falcon.rehearsed else f"on the profile {manifest.profile}"
        return _Verdict(f"not testable {where}", "untested", claim.why)
    reasons = [_without_value(number, status) for number in claim.notebooks]
    return _Verdict("not measured in this run", "untested", "; ".join(reasons) or "no notebook records it")


def _without_value(number: str, status: _Status) -> str:
    """Why a notebook, named by its number, gave no value."""
    for name, entry in status.notebooks.items():
        if name.startswith(number):
            return f"{name} recorded no value for it" if entry.status == "passed" else f"{name} did not pass"
    return f"notebook {number} was not part of it"


def _stand_ins(manifest: _Manifest) -> dict[str, str]:
    """Return the short name of each model that is a stand-in, by label."""
    return {ref.label: ref.id.rstrip("/").split("/")[-1] for ref in manifest.models.values() if ref.stand_in_for}
