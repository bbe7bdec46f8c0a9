#!/usr/bin/env bash
# The C ABI as programs of C and C++ meet it: what compiles, what runs, and what the sanitizers and
# Valgrind find. Ends at the first thing that is wrong, and says which.
#
#   tests/c/run.sh
#
# Needs gcc, g++, clang, clang++ with their sanitizers, and valgrind: `.ci/tools` installs them. Linux on
# x86-64 only, as the sanitizers of Rust are.
set -euo pipefail
exec </dev/null
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
cd "$here/../.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR=$target
built=$target/c
log=$built/log
programs=(geometry driver config slots memory views pins stats buffer errors handles fork threads log failures)
native=(-lgcc_s -lutil -lrt -lpthread -lm -ldl)
# fork, waitpid and threads are POSIX's and not C's.
common=(-D_POSIX_C_SOURCE=200809L -pthread -Iinclude -g -O1)
warned=(-Wall -Wextra -Wpedantic -Wconversion -Werror)
sanitized=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
# The longest program takes seconds; a lock that is never given up must not hold up a lane for an hour.
limit=300
# Set where a tool has to say nothing.
quiet=

fail() {
  printf 'tests/c: %s\n' "$*" >&2
  exit 1
}

say() {
  printf '%5d s  %s\n' "$SECONDS" "$*"
}

for tool in gcc g++ clang clang++ valgrind cargo; do
  command -v "$tool" >/dev/null || fail "there is no $tool; install it (.ci/tools gcc g++ clang valgrind)"
done
[ "$(uname -sm)" = 'Linux x86_64' ] || fail "this is $(uname -sm); the tests are for Linux x86_64"

# The program of the header's own first chapter.
example() {
  sed -n '/^ \* \[example\]$/,/^ \* \[end\]$/p' include/vattn.h | sed -e '1d;$d' -e 's/^ \*     //' -e 's/^ \*$//'
}

rm -rf "$built"
mkdir -p "$built"
example >"$built/example.c"
grep -q 'int main(void)' "$built/example.c" || fail 'the example of include/vattn.h is not where it was'

cargo build --locked -p vattn --lib
library=$target/debug
say 'the library is built'

# compile COMPILER STANDARD FLAGS... -- FILES: C++ compilers are told that these are their language.
compile() {
  local compiler=$1 standard=$2 language=()
  shift 2
  [[ $compiler != *++ ]] || language=(-x c++)
  "$compiler" "-std=$standard" "${language[@]}" "${common[@]}" "${warned[@]}" "$@"
}

# objects COMPILER STANDARD FOLDER FLAGS...: every program's object, four at a time.
objects() {
  local compiler=$1 standard=$2 folder=$3 name jobs=0
  shift 3
  mkdir -p "$folder"
  for name in "${programs[@]}" header_alone two_files_a two_files_b; do
    compile "$compiler" "$standard" "$@" -c "tests/c/$name.c" -o "$folder/$name.o" &
    jobs=$((jobs + 1))
    if [ "$jobs" -ge 4 ]; then
      wait -n
      jobs=$((jobs - 1))
    fi
  done
  while [ "$jobs" -gt 0 ]; do
    wait -n
    jobs=$((jobs - 1))
  done
  # Designated initializers are C's, and C++'s from 2020 on with warnings in C's order: the example is C.
  if [[ $compiler != *++ ]]; then compile "$compiler" "$standard" "$@" -c "$built/example.c" -o "$folder/example.o"; fi
}

# link COMPILER FOLDER LIBRARY... : programs from the folder's objects.
link() {
  local compiler=$1 folder=$2 name
  shift 2
  for name in "${programs[@]}" header_alone example; do
    [ -e "$folder/$name.o" ] || continue
    "$compiler" -pthread "$folder/$name.o" -o "$folder/$name" "$@"
  done
  "$compiler" -pthread "$folder/two_files_a.o" "$folder/two_files_b.o" -o "$folder/two_files" "$@"
}

# run WHAT FOLDER PREFIX...: all programs there; what they print is shown of those that fail alone.
run() {
  local what=$1 folder=$2 name checks=0 count=0
  shift 2
  for name in "${programs[@]}" header_alone two_files example; do
    [ -e "$folder/$name" ] || continue
    if ! timeout "$limit" "$@" "$folder/$name" >"$log" 2>&1; then
      tail -n 60 "$log" >&2
      fail "$name failed: $what"
    fi
    # A child's status is its own: what Valgrind says of it is looked for.
    if [ -n "$quiet" ] && grep -qE '^==[0-9]+==' "$log"; then
      grep -E '^==[0-9]+==' "$log" | head -n 60 >&2
      fail "$name: $what has something to report"
    fi
    count=$((count + 1))
    checks=$((checks + $(sed -nE 's/^([0-9]+) passed, 0 failed$/\1/p' "$log" | tail -n 1 | grep . || echo 0)))
  done
  [ "$count" -gt "${#programs[@]}" ] || fail "only $count programs were there to run: $what"
  say "$what: $count programs, $checks checks passed, 0 failed"
}

