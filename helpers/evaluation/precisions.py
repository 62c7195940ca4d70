"""Measure one model in several precisions: what each costs in quality, bytes and speed, and what the claims say to it.

The article claims that 8-bit and 4-bit weights show almost no difference in evaluation (A18), and that 8-bit is much
faster than 4-bit (A19). ``measure_precisions`` measures a model, and the study that it returns gives tables, rows for
figures, verdicts, and the values to record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from helpers.base.stats import Measured
from helpers.base.units import GIB, QUANTIZED
from helpers.evaluation.harness import _Evaluation, evaluate
from helpers.evaluation.likelihood import _Perplexity, perplexity
from helpers.evaluation.pairs import _paired
from helpers.evaluation.residents import _residents, _shortfalls
from helpers.models.finite import NotFiniteFoundError, all_finite, explained
from helpers.models.loaded import LoadReport, inference, input_device
from helpers.models.references import ModelRef
from helpers.speed import benchmark
from helpers.speed.benchmark import Benchmark

if TYPE_CHECKING:
    import torch  # noqa: TC004 (it takes seconds to import)
    from pandas import DataFrame

    from helpers.base.stats import Interval
    from helpers.evaluation.pairs import _Paired
    from helpers.models.loaded import Loaded
    from helpers.speed.benchmark import SpeedSettings

Measure = Literal["text", "tasks"]
_TASKS = ("story_endings", "short_facts")
ALMOST_NONE: dict[Measure, float] = {"text": 0.02, "tasks": 0.05}  # bits per byte, and a share of the items
_MUCH_FASTER = 1.5  # the article gives no number
_REFERENCE = "bf16"
_VERDICTS = {True: "yes", False: "no", None: "cannot tell"}


@dataclass(frozen=True)
class _PrecisionResult:
    """A model in one precision: the report of its loading, its loss on all texts and its answers to the tasks.

    logits: those of the first text (tokens, vocabulary), in float32 on the CPU.
    """

    report: LoadReport
    logits: torch.Tensor
    text: _Perplexity
    tasks: _Evaluation


def measure_precisions(
    ref: ModelRef,
    precisions: Sequence[str],
    texts: Sequence[str],
    items: int,
    *,
    speed: SpeedSettings | None = None,
    seed: int = 0,
) -> _PrecisionStudy:
    """Measure a model in every precision that fits this machine: all at once if they fit together, else in turn.

    Every precision reads the same ``texts`` and answers the first ``items`` of the tasks story_endings and short_facts.
    ``speed`` says how its speed is measured; ``seed`` is that of the intervals.
    Raises what ``load``, ``speed.measure``, ``perplexity`` and ``evaluate`` raise.
    """
    shortfalls = _shortfalls(ref, precisions)
    results: dict[str, _PrecisionResult] = {}
    speeds = []
    for group in _residents(ref, precisions):
        speeds.append(benchmark.measure(list(group.values()), settings=speed))
        for precision, loaded in group.items():
            results[precision] = _PrecisionResult(
                report=loaded.report,
                logits=_logits(loaded, texts[0]),
                text=perplexity(loaded, texts),
                tasks=evaluate(loaded, _TASKS, items),
            )
    return _PrecisionStudy(ref, tuple(precisions), results, shortfalls, benchmark.joined(speeds), seed)


@dataclass(frozen=True)
class _PrecisionStudy:
    """What ``measure_precisions`` found; ``shortfalls`` says for every precision that does not fit what is missing."""

    ref: ModelRef
    precisions: tuple[str, ...]
    results: Mapping[str, _PrecisionResult]
    shortfalls: Mapping[str, str]
    speeds: Benchmark
    seed: int = 0

    def table(self) -> DataFrame:
        """One row per precision: bytes, proof, logits and loss with intervals, or what is missing on this machine."""
        import pandas as pd

        moved = self.logit_distances()
        rows = {}
        for precision in self.precisions:
            result = self.results.get(precision)
            if result is None:
                rows[precision] = {"weights, GiB": str(self.shortfalls.get(precision, ""))}
                continue
            distance = moved.get(precision, 0.0)
            rows[precision] = {
                "weights, GiB": f"{result.report.stored_bytes / GIB:.3f}",
                "converted": f"{result.report.quantized_layers} of {result.report.linear_layers}",
                "logits moved": f"{distance:.4f}" if _REFERENCE in self.results else "bf16 does not fit",
                "perplexity": _with_interval(result.text.perplexity_interval),
                "bits per byte": _with_interval(result.text.bits_per_byte_interval),
            }
        return pd.DataFrame.from_dict(rows, orient="index").fillna("")

    def logit_distances(self) -> dict[str, float]:
        """Mean absolute difference of the logits from bf16's, by precision; empty if bf16 does not fit."""
        reference = self.results.get(_REFERENCE)
        distances: dict[str, float] = {}
        if reference is None:
            return distances
        for precision, result in self.results.items():
            if precision != _REFERENCE:
                distances[precision] = (result.logits - reference.logits).abs().mean().item()
        return distances

    @cached_property
    def pairs(self) -> dict[tuple[Measure, str], _Paired]:
        """Every precision compared with bf16 on the same texts and items, by measure and precision."""
        reference = self.results.get(_REFERENCE)
        pairs: dict[tuple[Measure, str], _Paired] = {}
        if reference is None:
            return pairs
        others = {precision: result for precision, result in self.results.items() if precision != _REFERENCE}
        # All texts come before all tasks: tables and recorded values keep this order.
        for precision, result in others.items():
            pairs["text", precision] = _paired(result.text, reference.text, seed=self.seed)
        for precision, result in others.items():
            pairs["tasks", precision] = _paired(result.tasks, reference.tasks, seed=self.seed)
        return pairs

    def changes(self) -> DataFrame:
        """One row per measure and precision: the change from bf16 with its interval, and whether it is almost none."""
        import pandas as pd

        rows = {}
        for (measure, precision), pair in self.pairs.items():
            change = pair.difference
            row = {"bf16": f"{pair.second:.4f}", "change": f"{change.estimate:+.4f}"}
            row["95% interval"] = f"{change.low:+.4f} to {change.high:+.4f}"
            if pair.p_value is not None:
                row["only bf16 / only this right"] = f"{pair.only_second} / {pair.only_first}"
                row["McNemar's p"] = f"{pair.p_value:.2f}"
            row["almost none"] = _VERDICTS[_almost_none(change, ALMOST_NONE[measure])]
            rows[f"{pair.measure}, {pair.count} items", precision] = row
        return pd.DataFrame.from_dict(rows, orient="index").fillna("")

    def verdicts(self) -> dict[tuple[Measure, str], bool | None]:
        """Whether int8 and nf4 agree with the claim of almost no difference, by measure and precision.

        The claim is about both precisions and every measure. If one of them cannot tell, those that agree do not
        confirm it either, and are None; one that refutes it is enough.
        """
        verdicts: dict[tuple[Measure, str], bool | None] = {}
        for (measure, precision), pair in self.pairs.items():
            if precision in QUANTIZED:
                verdicts[measure, precision] = _almost_none(pair.difference, ALMOST_NONE[measure])
        if None in verdicts.values():
            for key, agrees in verdicts.items():
                verdicts[key] = False if agrees is False else None
        return verdicts

    def figure_rows(self) -> list[dict[str, str | float | None]]:
        """Rows for ``figures.precision_comparison``: size, speed of a single reply and perplexity by precision."""
        decoding = self._decoding_speeds()
        rows = []
        for precision in self.precisions:
            row: dict[str, str | float | None] = {"precision": precision, "missing": self.shortfalls.get(precision)}
            result = self.results.get(precision)
            if result is not None:
                row["stored_bytes"] = result.report.stored_bytes
                row["perplexity"] = result.text.perplexity
                row["tokens_per_second"] = decoding.get(precision)
            rows.append(row)
        return rows

    def quality_rows(self) -> list[dict[str, str | float | Interval]]:
        """Rows for ``figures.quality_against_bytes``: the share of bf16's bytes and the change of bits per byte."""
        rows: list[dict[str, str | float | Interval]] = []
        for (measure, precision), pair in self.pairs.items():
            if measure == "text":
                stored = self.results[precision].report.stored_bytes
                share = stored / self.results[_REFERENCE].report.stored_bytes
                rows.append({"precision": precision, "share": share, "change": pair.difference})
        return rows

    def change_values(self, side: str, claim: str | None = None) -> dict[str, Measured]:
        """The changes of int8 and nf4 to record, by name; with a claim, each says whether it agrees with it."""
        verdicts = self.verdicts() if claim else {}
        values = {}
        for (measure, precision), pair in self.pairs.items():
            if precision not in QUANTIZED:
                continue
            agrees, change = verdicts.get((measure, precision)), pair.difference.estimate
            if measure == "text":
                # Recorded in the unit of the loss of a token, which other tools report.
                text = self.results[precision].text
                nats = round(change * math.log(2) * text.bytes / text.tokens, 4)
                values[f"{side}_nll_change_{precision}"] = Measured(
                    nats, "nats/token", claim, 0.005, agrees, self.ref.label
                )
            else:
                values[f"{side}_accuracy_change_{precision}"] = Measured(
                    round(change, 4), "", claim, 0.03, agrees, self.ref.label
                )
        return values

    def text_values(self) -> dict[str, Measured]:
        """Perplexity and bits per byte of every precision, to record by name."""
        values = {}
        for precision, result in self.results.items():
            values[f"perplexity_{precision}"] = Measured(round(result.text.perplexity, 3))
            values[f"bits_per_byte_{precision}"] = Measured(round(result.text.bits_per_byte, 4), "bits/byte")
        return values

    def speed_values(self, claim: str) -> dict[str, Measured]:
        """Tokens per second of a single reply by precision, and whether int8 is much faster than nf4 as claimed."""
        speeds = self._decoding_speeds()
        values = {}
        for precision, speed in speeds.items():
            values[f"speed_{precision}"] = Measured(round(speed, 1), "tokens/s", model=self.ref.label)
        if set(QUANTIZED) <= speeds.keys():
            ratio = speeds["int8"] / speeds["nf4"]
            values["int8_over_nf4_speed"] = Measured(
                round(ratio, 2), "ratio of tokens/s", claim, agrees=ratio > _MUCH_FASTER, model=self.ref.label
            )
        return values

    def _decoding_speeds(self) -> dict[str, float]:
        """Tokens per second of a single reply, by precision."""
        speeds = {}
        for row in self.speeds.rows:
            if row.batch_size == 1 and row.decode is not None:
                speeds[row.precision] = row.decode.median
        return speeds


def _almost_none(change: Interval, margin: float) -> bool | None:
    """Whether a change is almost none: True if its whole interval lies within the margin, False if it lies beyond.

    None if the interval reaches across the margin: then the items cannot tell.
    """
    if -margin < change.low and change.high < margin:
        return True
    if change.low > margin or change.high < -margin:
        return False
    return None


def _logits(loaded: Loaded, text: str) -> torch.Tensor:
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"].to(input_device(loaded.model))
    with inference(loaded.model):
        logits: torch.Tensor = loaded.model(ids).logits[0]
        with explained(loaded):
            if not all_finite(logits):
                raise NotFiniteFoundError(ids.tolist())
    # Precisions that are loaded in turn may lie on different devices.
    return logits.float().cpu()


def _with_interval(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"
