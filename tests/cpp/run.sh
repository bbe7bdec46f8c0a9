#!/usr/bin/env bash
# The tests of include/vattn.hpp: each program of this folder with gcc and clang, in C++17 and C++20, plain
# and under AddressSanitizer and UndefinedBehaviorSanitizer, and the header's own example. Ends at the first
# that fails.
#
#   tests/cpp/run.sh            all of them
#   tests/cpp/run.sh views      these alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
out=$target/cpp
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Werror)
programs=("$@")
if [ "${#programs[@]}" -eq 0 ]; then
  for file in tests/cpp/*.cpp; do
    file=$(basename "$file" .cpp)
    if [ "$file" != two_files_other ]; then programs+=("$file"); fi
  done
  programs+=(example)
fi

cargo build -p vattn --lib --locked
mkdir -p "$out"
: >"$out/todo"
# The head's example, as it stands there.
awk '/^ \* \[example\]$/ { inside = 1; next } /^ \* \[end\]$/ { inside = 0 } inside { print substr($0, 8) }' \
  include/vattn.hpp >"$out/example.cpp"

# What a program sees of the header, beside what it includes itself: one macro, its guard.
macros() {
  sed -n 's/^#include </#include </p' include/vattn.hpp >"$out/includes.cpp"
  echo '#include <vattn.h>' >>"$out/includes.cpp"
  { cat "$out/includes.cpp"; echo '#include <vattn.hpp>'; } >"$out/macros.cpp"
  for name in includes macros; do
    "$1" -std="$2" -Iinclude -dM -E "$out/$name.cpp" | sort >"$out/$name.txt"
  done
  if [ "$(comm -13 "$out/includes.txt" "$out/macros.txt")" != '#define VATTN_HPP ' ]; then
    echo "vattn.hpp defines macros that are not its guard:"
    comm -13 "$out/includes.txt" "$out/macros.txt"
    return 1
  fi
}

# one COMPILER STANDARD MODE PROGRAM
one() {
  local compiler=$1 standard=$2 mode=$3 program=$4 binary flags sources warnings
  read -ra warnings <<<"$warnings_text"
  binary=$out/$program-$compiler-$standard-$mode
  sources=("tests/cpp/$program.cpp")
  if [ "$program" = example ]; then sources=("$out/example.cpp"); fi
  if [ "$program" = two_files ]; then sources+=(tests/cpp/two_files_other.cpp); fi
  # Plain programs do without type information, those under the sanitizers need it.
  flags=(-fno-rtti -O1)
  if [ "$mode" = sanitized ]; then
    flags=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  fi
  "$compiler" -std="$standard" "${warnings[@]}" "${flags[@]}" -Iinclude -Itests/cpp "${sources[@]}" \
    -o "$binary" -L"$target/debug" -Wl,-rpath,"$target/debug" -lvattn -pthread || return
  if ! "$binary" >"$binary.log" 2>&1; then
    printf '%s with %s, %s, %s failed:\n' "$program" "$compiler" "$standard" "$mode"
    cat "$binary.log"
    return 1
  fi
  printf '%-12s %-8s %-6s %-10s %s\n' "$program" "$compiler" "$standard" "$mode" "$(tail -n 1 "$binary.log")"
  if grep '^SKIP' "$binary.log"; then :; fi
}

export target out warnings_text="${warnings[*]}"
export -f one
for compiler in g++ clang++; do
  for standard in c++17 c++20; do
    macros "$compiler" "$standard"
    for mode in plain sanitized; do
      for program in "${programs[@]}"; do
        printf '%s\0' "$compiler $standard $mode $program"
      done
    done >>"$out/todo"
  done
done
# 255 has xargs begin nothing more.
xargs -0 -n 1 -P "$(nproc)" bash -c 'one $1 || exit 255' one <"$out/todo"
