#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 1 of the contract, write-ahead: before a write that changes a clean block is sent to the data device, a
# record that this may happen is durable.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# A managed device whose metadata lies on a device that can be held up: /dev/mapper/slow.
pair_with_slow_metadata() {
	make_pair 32
	make_dm slow "0 $(sectors "$meta") linear $meta 0"
	meta=/dev/mapper/slow
	activate wa checkpoint_ms 0
}

# Whether the data device itself holds the stamp of block $1.
holds_stamp() {
	dd if="$data" of=block bs=4k skip="$1" count=1 iflag=direct status=none
	grep -q ENITSIRP block
}

deferred_writes() { [ "$(control stats /dev/mapper/wa deferred)" = "$1" ]; }

test_write_ahead_record_before_data() {
	pair_with_slow_metadata
	stomp write /dev/mapper/wa 5
	dmsetup suspend --nolockfs slow
	cleanup dmsetup resume slow
	# An extent with a live intent costs nothing more.
	timeout 20 python3 -I -S "$LIB/stomp.py" write /dev/mapper/wa 6+3 || fail "a write to a hot extent waits for the metadata"
	stomp write /dev/mapper/wa 1000 &
	local writer=$!
	eventually 20 deferred_writes 2
	# Reads of what is being written go on meanwhile.
	timeout 10 dd if=/dev/mapper/wa of=/dev/null bs=4k skip=1000 count=1 iflag=direct status=none || fail "a read waits for the metadata"
	sleep 1
	! holds_stamp 1000 || fail "the write reached the data device before its record was durable"
	kill -0 "$writer" 2>/dev/null || fail "the write was acknowledged before its record was durable"
	dmsetup resume slow
	wait "$writer"
	holds_stamp 1000 || fail "the write never reached the data device"
	# Power cut: what lies there now, seen by recovery.
	cp "$data_file" cut.data
	cp "$meta_file" cut.meta
	offline_dirty cut.data cut.meta >runs
	assert_runs "0-256 768-1024" runs "extents that may have changed"
	deactivate wa
	offline_dirty >runs
	assert_runs "5-9 1000-1001" runs
}

test_write_ahead_flush_while_record_waits() {
	pair_with_slow_metadata
	dmsetup suspend --nolockfs slow
	cleanup dmsetup resume slow
	# A write with FUA, a discard and a write-zeroes must all wait.
	local pids=() pid
	dd if=/dev/zero of=/dev/mapper/wa bs=4k seek=300 count=1 oflag=direct,dsync status=none conv=notrunc & pids+=($!)
	blkdiscard -f -o $((600 * 4096)) -l $((10 * 4096)) /dev/mapper/wa & pids+=($!)
	blkdiscard -f -z -o $((900 * 4096)) -l $((10 * 4096)) /dev/mapper/wa & pids+=($!)
	sleep 1.5
	for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null || fail "a change was acknowledged before its record was durable"; done
	dmsetup resume slow
	for pid in "${pids[@]}"; do wait "$pid"; done
	deactivate wa
	offline_dirty >runs
	assert_runs "300-301 600-610 900-910" runs
}

run_tests "$@"
