#!/bin/sh
# Every check that reads the code without running it, in the order of what is quickest to mend. All run, also after one
# has failed; the exit code is 1 if any did.
cd -- "$(dirname -- "$0")/../.." || exit 1
bin=.venv/bin
failed=0
check() {
    echo "$ $*"
    "$@" || failed=1
}
check "$bin/ruff" check .
check "$bin/ruff" format --check .
check "$bin/codespell"
check "$bin/python" env/lint/plain_code.py helpers
check "$bin/lint-imports" --no-cache
check "$bin/mypy"
exit "$failed"
