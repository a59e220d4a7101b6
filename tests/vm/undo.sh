#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The undo area: the kernel keeps the original of each block before it changes, and a revert puts them back without the master.
# What a power cut leaves is also tried by `cargo test -p pristine-metadata --test undo`, at each write.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

device() { "$PRISTINE" -q device "$@"; }

# make_master MIB META-MIB UNDO [OPTION...]: a pair with an undo area, whose data device holds a master that is noise, with a
# part that is zero; a copy in the file master.
make_master() {
	local mib=$1 meta_mib=$2 undo=$3
	shift 3
	make_disk data "$mib"
	make_disk meta "$meta_mib"
	head -c $((mib * 3 / 4))M /dev/urandom | dd of="$data" bs=1M iflag=fullblock oflag=direct status=none
	format_device "$data" "$meta" --undo "$undo" "$@"
	managed=$(managed_sectors "$meta" 0)
	cp "$data_file" master
}

# undo_of NAME: the words of the status line on the undo area: state, used/pages, missing.
undo_of() { dmsetup status "$1" | sed -n 's/.* undo //p'; }

undo_offline() { # [DATA META]
	device revert "${1:-$data}" --metadata "${2:-$meta}" --undo --json >undone || fail "cannot undo: $(cat undone)"
}

# is_master [DATA]: what is managed is the master again.
is_master() {
	blockdev --flushbufs "$data"
	cmp -n $((managed * 512)) "${1:-$data_file}" master || fail "the data device is not the master's"
}

verify_fio() { # DEVICE [OPTION...]
	local device=$1
	shift
	fio --name=verify --filename="$device" --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio --iodepth=8 --size=40M \
		--norandommap=0 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=11 --output=fio.log "$@" || fail "fio: $(cat fio.log)"
}

test_undo_after_verified_writes() {
	make_master 64 70 64M
	activate un
	assert_match "$(undo_of un)" "^open 0/16384 0$"
	verify_fio /dev/mapper/un
	assert_match "$(undo_of un)" "^open [0-9]*/16384 0$"
	deactivate un
	[ "$(offline_dirty | awk '{ n += $2 - $1 } END { print n }')" -gt 5000 ] || fail "little was written"
	undo_offline
	assert_eq "$(jq .stale undone)" 0 "blocks left"
	assert_eq "$(jq .undone undone)" "$(jq .reverted undone)" "blocks put back"
	is_master
	offline_dirty >dirty
	[ ! -s dirty ] || fail "still dirty: $(head -n 3 dirty)"
	# And once more, in the emptied area.
	activate un
	assert_match "$(undo_of un)" "^open 0/16384 0$"
	stomp write /dev/mapper/un 5 300+20
	deactivate un
	undo_offline
	assert_eq "$(jq .undone undone)" 21
	is_master
}

# Just the blocks that change are kept, and those that are zero take no room.
test_undo_keeps_what_changes() {
	make_master 64 10 4M
	activate un checkpoint_ms 0
	stomp write /dev/mapper/un 7 256+2
	# A header and a page; a header and two.
	assert_eq "$(undo_of un)" "open 5/1024 0"
	stomp write /dev/mapper/un 7 256+2
	assert_eq "$(undo_of un)" "open 5/1024 0" "what is dirty is not copied again"
	# The last quarter is zero.
	stomp write /dev/mapper/un $((60 * 256))+16
	assert_eq "$(undo_of un)" "open 6/1024 0"
	stomp sectors /dev/mapper/un $((100 * 8 + 3))
	assert_eq "$(undo_of un)" "open 8/1024 0" "a part of a block"
	blkdiscard -z -o $((120 * 4096)) -l $((10 * 4096)) /dev/mapper/un
	assert_eq "$(undo_of un)" "open 19/1024 0" "zeroes"
	blkdiscard -o $((200 * 4096)) -l $((600 * 4096)) /dev/mapper/un
	# Blocks 256 and 257 are there.
	assert_match "$(undo_of un)" "^open 62[0-9]/1024 0$"
	assert_eq "$(stat_of un dirty)" $((1 + 2 + 16 + 1 + 10 + 598))
	assert_eq "$(stat_of un hot)" 0 "no extent gets hot"
	"$PRISTINE" device status un >said
	assert_match "$(cat said)" "undo .*each dirty block has its original"
	deactivate un
	device check "$data" --metadata "$meta" >said || fail "$(cat said)"
	undo_offline
	is_master
}

