#!/usr/bin/env bash
# One run of several processes, started by hand: all of them on this machine, or one of them on each of several hosts.
#   bash launch/multihost.sh --processes=N [--gpus=LIST | --cpu] [--dry-run] --config=NAME[:ARG] --workdir=DIR [flags of train]
#   bash launch/multihost.sh --processes=N --number=I --address=HOST:PORT [...] --config=... --workdir=SHARED/DIR
#   --processes=N         how many processes there are in all
#   --number=I            start process I alone, from 0; do so on every host, with the same other arguments
#   --address=HOST:PORT   process 0's host as the others reach it, and a free port there (default: this machine, any free port)
#   --gpus=LIST           this machine's GPUs with these numbers, shared out evenly to the processes started here
#   --cpu                 no GPU
#   --dry-run             print the commands, run nothing
# Process 0 speaks as train does; the others' lines go to stderr, each behind its process's number. When one fails, all end.
# All processes must see the run folder. The same command goes on after a kill.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"

processes='' number='' address='' gpus='' cpu='' dry='' rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --processes=*) processes=${flag#*=} && check_number --processes "$processes" 1 ;;
    --number=*) number=${flag#*=} && check_number --number "$number" 0 ;;
    --address=*) address=${flag#*=} && [[ $address =~ ^[^:,]+:[0-9]+$ ]] || fail "$flag: give HOST:PORT, for example --address=10.0.0.1:1234." ;;
    --gpus=*) gpus=${flag#*=} && [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "$flag: give the GPUs' numbers, for example --gpus=0,1." ;;
    --cpu) cpu=yes ;;
    --dry-run) dry=yes ;;
    *) rest+=("$flag") ;;
  esac
done
[ -n "$processes" ] || fail "no number of processes: give --processes=N."
[ -z "$gpus" ] || [ -z "$cpu" ] || fail "--gpus and --cpu exclude one another; give one of them."
if [ -n "$number" ]; then
  [ "$number" -lt "$processes" ] || fail "--number is $number of $processes processes; they are numbered from 0."
  [ -n "$address" ] || fail "--number=$number needs --address=HOST:PORT, the same for every process."
fi
check_train ${rest[@]+"${rest[@]}"}

here=("$number") # the processes that are started here
if [ -z "$number" ]; then
  here=()
  for ((i = 0; i < processes; i++)); do here+=("$i"); done
fi
IFS=, read -r -a cards <<<"$gpus"
if ((${#cards[@]} % ${#here[@]})); then
  fail "--gpus=$gpus cannot be shared out evenly to ${#here[@]} processes; give a multiple of that."
fi
if [ -z "$dry" ]; then enter_environment "$root"; fi
if [ -z "$address" ]; then
  port='PORT'
  if [ -z "$dry" ]; then port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'); fi
  address=127.0.0.1:$port
fi

make_command() { # make_command SLOT: of the process here[SLOT]
  local each=$((${#cards[@]} / ${#here[@]})) share
  command=(python -m spear_jax.train "${rest[@]}" "--distributed=$address,$processes,${here[$1]}")
  if [ -n "$cpu" ]; then command=(env JAX_PLATFORMS=cpu "${command[@]}"); fi
  if [ -n "$gpus" ]; then
    share=$(IFS=, && echo "${cards[*]:$(($1 * each)):each}")
    command=(env "CUDA_VISIBLE_DEVICES=$share" JAX_PLATFORMS=cuda "${command[@]}")
  fi
}

if [ -n "$number" ] || [ -n "$dry" ]; then
  for slot in "${!here[@]}"; do
    make_command "$slot"
    if [ -z "$dry" ]; then exec "${command[@]}"; fi
    run "${command[@]}"
  done
  exit
fi

pids=()
# KILL: a process of a distributed run hears TERM as a notice of preemption and goes on; a run folder survives any kill
trap 'kill -KILL ${pids[@]+"${pids[@]}"} 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for slot in "${!here[@]}"; do
  make_command "$slot"
  if [ "$slot" = 0 ]; then
    "${command[@]}" &
  else
    "${command[@]}" > >(sed "s/^/[$slot] /" >&2) 2>&1 &
  fi
  pids+=("$!")
done
while ((${#pids[@]})); do
  sleep 0.2
  for slot in "${!pids[@]}"; do
    if ! kill -0 "${pids[slot]}" 2>/dev/null; then
      ended=${pids[slot]}
      unset "pids[slot]"
      wait "$ended" || exit "$?"
    fi
  done
done
