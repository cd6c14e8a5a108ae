#!/usr/bin/env bash
# Checks everything: installs what the tests need, then format, lints, docs and every test.
#
# Usage: scripts/test.sh [arguments for cargo test]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/install.sh
. scripts/install.sh

need_rust
need cc=gcc fusermount3=fuse3 docker-registry=docker-registry redis-server=redis-server skopeo=skopeo umoci=umoci setpriv=util-linux mkfs.ext4=e2fsprogs mount=mount unshare=util-linux strace=strace openssl=openssl faketime=faketime
need_fuse
for component in fmt clippy; do
    cargo "$component" --version > /dev/null 2>&1 || fail "cargo $component is missing: run 'rustup component add rustfmt clippy'"
done

# Everything is there: a test that finds something missing now fails instead of being skipped.
export CI=true

step() {
    echo
    echo "== $*"
    "$@"
}

step cargo fmt --check
step cargo clippy --locked --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --locked --no-deps --document-private-items
if command -v shellcheck > /dev/null; then step shellcheck -x scripts/*.sh .ci/run; fi
step cargo test --locked "$@"
echo
echo "Everything passed in $SECONDS seconds."