# After a cut at any time each dirty block has its original.
test_undo_after_cuts_under_load() {
	make_cuttable 24 26 --log-pages 16 --undo 24M
	activate un checkpoint_ms 150
	cut_under_load un all_is_undone
	assert_match "$(undo_of un)" "^open .* 0$"
	deactivate un
	# The last cut again, by the kernel, which goes on in the area.
	last_cut
	local d m
	d=$(losetup --show -f cut.data)
	cleanup losetup -d "$d"
	m=$(losetup --show -f cut.meta)
	cleanup losetup -d "$m"
	make_dm again "0 $managed pristine $d $m"
	assert_match "$(undo_of again)" "^open .* 0$"
	stomp write /dev/mapper/again 3000 5000+7
	remove_dm again
	undo_offline "$d" "$m"
	assert_eq "$(jq .stale undone)" 0
	sync "$d"
	cmp -n $((managed * 512)) cut.data original || fail "not the master's"
}
all_is_undone() { # WHEN
	undo_offline cut.data cut.meta
	assert_eq "$(jq .stale undone)" 0 "$1: dirty blocks without an original"
	cmp -n $((managed * 512)) cut.data original || fail "$1: not the master's"
}

# When it is full, writes go on, all who look see it, and only what has no original needs the master.
test_undo_full() {
	make_master 64 10 256K --image "$(printf '%064d' 7)" --image-size 60M --initial clean
	activate un
	stomp uevents 60 PRISTINE_UNDO=full >event &
	local waiter=$!
	cleanup stop "$waiter"
	eventually 60 grep -q listening event
	stomp write /dev/mapper/un 10 20 30+40 100+40
	wait "$waiter" || fail "no uevent"
	assert_match "$(undo_of un)" "^full [0-9]*/64 [1-9][0-9]*$"
	"$PRISTINE" device status un >said
	assert_match "$(cat said)" "FULL: [0-9]* dirty blocks have no original"
	dmesg | grep -q "the undo area is full" || fail "the kernel says nothing"
	# All is tracked as ever.
	verify_fio /dev/mapper/un --size=8M --offset=20M
	deactivate un
	activate un
	assert_match "$(undo_of un)" "^full [0-9]*/64 [1-9][0-9]*$" "after it was activated anew"
	deactivate un
	device revert "$data" --metadata "$meta" --undo --dry-run --json >dry
	undo_offline
	assert_eq "$(jq .undone undone)" "$(jq .undone dry)" "what a dry run says"
	[ "$(jq .undone undone)" -gt 40 ] || fail "$(jq .undone undone) blocks were put back"
	assert_eq "$(($(jq .undone undone) + $(jq .stale undone)))" "$(jq .reverted undone)"
	# What is neither stale nor dirty is the master's.
	device map "$data" --metadata "$meta" --json | jq -r '.runs[] | select(.state == "stale") | "\(.start) \(.start + .blocks)"' >stale
	blockdev --flushbufs "$data"
	stomp differ "$data_file" master | managed_part >differing
	stomp missing differing stale >wrong
	[ ! -s wrong ] || fail "neither stale nor the master's: $(head -n 3 wrong)"
	# The area is empty again.
	"$PRISTINE" device dump "$data" --metadata "$meta" --json | jq -e '.undo.used == 0' >/dev/null || fail "the area is not empty"
}

# Damage in it costs the originals that it hits, and nothing else.
test_undo_corrupt() {
	make_master 64 10 4M --image "$(printf '%064d' 7)" --image-size 60M --initial clean
	activate un
	local n
	for n in $(seq 0 9); do stomp write /dev/mapper/un $((n * 300))+3; done
	deactivate un
	local start
	start=$("$PRISTINE" device dump "$data" --metadata "$meta" --json | jq .undo.start)
	# The third header, an original of the fifth chunk, and an original of the sixth.
	for n in 8 18 22; do
		dd if=/dev/urandom of="$meta_file" bs=4096 seek=$((start + n)) count=1 conv=notrunc status=none
	done
	blockdev --flushbufs "$meta"
	device check "$data" --metadata "$meta" >said || true
	assert_match "$(cat said)" "undo area.*3 originals or headers in it are damaged"
	undo_offline
	assert_eq "$(jq '[.undone, .stale, .damaged] | map(tostring) | join(" ")' -r undone)" "25 5 3"
	device map "$data" --metadata "$meta" --json | jq -r '.runs[] | select(.state == "stale") | "\(.start) \(.start + .blocks)"' >stale
	blockdev --flushbufs "$data"
	stomp differ "$data_file" master | managed_part >differing
	stomp missing differing stale >wrong
	[ ! -s wrong ] || fail "neither stale nor the master's: $(head -n 3 wrong)"
}

