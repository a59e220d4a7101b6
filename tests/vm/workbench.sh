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

run_tests "$@"
