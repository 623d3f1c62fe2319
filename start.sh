#!/usr/bin/env bash
# One command from a fresh clone to a trained model; run it again to continue. See --help.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/lib.sh
source scripts/lib.sh
trap 'say "start.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

prompt="The people of the United States"

usage() {
  cat <<'TEXT'
usage: ./start.sh [--skip-deps] [--dry-run] [-- options of train.py]

Sets up .venv, looks at the hardware and trains. Without a GPU: the demo model, in minutes, and a
sample of its text. With GPUs: the default run on all of them. Run it again to resume.

  --skip-deps   install nothing; use the active environment, .venv, or python as it is
  --dry-run     set up and check everything, print the plan and the settings, start nothing
  -h, --help    show this

example: ./start.sh -- --preset gpt2 --train.run_name first
TEXT
}

parse_options() {
  again=$(show ./start.sh "$@")
  again=${again#  }
  skip_deps='' dry_run=''
  while (($#)); do
    case $1 in
      --skip-deps) skip_deps=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help) usage && exit 0 ;;
      --) shift && break ;;
      *) unknown_option "$1" ;;
    esac
    shift
  done
  train_options=("$@")
}

unknown_option() {
  local hint="options of train.py go behind --, see ./start.sh --help"
  case $(tr -d '_-' <<<"$1" | tr '[:upper:]' '[:lower:]') in
    dr* | n) hint="did you mean --dry-run?" ;;
    sk* | *deps | no*install) hint="did you mean --skip-deps?" ;;
    h* | us* | '?') hint="did you mean --help?" ;;
  esac
  die 2 "unknown option $1; $hint"
}

