#!/usr/bin/env bash
# Lets clients push, delete and pull as fast as they can while a collector runs, and says what came of it.
#
# Usage: scripts/storm.sh [-s SECONDS] [-c on|off|redis|all] [-w COLLECTOR,…] [-k SECONDS] [-r] [-d] [-g] [-n SEED]
#   -s  how long each storm lasts (60)
#   -c  the registry's descriptor cache (all)
#   -w  who collects: regfs, stock, optimistic (takes and frees at once), none (regfs)
#   -k  kill regfs with SIGKILL so often, and mount again
#   -r  restart the registry in the middle
#   -d  leave regfs down for half of the time
#   -g  with regfs mount --guard
#   -n  the seed of what the clients do (1)
# Needs root, FUSE, redis-server and docker-registry, or another registry whose path is in REGFS_TEST_REGISTRY. Fails when
# an image is lost beside regfs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

cache=all collectors=regfs
export STORM_SECONDS=60 STORM_SEED=1
while getopts s:c:w:k:rdgn:h option; do
    case $option in
        s) STORM_SECONDS=$OPTARG ;;
        c) cache=$OPTARG ;;
        w) collectors=$OPTARG ;;
        k) export STORM_KILL_EVERY=$OPTARG ;;
        r) export STORM_RESTART=yes ;;
        d) export STORM_DOWN=yes ;;
        g) export STORM_GUARD=yes ;;
        n) STORM_SEED=$OPTARG ;;
        h)
            sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit
            ;;
        *) fail "see -h" ;;
    esac
done
case $cache in
    all) caches="off on redis" ;;
    on | off | redis) caches=$cache ;;
    *) fail "-c takes on, off, redis or all, not $cache" ;;
esac
need_rust
need cc=gcc fusermount3=fuse3 redis-server=redis-server setpriv=util-linux
[[ -n ${REGFS_TEST_REGISTRY-} ]] || need docker-registry=docker-registry
need_fuse
export CI=true
cargo test --locked --release --quiet --test storm --no-run
for collector in ${collectors//,/ }; do
    for one in $caches; do
        out=$(STORM_COLLECTOR=$collector STORM_CACHE=$one cargo test --locked --release --quiet --test storm a_long_storm -- \
            --ignored --nocapture 2>&1) || fail "$out"
        grep " pushes acknowledged " <<< "$out"
    done
done
