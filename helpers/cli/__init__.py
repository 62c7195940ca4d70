"""The command ``workbook``: what a shell calls. Each command is a thin wrapper around the groups below."""

import sys

# Each of these modules registers its commands when it is imported, and the help lists them in this order.
# isort: off
try:
    from helpers.cli import machine, run, measure, training, maintainers  # noqa: F401
    from helpers.cli.workbook import app
except KeyboardInterrupt:
    # Ctrl-C while the packages are loaded, which takes half a second.
    sys.stderr.write("Interrupted.\n")
    raise SystemExit(130) from None
except Exception as error:
    # Somebody may have removed by halves a package that every command needs.
    from helpers.base.installed import damage

    if why := damage():
        raise SystemExit(f"Error: {type(error).__name__}: {error}. {why}") from error
    raise
# isort: on

__all__ = ["app"]
