"""The share of a gain that is form, by hand; its sentence follows from the intervals."""

import pytest

from helpers.base import WorkbookError, stats
from helpers.evaluation import Gain


def outcomes(right: int, of: int = 100) -> list[bool]:
    """The first ``right`` of the items are right, so that a better score has the same items right and more."""
    return [number < right for number in range(of)]


def test_form_and_knowledge_by_hand():
    gain = Gain(outcomes(20), outcomes(50), outcomes(80))
    assert gain.whole.estimate == pytest.approx(0.6)
    assert gain.form.estimate == pytest.approx(0.3)
    assert gain.knowledge.estimate == pytest.approx(0.3)
    assert gain.form_share.estimate == pytest.approx(0.5)
    # The differences are paired: not one of the 50 was wrong before and after, so the interval is that of pairs.
    assert gain.form == stats.paired_difference(outcomes(50), outcomes(20))
    assert gain.form.low > 0.2


def test_the_interval_of_the_share_is_that_of_a_ratio_of_sums():
    """By hand: 30 items gain by form, 60 in all; the deviations from the line are 30 of +0.5 and 30 of -0.5."""
    share = Gain(outcomes(20), outcomes(50), outcomes(80)).form_share
    error = (100 / 99 * 60 * 0.25) ** 0.5 / 60
    assert share.high - share.estimate == pytest.approx(1.984 * error, rel=1e-3)  # Student's t of 99 degrees


@pytest.mark.parametrize(
    ("before", "placebo", "true", "share", "said"),
    [
        (20, 50, 80, 0.5, "50% of the gain (37% to 63%) comes from random answers too: random answers gain +0.30"),
        (20, 20, 80, 0.0, "0% of the gain (0% to 0%) comes from random answers too: random answers show no gain"),
        (20, 80, 80, 1.0, "100% of the gain (100% to 100%) comes from random answers too: true answers cannot be told"),
        (20, 90, 60, 1.75, "true answers do worse than random ones."),
        (50, 80, 50, None, "No gain can be told from chance (+0.00 (-0.04 to +0.04)), so there is no share"),
        (80, 50, 20, None, "The score fell (-0.60"),
    ],
)
def test_the_sentence_changes_with_the_outcomes(before, placebo, true, share, said):
    gain = Gain(outcomes(before), outcomes(placebo), outcomes(true))
    assert (gain.form_share.estimate if gain.form_share else None) == pytest.approx(share)
    assert said in gain.sentence()


def test_the_table_has_a_row_for_each_measure():
    table = Gain.table({"by reply": Gain(outcomes(20), outcomes(50), outcomes(80)),
                         "by likelihood": Gain(outcomes(50), outcomes(50), outcomes(50))})  # fmt: skip
    assert table.loc["by reply", ["before", "shuffled", "true"]].tolist() == [0.2, 0.5, 0.8]
    assert table.loc["by reply", "share of form"] == "50%"
    assert table.loc["by reply", "form: shuffled - before"].startswith("+0.30 (+0.2")
    assert table.loc["by likelihood", "share of form"] == "no gain"


@pytest.mark.parametrize("counts", [(3, 3, 2), (1, 1, 1), (0, 0, 0)])
def test_outcomes_of_other_items_are_refused(counts):
    with pytest.raises(WorkbookError, match="Give those of the same items"):
        Gain(*(outcomes(1, count) for count in counts))
