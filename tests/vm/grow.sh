#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# A managed device that grows in place: while it is used, and while it is not active. What was tracked stays so, what is new is
# dirty, and what cannot grow is refused with a word on what to do. That a power cut leaves the old size or the new is
# test_crash_states_of_growing, and `cargo test -p pristine-metadata --test grow`.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

device() { "$PRISTINE" device "$@"; }

# enlarge VARIABLE MIB: the disk has this size now.
enlarge() {
	local file=${1}_file
	truncate -s "${2}M" "${!file}"
	losetup -c "${!1}"
	eventually 10 has_size "${!1}" "$2"
}
has_size() { [ "$(blockdev --getsize64 "$1")" = $(($2 << 20)) ]; }

# is_managed SECTORS: the size of the active device, and of its metadata.
is_managed() {
	assert_eq "$(sectors /dev/mapper/gr)" "$1" "the size of the device"
	assert_eq "$(stat_of gr blocks)" $((($1 + 7) / 8)) "its blocks"
	# Not by way of the loop device, which remembers what it was asked before.
	[ "$meta" = - ] || assert_eq "$(managed_sectors "$meta_file" 0)" "$1" "the managed size in the metadata"
}

verify_fio() {
	fio --name=verify --filename=/dev/mapper/gr --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=8 --size=24M --io_size=24M \
		--norandommap=0 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=64 --randseed=11 --output=fio.log
}

# A plane gets a second page, then a third, so that the areas move, from whichever of them is current.
test_grow_under_load() {
	make_pair 120 --log-pages 16
	activate gr hot_extents 16 checkpoint_ms 100
	verify_fio &
	local fio=$! mib old=$managed rounds=0
	cleanup stop "$fio"
	for mib in 130 131 200 264; do
		enlarge data "$mib"
		device grow gr >said || fail "cannot grow: $(cat said)"
		assert_match "$(cat said)" "gr grew from"
		managed=$((mib * 2048 - 8))
		is_managed "$managed"
		stomp write /dev/mapper/gr $((managed / 8 - 1))
		# Each time from the other area.
		[ $((rounds++ % 2)) = 0 ] || dmsetup message gr 0 checkpoint >/dev/null
	done
	wait "$fio" || { cat fio.log; fail "fio's verification failed"; }
	exits 0 "is .* already" device grow gr
	assert_match "$(dmsetup table gr)" "hot_extents 16 checkpoint_ms 100 grow 1\$"
	deactivate gr
	device check "$data" --metadata "$meta" >said || fail "the metadata is not good: $(cat said)"
	# All that fio wrote and all that is new, and nothing else.
	offline_dirty >runs
	assert_runs "0-6144 $((old / 8))-$((managed / 8))" runs
	# It is a device of this size now; and is refused as one of another.
	activate gr
	is_managed "$managed"
	deactivate gr
	managed=$old
	assert_fails dmsetup create gr --table "$(table grow 1)"
	kernel_said "target length is $old sectors" || fail "the kernel did not say that it cannot shrink"
}

# The originals that it holds outlive the growth, unless the area has to move: then it is empty.
test_grow_with_an_undo_area() {
	make_disk data 64
	make_disk meta 10
	head -c 64M /dev/urandom >"$data"
	format_device "$data" "$meta" --undo 4M
	managed=$(managed_sectors "$meta" 0)
	cp "$data_file" master
	local old=$managed kept
	activate gr checkpoint_ms 0
	stomp write /dev/mapper/gr 100+3
	enlarge data 72
	device grow gr >/dev/null
	managed=$((72 * 2048 - 8))
	is_managed "$managed"
	kept=$(((managed - old) / 8))
	assert_eq "$(undo_of gr)" "open 4/1024 $kept" "what is new has no original"
	stomp write /dev/mapper/gr 200+2 $((old / 8 + 9))+4
	assert_eq "$(undo_of gr)" "open 7/1024 $kept"
	# A second page for a plane.
	enlarge data 200
	device grow gr >/dev/null
	managed=$((200 * 2048 - 8))
	is_managed "$managed"
	assert_eq "$(undo_of gr)" "open 0/1024 $(stat_of gr dirty)" "it moved"
	stomp write /dev/mapper/gr 300
	assert_match "$(undo_of gr)" "^open 2/1024 "
	deactivate gr
	device check "$data" --metadata "$meta" >said || fail "the metadata is not good: $(cat said)"
	assert_eq "$("$PRISTINE" device dump "$data" --metadata "$meta" --json | jq '.undo.used')" 2
	# All that changed is dirty.
	offline_dirty >dirty
	blockdev --flushbufs "$data"
	stomp differ master "$data_file" | awk -v end=$((old / 8)) '$1 < end { print $1, ($2 < end ? $2 : end) }' >differing
	stomp missing differing dirty >lost
	[ ! -s lost ] || fail "changed, but not dirty: $(head -n 3 lost)"
}
undo_of() { dmsetup status "$1" | sed -n 's/.* undo //p'; }

