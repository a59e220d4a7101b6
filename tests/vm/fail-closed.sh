#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 6 of the contract, fail closed: if the metadata device fails, no write goes untracked: the target turns read-only
# (one way), says so in its status, a kernel message and a uevent, and reads go on.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# turn NAME TABLE: another table for a device in use.
turn() {
	dmsetup load "$1" --table "$2"
	dmsetup suspend --nolockfs --noflush "$1"
	dmsetup resume "$1"
}

meta_writes_fail() { turn frail "0 $frail_sectors flakey $frail_disk 0 0 3600 1 error_writes"; }
meta_fails() { turn frail "0 $frail_sectors error"; }
meta_heals() { turn frail "0 $frail_sectors linear $frail_disk 0"; }

# A managed device whose metadata device can be made to fail: /dev/mapper/frail.
pair_with_frail_metadata() {
	make_pair 32 "$@"
	frail_disk=$meta frail_sectors=$(sectors "$meta")
	make_dm frail "0 $frail_sectors linear $meta 0"
	meta=/dev/mapper/frail
}

# The write of block $1 fails with an I/O error and does not reach the data device.
refused_write() {
	dd if="$data" of=lower.before bs=4k skip="$1" count=1 iflag=direct status=none
	assert_fails stomp write /dev/mapper/fc "$1"
	assert_match "$SAID" "Input/output error" "the error of the write"
	dd if="$data" of=lower.after bs=4k skip="$1" count=1 iflag=direct status=none
	assert_same lower.before lower.after "the data device under a refused write"
}

reads_go_on() {
	dd if=/dev/mapper/fc of=all bs=1M iflag=direct status=none || fail "reads do not go on"
	cmp -n $((managed * 512)) all "$data_file" || fail "reads give something else than the data device has"
}

test_fail_closed_when_a_record_cannot_be_written() {
	pair_with_frail_metadata
	activate fc checkpoint_ms 0
	stomp write /dev/mapper/fc 3 4
	python3 -I -S "$LIB/stomp.py" uevents 60 'DM_NAME=fc.*PRISTINE_MODE=ro|PRISTINE_MODE=ro.*DM_NAME=fc|PRISTINE_MODE=ro' >uevent &
	local listener=$! event
	event=$(dmsetup info -c --noheadings -o events fc)
	eventually 20 test -s uevent
	meta_writes_fail
	expect_dmesg "device is read-only now, changes could not be tracked"
	refused_write 1000
	assert_eq "$(stat_of fc mode)" ro "mode after a failed record"
	# Writes that need no record are refused as well, to dirty blocks and in hot extents.
	refused_write 3
	refused_write 5
	assert_fails blkdiscard -f -o 4096 -l 4096 /dev/mapper/fc
	assert_fails blkdiscard -f -z -o 4096 -l 4096 /dev/mapper/fc
	reads_go_on
	wait "$listener" || fail "no uevent said that the device is read-only"
	[ "$(dmsetup info -c --noheadings -o events fc)" -gt "$event" ] || fail "no device-mapper event was counted"
	assert_fails dmsetup message fc 0 checkpoint
	# One way: a healed device does not make it writable.
	meta_heals
	refused_write 2000
	assert_eq "$(stat_of fc mode)" ro "mode after the device healed"
	[ "$(control stats /dev/mapper/fc refused)" -ge 4 ] || fail "refused writes are not counted"
	# Loaded again, it works, and everything acknowledged before is tracked.
	turn fc "$(table checkpoint_ms 0)"
	assert_eq "$(stat_of fc mode)" rw "mode after the reload"
	stomp write /dev/mapper/fc 1000
	online_dirty fc >dirty
	printf '3 5\n1000 1001\n' >acknowledged
	stomp missing acknowledged dirty >lost
	[ ! -s lost ] || fail "acknowledged, and not tracked after the reload: $(cat lost)"
	deactivate fc
	offline_dirty >runs
	stomp missing acknowledged runs >lost
	[ ! -s lost ] || fail "acknowledged, and not tracked after the removal: $(cat lost)"
}

