#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# What device-mapper expects of a target: tables, status, messages, suspend, resume, reload and removal, also under load.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

test_target_table_and_status_round_trip() {
	make_pair 16
	load_module
	assert_match "$(dmsetup targets)" '^pristine +v1\.'
	local uuid line features
	uuid=$(meta_tool get "$meta" meta_uuid)
	for features in "" "hot_extents 64" "checkpoint_ms 0" "hot_extents 64 checkpoint_ms 1000 meta_uuid $uuid generation 0"; do
		# shellcheck disable=SC2086
		activate tr $features
		line=$(dmsetup table tr)
		assert_match "$line" "^0 $managed pristine [0-9]+:[0-9]+ [0-9]+:[0-9]+${features:+ [0-9] $features}\$"
		# What it prints, it takes; and prints the same again.
		dmsetup load tr --table "$line"
		dmsetup suspend tr
		dmsetup resume tr
		assert_eq "$(dmsetup table tr)" "$line" "the table after a reload of itself"
		deactivate tr
	done
	activate tr
	assert_match "$(dmsetup status tr)" "^0 $managed pristine rw 4096 1048576 0/$((managed / 8)) 0 0/256 0/16 [0-9]+ 0 - $uuid\$"
	assert_eq "$(dmsetup deps tr | grep -o '([^)]*)' | wc -l)" 2 "devices that it depends on"
}

# refused ERRNO-TEXT KERNEL-REGEX WORD...
refused() {
	local errno=$1 kernel=$2
	shift 2
	assert_fails dmsetup create tr --table "0 $managed pristine $*"
	assert_match "$SAID" "$errno" "the error for: $*"
	kernel_said "$kernel" || fail "the kernel did not say '$kernel' to: $*"
}

test_target_refuses_nonsense_tables() {
	make_pair 16
	load_module
	local d=$data m=$meta
	refused "Invalid argument" "Need a data device and a metadata device" ""
	refused "Invalid argument" "Need a data device and a metadata device" "$d"
	refused "Invalid argument" "Feature word count does not match" "$d $m x"
	refused "Invalid argument" "Feature word count does not match" "$d $m 2"
	refused "Invalid argument" "Feature word count does not match" "$d $m 4 hot_extents 64"
	refused "Invalid argument" "Feature word count does not match" "$d $m 0 hot_extents 64"
	refused "Invalid argument" "Feature word count does not match" "$d $m -2 hot_extents 64"
	refused "Invalid argument" "Unknown feature" "$d $m 2 colour red"
	refused "Invalid argument" "Feature without value or given twice" "$d $m 1 hot_extents"
	refused "Invalid argument" "Feature without value or given twice" "$d $m 4 hot_extents 64 hot_extents 64"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 hot_extents 15"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 hot_extents 65537"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 hot_extents 18446744073709551616"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 checkpoint_ms 3600001"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 image 12"
	refused "Invalid argument" "Feature value out of range" "$d $m 2 meta_uuid zz0102030405060708090a0b0c0d0e0f"
	refused "Invalid argument|No such" "Cannot open the data device" "/dev/nowhere $m"
	refused "Invalid argument|No such" "Cannot open the metadata device" "$d /dev/nowhere"
	refused "Block device required" "Cannot open the data device" "/etc/passwd $m"
	# Bytes that are no UTF-8.
	refused "Invalid argument" "not valid UTF-8" "$d $m 2 image $(printf '\377\376')"
	# It wants the table for itself.
	assert_fails dmsetup create tr --table "0 $managed pristine $d $m
$managed 8 zero"
	# After all of it, it still works.
	activate tr
}

test_target_messages() {
	make_pair 16
	activate tr checkpoint_ms 0
	local before
	before=$(stat_of tr checkpoint)
	stomp write /dev/mapper/tr 1
	assert_eq "$(stat_of tr hot)" 1
	assert_eq "$(dmsetup message tr 0 checkpoint)" $((before + 1)) "the answer to checkpoint"
	assert_eq "$(stat_of tr checkpoint)" $((before + 1))
	assert_eq "$(stat_of tr hot)" 0 "hot extents after an exact checkpoint"
	assert_eq "$(stat_of tr log)" 0 "records in the log after an exact checkpoint"
	local words
	for words in "nonsense" "checkpoint now" "CHECKPOINT"; do
		# shellcheck disable=SC2086
		assert_fails dmsetup message tr 0 $words
		assert_match "$SAID" "Invalid argument"
	done
	assert_eq "$(stat_of tr checkpoint)" $((before + 1))
	dmsetup suspend tr
	assert_fails dmsetup message tr 0 checkpoint
	dmsetup resume tr
	dmsetup message tr 0 checkpoint
}

test_target_checkpoints_come_by_themselves() {
	make_pair 16
	activate tr checkpoint_ms 200
	stomp write /dev/mapper/tr 1
	# Twice: one that finds the extent used, one that finds it unused.
	eventually 20 is_cold
	cp "$meta_file" cut.meta
	offline_dirty "$data_file" cut.meta >runs
	assert_runs "1-2" runs "without any command"
}
is_cold() { [ "$(stat_of tr hot)/$(stat_of tr log)" = 0/0 ]; }

