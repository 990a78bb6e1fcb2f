#!/usr/bin/env bash
# GPU tests and all benchmarks in one go, in under nine minutes, onto one result page.
#
#   benchmarks/gpu.sh [--out DIR] [--wheels DIR] [--steps "linear_loss tests=300 ..."] [--total SECONDS] [--selftest]
#
# Needs torch, triton and numpy; this package is not installed, only put on the path.  Rivals lie in --wheels DIR (wheels, without their
# dependencies) or are importable already; what is missing is "not measured".  Every step has a time limit, and a step that fails is noted on
# the page and is never fatal; NAME=SECONDS gives a step another limit.  --selftest: the same on a machine without GPU, with tiny shapes: tests
# this script, measures nothing.
set -u
cd "$(dirname "$0")/.." || exit 1
PY=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
WHEELS="" STEPS="" TOTAL=525 DEVICE=cuda TINY="" TESTS="tests/kernels tests/losses tests/parallel tests/test_ops.py tests/benchmarks/test_harness.py tests/benchmarks/test_run.py"

while [ $# -gt 0 ]; do
    case $1 in
        --out) OUT=$2; shift 2 ;;
        --wheels) WHEELS=$2; shift 2 ;;
        --steps) STEPS=$2; shift 2 ;;
        --total) TOTAL=$2; shift 2 ;;
        --selftest) DEVICE=cpu TINY=--tiny TESTS=tests/benchmarks/test_harness.py; shift ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
done

# seconds each step may take; tests come last and get what is left
declare -A LIMIT=([stats_forward]=50 [loss_forward_backward]=80 [linear_loss]=115 [tensor_parallel]=30 [grad_in_place]=25 [min_weight]=20
    [chunk_size]=20 [training_step]=40 [configs]=50 [tests]=150)
STEPS=${STEPS:-stats_forward loss_forward_backward linear_loss tensor_parallel grad_in_place min_weight chunk_size training_step configs tests}

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT" "$WORK/parts" "$WORK/site" "$WORK/files"
export PYTHONPATH="$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" RIVAL_FILES="$WORK/files${RIVAL_FILES:+:$RIVAL_FILES}"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=1
for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
    case $(basename "$wheel") in
        # not importable as a whole here, and megatron-core stops where it finds an unusable transformer_engine: only their files are used
        transformer_engine-* | verl-*) $PY -m zipfile -e "$wheel" "$WORK/files" ;;
        *) $PY -m zipfile -e "$wheel" "$WORK/site" ;;
    esac
done

NOTES=() SUMMARY=() PARTS=()
now() { date +%s; }
BEGAN=$(now)
for step in $STEPS; do
    case $step in *=*) LIMIT[${step%=*}]=${step#*=}; step=${step%=*} ;; esac
    left=$((TOTAL - 10 - ($(now) - BEGAN)))
    limit=${LIMIT[$step]:-60}
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 15 ]; then
        NOTES+=(--note "Step $step: not run, the time was spent."); SUMMARY+=("$step: not run, the time was spent"); continue
    fi
    started=$(now)
    echo "== $step, at most $limit s"
    if [ "$step" = tests ]; then
        if $PY -c "import pytest" 2>/dev/null; then
            SPREAD=$($PY -c "import os, xdist; print('-n', min(8, os.cpu_count()))" 2>/dev/null)
            # shellcheck disable=SC2086
            timeout -k 5 "$limit" $PY -m pytest $TESTS --continue-on-collection-errors -q -p no:cacheprovider $SPREAD 2>&1 | tee "$WORK/tests.log" | tail -40
            code=${PIPESTATUS[0]}
            NOTES+=(--note "Tests ($TESTS): $(tail -1 "$WORK/tests.log" | tr -d '=')")
        else
            code="no pytest here"
        fi
    else
        part="$WORK/parts/$step.json"
        quick=$TINY
        [ -n "$TINY" ] && [ "$step" != stats_forward ] && quick="$TINY --no-slow-start"
        # shellcheck disable=SC2086
        timeout -k 5 "$limit" $PY -m "benchmarks.$step" --device $DEVICE $quick --seconds 1.5 --budget $((limit - 12)) --out "$part" 2>&1 | tee -a "$WORK/log.txt"
        code=${PIPESTATUS[0]}
        [ -e "$part" ] && PARTS+=("$part")
    fi
    [ "$code" = 124 ] && code="stopped at its limit"
    SUMMARY+=("$step: exit $code, $(($(now) - started)) s")
    [ "$code" = 0 ] || NOTES+=(--note "Step $step: exit $code after $(($(now) - started)) s of $limit.")
done

cat "$WORK/tests.log" >> "$WORK/log.txt" 2>/dev/null
cp "$WORK/log.txt" "$OUT/" 2>/dev/null
echo "== steps"
printf '%s\n' "${SUMMARY[@]}" "total: $(($(now) - BEGAN)) s"
if [ "${#PARTS[@]}" -gt 0 ]; then
    $PY -m benchmarks.page "${PARTS[@]}" --into "$OUT" "${NOTES[@]}"
else
    echo "no results: no page"
fi