# A device whose area cannot be written goes on without.
test_undo_area_that_fails() {
	make_master 64 10 4M
	local start pages
	start=$("$PRISTINE" device dump "$data" --metadata "$meta" --json | jq .undo.start)
	pages=$(($(sectors "$meta") / 8))
	make_dm bad "0 $((start * 8)) linear $meta 0
$((start * 8)) $(((pages - start) * 8)) error"
	local disk=$meta
	meta=/dev/mapper/bad
	activate un
	stomp write /dev/mapper/un 10+5
	assert_match "$(undo_of un)" "^failed 0/1024 5$"
	assert_eq "$(stat_of un mode)" rw
	deactivate un
	remove_dm bad
	meta=$disk
	offline_dirty >runs
	assert_runs "10-15" runs
}

# An active device that nobody has open; suspend and resume keep the area.
test_undo_of_an_active_device() {
	make_master 64 70 64M
	activate un
	stomp write /dev/mapper/un 10 900+300
	dmsetup suspend un
	dmsetup resume un
	assert_match "$(undo_of un)" "^open [0-9]*/16384 0$"
	stomp write /dev/mapper/un 2000
	device revert un --undo --json >undone || fail "cannot undo: $(cat undone)"
	assert_eq "$(jq .undone undone)" 302
	assert_eq "$(stat_of un dirty)" 0
	assert_match "$(undo_of un)" "^open 0/16384 0$"
	dd if=/dev/mapper/un of=now bs=1M iflag=direct status=none
	cmp now master -n $((managed * 512)) || fail "not the master's"
	deactivate un
}

# What was fetched is the master's and is kept when it changes; a stale block that is written as a whole has no original, and
# is stale again.
test_undo_beside_stale_blocks() {
	make_disk data 64
	make_disk meta 10
	format_device "$data" "$meta" --undo 4M --initial stale --image "$(printf '%064d' 7)" --image-size 60M
	managed=$(managed_sectors "$meta" 0)
	head -c $((managed * 512)) /dev/urandom >master
	activate un
	python3 -I -S "$LIB/helper.py" serve /dev/mapper/un master ready="$PWD/ready" 2>served &
	local helper=$! stale
	cleanup stop "$helper"
	eventually 20 test -e ready
	python3 -I -S "$LIB/helper.py" read /dev/mapper/un 800 160 master
	stomp write /dev/mapper/un 104+2
	assert_match "$(undo_of un)" "^open [0-9]*/1024 0$" "written after it was fetched"
	stomp sectors /dev/mapper/un $((300 * 8 + 3))
	assert_match "$(undo_of un)" "^open [0-9]*/1024 0$" "fetched for a part that was written"
	stomp write /dev/mapper/un 400+5
	assert_match "$(undo_of un)" "^open [0-9]*/1024 5$" "written as a whole"
	stale=$(stat_of un stale)
	stop "$helper"
	deactivate un
	undo_offline
	assert_eq "$(jq '[.undone, .stale] | map(tostring) | join(" ")' -r undone)" "3 $((stale + 5))"
	device map "$data" --metadata "$meta" --json | jq -r '.runs[] | select(.state == "stale") | "\(.start) \(.start + .blocks)"' >runs
	assert_eq "$(stomp count runs)" $((stale + 5)) "stale blocks"
	blockdev --flushbufs "$data"
	stomp differ "$data_file" master | managed_part >differing
	stomp missing differing runs >wrong
	[ ! -s wrong ] || fail "neither stale nor the master's: $(head -n 3 wrong)"
}

test_undo_without_an_area() {
	make_pair 64
	activate un
	stomp write /dev/mapper/un 10
	assert_eq "$(undo_of un)" ""
	deactivate un
	local status=0
	device revert "$data" --metadata "$meta" --undo 2>said || status=$?
	assert_eq $status 2 "the exit code"
	assert_match "$(cat said)" "has no undo area"
}

run_tests "$@"
