"""peft and trl use names that transformers has renamed, and transformers warns the reader about it.

What is wrong: a FutureWarning for each use, about code that the reader cannot change.
Versions: peft 0.21.2 and trl 1.16.0 with transformers 5.23.0.
"""

from __future__ import annotations

import warnings


def _ignore_renamed_names() -> None:
    """Hide these warnings for the rest of the process; all others are still shown."""
    warnings.filterwarnings("ignore", r".* is deprecated and will be removed in v6", FutureWarning, "transformers")
