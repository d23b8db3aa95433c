#!/usr/bin/env bash
# Test, measure and profile on a machine with a GPU and no network, with that machine's own Python.
#
#   bench/gpu.sh pack [flags]    before, elsewhere: gather what must be brought along (--help)
#   bench/gpu.sh all [PART...]   parts 1 (correct), 2 (how fast and why) and 3 (all else), or these
#   bench/gpu.sh GROUP...        these groups of steps, again even if they are done
#   bench/gpu.sh list            every group, step and limit, and what is done
#
# A call ends within 580 seconds. `all` begins with what is not done: call it again until nothing is left. Every step has
# a limit and a log of its own, and after every step all results so far are in one file, $OUT/gpu.tar.gz. Tables come
# last. What was packed (bench/out/carry) is unpacked first; the library is built only where none comes with it.
# Environment: PYTHON (default python3), OUT (default bench/out), GPU_RESULTS (default bench/out/gpu: what is done),
# GPU_SECONDS (of a call, default 580: set it from what is left), RRT_COMMIT (the code's commit, where no git history is).
# Exit status: 0 all well, 1 a step failed, 2 usage, 3 no GPU visible, 75 steps are left: call again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # nvcc, ncu and compute-sanitizer
case ${1:-} in
pack) shift && exec "$PYTHON" bench/gpu_pack.py "$@" ;;
*) exec "$PYTHON" bench/gpu_session.py "$@" ;;
esac
