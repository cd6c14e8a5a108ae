#!/usr/bin/env bash
# Builds regfs and mounts a registry's storage: yours, or without arguments a small sample.
#
# Usage: scripts/start.sh [STORE] [MOUNTPOINT]
#   STORE       the registry's rootdirectory, or its config.yml
#   MOUNTPOINT  a directory; made if it is missing
# May be run again at any time; it then mounts what it built anew.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/install.sh
. "$here/scripts/install.sh"

case ${1-} in
    -h | --help)
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    -*) fail "there is no option $1; see --help" ;;
esac
[ $# -le 2 ] || fail "expected at most STORE and MOUNTPOINT, got: $*"

# Where the sample and default mountpoints live; somewhere else when there is no home to write to.
cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
mkdir -p "$cache/regfs-sample" 2> /dev/null || cache=$(mktemp -d)

need_rust
need cc=gcc fusermount3=fuse3
need_fuse
echo "Building regfs" >&2
# From its own directory: cargo finds its settings there.
(cd "$here" && cargo build --release --locked --quiet) || fail "the build failed, see above"
target=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-target}}
case $target in /*) ;; *) target=$here/$target ;; esac
regfs=$target/release/regfs

if [ $# = 0 ]; then
    store=$cache/regfs-sample/store
    mountpoint=$cache/regfs-sample/mnt
    if [ ! -d "$store/docker/registry/v2" ]; then
        "$regfs" sample "$store" || fail "could not make a sample store in $store"
        echo "Made a sample store in $store" >&2
    fi
else
    store=$1
    mountpoint=${2:-$cache/regfs-mount}
    [ -e "$store" ] || fail "there is no $store"
fi

# What is mounted there, if anything. A dead mount answers neither stat nor mkdir, so ask the kernel's table.
mounted=$(findmnt --noheadings --output FSTYPE --mountpoint "$mountpoint" 2> /dev/null | tail -n 1 || true)
case $mounted in
    # Where this fails regfs mount says why, or cleans up what a crash of its own left there.
    "") mkdir -p "$mountpoint" 2> /dev/null || true ;;
    *regfs*)
        echo "Unmounting the regfs that is on $mountpoint" >&2
        "$regfs" umount "$mountpoint" || fail "could not unmount $mountpoint"
        ;;
    *) fail "a filesystem of type $mounted is mounted on $mountpoint already" ;;
esac
"$regfs" mount "$store" "$mountpoint" || fail "could not mount $store on $mountpoint, see above"

# tree DIRECTORY DEPTH: what is below it, without a program that may not be there.
tree() {
    (cd "$1" && find . -mindepth 1 -maxdepth "$2" ! -path '*/_manifests/*' -printf '%P\t%y\t%l\n') | LC_ALL=C sort |
        awk -F '\t' '{
            depth = gsub("/", "/", $1); name = $1; sub(".*/", "", name)
            line = sprintf("%*s%s%s", 4 + 4 * depth, "", name, $2 == "d" ? "/" : "")
            if ($2 == "l") { sub(".*/manifests/", "…/manifests/", $3); line = line " -> " $3 }
            if (NR <= 50) print line
        } END { if (NR > 50) printf "    … and %d more\n", NR - 50 }'
}

# The first tag that leads somewhere.
tag=$(find "$mountpoint/images" -path '*/_tags/*' -type l ! -xtype l -print -quit)
tag=${tag:-$mountpoint/images/REPOSITORY/_tags/TAG}
repository=${tag%/_tags/*}
quoted() { printf '%q' "$1"; }

cat << EOT

$store is mounted on $mountpoint:

$(tree "$mountpoint" 2)

And in $mountpoint/images:

$(tree "$mountpoint/images" 5)

Five things to try:

1. Tags are symlinks to images, and their times are those of the pushes; an image is a directory of real files.
     ls -l $(quoted "$repository/_tags")
     ls -R $(quoted "$tag/")
     cat $(quoted "$tag/manifest.json")

2. What is garbage, and how much is it?
     cat $(quoted "$mountpoint/reachability/summary")
     du -sh $(quoted "$mountpoint/reachability/unreachable")
     find $(quoted "$mountpoint/blobs") -type f -links 1

3. Delete an image; the deletion waits in the trash.
     rm $(quoted "$repository:${tag##*/}")
     ls $(quoted "$mountpoint/trash")

4. Take it back, with the name that ls gave.
     echo "undo NAME" > $(quoted "$mountpoint/control/trash")
     ls $(quoted "$repository/_tags")

5. See what a sweep would take, and sweep; without grace=0 what is younger than a day is left alone. registry-stopped
   takes all of it at once; leave it out while a registry runs, and see README.md.
     echo "dry-run grace=0 registry-stopped" > $(quoted "$mountpoint/control/gc"); cat $(quoted "$mountpoint/control/gc")
     echo "sweep grace=0 registry-stopped" > $(quoted "$mountpoint/control/gc"); cat $(quoted "$mountpoint/control/gc")

To unmount: $(quoted "$regfs") umount $(quoted "$mountpoint")
EOT
