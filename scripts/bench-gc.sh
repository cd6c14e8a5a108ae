#!/usr/bin/env bash
# Measures `regfs gc` on generated stores, beside the stock collector and beside the least any collector must do
# (benches/floor.rs). The sides take turns; the first round only warms up; prints medians and ratios as Markdown.
#
# Usage: scripts/bench-gc.sh [OPTION…] [PART…]
#
# Parts (without any: dry-run cache untagged growth):
#   dry-run   regfs beside the floor, with one thread and with two, and beside the stock collector
#   cache     regfs with an empty cache of parsed manifests beside regfs with a full one
#   untagged  --untagged beside the stock collector's -m: many repositories, and many tags in one
#   growth    time and memory for each blob, in a store and in one with a tenth of its repositories
#   cold      floor and regfs with 1 to 32 threads after the kernel has dropped its caches; needs root
#   sweep     a real sweep and its undo, then the stock collector's: uses the store up, so it runs last
#
# Options:
#   --store DIR              keep the main store in DIR; made there, unless make_store has done so already
#   --size RxT               the main store: repositories x tags in each [default: 2000x100]
#   --untagged-sizes RxT,…   the stores of `untagged` [default: 400x50,1x5000]
#   --runs N                 measured runs of each side [default: 3]
#   --stock-limit SECONDS    cut the stock collector off after this time [default: 600]
#
# Stores other than DIR live in a temporary directory ($TMPDIR). A million blobs need 22 GB and 5.5 million inodes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' scripts/bench-gc.sh; }

store='' size=2000x100 untagged_sizes=400x50,1x5000 runs=3 stock_limit=600 parts=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --store | --size | --untagged-sizes | --runs | --stock-limit)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --store) store=$2 ;;
                --size) size=$2 ;;
                --untagged-sizes) untagged_sizes=$2 ;;
                --runs) runs=$2 ;;
                --stock-limit) stock_limit=$2 ;;
            esac
            shift 2
            ;;
        dry-run | cache | untagged | growth | cold | sweep)
            parts+=("$1")
            shift
            ;;
        *) fail "there is no part or option '$1' (see --help)" ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(dry-run cache untagged growth)
