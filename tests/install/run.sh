#!/usr/bin/env bash
# Is what `cargo cinstall` lays down what README.md says, and does a newcomer come to a running program?
#
# The commands, sources and outputs are those of README.md's section for C and C++, run in order with an empty
# folder as HOME. Then what it only mentions: each library alone, pkg-config --static, versions, a folder that
# was moved, messages where something is missing. Needs cargo-c, a C and a C++ compiler, CMake, pkg-config and
# binutils; Linux.
set -euo pipefail
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
root=$(realpath "$here/../..")
section='## Use it from C and C++'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_HOME=${CARGO_HOME:-$HOME/.cargo} RUSTUP_HOME=${RUSTUP_HOME:-$HOME/.rustup}
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
export HOME=$work/home
unset PREFIX PKG_CONFIG_PATH CMAKE_PREFIX_PATH LD_LIBRARY_PATH
mkdir "$HOME"

fail() {
  printf 'install: %s\n' "$*" >&2
  exit 1
}

for tool in cargo cc c++ cmake pkg-config nm readelf strip; do
  command -v "$tool" >/dev/null || fail "there is no $tool here"
done

# quietly COMMAND...: its output is shown where it fails, and kept in $work/out.
quietly() {
  "$@" >"$work/out" 2>&1 || {
    cat "$work/out"
    fail "failed: $*"
  }
}

# same WHAT EXPECTED SEEN, both of them files.
same() {
  diff -u "$2" "$3" || fail "$1"
}

# The section's blocks, in order: $work/blocks/01.bash, 02.cpp and so on.
mkdir "$work/blocks"
awk -v section="$section" -v folder="$work/blocks" '
  /^## / { inside = $0 == section; next }
  !inside { next }
  /^```/ && file == "" { file = sprintf("%s/%02d.%s", folder, ++count, substr($0, 4)); next }
  /^```$/ { close(file); file = ""; next }
  file != "" { print > file }
' "$root/README.md"

# README.md's line that installs cargo-c, where there is none. It takes minutes and leaves gigabytes.
cargo_c() {
  if cargo cinstall --version >"$work/out" 2>&1; then
    printf '  (there is one: %s)\n' "$(cat "$work/out")"
    return
  fi
  local openssl=
  pkg-config --exists openssl || openssl=' --features vendored-openssl'
  CARGO_TARGET_DIR=$work/cargo-c quietly eval "$1$openssl"
  rm -rf "$work/cargo-c"
}

