#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The module: in and out again, not while it is in use, and not into another kernel.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

unload_module() { ! grep -q '^dm_pristine ' /proc/modules || rmmod dm_pristine; }

test_lifecycle_in_and_out_again_and_again() {
	local n
	make_pair 16
	for n in 1 2 3 4 5; do
		unload_module
		[ ! -e /dev/pristine ] || fail "/dev/pristine is there without the module"
		activate mo
		[ -c /dev/pristine ] || fail "/dev/pristine is not there"
		stomp write /dev/mapper/mo "$n"
		deactivate mo
	done
	offline_dirty >runs
	assert_runs "1-6" runs
}

test_lifecycle_stays_while_it_is_in_use() {
	make_pair 16
	activate mo
	assert_fails rmmod dm_pristine
	assert_match "$SAID" "in use"
	stomp write /dev/mapper/mo 1
	deactivate mo
	local open
	# An open control device holds it too.
	exec {open}</dev/pristine
	assert_fails rmmod dm_pristine
	exec {open}<&-
	rmmod dm_pristine
}

test_lifecycle_of_another_kernel_is_refused() {
	unload_module
	local release other
	release=$(uname -r)
	# The same length, so that the file stays whole: the last letter becomes another.
	other=${release%?}X
	python3 -I -S -c 'import sys; b = open(sys.argv[1], "rb").read(); w = ("vermagic=" + sys.argv[2]).encode()
assert b.count(w) == 1, b.count(w); open(sys.argv[4], "wb").write(b.replace(w, ("vermagic=" + sys.argv[3]).encode()))' \
		"$PRISTINE_KO" "$release" "$other" wrong.ko
	[[ "$(modinfo -F vermagic ./wrong.ko)" == "$other "* ]] || fail "the version could not be changed"
	assert_fails insmod ./wrong.ko
	assert_match "$SAID" "Invalid module format|Exec format error"
	kernel_said "version magic '${other//+/[+]} .*should be '${release//+/[+]}" || fail "the kernel did not say which kernel the module is for"
	make_pair 16
	# The command line tool says the same in words.
	assert_fails "$PRISTINE" device activate mo "$data" --metadata "$meta" --module "$PWD/wrong.ko"
	assert_match "$SAID" "built for kernel ${other//+/[+]}, this is ${release//+/[+]}" "what device activate says of a module for another kernel"
	! grep -q '^dm_pristine ' /proc/modules || fail "the module for another kernel was loaded"
	"$PRISTINE" device activate mo "$data" --metadata "$meta" --module "$PRISTINE_KO"
	cleanup remove_dm mo
	assert_fails "$PRISTINE" device activate mo "$data" --metadata "$meta"
	stomp write /dev/mapper/mo 4
	"$PRISTINE" device deactivate mo
	offline_dirty >runs
	assert_runs "4-5" runs
}

run_tests "$@"
