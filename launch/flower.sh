#!/usr/bin/env bash
# A federation of real processes on this machine: a superlink and supernodes of Flower with TLS and node keys, and a run on them.
#   bash launch/flower.sh [--nodes=N] [--port=P] [--deadline=S] [--config.rounds=5 ...]
#   --nodes=N     supernodes, each one client (3)
#   --port=P      of the superlink; the supernodes take the N ports behind it (8760)
#   --deadline=S  seconds after which a round ends with the updates that are there (600)
# Environment: .venv-flower (or $VENV). Results: runs/flower/server (or $WORKDIR/server); logs: runs/flower/logs. The same command goes on after a kill.
# Nothing is sent to Flower Labs: telemetry and the look for updates are off.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/flower_parts.sh"

nodes=3 port=8760 deadline=600 dry='' rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --nodes=*) nodes=${flag#--nodes=} && check_number --nodes "$nodes" 1 ;;
    --port=*) port=${flag#--port=} && check_number --port "$port" 1 ;;
    --deadline=*) deadline=${flag#--deadline=} && check_number --deadline "$deadline" 1 ;;
    --config*=*) rest+=("$flag") ;;
    *) fail "unknown argument '$flag'; run with --help. A config field is --config.NAME=VALUE." ;;
  esac
done

enter_flower "${WORKDIR:-runs/flower}"
make_certificates localhost
trap end_jobs EXIT
start_superlink 127.0.0.1 "$port"
for ((i = 0; i < nodes; i++)); do
  key=$folder/nodes/$i/key
  make_node_key "$key"
  register "$key.pub"
  become_supernode "127.0.0.1:$port" "$folder/keys/ca.pem" "$key" $((port + 1 + i)) "$i" "$folder/nodes/$i" >"$folder/logs/node-$i.log" 2>&1 &
  jobs+=($!)
done
run_app --config=configs/quickstart.py --config.federation.num_clients="$nodes" --config.federation.clients_per_round="$nodes" \
  ${rest[@]+"${rest[@]}"} --deadline="$deadline"
