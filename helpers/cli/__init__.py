"""The command ``workbook``: what a shell calls. Each command is a thin wrapper around the groups below."""

# Each of these modules registers its commands when it is imported, and the help lists them in this order.
# isort: off
from helpers.cli import machine, run, measure, training, maintainers  # noqa: F401
from helpers.cli.workbook import app
# isort: on

__all__ = ["app"]
