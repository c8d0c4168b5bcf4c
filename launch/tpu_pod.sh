#!/usr/bin/env bash
# Trains on a Cloud TPU VM or on all workers of a pod slice: copies the committed tree there, then starts train on every worker.
#   bash launch/tpu_pod.sh --name=TPU --zone=ZONE [--project=P] [--folder=DIR] [--no-copy] [--dry-run] \
#       --config=NAME[:ARG] --workdir=/SHARED/DIR [flags of train]
#   --name=TPU      of the TPU VM, which exists already (gcloud compute tpus tpu-vm create, or a queued resource)
#   --zone=ZONE     for example us-central2-b
#   --project=P     default: gcloud's own
#   --folder=DIR    where the tree goes on the workers, in their home (default: spear-jax)
#   --no-copy       the tree is there already
#   --dry-run       print the commands, run nothing
# The run folder is an absolute path that all workers see (NFS, or a bucket mounted with gcsfuse). The first start makes .venv with
# the extra tpu on each worker. After a preemption, give the same command on the new TPU VM: the run goes on.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR
. "$root/launch/arguments.sh"

name='' zone='' project='' folder='spear-jax' copy=yes dry='' rest=()
for flag in "$@"; do
  case $flag in
    --help | -h) usage "$0" && exit ;;
    --name=*) name=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --project=*) project=${flag#*=} ;;
    --folder=*) folder=${flag#*=} && [[ $folder =~ ^[A-Za-z0-9_.][A-Za-z0-9_./-]*$ ]] || fail "$flag: give a plain folder name, for example --folder=spear-jax." ;;
    --no-copy) copy='' ;;
    --dry-run) dry=yes ;;
    *) rest+=("$flag") ;;
  esac
done
[ -n "$name" ] || fail "no TPU: give --name=TPU, as gcloud compute tpus tpu-vm list shows it."
[ -n "$zone" ] || fail "no zone: give --zone=ZONE, for example --zone=us-central2-b."
cd "$root" # the workers run in a copy of it
check_train ${rest[@]+"${rest[@]}"}
case $workdir in
  /*) ;;
  *) fail "--workdir is '$workdir'; give an absolute path that every worker sees." ;;
esac
if [ -z "$dry" ]; then command -v gcloud >/dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install."; fi

at=(--worker=all "--zone=$zone" ${project:+"--project=$project"})
if [ -n "$copy" ]; then
  [ -d "${TMPDIR:-}" ] || TMPDIR=/tmp
  archive=$folder.tar.gz packed=$TMPDIR/spear-jax-$$.tar.gz
  trap 'rm -f "$packed"' EXIT
  run git archive --format=tar.gz "--output=$packed" HEAD
  run gcloud compute tpus tpu-vm scp "$packed" "$name:$archive" "${at[@]}"
  run gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" "--command=mkdir -p $folder && tar -xzf $archive -C $folder"
fi
run gcloud compute tpus tpu-vm ssh "$name" "${at[@]}" \
  "--command=cd $folder && EXTRA=tpu bash launch/local.sh --distributed=auto $(quoted "${rest[@]}")"
