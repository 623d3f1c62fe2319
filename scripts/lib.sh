# shellcheck shell=bash
# What start.sh and scripts/test.sh share; sourced with the project's folder as the current one.

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
