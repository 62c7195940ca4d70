#!/bin/sh
# Find a Python that the workbook runs on and hand over to setup/. PYTHON=... names one; $1 is the lock, cpu or gpu.
set -eu
# A Python must not look elsewhere for its modules, or run a start-up file, because the caller's does.
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONOPTIMIZE PYTHONINSPECT PYTHONWARNINGS PYTHONPLATLIBDIR || true
newline='
'
root=$(dirname -- "$0")/..
lock=${1:-}
if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- "$root/.venv/bin/python" python3 python3.11 python3.12 python3.13
fi
seen=
for python in "$@"; do
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    version=${version##*"$newline"} # a start-up file of the environment may print, too
    case $version in
    3.11 | 3.12 | 3.13) exec "$python" "$root/env/setup" ${lock:+--lock "$lock"} ;;
    esac
    seen="$seen $python is $version."
done
echo "make setup: The workbook needs Python 3.11, 3.12 or 3.13.${seen:- ${PYTHON:-python3} does not run.}" >&2
echo "Install one of them and name it: make setup PYTHON=/path/to/python3.11" >&2
exit 1