test_fail_closed_when_a_checkpoint_cannot_be_written() {
	pair_with_frail_metadata
	activate fc checkpoint_ms 0
	stomp write /dev/mapper/fc 100 2000
	meta_writes_fail
	expect_dmesg "device is read-only now"
	assert_fails dmsetup message fc 0 checkpoint
	assert_match "$SAID" "Input/output error"
	assert_eq "$(stat_of fc mode)" ro "mode after a failed checkpoint"
	refused_write 101
	reads_go_on
	deactivate fc
	meta_heals
	printf '100 101\n2000 2001\n' >written
	# The way back: what the failure left is good, or is made so.
	"$PRISTINE" -q device repair "$data" --metadata "$meta" --yes || fail "it cannot be repaired"
	"$PRISTINE" -q device check "$data" --metadata "$meta"
	offline_dirty >dirty
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "lost by a failed checkpoint: $(cat lost)"
	activate fc
	stomp write /dev/mapper/fc 101
}

test_fail_closed_when_the_last_checkpoint_fails() {
	pair_with_frail_metadata
	activate fc checkpoint_ms 0
	stomp write /dev/mapper/fc 100 2000
	meta_writes_fail
	expect_dmesg "device is read-only now"
	# It cannot write the exact map, but it can go, and the log still tells.
	deactivate fc
	meta_heals
	offline_dirty >dirty
	printf '100 101\n2000 2001\n' >written
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "lost by a failed last checkpoint: $(cat lost)"
	activate fc
	assert_eq "$(stat_of fc mode)" rw
}

test_fail_closed_when_the_metadata_device_vanishes() {
	pair_with_frail_metadata
	activate fc checkpoint_ms 100
	stomp write /dev/mapper/fc 100
	meta_fails
	expect_dmesg "device is read-only now"
	refused_write 2000
	reads_go_on
	deactivate fc
	# Not even readable: refused, and not taken for an unformatted device.
	assert_fails dmsetup create fc --table "$(table)"
	assert_match "$SAID" "Input/output error"
	remove_dm fc
	meta_heals
	activate fc
	offline=$(stat_of fc dirty)
	[ "$offline" -ge 1 ] || fail "the write before the failure is lost"
}

# Many writers wait for one record that fails: each gets its error, none hangs, none reaches the disk.
test_fail_closed_with_many_writers_waiting() {
	pair_with_frail_metadata
	activate fc checkpoint_ms 0
	dmsetup suspend --nolockfs frail
	cleanup dmsetup resume frail
	local n pids=() pid
	for n in 1 2 3 4 5 6; do
		dd if=/dev/urandom of=/dev/mapper/fc bs=4k count=1 seek=$((n * 600)) oflag=direct status=none 2>dd."$n" & pids+=($!)
	done
	eventually 30 deferred_writes 6
	dmsetup load frail --table "0 $frail_sectors error"
	# With noflush what waits is sent to the new table.
	dmsetup resume frail
	expect_dmesg "device is read-only now"
	for pid in "${pids[@]}"; do ! wait "$pid" || fail "a write without a record was acknowledged"; done
	for n in 1 2 3 4 5 6; do
		dd if="$data" bs=4k skip=$((n * 600)) count=1 iflag=direct status=none | cmp -n 4096 - /dev/zero || fail "a write without a record reached the data device"
	done
}
deferred_writes() { [ "$(control stats /dev/mapper/fc deferred)" = "$1" ]; }

# An error of the data device is the writer's alone; the block counts as dirty, for nobody knows what it holds.
test_fail_closed_not_for_errors_of_the_data_device() {
	make_pair 32
	local disk=$data
	make_dm frail-data "0 $(sectors "$disk") linear $disk 0"
	data=/dev/mapper/frail-data
	activate fc checkpoint_ms 0
	turn frail-data "0 $(sectors "$disk") flakey $disk 0 0 3600 1 error_writes"
	assert_fails stomp write /dev/mapper/fc 500
	assert_match "$SAID" "Input/output error"
	assert_eq "$(stat_of fc mode)" rw
	turn frail-data "0 $(sectors "$disk") linear $disk 0"
	stomp write /dev/mapper/fc 900
	deactivate fc
	offline_dirty >runs
	assert_runs "500-501 900-901" runs
}

run_tests "$@"
