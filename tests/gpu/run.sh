#!/bin/sh
# Runs the GPU suite of the folder that it lies in, and leaves everything in FOLDER/results (or $OUT):
#
#   ./run.sh [tests] [soak] [sanitizer] [probe] [replay] [example] [bench] [serving] [creating] [kernels] [attention]
#       [busy] [engine] [python] [huggingface] [headtohead]
#   (default: all of them)
#
# `soak` takes VATTN_SOAK_SECONDS (180). `sanitizer` needs compute-sanitizer, `example` NVRTC, `creating`, `kernels`,
# `attention`, `busy`, `engine`, `python`, `huggingface` and `headtohead` a Python with PyTorch, `engine` a C++ compiler
# too, `huggingface` transformers 5, and `headtohead` matplotlib and nvcc; VATTN_PARTS names some of its parts,
# VATTN_ROUNDS (3) how often each is run. Every command has a time limit, and one that hangs has failed. Ends with the
# list of what passed, and with an error if anything did not.
set -u
cd "$(dirname "$0")" || exit 1
out=${OUT:-$PWD/results}
mkdir -p "$out"
export VATTN_REQUIRE_GPU=1 VATTN_TEST_DEVICE=cuda VATTN_BENCH_DEVICE=cuda
export VATTN_TRACES="$PWD/traces"
export LD_LIBRARY_PATH="$PWD/bin:${LD_LIBRARY_PATH:-}"
# What criterion keeps from one run to the next; the figures are in its output, too.
CRITERION_HOME=$(mktemp -d)
export CRITERION_HOME
trap 'rm -rf "$CRITERION_HOME"' EXIT
: >"$out/summary.txt"
failed=0
# Seconds that a command may take.
limit=300

# Runs a command, keeps its output under a name, and notes how it ended.
note() {
    name=$1
    shift
    start=$(date +%s)
    timeout -k 10 "$limit" "$@" >"$out/$name.txt" 2>&1
    case $? in
    0) word=passed ;;
    124 | 137) word="FAILED at its time limit:" failed=1 ;;
    *) word=FAILED failed=1 ;;
    esac
    echo "$word $name ($(($(date +%s) - start)) s)" | tee -a "$out/summary.txt"
}

# The same for a command that may take so many seconds more.
longer() {
    more=$1
    shift
    limit=$((limit + more))
    note "$@"
    limit=$((limit - more))
}

tests() {
    for test in conformance cuda buffer model fault_sweep contents mapper_on_card soak; do
        # One after the other: they count the memory that is free.
        note "$test" "bin/$test" --test-threads=1 --nocapture
    done
}

soak() {
    seconds=${VATTN_SOAK_SECONDS:-180}
    longer "$seconds" long-soak env VATTN_SOAK_SECONDS="$seconds" bin/soak --nocapture
}

# Every access of a kernel is checked; CUDA's refusals, which the tests provoke, are not reported. Kernels are
# slow there, and calls of the driver may wait for them.
sanitizer() {
    for test in conformance buffer contents model fault_sweep mapper_on_card soak; do
        note "memcheck-$test" env VATTN_UNDER_TOOL=1 VATTN_DWELL_MS=200 VATTN_SOAK_SECONDS=30 \
            compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
            "bin/$test" --test-threads=1 --nocapture --skip touching_what_is_not_backed_faults
    done
}

probe() {
    note probe bin/vattn probe --device cuda
    note probe-json bin/vattn probe --device cuda --json
}

replay() {
    trace=traces/azure_llm_2023_conv.csv
    set -- bin/vattn replay --device cuda --policy vattn,vattention
    # Without it, requests are generated.
    [ ! -e "$trace" ] || set -- "$@" --trace "$trace"
    note replay "$@" --html "$out/replay.html"
    note replay-json "$@" --format json
}

# Where there is PyTorch, with the NVRTC that it brought along, whose name ends with its version: cudarc does not know
# all of those.
example() {
    libraries=$(mktemp -d)
    nvrtc=$(python3 -c 'import glob, sys; print(*(path for folder in sys.path
        for path in glob.glob(folder + "/nvidia/*/lib/libnvrtc.so.*")), sep="\n")' 2>/dev/null | head -n 1)
    [ -z "$nvrtc" ] || ln -s "$nvrtc" "$libraries/libnvrtc.so"
    note example env LD_LIBRARY_PATH="$libraries:$(dirname "$nvrtc"):$LD_LIBRARY_PATH" bin/attention
    rm -r "$libraries"
}

# Without `--bench` they would only show that they work.
bench() {
    note scenarios bin/scenarios --bench --json "$out/scenarios.json" \
        prompts adopt reserve steps commit traces full
    for bench in driver steady; do
        note "$bench" "bin/$bench" --bench --noplot --nresamples 10000 \
            --measurement-time 1 --warm-up-time 0.5
    done
}

# In real time, with kernels between the steps and the mapper beside them.
serving() {
    note serving bin/scenarios --bench --json "$out/serving.json" lockstep sync-vs-async churn
}

creating() { note creating python3 creating.py; }
kernels() { note kernels python3 kernels.py "$out"; }
attention() { note attention python3 attention.py "$out"; }
busy() { note busy python3 attention_busy.py "$out"; }

# Built here, against the PyTorch that is here. A byte that is spoilt on purpose has to be found.
engine() {
    FA3_LIBRARY=$(python3 -c 'from importlib.util import find_spec; print(find_spec("fa3_fwd._C").origin)')
    export FA3_LIBRARY
    note engine-build sh engine/build_torch.sh "$PWD/bin/engine" "$PWD/bin" "$PWD/include"
    trace=traces/azure_llm_2023_conv.csv
    set -- bin/engine
    # Without it, requests are generated.
    [ ! -e "$trace" ] || set -- "$@" --trace "$trace"
    note engine "$@" --limit 400 --require-turnover
    note engine-spoilt sh -c '"$@"; [ $? -eq 1 ]' - "$@" --limit 10 --spoil 20
}

# The package as a user installs it, with the wheels that lie beside it.
installed() {
    site=$PWD/site
    [ -e "$site" ] || note python-install python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" wheels/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
}

python() {
    installed
    note python-tests python3 -m pytest -p no:cacheprovider python/tests
    for example in python/examples/*.py; do
        note "example-$(basename "$example" .py)" python3 "$example"
    done
    note python-step python3 python/benches/step.py
    note attention-errors python3 python/benches/attention_errors.py "$out"
}

huggingface() {
    installed
    longer 270 huggingface python3 python/benches/hf_caches.py "$out" --compiled
}

# FlashInfer's kernels are compiled into the folder of the bundle, where a second call finds them.
headtohead() {
    installed
    longer 270 headtohead env FLASHINFER_WORKSPACE_BASE="$PWD" python3 python/examples/serving/head_to_head.py \
        "$out/headtohead" --traces traces ${VATTN_PARTS:+--parts "$VATTN_PARTS"} \
        ${VATTN_ROUNDS:+--rounds "$VATTN_ROUNDS"}
}

[ $# -gt 0 ] || set -- tests soak sanitizer probe replay example bench serving creating kernels attention busy engine \
    python huggingface headtohead
for part in "$@"; do
    "$part"
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >"$out/card.txt" 2>&1
cat "$out/summary.txt"
exit "$failed"