# A block of commands is run, a text is what the command before it has to have printed, and a source is written
# where its first line says.
follow() {
  local block line name
  cd "$root"
  for block in "$work"/blocks/*; do
    case $block in
      *.bash)
        while IFS= read -r line; do
          printf '$ %s\n' "$line"
          case $line in
            'cargo install cargo-c '*) cargo_c "$line" ;;
            *) quietly eval "$line" ;;
          esac
        done <"$block"
        ;;
      *.text)
        cat "$work/out"
        same 'README.md says otherwise' "$block" "$work/out"
        ;;
      *)
        name=$(sed -nE '1s/^(\/\/|#) ([[:alnum:]._]+)$/\2/p' "$block")
        [ -n "$name" ] || fail "the first line of a source in README.md does not name its file: $(head -n 1 "$block")"
        cp "$block" "$name"
        ;;
    esac
  done
}

# Everything that is installed, and nothing else.
files() {
  local version=$1
  sort >"$work/expected" <<EOF
include/vattn.h
include/vattn.hpp
lib/libvattn.a
lib/libvattn.so
lib/libvattn.so.$series
lib/libvattn.so.$version
lib/pkgconfig/vattn.pc
share/cmake/vattn/vattnConfig.cmake
share/cmake/vattn/vattnConfigVersion.cmake
EOF
  (cd "$PREFIX" && find . ! -type d | sed 's|^\./||' | sort) >"$work/seen"
  same 'other files are installed' "$work/expected" "$work/seen"
  cmp "$root/include/vattn.h" "$PREFIX/include/vattn.h"
  cmp "$root/include/vattn.hpp" "$PREFIX/include/vattn.hpp"
}

# The shared library's name, what it exports, what it needs, and its size.
shared() {
  local library=$PREFIX/lib/libvattn.so
  soname=$(readelf -d "$library" | sed -nE 's/.*\(SONAME\).*\[(.*)\]/\1/p')
  [ "$soname" = "libvattn.so.$series" ] || fail "the SONAME is $soname and not libvattn.so.$series"
  grep -qF "\`$soname\`" "$root/README.md" || fail "README.md names another SONAME than $soname"
  nm -D --defined-only "$library" | awk '{ print $3 }' | LC_ALL=C sort >"$work/seen"
  same 'the shared library exports something else than include/vattn.symbols' "$root/include/vattn.symbols" "$work/seen"
  printf 'exports: %s functions, all of them vattn_*\n' "$(wc -l <"$work/seen")"
  printf 'needs: %s, %s\n' "$(readelf -d "$library" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p' | paste -sd' ')" \
    "$(readelf -V "$library" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -n 1)"
}

# The sizes that README.md states, in MB, hold within a tenth.
sizes() {
  local library=$PREFIX/lib/libvattn.so bytes stripped stated
  strip -o "$work/stripped.so" "$library"
  bytes=$(stat -Lc %s "$library")
  stripped=$(stat -c %s "$work/stripped.so")
  printf 'size of the shared library: %s bytes, stripped %s\n' "$bytes" "$stripped"
  [ "$(uname -m)" = x86_64 ] || return 0
  stated=$(sed -nE 's/.*On x86-64 it has ([0-9.]+) MB, and ([0-9.]+) after `strip`.*/\1 \2/p' "$root/README.md")
  awk -v stated="$stated" -v bytes="$bytes" -v stripped="$stripped" '
    function near(said, is) { return is > said * 0.9e6 && is < said * 1.1e6 }
    BEGIN { exit !(split(stated, said, " ") == 2 && near(said[1], bytes) && near(said[2], stripped)) }
  ' || fail "README.md states other sizes, in MB: ${stated:-none}"
}

# The two places that say what the static library needs.
static() {
  sed -nE 's/^Libs\.private: //p' "$PREFIX/lib/pkgconfig/vattn.pc" | sed 's/-l//g' >"$work/expected"
  sed -nE 's/^ *INTERFACE_LINK_LIBRARIES "([^"]*)"\)$/\1/p' "$root/cmake/vattnConfig.cmake" | tr ';' ' ' >"$work/seen"
  same 'cmake/vattnConfig.cmake links the static library with something else than vattn.pc' "$work/expected" "$work/seen"
}

# runs KIND PROGRAM...: each says what README.md says of main.c or main.cpp, with the library of that kind.
runs() {
  local kind=$1 program needed
  shift
  for program in "$@"; do
    "$program" >"$work/seen"
    case $program in
      *cpp) same "$program" "$work/of_cpp" "$work/seen" ;;
      *) same "$program" "$work/of_c" "$work/seen" ;;
    esac
    needed=$(readelf -d "$program" | grep -cF "[$soname]" || true)
    case $kind$needed in
      shared1 | static0) ;;
      *) fail "$program is linked with the wrong library: it was to be the $kind one" ;;
    esac
  done
}

# cmake_project KIND PREFIX ARGUMENTS...: both programs, found by CMake.
cmake_project() {
  local kind=$1 prefix=$2
  shift 2
  rm -rf "$work/build"
  quietly cmake -S "$here" -B "$work/build" -DSOURCES="$HOME/hello" -DCMAKE_PREFIX_PATH="$prefix" "$@"
  quietly cmake --build "$work/build"
  runs "$kind" "$work/build/of_c" "$work/build/of_cpp"
  printf 'cmake %s: %s\n' "${*:-(nothing)}" "$kind"
}

