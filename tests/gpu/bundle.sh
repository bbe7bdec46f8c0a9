#!/bin/sh
# Gathers what the GPU suite needs in one folder, for a machine that has a driver and no toolchain:
#
#   tests/gpu/bundle.sh [FOLDER] [python]        (default: .bundle)
#
# With `python` only what the parts `python`, `huggingface` and `headtohead` of run.sh need.
#
# There, FOLDER/run.sh runs the suite and leaves its results in FOLDER/results. Traces are taken from
# VATTN_TRACES (default ../shared/traces), those that are there. The program's own tests are not in it:
# they look for the program where it was built. Wheels that the Python part needs beside ours, and that the
# machine has not got (cffi, pycparser; fa3-fwd and flashinfer-python with what they need), are taken from the
# folder VATTN_WHEELS, if that is set.
set -eu
cd "$(dirname "$0")/../.."
folder=${1:-.bundle}
parts=${2:-all}
target=${CARGO_TARGET_DIR:-target}
traces=${VATTN_TRACES:-../shared/traces}

if [ -e "$folder" ] && [ ! -e "$folder/run.sh" ]; then
    echo "$folder is there and is no bundle; name a new folder" >&2
    exit 1
fi
rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/traces" "$folder/include" "$folder/engine" "$folder/wheels" "$folder/python"
cp tests/gpu/run.sh tests/gpu/*.py "$folder/"
cp include/* "$folder/include/"
cp examples/cpp/*.?pp examples/cpp/build_torch.sh "$folder/engine/"
cp -r python/tests python/examples python/benches python/pyproject.toml python/README.md "$folder/python/"
cp README.md "$folder/"
find "$folder/python" -name __pycache__ -prune -exec rm -r {} +

log=$(mktemp)
venv=$(mktemp -d)
trap 'rm -rf "$log" "$venv"' EXIT
built() {
    "$@" >>"$log" 2>&1 || {
        cat "$log" >&2
        exit 1
    }
}
built python3 -m venv "$venv"
built "$venv/bin/pip" wheel --no-deps -w "$folder/wheels" ./python
[ -z "${VATTN_WHEELS:-}" ] || cp "$VATTN_WHEELS"/*.whl "$folder/wheels/"
if [ "$parts" = all ]; then
    built cargo build --release --workspace
    built cargo test --release --no-run -p vattn \
        --test conformance --test buffer --test model --test fault_sweep --test contents --test cuda \
        --test mapper_on_card --test soak
    built cargo bench --no-run -p vattn --benches
    built cargo build --release --example attention
    # Cargo tells where it put each: `Executable benches/scenarios/main.rs (target/release/deps/scenarios-…)`.
    sed -n 's/^ *Executable .*(\(.*\/\([a-z_]*\)-[0-9a-f]*\))$/\2 \1/p' "$log" |
        while read -r name path; do
            cp "$path" "$folder/bin/$name"
        done
    cp "$target/release/vattn" "$target/release/examples/attention" "$folder/bin/"
    cp "$target/release/libvattn.so" "$target/release/libvattn_bridge.so" "$folder/bin/"
    strip --strip-all "$folder"/bin/*
fi
for trace in azure_llm_2023_conv.csv sync_vs_async.csv arxiv_long_offline.csv; do
    if [ -e "$traces/$trace" ]; then
        cp "$traces/$trace" "$folder/traces/"
    fi
done
git rev-parse --short HEAD >"$folder/commit"
du -ah "$folder" | sort -k 2
