#!/usr/bin/env bash
# Every check of the project, from any folder: lint, format, types, shell, tests. Stops at the first failure.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
source scripts/lib.sh

skip_deps='' slow='' pytest_options=()
for option in "$@"; do
  case $option in
    --skip-deps) skip_deps=1 ;;
    --slow) slow=1 ;;
    -h | --help)
      say "usage: scripts/test.sh [--slow] [--skip-deps] [options of pytest]"
      exit 0
      ;;
    *) pytest_options+=("$option") ;;
  esac
done
[[ $slow ]] || pytest_options=(-m "not slow" ${pytest_options[@]+"${pytest_options[@]}"})

# Debian's, for some of the tests. Where they cannot be installed these are skipped, and say so.
apt_install() {
  if ((EUID)) || ! command -v apt-get >/dev/null; then return; fi
  say "Installing $*"
  { apt-get update && apt-get install -y --no-install-recommends "$@"; } >/dev/null </dev/null ||
    say "That failed, so the tests that need them are skipped"
}

# stage NAME COMMAND...: runs it, says how long it took, and ends the script when it fails.
stage() {
  local name=$1 start=$SECONDS code=0
  shift
  say "== $name"
  "$@" || code=$?
  ((code == 0)) || die "$code" "$name failed; the lines above say where"
  say "   $((SECONDS - start)) s"
}

install() {
  install_requirements requirements.txt
  install_requirements requirements-dev.txt
  if [[ ! -x /usr/sbin/sshd ]] || ! command -v rsync >/dev/null; then apt_install openssh-server rsync; fi
  if [[ $slow ]] && ! command -v chromium chromium-headless-shell google-chrome >/dev/null; then
    apt_install chromium-headless-shell fonts-dejavu-core
  fi
}

if [[ ! $skip_deps ]]; then stage "requirements" install; fi
if [[ $skip_deps ]]; then use_python as-is; else use_python installed; fi

shell_scripts=()
while IFS= read -r file; do shell_scripts+=("$file"); done < <(find . -name '*.sh' -not -path './.*' | sort)

stage "ruff check" "$python" -m ruff check .
stage "ruff format" "$python" -m ruff format --check .
stage "mypy" "$python" -m mypy
stage "shellcheck" shellcheck -x .ci/run "${shell_scripts[@]}"
say "== pytest"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two tests at a time, of one thread each: their models are small
exec "$python" -m pytest -n 2 --dist loadfile ${pytest_options[@]+"${pytest_options[@]}"}
