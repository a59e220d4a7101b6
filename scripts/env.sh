# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Settings that the workbench's scripts share. Sourced, never run.
#
# Settings a user may override in the environment:
#   PRISTINE_CACHE   where downloads and builds live (default: $XDG_CACHE_HOME/pristine)
#   PRISTINE_MIRROR  Debian mirror (default: the one of the host's own apt)
#   PRISTINE_SECURITY_MIRROR  Debian security mirror (default: as above)
#   KREL             kernel release to build for, or its beginning (default: the newest of backports)
#   JOBS             parallel jobs (default: number of CPUs)

set -euo pipefail
umask 022

PRISTINE_TOP=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
PRISTINE_CACHE=${PRISTINE_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/pristine}
JOBS=${JOBS:-$(nproc)}
export PRISTINE_TOP PRISTINE_CACHE JOBS

# Where a host keeps its certificate authorities; commands in the sysroot see the host's bundle,
# so that a network with an authority of its own works there too.
export PRISTINE_CA_BUNDLE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}

pr_note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# pr_die MESSAGE [WHAT-TO-DO...]: says what is wrong and what to do, and ends.
pr_die() {
	printf '%s: error: %s\n' "${0##*/}" "$1" >&2
	shift
	local line
	for line in "$@"; do printf '    %s\n' "$line" >&2; done
	exit 1
}

pr_need_root() {
	[ "$(id -u)" = 0 ] ||
		pr_die "this needs root (it makes a chroot and mounts)" "run it as root: sudo ${0##*/}"
}

# pr_lock NAME: holds the lock NAME of the cache until the script ends. Two checkouts that share a
# cache thus wait for one another instead of building the same thing twice.
pr_lock() {
	local fd
	mkdir -p "$PRISTINE_CACHE/locks"
	exec {fd}>"$PRISTINE_CACHE/locks/$1"
	if ! flock -n "$fd"; then
		pr_note "waiting for another run that holds the lock $PRISTINE_CACHE/locks/$1"
		flock "$fd"
	fi
}

# pr_host_packages COMMAND=PACKAGE...: installs on the host the packages whose command is missing.
pr_host_packages() {
	local pair missing=()
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	command -v apt-get >/dev/null || pr_die "missing on this host: ${missing[*]}" \
		"this is no Debian system (no apt-get); install them by hand"
	pr_need_root
	pr_note "installing on the host: ${missing[*]}"
	DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2 || {
		apt-get update -q >&2
		DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
	} || pr_die "apt-get could not install ${missing[*]}" "install them by hand and run this again"
}

# pr_in_sysroot CMD...: runs a command in the sysroot.
pr_in_sysroot() { "$PRISTINE_TOP/scripts/in-sysroot" "$@"; }

# pr_target_dir: prints this checkout's directory of Cargo builds, and removes those of checkouts that are gone and
# were not built for a week.
pr_target_dir() {
	local all=$PRISTINE_CACHE/target dir other
	dir=$all/$(printf %s "$PRISTINE_TOP" | sha256sum | cut -c1-12)
	if [ ! -e "$dir/checkout" ]; then
		mkdir -p "$dir"
		printf '%s\n' "$PRISTINE_TOP" >"$dir/checkout"
	fi
	touch "$dir/checkout"
	find "$all" -mindepth 2 -maxdepth 2 -name checkout -mtime +7 | while read -r other; do
		[ -e "$(cat "$other")" ] || rm -rf "${other%/*}"
	done
	printf '%s\n' "$dir"
}
