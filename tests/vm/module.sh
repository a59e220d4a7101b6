#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The module on the unmodified kernel, in a machine made by virtme-ng (with udev running).
#
# runs-on: vng

. "${0%/*}/../lib/scenario.sh"

test_module_loads_and_registers_its_target() {
	load_module
	assert_match "$(dmsetup targets)" '^pristine +v[0-9]+\.[0-9]+\.[0-9]+' "the targets"
	[ -c /dev/pristine ] || fail "there is no /dev/pristine"
	rmmod dm_pristine
	[ ! -e /dev/pristine ] || fail "/dev/pristine is still there"
	load_module
}

test_module_is_for_this_very_kernel() {
	local vermagic
	vermagic=$(modinfo -F vermagic "$PRISTINE_KO")
	assert_eq "${vermagic%% *}" "$(uname -r)" "the module's kernel release"
}

test_module_of_another_kernel_is_refused() {
	local other=$WORK/other.ko release
	release=$(uname -r)
	# The same module, but built for a kernel of another name (of the same length).
	sed "s/vermagic=${release//./\\.}/vermagic=9${release:1}/" "$PRISTINE_KO" >"$other"
	! cmp -s "$other" "$PRISTINE_KO" || fail "the version could not be changed"
	rmmod dm_pristine 2>/dev/null || true
	assert_fails insmod "$other"
	assert_match "$SAID" 'Invalid module format' "insmod"
	kernel_said "version magic '9.*' should be '${release//+/[+]}" || fail "the kernel did not say why"
}

run_tests "$@"
