#!/usr/bin/env bash
# Build and test on a machine with a GPU and no network, with that machine's own Python.
#
#   bench/gpu.sh build               build the native operators in place, CUDA demanded
#   bench/gpu.sh test [pytest args]  run the tests marked gpu
#
# Environment: PYTHON (default python3), OUT (results folder, default bench/out).
# Results: $OUT/<part>.json and $OUT/<part>.log. Exit status: 0 all well, 2 usage, 3 no GPU visible (test),
# 124 out of time, else the part's own. Each part ends within 9 minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

part=${1:-}
files=()
[ $# -gt 0 ] && shift
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out}
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
LIMIT=520 # seconds; what is left of 9 minutes is for the report

# Usage: report <exit status> <seconds>. Writes $OUT/$part.json.
report() {
  PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" - "$part" "$OUT" "$1" "$2" <<'PYTHON'
import json, subprocess, sys, time, xml.etree.ElementTree as ElementTree
from pathlib import Path

part, out, status, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def outcome(case):
    for kind, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if case.find(kind) is not None:
            return name
    return "passed"


info = run(sys.executable, "-m", "rrt.info", "--json")
record = {
    "part": part,
    "outcome": {0: "passed", 3: "no GPU", 124: "out of time"}.get(status, "failed"),
    "exit_status": status,
    "seconds": seconds,
    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "commit": run("git", "rev-parse", "HEAD"),
    "uncommitted_changes": bool(run("git", "status", "--porcelain", "--untracked-files=no")),
    "info": json.loads(info) if info else None,
}
junit = out / "test.xml"
if part == "test" and junit.is_file():
    record["tests"] = [
        {"name": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome(case),
         "seconds": float(case.get("time", 0))}
        for case in ElementTree.parse(junit).iter("testcase")
    ]
path = out / f"{part}.json"
path.write_text(json.dumps(record, indent=2) + "\n")
print(f"{part}: {record['outcome']} in {seconds} s; {path}")
PYTHON
}

case $part in
build)
  export RRT_WITH_CUDA=1 RRT_WITH_NATIVE=1
  command=("$PYTHON" setup.py build_ext --inplace)
  ;;
test)
  rm -f "$OUT/test.xml"
  # Only the files that have such tests: the others may need packages that the machine lacks.
  [ $# -gt 0 ] || mapfile -t files < <(grep -l 'mark\.gpu' tests/test_*.py)
  command=("$PYTHON" -m pytest -m gpu --continue-on-collection-errors -p no:cacheprovider --timeout 120
    --junitxml "$OUT/test.xml" "${files[@]}" "$@")
  if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no GPU is visible to $PYTHON (torch.cuda.is_available() is false): nothing was tested" >&2
    report 3 0
    exit 3
  fi
  ;;
*)
  echo "usage: bench/gpu.sh build|test [pytest args]" >&2
  exit 2
  ;;
esac

started=$SECONDS
timeout --kill-after 10 "$LIMIT" "${command[@]}" 2>&1 | tee "$OUT/$part.log"
status=${PIPESTATUS[0]}
[ "$status" -eq 137 ] && status=124
report "$status" $((SECONDS - started)) || status=1
exit "$status"