# Both are large in debug, and most of what linking takes is their line numbers.
shared=("-L$library" -lvattn "-Wl,-rpath,$library")
static=("$library/libvattn.a" -Wl,-S "${native[@]}")

for build in gcc:c11 clang:c17 g++:c++17 clang++:c++20; do
  objects "${build%%:*}" "${build#*:}" "$built/${build/:/-}"
done
# The others are not run.
for build in gcc:c17 clang:c11 g++:c++20 clang++:c++17; do
  objects "${build%%:*}" "${build#*:}" "$built/${build/:/-}" -O0 -g0
done
say 'everything compiles: gcc and clang, C11 and C17, C++17 and C++20'

link gcc "$built/gcc-c11" "${shared[@]}"
run 'gcc, C11, shared library' "$built/gcc-c11"
link clang "$built/clang-c17" "${static[@]}"
run 'clang, C17, static library' "$built/clang-c17"
link g++ "$built/g++-c++17" "${shared[@]}"
run 'g++, C++17, shared library' "$built/g++-c++17"
link clang++ "$built/clang++-c++20" "${shared[@]}"
run 'clang++, C++20, shared library' "$built/clang++-c++20"

# Each tool has to find what is wrong on purpose, or its silence means nothing.
# finds WHAT WORDS MISTAKE COMMAND...
finds() {
  local what=$1 words=$2 mistake=$3
  shift 3
  if "$@" "$mistake" >"$log" 2>&1; then fail "$what was off: a mistake on purpose ($mistake) was not found"; fi
  grep -q "$words" "$log" || { cat "$log" >&2; fail "$what did not say '$words' of a mistake on purpose"; }
}

export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=print_stacktrace=1
for compiler in gcc clang; do
  folder=$built/$compiler-sanitized
  objects "$compiler" c11 "$folder" "${sanitized[@]}"
  compile "$compiler" c11 "${sanitized[@]}" -O0 tests/c/wrong.c -o "$folder/wrong"
  "$folder/wrong" || fail "$compiler's sanitizers find something in a program that does nothing wrong"
  finds "$compiler's AddressSanitizer" heap-buffer-overflow overflow "$folder/wrong"
  finds "$compiler's LeakSanitizer" 'detected memory leaks' leak "$folder/wrong"
  finds "$compiler's UndefinedBehaviorSanitizer" 'signed integer overflow' arithmetic "$folder/wrong"
done
link gcc "$built/gcc-sanitized" "${sanitized[@]}" "${shared[@]}"
run "gcc's AddressSanitizer and UndefinedBehaviorSanitizer" "$built/gcc-sanitized"

# clang's with the library under AddressSanitizer too: both are LLVM's, and one runtime serves both. The
# library's objects ask for no other version of it than clang's have, or the programs don't link.
triple=x86_64-unknown-linux-gnu
RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$target/asan \
  cargo rustc --locked -p vattn --lib --crate-type staticlib --target "$triple"
instrumented=$target/asan/$triple/debug/libvattn.a
nm "$instrumented" 2>/dev/null | grep ' U __asan_report_load' >/dev/null || fail 'the library was not instrumented'
say 'the library is built under AddressSanitizer'
link clang "$built/clang-sanitized" "${sanitized[@]}" "$instrumented" -Wl,-S "${native[@]}"
run "clang's, with the library under AddressSanitizer too" "$built/clang-sanitized"

under_valgrind=(valgrind -q --leak-check=full --error-exitcode=9 --errors-for-leak-kinds=definite,indirect,possible
    --suppressions=tests/c/valgrind.supp --fair-sched=try)
compile gcc c11 -O0 tests/c/wrong.c -o "$built/wrong"
"${under_valgrind[@]}" "$built/wrong" || fail 'Valgrind finds something in a program that does nothing wrong'
finds Valgrind 'Invalid write' overflow "${under_valgrind[@]}" "$built/wrong"
finds Valgrind 'definitely lost' leak "${under_valgrind[@]}" "$built/wrong"
# The header's example reserves a terabyte of addresses, which Valgrind has not.
rm "$built/gcc-c11/example"
quiet=yes
run Valgrind "$built/gcc-c11" "${under_valgrind[@]}"
