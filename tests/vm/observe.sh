#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# What can be seen of a managed device from outside: tracepoints, counters in debugfs, events, messages that do not
# flood the log, and what an integrity measurement gets.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TRACING=/sys/kernel/tracing
DEBUG=/sys/kernel/debug/pristine

# A managed device whose metadata device can be made to fail: /dev/mapper/frail.
activate_frail() {
	make_pair 16
	local disk=$meta
	make_dm frail "0 $(sectors "$disk") linear $disk 0"
	frail_error="0 $(sectors "$disk") error"
	meta=/dev/mapper/frail
	activate ob checkpoint_ms 0
}

break_metadata() {
	dmsetup load frail --table "$frail_error"
	dmsetup suspend --nolockfs --noflush frail
	dmsetup resume frail
}

# number_of NAME: major,minor as tracepoints print it.
number_of() { dmsetup info -c --noheadings --separator , -o major,minor "$1"; }

test_observe_tracepoints() {
	local event dev
	load_module
	for event in map commit checkpoint_begin checkpoint_end fail; do
		[ -e $TRACING/events/pristine/pristine_$event/format ] || fail "there is no tracepoint pristine_$event"
	done
	activate_frail
	dev=$(number_of ob)
	echo 0 >$TRACING/events/pristine/enable
	: >$TRACING/trace
	stomp write /dev/mapper/ob 1
	! grep -q pristine_ $TRACING/trace || fail "tracepoints that are off left something"
	echo 1 >$TRACING/events/pristine/enable
	cleanup eval "echo 0 >$TRACING/events/pristine/enable"
	# Hot; cold; cold and not to wait.
	stomp write /dev/mapper/ob 2 700
	stomp nowait /dev/mapper/ob 3000
	dd if=/dev/mapper/ob of=/dev/null bs=4k count=1 skip=9 iflag=direct status=none
	blkdiscard -f -o $((1200 * 4096)) -l 4096 /dev/mapper/ob
	dmsetup message ob 0 checkpoint >seq
	break_metadata
	expect_dmesg "device is read-only now"
	assert_fails stomp write /dev/mapper/ob 3500
	echo 0 >$TRACING/events/pristine/enable
	grep pristine_ $TRACING/trace >seen
	assert_match "$(cat seen)" "pristine_map: $dev write 16 \+ 8 flags=.*: remap" "the hot write"
	assert_match "$(cat seen)" "pristine_map: $dev write 5600 \+ 8 flags=.*: defer" "the cold write"
	assert_match "$(cat seen)" "pristine_commit: $dev record=[0-9]+ extents=1" "its record"
	assert_match "$(cat seen)" "pristine_map: $dev write 5600 \+ 8 flags=.*: release" "the cold write, later"
	assert_match "$(cat seen)" "pristine_map: $dev write 24000 \+ 8 flags=.*nowait.*: again" "the write that must not wait"
	assert_match "$(cat seen)" "pristine_map: $dev read 72 \+ 8 flags=.*: remap" "the read"
	assert_match "$(cat seen)" "pristine_map: $dev discard 9600 \+ 8 flags=.*: defer" "the discard"
	assert_match "$(cat seen)" "pristine_checkpoint_begin: $dev hot=3 log=3" "the begin of the checkpoint"
	assert_match "$(cat seen)" "pristine_checkpoint_end: $dev checkpoint=$(cat seq) error=0" "the end of the checkpoint"
	assert_match "$(cat seen)" "pristine_map: $dev write 28000 \+ 8 flags=.*: error" "the write that was refused"
	assert_match "$(cat seen)" "pristine_fail: $dev writing the log failed" "the failure"
	# In their order.
	assert_eq "$(grep -oE '5600 .*(defer|release)|record=' seen | head -n 3 | sed 's/.*: //' | tr '\n' ' ')" "defer record= release "
}

# counter NAME FILE
counter() { awk -v name="$1" '$1 == name { print $2 }' "$DEBUG/$(dm_node)/${2:-counters}"; }
dm_node() { echo "dm-$(dmsetup info -c --noheadings -o minor ob)"; }