case " ${parts[*]} " in *" cold "*) [ "$(id -u)" = 0 ] || fail "the part 'cold' needs root, to drop the kernel's caches" ;; esac
[[ $runs =~ ^[1-9][0-9]*$ ]] || fail "--runs takes a number of at least 1, not '$runs'"
[[ $stock_limit =~ ^[1-9][0-9]*$ ]] || fail "--stock-limit takes a number of seconds, not '$stock_limit'"
for s in "$size" ${untagged_sizes//,/ }; do
    [[ $s =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || fail "a size looks like 2000x100, not '$s'"
done

need_rust
need docker-registry=docker-registry
[ -x /usr/bin/time ] || need /usr/bin/time=time

work=$(mktemp -d)
results=$work/results
mkdir "$results"
trap 'rm -rf "$work"' EXIT

# executable NAME CARGO-ARGUMENT…: builds and says where the program is, wherever cargo builds.
executable() {
    cargo "${@:2}" --quiet --message-format=json-render-diagnostics |
        sed -n "/\"name\":\"$1\"/s/.*\"executable\":\"\([^\"]*\)\".*/\1/p" | tail -n 1
}
regfs=$(executable regfs build --release --bin regfs)
floor=$(executable floor bench --no-run --bench floor)
make_store=$(executable make_store bench --no-run --bench make_store)
gc_help=$("$regfs" gc --help)

# Whether this regfs knows an option of gc.
knows() { grep -q -- "^ *\(-., \)\?$1\b" <<< "$gc_help"; }

# The cache that a sweep leaves in the store is no part of what we compare, but in the part 'cache'.
uncached=()
if knows --no-cache; then uncached=(--no-cache); fi

# make DIR RxT [UNTAGGED_PERCENT]: makes a store.
make() {
    local started=$SECONDS
    echo "Making a store of ${2/x/ repositories with } tags each" >&2
    "$make_store" "$1" "${2%x*}" "${2#*x}" "${3:-0}" > /dev/null
    sync
    echo "Made it in $((SECONDS - started)) s" >&2
}

# count DIR WHAT: a number of things that make_store made.
count() {
    awk -v what="$2" '{n = $1; sub(/^[0-9]+ /, "")} $0 == what {print n}' "$1/make_store.txt"
}

# The main store, made when the first part asks for it.
main_store() {
    [ -z "${main:-}" ] || return 0
    main=${store:-$work/main}
    # The file is written last, and only by make_store.
    if [ ! -f "$main/make_store.txt" ]; then
        [ ! -e "$main/docker" ] || fail "$main holds a store that is half made, used up, or not one of make_store"
        make "$main" "$size"
    fi
    main=$(cd "$main" && pwd)
    main_blobs=$(count "$main" blobs)
    main_text="$(count "$main" repositories) repositories, $(count "$main" tags) tags, $main_blobs blobs, $(count "$main" "garbage blobs") of them garbage"
}

# title TEXT…: begins a part in the output.
title() { printf '\n### %s\n\n' "$*"; }

# measure NAME COMMAND…: appends wall seconds, user and system seconds and peak KiB to $results/NAME; not in round 0.
measure() {
    local name=$1 status=0
    shift
    /usr/bin/time -q -o "$work/time" -f '%e %U %S %M' "$@" > /dev/null 2> "$work/stderr" || status=$?
    if [ "$status" != 0 ]; then return "$status"; fi
    if [ "$round" != 0 ]; then cat "$work/time" >> "$results/$name"; fi
}

# must COMMAND…: ends the script with what the measured program has said, if it fails.
must() {
    "$@" || {
        cat "$work/stderr" >&2
        fail "failed: $*"
    }
}

floor() { must measure "$1" "$floor" "${@:2}"; }                                # NAME DIR THREADS
regfs() { must measure "$1" "$regfs" gc "$2" --dry-run --grace 0 "${@:3}"; }    # NAME DIR OPTION…

# stock NAME DIR OPTION…: the stock collector; one that was cut off once is not tried again.
stock() {
    local name=$1 directory=$2 status=0
    shift 2
    if [ -f "$results/$name" ] && grep -q cut "$results/$name"; then return; fi
    cat > "$work/config.yml" << END
version: 0.1
storage: {filesystem: {rootdirectory: "$directory"}, delete: {enabled: true}}
END
    measure "$name" timeout --foreground "$stock_limit" env -u AWS_CA_BUNDLE OTEL_TRACES_EXPORTER=none \
        docker-registry garbage-collect "$@" "$work/config.yml" || status=$?
    case $status in
        0) ;;
        # What it had used until then is no result.
        124) echo "$stock_limit cut" > "$results/$name" ;;
        *)
            cat "$work/stderr" >&2
            fail "docker-registry garbage-collect failed"
            ;;
    esac
}

# median NAME COLUMN: COLUMN is wall, cpu or memory (in bytes); empty for cpu and memory of what was cut off.
median() {
    awk -v part="$2" '
        $2 == "cut" {if (part == "wall") print $1; next}
        {print part == "wall" ? $1 : part == "cpu" ? $2 + $3 : $4 * 1024}' "$results/$1" |
        sort -n | awk '{v[NR] = $1} END {if (NR) print v[int((NR + 1) / 2)]}'
}

# table BLOBS BASE SIDE…: medians of all, and how many times those of BASE they are.
table() {
    local blobs=$1 base=$2 name
    shift
    echo "| | wall, s | CPU, s | peak, MiB | peak, bytes per blob | times the wall of $base | times the CPU | times the peak |"
    echo "|---|--:|--:|--:|--:|--:|--:|--:|"
    for name in "$@"; do
        awk -v name="$name" -v blobs="$blobs" -v cut="$(grep -c cut "$results/$name" || true)" \
            -v w="$(median "$name" wall)" -v c="$(median "$name" cpu)" -v m="$(median "$name" memory)" \
            -v bw="$(median "$base" wall)" -v bc="$(median "$base" cpu)" -v bm="$(median "$base" memory)" '
            function times(value, of) {return value != "" && of > 0 ? sprintf("%.2f", value / of) : "–"}
            function number(value, form) {return value != "" ? sprintf(form, value) : "–"}
            BEGIN {
                more = cut ? "> " : ""
                printf "| %s | %s | %s | %s | %s | %s | %s | %s |\n", name, more number(w, "%.2f"), number(c, "%.2f"),
                    number(m == "" ? "" : m / 1048576, "%.1f"), number(m == "" ? "" : m / blobs, "%.0f"),
                    more times(w, bw), times(c, bc), times(m, bm)
            }'
    done
    echo
}

