#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Generations that come and go while a device is active: `pristine device update` makes what they change stale, in one step, and
# pristined goes over to them. Power cuts at any instant of it: test_crash_states_of_a_revert_and_a_change_of_generation.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180
PRISTINED=$PRISTINE_TOP/build/userspace/pristined
MIB=15

# generations N: so many in the channel `lab` of $store, the images ./1, ./2 …, which differ from each other all over; their ids
# are in the array `ids`.
generations() {
	local n at
	store=$PWD/store ids=('')
	head -c ${MIB}M /dev/urandom >./1
	for ((n = 1; n <= $1; n++)); do
		if [ $n != 1 ]; then
			cp $((n - 1)) $n
			for at in $((n * 10)) 500 1000 3000; do
				dd if=/dev/urandom of=$n bs=4096 seek=$at count=$((n * 4)) conv=notrunc status=none
			done
		fi
		"$PRISTINE" -q image build $n -o "$store" --channel lab --keep-free >/dev/null
		ids[n]=$("$PRISTINE" image list "$store" --json | jq -r '.channels[0].image')
	done
}

# managed INITIAL [FEATURE VALUE...]: the device `gen` at generation 1, which its disk holds unless it is stale.
managed() {
	local initial=$1
	shift
	make_disk data 16
	make_disk meta 2
	format_device "$data" "$meta" --initial "$initial" --image "${ids[1]}" --image-size ${MIB}M --size ${MIB}M --generation 1
	managed=$(managed_sectors "$meta" 0)
	[ "$initial" = stale ] || dd if=1 of="$data" bs=1M conv=notrunc,fsync oflag=direct status=none
	activate gen "$@"
}

update() { "$PRISTINE" device update gen --store "$store" --image lab "$@"; }

# serve [OPTION...]: pristined in the background, $server.
serve() {
	"$PRISTINED" --device gen --store "$store" --state "$PWD/state.json" "$@" 2>served &
	server=$!
	cleanup end_server $server
	eventually 20 is_attached || fail "$(cat served)"
}
end_server() { kill -CONT "$1" 2>/dev/null; kill -9 "$1" 2>/dev/null || true; }
is_attached() { [ "$("$PRISTINE" device status gen --json | jq .fetch.helper)" = true ]; }
serves() { [ "$(jq -r .image state.json)" = "${ids[$1]}" ]; }
hydrated() { [ "$(stat_of gen stale)" = 0 ]; }
is_generation() {
	blockdev --flushbufs /dev/mapper/gen
	cmp -n $((MIB << 20)) /dev/mapper/gen "$1" || fail "the device is not generation $1"
}
rest_is_served() {
	serve --hydrate full
	wait $server || fail "pristined ended with $?: $(cat served)"
}

test_generation_of_an_active_device() {
	generations 2
	managed clean
	stomp write /dev/mapper/gen 3 24 700
	exits 11 "3 blocks of gen were changed" update
	assert_eq "$(stat_of gen dirty) $(stat_of gen stale)" "3 0" "after it was refused"
	local open planned
	exec {open}</dev/mapper/gen
	exits 7 "in use by process" update --revert
	exec {open}<&-
	planned=$(update --revert --dry-run --json)
	assert_eq "$(jq -c '[.modified, .reverted, .changed, .generation]' <<<"$planned")" "[32,3,true,2]"
	assert_eq "$(stat_of gen generation)" 1 "the generation after a dry run"
	update --revert >said
	assert_match "$(cat said)" "gen went from image .* \(generation 1\) to .* \(generation 2\)"
	# One of the three is among those that the generation changed.
	assert_eq "$(stat_of gen dirty) $(stat_of gen stale) $(stat_of gen generation)" "0 34 2"
	assert_match "$(dmsetup status gen)" "${ids[2]}"
	exits 0 "has that generation already" update
	exits 15 "older than gen's, 2" "$PRISTINE" device update gen --store "$(older)" --image lab
	rest_is_served
	is_generation 2
	deactivate gen
	activate gen
	is_generation 2
	"$PRISTINE" device update gen --store "$(older)" --image lab --allow-older >/dev/null
	deactivate gen
	activate gen
	assert_eq "$(stat_of gen generation) $(stat_of gen stale)" "1 32"
	rest_is_served
	is_generation 1
}
# The store as it would be if the channel had been set back.
older() {
	if [ ! -e older ]; then
		cp -r "$store" older
		cp older/releases/lab/1 older/channels/lab
	fi
	echo "$PWD/older"
}

# pristined serves on, and what it has in hand of the old generation goes nowhere.
test_generation_changes_under_pristined() {
	generations 4
	managed stale
	serve --hydrate full --rate 1500K --stay
	local generation
	for generation in 2 3 4; do
		sleep 0.5
		# Stopped with blocks of the old generation in hand, which it offers when it goes on.
		kill -STOP $server
		"$PRISTINE" device update gen --store "$store" --image "${ids[generation]}" >/dev/null
		kill -CONT $server
		eventually 20 is_attached
		eventually 20 serves $generation
		cmp -i 4096000 -n 409600 /dev/mapper/gen $generation || fail "gen does not show generation $generation"
	done
	eventually 60 hydrated
	is_generation 4
	kill -0 $server || fail "pristined ended: $(cat served)"
	assert_eq "$(grep -c 'with another image' served)" 3 "how often it went over"
	kill -TERM $server
	wait $server || fail "pristined ended with $?"
	deactivate gen
	cmp -n $((MIB << 20)) "$data_file" 4 || fail "the disk is not generation 4"
}

