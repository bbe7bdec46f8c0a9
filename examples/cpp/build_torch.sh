#!/bin/sh
# Builds the engine for a GPU:
#
#   build_torch.sh PROGRAM LIBRARIES [HEADERS]      (HEADERS: ../../include from here)
#
# LIBRARIES is the folder that libvattn.so lies in. Needs a C++ compiler, CUDA's headers, and a python3 that
# has PyTorch, whose own headers and libraries are used.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
program=$1
libraries=$(cd "$2" && pwd)
headers=${3:-$here/../../include}
compiler=${CXX:-g++}

compile=$(python3 - <<'END'
import torch
from torch.utils.cpp_extension import include_paths
print(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
print(*(f"-isystem{path}" for path in include_paths("cuda")))
END
)
# The CUDA runtime is the one that PyTorch has loaded.
link=$(python3 - <<'END'
import os
import torch
from torch.utils.cpp_extension import library_paths
runtime = next(line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line)
print(runtime, f"-Wl,-rpath,{os.path.dirname(runtime)}")
print(*(f"-L{path} -Wl,-rpath,{path}" for path in library_paths()))
END
)

objects=
running=
for source in main engine attention_torch; do
    # Both are lists of words.
    # shellcheck disable=SC2086
    "$compiler" -std=c++17 -O2 -Wall -Wextra $compile -I"$headers" \
        -c "$here/$source.cpp" -o "$program-$source.o" &
    running="$running $!"
    objects="$objects $program-$source.o"
done
for one in $running; do
    wait "$one"
done
# PyTorch's CUDA part registers itself where it is loaded, and nothing names it.
# shellcheck disable=SC2086
"$compiler" $objects -o "$program" -L"$libraries" -Wl,-rpath,"$libraries" -lvattn $link \
    -Wl,--no-as-needed -ltorch -ltorch_cpu -ltorch_cuda -lc10 -lc10_cuda -Wl,--as-needed -ldl \
    -Wl,--unresolved-symbols=ignore-in-shared-libs
# shellcheck disable=SC2086
rm -f $objects
