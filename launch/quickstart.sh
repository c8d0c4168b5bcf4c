#!/usr/bin/env bash
# From a bare machine (Python >= 3.11, a CPU) to a trained adapter and a picture:
#   bash launch/quickstart.sh [--config.seed=1 ...]
# Environment: .venv (or $VENV). Results: runs/quickstart (or $WORKDIR). Run it again to go on, or to see the results again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment "${VENV:-.venv}" "."
workdir=${WORKDIR:-runs/quickstart}
python -m spear_jax.train --config=configs/quickstart.py --workdir="$workdir" "$@"
adapter=$workdir/adapter
if [ ! -e "$adapter/adapter_model.safetensors" ]; then
  python -m spear_jax.export --workdir="$workdir" --out="$adapter" --quiet
fi
echo "adapter (PEFT): $adapter"
echo "picture:        $workdir/accuracy.png"
