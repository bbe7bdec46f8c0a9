#!/bin/sh
# Runs the benches and keeps what they say: one Markdown file for each run, benches/record/DATE-COMMIT.md.
#
#   benches/record.sh [arguments for criterion, e.g. --measurement-time 3]
#
# Run it on a machine that does nothing else. What runs on real drivers runs on the host, and on the
# card where there is one; VATTN_REQUIRE_GPU=1 fails without. The medians are criterion's own estimates,
# with the bounds of their 95 % confidence interval; the scenarios' tables are as they were printed.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
day=$(date -u +%F)
commit=$(git rev-parse --short HEAD)
git diff --quiet HEAD -- . || commit="$commit-changed"
out=benches/record/$day-$commit.md

# What an earlier run left is not this run's.
rm -rf "$target/criterion"
cargo bench --bench steady -- "$@"
cargo bench --bench driver -- "$@"
scenarios=$(mktemp)
trap 'rm -f "$scenarios"' EXIT
cargo bench --bench scenarios | tee "$scenarios"

# A number out of one line of JSON: the bound or point $2 of the median in file $1.
median() {
    sed -e 's/.*"median":{//' -e 's/"standard_error".*//' "$1" | grep -o "\"$2\":[0-9.e+-]*" | head -n 1 | cut -d: -f2
}

mkdir -p benches/record
{
    echo "# Benches, $day"
    echo
    echo "- commit: $commit"
    echo "- processor: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores; load average at the end$(uptime | sed 's/.*average//')"
    echo "- system: $(uname -sr), $(rustc --version)"
    echo "- commands: \`cargo bench --bench steady -- $*\`, the same with \`driver\`, \`cargo bench --bench scenarios\`"
    echo
    echo "## Steady state, and a driver's calls by handle size"
    echo
    echo "| bench | median, ns | from | to |"
    echo "|---|---:|---:|---:|"
    find "$target/criterion" -path '*/new/benchmark.json' | while read -r file; do
        name=$(grep -o '"full_id":"[^"]*"' "$file" | cut -d'"' -f4)
        estimates=$(dirname "$file")/estimates.json
        printf '| %s | %.0f | %.0f | %.0f |\n' "$name" "$(median "$estimates" point_estimate)" \
            "$(median "$estimates" lower_bound)" "$(median "$estimates" upper_bound)"
    done | sort -V
    echo
    cat "$scenarios"
} >"$out"
echo "$out"
