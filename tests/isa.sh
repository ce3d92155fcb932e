#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests, slow ones too, once for each instruction set that XLA compiles for, and prints what failed where.
#   tests/isa.sh [arguments of pytest]      for example: tests/isa.sh tests/test_ode.py -m "not slow"
#   ISAS="SSE4_2 default" tests/isa.sh      some of them; `default` is the machine's own
# XLA takes the lesser of the set asked for and the machine's: on a machine without AVX512 that column is AVX2's.
# A set whose results are in runs/isa is not run again. To start anew, or with other arguments: rm -r runs/isa.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=${FOLDER:-runs/isa}
isas=${ISAS:-SSE4_2 AVX AVX2 AVX512 default}
flags=${XLA_FLAGS:-}
mkdir -p "$folder"

for isa in $isas; do
  [ -e "$folder/$isa.xml" ] && echo "$isa: results exist in $folder" && continue
  cache=$(mktemp -d)  # empty: a kept program is of the set that it was compiled for
  cap=""  # and no blank in its place: of nothing but blanks XLA dies
  [ "$isa" = default ] || cap="--xla_cpu_max_isa=$isa"
  echo "$isa: running, log in $folder/$isa.log"
  XLA_FLAGS=$(echo $flags $cap) JAX_COMPILATION_CACHE_DIR=$cache \
    "$python" -m pytest -rf --junit-xml="$folder/$isa.part" "$@" >"$folder/$isa.log" 2>&1
  status=$?  # 0 or 1: it ran to its end
  tail -n 1 "$folder/$isa.log"
  [ $status -le 1 ] && mv "$folder/$isa.part" "$folder/$isa.xml"
  rm -rf "$cache"
done

exec "$python" - "$folder" $isas <<'END'
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

folder, *isas = sys.argv[1:]
failed, totals = {}, []
for isa in isas:
    path = pathlib.Path(folder, f"{isa}.xml")
    cases = list(ElementTree.parse(path).iter("testcase")) if path.exists() else []
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    for case in bad:
        failed.setdefault(f"{case.get('classname')}::{case.get('name')}", set()).add(isa)
    totals.append((len(cases), len(bad)))
width = max([len("tests run, failed"), *map(len, failed)])
print(f"{'':{width}}", *(f"{isa:>10}" for isa in isas))
for test, where in sorted(failed.items()):
    print(f"{test:{width}}", *(f"{'failed' if isa in where else '.':>10}" for isa in isas))
print(f"{'tests run, failed':{width}}", *(f"{f'{count}, {bad}':>10}" for count, bad in totals))
sys.exit(any(bad or not count for count, bad in totals))
END