part_dry_run() {
    local n one="" two=""
    main_store
    rm -rf "$main/docker/registry/v2/.regfs/cache"
    if knows --threads; then one=", 1 thread" two=", 2 threads"; fi
    for ((round = 0; round <= runs; round++)); do
        for n in 1 2; do floor "floor, $n threads" "$main" "$n"; done
        if knows --threads; then
            for n in 1 2; do regfs "regfs, $n threads" "$main" --threads "$n" "${uncached[@]}"; done
        fi
        regfs "regfs" "$main" "${uncached[@]}"
        stock "stock" "$main" --dry-run
    done
    mv "$results/floor, 1 threads" "$results/floor, 1 thread"
    if knows --threads; then mv "$results/regfs, 1 threads" "$results/regfs, 1 thread"; fi
    title "Dry run: $main_text"
    table "$main_blobs" "floor, 1 thread" "regfs$one"
    table "$main_blobs" "floor, 2 threads" "regfs$two"
    table "$main_blobs" "regfs" "stock"
}

part_cache() {
    title "Cache of parsed manifests"
    if ! knows --cache-dir; then
        echo "Not available: this regfs has no --cache-dir."
        return
    fi
    main_store
    local cache=$work/cache sides=("cache full" "cache empty")
    for ((round = 0; round <= runs; round++)); do
        rm -rf "$cache"
        mkdir "$cache"
        regfs "cache empty" "$main" --cache-dir "$cache"
        regfs "cache full" "$main" --cache-dir "$cache"
        if knows --no-cache; then regfs "no cache" "$main" --no-cache; fi
    done
    if knows --no-cache; then sides+=("no cache"); fi
    echo "$main_text; the full cache has $(du -s --apparent-size --block-size=1 "$cache" | cut -f 1) bytes"
    echo
    table "$main_blobs" "${sides[@]}"
}

