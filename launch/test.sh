#!/usr/bin/env bash
# The tests, from nothing: environment, then pytest. Further arguments go to pytest, e.g. -m "not slow".
export EXTRAS="${EXTRAS:-dev}"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec .venv/bin/python -m pytest "$@"
