#!/usr/bin/env bash
# Finds or makes the environment, then hands over to `python -m mia_utils.runner.run`; see ./run_all.sh --help.
set -euo pipefail
root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
called_from="${PYTHONPATH:-}"
# this checkout's code is what runs, whatever package is installed in the environment
export PYTHONPATH="$root${called_from:+:$called_from}"

fail() { printf 'error: %s\n' "$1" >&2; exit 2; }

has_packages() { # PYTHON: whether it is new enough and has what a run imports
  "$1" -c 'import sys
from importlib.util import find_spec
names = "mia_utils torch torchvision timm lightly sklearn snakemake papermill pydantic yaml".split()
sys.exit(sys.version_info < (3, 11) or not all(map(find_spec, names)))' 2>/dev/null
}

find_python() { # a Python that can make the environment
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  fail "expected Python 3.11 or newer, got $(python3 --version 2>/dev/null || echo 'no python3'): install one, or use conda env create -f environment.yml"
}

is_installed() { cmp -s "$root/requirements.lock" "$root/.venv/mia-installed.lock" && runs; }

runs() { "$root/.venv/bin/python" -c '' 2>/dev/null; } # not so when the Python that it was made of is gone

pip_setting() { "$root/.venv/bin/python" -m pip config get "$1" 2>/dev/null | tr '\n' ' ' | sed 's/ *$//' || true; }

install() { # runs under the lock that make_environment holds
  local python
  is_installed && return
  python="$(find_python)"
  echo "making the environment in .venv: installs about 3 GB download, 6 GB on disk (once)"
  if [ -e "$root/.venv/pyvenv.cfg" ] && ! runs; then
    echo "the Python of .venv is gone: makes it again"
    rm -rf "$root/.venv"
  fi
  "$python" -m venv "$root/.venv" >&2 || fail "$python could not make .venv: install its venv module (python3-venv), or make room"
  # pip's own configuration (index, mirror, certificate) holds for uv as well, which does not read it
  local index extra links cert
  index="${PIP_INDEX_URL:-$(pip_setting global.index-url)}"
  extra="${PIP_EXTRA_INDEX_URL:-$(pip_setting global.extra-index-url)}"
  links="${PIP_FIND_LINKS:-$(pip_setting global.find-links)}"
  cert="${PIP_CERT:-$(pip_setting global.cert)}"
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"; fi
  if [ -n "$extra" ]; then export UV_INDEX="${UV_INDEX:-$extra}"; fi
  if [ -n "$links" ]; then export UV_FIND_LINKS="${UV_FIND_LINKS:-${links// /,}}"; fi
  if [ -n "$cert" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"; fi
  # like pip, look at every index; the hashes of the lock decide what is accepted
  export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check uv \
    || fail "pip could not install uv: is there a network, or a mirror in pip's configuration?"
  VIRTUAL_ENV="$root/.venv" "$root/.venv/bin/python" -m uv pip sync --quiet --compile-bytecode --require-hashes "$root/requirements.lock" \
    || fail "the packages of requirements.lock could not be installed (reason above); the same command tries again"
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$root" \
    || echo "mia-audit is not installed (reason above; setuptools takes no path with braces): python -m mia_utils.audit is the same"
  cp "$root/requirements.lock" "$root/.venv/mia-installed.lock.tmp"
  mv "$root/.venv/mia-installed.lock.tmp" "$root/.venv/mia-installed.lock"
}

make_environment() { # one setup at a time: the second waits, then finds it done
  is_installed && return
  local python
  python="$(find_python)"
  "$python" -c 'import fcntl, os, sys
while True:
    try:
        lock = open(sys.argv[1], "w")
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]}: expected a folder that can be written, got {error.strerror!r}")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another run is making the environment: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(sys.argv[1])):
            break
    except FileNotFoundError: # a setup that ended meanwhile has removed it: a new file
        pass
os.set_inheritable(lock.fileno(), True)
os.execvp("bash", ["bash", sys.argv[2], "__install"])' "$root/.mia-setup.lock" "$root/run_all.sh"
}

if [ "${1:-}" = __install ]; then
  trap 'rm -f "$root/.mia-setup.lock"' EXIT # while it is held
  install
  exit
fi

python=""
if [ -n "${MIA_PYTHON:-}" ]; then
  has_packages "$MIA_PYTHON" || fail "MIA_PYTHON: expected a Python 3.11 or newer with the packages of requirements.lock, got $MIA_PYTHON"
  python="$MIA_PYTHON"
else
  for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$python" ] && [ -n "$active" ] && has_packages "$active/bin/python"; then python="$active/bin/python"; fi
  done
fi
if [ -z "$python" ]; then
  make_environment
  python="$root/.venv/bin/python"
fi
exec "$python" -m mia_utils.runner.run "$@"
