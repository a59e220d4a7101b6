#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Stale blocks: reads go to the helper and are kept, whole writes need no fetch, and what was promised is never called
# stale again (rules 2, 3 and 4 of the contract).
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=$((120 + ${TEST_MINUTES:-0} * 60))

helper() { python3 -I -S "$LIB/helper.py" "$@"; }

# stale_pair MIB [OPTION...]: disks as make_pair makes them, all of it stale; $image is the master's content, $blocks of it.
stale_pair() {
	local mib=$1
	shift
	make_pair "$mib" --initial stale "$@"
	# Whatever is on the disk is worthless.
	head -c $((managed * 512)) /dev/zero | tr '\0' w | dd of="$data_file" bs=64k conv=notrunc status=none
	blocks=$((managed / 8))
	image=$PWD/image
	head -c $((blocks * 4096)) /dev/urandom >"$image"
	# Some of it is zero.
	dd if=/dev/zero of="$image" bs=4096 seek=300 count=400 conv=notrunc status=none
}

# serve NAME [OPTION...]: a helper in the background, $server.
serve() {
	local name=$1
	shift
	rm -f ready
	# Not the function, which would be a process between.
	python3 -I -S "$LIB/helper.py" serve "/dev/mapper/$name" "$image" ready="$PWD/ready" "$@" 2>served &
	server=$!
	cleanup stop $server
	eventually 20 is_ready || return 1
}
is_ready() {
	! grep -q "Error" served || fail "the helper ended: $(cat served)"
	[ -e ready ]
}

# waits NAME [N]: whether so many requests wait for an answer.
waits() { [ "$(helper stats "/dev/mapper/$1" open)" -ge "${2:-1}" ]; }
device_is_image() { cmp -n $((blocks * 4096)) "/dev/mapper/$1" "$image" || fail "the device is not the image"; }
drop_caches() { blockdev --flushbufs "/dev/mapper/$1"; }

test_stale_blocks_are_fetched_once_and_kept() {
	stale_pair 32
	activate st
	assert_eq "$(stat_of st stale)" "$blocks"
	serve st
	helper read /dev/mapper/st 8 8 "$image"
	# A part of a block, over the border of one, and of a zero one.
	helper read /dev/mapper/st 83 3 "$image"
	helper read /dev/mapper/st 102 4 "$image"
	helper read /dev/mapper/st 2400 1 "$image"
	assert_eq "$(stat_of st stale)" $((blocks - 5))
	helper stale /dev/mapper/st >runs
	assert_runs "0-1 2-10 11-12 14-300 301-$blocks" runs
	assert_eq "$(helper stats /dev/mapper/st fetched)" 5
	helper read /dev/mapper/st 8 8 "$image"
	assert_eq "$(helper stats /dev/mapper/st fetched)" 5
	device_is_image st
	assert_eq "$(stat_of st stale)" 0
	assert_eq "$(stat_of st dirty)" 0
	stop "$server"
	drop_caches st
	# It is all there, without a helper.
	device_is_image st
	deactivate st
	cmp -n $((blocks * 4096)) "$data_file" "$image" || fail "the disk is not the image"
	assert_eq "$(meta_tool get "$meta_file" stale_blocks)" 0
	activate st
	device_is_image st
}

test_stale_map_lasts() {
	stale_pair 32
	activate st
	serve st
	helper read /dev/mapper/st 800 160 "$image"
	stomp write /dev/mapper/st 200+3
	stop "$server"
	deactivate st
	assert_eq "$(meta_tool get "$meta_file" stale_blocks)" $((blocks - 23))
	assert_eq "$(meta_tool get "$meta_file" dirty_blocks)" 3
	activate st
	helper stale /dev/mapper/st >runs
	assert_runs "0-100 120-200 203-$blocks" runs
	online_dirty st >runs
	assert_runs "200-203" runs
	helper read /dev/mapper/st 800 160 "$image"
	dmsetup suspend st
	dmsetup resume st
	helper stale /dev/mapper/st >runs
	assert_runs "0-100 120-200 203-$blocks" runs "after a suspend"
}

