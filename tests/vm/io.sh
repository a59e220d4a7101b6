#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Every kind of I/O marks what it changes, exactly, and leaves the data where it belongs.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

# dirty_after_removal RUNS
dirty_after_removal() {
	deactivate io
	offline_dirty >runs
	assert_runs "$1" runs
}

test_io_discard_and_write_zeroes_of_any_length() {
	make_pair 64
	head -c 32M /dev/zero | tr '\0' 'x' | dd of="$data" bs=1M iflag=fullblock oflag=direct status=none
	activate io
	local kib=1024
	# One block; several; across extents; a part of blocks at both ends.
	blkdiscard -f -o 4096 -l 4096 /dev/mapper/io
	blkdiscard -f -z -o $((100 * kib)) -l $((8 * kib)) /dev/mapper/io
	blkdiscard -f -o $((900 * kib)) -l $((3000 * kib)) /dev/mapper/io
	blkdiscard -f -z -o $((8 * 1024 * kib + 512)) -l $((4 * kib)) /dev/mapper/io
	blkdiscard -f -z -o $((10 * 1024 * kib)) -l $((5 * 1024 * kib)) /dev/mapper/io
	cmp -n 4096 -i 4096:0 "$data_file" /dev/zero || fail "the discard did not reach the data device"
	cmp -n $((5 << 20)) -i $((10 << 20)):0 "$data_file" /dev/zero || fail "the write-zeroes did not reach the data device"
	dirty_after_removal "1-2 25-27 225-975 2048-2050 2560-3840"
}

# Not only the first block of a long discard counts, and it need not fit into one record or the hot set.
test_io_discard_of_the_whole_device() {
	make_pair 200
	activate io hot_extents 16 checkpoint_ms 0
	blkdiscard -f /dev/mapper/io
	assert_eq "$(stat_of io dirty)" $((managed / 8))
	dirty_after_removal "0-$((managed / 8))"
	format_device "$data" "$meta"
	activate io hot_extents 16 checkpoint_ms 0
	blkdiscard -f -z /dev/mapper/io
	dirty_after_removal "0-$((managed / 8))"
}

test_io_parts_of_blocks() {
	make_pair 16
	assert_eq "$(blockdev --getss "$data")" 512
	activate io
	# Sector 17 is in block 2; sectors 31 and 32 in blocks 3 and 4; 400 to 419 in blocks 50 to 52.
	stomp sectors /dev/mapper/io 17 31+2 400+20
	dirty_after_removal "2-5 50-53"
	activate io
	dd if="$data" bs=512 skip=400 count=1 iflag=direct status=none | grep -q "sector 0*400" || fail "the sectors are not where they belong"
}

test_io_larger_than_an_extent() {
	make_pair 64
	activate io hot_extents 16 checkpoint_ms 0
	head -c 20M /dev/urandom >big
	dd if=big of=/dev/mapper/io bs=20M seek=1 oflag=direct status=none
	cmp -n $((20 << 20)) -i $((20 << 20)):0 "$data_file" big || fail "the data are not where they belong"
	dirty_after_removal "5120-10240"
}

test_io_flush_alone_marks_nothing() {
	make_pair 16
	activate io
	stomp sync /dev/mapper/io
	assert_eq "$(stat_of io dirty) $(stat_of io hot)" "0 0"
	dirty_after_removal ""
}

test_io_reads_mark_nothing() {
	make_pair 16
	activate io
	dd if=/dev/mapper/io of=/dev/null bs=1M iflag=direct status=none
	assert_eq "$(stat_of io dirty) $(stat_of io hot)" "0 0"
}

test_io_nowait() {
	make_pair 16
	activate io checkpoint_ms 0
	# A cold extent needs a record, which takes time.
	assert_eq "$(stomp nowait /dev/mapper/io 700)" EAGAIN "a write without waiting to a cold extent"
	assert_eq "$(stat_of io dirty)" 0
	stomp write /dev/mapper/io 700
	assert_eq "$(stomp nowait /dev/mapper/io 701)" ok "a write without waiting to a hot extent"
	dmsetup message io 0 checkpoint
	assert_eq "$(stomp nowait /dev/mapper/io 701)" ok "a write without waiting to a dirty block"
	assert_eq "$(stomp nowait /dev/mapper/io 702)" EAGAIN "a write without waiting to a clean block"
	dirty_after_removal "700-702"
}

