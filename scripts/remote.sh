# shellcheck shell=bash
# What sync_checkpoints.sh and test_remote_sync.sh share: settings, the connection, what its failures mean.
# Sourced in the project's folder. For macOS too: bash 3.2, no flock, no sha256sum.
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

settings=" REMOTE_HOST REMOTE_PORT REMOTE_USER REMOTE_DIR SSH_KEY LOCAL_DIR "
stall=${SYNC_STALL_SECONDS:-60} # a connection that moves no byte for so long is ended
tmp='' child='' watchdog='' answer='' problem=''

settings_help() {
  cat <<'TEXT'
settings: options (--remote-port 40123), else the environment, else the file .sync.env (lines such as
REMOTE_PORT=40123)
  REMOTE_HOST, REMOTE_PORT   the box and its ssh port, as the provider shows them
  REMOTE_USER                root, unless set
  REMOTE_DIR                 /workspace/BasicGPT/checkpoints, unless set
  SSH_KEY                    a private key; unless set, ssh chooses
  LOCAL_DIR                  checkpoints, unless set; relative to the project's folder
TEXT
}

# remote_option OPTION VALUE: any setting, such as --remote-port 40123.
remote_option() {
  local name
  name=$(tr 'a-z-' 'A-Z_' <<<"${1#--}")
  [[ $1 == --[a-z]* && $settings == *" $name "* ]] || die 2 "unknown option $1; see $0 --help"
  [[ ${2:-} ]] || die 2 "$1 needs a value"
  printf -v "$name" %s "$2"
}

