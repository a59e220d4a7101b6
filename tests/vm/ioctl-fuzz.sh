#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# /dev/pristine under random ioctls: numbers, sizes, pointers and contents, from several processes at once, while the
# device is written to, made and removed. The kernel's checkers see what is wrong; what the ioctls answer must keep
# to what rust/shared/abi.rs documents, and nothing may be written outside of the caller's buffers.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

SECONDS_OF_FUZZ=3
[ "${TEST_LONG:-0}" != 1 ] || SECONDS_OF_FUZZ=120
TEST_TIMEOUT=$((SECONDS_OF_FUZZ * 2 + 60))

fuzz() { python3 -I -S "$LIB/ioctl-fuzz.py" "$@"; }

test_ioctl_fuzz_with_io_and_removal() {
	local jobs=() seed n=0 end
	make_pair 16
	activate fz hot_extents 16 checkpoint_ms 10
	seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
	echo "seed $seed"
	for n in 1 2 3; do
		fuzz /dev/mapper/fz "$SECONDS_OF_FUZZ" $((seed + n)) >"fuzz.$n" 2>&1 &
		jobs+=($!)
	done
	# Another device comes and goes meanwhile: LIST and the lookup by number race with that.
	make_disk data2 16
	make_disk meta2 2
	format_device "$data2" "$meta2"
	local managed2
	managed2=$(managed_sectors "$meta2" 0)
	end=$((SECONDS + SECONDS_OF_FUZZ)) n=0
	while [ $SECONDS -lt $end ]; do
		dmsetup create fz2 --table "0 $managed2 pristine $data2 $meta2"
		stomp write /dev/mapper/fz $((n % 4000)) >/dev/null
		remove_dm fz2
		n=$((n + 1))
	done
	for job in "${jobs[@]}"; do
		wait "$job" || { cat fuzz.*; fail "a fuzzer found something, seed $seed"; }
	done
	cat fuzz.*
	assert_eq "$(stat_of fz mode)" rw "mode"
	# The device still tracks: what was written is known, also after it was removed.
	stomp write /dev/mapper/fz 4001
	deactivate fz
	offline_dirty >runs
	grep -q . runs || fail "nothing is dirty"
	awk '$1 <= 4001 && 4001 < $2 {found = 1} END {exit !found}' runs || fail "block 4001 is not dirty"
}

run_tests "$@"
