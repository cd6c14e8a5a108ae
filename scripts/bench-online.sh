#!/usr/bin/env bash
# Measures what a registry's clients notice of sweeps beside it, and how soon things come back; prints Markdown.
#
# Usage: scripts/bench-online.sh [--store DIR] [--size RxT] [--turn MILLISECONDS] [--rounds N] [PART…]
#
# Parts (without any: all of them):
#   pushes    pushes to a registry on a large store, with nothing else going on and beside sweeps, by turns
#   guard     pushes and pulls of a registry that works in a guarded bind mount, and of one that does not
#   restores  from the answer to a push that names what lies in the trash, until all of it is back
#
# The store is made in a temporary directory unless DIR holds one that benches/make_store has made. Needs root, FUSE and
# docker-registry. scripts/storm.sh has the storms.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

store='' size=400x50 parts=()
export TURN_MS=3000 ROUNDS=5
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,13s/^# \{0,1\}//p' scripts/bench-online.sh
            exit
            ;;
        --store | --size | --turn | --rounds)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --store) store=$2 ;;
                --size) size=$2 ;;
                --turn) TURN_MS=$2 ;;
                --rounds) ROUNDS=$2 ;;
            esac
            shift 2
            ;;
        pushes | guard | restores)
            parts+=("$1")
            shift
            ;;
        *) fail "there is no part or option '$1' (see --help)" ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(pushes guard restores)
[[ $size =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || fail "a size looks like 400x50, not '$size'"
need_rust
need cc=gcc fusermount3=fuse3 docker-registry=docker-registry setpriv=util-linux
need_fuse
export CI=true

# measure TEST: what it prints as rows of a table.
measure() {
    cargo test --locked --release --quiet --test pace "$1" -- --ignored --exact --nocapture 2>&1 | grep '^|' || true
}

for part in "${parts[@]}"; do
    case $part in
        pushes)
            if [ -z "$store" ]; then
                store=$(mktemp -d)
                trap 'rm -rf "$store"' EXIT
                cargo bench --quiet --bench make_store -- "$store" "${size%x*}" "${size#*x}" >&2
            fi
            echo "| beside | alone: median ms | 9 of 10 | worst | pushes | beside: median ms | 9 of 10 | worst | pushes | ratio | sweeps |"
            echo "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
            STORE=$store measure pushes_beside_sweeps
            ;;
        guard)
            echo "| | push, median ms | pull, median ms | CPU ms of the registry for each |"
            echo "|---|--:|--:|--:|"
            measure a_guarded_registry
            ;;
        restores)
            echo "| | median ms | 9 of 10 | worst | restores |"
            echo "|---|--:|--:|--:|--:|"
            ROUNDS=100 measure restores
            ;;
    esac
    echo
done
