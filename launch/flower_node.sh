#!/usr/bin/env bash
# A client on this machine: a supernode of Flower that trains when its server asks.
#   bash launch/flower_node.sh --server=HOST:PORT --ca=ca.pem --client=N [--folder=DIR] [NAME=VALUE ...]
#   --server=HOST:PORT  the superlink
#   --ca=FILE           the certificate of the server's authority
#   --client=N          which client this machine is, from 0 (under SLURM: its task's number)
#   --folder=DIR        for all that the node keeps; %t in it stands for N (runs/flower/nodes/%t)
#   --port=P            the node takes port P + N of this machine, which no other reaches (8761)
#   --dry-run           print the command, run nothing
#   NAME=VALUE          what the node sets for itself, for example data.path="mine"
# The first call makes the node's key, prints the half that is public, and ends. When the server knows that, the same command starts the node.
# Paths count from the repository. Environment: .venv-flower (or $VENV), with the extra $EXTRA (cuda by itself where there is an NVIDIA GPU). Log of training: DIR/worker.log.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/flower_parts.sh"

server='' ca='' client=${SLURM_PROCID:-} into=runs/flower/nodes/%t port=8761 dry='' own=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --server=*) server=${flag#*=} && [[ $server =~ ^[^,]+:[0-9]+$ ]] || fail "$flag: give HOST:PORT, for example --server=server.example.org:8760." ;;
    --ca=?*) ca=${flag#*=} ;;
    --client=*) client=${flag#*=} ;;
    --folder=?*) into=${flag#*=} ;;
    --port=*) port=${flag#*=} && check_number --port "$port" 1 ;;
    --dry-run) dry=yes ;;
    [a-z]*.?*=?* | model=?*) own+=("${flag%%=*}=\"${flag#*=}\"") ;;
    *) fail "unknown argument '$flag'; run with --help. What a node sets for itself is NAME=VALUE, for example data.path=mine." ;;
  esac
done
cd "$root"
[ -n "$server" ] || fail "no server: give --server=HOST:PORT."
[ -n "$dry" ] || [ -f "$ca" ] || fail "--ca is '$ca', where no file is; give the ca.pem that the server's owner has sent you."
check_number --client "$client" 0
into=${into//%t/$client}

if [ -n "$dry" ]; then
  folder=$into
else
  ca=$(cd "$(dirname "$ca")" && pwd)/$(basename "$ca")
  enter_flower "$into" "$(find_extra)"
fi
key=$folder/key
if [ -z "$dry" ] && [ ! -e "$key" ]; then
  make_node_key "$key"
  echo "send this public key to the server's owner, who puts it into DIR/keys/nodes/$client.pub and starts launch/flower_server.sh:"
  cat "$key.pub"
  echo "then give the same command again"
  exit
fi
node=("$server" "$ca" "$key" "$((port + client))" "$client" "$folder" "${own[*]-}")
if [ -n "$dry" ]; then
  become_supernode "${node[@]}"
  exit
fi
# a supernode gives up where the superlink does not know its key, which may be so as long as the server starts
trap end_jobs EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
while true; do
  become_supernode "${node[@]}" &
  jobs=($!)
  ! wait "${jobs[0]}" || break
  echo "the supernode has ended, and starts again in 10 s" >&2
  sleep 10 &
  jobs=($!)
  wait "${jobs[0]}"
done
