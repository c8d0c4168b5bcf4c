#!/usr/bin/env bash
# Trains on this machine: one process with all its GPUs, with some of them, or with the CPU.
#   bash launch/local.sh [--gpus=LIST | --cpu] [--dry-run] --config=NAME[:ARG] --workdir=DIR [flags of train]
#   bash launch/local.sh --gpus=0,1 --config=spear:arc_challenge,qwen2.5-1.5b --workdir=runs/arc
#   --gpus=LIST   the GPUs with these numbers (default: all that JAX finds)
#   --cpu         no GPU
#   --dry-run     print the command, run nothing
# The same command goes on after a kill. Environment: the active Python where it has JAX, else .venv (or $VENV), made once.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"

gpus='' cpu='' dry='' distributed=() rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --gpus=*) gpus=${flag#--gpus=} && [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "$flag: give the GPUs' numbers, for example --gpus=0,1." ;;
    --cpu) cpu=yes ;;
    --dry-run) dry=yes ;;
    --distributed=auto) distributed=("$flag") ;; # of tpu_pod.sh
    *) rest+=("$flag") ;;
  esac
done
[ -z "$gpus" ] || [ -z "$cpu" ] || fail "--gpus and --cpu exclude one another; give one of them."
check_train ${rest[@]+"${rest[@]}"}

command=(python -m spear_jax.train "${rest[@]}" ${distributed[@]+"${distributed[@]}"})
if [ -n "$gpus" ]; then command=(env "CUDA_VISIBLE_DEVICES=$gpus" JAX_PLATFORMS=cuda "${command[@]}"); fi
if [ -n "$cpu" ]; then command=(env JAX_PLATFORMS=cpu "${command[@]}"); fi
if [ -z "$dry" ]; then
  enter_environment "$root"
  command=(exec "${command[@]}")
fi
run "${command[@]}"
