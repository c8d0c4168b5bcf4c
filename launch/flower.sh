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

nodes=3 port=8760 deadline=600 rest=()
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
for tool in openssl ssh-keygen; do
  command -v "$tool" >/dev/null || fail "$tool is not installed, which makes the certificates and keys; install it."
done

cd "$root"
make_environment "${VENV:-.venv-flower}" ".[flower]"
mkdir -p "${WORKDIR:-runs/flower}"
folder=$(cd "${WORKDIR:-runs/flower}" && pwd)
mkdir -p "$folder/keys" "$folder/logs"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_HOME="$folder/home"

# A certificate authority of our own, the superlink's certificate, and a key for each node.
make_keys() {
  cd "$folder/keys"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=spear-jax demo" -keyout ca.key -out ca.pem
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=localhost" -keyout server.key -out server.csr
  openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -out server.pem \
    -extfile <(echo "subjectAltName=DNS:localhost,IP:127.0.0.1")
}
if [ ! -e "$folder/keys/server.pem" ]; then
  (make_keys) >"$folder/logs/keys.log" 2>&1 || fail "openssl failed; its output is in $folder/logs/keys.log"
fi
for ((i = 0; i < nodes; i++)); do
  [ -e "$folder/keys/node-$i" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "node-$i" -f "$folder/keys/node-$i"
done

jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null; wait "${jobs[@]}" 2>/dev/null || true' EXIT
flower-superlink --host=127.0.0.1 --port="$port" --ssl-certfile="$folder/keys/server.pem" --ssl-keyfile="$folder/keys/server.key" \
  --ssl-ca-certfile="$folder/keys/ca.pem" --enable-supernode-auth --disable-runtime-dependency-installation >"$folder/logs/superlink.log" 2>&1 &
jobs+=($!)
mkdir -p "$FLWR_HOME"
printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:%s"\nroot-certificates = "%s"\n' "$port" "$folder/keys/ca.pem" >"$FLWR_HOME/config.toml"
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "${jobs[0]}" 2>/dev/null || fail "the superlink has ended; see $folder/logs/superlink.log"
  sleep 0.2
done
for ((i = 0; i < nodes; i++)); do
  flwr supernode register "$folder/keys/node-$i.pub" here >"$folder/logs/register-$i.log" 2>&1 || fail "the superlink did not take the key of node $i; see $folder/logs/register-$i.log"
  flower-supernode --superlink="127.0.0.1:$port" --root-certificates="$folder/keys/ca.pem" --auth-supernode-private-key="$folder/keys/node-$i" \
    --host=127.0.0.1 --port=$((port + 1 + i)) --node-config="client=$i folder=\"$folder/nodes/$i\"" >"$folder/logs/node-$i.log" 2>&1 &
  jobs+=($!)
done

python -m spear_jax.flower --config=configs/quickstart.py --config.federation.num_clients="$nodes" --config.federation.clients_per_round="$nodes" \
  ${rest[@]+"${rest[@]}"} --app="$folder/app" --workdir="$folder/server" --deadline="$deadline"
flwr run "$folder/app" here --stream
[ -e "$folder/server/summary.json" ] || fail "the run has not ended; see $folder/logs/superlink.log, and start again to go on."
echo "picture: $folder/server/accuracy.png"
echo "who was asked, and what came of it: $folder/server/clients.jsonl"
