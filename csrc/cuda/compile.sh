#!/bin/sh
# Runs nvcc, keeps what ptxas -v says of an object's kernels in OBJECT.ptxas (bench/kernel_resources.py reads it), and
# shows the rest:  compile.sh nvcc ... -o OBJECT ...
previous= object=
for argument in "$@"; do
  [ "$previous" != -o ] || object=$argument
  previous=$argument
done
"$@" > "$object.ptxas" 2>&1
status=$?
grep -v -e '^ptxas info' -e '^ *[0-9]* bytes stack frame' -e '^ *$' "$object.ptxas" >&2
exit $status
