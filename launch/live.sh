#!/usr/bin/env bash
# Teach a model in the browser while it trains: a service, a run that waits for people, and a link for each of them.
#   bash launch/live.sh [--people=N] [--port=P] [--config.rounds=5 ...]
#   --people=N   people, each a client of the federation (2)
#   --port=P     of the service (8765)
# The embedded model is taught; docs/guides/live.md has your own. Links: printed, and in runs/live/service/tokens.json.
# Environment: .venv-live (or $VENV). Results: runs/live/run (or $WORKDIR/run). The same command goes on after a kill and asks nobody again.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"

people=2 port=8765 rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --people=*) people=${flag#--people=} && check_number --people "$people" 1 ;;
    --port=*) port=${flag#--port=} && check_number --port "$port" 1 ;;
    --config.?*=* | --quiet) rest+=("$flag") ;;
    *) fail "unknown argument '$flag'; run with --help. A config field is --config.NAME=VALUE." ;;
  esac
done

cd "$root"
make_environment "${VENV:-.venv-live}" ".[live]"
folder=${WORKDIR:-runs/live}
python -m spear_jax.serve --folder="$folder/service" --people="$people" --clients="$people" --port="$port" &
service=$!
trap 'kill "$service" 2>/dev/null; wait "$service" 2>/dev/null || true' EXIT
until python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)" "http://127.0.0.1:$port/healthz" 2>/dev/null; do
  kill -0 "$service" 2>/dev/null || fail "the service has ended; its message is above."
  sleep 0.2
done
SPEAR_FEEDBACK_TOKEN=$(python -c "import json, sys; print(next(u['token'] for u in json.load(open(sys.argv[1]))['users'] if u['name'] == 'trainer'))" "$folder/service/tokens.json")
export SPEAR_FEEDBACK_TOKEN
python -m spear_jax.train --config=spear:few_facts,tiny,live --workdir="$folder/run" \
  --config.federation.num_clients="$people" --config.federation.clients_per_round="$people" \
  --config.feedback.url="http://127.0.0.1:$port" ${rest[@]+"${rest[@]}"}
echo "what people said: $folder/run/feedback.jsonl"
