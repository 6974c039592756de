#!/usr/bin/env bash
# Build the CPU library with AddressSanitizer, its portable body with UndefinedBehaviorSanitizer too, in build/sanitize,
# and run tests on a copy of the package that has this library: on the best instruction set, then on the portable body.
# usage: sanitize.sh PYTHON [TESTS...]; CXX names the compiler
set -euo pipefail
python=$(realpath -s "$1")
shift
cd "$(dirname "$0")/.."
tests=("$@")
# The tests that compare every instruction set and number of threads on whole layers take minutes each here; those of
# NEON run another library.
[ ${#tests[@]} -gt 0 ] || tests=(tests/kernels tests/packed/test_nm_linear.py -k "not test_every" --ignore=tests/kernels/test_neon.py)
compiler=${CXX:-g++}
folder=build/sanitize

mkdir -p "$folder/objects"
rm -rf "$folder/ace_triton"
cp -rL ace_triton "$folder/ace_triton"
rm -f "$folder"/ace_triton/kernels/*.so
digest=$("$python" -c 'import runpy; print(runpy.run_path("kernels/cpu_sources.py")["digest"]())')
if [ "$(cat "$folder/built" 2>/dev/null)" != "$digest" ]; then
    flags=(-std=c++17 -O1 -g1 -fPIC -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wno-psabi
        "-DACE_SOURCES=\"$digest\"" -fsanitize=address)
    # GCC takes too long to check the vector bodies for undefined behavior. They load what is not aligned on purpose.
    undefined=(-fsanitize=undefined -fno-sanitize=alignment,shift -fno-sanitize-recover=undefined)
    for source in kernels/cpu/*.cpp; do
        name=$(basename "$source" .cpp)
        more=()
        [ "$name" = portable ] && more=("${undefined[@]}")
        "$compiler" "${flags[@]}" ${more[@]+"${more[@]}"} -c "$source" -o "$folder/objects/$name.o"
    done
    "$compiler" -shared -fsanitize=address,undefined -pthread "$folder"/objects/*.o -o "$folder/library.so"
    echo "$digest" >"$folder/built"
fi
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
cp "$folder/library.so" "$folder/ace_triton/kernels/_cpu$suffix"

# libstdc++ comes first too, or the sanitizer misses the exceptions of libraries that are loaded later.
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH="$PWD/$folder:$PWD"
"$python" -P -c 'import ace_triton.kernels.cpu_library as library; print(library.__file__, library.isa())'
"$python" -P -m pytest "${tests[@]}" -p no:cacheprovider
ACE_TRITON_CPU_ISA=portable "$python" -P -m pytest "${tests[@]}" -p no:cacheprovider
