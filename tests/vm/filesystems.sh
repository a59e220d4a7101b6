#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# File systems at work on a managed device, and what a revert makes of it: when exactly the dirty blocks are taken from
# the master again, the master is back, byte for byte, and the file system's own check finds nothing.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=400
# How much work: MiB of fio in each of two files, rounds of small files.
SIZE=2 ROUNDS=1
if [ "${TEST_LONG:-0}" = 1 ]; then SIZE=8 ROUNDS=5; fi

setup() {
	long_in_vm
	[ "$TEST" = test_filesystems_ext4 ] || [ "${TEST_LONG:-0}" = 1 ] || skip "only with TEST_LONG=1"
}

# master MIB TYPE MKFS...: $data with a file system and some files in it, formatted; the file "master" is its copy.
master() {
	local mib=$1 type=$2
	shift 2
	[ -d "/sys/fs/$type" ] || modprobe -d "$PRISTINE_MODULES" "$type" || fail "the kernel has no $type"
	make_disk data "$mib"
	make_disk meta 2
	managed=$((mib * 2048 - 8))
	make_dm whole "0 $managed linear $data 0"
	"$@" /dev/mapper/whole
	mkdir -p mnt
	mount -t "$type" /dev/mapper/whole mnt
	cp -r "$PRISTINE_TOP/rust" mnt/rust
	head -c 3M /dev/urandom >mnt/random
	umount mnt
	remove_dm whole
	format_device "$data" "$meta"
	cp --sparse=always "$data_file" master
	managed=$(managed_sectors "$meta" 0)
}

# Small files, large files under verification, and, with TEST_LONG=1, whatever stress-ng does to file systems.
stress() {
	local n i
	mkdir mnt/w
	fio --name=v --directory=mnt/w --rw=randrw --bsrange=512-64k --ioengine=psync --size="${SIZE}M" --numjobs=2 --fsync=50 --fallocate=none \
		--verify=crc32c --do_verify=1 --verify_fatal=1 --unlink=0 --randseed=9 --group_reporting --output=fio.log &
	local fio=$!
	for ((n = 1; n <= ROUNDS; n++)); do
		for i in {1..60}; do
			printf '%0*d' $((i * 97)) "$i" >"mnt/w/small-$n-$i"
		done
		cp -r mnt/rust "mnt/w/copy-$n"
		rm -r mnt/rust/dm
		mv "mnt/w/copy-$n/dm" mnt/rust/dm
		rm "mnt/w/small-$n-"*7
	done
	if [ "${TEST_LONG:-0}" = 1 ]; then
		stress-ng --temp-path mnt/w --timeout 60 --dir 1 --rename 1 --link 1 --symlink 1 --fallocate 1 --fallocate-bytes 8M --hdd 1 \
			--hdd-bytes 8M --hdd-opts fdatasync --xattr 1 --verify --oomable >stress.log 2>&1 || { cat stress.log; fail "stress-ng failed"; }
	fi
	wait $fio || { cat fio.log; fail "fio's verification failed"; }
	fstrim mnt || true
}

tree_sum() { (cd mnt && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum); }

# use TYPE CHECK...
use() {
	local type=$1 before
	shift
	activate fs hot_extents 16 checkpoint_ms 100
	mount -t "$type" /dev/mapper/fs mnt
	cleanup eval 'umount mnt 2>/dev/null || true'
	stress
	before=$(tree_sum)
	umount mnt
	dmsetup suspend fs
	dmsetup resume fs
	mount -t "$type" -o ro /dev/mapper/fs mnt
	assert_eq "$(tree_sum)" "$before" "the files after a remount"
	umount mnt
	deactivate fs
	"$@" "$data" || fail "the file system is damaged after its use"
	revert
	"$@" "$data" || fail "the file system is damaged after a revert"
}

# What the agent does: the dirty blocks from the master, and no other.
revert() {
	offline_dirty >dirty
	[ "$(stomp count dirty)" -gt 500 ] || fail "only $(stomp count dirty) blocks are dirty"
	[ "$(stomp count dirty)" -lt $((managed / 8)) ] || fail "all blocks are dirty"
	stomp restore master "$data" dirty
	cmp -n $((managed * 512)) master "$data_file" || fail "the revert is not complete: a block that changed was not dirty"
}

test_filesystems_ext4() {
	master 96 ext4 mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,nodiscard
	use ext4 e2fsck -fn
}

test_filesystems_xfs() {
	master 320 xfs mkfs.xfs -q
	use xfs xfs_repair -n
}

test_filesystems_btrfs() {
	# At unmount, on any device: it frees memory of the kernel's image.
	if [ "$TEST_LANE" = lab ]; then expect_dmesg 'WARNING: mm/slub.c:[0-9]* at free_large_kmalloc'; fi
	master 128 btrfs mkfs.btrfs -q --mixed
	use btrfs btrfs check --readonly --force
}

run_tests "$@"
