#!/bin/sh
# Whether each object file has the instructions of AMX's tiles: amx_instructions.sh OBJDUMP FILE...
# Few machines run them; on the others, this and the tests on emulated tiles stand in.
set -eu
objdump=$1
shift
[ $# -gt 0 ]
for file; do
  found=$("$objdump" -d "$file" | grep -owE 'ldtilecfg|tileloadd|tdpbf16ps|tilestored|tilerelease' | sort -u | wc -l)
  [ "$found" -eq 5 ] || { echo "$file: $found of 5 instructions"; exit 1; }
done
