"""What a check of this machine found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. "fail": the profile cannot run; "warn": it can. ``advice`` says what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""
