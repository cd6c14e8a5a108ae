#!/usr/bin/env bash
# Measures a mounted regfs beside ext4 and bindfs with the same names and sizes. The sides take turns; the first round
# only warms up; prints medians and ratios as Markdown. CPU is that of the clients and of the daemon that serves them.
# Needs root.
#
# Usage: scripts/bench-mount.sh [OPTION…] [PART…]
#
# Parts (without any: all):
#   mount    until the first answer: without and with the cache of parsed manifests, beside the collector's floor
#   first    the first find over images after the mount, beside ext4 whose names the kernel has dropped
#   warm     find, ls -lR and stat in random order (1 and 4 clients), all known to the kernel: each right after the same
#   read     a blob of 1 GiB: ext4, with passthrough (root), without (another user)
#   rm       one tag after the other, beside rm -r of a tag's directory and a sync
#   large    ls -f of a directory of 100,000 tags and of one with 1,000
#   memory   of the daemon after 1 and after many finds
#
# Options:
#   --store DIR    keep the store in DIR; made there, unless make_store has done so already
#   --size RxT     repositories x tags in each [default: 1000x100]
#   --runs N       measured runs of each side [default: 5]
#
# The rest lives in a temporary directory ($TMPDIR). The default store needs 11 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' scripts/bench-mount.sh; }

store='' size=1000x100 runs=5 parts=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --store | --size | --runs)
            [ $# -gt 1 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        mount | first | warm | read | rm | large | memory)
            parts+=("$1")
            shift
            ;;
        *) fail "there is no part or option '$1' (see --help)" ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(mount first warm read rm large memory)
