#!/usr/bin/env bash
# Copies the checkpoints of a rented box here, verified; with --delete makes room there. See --help.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/remote.sh
source scripts/remote.sh

small_files=(metrics.jsonl loss.png status.json config.json start.log 'eval-*.json')
watch='' delete='' interval=60
refused=' ' said=$'\n'

usage() {
  cat <<'TEXT'
usage: scripts/sync_checkpoints.sh [--watch] [--interval SECONDS] [--delete] [settings]

Copies each complete checkpoint from the box, compares every byte with its manifest, and only then gives
it its name here; also metrics.jsonl, loss.png, status.json, config.json, start.log and eval-*.json. What
a dropped connection interrupts goes on where it stopped. No checkpoint here is ever deleted: one that
the run has written anew since is put aside, as replaced-step-*; and a run that the box has begun anew
under the same name is left alone until its folder here has another name.

  --watch             for ever, until Ctrl-C; after a failure soon again, then later and later
  --interval SECONDS  between the rounds of --watch (60)
  --delete            then make room on the box: what has just been verified here once more is removed
                      there, but for the newest two checkpoints and the best (lowest validation loss)

TEXT
  settings_help
  cat <<'TEXT'

exit codes: 0 done; 1 the box or the connection failed, run it again; 2 usage or settings; 4 done, but a
checkpoint was refused; 6 disk; 129, 130, 143 ended by a signal
TEXT
}

parse_options() {
  while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
      --watch) watch=1 ;;
      --delete) delete=1 ;;
      -h | --help) usage && exit 0 ;;
      --interval) interval=${2:-} && shift $(($# > 1)) ;;
      *) remote_option "$@" && shift ;;
    esac
    shift
  done
  [[ $interval =~ ^[1-9][0-9]{0,5}$ ]] || die 2 "--interval is '$interval'; use a number of seconds such as 60"
}

# One sync at a time: an open file is locked, so the lock ends with this process and the rsync that it started.
take_lock() {
  { mkdir -p "$LOCAL_DIR" && exec 9<>"$LOCAL_DIR/.sync-lock"; } 2>/dev/null ||
    die 6 "cannot write to $LOCAL_DIR; choose another LOCAL_DIR"
  files lock 9 "process $$, started $(date '+%F %T')" ||
    die 2 "another sync into $LOCAL_DIR is running ($answer); stop that one first"
}

once() { # a line that would be the same in each round
  if [[ $said != *$'\n'"$1"$'\n'* ]]; then
    said+=$1$'\n'
    say "$1" >&2
  fi
}

# refuse ID MESSAGE: what is refused (ID: a checkpoint and its manifest) is not tried again by this process.
refuse() {
  n_refused=$((n_refused + 1)) refused+="$1 "
  once "refused: $2"
}

# copy_checkpoint RUN STEP MANIFEST SIZE. The second try compares bytes, where the first trusts the sizes and dates of
# what an earlier round left. --inplace, in a folder that is nobody else's: what came survives even kill -9, and takes
# its place on the disk once. What is there already is compared first, which moves no byte: at 20 MB/s on a slow disk.
copy_checkpoint() {
  local run=$1 step=$2 manifest=$3 size=$4 part=$LOCAL_DIR/$1/.sync-$2 had='' here how code began=$SECONDS
  mkdir -p "$part" || { problem="cannot write to $part" && return 6; }
  for how in --times --checksum; do
    code=0 here=$(bytes_in "$part") had=${had:-$here}
    fetch $((stall + here / 20000000)) "$part" --inplace "$how" --exclude='*/' "$origin/$run/$step/" "$part/" || code=$?
    ((code == 0 || code == 23 || code == 24)) || explain "$code" || return # 23, 24: a file vanished
    code=0
    files commit "$part" "$manifest" "$LOCAL_DIR/$run/$step" || code=$?
    problem=$answer
    if ((code == 0)); then
      n_copied=$((n_copied + 1)) bytes_copied=$((bytes_copied + size))
      bytes_moved=$((bytes_moved + (size > had ? size - had : 0))) copy_seconds=$((copy_seconds + SECONDS - began))
    fi
    ((code == 4)) || return "$code"
  done
  code=0
  # shellcheck disable=SC2016 # for the shell on the box
  ask 'test -e "$1/manifest.json"' "$REMOTE_DIR/$run/$step" || code=$?
  case $code in
    0) refuse "$run/$step/$manifest" "$run/$step on the box: $problem" ;;
    1) rm -rf "$part" ;; # the run removes old checkpoints itself
    *) explain "$code" ;;
  esac
}

