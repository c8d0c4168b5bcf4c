# shellcheck shell=bash
# Sourced by the launch scripts: makes (once) and enters a virtual environment.
#   make_environment FOLDER REQUIREMENT
#   enter_environment ROOT
# Uses $PYTHON, else the newest python3.13, 3.12, 3.11 or python3 that is at least 3.11. Installs again when setup.py changed.

# On Linux, large pages for large arrays: without them an eighth of a local step on a CPU goes into page faults.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python >= 3.11 found; install one, or set PYTHON=/path/to/python" >&2
  return 2
}

make_environment() {
  local folder=$1 requirement=$2 python stamp
  python=$(find_python) || return 2
  stamp="$("$python" --version) $requirement $(cksum <setup.py)"
  if [ ! -x "$folder/bin/python" ] || [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "setting up $folder with $("$python" --version) (a few minutes, once)"
    "$python" -m venv --clear "$folder" || {
      echo "error: '$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv" >&2
      return 2
    }
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -e "$requirement"
    echo "$stamp" >"$folder/.stamp"
  fi
  # shellcheck disable=SC1091
  . "$folder/bin/activate"
}

has_jax() {
  python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("jax") and u.find_spec("ml_collections")))' 2>/dev/null
}

# The active Python where it has JAX (a cluster's module, conda, a virtual environment), else $VENV or ROOT/.venv, with the extra
# $EXTRA (cuda, tpu; cuda by itself where there is an NVIDIA GPU).
enter_environment() {
  local root=$1 here=$PWD extra=${EXTRA:-}
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  if [ -z "${VENV:-}" ] && has_jax; then return; fi
  if [ -z "$extra" ] && nvidia-smi -L >/dev/null 2>&1; then extra=cuda; fi
  cd "$root" || return 2
  make_environment "${VENV:-.venv}" ".${extra:+[$extra]}" || return 2
  cd "$here" || return 2
}
