#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Disks with inline encryption: what has an encryption context reaches the disk with it, on every way that a bio can take.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

setup() {
	[ -n "${PRISTINE_CRYPTO_DISK:-}" ] || skip "this kernel has no inline encryption"
	long_in_vm
	insmod "$PRISTINE_CRYPTO_DISK" mib=16
	cleanup eventually 10 rmmod crypto_disk
	data=/dev/crypto_disk
	eventually 5 test -b "$data"
	make_disk meta 2
}

# with_key OPERATION DEVICE BLOCK KEY DUN COUNT: I/O of so many blocks with an encryption context; see tests/crypto-disk.
with_key() { echo "$1 $2 $(($3 * 8)) $4 $5 $6" >/sys/module/crypto_disk/parameters/io; }

# manage [OPTION...]: formats the disk, and activates it as /dev/mapper/cr.
manage() {
	format_device "$data" "$meta" "$@"
	managed=$(managed_sectors "$meta" 0)
	activate cr checkpoint_ms 0
}

test_crypto_is_offered_as_the_disk_does() {
	local of_disk of_device
	manage
	of_disk=$(sysfs_of "$data")/queue/crypto of_device=$(sysfs_of /dev/mapper/cr)/queue/crypto
	[ -d "$of_device/modes" ] || fail "the managed device offers no inline encryption"
	diff -r "$of_disk/modes" "$of_device/modes"
	assert_same "$of_disk/max_dun_bits" "$of_device/max_dun_bits"
}

test_crypto_passes_through() {
	manage
	# Blocks of cold extents go by way of the committer, those of hot ones at once; both come out at the disk as they went in.
	with_key write /dev/mapper/cr 1000 3 100 4
	with_key write /dev/mapper/cr 1100 3 7 1
	with_key write /dev/mapper/cr 1000 3 100 4
	for device in /dev/mapper/cr "$data"; do
		with_key read "$device" 1000 3 100 4
		with_key read "$device" 1100 3 7 1
		# A part of it, by its own number; and neither with another key nor with another number.
		with_key read "$device" 1002 3 102 2
		assert_fails with_key read "$device" 1000 4 100 4
		assert_fails with_key read "$device" 1000 3 101 4
	done
	deactivate cr
	offline_dirty >runs
	assert_runs "1000-1004 1100-1101" runs
	activate cr checkpoint_ms 0
	with_key read /dev/mapper/cr 1000 3 100 4
	# Over the border of two extents, also when only one of them is hot.
	with_key write /dev/mapper/cr 2046 9 500 4
	with_key read "$data" 2046 9 500 4
}

test_crypto_of_stale_blocks() {
	local blocks image=$PWD/image server
	# The master holds what a disk with that key would.
	with_key write "$data" 700 5 40 8
	dd if="$data" of="$image" bs=64k status=none
	dd if=/dev/urandom of="$data" bs=64k count=64 status=none
	manage --initial stale
	blocks=$(stat_of cr stale)
	python3 -I -S "$LIB/helper.py" serve /dev/mapper/cr "$image" ready="$PWD/ready" 2>served &
	server=$!
	cleanup stop $server
	eventually 20 test -e ready
	# What is fetched is not what the reader wants: the disk makes that of it.
	with_key read /dev/mapper/cr 700 5 40 4
	with_key read /dev/mapper/cr 704 5 44 4
	with_key read "$data" 700 5 40 8
	assert_eq "$(stat_of cr stale)" $((blocks - 8))
	# Whole blocks that are written need no fetch, parts of a context's unit do not exist.
	with_key write /dev/mapper/cr 900 5 60 3
	with_key read "$data" 900 5 60 3
	assert_eq "$(stat_of cr stale)" $((blocks - 11))
}

run_tests "$@"
