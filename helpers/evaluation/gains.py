"""What a fine-tune taught: the form of an answer apart from knowledge, told by a placebo.

A placebo is the same training on random answers of the same form. What it gains is form: to say "Yes." and nothing
else. Only what the true answers add to it can be knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helpers.base import stats
from helpers.base.errors import WorkbookError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pandas import DataFrame

    from helpers.base.stats import Interval


@dataclass(frozen=True)
class Gain:
    """The outcomes of the same items, right or wrong: before, after the placebo, and after the true training.

    Raises WorkbookError if these are not as many each, or fewer than two.
    """

    before: Sequence[bool]
    placebo: Sequence[bool]
    true: Sequence[bool]

    def __post_init__(self) -> None:
        counts = [len(self.before), len(self.placebo), len(self.true)]
        if len(set(counts)) > 1 or counts[0] < 2:
            raise WorkbookError(
                f"There are {counts[0]}, {counts[1]} and {counts[2]} outcomes. Give those of the same items, two or "
                "more, before, after the placebo and after the true training."
            )

    @property
    def whole(self) -> Interval:
        """True minus before, with its paired 95% interval."""
        return stats.paired_difference(self.true, self.before)

    @property
    def form(self) -> Interval:
        """Placebo minus before, with its paired 95% interval."""
        return stats.paired_difference(self.placebo, self.before)

    @property
    def knowledge(self) -> Interval:
        """True minus placebo, with its paired 95% interval."""
        return stats.paired_difference(self.true, self.placebo)

    @property
    def form_share(self) -> Interval | None:
        """The share of the gain that is form: (placebo - before) / (true - before), with its 95% interval.

        None if no gain can be told from chance: the share of nothing is no number. It may exceed 1.
        """
        if self.whole.low <= 0:
            return None
        form, whole = [], []
        for before, placebo, true in zip(self.before, self.placebo, self.true, strict=True):
            form.append(float(placebo) - float(before))
            whole.append(float(true) - float(before))
        return stats.ratio(form, whole)

    def sentence(self) -> str:
        """What the three scores say, in words that follow from the intervals."""
        share = self.form_share
        if share is None:
            whole = self.whole
            change = "The score fell" if whole.high < 0 else "No gain can be told from chance"
            return f"{change} ({_signed(whole)}), so there is no share of form."
        interval = f"({_percent(share.low)} to {_percent(share.high)})"
        said = f"{_percent(share.estimate)} of the gain {interval} comes from random answers too"
        if self.knowledge.low <= 0 <= self.knowledge.high:
            return f"{said}: true answers cannot be told from random ones."
        if self.knowledge.high < 0:
            return f"{said}: true answers do worse than random ones."
        if self.form.low <= 0:
            return f"{said}: random answers show no gain that can be told from chance."
        return f"{said}: random answers gain {_signed(self.form)}, true ones {_signed(self.knowledge)} more."

    @staticmethod
    def table(gains: Mapping[str, Gain]) -> DataFrame:
        """The three scores by name, what of the gain is form and what knowledge, with intervals; the share of form."""
        import pandas as pd

        rows = {}
        for name, gain in gains.items():
            share = gain.form_share
            rows[name] = {
                "items": len(gain.before),
                "before": _mean(gain.before),
                "shuffled": _mean(gain.placebo),
                "true": _mean(gain.true),
                "form: shuffled - before": _signed(gain.form),
                "knowledge: true - shuffled": _signed(gain.knowledge),
                "share of form": "no gain" if share is None else _percent(share.estimate),
            }
        return pd.DataFrame.from_dict(rows, orient="index")


def _mean(outcomes: Sequence[bool]) -> float:
    return sum(map(bool, outcomes)) / len(outcomes)


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


def _percent(share: float) -> str:
    return f"{share:.0%}"
