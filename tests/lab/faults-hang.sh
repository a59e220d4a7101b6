#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 6 of the contract with a metadata device that does not answer for a while, or that is gone for ever: nobody but those
# who need it waits for it, and nobody waits when it is gone.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# A managed device `hang`, with a dirty block 3, whose metadata device /dev/mapper/frail can be made to stop.
hanging_device() {
	make_pair 16
	frail_sectors=$(sectors "$meta")
	make_dm frail "0 $frail_sectors linear $meta 0"
	frail_disk=$meta meta=/dev/mapper/frail
	activate hang checkpoint_ms 0
	stomp write /dev/mapper/hang 3
}

stop_answering() {
	dmsetup suspend --nolockfs frail
	cleanup dmsetup resume frail
}

# soon COMMAND...: it must not wait for the metadata device.
soon() { timeout 40 "$@" || fail "it failed or waits for a device that it does not need: $*"; }

still_runs() { [ -d "/proc/$1" ] || fail "$2"; }

test_fail_closed_hanging_metadata_holds_up_nobody_else() {
	hanging_device
	stop_answering
	"$PRISTINE" -q device checkpoint hang >checkpoint.said 2>&1 &
	local waiting=$!
	sleep 0.5
	still_runs $waiting "the checkpoint does not wait for its metadata"
	# The device itself answers, reads, and writes what needs no record.
	soon dmsetup status hang
	soon python3 -I -S "$LIB/control.py" stats /dev/mapper/hang dirty
	soon python3 -I -S "$LIB/stomp.py" write /dev/mapper/hang 3
	soon dd if=/dev/mapper/hang of=/dev/null bs=64k count=4 iflag=direct status=none
	# Others come, work and go.
	make_disk data 16
	make_disk meta 2
	format_device "$data" "$meta"
	soon dmsetup create other --table "$(table checkpoint_ms 0)"
	cleanup remove_dm other
	soon python3 -I -S "$LIB/stomp.py" write /dev/mapper/other 900
	soon "$PRISTINE" -q device checkpoint other
	soon python3 -I -S "$LIB/control.py" dirty /dev/mapper/other
	soon dmsetup remove other
	still_runs $waiting "the checkpoint ended without its metadata"
	dmsetup resume frail
	wait $waiting || fail "the checkpoint failed: $(cat checkpoint.said)"
	assert_eq "$(stat_of hang mode)" rw "mode after the wait"
}

test_fail_closed_suspend_and_removal_wait_for_hanging_metadata() {
	hanging_device
	stop_answering
	python3 -I -S "$LIB/stomp.py" write /dev/mapper/hang 2000 &
	local writer=$! suspend
	eventually 20 deferred_some
	dmsetup suspend --nolockfs hang &
	suspend=$!
	sleep 0.5
	still_runs $suspend "the suspend did not wait for the write that waits for its record"
	soon dmsetup status hang
	dmsetup resume frail
	wait $writer || fail "the write failed"
	wait $suspend || fail "the suspend failed"
	dmsetup resume hang
	online_dirty hang >dirty
	printf '3 4\n2000 2001\n' >written
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "lost by waiting: $(cat lost)"
	# The last checkpoint waits as well, and is exact then.
	dmsetup suspend --nolockfs frail
	dmsetup remove hang &
	suspend=$!
	sleep 0.5
	still_runs $suspend "the removal did not wait for the last checkpoint"
	dmsetup resume frail
	wait $suspend || fail "the removal failed"
	offline_dirty >dirty
	assert_runs "3-4 2000-2001" dirty
}
deferred_some() { [ "$(control stats /dev/mapper/hang deferred)" -ge 2 ]; }

# A slow metadata device only makes things slow.
test_fail_closed_not_for_slow_metadata() {
	hanging_device
	dmsetup load frail --table "0 $frail_sectors delay $frail_disk 0 0 $frail_disk 0 300"
	dmsetup suspend --nolockfs frail
	dmsetup resume frail
	stomp write /dev/mapper/hang 1000 2000
	dmsetup message hang 0 checkpoint
	assert_eq "$(stat_of hang mode)" rw "mode with a slow metadata device"
	deactivate hang
	offline_dirty >dirty
	assert_runs "3-4 1000-1001 2000-2001" dirty
}

# The disk is pulled: it does not come back as long as anybody holds it.
test_fail_closed_when_the_metadata_disk_is_pulled() {
	make_disk data 16
	null_disk meta 2
	format_device "$data" "$meta"
	managed=$(dd if="$meta" bs=4k count=1 iflag=direct status=none | od -An -tu8 -j88 -N8 | tr -d ' ')
	activate gone checkpoint_ms 0
	stomp write /dev/mapper/gone 3
	echo 0 >/sys/kernel/config/nullb/pristine-meta/power
	expect_dmesg "device is read-only now"
	assert_fails timeout 40 python3 -I -S "$LIB/stomp.py" write /dev/mapper/gone 2000
	assert_match "$SAID" "Input/output error" "the error of a write"
	assert_eq "$(stat_of gone mode)" ro "mode without the disk"
	soon dd if=/dev/mapper/gone of=/dev/null bs=64k count=4 iflag=direct status=none
	assert_fails timeout 40 "$PRISTINE" -q device checkpoint gone
	soon dmsetup remove gone
}

run_tests "$@"