# .sync.env is read, never executed, and overrides nothing.
read_settings_file() {
  local line name value number=0 form='^[[:space:]]*(export[[:space:]]+)?([A-Za-z_]+)=(.*)$'
  while IFS= read -r line || [[ $line ]]; do
    number=$((number + 1))
    if [[ $line =~ ^[[:space:]]*(#|$) ]]; then continue; fi
    [[ $line =~ $form ]] || die 2 ".sync.env line $number is not of the form NAME=value" # not shown: it may be a secret
    name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]%%[[:space:]]#*}
    [[ $settings == *" $name "* ]] || die 2 ".sync.env line $number: there is no setting $name, only$settings"
    value=${value%"${value##*[![:space:]]}"} # without spaces, or the \r of Windows, at its end
    case $value in \"*\" | \'*\') value=${value:1:${#value}-2} ;; esac
    [[ ${!name:-} ]] || printf -v "$name" %s "$value"
  done <.sync.env
}

# Completes the settings. What passes has no character that a shell minds, but for the paths of this machine.
load_settings() {
  local name
  if [[ -f .sync.env ]]; then read_settings_file; fi
  for name in REMOTE_HOST REMOTE_PORT; do
    [[ ${!name:-} ]] || die 2 "$name is not set; put REMOTE_HOST=... and REMOTE_PORT=... into .sync.env (Vast.ai shows them as ssh -p PORT root@HOST)"
  done
  : "${REMOTE_USER:=root}" "${REMOTE_DIR:=/workspace/BasicGPT/checkpoints}" "${LOCAL_DIR:=checkpoints}" "${SSH_KEY:=}"
  [[ $REMOTE_HOST =~ ^[A-Za-z0-9:][A-Za-z0-9.:_-]*$ ]] ||
    die 2 "REMOTE_HOST is '$REMOTE_HOST'; use a name or an address (the user goes into REMOTE_USER)"
  [[ $REMOTE_PORT =~ ^[0-9]{1,5}$ ]] || die 2 "REMOTE_PORT is '$REMOTE_PORT'; use the number that the provider shows"
  [[ $REMOTE_USER =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] || die 2 "REMOTE_USER is '$REMOTE_USER'; use a name such as root"
  [[ $REMOTE_DIR =~ ^[A-Za-z0-9._/~][A-Za-z0-9._/+@%=,-]*$ ]] ||
    die 2 "REMOTE_DIR is '$REMOTE_DIR'; use a path of letters, digits and ._/+@%=,-"
  if [[ $SSH_KEY == \~/* ]]; then SSH_KEY=$HOME${SSH_KEY:1}; fi
  if [[ $LOCAL_DIR == \~/* ]]; then LOCAL_DIR=$HOME${LOCAL_DIR:1}; fi
  if [[ $LOCAL_DIR != /* ]]; then LOCAL_DIR=$PWD/$LOCAL_DIR; fi
  [[ ! $SSH_KEY || (-r $SSH_KEY && $SSH_KEY != *.pub) ]] ||
    die 2 "SSH_KEY is '$SSH_KEY', which is not a private key that can be read; give the file without .pub"
}

# The settings as a configuration of ssh, so that no path has to survive a shell's quoting. The commands of a round share
# one connection, which ends by itself when the box does not answer for 15 s.
open_connection() {
  local host=$REMOTE_HOST key=''
  if [[ $SSH_KEY ]]; then key="IdentitiesOnly yes"$'\n'"IdentityFile \"${SSH_KEY//%/%%}\""; fi
  if [[ $host == *:* ]]; then host="[$host]"; fi # IPv6
  # shellcheck disable=SC2034 # for the scripts that source this
  origin=$host:$REMOTE_DIR
  tmp=$(mktemp -d /tmp/sync.XXXXXX) || die 6 "no folder can be made in /tmp"
  trap close_all EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  cat >"$tmp/config" <<TEXT
User $REMOTE_USER
Port $REMOTE_PORT
$key
BatchMode yes
StrictHostKeyChecking accept-new
UserKnownHostsFile "${PWD//%/%%}/.sync.known_hosts"
GlobalKnownHostsFile /dev/null
ConnectTimeout 15
ServerAliveInterval 5
ServerAliveCountMax 3
ControlMaster auto
ControlPath $tmp/s
ControlPersist 60
LogLevel ERROR
TEXT
}

end_child() { # and the connection, so that what waits for a frozen box ends too
  if [[ $child ]]; then kill "$child" ${watchdog:+"$watchdog"} 2>/dev/null || true; fi
  ssh -F "$tmp/config" -O exit "$REMOTE_HOST" >/dev/null 2>&1 || true
  wait "$child" ${watchdog:+"$watchdog"} 2>/dev/null || true
  child='' watchdog=''
}

close_all() {
  exec 2>/dev/null # first: bash complains of a fork that a signal has interrupted ("wait_for: No record of process")
  trap '' HUP INT TERM
  end_child
  rm -rf "$tmp"
}

# shellcheck disable=SC2012 # the sizes, not the names
bytes_in() { ls -lnAR "$1" 2>/dev/null | awk '{ sum += $5 } END { printf "%.0f\n", sum }'; }

human() {
  awk -v n="$1" 'BEGIN { split("B kB MB GB TB", unit); for (i = 1; n >= 1000 && i < 5; i++) n /= 1000
    printf(i > 1 ? "%.1f %s" : "%d %s", n, unit[i]) }'
}

# guard SECONDS FOLDER COMMAND...: runs it, and ends it (code 124) when FOLDER has stayed the same size for so long, or
# when it took so long and FOLDER is ''. rsync --timeout does not notice that the rsync on the other side is frozen.
# Both in the background, since a Ctrl-C that meets the end of a command in the foreground is lost on bash.
guard() {
  local limit=$1 folder=$2 code=0
  shift 2
  rm -f "$tmp/stalled"
  "$@" <&0 &
  child=$!
  watch_progress "$limit" "$folder" 9>&- &
  watchdog=$!
  wait "$child" || code=$?
  kill "$watchdog" 2>/dev/null || true
  wait "$watchdog" 2>/dev/null || true
  child='' watchdog=''
  if [[ -e $tmp/stalled ]]; then code=124; fi
  return "$code"
}

watch_progress() {
  local limit=$1 folder=$2 before='' now='' since=$SECONDS
  while sleep 1 >/dev/null 2>&1; do
    if [[ $folder ]]; then now=$(bytes_in "$folder"); fi
    if [[ $now != "$before" ]]; then
      before=$now since=$SECONDS
      if [[ -t 1 && $folder == */.sync-* ]]; then printf '  %s: %s\r' "${folder##*/.sync-}" "$(human "$now")"; fi
    elif ((SECONDS - since > limit)); then
      : >"$tmp/stalled"
      watchdog='' && end_child
      return
    fi
  done
}

# files COMMAND ARGUMENT...: sync_files.py; sets `answer` to what it prints.
files() {
  local code=0
  python3 scripts/sync_files.py "$@" >"$tmp/answer" &
  child=$!
  wait "$child" || code=$?
  child='' answer=$(<"$tmp/answer")
  return "$code"
}

# ask SCRIPT ARGUMENT...: runs a script of POSIX sh on the box.
ask() {
  local script=$1
  shift
  guard "$stall" '' ssh -F "$tmp/config" "$REMOTE_HOST" sh -s -- "$@" <<<"$script" 2>"$tmp/errors"
}

# fetch SECONDS FOLDER OPTION... SOURCE TARGET: rsync from the box. No links, devices, owners or modes of the box's.
fetch() {
  local limit=$1 folder=$2
  shift 2
  guard "$limit" "$folder" rsync -rt -e "ssh -F $tmp/config" "$@" </dev/null 2>"$tmp/errors"
}

# Prints \0, since some login scripts greet; then path \0 manifest \0 of each complete checkpoint. A run has config.json
# from its start; with its path goes the first line of its metrics.jsonl, which no other run has.
# shellcheck disable=SC2016 # for the shell on the box
list_script='cd "$1" || exit 44
printf "\0"
for file in */config.json */step-*/manifest.json; do
  [ -f "$file" ] || continue
  printf "%s\0" "$file"
  case $file in */step-*) cat "$file" ;; *) head -n 1 "${file%config.json}metrics.jsonl" 2>/dev/null ;; esac | tr -d "\000"
  printf "\0"
done'

# Into $tmp/plan: what `sync_files.py plan` makes of the box and LOCAL_DIR.
list_box() {
  local code=0
  ask "$list_script" "$REMOTE_DIR" >"$tmp/listing" || code=$?
  ((code == 0)) || explain "$code" || return
  files plan "$tmp/listing" "$LOCAL_DIR" || { code=$? && problem=$answer && return "$code"; }
  mv "$tmp/answer" "$tmp/plan"
}

# explain CODE: sets `problem` to what ended ssh or rsync with CODE, and what to do; returns the script's own code for it.
# shellcheck disable=SC2034 # problem: for the scripts that source this
explain() {
  local result=2 text at="$REMOTE_HOST port $REMOTE_PORT"
  text=$(tr -d '\r' <"$tmp/errors")
  end_child
  case "$1 $text" in
    *"IDENTIFICATION HAS CHANGED"*) problem="$at has another host key than before; if you have rented another box there, remove .sync.known_hosts; if not, do not connect" ;;
    *"UNPROTECTED PRIVATE KEY"*) problem="ssh refuses a key that others can read: chmod 600 ${SSH_KEY:-the key}" ;;
    *"Permission denied (13)"*) text=${text%%" (13)"*} problem="a file cannot be read or written: ${text##*$'\n'}" ;;
    *": Permission denied ("*) problem="$at knows no key of yours for $REMOTE_USER; set SSH_KEY to the private half of one that it has (if it has a passphrase: ssh-add it first)" ;;
    *"Could not resolve"*) problem="no machine is called $REMOTE_HOST; check REMOTE_HOST, and your own connection" ;;
    *"is your shell clean"*) problem="the box prints text at each login, which breaks rsync; there: touch ~/.no_auto_tmux, and no echo in ~/.bashrc" ;;
    *"rsync: command not found"* | *"rsync: not found"*) problem="the box has no rsync; there: apt-get install rsync" ;;
    44\ *) problem="the box has no folder $REMOTE_DIR; set REMOTE_DIR to the folder checkpoints of the project there" ;;
    *"No space left"*) problem="the disk of $LOCAL_DIR is full; free some space, then run this again" result=6 ;;
    *"Connection refused"*) problem="nothing answers at $at; is the box running, and is this still its port? (a restart changes it)" result=1 ;;
    *"imed out"* | *"unreachable"* | *"No route"*) problem="$at cannot be reached; is the box running, and this its address?" result=1 ;;
    124\ *) problem="$at sent nothing for $stall s; the next try goes on where this one stopped" result=1 ;;
    *) text=${text##*$'\n'} problem="$at failed (${text:-the connection was closed}); the next try goes on where this one stopped" result=1 ;;
  esac
  return "$result"
}