test_observe_counters_in_debugfs() {
	activate_frail
	stomp write /dev/mapper/ob 1 2 700
	assert_eq "$(counter deferred) $(counter records) $(counter intents)" "2 2 2" "deferred, records and intents"
	assert_eq "$(counter mode state) $(counter dirty state) $(counter hot state)" "rw 3 2"
	dmsetup message ob 0 checkpoint
	assert_eq "$(counter checkpoints) $(counter hot state)" "1 0" "checkpoints"
	assert_eq "$(counter meta_bytes)" "$(control stats /dev/mapper/ob meta_bytes)" "bytes of metadata"
	# The files are the active table's, also while another is loaded; and they outlast it.
	dmsetup load ob --table "$(table hot_extents 64)"
	assert_eq "$(counter hot_limit state)" 256
	dmsetup suspend ob
	assert_eq "$(cat "$DEBUG/$(dm_node)/state")" "" "the state of a suspended device"
	dmsetup resume ob
	assert_eq "$(counter hot_limit state)" 64
	dmsetup load ob --table "$(table)"
	dmsetup clear ob
	assert_eq "$(counter hot_limit state)" 64
	break_metadata
	expect_dmesg "device is read-only now"
	assert_fails stomp write /dev/mapper/ob 3000
	assert_eq "$(counter mode state) $(counter refused)" "ro 1"
	deactivate ob
	[ ! -e $DEBUG ] || fail "the files outlast their device"
}

test_observe_events() {
	activate_frail
	dmsetup wait ob &
	local waiter=$!
	cleanup stop $waiter
	python3 -I -S "$LIB/stomp.py" uevents 60 "/$(dm_node) .*DM_NAME=ob .*PRISTINE_MODE=ro|PRISTINE_MODE=ro.*DM_NAME=ob|/$(dm_node) .*PRISTINE_MODE=ro" >uevent &
	local listener=$!
	eventually 20 test -s uevent
	eventually 20 grep -q . "/proc/$waiter/wchan"
	break_metadata
	expect_dmesg "device is read-only now"
	assert_fails stomp write /dev/mapper/ob 3000
	wait $waiter || fail "dmsetup wait failed"
	wait $listener || fail "no uevent said that the device is read-only"
}

test_observe_messages_are_rate_limited() {
	activate_frail
	break_metadata
	expect_dmesg "device is read-only now"
	local n
	fio --name=refused --filename=/dev/mapper/ob --rw=randwrite --bs=4k --direct=1 --ioengine=psync --number_ios=300 --size=8M \
		--continue_on_error=all --output=fio.log || true
	for n in {1..30}; do dmsetup message ob 0 nonsense 2>/dev/null || true; done
	[ "$(counter refused)" -ge 300 ] || fail "$(counter refused) writes were refused"
	n=$(messages_since_begin | grep -cE 'write refused|unknown message')
	[ "$n" -ge 1 ] || fail "a write was refused, and the kernel did not say so"
	# Ten in five seconds; this takes far less than half a minute.
	[ "$n" -le 60 ] || fail "330 errors made $n messages"
}

test_observe_ima_measures_the_table() {
	local ima=/sys/kernel/security/ima uuid
	[ -d /sys/kernel/security ] || skip "this kernel has no securityfs"
	mount -t securityfs securityfs /sys/kernel/security 2>/dev/null || true
	[ -d $ima ] || skip "this kernel has no IMA"
	# The policy can be written once, or again and again where the kernel allows that.
	echo 'measure func=CRITICAL_DATA label=device-mapper template=ima-buf' >$ima/policy || skip "IMA's policy cannot be changed here"
	make_pair 16
	activate ob
	uuid=$(meta_tool get "$meta" meta_uuid)
	grep -E 'dm_table_load' $ima/ascii_runtime_measurements | awk '{ print $NF }' | tail -n 1 |
		python3 -I -S -c 'import sys; sys.stdout.buffer.write(bytes.fromhex(sys.stdin.read()))' >measured
	assert_match "$(tr -d '\0' <measured)" "target_name=pristine,target_version=[0-9.]+,data_device=[0-9]+:[0-9]+,metadata_device=[0-9]+:[0-9]+,meta_uuid=$uuid,image=0*;" \
		"the measurement of the table"
}

run_tests "$@"
