"""The command ``workbook``. Each command is a thin wrapper around the modules below it."""

# Each of these modules registers its commands when it is imported, and the help lists them in this order.
# isort: off
from helpers.cli import machine, run, measure, maintainers
from helpers.cli.app import app
# isort: on

__all__ = ["app", "machine", "maintainers", "measure", "run"]
