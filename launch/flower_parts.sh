# shellcheck shell=bash
# Sourced by the scripts that start Flower: certificates, keys, a superlink, a supernode, a run.
#   scripts set: dry (empty, or yes for --dry-run)
#   enter_flower sets folder (of all that is kept) and jobs (processes that end with the script)
# Nothing is sent to Flower Labs: telemetry and the look for updates are off.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1

enter_flower() { # enter_flower FOLDER [EXTRA]: makes the folder, and enters .venv-flower (or $VENV)
  local tool
  for tool in openssl ssh-keygen; do
    command -v "$tool" >/dev/null || fail "$tool is not installed, which makes the certificates and keys; install it."
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || return
  make_environment "${VENV:-.venv-flower}" ".[flower${2:+,$2}]" || return
  mkdir -p "$1/home"
  folder=$(cd "$1" && pwd) jobs=()
  export FLWR_HOME="$folder/home"
}

find_extra() { # the extra for this machine's accelerator: $EXTRA, or cuda where there is an NVIDIA GPU
  if [ -n "${EXTRA:-}" ]; then echo "$EXTRA"; elif nvidia-smi -L >/dev/null 2>&1; then echo cuda; fi
}

end_jobs() {
  kill ${jobs[@]+"${jobs[@]}"} 2>/dev/null
  wait ${jobs[@]+"${jobs[@]}"} 2>/dev/null || true
}

make_certificates() { # make_certificates NAME...: an authority of our own, and a certificate of the superlink by these names
  mkdir -p "$folder/keys" "$folder/logs"
  [ "$(cat "$folder/keys/names" 2>/dev/null)" != "$*" ] || return 0
  (
    set -e
    cd "$folder/keys"
    names=DNS:localhost,IP:127.0.0.1
    for name in "$@"; do
      if [[ $name =~ ^[0-9.]+$|: ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
    done
    curve=(-newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes)
    [ -e ca.pem ] || openssl req -x509 "${curve[@]}" -days 3650 -subj "/CN=spear-jax" -keyout ca.key -out ca.pem
    openssl req "${curve[@]}" -subj "/CN=superlink" -keyout server.key -out server.csr
    openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -out server.pem -extfile <(echo "subjectAltName=$names")
    chmod 600 ca.key server.key
  ) >"$folder/logs/keys.log" 2>&1 || fail "openssl failed; its output is in $folder/logs/keys.log"
  echo "$*" >"$folder/keys/names"
}

make_node_key() { # make_node_key FILE: FILE, and FILE.pub, which the superlink is told
  [ -e "$1" ] || { mkdir -p "$(dirname "$1")" && ssh-keygen -q -t ecdsa -b 384 -N "" -C "spear-jax node" -f "$1"; }
}

start_superlink() { # start_superlink ADDRESS PORT: at an address of this machine, which its certificate names; 0.0.0.0: at all
  local here=$1
  [ "$here" != 0.0.0.0 ] || here=127.0.0.1
  flower-superlink --host="$1" --port="$2" --ssl-certfile="$folder/keys/server.pem" --ssl-keyfile="$folder/keys/server.key" \
    --ssl-ca-certfile="$folder/keys/ca.pem" --enable-supernode-auth --disable-runtime-dependency-installation >"$folder/logs/superlink.log" 2>&1 &
  jobs+=($!)
  printf '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "%s:%s"\nroot-certificates = "%s"\n' "$here" "$2" "$folder/keys/ca.pem" >"$FLWR_HOME/config.toml"
  until (exec 3<>"/dev/tcp/$here/$2") 2>/dev/null; do
    kill -0 "${jobs[0]}" 2>/dev/null || fail "the superlink has ended; see $folder/logs/superlink.log"
    sleep 0.2
  done
}

register() { # register FILE.pub
  flwr supernode register "$1" here >"$folder/logs/register.log" 2>&1 || fail "the superlink did not take the key $1; see $folder/logs/register.log"
}

become_supernode() { # become_supernode SERVER:PORT CA KEY PORT CLIENT NODEFOLDER [NAME=VALUE]: or, with --dry-run, the line that would be run
  local command=(flower-supernode "--superlink=$1" "--root-certificates=$2" "--auth-supernode-private-key=$3"
    --host=127.0.0.1 "--port=$4" "--node-config=client=$5 folder=\"$6\"${7:+ $7}")
  if [ -n "$dry" ]; then quoted "${command[@]}"; else exec "${command[@]}"; fi
}

run_app() { # run_app ARGUMENT...: of spear_jax.flower; trains until the last round
  run python -m spear_jax.flower "$@" --app="$folder/app" --workdir="$folder/server"
  run flwr run "$folder/app" here --stream
  [ -z "$dry" ] || return 0
  [ -e "$folder/server/summary.json" ] || fail "the run has not ended; see $folder/logs/superlink.log, and start again to go on."
  echo "picture: $folder/server/accuracy.png"
  echo "who was asked, and what came of it: $folder/server/clients.jsonl"
}
