#!/usr/bin/env bash
# Measures `regfs gc --dry-run` beside the stock collector's dry run on a generated store.
#
# Usage: scripts/bench-gc.sh [REPOSITORIES [TAGS_EACH [RUNS]]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

repositories=${1:-400} tags=${2:-30} runs=${3:-5}
need_rust
need docker-registry=docker-registry
[ -x /usr/bin/time ] || need /usr/bin/time=time

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo build --release --quiet
cargo bench --quiet --bench make_store -- "$work/store" "$repositories" "$tags"
cat > "$work/config.yml" << END
version: 0.1
storage: {filesystem: {rootdirectory: $work/store}, delete: {enabled: true}}
END

# measure NAME COMMAND…: appends wall seconds, CPU seconds and peak memory to $work/NAME.
measure() {
    local name=$1
    shift
    /usr/bin/time -a -o "$work/$name" -f '%e %U %S %M' "$@" > /dev/null 2> "$work/stderr" || {
        cat "$work/stderr" >&2
        fail "$1 failed"
    }
}

for ((run = 0; run <= runs; run++)); do
    measure stock env -u AWS_CA_BUNDLE OTEL_TRACES_EXPORTER=none docker-registry garbage-collect --dry-run "$work/config.yml"
    measure regfs target/release/regfs gc "$work/store" --dry-run --grace 0
    # The first run only fills the page cache.
    if [ "$run" = 0 ]; then rm "$work/stock" "$work/regfs"; fi
done

median() { sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
column() { awk -v part="$2" '{print part == "wall" ? $1 : part == "cpu" ? $2 + $3 : $4 / 1024}' "$work/$1" | median; }

echo "| | stock | regfs | ratio |"
echo "|---|---|---|---|"
for row in "wall, s:wall" "CPU, s:cpu" "peak memory, MiB:memory"; do
    stock=$(column stock "${row#*:}") regfs=$(column regfs "${row#*:}")
    awk -v name="${row%:*}" -v a="$stock" -v b="$regfs" 'BEGIN {printf "| %s | %.2f | %.2f | %.1f |\n", name, a, b, a / b}'
done
