#!/usr/bin/env bash
# The tests, from nothing: environment, then pytest on as many processes as there are cores (WORKERS=N for another
# number). Further arguments go to pytest, e.g. -m "not slow".
export EXTRAS="${EXTRAS:-dev}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
# A file stays on one process: its fixtures are made once.
exec .venv/bin/python -m pytest -n "${WORKERS:-auto}" --dist loadfile "$@"