copy_all() {
  local kind run step manifest size part name code=0 runs=() filter=()
  while IFS=$'\t' read -r kind run step; do
    case $kind in
      run) runs+=("$run") ;;
      remote) n_remote=$run ;;
      note) once "$run" ;;
      refuse) refuse "$run" "$run" ;;
    esac
  done <"$tmp/plan"
  ((${#runs[@]})) || return 0
  for name in "${small_files[@]}"; do filter+=("--include=/$name"); done
  for run in "${runs[@]}"; do # by itself: its folder may be a link to one on a larger disk, there or here
    code=0
    fetch "$stall" "$LOCAL_DIR/$run/" "${filter[@]}" --exclude='*' "$origin/$run/" "$LOCAL_DIR/$run/" || code=$?
    ((code == 0 || code == 24)) || explain "$code" || return
  done

  for part in "$LOCAL_DIR"/*/.sync-step-*; do # begun, and gone from the box since
    run=${part%/*} step=${part##*/.sync-}
    if [[ -d $part ]] && ! grep -q "^copy	${run##*/}	$step	" "$tmp/plan"; then rm -rf "$part"; fi
  done
  while IFS=$'\t' read -r -u 3 kind run step manifest size; do
    if [[ $kind != copy ]]; then continue; fi
    if [[ $refused == *" $run/$step/$manifest "* ]]; then
      n_refused=$((n_refused + 1))
    else
      copy_checkpoint "$run" "$step" "$manifest" "$size" || return
    fi
  done 3<"$tmp/plan"
}

# At the last moment the box looks again, since the run goes on meanwhile. The new name is neither step-*, so nobody
# takes it for a checkpoint, nor .tmp-*, which a run that starts removes, and would stumble over when we are faster.
# shellcheck disable=SC2016 # for the shell on the box
delete_script='cd "$1" || exit 44
newer=-1
for file in step-[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]/manifest.json; do
  if [ "$file" = "$2/manifest.json" ]; then newer=0; elif [ "$newer" -ge 0 ]; then newer=$((newer + 1)); fi
done
[ "$newer" -ge 2 ] || exit 45
[ "$(sha256sum "$2/manifest.json" | cut -c 1-64)" = "$3" ] || exit 45
rm -rf .deleting-step-*
mv "$2" ".deleting-$2" && rm -rf ".deleting-$2"'

delete_old() {
  local kind run step manifest size code
  list_box || return
  while IFS=$'\t' read -r -u 3 kind run step manifest size; do
    if [[ $kind != delete || $refused == *" $run/$step/$manifest "* ]]; then continue; fi
    if ! files verify "$LOCAL_DIR/$run/$step" "$manifest"; then
      refuse "local:$run/$step/$manifest" "$LOCAL_DIR/$run/$step: $answer; remove it to copy it again from the box"
      continue
    fi
    code=0
    ask "$delete_script" "$REMOTE_DIR/$run" "$step" "$manifest" || code=$?
    case $code in
      0) n_deleted=$((n_deleted + 1)) bytes_deleted=$((bytes_deleted + size)) ;;
      45) ;; # something changed there: the next round sees to it
      *) explain "$code" || return ;;
    esac
  done 3<"$tmp/plan"
}

sync_round() {
  n_remote=0 n_copied=0 n_deleted=0 n_refused=0 bytes_copied=0 bytes_moved=0 bytes_deleted=0 copy_seconds=0
  list_box || return
  copy_all || return
  if [[ $delete ]]; then delete_old || return; fi
  ((n_refused == 0)) || return 4
}

report() {
  local copied='' deleted=''
  if ((n_copied)); then
    copied=" ($(human "$bytes_copied"), $(human $((bytes_moved / (copy_seconds ? copy_seconds : 1))))/s)"
  fi
  if ((n_deleted)); then deleted=" ($(human "$bytes_deleted"))"; fi
  say "$(date +%T) on the box $((n_remote - n_deleted)), copied $n_copied$copied, deleted $n_deleted$deleted, refused $n_refused"
}

main() {
  local code failures=0 succeeded='' delay tool
  parse_options "$@"
  load_settings
  for tool in ssh rsync python3; do
    command -v "$tool" >/dev/null || die 2 "no $tool here; ./scripts/test_remote_sync.sh says how to install it"
  done
  open_connection
  take_lock
  while :; do
    code=0
    sync_round || code=$?
    if ((code == 0 || code == 4 || n_copied + n_deleted)); then report; fi
    if ((code == 0 || code == 4)); then
      succeeded=1 failures=0 delay=$interval
      [[ $watch ]] || exit "$code"
    else
      if [[ ! $watch || ($code == 2 && ! $succeeded) ]]; then die "$code" "$problem"; fi
      delay=$(((interval < 5 ? interval : 5) << (failures < 7 ? failures : 7)))
      delay=$(((delay < 300 ? delay : 300) * (50 + RANDOM % 101) / 100 + 1)) # jitter: laptops do not come all at once
      failures=$((failures + 1))
      say "$(date +%T) $problem; trying again in $delay s" >&2
    fi
    sleep "$delay" 9>&- &
    child=$!
    wait "$child" || true
    child=''
  done
}

main "$@"