# More extents than the hot set holds, more records than the smallest log holds.
test_io_with_a_full_log_and_a_full_hot_set() {
	make_pair 300 --log-pages 16
	activate io hot_extents 16 checkpoint_ms 0
	local n places=() want=() log
	for n in $(seq 0 298); do
		places+=($((n * 7 % 299 * 256 + n % 250)))
		want+=($((n * 256)))
	done
	stomp write /dev/mapper/io "${places[@]}"
	log=$(stat_of io log)
	[ "$log" -lt 16 ] || fail "the log holds $log records of 16"
	[ "$(stat_of io hot)" -le 16 ] || fail "$(stat_of io hot) extents are hot"
	assert_eq "$(stat_of io dirty)" 299
	assert_eq "$(stat_of io mode)" rw
	deactivate io
	offline_dirty >runs
	assert_eq "$(stomp count runs)" 299 "dirty blocks"
	for n in "${places[@]}"; do echo "$n $((n + 1))"; done >want
	stomp missing want runs >lost
	[ ! -s lost ] || fail "lost: $(cat lost)"
}

test_io_concurrent_writers_verified() {
	make_pair 96 --log-pages 16
	activate io hot_extents 16 checkpoint_ms 50
	fio --name=v --filename=/dev/mapper/io --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --size=20M --io_size=6M --numjobs=4 \
		--offset_increment=20M --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --randseed=5 --group_reporting --output=fio.log ||
		{ cat fio.log; fail "fio's verification failed"; }
	assert_eq "$(stat_of io dirty)" $((4 * 6 * 256)) "dirty blocks"
	deactivate io
	offline_dirty >runs
	assert_eq "$(stomp count runs)" $((4 * 6 * 256)) "dirty blocks after the removal"
}

# io_uring first asks not to wait; what cannot be done so goes to a worker of its.
test_io_uring_verified() {
	make_pair 32
	activate io checkpoint_ms 50
	fio --name=v --filename=/dev/mapper/io --rw=randwrite --bs=4k --direct=1 --ioengine=io_uring --iodepth=16 --size=24M --io_size=4M \
		--verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=5 --output=fio.log || { cat fio.log; fail "fio's verification failed"; }
	assert_eq "$(stat_of io dirty)" 1024 "dirty blocks"
	deactivate io
	offline_dirty >runs
	assert_eq "$(stomp count runs)" 1024 "dirty blocks after the removal"
}

test_io_file_system() {
	make_pair 96
	activate io
	mkfs.ext4 -q -b 4096 /dev/mapper/io
	mkdir -p mnt
	mount /dev/mapper/io mnt
	cleanup eval 'umount mnt 2>/dev/null || true'
	cp -r "$PRISTINE_TOP/rust" mnt/
	head -c 8M /dev/urandom >mnt/large
	sync
	rm -r mnt/rust/dm
	sha256sum mnt/large | cut -d' ' -f1 >sum
	umount mnt
	deactivate io
	activate io
	mount /dev/mapper/io mnt
	assert_eq "$(sha256sum mnt/large | cut -d' ' -f1)" "$(cat sum)"
	diff -r "$PRISTINE_TOP/rust/shared" mnt/rust/shared
	[ ! -e mnt/rust/dm ]
	umount mnt
	e2fsck -fn /dev/mapper/io
	deactivate io
	# All that differs from the empty disk is dirty.
	truncate -s "$(stat -c %s "$data_file")" empty
	stomp differ empty "$data_file" | managed_part >differing
	offline_dirty >dirty
	stomp missing differing dirty >lost
	[ ! -s lost ] || fail "changed and not dirty: $(head -n 3 lost)"
}

run_tests "$@"