[ "$(id -u)" = 0 ] || fail "needs root, to mount without a helper and to drop the kernel's caches"
[[ $runs =~ ^[1-9][0-9]*$ ]] || fail "--runs takes a number of at least 1, not '$runs'"
[[ $size =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || fail "a size looks like 1000x100, not '$size'"
need_rust
need_fuse
need bindfs=bindfs jq=jq setpriv=util-linux

cargo build --release --locked --quiet
built=$(cargo bench --no-run --locked --message-format=json 2> /dev/null | jq -r 'select(.executable) | "\(.target.name) \(.executable)"')
bench() { echo "$built" | awk -v name="$1" '$1 == name { print $2 }'; }
make_store=$(bench make_store) floor=$(bench floor) regfs=$PWD/target/release/regfs

work=$(mktemp -d) mnt=$work/mnt plain=$work/plain bind=$work/bind
mkdir "$mnt" "$plain" "$bind"
chmod 755 "$work" # another user reads a blob
fuse_mode=$(stat -c %a /dev/fuse)
clean_up() {
    chmod "$fuse_mode" /dev/fuse
    umount -l "$work/other" 2> /dev/null || true
    for m in "$mnt" "$bind"; do umount -l "$m" 2> /dev/null || true; done
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
store=${store:-$work/store}
if [ ! -d "$store/docker/registry/v2" ]; then
    echo "Making a store of $size in $store" >&2
    "$make_store" "$store" "${size%x*}" "${size#*x}" >&2
fi

# --- measuring ---

samples=$work/samples
daemon='' # the process whose CPU counts, too

# CPU of the daemon so far, in seconds: of the threads that live; with `all` of those that have ended, too, but in
# hundredths only.
daemon_cpu() {
    if [ "${1-}" = all ]; then
        awk '{ printf "%.2f", ($14 + $15) / 100 }' "/proc/$daemon/stat"
        return
    fi
    [ -n "$daemon" ] || { echo 0; return; }
    cat /proc/"$daemon"/task/*/schedstat 2> /dev/null | awk '{ sum += $1 } END { printf "%.6f", sum / 1e9 }'
}

# sample ROW SIDE COMMAND…: runs it once; keeps wall and CPU unless this is the round that warms up.
sample() {
    local row=$1 side=$2 daemon=$daemon before after wall user sys
    shift 2
    before=$(daemon_cpu)
    read -r wall user sys < <({ TIMEFORMAT='%R %U %S'; time "$@" > /dev/null 2>&3; } 3>&2 2>&1)
    after=$(daemon_cpu)
    # A command may have started it; most threads of the first look have ended.
    if [ "$side" != ext4 ] && [ -z "$daemon" ] && daemon=$(pgrep -f "regfs mount --daemon $store $mnt\$"); then
        after=$(daemon_cpu all)
    fi
    [ "$round" = 0 ] || echo "$row|$side|$wall|$(echo "$user $sys $before $after" | awk '{ print $1 + $2 + $4 - $3 }')" >> "$samples"
}

# The same right after an unmeasured run: what other sides did in between may have cost it its pages.
again() {
    local row=$1 side=$2
    shift 2
    "$@" > /dev/null
    sample "$row" "$side" "$@"
}

median() { sort -g | awk '{ v[NR] = $1 } END { if (NR) print v[int((NR + 1) / 2)] }'; }
# of ROW SIDE wall|cpu
of() { awk -F'|' -v row="$1" -v side="$2" -v field="$([ "$3" = wall ] && echo 3 || echo 4)" '$1 == row && $2 == side { print $field }' "$samples" | median; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f ×", a / b; else printf "–" }'; }
seconds() { awk -v s="$1" 'BEGIN { printf (s < 0.01 ? "%.4f" : "%.3f"), s }'; }

# compare ROW SIDE BESIDE…: a line of the table
compare() {
    local row=$1 side=$2 other what line
    line="| $row | $(seconds "$(of "$row" "$side" wall)") s ($(seconds "$(of "$row" "$side" cpu)") s) |"
    shift 2
    for other in "$@"; do
        line+=" $(seconds "$(of "$row" "$other" wall)") s ($(seconds "$(of "$row" "$other" cpu)") s) |"
        for what in wall cpu; do
            line+=" $(ratio "$(of "$row" "$side" $what)" "$(of "$row" "$other" $what)") |"
        done
    done
    echo "$line"
}

rounds() { seq 0 "$runs"; }

mount_it() {
    "$regfs" mount "$store" "$mnt"
    ls "$mnt/images" > /dev/null
}
pid_of_mount() { jq -r .pid "$mnt/control/status"; }
start() {
    mount_it
    daemon=$(pid_of_mount)
}
end() {
    daemon=''
    "$regfs" umount "$mnt"
}

# The names and sizes of images/ as plain files and symlinks.
make_plain() {
    [ -e "$plain/images" ] && return
    mount_it
    (cd "$mnt" && find images -type d -printf '%p\0') | (cd "$plain" && xargs -0 mkdir -p)
    (cd "$mnt" && find images -type f -printf '%s\0%p\0') | (cd "$plain" && perl -0ne 'chomp; if (defined $s) { open F, ">", $_ or die; truncate F, $s; close F; undef $s } else { $s = $_ }')
    (cd "$mnt" && find images -type l -printf '%l\0%p\0') | (cd "$plain" && perl -0ne 'chomp; if (defined $l) { symlink $l, $_ or die; undef $l } else { $l = $_ }')
    end
    local names
    names=$(cd "$plain" && find images | wc -l)
    echo "$names names below images" >&2
}
walk() { find "$1/images" -printf '%s %p\n'; }
list() { ls -lR "$1/images"; }
# stats DIR CLIENTS
stats() { (cd "$1" && xargs -0 -n 2500 -P "$2" stat -c '%s' < "$work/names"); }
drop_names() { sync; echo 2 > /proc/sys/vm/drop_caches; }

table() { printf '\n%s\n|%s\n' "$1" "$(echo "$1" | tr -cd '|' | sed 's/^|//; s/|/--:|/g; s/--:/---/')"; }

# --- parts ---

part_mount() {
    for round in $(rounds); do
        rm -rf "$store/docker/registry/v2/.regfs/cache"
        sample mount regfs mount_it
        # The cache is written behind the first answer.
        for _ in $(seq 100); do
            [ -n "$(ls "$store/docker/registry/v2/.regfs/cache" 2> /dev/null)" ] && break
            sleep 0.1
        done
        sleep 1
        end
        sample mount "full cache" mount_it
        end
        sample mount floor "$floor" "$store" 2
    done
    table "| until ls answers | regfs | floor, 2 threads | wall | CPU | full cache | wall | CPU |"
    compare "mount" regfs floor "full cache"
}

part_first() {
    make_plain
    for round in $(rounds); do
        start
        sample "first find" regfs walk "$mnt"
        end
        drop_names
        sample "first find" ext4 walk "$plain"
        drop_names
        bindfs "$plain" "$bind"
        daemon=$(pgrep -f "^bindfs $plain")
        sample "first find" bindfs walk "$bind"
        daemon=''
        umount "$bind"
    done
    table "| | regfs | ext4 | wall | CPU | bindfs | wall | CPU |"
    compare "first find" regfs ext4 bindfs
}

part_warm() {
    make_plain
    (cd "$plain" && find images -print0 | shuf -z --random-source=<(yes) > "$work/names")
    start
    bindfs "$plain" "$bind"
    local regfs_pid=$daemon bindfs_pid dir
    bindfs_pid=$(pgrep -f "^bindfs $plain")
    for round in $(rounds); do
        for side in regfs ext4 bindfs; do
            case $side in
                regfs) dir=$mnt daemon=$regfs_pid ;;
                ext4) dir=$plain daemon='' ;;
                bindfs) dir=$bind daemon=$bindfs_pid ;;
            esac
            again "find" $side walk "$dir"
            [ $side = bindfs ] && continue
            again "ls -lR" $side list "$dir"
            again "random stat, 1 client" $side stats "$dir" 1
            again "random stat, 4 clients" $side stats "$dir" 4
        done
    done
    umount "$bind"
    end
    table "| warm | regfs | ext4 | wall | CPU | bindfs | wall | CPU |"
    compare find regfs ext4 bindfs
    for row in "ls -lR" "random stat, 1 client" "random stat, 4 clients"; do
        compare "$row" regfs ext4
    done
}

part_read() {
    local digest data small=$work/read other=$work/other
    "$make_store" "$small" 1 2 > /dev/null
    head -c 1073741824 /dev/urandom > "$work/blob"
    digest=$(sha256sum < "$work/blob" | cut -c1-64)
    data=$small/docker/registry/v2/blobs/sha256/${digest:0:2}/$digest
    mkdir -p "$data" "$other"
    mv "$work/blob" "$data/data"
    chmod -R a+rX "$work"
    chown 65534 "$other"
    chmod 666 /dev/fuse # as udev has it
    "$regfs" mount "$small" "$mnt"
    local with without with_pid without_pid
    setpriv --reuid=65534 --regid=65534 --clear-groups "$regfs" mount "$small" "$other"
    with_pid=$(pid_of_mount)
    without_pid=$(pgrep -f "regfs mount --daemon $small $other")
    with=$(find "$mnt/blobs" -size +1000M)
    without=$(setpriv --reuid=65534 --regid=65534 --clear-groups find "$other/blobs" -size +1000M)
    for round in $(rounds); do
        sample "read 1 GiB" ext4 dd "if=$data/data" bs=1M of=/dev/null status=none
        daemon=$with_pid
        sample "read 1 GiB" passthrough dd "if=$with" bs=1M of=/dev/null status=none
        daemon=$without_pid
        sample "read 1 GiB" "without" setpriv --reuid=65534 --regid=65534 --clear-groups dd "if=$without" bs=1M of=/dev/null status=none
        daemon=''
    done
    umount -l "$other"
    end
    table "| | passthrough | ext4 | wall | CPU |"
    compare "read 1 GiB" passthrough ext4
    table "| | without | ext4 | wall | CPU |"
    compare "read 1 GiB" without ext4
}

part_rm() {
    make_plain
    local repositories=$store/docker/registry/v2/repositories tags repository tag n=0
    # Copies of tags, which then go: the store stays as it is.
    start
    tags=$(cd "$mnt/images" && find . -type l -path '*/_tags/*' | awk 'NR <= 60')
    for tag in $tags; do
        n=$((n + 1))
        cp -P "$mnt/images/$tag" "$(dirname "$mnt/images/$tag")/bench-$n"
        repository=$(dirname "$(dirname "$tag")")
        mkdir -p "$work/tags/$n"
        cp -r "$repositories/$repository/_manifests/tags/bench-$n/." "$work/tags/$n"
    done
    sync
    n=0 round=0
    for tag in $tags; do
        n=$((n + 1))
        [ $n -gt 10 ] && round=1
        sample "rm of a tag" regfs rm "$(dirname "$mnt/images/$tag")/bench-$n"
        sample "rm of a tag" ext4 sh -c "rm -r '$work/tags/$n' && sync '$work/tags'"
    done
    end
    table "| | regfs | rm -r, sync of its directory on ext4 | wall | CPU |"
    compare "rm of a tag" regfs ext4
}

# Gives the one repository of a store COUNT tags.
tag_all() {
    local tags link
    tags=$(find "$1/docker/registry/v2/repositories" -type d -path '*/_manifests/tags' | awk 'NR == 1')
    link=$(find "$tags" -path '*/current/link' | awk 'NR == 1')
    seq -f "$tags/many-%06.0f/current" "$2" | xargs mkdir -p
    # shellcheck disable=SC2016 # perl's variables
    seq -f "$tags/many-%06.0f/current/link" "$2" |
        perl -e 'open L, "<", shift or die; my $link = <L>; while (<STDIN>) { chomp; open F, ">", $_ or die; print F $link; close F }' "$link"
}

part_large() {
    local count dir whole=$store
    for count in 1000 100000; do
        store=$work/large-$count
        "$make_store" "$store" 1 1 > /dev/null
        tag_all "$store" $count
        for round in $(rounds); do
            start
            dir=$(find "$mnt/images" -maxdepth 4 -name _tags -print -prune | awk 'NR == 1')
            sample "first ls -f of $count" regfs ls -f "$dir"
            for _ in $(seq $((100000 / count))); do ls -f "$dir" > /dev/null; done
            sample "warm ls -f of $count" regfs sh -c "for i in \$(seq $((100000 / count))); do ls -f '$dir'; done"
            end
        done
    done
    store=$whole
    table "| | 100,000 tags | 100 × 1,000 tags (first: once) |"
    for row in first warm; do
        echo "| $row ls -f | $(of "$row ls -f of 100000" regfs wall) s ($(of "$row ls -f of 100000" regfs cpu) s) | $(of "$row ls -f of 1000" regfs wall) s ($(of "$row ls -f of 1000" regfs cpu) s) |"
    done
}

part_memory() {
    local blobs
    resident() { awk '/^VmRSS/ { print $2 }' "/proc/$daemon/status"; }
    start
    blobs=$(find "$store/docker/registry/v2/blobs/sha256" -mindepth 2 -maxdepth 2 | wc -l)
    walk "$mnt" > /dev/null
    table "| resident memory of the daemon | kB | bytes for each of $blobs blobs |"
    for finds in 1 10 100; do
        for _ in $(seq $((finds * 9 / 10))); do walk "$mnt" > /dev/null; done
        echo "| after $finds finds | $(resident) | $(($(resident) * 1024 / blobs)) |"
    done
    end
}

for part in "${parts[@]}"; do "part_$part"; done