test_stale_whole_writes_need_no_fetch() {
	stale_pair 32
	activate st
	# Nobody serves, and nobody is needed.
	stomp write /dev/mapper/st 7 300+600
	# Forced, as it would read the device first otherwise.
	blkdiscard -f -o $((2000 * 4096)) -l $((50 * 4096)) /dev/mapper/st || true
	blkdiscard -f -z -o $((3000 * 4096)) -l $((50 * 4096)) /dev/mapper/st
	assert_eq "$(helper stats /dev/mapper/st requests)" 0
	[ "$(stat_of st stale)" -le $((blocks - 651)) ] || fail "$(stat_of st stale) of $blocks blocks are stale"
	dd if=/dev/mapper/st bs=4096 skip=300 count=600 iflag=direct status=none >got
	deactivate st
	dd if="$data_file" bs=4096 skip=300 count=600 status=none | cmp - got
}

test_stale_parts_are_fetched_before_they_are_written() {
	stale_pair 32
	activate st
	serve st delay=50
	cp "$image" want
	# One sector; the end of a block and the start of the next; three blocks of which the middle one is whole.
	stomp sectors /dev/mapper/st 801
	stomp sectors /dev/mapper/st 1607+2
	stomp sectors /dev/mapper/st 2005+16
	stomp sectors want 801 1607+2 2005+16 2>/dev/null || python3 -I -S - want <<-'PY'
		import sys
		with open(sys.argv[1], "r+b") as f:
		    for first, count in ((801, 1), (1607, 2), (2005, 16)):
		        f.seek(first * 512)
		        f.write((b"sector %020d\n" % first * 20)[:512] * count)
	PY
	cmp -n $((blocks * 4096)) /dev/mapper/st want || fail "the device is not what was written"
	online_dirty st >runs
	assert_runs "100-101 200-202 250-253" runs
}

test_stale_reads_wait_for_a_helper() {
	stale_pair 32
	activate st
	helper read /dev/mapper/st 80 8 "$image" &
	local reader=$!
	eventually 10 waits st
	kill -0 $reader || fail "the read did not wait"
	assert_eq "$(helper stats /dev/mapper/st open)" 1
	serve st
	wait $reader || fail "the read failed"
	# With a time limit they fail.
	stop "$server"
	deactivate st
	activate st fetch_timeout_ms 300
	expect_dmesg 'were not fetched in time'
	assert_fails helper read /dev/mapper/st 160 8 "$image"
	assert_fails stomp sectors /dev/mapper/st 163
	# A helper that takes requests and does not answer is no better than none.
	serve st most=0
	assert_fails helper read /dev/mapper/st 160 8 "$image"
	stop "$server"
	serve st
	helper read /dev/mapper/st 160 8 "$image"
}

test_stale_requests_outlive_helpers() {
	stale_pair 32
	activate st
	serve st most=0
	local first=$server
	helper read /dev/mapper/st 80 8 "$image" &
	local one=$!
	helper read /dev/mapper/st 800 80 "$image" &
	local two=$!
	eventually 10 waits st 2
	# Killed with requests in hand.
	kill -KILL "$first"
	wait "$first" 2>/dev/null || true
	serve st most=0
	local second=$server
	sleep 1
	# Stopped; another takes over.
	kill -STOP "$second"
	assert_fails helper serve /dev/mapper/st "$image"
	serve st take-over
	wait $one $two || fail "a read failed"
	kill -CONT "$second"
	wait "$second" || fail "the helper that lost the device did not end in order"
}

test_stale_helper_errors_reach_the_reader() {
	stale_pair 32
	activate st
	serve st fail=100+10
	assert_fails helper read /dev/mapper/st 800 8 "$image"
	assert_fails stomp sectors /dev/mapper/st 803
	# It is only these, and only until they are written as a whole.
	helper read /dev/mapper/st 880 8 "$image"
	stomp write /dev/mapper/st 100
	dd if=/dev/mapper/st bs=4096 skip=100 count=1 iflag=direct status=none >/dev/null
	[ "$(helper stats /dev/mapper/st errors)" -ge 2 ] || fail "the errors were not counted"
}

