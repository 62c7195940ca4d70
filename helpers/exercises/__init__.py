"""The exercises of the notebooks: is an answer right? One file of checks for each notebook."""

from helpers.exercises.check import check, names
from helpers.exercises.verdict import Verdict

__all__ = ["Verdict", "check", "names"]
