#!/usr/bin/env bash
# The server of a federation on machines of your own: a superlink of Flower with TLS, the keys of its nodes, and a run on them.
#   bash launch/flower_server.sh --names=server.example.org[,10.0.0.1] --config=NAME[:ARG] [flags of spear-jax flower]
#   --names=LIST  the names or addresses by which nodes reach this machine
#   --port=P      of the superlink (8760)
#   --host=ADDR   of the network from which nodes come (0.0.0.0: of all)
#   --folder=DIR  for all that it keeps (runs/flower)
# Let nobody reach the port but the nodes: Flower asks for no key where a run is started, and a run is code on the server and on its nodes.
# Put the public key that each machine sends you (launch/flower_node.sh prints it) into DIR/keys/nodes, and give all of them DIR/keys/ca.pem.
# Paths count from the repository. Environment: .venv-flower (or $VENV), with the extra $EXTRA (cuda by itself where there is an NVIDIA GPU). Results: DIR/server; logs: DIR/logs.
# The same command goes on after a kill.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/environment.sh"
# shellcheck source-path=SCRIPTDIR
. "$root/launch/flower_parts.sh"

names='' host=0.0.0.0 port=8760 into=runs/flower dry='' rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --names=?*) names=${flag#--names=} ;;
    --port=*) port=${flag#--port=} && check_number --port "$port" 1 ;;
    --host=?*) host=${flag#--host=} ;;
    --folder=?*) into=${flag#--folder=} ;;
    --config*=* | --deadline=?* | --quorum=?* | --offline) rest+=("$flag") ;;
    *) fail "unknown argument '$flag'; run with --help. A config field is --config.NAME=VALUE." ;;
  esac
done
[ -n "$names" ] || fail "no names: give --names=LIST, by which nodes reach this machine, for example --names=server.example.org."

enter_flower "$into" "$(find_extra)"
mkdir -p "$folder/keys/nodes"
IFS=, read -r -a names <<<"$names"
[ "$host" = 0.0.0.0 ] || names+=("$host")
make_certificates "${names[@]}"
keys=("$folder"/keys/nodes/*.pub)
[ -e "${keys[0]}" ] || fail "no public keys in $folder/keys/nodes; put there what launch/flower_node.sh prints on each machine, as 0.pub, 1.pub, ..., and give the machines $folder/keys/ca.pem."
trap end_jobs EXIT
start_superlink "$host" "$port"
for key in "${keys[@]}"; do register "$key"; done
echo "the superlink knows ${#keys[@]} nodes, and takes them at port $port, which nobody else should reach: run with --help"
run_app ${rest[@]+"${rest[@]}"}
