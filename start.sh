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

Sets up .venv, looks at the hardware and trains. Run it again to resume.
Without a GPU: the demo model and a sample of its text, on two cores in 5 minutes (with AMX) to half an hour.
With GPUs: the default run on all of them, in the background. It outlives this terminal and is started
again when it dies. Run this again to watch it; Ctrl-C saves and stops it.

  --skip-deps   install nothing; use the active environment, .venv, or python as it is
  --dry-run     set up and check everything, print the plan and the settings, start nothing
  -h, --help    show this

Several machines, with --train.out_dir on a disk that they share: run it on each, with NUM_MACHINES,
MACHINE_RANK (0 and up), MASTER_ADDR and MASTER_PORT (of the machine of rank 0) in the environment.

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

# What the options for train.py say about the run: its folder, and whether it is the demo.
read_train_options() {
  local i option value
  preset='' run_name='' out_dir=checkpoints
  for ((i = 0; i < ${#train_options[@]}; i++)); do
    option=${train_options[i]} value=${train_options[i + 1]:-}
    if [[ $option == --*=* ]]; then value=${option#*=} option=${option%%=*}; fi
    case ${option//-/_} in
      __preset) preset=$value ;;
      __train.run_name) run_name=$value ;;
      __train.out_dir) out_dir=${value/#\~\//$HOME/} ;;
      __help | _h | __plan | __check) die 2 "$option starts no run; ask train.py itself: python train.py $option" ;;
    esac
  done
}

# Sets `machines` and `machine`, this one's rank, from the environment: only there do the machines differ.
read_machines() {
  local name count=${NUM_MACHINES:-} port=${MASTER_PORT:-29500}
  machines=${count:-1} machine=${MACHINE_RANK:-0}
  for name in MACHINE_RANK MASTER_ADDR MASTER_PORT; do
    if [[ ($count && $count != 1 && ! ${!name:-}) || (! $count && ${!name:-}) ]]; then
      die 2 "NUM_MACHINES is ${count:-not set} and $name is ${!name:-not set}; several machines need NUM_MACHINES, MACHINE_RANK, MASTER_ADDR and MASTER_PORT, one machine none of them"
    fi
  done
  if ! [[ "$machines $machine $port" =~ ^[1-9][0-9]{0,3}\ (0|[1-9][0-9]{0,3})\ [1-9][0-9]{0,4}$ ]] || ((machine >= machines)); then
    die 2 "NUM_MACHINES is '$machines', MACHINE_RANK '$machine', MASTER_PORT '$port'; use a number of machines, a rank from 0 to below it, and a free port"
  fi
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
    # Of a MIG slice a container may not see the memory.
    [[ $line =~ ^.+,\ ([0-9]+|\[N/A\]|\[Insufficient\ Permissions\])$ ]] || die 2 "nvidia-smi printed '$line' for a GPU; $remedy"
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
    ((n_gpus)) || die 2 "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names no GPU of this machine that torch's CUDA $cuda can use; unset it, and if that does not help, update the driver"
  elif ((n_gpus != ${#gpus[@]})); then
    die 2 "torch sees $n_gpus of ${#gpus[@]} GPUs; the driver is likely too old for torch's CUDA $cuda: update it, rent a machine whose nvidia-smi shows CUDA $cuda or newer, or take a torch for an older CUDA: rm -rf .venv; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu126 ./start.sh"
  fi
}

# NCCL's processes talk through /dev/shm where GPUs cannot read each other's memory; Docker gives it 64 MB.
check_shared_memory() {
  local size
  size=$(df -k --output=size /dev/shm 2>/dev/null | tail -n 1 | tr -d ' ') || return 0
  if [[ $size =~ ^[0-9]+$ ]] && ((n_gpus > 1 && size < 2 ** 20)); then
    say "warning: /dev/shm has $((size / 1024)) MB, and $n_gpus processes may need more; if the run dies at its first step, start the container with --shm-size=1g or --ipc=host, or set NCCL_SHM_DISABLE=1 (slower)" >&2
  fi
}

# Sets `train` and, without a GPU, `sample`: the commands of the plan; and `n_processes`, of the training.
make_plan() {
  train=("$python" train.py) sample=() n_processes=$((n_gpus * machines))
  ((machines == 1 || n_gpus)) || die 2 "NUM_MACHINES is $machines and this one has no GPU; it is for machines with GPUs"
  if ((n_processes > 1)); then
    train=(accelerate launch --multi_gpu --num_processes "$n_processes" --num_machines "$machines")
    if ((machines > 1)); then
      train+=(--machine_rank "$machine" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    fi
    train+=(--mixed_precision no --dynamo_backend no train.py) # precision is train.py's own business
    check_shared_memory
  elif ((n_gpus == 0)); then
    if [[ ! $preset ]]; then preset=demo && train+=(--preset demo); fi
    sample=("$python" generate.py "$out_dir/${run_name:-$preset}" --prompt "$prompt" --max_tokens 100)
  fi
  train+=(--resume ${train_options[@]+"${train_options[@]}"})
}

print_plan() {
  say "Plan:"
  show "${train[@]}"
  if ((${#sample[@]})); then show "${sample[@]}"; fi
  say "Settings:"
  calc_params
  say "Nothing was started (--dry-run)."
}

# calc_params OPTION...: of the run's settings, checked for as many processes as the run's. Ends this script with it.
calc_params() {
  local options=(${train_options[@]+"${train_options[@]}"})
  # A run that goes on keeps its rows a step, whatever this hardware would give a new one; train.py checks the rest.
  if compgen -G "$out_dir/${run_name:-${preset:-fineweb}}/step-*" >/dev/null; then options+=(--resume); fi
  if [[ " ${options[*]-}" != *" --preset"* ]]; then
    options=(--preset "${preset:-fineweb}" ${options[@]+"${options[@]}"})
  fi
  WORLD_SIZE=$((n_processes ? n_processes : 1)) "$python" scripts/calc_params.py "${options[@]}" "$@" || exit
}

# Holds the run's lock, as file descriptor 9; if it is running already, follows that instead.
hold_run() {
  local code announced=''
  run_dir=$out_dir/${run_name:-${preset:-fineweb}}
  log=$run_dir/start${machine#0}.log lock=$run_dir/.start${machine#0}.lock
  hash flock setsid 2>/dev/null || die 2 "training on GPUs needs flock and setsid; apt install util-linux"
  { mkdir -p "$run_dir" && exec 9>>"$lock"; } 2>/dev/null ||
    die 6 "cannot write to $run_dir; free some space, or choose another --train.out_dir"
  until flock -n 9; do
    (($? == 1)) || die 6 "$run_dir is on a disk that has no locks; choose another --train.out_dir"
    if read -r supervisor code <"$lock" && [[ ! $code ]]; then
      say "Already running (process $supervisor): following it, from its last lines on."
      follow -n 20
    fi
    [[ $announced ]] || say "Another ./start.sh is getting this run ready: waiting for it."
    announced=1 && sleep 0.5
  done
  : >"$lock"
}

# Trains in a session of its own, where neither a hang-up nor the terminal's Ctrl-C arrives.
run_in_background() {
  local size
  touch "$log" && size=$(wc -c <"$log")
  nohup setsid bash scripts/supervise.sh "$(cd "$run_dir" && pwd -P)/${lock##*/}" "${train[@]}" </dev/null >>"$log" 2>&1 &
  supervisor=$!
  exec 9>&- # the lock is the supervisor's now
  follow -c "+$((size + 1))"
}

# follow OPTION...: of tail, where in the log to begin. Ends when the run does, with its exit code.
follow() {
  local code=''
  say "Log: $log. Ctrl-C saves and stops the run; it outlives this terminal, and $again shows it again."
  run_child to_supervisor tail "$@" -f -s 0.5 --pid="$supervisor" "$log" || true
  if kill -0 "$supervisor" 2>/dev/null; then exit 141; fi # it was tail that ended: its reader has gone
  { read -r _ code <"$lock"; } 2>/dev/null || true
  [[ $code ]] || die 137 "the run's supervisor was killed, perhaps not the run: $again ends what is left and goes on"
  explain_end "$code"
  exit "$code"
}

to_supervisor() { if [[ $1 == HUP ]]; then kill "$2" && exit 129; else pass_on TERM "$supervisor"; fi; }

run_demo() {
  local code=0
  say "Training; Ctrl-C saves and stops, $again goes on from there."
  show "${train[@]}"
  run_child pass_on "${train[@]}" || code=$?
  explain_end "$code"
  ((code == 0)) || exit "$code"
  show "${sample[@]}"
  "${sample[@]}" || exit
  next_steps
}

explain_end() {
  case $1 in
    0) ;;
    75) say "Stopped, and everything is saved. To go on: $again" ;;
    130 | 143) say "Stopped before training had begun, or at the third signal. To go on: $again" >&2 ;;
    2) say "Ended with exit code 2: what to change, the message above says." >&2 ;;
    *) say "Training ended with exit code $1; the message above says why. Mend that, then: $again" >&2 ;;
  esac
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
  read_machines
  detect_gpus
  # Before anything is installed: not under a run that is going, and not by two starts at once.
  if [[ ${#gpus[@]} -gt 0 && ! $dry_run ]]; then hold_run; fi
  if [[ -d ${WORKSPACE:=/workspace} ]]; then # the large disk of a rented machine
    export HF_HOME=${HF_HOME:-${WORKSPACE%/}/.cache/huggingface} PIP_CACHE_DIR=${PIP_CACHE_DIR:-${WORKSPACE%/}/.cache/pip}
    say "Downloads are kept in $HF_HOME"
  fi
  if [[ $skip_deps ]]; then
    use_python as-is
    say "Installing nothing (--skip-deps); using $(command -v "$python")"
  else
    install_requirements requirements.txt
    use_python installed
  fi
  describe_hardware
  check_torch
  make_plan
  calc_params --check_disk
  export PYTHONUNBUFFERED=1 # lines appear at once, through `tee` as well
  if [[ $dry_run ]]; then print_plan; elif ((n_gpus)); then run_in_background; else run_demo; fi
}

main "$@"
