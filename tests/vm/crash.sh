#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# All states that a power cut can leave: data and metadata lie on one disk that dm-log-writes records, and
# pristine-replay (tests/replay) recovers and checks every prefix of the recording, torn writes, and random subsets of
# what was not flushed.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=240
REPLAY=$PRISTINE_TOP/build/userspace/pristine-replay
# Per cent of the operations. With TEST_LONG the recordings are ten times as long; in an emulated machine they are shorter.
LENGTH=100
# shellcheck disable=SC2153
[ "$TEST_LANE" != vm ] || LENGTH=35
[ -z "${TEST_LONG:-}" ] || LENGTH=$((LENGTH * 10)) TEST_TIMEOUT=1800

# recorded_disk MIB META-MIB [OPTION...]: /dev/mapper/recorded, logged to $log_file, with the data device $data and the metadata device
# $meta on it, or, with 0, the metadata in the tail. OPTION is one of `device format`.
recorded_disk() {
	local mib=$1 meta_mib=$2 writes
	shift 2
	make_disk disk $((mib + meta_mib))
	make_disk log 512
	make_dm recorded "0 $(sectors "$disk") linear $disk 0"
	make_dm crash-data "0 $((mib << 11)) linear /dev/mapper/recorded 0"
	data=/dev/mapper/crash-data meta=-
	if [ "$meta_mib" != 0 ]; then
		make_dm crash-meta "0 $((meta_mib << 11)) linear /dev/mapper/recorded $((mib << 11))"
		meta=/dev/mapper/crash-meta
	fi
	# So that a block that was cleared differs from the original.
	head -c "${mib}M" /dev/zero | tr '\0' 'o' >"$data"
	if [ "$meta" = - ]; then
		format_device "$data" - "$@"
		managed=$(managed_sectors "$data" $((mib * 1048576 - 4096)))
	else
		format_device "$data" "$meta" "$@"
		managed=$(managed_sectors "$meta" 0)
	fi
	sync
	cp "$disk_file" before
	data_bytes=$((mib << 20))
	writes="0 $(sectors "$disk") log-writes $disk $log"
	dmsetup load recorded --table "$writes"
	dmsetup suspend recorded
	dmsetup resume recorded
}

# record_and_replay SEED OPERATIONS THREADS KIND SUBSETS HOT-EXTENTS CHECKPOINT-MS [--tail]
record_and_replay() {
	local seed=$1 operations=$2 threads=$3 kind=$4 subsets=$5 hot=$6 ms=$7
	shift 7
	activate crash hot_extents "$hot" checkpoint_ms "$ms"
	python3 -I -S "$LIB/record.py" crash recorded "$seed" $((managed / 8)) $((operations * LENGTH / 100)) "$threads" "$kind" operations
	deactivate crash
	# The log is complete when its device is gone.
	dmsetup load recorded --table "0 $(sectors "$disk") linear $disk 0"
	dmsetup suspend recorded
	dmsetup resume recorded
	"$REPLAY" "$log_file" before "$data_bytes" operations "$seed" "$subsets" "$hot" "$@" >verdict || {
		cat verdict
		fail "states after a power cut break the contract: $(grep -m 1 '^wrong' verdict)"
	}
	cat verdict
	# A check that tried next to nothing is none.
	[ "$(sed -n 's/ states, .*//p' verdict)" -gt $((operations * LENGTH / 100)) ] || fail "too few states"
}

test_write_ahead_and_superset_in_every_crash_state() {
	recorded_disk 24 1 --log-pages 16
	record_and_replay 1 700 1 churn 5 16 100
}

test_write_ahead_and_superset_in_every_crash_state_of_concurrent_writers() {
	recorded_disk 24 1 --log-pages 16
	record_and_replay 2 900 3 churn 5 16 50
}

test_write_ahead_and_superset_in_every_crash_state_with_metadata_in_the_tail() {
	recorded_disk 24 0 --log-pages 16
	record_and_replay 3 500 1 churn 5 32 100 --tail
}

test_flush_in_every_crash_state() {
	# Neither the log nor the hot set gets full.
	recorded_disk 24 4 --log-pages 900
	record_and_replay 4 800 3 flush 3 4096 0
}

run_tests "$@"
