#!/usr/bin/env bash
# Checks, in order, what scripts/sync_checkpoints.sh needs; says what to do about the first thing that is missing.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/remote.sh
source scripts/remote.sh

tick() { say "  ✓ $*"; }

# cross CODE WHAT REMEDY
cross() {
  say "  ✗ $2"
  die "$1" "$3"
}

check_here() {
  local tool message
  for tool in ssh ssh-keyscan rsync python3 awk; do
    command -v "$tool" >/dev/null || cross 2 "tools here: no $tool" \
      "install it; Debian, Ubuntu: apt install openssh-client rsync python3; macOS: brew install rsync python"
  done
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
    cross 2 "tools here: $(python3 --version)" "put Python 3.8 or newer on PATH as python3"
  tick "tools here: $(ssh -V 2>&1 | cut -d , -f 1), $(rsync --version | sed -n '1s/  */ /gp' | cut -d ' ' -f 1-3), $(python3 --version)"
  message=$(load_settings 2>&1) || cross 2 settings "${message#error: }"
  load_settings
  tick "settings: $REMOTE_USER@$REMOTE_HOST port $REMOTE_PORT, $REMOTE_DIR -> $LOCAL_DIR"
  if [[ ! $SSH_KEY ]]; then
    tick "key: ssh's own choice, since SSH_KEY is not set"
  elif [[ $(ls -lnL "$SSH_KEY") == -r??------* ]]; then
    tick "key: $SSH_KEY, which only you can read"
  else
    cross 2 "key: $SSH_KEY can be read by others" "ssh refuses such a key: chmod 600 $SSH_KEY"
  fi
}

# on_box WHAT SCRIPT ARGUMENT...: sets `answer` to its last line; ends with what it means when ssh itself fails.
on_box() {
  local what=$1 code=0
  shift
  ask "$@" >"$tmp/said" || code=$?
  answer=$(tail -n 1 "$tmp/said")
  ((code != 124 && code != 255)) || explain "$code" || cross $? "$what" "$problem"
  return "$code"
}

# shellcheck disable=SC2016 # for the shell on the box
check_box() {
  local tool
  [[ $(ssh-keyscan -T 15 -p "$REMOTE_PORT" "$REMOTE_HOST" 2>/dev/null) ]] || cross 1 "port" \
    "no ssh server answers at $REMOTE_HOST port $REMOTE_PORT; is the box running, and is this still its port? (a restart changes it)"
  tick "port: an ssh server answers at $REMOTE_HOST port $REMOTE_PORT"
  on_box login true || cross 1 login "the box lets us in, but its shell fails ($(tail -n 1 "$tmp/errors"))"
  tick "login: as $REMOTE_USER"
  for tool in rsync sha256sum; do
    on_box "tools there" 'command -v "$1"' "$tool" ||
      cross 2 "tools there: no $tool" "on the box: apt-get update && apt-get install -y rsync coreutils"
  done
  tick "tools there: rsync, sha256sum"
  on_box folder 'cd "$1" && pwd' "$REMOTE_DIR" || cross 2 "folder: the box has no $REMOTE_DIR" \
    "set REMOTE_DIR to the folder checkpoints of the project there; training makes it"
  tick "folder: $answer"
}

check_checkpoints() {
  local n needed free
  list_box || cross $? checkpoint "$problem"
  n=$(awk -F '\t' '$1 == "remote" { print $2 }' "$tmp/plan")
  ((n)) || cross 1 "checkpoint: none in $REMOTE_DIR" \
    "wait until the run has saved one (--train.save_every), or set REMOTE_DIR to the folder that holds the runs"
  tick "checkpoint: $n complete"
  mkdir -p "$LOCAL_DIR" 2>/dev/null || cross 6 "disk here" "cannot make $LOCAL_DIR; choose another LOCAL_DIR"
  needed=$(awk -F '\t' '$1 == "copy" { sum += $5 } END { printf "%.0f", sum }' "$tmp/plan")
  free=$(df -Pk "$LOCAL_DIR" | awk 'NR == 2 { printf "%.0f", 1024 * $4 }')
  ((free > needed)) || cross 6 "disk here: $(human "$free") free, $(human "$needed") to copy" \
    "free some space, or set LOCAL_DIR to a larger disk"
  tick "disk here: $(human "$free") free, $(human "$needed") to copy"
}

# shellcheck disable=SC2016 # for the shell on the box
check_round_trip() {
  local code=0 name=.sync-test-$$ written
  on_box "round trip" 'rm -f "$1"/.sync-test-*; head -c 100000 /dev/urandom >"$1/$2" && sha256sum <"$1/$2"' \
    "$REMOTE_DIR" "$name" ||
    cross 1 "round trip" "cannot write to $REMOTE_DIR on the box ($(tail -n 1 "$tmp/errors")); --delete needs that"
  written=${answer%% *}
  fetch "$stall" "$tmp" "$origin/$name" "$tmp/" || code=$?
  ((code == 0)) || explain "$code" || cross $? "round trip" "$problem"
  on_box "round trip" 'rm "$1/$2"' "$REMOTE_DIR" "$name"
  [[ $(file_hash "$tmp/$name") == "$written" ]] ||
    cross 1 "round trip" "100 kB arrived other than they were sent; run this again, and if it stays so, rent another box"
  tick "round trip: 100 kB written there, copied, compared"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  say "usage: scripts/test_remote_sync.sh [settings]"
  say "Checks, in order, what scripts/sync_checkpoints.sh needs, and ends at the first thing that is missing."
  settings_help
  exit 0
fi
while (($#)); do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  remote_option "$@" && shift 2
done
check_here
open_connection
check_box
check_checkpoints
check_round_trip
say "All is well. Now: ./scripts/sync_checkpoints.sh --watch"
