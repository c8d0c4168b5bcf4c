#!/usr/bin/env bash
# Tells what this project does on this machine's GPU, in under ten minutes:
#   bash launch/gpu_check.sh [--out=DIR] [--steps=tests,speed,cudnn,clients,many] [--preset=NAME] [--dry-run]
#   --out=DIR      results (default: runs/gpu_check); each step leaves its own there as it ends
#   --steps=LIST   tests: logits, adapters and tokens as on the CPU, the same bits again and after a kill, cuDNN's attention
#                  speed: a round's phases, beside transformers and PEFT where they are installed, and their distance to the floor
#                  cudnn: local training with cuDNN's attention
#                  clients: local training of 1 to 256 clients on SmolLM2-135M's shapes, 64 at once
#                  many: of 256 clients in one program, on the embedded model
#   --preset=NAME  sizes of speed and cudnn (default: qwen2.5-1.5b)
#   --dry-run      print the commands, run nothing
# A step that fails does not stop the others; the script then ends with 1. Environment: as launch/local.sh.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"

out=runs/gpu_check steps=tests,speed,cudnn,clients,many preset=qwen2.5-1.5b dry='' failed=''
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --out=?*) out=${flag#--out=} ;;
    --steps=?*) steps=${flag#--steps=} ;;
    --preset=?*) preset=${flag#--preset=} ;;
    --dry-run) dry=yes ;;
    *) fail "unknown argument '$flag'; run with --help." ;;
  esac
done
for step in ${steps//,/ }; do
  case $step in tests | speed | cudnn | clients | many) ;; *) fail "unknown step '$step'; there are tests, speed, cudnn, clients and many." ;; esac
done

step() { # step NAME COMMAND...: runs it, with its output in DIR/NAME.log
  local name=$1 began=$SECONDS
  shift
  [[ ,$steps, == *,$name,* ]] || return 0
  if [ -n "$dry" ]; then
    quoted "$@"
    return
  fi
  echo "$name: $(quoted "$@")"
  if "$@" >"$out/$name.log" 2>&1; then
    echo "$name: done in $((SECONDS - began)) s"
  else
    failed+=" $name"
    echo "$name: failed after $((SECONDS - began)) s; its last lines:"
    tail -n 15 "$out/$name.log"
  fi
}

if [ -z "$dry" ]; then
  enter_environment "$root" || exit 2
  mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit 2
  command -v nvidia-smi >/dev/null && nvidia-smi | tee "$out/gpu.txt"
fi
against=()
if [ -n "$dry" ] || python -c 'import torch, transformers, peft' 2>/dev/null; then against=(--against=hf); else echo "no torch or PEFT here: speed stands alone"; fi
# Programs that several steps have in common are compiled once.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/programs}"
benchmark=(python -m spear_jax.benchmark --repeats=1)
step tests env JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest -m gpu tests/test_gpu.py -p no:cacheprovider -q -rsf
step speed "${benchmark[@]}" --preset="$preset" ${against[@]+"${against[@]}"} --phases=rollout,revision,local_step,round --out="$out/speed.json"
step cudnn "${benchmark[@]}" --preset="$preset" --attention=cudnn --phases=revision,local_step --out="$out/cudnn.json"
step clients "${benchmark[@]}" --preset=smollm2-135m --dtype=bfloat16 --at-once=64 --clients=1,4,16,64,256 --out="$out/clients.json"
step many "${benchmark[@]}" --preset=tiny --at-once=256 --clients=1,16,256 --out="$out/many.json"
[ -z "$dry" ] || exit 0
for table in "$out"/*.md; do
  [ ! -e "$table" ] || { printf '\n%s\n' "$table" && cat "$table"; }
done
echo "results: $out"
[ -z "$failed" ] || { echo "error: failed:$failed; see the logs in $out." >&2 && exit 1; }