test_grow_with_a_file_system_mounted() {
	have_ext4 || skip "this kernel has no ext4"
	make_pair 32
	activate gr
	mkfs.ext4 -q -F -b 4096 /dev/mapper/gr
	mkdir mnt
	mount /dev/mapper/gr mnt
	cleanup umount_quietly "$PWD/mnt"
	head -c 8M /dev/urandom >mnt/file
	enlarge data 64
	device grow gr >/dev/null
	# What resize2fs does; that wants to write to the device itself, which not every kernel lets it while it is mounted.
	python3 -I -S -c '
import fcntl, os, struct
EXT4_IOC_RESIZE_FS = 1 << 30 | 8 << 16 | ord("f") << 8 | 16
fcntl.ioctl(os.open("mnt", os.O_RDONLY), EXT4_IOC_RESIZE_FS, struct.pack("<Q", (64 << 20) // 4096 - 1))
' || fail "the file system cannot be resized"
	# More than there was room for.
	head -c 40M /dev/urandom >mnt/large
	umount mnt
	e2fsck -fn /dev/mapper/gr >fsck.log 2>&1 || { cat fsck.log; fail "the file system is damaged"; }
	deactivate gr
}
have_ext4() { grep -qw ext4 /proc/filesystems || modprobe -d "${PRISTINE_MODULES:?}" -q ext4; }
umount_quietly() { ! mountpoint -q "$1" || umount "$1"; }

# The image is zero past its end, so that is what a revert makes of what is new.
test_grow_and_revert() {
	make_pair 16 --initial clean --image "$(printf '%064d' 7)" --image-size 8M --generation 1 --size 8M
	enlarge data 24
	# The managed device was smaller than the data device before.
	exits 0 "would grow from 8.0 MiB to 24.0 MiB" device grow "$data" --metadata "$meta" --dry-run
	assert_eq "$(managed_sectors "$meta_file" 0)" 16384
	device grow "$data" --metadata "$meta" --size 20M --json >grown.json
	assert_eq "$(jq -r '"\(.managed_bytes) \(.new_blocks) \(.changed) \(.active)"' grown.json)" "$((20 << 20)) 3072 true false"
	offline_dirty >runs
	assert_runs "2048-5120" runs
	device revert "$data" --metadata "$meta" >/dev/null
	device map "$data" --metadata "$meta" --json >map.json
	assert_eq "$(jq -r '.runs[] | select(.state == "stale") | "\(.start)+\(.blocks)"' map.json)" "2048+3072"
	offline_dirty >runs
	assert_runs "" runs
}

test_grow_with_stale_blocks() {
	image=$PWD/image
	head -c 8M /dev/urandom >image
	make_pair 16 --initial stale --image "$(printf '%064d' 7)" --image-size 8M --size 8M
	activate gr
	enlarge data 32
	device grow gr --size 24M >/dev/null
	managed=$((24 * 2048))
	is_managed $managed
	assert_eq "$(stat_of gr stale) $(stat_of gr dirty)" "2048 4096" "stale and dirty blocks"
	stomp write /dev/mapper/gr 5+2 6000
	python3 -I -S "$LIB/helper.py" serve /dev/mapper/gr "$image" hydrate ready="$PWD/ready" &
	local helper=$!
	cleanup stop $helper
	eventually 20 test -e ready
	eventually 60 all_valid
	python3 -I -S "$LIB/helper.py" read /dev/mapper/gr 64 16000 "$image"
	stop $helper
	deactivate gr
	offline_dirty >runs
	assert_runs "5-7 2048-6144" runs
}
all_valid() { [ "$(stat_of gr stale)" = 0 ]; }

test_grow_offline_with_metadata_in_the_tail() {
	make_tail 16
	activate gr
	stomp write /dev/mapper/gr 5 1000+20
	exits 2 "reserved tail .* must move" device grow gr
	enlarge data 24
	# While it is in use its metadata stay where they are.
	dmsetup suspend gr
	dmsetup resume gr
	stomp write /dev/mapper/gr 9
	dmsetup message gr 0 checkpoint >/dev/null
	exits 7 "in use" device grow "$data"
	local old=$managed
	deactivate gr
	exits 3 "no pristine metadata" device map "$data"
	exits 3 "had no metadata at its end" device grow "$data" --from 12M
	device grow "$data" >said
	assert_match "$(cat said)" "grew from 15.* to 23.* all dirty"
	managed=$(managed_sectors "$data" $(((24 << 20) - 4096)))
	offline_dirty >runs
	assert_runs "5-6 9-10 1000-1020 $((old / 8))-$((managed / 8))" runs
	activate gr
	is_managed "$managed"
	stomp write /dev/mapper/gr 7 $((managed / 8 - 1))
	deactivate gr
	device check "$data" >said || fail "the metadata is not good: $(cat said)"
	# As large as before it is not what it was.
	truncate -s 16M "$data_file"
	losetup -c "$data"
	exits 3 "no pristine metadata" device map "$data"
}

# The data device grew under an active device: it goes on at its size, also when it is suspended, and after it was
# stopped it is refused until it is told to grow.
test_grow_of_the_data_device_alone() {
	make_pair 16
	activate gr
	stomp write /dev/mapper/gr 5
	enlarge data 32
	dmsetup suspend gr
	dmsetup resume gr
	stomp write /dev/mapper/gr 9
	is_managed "$managed"
	deactivate gr
	assert_fails dmsetup create gr --table "$(table)"
	kernel_said "data device has 65536 sectors, the metadata was made for 32768" || fail "the kernel did not say what is wrong"
	exits 5 "pristine device grow" device map "$data" --metadata "$meta"
	# As large as it was it is what it was.
	device grow "$data" --metadata "$meta" --size $((managed * 512)) >/dev/null
	activate gr
	is_managed "$managed"
	deactivate gr
	offline_dirty >runs
	assert_runs "5-6 9-10" runs
}

test_grow_is_refused_where_it_cannot_be() {
	make_pair 120 --log-pages 16
	activate gr
	stomp write /dev/mapper/gr 5
	exits 5 "cannot shrink" device grow gr --size 100M
	exits 10 "too small" device grow gr --size 121M
	exits 3 "no device" device grow nowhere
	# Maps of more pages than the metadata device has room for.
	truncate -s $((40 * 4096)) "$meta_file"
	losetup -c "$meta"
	enlarge data 1200
	exits 10 "its metadata needs" device grow gr
	assert_fails dmsetup load gr --table "0 $((1200 * 2048 - 8)) pristine $data $meta 2 grow 1"
	assert_fails dmsetup load gr --table "0 $((managed - 8)) pristine $data $meta 2 grow 1"
	assert_fails dmsetup load gr --table "0 $((managed + 8)) pristine $data $meta"
	# Nothing has changed.
	is_managed "$managed"
	stomp write /dev/mapper/gr 9
	# With a larger metadata device it can.
	truncate -s 1M "$meta_file"
	losetup -c "$meta"
	device grow gr >/dev/null
	local old=$managed
	managed=$((1200 * 2048 - 8))
	is_managed "$managed"
	deactivate gr
	offline_dirty >runs
	assert_runs "5-6 9-10 $((old / 8))-$((managed / 8))" runs
}

# The metadata device fails at any of the writes that growing takes: the device is suspended, and the old size is in force. Once
# it works again, so does growing.
test_grow_that_fails_is_done_again() {
	local good old flaky
	stock_module dm_flakey
	make_pair 120 --log-pages 16
	good="0 $(sectors "$meta") linear $meta 0"
	make_dm below "$good"
	flaky="0 $(sectors "$meta") flakey $meta 0 0 3600 1 error_writes"
	meta=/dev/mapper/below
	activate gr
	stomp write /dev/mapper/gr 5
	old=$managed
	enlarge data 200
	# What is written before it is suspended fails, too: so it is suspended first.
	dmsetup suspend gr
	dmsetup load below --table "$flaky"
	dmsetup suspend below
	dmsetup resume below
	exits 6 "suspended and does not go on" device grow gr
	expect_dmesg 'growing failed|writing the superblock failed'
	dmsetup load below --table "$good"
	dmsetup suspend below
	dmsetup resume below
	assert_eq "$(managed_sectors "$meta_file" 0)" "$old" "the managed size in the metadata"
	device grow gr >/dev/null
	managed=$((200 * 2048 - 8))
	assert_eq "$(managed_sectors "$meta_file" 0)" "$managed"
	stomp write /dev/mapper/gr 9 $((managed / 8 - 1))
	deactivate gr
	offline_dirty >runs
	assert_runs "5-6 9-10 $((old / 8))-$((managed / 8))" runs
}

run_tests "$@"
