#!/bin/sh
# Tests, tiles and timings of the kernels on one GPU, in this order; a failed test ends it. Most of the time is the
# compiler's. usage: sh tests/kernels/on_gpu.sh [FOLDER for results, default: .]
set -eu
out=${1:-.}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" VIT_EFFICIENT_CACHE="${VIT_EFFICIENT_CACHE:-$out/cache}"
ops="int8_linear fp8_linear_fast fp8_linear"
# Several processes compile at a time where pytest-xdist is installed.
if python3 -c "import xdist" 2>/dev/null; then parallel="-n 8"; else parallel=""; fi
# shellcheck disable=SC2086
python3 -m pytest -q -x $parallel tests/kernels
# The fast model against the reference on real images, where VIT_EFFICIENT_TEST_DATA names a folder with both.
if [ -n "${VIT_EFFICIENT_TEST_DATA:-}" ]; then
    python3 tests/kernels/end_to_end.py --output "$out/end_to_end.json"
fi
# shellcheck disable=SC2086
python3 -m vit_efficient.kernels.tune --op $ops --batch 256 1 --output "$out/tiles.json"
# shellcheck disable=SC2086
python3 -m vit_efficient.kernels.tune --op $ops --forms plain --output "$out/tiles_plain.json" \
    --shapes 50432x1024x3072 50432x1024x1024 50432x1024x4096 50432x4096x1024
# shellcheck disable=SC2086
python3 -m vit_efficient.benchmark kernels --op $ops --batch 256 1 --output "$out/kernels.json"
