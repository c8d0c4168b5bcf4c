# shellcheck shell=bash
# Sourced by the launch scripts: --help, checked arguments, commands that are printed or run.
#   scripts set: root (the repository), dry (empty, or yes for --dry-run)

fail() { # fail MESSAGE: a user's mistake
  echo "error: $1" >&2
  exit 2
}

usage() { # usage SCRIPT: the comment at its head
  sed -n '2,/^[^#]/ { /^#SBATCH/d; s/^#\( \|$\)//p; }' "$1"
}

check_number() { # check_number FLAG VALUE LOWEST
  case $2 in
    '' | *[!0-9]*) fail "$1 is '$2'; it must be a whole number." ;;
  esac
  [ "$2" -ge "$3" ] || fail "$1 is $2; it must be at least $3."
}

check_train() { # check_train ARGUMENT...: those of train, which then checks the config itself; sets workdir
  local flag config=''
  workdir=''
  for flag in "$@"; do
    case $flag in
      --config=?*) config=${flag#--config=} ;;
      --workdir=?*) workdir=${flag#--workdir=} ;;
      --config.?*=* | --quiet | --offline | --resume=auto | --resume=never | --resume=must) ;;
      --distributed=*) fail "$flag: this script sets --distributed itself; leave it out." ;;
      *) fail "unknown argument '$flag'; run with --help. A flag of train is written --flag=VALUE, a config field --config.NAME=VALUE." ;;
    esac
  done
  [ -n "$config" ] || fail "no config: give --config=NAME[:ARG], for example --config=quickstart, or --config=FILE.py[:ARG]."
  case ${config%%:*} in
    */* | *.py) [ -f "${config%%:*}" ] || fail "no config file '${config%%:*}'; give --config=FILE.py[:ARG], or a preset, for example --config=quickstart." ;;
  esac # a preset's name is checked by train
  [ -n "$workdir" ] || fail "no run folder: give --workdir=DIR."
}

quoted() { # quoted WORD...: as a shell would read them
  local word text=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=$(printf '%q' "$word")
    text+="$word "
  done
  echo "${text% }"
}

run() { # run COMMAND...: or, with --dry-run, the line that would be run
  if [ -n "$dry" ]; then quoted "$@"; else "$@"; fi
}
