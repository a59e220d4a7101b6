#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 6 of the contract, systematically: the n-th I/O of the metadata device, of the data device, and the n-th allocation
# of the module fail, for every n and every operation. Needs the lab kernel's fault injection.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"
TEST_TIMEOUT=$([ "${TEST_LONG:-0}" = 1 ] && echo 900 || echo 240)

# faults KIND: with a fresh pair of small disks. Without TEST_LONG=1 not every n is tried.
faults() {
	make_disk data 32
	make_disk meta 1
	format_device "$data" "$meta"
	load_module
	cleanup remove_dm faults
	local args=("$1" "$data" "$meta" "$data_file" "$meta_file")
	[ "${TEST_LONG:-0}" = 1 ] || args+=(quick)
	WORK=$WORK python3 -I -S "$LIB/faults.py" "${args[@]}"
}

test_fail_closed_at_every_io_of_the_metadata_device() { faults meta; }

test_fail_closed_at_every_page_of_the_metadata() { faults pages; }

test_fail_closed_not_at_any_io_of_the_data_device() { faults data; }

test_fail_closed_not_for_want_of_memory() {
	[ "${TEST_LONG:-0}" = 1 ] || skip "takes long: TEST_LONG=1"
	faults memory
}

run_tests "$@"
