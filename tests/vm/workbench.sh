#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The workbench's own promises.
#
# runs-on: host

. "${0%/*}/../lib/scenario.sh"

# A cache of its own that shares the sysroot, the packages and the sources of the real one.
setup() {
	local entry real=$PRISTINE_CACHE
	REAL_CACHE=$real
	release=$("$PRISTINE_TOP/scripts/kernel-metadata" --release)
	export PRISTINE_CACHE=$WORK/cache
	mkdir -p "$PRISTINE_CACHE" "$WORK/bin"
	for entry in "$real"/sysroot-* "$real/debs" "$real/src"; do ln -s "$entry" "$PRISTINE_CACHE/"; done
	PATH=$WORK/bin:$PATH
}

test_wrong_rustc_is_refused_by_name() {
	printf '#!/bin/sh\necho "rustc 1.42.0 (0123456789 2020-03-09)"\n' >"$WORK/bin/rustc"
	chmod +x "$WORK/bin/rustc"
	assert_fails env KREL="$release" "$PRISTINE_TOP/scripts/kernel-metadata"
	assert_match "$SAID" 'error: wrong rustc for the kernel' "the message"
	assert_match "$SAID" 'needed: rustc [0-9.]+ ' "the one that is needed"
	assert_match "$SAID" 'found: +rustc 1\.42\.0' "the one that was found"
	[ ! -e "$PRISTINE_CACHE/kernels/$release/.complete" ] || fail "the kernel counts as ready"
}

test_unknown_kernel_is_refused_with_a_hint() {
	# Without a network the list of packages cannot be refreshed, which must not matter.
	printf '#!/bin/sh\nexit 100\n' >"$WORK/bin/apt-get"
	chmod +x "$WORK/bin/apt-get"
	assert_fails env KREL=9.9.9+nothing "$PRISTINE_TOP/scripts/kernel-metadata"
	assert_match "$SAID" 'no package linux-modules-9\.9\.9' "the message"
	assert_match "$SAID" '--list' "what to do"
}

test_half_made_build_tree_does_not_count() {
	mkdir -p "$PRISTINE_CACHE/kernels/$release/build"
	touch "$PRISTINE_CACHE/kernels/$release/build/half"
	# Stopped right after it began anew: the compiler does not answer.
	printf '#!/bin/sh\nexit 1\n' >"$WORK/bin/rustc"
	chmod +x "$WORK/bin/rustc"
	assert_fails env KREL="$release" "$PRISTINE_TOP/scripts/kernel-metadata"
	[ ! -e "$PRISTINE_CACHE/kernels/$release/build/half" ] || fail "the half-made tree was kept"
	[ ! -e "$PRISTINE_CACHE/kernels/$release/.complete" ] || fail "the kernel counts as ready"
}

# What make install puts somewhere: all of it, and it works there.
test_install_into_a_staged_root() {
	local stage=$WORK/stage file
	# The kernel's tree and the programs are those of the real cache; what is under test is where they go.
	export PRISTINE_CACHE=$REAL_CACHE
	"$PRISTINE_TOP/scripts/install" "$stage" /usr
	for file in usr/sbin/pristine usr/sbin/pristine-initramfs usr/lib/pristine/pristine-agent \
		"lib/modules/$release/updates/dm-pristine.ko" etc/initramfs-tools/hooks/pristine \
		etc/initramfs-tools/scripts/local-top/pristine; do
		[ -s "$stage/$file" ] || fail "$file was not installed"
	done
	"$stage/usr/sbin/pristine" --version
	# On the machine itself: a root that has the stock kernel and what was installed, and nothing of the checkout.
	mkdir -p "$stage"/{proc,dev,tmp,etc/pristine} "$stage/usr/lib/python3"
	for file in bin lib64 lib/x86_64-linux-gnu usr/bin usr/lib/x86_64-linux-gnu usr/lib/python3 usr/lib/python3.13; do
		mkdir -p "$stage/$file"
	done
	cp -a "$REAL_CACHE/kernels/$release/modules/lib/modules/$release/." "$stage/lib/modules/$release/"
	echo 'pristine.image=lab' >"$stage/etc/pristine/agent.conf"
	# shellcheck disable=SC2016
	unshare --mount --propagation private sh -ec '
		stage=$1 release=$2
		for dir in bin lib64 usr/bin usr/lib/x86_64-linux-gnu usr/lib/python3 usr/lib/python3.13 proc; do
			mount --bind "/$dir" "$stage/$dir"
		done
		mount --bind /usr/lib/x86_64-linux-gnu "$stage/lib/x86_64-linux-gnu"
		chroot "$stage" depmod "$release" 2>/dev/null || depmod -b "$stage" "$release"
		chroot "$stage" /usr/sbin/pristine-initramfs --release "$release" --conf /etc/pristine/agent.conf --output /tmp/initrd
	' sh "$stage" "$release"
	cpio -t <"$stage/tmp/initrd" >"$WORK/listing"
	for file in init bin/busybox etc/pristine/agent.conf lib/pristine/dm-pristine.ko lib/pristine/dm-mod.ko; do
		grep -qx "$file" "$WORK/listing" || fail "the initramfs has no $file"
	done
}

run_tests "$@"
