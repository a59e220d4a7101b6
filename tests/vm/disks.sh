#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Every kind of disk below: what it can do, the managed device can do, and what it cannot, that neither.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# manage DATA: formats it with metadata beside it, and activates it as /dev/mapper/di.
manage() {
	data=$1
	make_disk meta 2
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	activate di checkpoint_ms 0
}

# same_limit NAME...: the managed device's limits are the data device's.
same_limit() {
	local name
	for name; do assert_eq "$(limit /dev/mapper/di "$name")" "$(limit "$data" "$name")" "$name of the managed device"; done
}

# is_exact RUNS: after the removal, exactly these blocks are dirty.
is_exact() {
	deactivate di
	offline_dirty >runs
	assert_runs "$1" runs
}

setup() {
	case $TEST in test_disks_with_zones_are_refused) ;; *) long_in_vm ;; esac
}

test_disks_4kn() {
	make_disk data 16 --sector-size 4096
	make_disk meta 2 --sector-size 4096
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	activate di
	same_limit logical_block_size physical_block_size minimum_io_size dma_alignment
	assert_eq "$(limit /dev/mapper/di logical_block_size)" 4096
	assert_eq "$((managed % 8))" 0 "sectors beyond the last whole block"
	assert_fails stomp sectors /dev/mapper/di 17
	stomp write /dev/mapper/di 5 700+3
	dmsetup suspend di
	dmsetup resume di
	is_exact "5-6 700-703"
	# With the metadata in the tail too.
	make_disk data 16 --sector-size 4096
	format_device "$data" -
	managed=$(managed_sectors "$data" $((16 * 1048576 - 4096)))
	meta=-
	activate di
	stomp write /dev/mapper/di 6
	is_exact "6-7"
}

test_disks_512e() {
	scsi_disk data 16 sector_size=512 physblk_exp=3 opt_blks=64
	manage "$data"
	same_limit logical_block_size physical_block_size minimum_io_size optimal_io_size
	assert_eq "$(limit /dev/mapper/di logical_block_size) $(limit /dev/mapper/di physical_block_size)" "512 4096"
	stomp sectors /dev/mapper/di 17 400+20
	dd if="$data" bs=512 skip=400 count=1 iflag=direct status=none | grep -q "sector 0*400" || fail "the sectors are not where they belong"
	is_exact "2-3 50-53"
}

# Not one write of it may be split: the disk counts the requests that it completes.
atomic_in_one() { # BLOCK COUNT
	local before
	before=$(awk '{ print $5 + $6 }' "$(sysfs_of "$data")/stat")
	assert_eq "$(stomp atomic /dev/mapper/di "$1" "$2")" ok "an atomic write of $2 blocks at $1"
	assert_eq "$(awk '{ print $5 + $6 }' "$(sysfs_of "$data")/stat")" $((before + 1)) "requests for an atomic write"
}

test_disks_atomic_writes() {
	scsi_disk data 32 atomic_wr=1 atomic_wr_align=8 atomic_wr_gran=8 atomic_wr_max_length=128
	manage "$data"
	same_limit atomic_write_max_bytes atomic_write_unit_min_bytes atomic_write_unit_max_bytes atomic_write_boundary_bytes
	[ "$(limit /dev/mapper/di atomic_write_unit_max_bytes)" -ge 16384 ] || fail "atomic writes do not pass through"
	# Cold; hot; dirty.
	atomic_in_one 512 4
	atomic_in_one 516 4
	dmsetup message di 0 checkpoint
	atomic_in_one 512 8
	# One extent is hot, the next is not: 248 to 263 are on both sides of the border.
	stomp write /dev/mapper/di 20
	atomic_in_one 240 16
	is_exact "20-21 240-256 512-520"
	# What is too long or not aligned is refused, not split.
	activate di
	assert_eq "$(stomp atomic /dev/mapper/di 1 4)" EINVAL "an atomic write that is not aligned"
	assert_eq "$(stomp atomic /dev/mapper/di 1024 64)" EINVAL "an atomic write that is too long"
}

test_disks_without_atomic_writes() {
	make_disk data 16
	manage "$data"
	same_limit atomic_write_max_bytes
	[ "$(limit /dev/mapper/di atomic_write_max_bytes)" = 0 ] || skip "loop devices have atomic writes"
	assert_match "$(stomp atomic /dev/mapper/di 0 1)" '^(E(OP)?NOTSUPP?|EINVAL)$'
	is_exact ""
}

