#!/usr/bin/env bash
# The GPU check on a bare machine: bash scripts/bench/gpu.sh [gpu.json] [options of gpu.py]
set -u
cd "$(dirname "$0")/../.." || exit 1
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv 2>/dev/null
# the script keeps its own deadline and writes as it goes; this only ends a kernel that hangs
PYTHONUNBUFFERED=1 PYTHONPATH="$PWD" exec timeout -k 5 475 python3 scripts/bench/gpu.py "${1:-gpu.json}" "${@:2}"