test_target_activated_twice_is_refused() {
	make_pair 16
	activate tr
	stomp write /dev/mapper/tr 5
	load_module
	cleanup remove_dm again
	assert_fails dmsetup create again --table "$(table)"
	assert_match "$SAID" "Device or resource busy"
	remove_dm again
	assert_fails dmsetup create tr --table "$(table)"
	stomp write /dev/mapper/tr 900
	deactivate tr
	offline_dirty >runs
	assert_runs "5-6 900-901" runs
}

test_target_two_devices_at_once() {
	make_pair 16
	activate tr
	local one_data=$data one_meta=$meta
	make_tail 16
	activate two
	stomp write /dev/mapper/tr 5
	stomp write /dev/mapper/two 7
	assert_eq "$(stat_of tr dirty) $(stat_of two dirty)" "1 1"
	online_dirty two >runs
	assert_runs "7-8" runs
	online_dirty tr >runs
	assert_runs "5-6" runs
	deactivate two
	offline_dirty >runs
	assert_runs "7-8" runs
	deactivate tr
	offline_dirty "$one_data" "$one_meta" >runs
	assert_runs "5-6" runs
}

test_target_metadata_in_the_tail() {
	make_tail 32
	local last=$((managed / 8 - 1))
	activate tr
	assert_match "$(dmsetup table tr)" '^0 [0-9]+ pristine [0-9]+:[0-9]+ -$'
	stomp write /dev/mapper/tr 0 "$last" 300+5
	assert_eq "$(sectors /dev/mapper/tr)" "$managed"
	[ "$managed" -lt "$(sectors "$data")" ] || fail "nothing is left for the metadata"
	assert_fails stomp write /dev/mapper/tr $((last + 1))
	deactivate tr
	offline_dirty >runs
	assert_runs "0-1 300-305 $last-$((last + 1))" runs
	activate tr
	assert_eq "$(stat_of tr dirty)" 7
	dd if=/dev/mapper/tr of=all bs=1M status=none iflag=direct
	cmp -n $((managed * 512)) all "$data_file"
}

# load_on DEVICE: fio writes and verifies for as long as $fio lives; it must end by itself and well.
load_on() {
	fio --name=verify --filename="$1" --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=8 --size=24M --io_size=24M \
		--norandommap=0 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=64 --randseed=11 --output=fio.log &
	fio=$!
	cleanup stop "$fio"
}

test_target_suspend_and_resume_under_load() {
	make_pair 32
	activate tr hot_extents 16 checkpoint_ms 100
	load_on /dev/mapper/tr
	local rounds=0
	while kill -0 "$fio" 2>/dev/null && [ "$rounds" -lt 25 ]; do
		if [ $((rounds % 2)) = 0 ]; then dmsetup suspend --noflush --nolockfs tr; else dmsetup suspend tr; fi
		dmsetup resume tr
		[ $((rounds % 5)) != 0 ] || dmsetup message tr 0 checkpoint
		rounds=$((rounds + 1))
	done
	wait "$fio" || { cat fio.log; fail "fio's verification failed"; }
	[ "$rounds" -ge 3 ] || fail "the load was over too soon"
	exact_after_removal
}

test_target_reload_under_load() {
	make_pair 32
	activate tr
	load_on /dev/mapper/tr
	local rounds=0
	while kill -0 "$fio" 2>/dev/null && [ "$rounds" -lt 20 ]; do
		dmsetup load tr --table "$(table hot_extents $((16 + rounds)))"
		dmsetup suspend --nolockfs tr
		dmsetup resume tr
		rounds=$((rounds + 1))
	done
	wait "$fio" || { cat fio.log; fail "fio's verification failed"; }
	assert_eq "$(stat_of tr limit)" $((15 + rounds)) "the hot set's limit after the reloads"
	exact_after_removal
}

# Every block of fio's 24 MiB was written, and none else.
exact_after_removal() {
	assert_eq "$(stat_of tr mode)" rw
	deactivate tr
	offline_dirty >runs
	assert_runs "0-6144" runs "dirty blocks after the load"
}

test_target_removal_while_open() {
	make_pair 16
	activate tr
	local open
	exec {open}</dev/mapper/tr
	assert_fails dmsetup remove tr
	assert_match "$SAID" "Device or resource busy"
	stomp write /dev/mapper/tr 8
	# Deferred until the last one closes.
	dmsetup remove --deferred tr
	stomp write "/proc/$$/fd/$open" 9
	exec {open}<&-
	eventually 10 gone
	offline_dirty >runs
	assert_runs "8-10" runs "after a deferred removal"
	# By force: the table becomes the error target, under whoever has it open.
	activate tr
	exec {open}</dev/mapper/tr
	dmsetup remove --force tr || true
	exec {open}<&-
	remove_dm tr
	offline_dirty >runs
	assert_runs "8-10" runs "after a removal by force"
}
gone() { ! dmsetup info tr; }

test_target_table_loaded_and_cleared() {
	make_pair 16
	load_module
	cp "$meta_file" before
	dmsetup create tr --notable
	cleanup remove_dm tr
	dmsetup load tr --table "$(table)"
	dmsetup clear tr
	remove_dm tr
	assert_same before "$meta_file" "metadata after a table that was never active"
}

run_tests "$@"