test_stale_reads_do_not_hold_up_suspend_and_removal() {
	stale_pair 32
	activate st
	expect_dmesg 'were not fetched in time'
	helper read /dev/mapper/st 80 8 "$image" &
	local reader=$!
	eventually 10 waits st
	# Without a flush the read is kept until the device goes on.
	timeout 20 dmsetup suspend --noflush --nolockfs st || fail "suspend --noflush hangs"
	kill -0 $reader || fail "the read did not outlive the suspension"
	dmsetup resume st
	serve st
	wait $reader || fail "the read failed"
	stop "$server"
	# With one it must end, and without a helper that can only be an error.
	helper read /dev/mapper/st 160 8 "$image" &
	reader=$!
	eventually 10 waits st
	timeout 30 dmsetup suspend --nolockfs st || fail "suspend hangs"
	! wait $reader || fail "the read succeeded with nobody to serve it"
	dmsetup resume st
	timeout 30 dmsetup remove st || fail "remove hangs"
}

test_stale_helper_outlives_a_suspension() {
	stale_pair 32
	activate st
	serve st delay=20 hydrate
	helper exercise /dev/mapper/st "$image" 6 1 &
	local load=$! n
	for n in 1 2 3 4; do
		sleep 0.7
		dmsetup suspend --nolockfs st
		sleep 0.1
		dmsetup resume st
	done
	wait $load || fail "what was read is wrong"
	kill -0 "$server" || fail "the helper ended"
}

test_stale_channel_refuses_what_is_wrong() {
	stale_pair 32
	activate st
	helper abuse /dev/mapper/st "$image" >abuse
	[ "$(wc -l <abuse)" -ge 45 ] || fail "only $(wc -l <abuse) abuses were tried"
	deactivate st
	# A device without stale blocks needs no helper.
	make_pair 16
	activate st
	assert_fails helper serve /dev/mapper/st "$image" 2>said
	grep -q "No data available" said || fail "the helper said: $(cat said)"
}

test_stale_device_without_metadata_device() {
	make_tail 32 --initial stale
	blocks=$((managed / 8)) image=$PWD/image
	head -c $((blocks * 4096)) /dev/urandom >"$image"
	activate st
	serve st
	helper exercise /dev/mapper/st "$image" 4 2
	stop "$server"
	deactivate st
	activate st
	serve st
	helper read /dev/mapper/st $((managed - 8)) 8 "$image"
}

# What a flush promised is not stale after a cut, whatever the checkpoint says: blocks that were overwritten, and
# blocks that were fetched and then written in part.
test_stale_is_never_what_a_flush_promised() {
	stale_pair 32
	activate st checkpoint_ms 0
	serve st
	helper read /dev/mapper/st 8000 64 "$image"
	stomp write /dev/mapper/st 100+20
	stomp sectors /dev/mapper/st 8003
	stomp sectors /dev/mapper/st 9605
	stomp sync /dev/mapper/st
	power_cut
	meta_states >states
	assert_match "$(cat states)" '^100 120 dirty$' "overwritten blocks"
	assert_match "$(cat states)" '^1000 1001 dirty$' "a block that was read, then written"
	assert_match "$(cat states)" '^1200 1201 dirty$' "a block that was written in part"
	# What was only fetched is stale again, which costs a fetch and no more.
	assert_match "$(cat states)" '^1001 1200 stale$'
	# The same with FUA.
	dd if=/dev/zero of=/dev/mapper/st bs=4096 seek=2000 count=1 oflag=direct,dsync status=none
	dd if=/dev/zero of=/dev/mapper/st bs=512 seek=8017 count=1 oflag=direct,dsync status=none
	power_cut
	meta_states >states
	assert_match "$(cat states)" '^2000 2001 dirty$' "a block that was overwritten with FUA"
	assert_match "$(cat states)" '^1002 1003 dirty$' "a block that was written in part with FUA"
	# A checkpoint keeps what was fetched.
	dmsetup message st 0 checkpoint
	power_cut
	meta_states >states
	assert_match "$(cat states)" '^1003 1008 clean$'
	# And after it, a fetched block that is written needs nothing more.
	stomp sectors /dev/mapper/st 8041
	stomp sync /dev/mapper/st
	power_cut
	meta_states >states
	# The extent is hot, so its other valid blocks count as dirty too.
	assert_match "$(cat states)" '^1000 1008 dirty$'
	# The device goes on from the cut.
	deactivate st
	cp cut.meta "$meta_file"
	cp cut.data "$data_file"
	activate st
	serve st
	helper read /dev/mapper/st 4000 800 "$image"
}
# A power cut when nothing is under way: what is on the disks now.
power_cut() {
	cp "$meta_file" cut.meta
	cp "$data_file" cut.data
}
meta_states() {
	"$PRISTINE" -q device map cut.data --metadata cut.meta --json |
		jq -r '.runs[] | "\(.start) \(.start + .blocks) \(.state)"'
}

