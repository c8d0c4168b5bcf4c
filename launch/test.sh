#!/usr/bin/env bash
# Every check that needs no accelerator, no network beyond installing packages, and no real model:
#   bash launch/test.sh [pytest arguments]
# Environment: .venv-test (or $VENV). Processes: 2 (or $PROCESSES; --pdb needs 0). Real datasets are used where they lie beside the repository or at $SPEAR_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment "${VENV:-.venv-test}" ".[test]"
ruff check .
ruff format --check .
mypy
export HF_HUB_OFFLINE=1
python -m pytest -q --numprocesses="${PROCESSES:-2}" --dist=loadfile "$@"
