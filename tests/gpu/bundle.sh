#!/bin/sh
# Gathers what the GPU suite needs in one folder, for a machine that has a driver and no toolchain:
#
#   tests/gpu/bundle.sh [FOLDER]        (default: .bundle)
#
# There, FOLDER/run.sh runs the suite and leaves its results in FOLDER/results. Traces are taken from
# VATTN_TRACES (default ../shared/traces), those that are there.
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-.bundle}
target=${CARGO_TARGET_DIR:-target}
traces=${VATTN_TRACES:-../shared/traces}

rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/traces"

cargo build --release --workspace
# Cargo tells where it put each program: `Executable tests/model.rs (target/release/deps/model-…)`.
tests="--test conformance --test model --test fault_sweep --test contents --test cuda"
benches=$(sed -n '/^\[\[bench\]\]/{n;s/name = "\(.*\)"/--bench \1/p}' Cargo.toml)
# shellcheck disable=SC2086 # lists of options
{
    cargo test --release --no-run -p vattn $tests 2>&1
    cargo bench --no-run -p vattn $benches 2>&1
} | tee "$folder/build.log" | sed -n 's/^ *Executable [^ ]*\/\([a-z_]*\)\.rs (\(.*\))$/\1 \2/p' |
    while read -r name path; do
        cp "$path" "$folder/bin/$name"
    done
cp "$target/release/vattn" "$folder/bin/"
for library in libvattn_bridge.so; do
    if [ -e "$target/release/$library" ]; then
        cp "$target/release/$library" "$folder/bin/"
    fi
done
strip "$folder"/bin/*

cp tests/gpu/run.sh "$folder/"
cp tests/gpu/*.py "$folder/" 2>/dev/null || true
for trace in azure_llm_2023_conv.csv sync_vs_async.csv; do
    if [ -e "$traces/$trace" ]; then
        cp "$traces/$trace" "$folder/traces/"
    fi
done
git rev-parse --short HEAD >"$folder/commit"
rm "$folder/build.log"
du -sh "$folder"