# cmake_refuses PREFIX TEXT ARGUMENTS...: find_package fails, and says why.
cmake_refuses() {
  local prefix=$1 text=$2
  shift 2
  rm -rf "$work/build"
  if cmake -S "$here" -B "$work/build" -DSOURCES="$HOME/hello" -DCMAKE_PREFIX_PATH="$prefix" "$@" >"$work/out" 2>&1; then
    fail "CMake accepts $*"
  fi
  tr -s ' \n' '  ' <"$work/out" | grep -qF "$text" || {
    cat "$work/out"
    fail "CMake does not say: $text"
  }
  printf 'cmake %s: refused, %s\n' "${*:-(nothing)}" "$text"
}

# pkg_project KIND PREFIX OPTIONS...: both programs, by what pkg-config says with the options.
pkg_project() {
  local kind=$1 prefix=$2 flags
  shift 2
  # Where the folder was moved to is what pkg-config is told, since the file says where it was installed.
  read -ra flags <<<"$(PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config "$@" --define-variable=prefix="$prefix" --cflags --libs vattn)"
  quietly cc "$HOME/hello/main.c" -o "$work/pc_c" "${flags[@]}" -Wl,-rpath,"$prefix/lib"
  quietly c++ -std=c++17 "$HOME/hello/main.cpp" -o "$work/pc_cpp" "${flags[@]}" -Wl,-rpath,"$prefix/lib"
  runs "$kind" "$work/pc_c" "$work/pc_cpp"
  printf 'pkg-config %s: %s\n' "$*" "$kind"
}

follow
[ -n "${PREFIX:-}" ] || fail "README.md has no section \"$section\" that sets PREFIX"
version=$(sed -nE 's/^Version: //p' "$PREFIX/lib/pkgconfig/vattn.pc")
series=$(sed -E 's/^(0\.[0-9]+|[1-9][0-9]*).*/\1/' <<<"$version")
printf '\nvattn %s\n' "$version"
"$HOME/hello/build/hello" >"$work/of_cpp"
"$HOME/hello/hello" >"$work/of_c"
files "$version"
shared
sizes
static

cmake_project shared "$PREFIX"
cmake_project static "$PREFIX" -DBUILD_SHARED_LIBS=OFF
cmake_project shared "$PREFIX" -DBUILD_SHARED_LIBS=ON
cmake_project static "$PREFIX" '-DWANTED=COMPONENTS;static'
cmake_project shared "$PREFIX" '-DWANTED=COMPONENTS;shared' -DBUILD_SHARED_LIBS=OFF
cmake_project shared "$PREFIX" -DTARGET=vattn::vattn_shared
cmake_project static "$PREFIX" -DTARGET=vattn::vattn_static
cmake_project shared "$PREFIX" "-DWANTED=$version;EXACT"
cmake_project shared "$PREFIX" "-DWANTED=$series...<99"
cmake_refuses "$PREFIX" 'compatible with requested version "99"' '-DWANTED=99'
cmake_refuses "$PREFIX" 'compatible with requested version "0.0.1"' '-DWANTED=0.0.1'
cmake_refuses "$PREFIX" 'there is no component plugin' '-DWANTED=COMPONENTS;plugin'
pkg_project shared "$PREFIX"

# Moved, as a package is; and with one library only, then none.
moved=$work/moved/elsewhere
mkdir "$work/moved"
mv "$PREFIX" "$moved"
cmake_project shared "$moved"
cmake_project static "$moved" -DBUILD_SHARED_LIBS=OFF
pkg_project shared "$moved"
mkdir "$work/shared"
mv "$moved"/lib/libvattn.so* "$work/shared"
cmake_project static "$moved"
cmake_refuses "$moved" 'libvattn.so is not in' '-DWANTED=COMPONENTS;shared'
pkg_project static "$moved" --static
mkdir "$work/static"
mv "$moved/lib/libvattn.a" "$work/static"
cmake_refuses "$moved" 'neither libvattn.so nor libvattn.a is in'
cmake_project shared "$moved" -Dvattn_LIBRARY_DIR="$work/shared"
# Where Debian has its libraries.
multiarch=$(cc -print-multiarch)
if [ -n "$multiarch" ]; then
  mv "$work/shared" "$moved/lib/$multiarch"
  cmake_project shared "$moved" -DBUILD_SHARED_LIBS=OFF
fi
printf 'install: all as README.md says\n'