# What the options for train.py say about the run, so that the sample is taken from the right folder.
read_train_options() {
  local i option value
  preset='' run_name='' out_dir=checkpoints
  for ((i = 0; i < ${#train_options[@]}; i++)); do
    option=${train_options[i]} value=${train_options[i + 1]:-}
    if [[ $option == --*=* ]]; then value=${option#*=} option=${option%%=*}; fi
    case $option in
      --preset) preset=$value ;;
      --train.run_name) run_name=$value ;;
      --train.out_dir) out_dir=$value ;;
    esac
  done
}

# Sets `gpus`, one "name, MiB" per GPU. Empty: no GPU. A driver that does not answer properly is an error.
detect_gpus() {
  local line status='' seconds=${NVIDIA_SMI_TIMEOUT:-10}
  local remedy="the driver does not work: restart the machine or rent another; CUDA_VISIBLE_DEVICES='' ./start.sh trains without GPUs"
  gpus=()
  if [[ ${CUDA_VISIBLE_DEVICES-all} =~ ^(-1)?$ ]] || ! command -v nvidia-smi >/dev/null; then return; fi
  # read's own time limit, since a process stuck in the driver cannot be killed and would be waited for.
  while IFS= read -r -t "$seconds" line; do
    if [[ $line =~ ^exit\ ([0-9]+)$ ]]; then status=${BASH_REMATCH[1]}; elif [[ $line ]]; then gpus+=("$line"); fi
  done < <(
    exec 2>&1
    code=0
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader,nounits || code=$?
    say "exit $code"
  )
  [[ $status ]] || die 2 "nvidia-smi gave no answer within $seconds s; $remedy"
  if [[ ${gpus[0]:-} == "No devices were found"* ]]; then gpus=() && return; fi
  ((status == 0)) || die 2 "nvidia-smi failed with exit code $status (${gpus[0]:-no message}); $remedy"
  for line in ${gpus[@]+"${gpus[@]}"}; do
    [[ $line =~ ^.+,\ ([0-9]+|\[N/A\])$ ]] || die 2 "nvidia-smi printed '$line' for a GPU; $remedy"
  done
}

describe_hardware() {
  if ((${#gpus[@]})); then
    say "Hardware: $(printf '%s\n' "${gpus[@]}" | sort | uniq -c |
      sed -E 's/^ *([0-9]+) (.*), (.*)$/\1 x \2 (\3 MiB)/' | paste -s -d ';' -)"
    return
  fi
  local model='' cores memory=''
  if [[ -r /proc/meminfo ]]; then
    model=$(sed -n '/^model name/{s/[^:]*: //p;q;}' /proc/cpuinfo)
    memory=", $(awk '/^MemTotal/ {printf "%.0f", $2 / 2^20}' /proc/meminfo) GB memory"
  fi
  cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  say "Hardware: no GPU; ${model:-$(uname -m) CPU}, $cores cores$memory"
}

# Sets `n_gpus`, the GPUs that torch can use; an error when nvidia-smi sees GPUs that torch does not.
check_torch() {
  local answer cuda remedy="delete .venv and run ./start.sh again"
  if [[ $skip_deps ]]; then remedy="run ./start.sh without --skip-deps"; fi
  # is_available asks CUDA itself; device_count alone is content with a driver too old for it.
  answer=$("$python" -W ignore -c 'import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.version.cuda)' 2>&1) ||
    die 2 "$python cannot import torch (${answer##*$'\n'}); $remedy"
  read -r n_gpus cuda <<<"${answer##*$'\n'}"
  if ((${#gpus[@]} == 0)); then
    n_gpus=0
  elif [[ $cuda == None ]]; then
    die 2 "this torch is built without CUDA and cannot use the GPU; delete .venv and run ./start.sh with no pip settings (PIP_*, pip.conf) that choose a CPU build"
  elif [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
    say "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES leaves $n_gpus of ${#gpus[@]} GPUs to use"
    ((n_gpus)) || die 2 "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names no GPU of this machine; unset it"
  elif ((n_gpus != ${#gpus[@]})); then
    die 2 "torch sees $n_gpus of ${#gpus[@]} GPUs; the driver is likely too old for torch's CUDA $cuda: update it, or rent a machine whose nvidia-smi shows CUDA $cuda or newer"
  fi
}

# Sets `train` and, without a GPU, `sample`: the commands of the plan.
make_plan() {
  train=("$python" train.py) sample=()
  if ((n_gpus > 1)); then # precision is train.py's own business
    train=(accelerate launch --multi_gpu --num_processes "$n_gpus" --num_machines 1 --mixed_precision no
      --dynamo_backend no train.py)
  elif ((n_gpus == 0)); then
    if [[ ! $preset ]]; then preset=demo && train+=(--preset demo); fi
    sample=("$python" generate.py "$out_dir/${run_name:-$preset}" --prompt "$prompt" --max_tokens 100)
  fi
  train+=(--resume ${train_options[@]+"${train_options[@]}"})
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

print_plan() {
  say "Plan:"
  show "${train[@]}"
  if ((${#sample[@]})); then show "${sample[@]}"; fi
  if [[ -f scripts/calc_params.py ]]; then
    say "Settings:"
    local options=(${train_options[@]+"${train_options[@]}"}) n=$((n_gpus > 1 ? n_gpus : 1))
    if [[ " ${options[*]-}" != *" --preset"* ]]; then
      options=(--preset "${preset:-fineweb}" ${options[@]+"${options[@]}"})
    fi
    WORLD_SIZE=$n "$python" scripts/calc_params.py "${options[@]}" || exit # checked for as many processes as the run's
  fi
  say "Nothing was started (--dry-run)."
}

# Runs a command as a child in a process group of its own and passes each signal on to it exactly once
# (Ctrl-C would otherwise reach it twice, a SIGTERM never). Returns the command's exit code.
run_child() {
  local child signal signalled=1 code=0
  set -m
  "$@" &
  child=$!
  set +m
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # expanded now on purpose
    trap "signalled=1; kill -$signal $child 2>/dev/null || true" "$signal"
  done
  while [[ $signalled ]]; do # a signal interrupts wait
    signalled=''
    wait "$child" && code=0 || code=$?
  done
  trap - INT TERM HUP
  return "$code"
}

run_demo() {
  local code=0
  say "Training the demo model; Ctrl-C saves and stops, $again goes on from there."
  show "${train[@]}"
  run_child "${train[@]}" || code=$?
  case $code in
    0) ;;
    75) say "Stopped, and everything is saved. To go on: $again" ;;
    2) say "Training ended with exit code 2: its settings, as the message above says." >&2 ;;
    *) say "Training ended with exit code $code; the message above says why. Mend that, then: $again" >&2 ;;
  esac
  ((code == 0)) || exit "$code"
  show "${sample[@]}"
  "${sample[@]}" || exit
  next_steps
}

next_steps() {
  local run=${sample[2]}
  say "Next:"
  if [[ ${VIRTUAL_ENV:-} == "$PWD/.venv" ]]; then say "  source .venv/bin/activate"; fi
  show "$python" generate.py "$run" --prompt "In the year" --temperature 0.7
  show "$python" evals.py "$run"
  show "$python" prepare_data.py --preset "$preset"
  show "$python" scripts/calc_params.py --preset gpt2
  say "On text of your own:"
  say "  $python train.py --preset demo --train.run_name mine --data.bpe_vocab_size 1024 \\"
  say "    --data.current_datasets LOCAL --data.dataset_probabilities 1 --data.local_files my.txt"
}

main() {
  parse_options "$@"
  read_train_options
  if [[ $skip_deps ]]; then
    use_python as-is
    say "Installing nothing (--skip-deps); using $(command -v "$python")"
  else
    install_requirements requirements.txt
    use_python installed
  fi
  detect_gpus
  describe_hardware
  check_torch
  make_plan
  if [[ -z ${HF_HOME:-} && -d ${WORKSPACE:=/workspace} ]]; then # the large disk of a rented machine
    export HF_HOME=${WORKSPACE%/}/.cache/huggingface
    say "Downloads are kept in $HF_HOME"
  fi
  export PYTHONUNBUFFERED=1 # lines appear at once, through `tee` as well
  if [[ $dry_run ]]; then
    print_plan
  elif ((n_gpus == 0)); then
    run_demo
  else
    show "${train[@]}"
    exec "${train[@]}" # exec: signals go to the run itself
  fi
}

main "$@"
