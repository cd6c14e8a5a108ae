# shellcheck shell=bash
# Sourced by the other scripts: installs Debian packages for programs that are not there.

# Says what is wrong and ends the script.
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root, through sudo where we are not.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo > /dev/null; then
        sudo "$@"
    else
        fail "needs root to run: $* (run it as root, or install sudo)"
    fi
}

# need PROGRAM=PACKAGE…: installs the packages of the programs that are missing.
need() {
    local pair missing=()
    # Some programs live where only root's PATH leads.
    PATH=$PATH:/usr/sbin:/sbin
    for pair in "$@"; do
        command -v "${pair%%=*}" > /dev/null || missing+=("${pair#*=}")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get > /dev/null || fail "please install ${missing[*]} (this machine has no apt-get)"
    echo "Installing ${missing[*]}" >&2
    as_root apt-get update -qq || fail "apt-get update failed, see above"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null ||
        fail "could not install ${missing[*]}, see above"
    case " ${missing[*]} " in
        *" docker-registry "*)
            # The package starts a registry on port 5000; nobody asked for that.
            if [ -d /run/systemd/system ]; then as_root systemctl disable --now --quiet docker-registry; fi
            ;;
    esac
}

# A Rust toolchain, which no package of Debian's stable release is new enough for.
need_rust() {
    command -v cargo > /dev/null || fail "there is no cargo in PATH: install Rust (https://rustup.rs), then run this again"
}

# A kernel that mounts FUSE filesystems for us.
need_fuse() {
    [ -e /dev/fuse ] ||
        fail "there is no /dev/fuse, so nothing can be mounted (try 'modprobe fuse'; in a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    if [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; then
        fail "/dev/fuse is not readable and writable for $(id -un), so nothing can be mounted (run this as root)"
    fi
}
