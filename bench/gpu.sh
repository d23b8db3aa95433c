#!/usr/bin/env bash
# Build, test and measure on a machine with a GPU and no network, with that machine's own Python.
#
#   bench/gpu.sh build               build the native operators in place, CUDA demanded
#   bench/gpu.sh test [pytest args]  the tests marked gpu
#   bench/gpu.sh sanitize            every kernel instance under compute-sanitizer's memcheck and racecheck
#   bench/gpu.sh kernels             bench/kernels.py on three presets, and prefill: tables, JSON and plots
#   bench/gpu.sh tiles               bench/tile_sweep.py: csrc/loop_lora/cuda_tiles_measured.h of this GPU
#
# Each part stands alone: where the library is missing, stale or without CUDA, it is built first. Each ends within
# 9 minutes and leaves one file, $OUT/<part>.tar.gz, with report.json, the log and the results.
# Environment: PYTHON (default python3), OUT (results folder, default bench/out).
# Exit status: 0 all well, 2 usage, 3 no GPU visible, 124 out of time, else the part's own.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

usage="usage: bench/gpu.sh build|test [pytest args]|sanitize|kernels|tiles"
part=${1:-}
[[ $part =~ ^(build|test|sanitize|kernels|tiles)$ ]] || { echo "$usage" >&2; exit 2; }
shift
[ $# -eq 0 ] || [ "$part" = test ] || { echo "$usage" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
results=$OUT/$part
rm -rf "$results" "$results.tar.gz"
mkdir "$results" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # nvcc and compute-sanitizer
LIMIT=520 # seconds; the rest of 9 minutes is for the report
started=$SECONDS

# Usage: run COMMAND, within the time that is left; the output goes to the log too.
run() {
  local left=$((LIMIT - SECONDS + started))
  [ "$left" -gt 0 ] || return 124
  echo "+ $*" | tee -a "$results/log.txt"
  timeout --kill-after 10 "$left" "$@" 2>&1 | tee -a "$results/log.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" -ne 137 ] || status=124
  return "$status"
}

build() { RRT_WITH_CUDA=1 RRT_WITH_NATIVE=1 run "$PYTHON" setup.py build_ext --inplace; }

# Builds unless the library is there, of these sources and with CUDA.
build_if_needed() {
  "$PYTHON" -c 'import sys; from rrt.ops import build_info
info = build_info(); sys.exit(not (info.library and info.cuda and not info.stale))' 2>/dev/null || build
}

has_gpu() {
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && return
  echo "gpu.sh: no GPU is visible to $PYTHON (torch.cuda.is_available() is false): nothing was run" >&2
  return 3
}

test_() {
  # Only the files that have such tests: the others may need packages that the machine lacks.
  local files=()
  [ $# -gt 0 ] || mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
  run "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider --timeout 120 \
    --junitxml "$results/test.xml" "${files[@]}" "$@"
}

sanitize() {
  local status=0 tool
  for tool in memcheck racecheck; do
    run compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" bench/gpu_cases.py || status=$?
  done
  return "$status"
}

kernels() {
  local status=0 preset
  for preset in gemma-2b tinyllama-1.1b pythia-1b; do
    run "$PYTHON" bench/kernels.py --device cuda --preset "$preset" --dtype bf16 --rows 1 8 16 32 64 128 --loops 2 \
      --contexts 1024 4096 16384 --attention-rows 8 32 --seconds-per-case 0.2 \
      --json "$results/$preset.json" --plot "$results/$preset.png" || status=$?
  done
  # Many rows of one loop, where prefill's kernel and merged weights compete.
  run "$PYTHON" bench/kernels.py --device cuda --preset gemma-2b --dtype bf16 --only linear --rows 256 1024 8192 \
    --loops 1 --ranks 64 512 --seconds-per-case 0.2 --json "$results/gemma-2b-prefill.json" || status=$?
  return "$status"
}

tiles() {
  local table=csrc/loop_lora/cuda_tiles_measured.h
  run "$PYTHON" bench/tile_sweep.py --json "$results/tiles.json" && cp "$table" "$results/"
}

# Usage: report EXIT_STATUS SECONDS. Writes report.json and packs the results.
report() {
  "$PYTHON" - "$part" "$results" "$1" "$2" <<'PYTHON'
import json, subprocess, sys, time, xml.etree.ElementTree as ElementTree
from pathlib import Path

part, results, status, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def outcome(case):
    for kind, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if case.find(kind) is not None:
            return name
    return "passed"


info = run(sys.executable, "-m", "rrt.info", "--json")
changes = run("git", "status", "--porcelain", "--untracked-files=no")
record = {
    "part": part,
    "outcome": {0: "passed", 3: "no GPU", 124: "out of time"}.get(status, "failed"),
    "exit_status": status,
    "seconds": seconds,
    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "commit": run("git", "rev-parse", "HEAD"),
    "uncommitted_changes": None if changes is None else changes != "",
    "info": json.loads(info) if info else None,
}
junit = results / "test.xml"
if junit.is_file():
    record["tests"] = [
        {"name": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome(case),
         "seconds": float(case.get("time", 0))}
        for case in ElementTree.parse(junit).iter("testcase")
    ]
(results / "report.json").write_text(json.dumps(record, indent=2) + "\n")
print(f"{part}: {record['outcome']} in {seconds} s; {results}.tar.gz")
PYTHON
  local status=$?
  tar -C "$OUT" -czf "$results.tar.gz" "$part" && rm -rf "$results" || status=1
  return "$status"
}

status=0
case $part in
build) build ;;
test) has_gpu && build_if_needed && test_ "$@" ;;
*) has_gpu && build_if_needed && "$part" ;;
esac || status=$?
report "$status" $((SECONDS - started)) || status=1
exit "$status"