test_disks_with_integrity() {
	scsi_disk data 16 dif=1 dix=1
	[ "$(cat "$(sysfs_of "$data")/integrity/format")" != none ] || skip "no integrity profile on this kernel's scsi_debug"
	manage "$data"
	assert_eq "$(cat "$(sysfs_of /dev/mapper/di)/integrity/format")" \
		"$(cat "$(sysfs_of "$data")/integrity/format")" "the integrity profile"
	# The checks are made by the disk: a write whose tag does not fit its place fails there.
	fio --name=v --filename=/dev/mapper/di --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=8 --size=8M --verify=crc32c \
		--do_verify=1 --verify_fatal=1 --randseed=2 --output=fio.log || { cat fio.log; fail "fio's verification failed"; }
	is_exact "0-2048"
	# None is claimed where there is none.
	make_pair 16
	activate di
	assert_match "$(cat "$(sysfs_of /dev/mapper/di)/integrity/format" 2>/dev/null || echo none)" '^none$'
}

test_disks_claim_no_inline_crypto() {
	make_disk data 16
	manage "$data"
	[ ! -e "$(sysfs_of /dev/mapper/di)/queue/crypto" ] || fail "inline encryption is claimed, and the disk has none"
}

test_disks_with_and_without_write_cache() {
	local before
	null_disk cached 16 blocksize=512 cache_size=4 fua=1
	null_disk plain 16 blocksize=512
	# With one, flushes reach it.
	manage "$cached"
	same_limit write_cache fua
	assert_eq "$(limit /dev/mapper/di write_cache)" "write back"
	before=$(awk '{ print $16 }' "$(sysfs_of "$data")/stat")
	stomp write /dev/mapper/di 7
	stomp sync /dev/mapper/di
	[ "$(awk '{ print $16 }' "$(sysfs_of "$data")/stat")" -gt "$before" ] || fail "the flush did not reach the disk"
	dd if=/dev/zero of=/dev/mapper/di bs=4k seek=9 count=1 oflag=direct,dsync status=none
	is_exact "7-8 9-10"
	# Without one none is claimed, and a flush is no error.
	manage "$plain"
	same_limit write_cache fua
	assert_eq "$(limit /dev/mapper/di write_cache)" "write through"
	stomp write /dev/mapper/di 7
	stomp sync /dev/mapper/di
	dd if=/dev/zero of=/dev/mapper/di bs=4k seek=9 count=1 oflag=direct,dsync status=none
	is_exact "7-8 9-10"
}

test_disks_without_discard() {
	null_disk plain 16 blocksize=512
	manage "$plain"
	same_limit discard_max_bytes
	assert_eq "$(limit /dev/mapper/di discard_max_bytes)" 0
	assert_fails blkdiscard -f -o 8192 -l 8192 /dev/mapper/di
	assert_match "$SAID" "not supported"
	assert_eq "$(stat_of di dirty)" 0 "dirty blocks after a discard that there is not"
	# Zeroes are written then.
	stomp write /dev/mapper/di 2+40
	blkdiscard -f -z -o $((5 * 4096 + 512)) -l $((30 * 4096)) /dev/mapper/di
	cmp -n $((30 * 4096)) -i $((5 * 4096 + 512)):0 "$data" /dev/zero || fail "the zeroes did not reach the disk"
	is_exact "2-42"
}

# Sectors, not blocks; several extents; more than the hot set.
test_disks_discards_of_any_length() {
	null_disk able 64 blocksize=512 discard=1
	manage "$able"
	deactivate di
	activate di hot_extents 16 checkpoint_ms 0
	[ "$(limit /dev/mapper/di discard_granularity)" = 512 ] || skip "this disk discards no single sectors"
	blkdiscard -f -o 512 -l 512 /dev/mapper/di
	blkdiscard -f -o $((4096 * 10 - 512)) -l 1024 /dev/mapper/di
	blkdiscard -f -o $(((3 << 20) - 512)) -l $(((40 << 20) + 1024)) /dev/mapper/di
	is_exact "0-1 9-11 767-11009"
}

test_disks_with_zones_are_refused() {
	stock_module null_blk nr_devices=0
	mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
	grep -q blk_zone_mgmt /proc/kallsyms || skip "this kernel has no zones"
	null_disk zones 64 blocksize=4096 zoned=1 zone_size=16
	make_disk meta 2
	# The label at its end cannot be written where zones are filled from their start.
	assert_fails "$PRISTINE" -q device format "$zones" --metadata "$meta" --force
}

test_disks_that_are_read_only_are_refused() {
	make_pair 16
	load_module
	blockdev --setro "$data"
	assert_fails dmsetup create di --table "$(table)"
	assert_match "$SAID" "Read-only|Permission denied"
	kernel_said "Cannot open the data device" || fail "the kernel did not say what cannot be opened"
	blockdev --setrw "$data"
	activate di
}

run_tests "$@"