# One that was told which image it is for does not follow; who reads waits for one that does.
test_generation_is_not_that_of_a_pinned_helper() {
	generations 2
	managed stale
	serve --hydrate off --image "${ids[1]}"
	update >/dev/null
	local status=0
	wait $server || status=$?
	assert_eq $status 5 "exit code of the helper ($(cat served))"
	rest_is_served
	is_generation 2
}

# Forced, under a reader: what waits for a block of the old generation gets the new one's or an error, never the old one's.
test_generation_forced_under_a_reader() {
	generations 2
	managed clean
	local open
	exec {open}</dev/mapper/gen
	cmp -n $((MIB << 20)) "/dev/fd/$open" 1
	exits 7 "unmount it first" update
	update --force >/dev/null
	serve --hydrate off
	is_generation 2
	exec {open}<&-
	kill -TERM $server
	wait $server || fail "pristined ended with $?"
}

test_generation_of_a_suspended_device_and_of_a_table_that_names_one() {
	generations 2
	managed clean image "${ids[1]}" generation 1
	dmsetup suspend gen
	update >/dev/null
	assert_match "$(dmsetup info gen)" "ACTIVE"
	assert_match "$(dmsetup table gen)" "image ${ids[2]} generation 2"
	rest_is_served
	is_generation 2
}

# The command is killed at any instant, also between the commit and the new table: the disk has one generation or the other, and
# the same command, run again, goes on.
test_generation_changes_are_killed() {
	generations 2
	managed clean
	local n to now=2 killed=0 status begin took=${EPOCHREALTIME/./} rounds=8
	[ "${TEST_LONG:-0}" != 1 ] || rounds=64
	update >/dev/null
	took=$((${EPOCHREALTIME/./} - took))
	for ((n = 1; n <= rounds; n++)); do
		to=$((3 - now)) status=0 begin=${EPOCHREALTIME/./}
		# Most of the time goes before the suspension.
		timeout -s KILL "$(awk "BEGIN { print $took / 1e6 * (0.4 + 0.6 * $n / $rounds) }")" \
			"$PRISTINE" device update gen --store "$store" --image "${ids[to]}" --revert >said 2>&1 || status=$?
		if [ $status != 0 ]; then killed=$((killed + 1)); else
			# The machine has become quicker.
			took=$(((${EPOCHREALTIME/./} - begin) * 9 / 10))
		fi
		# What a power cut would leave now is whole.
		cp "$meta_file" cut
		"$PRISTINE" -q device map "$data_file" --metadata cut --json >map.json || fail "after $n: $(cat map.json said)"
		"$PRISTINE" device update gen --store "$store" --image "${ids[to]}" --revert >said 2>&1 || fail "it does not go on: $(cat said)"
		assert_match "$(dmsetup info gen)" ACTIVE
		now=$to
	done
	[ $killed -gt 0 ] || fail "none was killed"
	rest_is_served
	is_generation $now
}

# One page of the metadata cannot be written, whichever it is: the change is done as a whole, or not at all.
test_generation_changes_fail_as_a_whole() {
	generations 2
	stock_module dm_flakey
	managed clean
	deactivate gen
	cp "$meta_file" fresh
	local disk=$meta pages page size status
	size=$(sectors "$disk") pages=$(($(sectors "$disk") / 8))
	make_dm frail "0 $size linear $disk 0"
	meta=/dev/mapper/frail
	# The superblocks, and the indexes of both checkpoints; one of these the kernel writes when it is suspended, the other one the command.
	local which=(0 "$(meta_tool get fresh area_start0)" "$(meta_tool get fresh area_start1)" $((pages - 1)))
	[ "${TEST_LONG:-0}" != 1 ] || mapfile -t which < <(seq 0 12; echo $((pages - 1)))
	for page in "${which[@]}"; do
		dd if=fresh of="$disk" bs=1M conv=fsync status=none
		blockdev --flushbufs "$disk"
		activate gen checkpoint_ms 0
		frail $page
		status=0
		"$PRISTINE" device update gen --store "$store" --image "${ids[2]}" >said 2>&1 || status=$?
		turn frail "0 $size linear $disk 0"
		deactivate gen || { dmsetup remove --force gen; }
		"$PRISTINE" device check "$data" --metadata "$meta" >said 2>&1 || fail "page $page: $(cat said)"
		activate gen
		case $(stat_of gen generation) in
		1) [ $status != 0 ] || fail "page $page: it said that it was done, and it was not" ;;
		2) ;;
		*) fail "page $page: generation $(stat_of gen generation)" ;;
		esac
		if [ "$(stat_of gen generation)" = 2 ]; then
			assert_eq "$(stat_of gen stale)" 32 "stale blocks"
		else
			is_generation 1
		fi
		deactivate gen
	done
}
turn() {
	dmsetup load "$1" --table "$2"
	dmsetup suspend --nolockfs --noflush "$1"
	dmsetup resume "$1"
}
# frail PAGE: writes of this page of the metadata fail.
frail() {
	local at=$(($1 * 8)) rest=$((size - $1 * 8 - 8))
	{
		[ $at = 0 ] || echo "0 $at linear $disk 0"
		echo "$at 8 flakey $disk $at 0 3600 1 error_writes"
		[ $rest = 0 ] || echo "$((at + 8)) $rest linear $disk $((at + 8))"
	} >frail-table
	dmsetup load frail frail-table
	dmsetup suspend --nolockfs --noflush frail
	dmsetup resume frail
}

run_tests "$@"
