# Sourced by the other scripts: makes .venv at the repository's root and installs the package into it, once.
# PYTHON=/path/to/python chooses the interpreter; EXTRAS=dev,tpu adds extras; FIRST='torch==2.13.0' is installed before
# the rest, for what must come in a certain build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
        && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python" >&2
  return 1
}

# A marker that names what was installed: a changed setup.py or other extras install again, nothing else does.
stamp=".venv/.installed-$(cksum setup.py | cut -d' ' -f1)-${EXTRAS:-base}${FIRST:+-$FIRST}"
if [ ! -e "$stamp" ]; then
  python="$(find_python)"
  echo "Setting up .venv with $python (once; a minute or two) …"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  [ -z "${FIRST:-}" ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check $FIRST
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  touch "$stamp"
fi

# XLA's CPU backend allocates its arena anew every step; huge pages make the page faults of that cheap (up to +35 %).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
