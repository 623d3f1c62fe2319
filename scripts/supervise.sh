#!/usr/bin/env bash
# Keeps a training run going:  scripts/supervise.sh LOCK COMMAND...   (start.sh runs it, in a session of its own)
#
# A run that died is started again after 10 s, 20 s, ... 10 minutes. This ends, with the run's exit code, when the run is
# complete (0), was stopped (75, or SIGTERM to this script), was refused (2 to 5, or before its first checkpoint 7:
# starting it again would not help), or has died 5 times in a row without a new checkpoint. A full disk (6) and a hub
# that does not answer (7) do not count, since both may end by themselves; nor does waiting in vain for other machines.
# LOCK, in the run's folder, holds this script's process number, and at the end the exit code behind it.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

lock=$1 run=${1%/*} first_pause=${RESTART_PAUSE:-10} wait_for_machines=${MACHINES_PAUSE:-600} # seconds
shift
stops=0 asked=0 # how often this script was asked to stop, and when

note() { printf '%(%F %T)T start.sh: %s\n' -1 "$*" || true; } # when the disk is full, only the log suffers

finish() {
  note "$1"
  say "$$ $code" >"$lock" || true
  exit "$code"
}

# Ends this script when the run's folder was removed; another run may have begun there, with a supervisor of its own.
check_folder() {
  if [[ $(cat "$lock" 2>/dev/null) != "$$" ]]; then note "the run's folder was removed: not starting it again" && exit 6; fi
}

status() { cat "$run/status.json" 2>/dev/null || true; }
newest_step() { find "$run" -maxdepth 1 -name 'step-*' | sort | sed -n '$s/.*step-0*//p'; }

# All processes of this run, whoever started them: they have this in their environment.
run_processes() { grep -lsxzF "SUPERVISED_BY=$lock" /proc/[0-9]*/environ | cut -d / -f 3 || true; }
kill_run() { for pid in $(run_processes); do pass_on KILL "$pid"; done; }

# Asks one training process, which tells the others at their next step: a launcher would kill them after 30 s, saved or
# not. The third time, all are killed; what comes within a second is one request. (run_child calls this.)
# shellcheck disable=SC2329
stop_run() {
  local target=$2 children
  if ((stops && SECONDS - asked < 2)); then return; fi
  asked=$SECONDS
  stops=$((stops + 1))
  if ((stops > 2)); then kill_run; fi
  children=$(cat "/proc/$2/task/$2/children" 2>/dev/null) || true
  for pid in $children; do
    if grep -qsxzF LOCAL_RANK=0 "/proc/$pid/environ"; then target=$pid; fi
  done
  pass_on TERM "$target"
}

say "$$" >"$lock"
trap 'stops=$((stops + 1))' INT TERM
trap 'note "line $LINENO failed: $BASH_COMMAND"' ERR
code=75 failures=0 pause=$first_pause highest=$(newest_step)
while ((stops == 0)); do
  check_folder
  # What outlived its launcher, or another supervisor, would keep the run's folder and the GPUs' memory to itself.
  tries=0
  while [[ $(run_processes) && $stops == 0 ]]; do
    kill_run && sleep 1
    if ((++tries == 10)); then
      note "process $(run_processes | paste -s -d ' ' -) is killed and does not end, as one that waits for a broken driver: restart the machine, or rent another; until it ends, the run waits"
    fi
  done
  before=$(status) started=$SECONDS
  if ((stops)); then break; fi # while it waited; nothing was started
  code=0
  note "starting: $*"
  # Seconds that a launcher, told to stop by others than stop_run, leaves its processes to save: by itself 30. (It waits
  # as long, twice, for one that cannot be killed.)
  run_child stop_run env "SUPERVISED_BY=$lock" \
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}" "$@" || code=$?
  waited=$((SECONDS - started))
  check_folder
  # Launchers end with 1 whatever the code of their processes; and a process that is saved and done may still be killed.
  if [[ $(status) != "$before" ]]; then
    code=$(status | sed -n 's/^ "exit_code": \([0-9]*\),*$/\1/p' | grep . || say "$code")
  fi
  # On a full disk there is no room for status.json either.
  if ((code == 1)) && ! { say full >"$run/.tmp-room"; } 2>/dev/null; then code=6; fi
  rm -f "$run/.tmp-room"
  case $code in
    0) finish "the run is complete" ;;
    75) finish "the run was stopped; everything is saved" ;;
  esac
  step=$(newest_step)
  if ((stops)); then break; fi
  # After a new checkpoint what was refused is worth a second start: memory that another program took, a damaged file.
  if [[ $code == [2-5] || ($code == 7 && ! $step) ]] && ((step <= highest)); then
    finish "the run ended with exit code $code, as said above; starting it again would not help"
  fi
  if ((step > highest)); then
    failures=0 pause=$first_pause
  elif [[ $(status) == "$before" ]] &&
    ((${NUM_MACHINES:-1} > 1 && waited >= wait_for_machines && waited < 3 * wait_for_machines)); then
    # Launchers wait 15 minutes for them; for NCCL, which cannot connect, processes wait an hour.
    note "no step was done in $waited s, as when the other machines do not come: waiting on"
  elif ((code != 6 && code != 7)); then
    ((++failures))
  fi
  highest=$step # lower than before when the newest was damaged
  ((failures < 5)) || finish "the run died 5 times in a row without a new checkpoint, now with exit code $code"
  note "the run died with exit code $code; newest checkpoint: ${step:-none}; starting it again in $pause s"
  run_child stop_run sleep "$pause" || true
  pause=$((pause < 300 ? 2 * pause : 600))
done
finish "stopped with exit code $code; newest checkpoint: ${step:-none}"
