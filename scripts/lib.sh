# shellcheck shell=bash
# What the shell scripts share; sourced with the project's folder as the current one.

say() { printf '%s\n' "$*"; }

# die CODE MESSAGE: one line on stderr, then the end.
die() {
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

# Do the pinned packages support this Python?
supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

# Prints the name of the first such Python on PATH.
find_python() {
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if supported "$candidate"; then say "$candidate" && return; fi
  done
  die 2 "no Python 3.11 to 3.14 on PATH; install one (Debian, Ubuntu: apt install python3 python3-venv), or activate an environment that has one"
}

file_hash() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# install_requirements FILE: makes .venv and installs FILE into it, unless that very FILE is already in.
# A stamp is written last, so an installation that was interrupted is done again.
install_requirements() {
  local file=$1 stamp python hash
  stamp=.venv/.${file%.txt}.sha256
  hash=$(file_hash "$file")
  if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$hash" ]]; then return; fi
  if ! supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python) || exit
    say "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
      die 2 "could not make .venv; on Debian and Ubuntu: apt install python3-venv, then run this again"
  fi
  say "Installing $file into .venv (minutes the first time, quiet meanwhile)"
  rm -f "$stamp"
  .venv/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off -r "$file" ||
    die 1 "pip could not install $file (its message is above); mend that, often the network or the disk, and run this again"
  say "$hash" >"$stamp"
}

# Sets `python` to the one to use and puts .venv first on PATH, unless another environment is active.
# use_python installed|as-is
use_python() {
  if [[ $1 == installed || (-z ${VIRTUAL_ENV:-} && -x .venv/bin/python) ]]; then
    export VIRTUAL_ENV=$PWD/.venv PATH="$PWD/.venv/bin:$PATH"
  fi
  python=python
  command -v python >/dev/null || python=$(find_python) || exit
}

# Prints a command as one would type it.
show() {
  local word line=''
  for word; do
    case $word in
      *\'* | '') printf -v word '%q' "$word" ;;
      *[!A-Za-z0-9_./:=,+@%-]*) word="'$word'" ;;
    esac
    line+=" $word"
  done
  say " $line"
}

# run_child ON_SIGNAL COMMAND...: as a child in a process group of its own, so that Ctrl-C does not reach it by itself.
# Each signal calls ON_SIGNAL with the signal's name and the child. Returns the command's exit code.
run_child() {
  local on_signal=$1 child signal signalled=1 code=0 before
  shift
  before=$(trap -p INT TERM HUP)
  set -m
  "$@" 9>&- & # 9 is the run's lock: start.sh's and its supervisor's
  child=$!
  set +m
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # expanded now on purpose
    trap "signalled=1; $on_signal $signal $child" "$signal"
  done
  while [[ $signalled ]]; do # a signal interrupts wait
    signalled=''
    wait "$child" && code=0 || code=$?
  done
  trap - INT TERM HUP && eval "$before"
  return "$code"
}

pass_on() { kill -"$1" "$2" 2>/dev/null || true; }
