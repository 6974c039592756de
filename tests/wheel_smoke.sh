#!/usr/bin/env bash
# Build a wheel, install it into an empty environment and use it away from the repository. The wheel takes the
# checkout's CPU library if that was built from the same sources, because compiling it takes minutes.
# usage: TORCH=torch==2.13.0 wheel_smoke.sh PYTHON
set -euo pipefail
python=$(realpath -s "$1")
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cd "$repository"
digest=$("$python" -c 'from runpy import run_path; print(run_path("kernels/cpu_sources.py")["digest"]())')
built=$repository/kernels/_cpu$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
if grep --quiet --no-messages --fixed-strings "$digest" "$built"; then export ACE_TRITON_CPU_LIBRARY=$built; fi
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$repository"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "${TORCH:-torch}"
"$work/venv/bin/pip" install --quiet "$work"/dist/ace_triton-*.whl
cp "$repository/tests/wheel_smoke.py" "$work"
cd "$work"
venv/bin/python wheel_smoke.py
venv/bin/ace-triton --version
venv/bin/ace-triton info tiny-model
