#!/usr/bin/env bash
# Everything that only a GPU can show: the tests on its kernels, then their times. Under ten minutes.
# usage: benchmarks/on_gpu.sh [OUT_DIR]     DEVICE=cpu dry-runs it anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
quick=()
[ "$device" = cuda ] || quick=(--quick)
mkdir -p "$out"

if ! "$python" -c 'import ace_triton' 2>/dev/null; then
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
fi
for package in pytest hypothesis typer rich safetensors; do
    "$python" -c "import $package" 2>/dev/null || missing="${missing:-} $package"
done
[ -z "${missing:-}" ] || "$python" -m pip install --quiet $missing

if [ "$device" = cuda ]; then
    "$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False")'
fi
timeout 300 "$python" -m pytest tests/kernels tests/test_stats.py tests/test_metrics.py tests/test_prune.py \
    --junitxml "$out/on_gpu_tests.xml"
timeout 240 "$python" -m benchmarks.gpu_times --device "$device" "${quick[@]}" --out "$out/gpu.json" | tee "$out/gpu.txt"