part_untagged() {
    local shape directory=$work/untagged
    for shape in ${untagged_sizes//,/ }; do
        make "$directory" "$shape" 10
        for ((round = 0; round <= runs; round++)); do
            regfs "regfs --untagged, $shape" "$directory" --untagged "${uncached[@]}"
            stock "stock -m, $shape" "$directory" --dry-run -m
        done
        title "Untagged manifests: $(count "$directory" repositories) repositories, $(count "$directory" tags) tags, $(count "$directory" "untagged manifests") manifests without a tag, $(count "$directory" blobs) blobs"
        table "$(count "$directory" blobs)" "regfs --untagged, $shape" "stock -m, $shape"
        rm -rf "$directory"
    done
}

part_growth() {
    local small=$work/small blobs side directory
    main_store
    make "$small" "$((($(count "$main" repositories) + 9) / 10))x$(($(count "$main" tags) / $(count "$main" repositories)))"
    blobs=$(count "$small" blobs)
    for ((round = 0; round <= runs; round++)); do
        for directory in "$small" "$main"; do
            floor "floor, $(count "$directory" blobs) blobs" "$directory" 1
            regfs "regfs, $(count "$directory" blobs) blobs" "$directory" "${uncached[@]}"
        done
    done
    rm -rf "$small"
    title "Growth: $main_text, and a tenth of its repositories"
    echo "| | wall, µs per blob | CPU, µs per blob | peak, bytes per blob | peak, bytes for each further blob |"
    echo "|---|--:|--:|--:|--:|"
    for side in floor regfs; do
        for n in "$blobs" "$main_blobs"; do
            awk -v name="$side, $n blobs" -v n="$n" -v less="$blobs" -v w="$(median "$side, $n blobs" wall)" \
                -v c="$(median "$side, $n blobs" cpu)" -v m="$(median "$side, $n blobs" memory)" \
                -v lm="$(median "$side, $blobs blobs" memory)" '
                BEGIN {printf "| %s | %.2f | %.2f | %.0f | %s |\n", name, w / n * 1e6, c / n * 1e6, m / n,
                    (n > less) ? sprintf("%.0f", (m - lm) / (n - less)) : "–"}'
        done
    done
}

# Runs a command on a store that the kernel has nothing of in memory.
cold() {
    sync
    echo 3 > /proc/sys/vm/drop_caches
    "$@"
}

part_cold() {
    local n all=(1 2 4 8 16 32) floors=() sides=("regfs, cold, default")
    main_store
    rm -rf "$main/docker/registry/v2/.regfs/cache"
    # Round 0 is thrown away here, too: below the kernel there are caches that it cannot drop, of a host or a disk.
    for ((round = 0; round <= runs; round++)); do
        for n in "${all[@]}"; do
            cold floor "floor, cold, threads: $n" "$main" "$n"
            if knows --threads; then cold regfs "regfs, cold, threads: $n" "$main" --threads "$n" "${uncached[@]}"; fi
        done
        cold regfs "regfs, cold, default" "$main" "${uncached[@]}"
    done
    for n in "${all[@]}"; do
        floors+=("floor, cold, threads: $n")
        if knows --threads; then sides+=("regfs, cold, threads: $n"); fi
    done
    title "Nothing in the page cache: $main_text"
    table "$main_blobs" "${floors[@]}" "${sides[@]}"
}

part_sweep() {
    local transaction
    main_store
    for ((round = 0; round <= runs; round++)); do
        regfs "regfs, dry run" "$main" "${uncached[@]}"
        must measure "regfs, sweep" "$regfs" gc "$main" --grace 0 --registry-stopped "${uncached[@]}"
        transaction=$("$regfs" trash "$main" list | awk '$1 ~ /-sweep/ {id = $1} END {print id}')
        [ -n "$transaction" ] || fail "the sweep took nothing, so there is nothing to compare"
        must measure "regfs, undo" "$regfs" trash "$main" undo "$transaction"
        stock "stock, dry run" "$main" --dry-run
    done
    echo "The stock collector sweeps now: ${store:-the main store} cannot be used again" >&2
    rm "$main/make_store.txt"
    # It cannot be warmed up or repeated, what it removes is gone.
    round=1
    stock "stock, sweep" "$main"
    title "Sweep: $main_text"
    table "$main_blobs" "regfs, sweep" "regfs, dry run" "regfs, undo" "stock, sweep" "stock, dry run"
    awk -v rs="$(median "regfs, sweep" wall)" -v rd="$(median "regfs, dry run" wall)" \
        -v ss="$(median "stock, sweep" wall)" -v sd="$(median "stock, dry run" wall)" '
        BEGIN {
            printf "Sweep less dry run: regfs %.2f s, stock %.2f s", rs - rd, ss - sd
            if (rs > rd) printf ", ratio %.1f", (ss - sd) / (rs - rd)
            print "."
        }'
    echo "regfs has moved the garbage to its trash and not yet freed it; stock has removed it, measured once."
}

machine() {
    printf '%s processors, %s; %s of memory; Linux %s; %s\n' "$(nproc)" \
        "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo | head -n 1)" \
        "$(awk '/^MemTotal/ {printf "%.0f GiB", $2 / 1048576}' /proc/meminfo)" "$(uname -r)" \
        "$(df --output=fstype "$(dirname "${store:-$work}")" | tail -n 1)"
}

echo "$(machine); $("$regfs" --version); docker-registry $(docker-registry --version | sed 's/.* //'); $runs runs"
# The sweep comes last wherever it was named.
for part in dry-run cache untagged growth cold sweep; do
    case " ${parts[*]} " in *" $part "*) "part_${part//-/_}" ;; esac
done
