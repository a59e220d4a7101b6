#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# What the target costs in memory and on disk, devices that are too small, and the ioctls of /dev/pristine used wrongly.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

vmalloc_kib() { awk '/^VmallocUsed:/ { print $2 }' /proc/meminfo; }

test_limits_memory_and_metadata_of_a_tebibyte() {
	truncate -s 1T data.file
	truncate -s 1100M meta.file
	data=$(losetup --show -f data.file)
	cleanup losetup -d "$data"
	meta=$(losetup --show -f meta.file)
	cleanup losetup -d "$meta"
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	local bytes before after
	bytes=$(($(meta_tool get "$meta" area_start1) + $(meta_tool get "$meta" area_pages)))
	[ $((bytes * 4096 * 1000)) -lt $((1 << 40)) ] || fail "the metadata takes $bytes pages, more than a thousandth"
	load_module
	before=$(vmalloc_kib)
	activate li
	after=$(vmalloc_kib)
	bytes=$(control stats /dev/mapper/li memory)
	[ "$bytes" -le $((33 << 20)) ] || fail "the state takes $bytes bytes of memory for 1 TiB; 33 MiB are allowed"
	# The kernel's own count, rounded up to pages, agrees.
	[ $((after - before)) -le $((34 << 10)) ] || fail "activation took $((after - before)) KiB of kernel memory"
	stomp write /dev/mapper/li 0 $((managed / 8 - 1)) 100000000
	deactivate li
	offline_dirty >runs
	assert_runs "0-1 100000000-100000001 $((managed / 8 - 1))-$((managed / 8))" runs
}

test_limits_metadata_device_too_small() {
	make_disk data 64
	make_disk meta 1
	local where
	make_dm tiny "0 $((30 * 8)) linear $meta 0"
	assert_fails "$PRISTINE" device format "$data" --metadata /dev/mapper/tiny
	assert_match "$SAID" "too small|pages" "what device format says of a metadata device that is too small"
	remove_dm tiny
	# One that shrank after it was formatted.
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	where=$(meta_tool get "$meta" area_start1)
	make_dm shrunk "0 $((where * 8)) linear $meta 0"
	meta=/dev/mapper/shrunk
	load_module
	assert_fails dmsetup create li --table "$(table)"
	assert_match "$SAID" "No space left on device"
	kernel_said "device has $where pages of 4 KiB, its metadata needs" || fail "the kernel did not say what is too small"
}

# Writes past the managed blocks would go over the label.
test_limits_managed_size_past_the_data_device() {
	make_pair 16
	meta_tool set "$meta" managed_sectors $((managed + 8))
	managed=$((managed + 8))
	load_module
	assert_fails dmsetup create li --table "$(table)"
	assert_match "$SAID" "Structure needs cleaning"
	kernel_said "field managed size out of range" || fail "the kernel did not say what is wrong"
	assert_fails "$PRISTINE" device check "$data" --metadata "$meta"
	assert_match "$SAID" "managed size"
}

test_limits_ioctls_used_wrongly() {
	make_pair 16
	activate li
	stomp write /dev/mapper/li 3 130+2
	control abuse /dev/mapper/li
	online_dirty li >runs
	assert_runs "3-4 130-132" runs "the map"
}

test_limits_control_device_is_not_for_everybody() {
	load_module
	assert_match "$(stat -c %a /dev/pristine)" '^600$' "the permissions of /dev/pristine"
}

run_tests "$@"
