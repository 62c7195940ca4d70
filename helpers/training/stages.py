"""The stored result of a longer fine-tune, which takes too long for a run of the notebooks.

``notebooks/data/store_repair.py`` writes it from a run, with the command, commit, date and machine that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from helpers.base.errors import WorkbookError
from helpers.base.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from helpers.models.references import ModelRef


@dataclass(frozen=True)
class _StoredStage:
    """What a longer fine-tune of ``model`` gave: the values that its notebook recorded, and where they come from."""

    model: str
    steps: int
    batch_size: int
    learning_rate: float
    command: str
    commit: str
    date: str
    machine: str
    values: Mapping[str, bool | float | str]

    @property
    def title(self) -> str:
        """The name of its row in a table."""
        return f"stored: {self.steps} steps of {self.batch_size}, rate {self.learning_rate:g}"

    @property
    def origin(self) -> str:
        """The command that made it, with date, commit and machine."""
        return f"{self.command} (on {self.date}, commit {self.commit}, {self.machine})"

    def lesson(self, steps: int) -> str:
        """What its held-out loss says about a run of so many steps."""
        settled = self.values["settled_step"]
        if isinstance(settled, str):
            return f"In {self.steps} steps its held-out loss did not fall."
        relation = "reach" if steps >= settled else "stop before"
        return (
            f"Its held-out loss made 95% of its fall in the first {settled:g} of {self.steps} steps; "
            f"the {steps} steps of this run {relation} that point."
        )


def stored_stage(path: Path, ref: ModelRef) -> _StoredStage | None:
    """The stored fine-tune of a file; None if there is no such file, or if it is of another model.

    Raises WorkbookError for a file that is damaged or was not written by ``store_repair.py``.
    """
    if not path.is_file():
        return None
    try:
        stage = _StoredStage(**cast("dict[str, Any]", read_json(path)))
    except (TypeError, WorkbookError) as error:
        raise WorkbookError(
            f"{path} is not a stored fine-tune. Write it again with notebooks/data/store_repair.py."
        ) from error
    return stage if stage.model == ref.id else None