test_stale_exercise() {
	stale_pair 64
	activate st
	serve st threads=4 hydrate
	local seconds=8
	[ "${TEST_LONG:-0}" = 0 ] || seconds=120
	[ -z "${TEST_MINUTES:-}" ] || seconds=$((TEST_MINUTES * 60))
	helper exercise /dev/mapper/st "$image" $seconds "$RANDOM" 4
	deactivate_with_helper st
}
# A data volume that is taken back without being stopped: nobody may have it open, and what is opened afterwards is the image.
test_stale_revert_of_an_active_device() {
	make_pair 16 --initial clean --image "$(printf '%064d' 7)" --image-size 8M --size 12M
	blocks=$((managed / 8))
	image=$PWD/image
	# Past its end the image is zero.
	head -c 8M /dev/urandom >"$image"
	dd if="$image" of="$data" bs=1M oflag=direct status=none
	truncate -s 12M "$image"
	activate st
	stomp write /dev/mapper/st 5 100+20 2500
	assert_match "$("$PRISTINE" device revert st --dry-run)" "would be reverted: 22 of"
	# Somebody has it open: nothing changes, and it goes on.
	local open
	exec {open}</dev/mapper/st
	assert_fails "$PRISTINE" device revert st
	assert_match "$SAID" "in use"
	exec {open}<&-
	stomp write /dev/mapper/st 6
	assert_eq "$(stat_of st dirty) $(stat_of st stale)" "23 0"
	"$PRISTINE" device revert /dev/mapper/st >said || fail "cannot revert: $(cat said)"
	assert_match "$(cat said)" "reverted: 23 of"
	assert_eq "$(stat_of st dirty) $(stat_of st stale)" "0 23" "dirty and stale blocks"
	# It is on disk, and lasts.
	cp "$meta_file" cut.meta
	"$PRISTINE" -q device map "$data_file" --metadata cut.meta --json >map.json
	assert_eq "$(jq '[.runs[] | select(.state == "stale") | .blocks] | add' map.json)" 23
	serve st
	device_is_image st
	stomp write /dev/mapper/st 7
	# Again, while a helper serves it: it is told to come again.
	"$PRISTINE" device revert st >said || fail "cannot revert again: $(cat said)"
	assert_match "$(cat said)" "reverted: 1 of"
	wait $server || true
	serve st
	device_is_image st
	deactivate st
	# Without an image there is nothing to go back to.
	make_pair 16
	activate st
	stomp write /dev/mapper/st 5
	assert_fails "$PRISTINE" device revert st
	assert_match "$SAID" "names no image"
	assert_eq "$(stat_of st dirty)" 1
	stomp write /dev/mapper/st 6
}

deactivate_with_helper() {
	deactivate "$1"
	wait "$server" || fail "the helper did not end with the device"
}

run_tests "$@"
