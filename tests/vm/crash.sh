#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# All states that a power cut can leave: data and metadata lie on disks that record what they are asked, together, and
# pristine-replay (tests/replay) recovers and checks what every prefix of the recording leaves, torn writes, and random
# subsets of what was not durable. The kernel recovers a sample of the states.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# The long form tries many times as many states.
if [ "${TEST_LONG:-0}" = 1 ]; then TEST_TIMEOUT=2400; else TEST_TIMEOUT=480; fi
REPLAY=$PRISTINE_TOP/build/userspace/pristine-replay
# Operations of a workload, in per cent; random choices for each event; states for the kernel. An emulated machine does less.
SEED=${TEST_SEED:-1} KEEP_STATE='' LENGTH=100 SUBSETS=3 SAMPLES=2
# shellcheck disable=SC2153
[ "${TEST_LANE:-}" != vm ] || LENGTH=50 SUBSETS=1 SAMPLES=1
[ "${TEST_LONG:-0}" != 1 ] || LENGTH=$((LENGTH * 4)) SUBSETS=$((SUBSETS * 3)) SAMPLES=$((SAMPLES * 5)) TEST_TIMEOUT=1800

# disk_with MIB META-MIB [OPTION...]: the file `before`, a data device of MIB and behind it a metadata device of META-MIB, or, with
# 0, the metadata in the tail, formatted; OPTION is one of `device format`. Makes the disk `sample`, too, on which the
# kernel recovers states.
disk_with() {
	local mib=$1
	meta_mib=$2
	shift 2
	image='' serve=()
	make_disk sample $((mib + meta_mib))
	data_bytes=$((mib << 20))
	ln -s "$sample_file" state
	cut_in_parts sample "$sample"
	# So that a block that was cleared differs from the original.
	head -c "${FILL:-$mib}M" /dev/zero | tr '\0' 'o' >"$data"
	format_device "$data" "$meta" "$@"
	if [ "$meta" = - ]; then
		managed=$(managed_sectors "$data" $((data_bytes - 4096)))
	else
		managed=$(managed_sectors "$meta" 0)
	fi
	sync
	before=before
	cp --sparse=always "$sample_file" before
	sample_data=$data sample_meta=$meta
}

# stale_disk_with MIB META-MIB [OPTION...]: the same, all of it stale; $image is the master.
stale_disk_with() {
	disk_with "$@" --initial stale
	# The garbage that is there shows in whatever is valid too early.
	image=$PWD/image
	head -c $((managed * 512)) /dev/urandom >"$image"
	dd if=/dev/zero of="$image" bs=4096 seek=300 count=200 conv=notrunc status=none
}

# cut_in_parts NAME DEVICE [META-DEVICE]: its data device $data and its metadata device $meta; with META-DEVICE they are
# devices of their own.
cut_in_parts() {
	make_dm "$1-data" "0 $((data_bytes >> 9)) linear $2 0"
	data=/dev/mapper/$1-data meta=-
	if [ "$meta_mib" != 0 ]; then
		local behind=$((data_bytes >> 9))
		[ $# -lt 3 ] || behind=0
		make_dm "$1-meta" "0 $((meta_mib << 11)) linear ${3:-$2} $behind"
		meta=/dev/mapper/$1-meta
	fi
}

# recorder FILE: disks with this content, $data and $meta on them, that record to the file `recording`. What is flushed on the one
# may be lost on the other.
recorder() {
	local size split=() disks
	[ -d /sys/module/nbd ] || stock_module nbd nbds_max=2 max_part=0
	size=$(stat -c %s "$1")
	disks=("/dev/nbd0=$data_bytes")
	if [ "$meta_mib" != 0 ]; then
		disks+=("/dev/nbd1=$((size - data_bytes))")
		split=(--split "$data_bytes")
	fi
	marks=$WORK/marks
	rm -f "$marks" recording
	recorded=("${disks[@]%=*}")
	python3 -I -S "$LIB/nbd.py" attach "$(IFS=,; echo "${disks[*]}")" \
		"$REPLAY" disk --before "$1" --log recording --marks "$marks" "${split[@]}" >attached &
	server=$!
	eventually 20 grep -q attached attached
	eventually 20 test -S "$marks"
	eventually 20 disks_are_there "${disks[@]}"
	cleanup detach
	cut_in_parts recorded "${recorded[@]}"
}
disks_are_there() {
	local disk
	for disk; do [ "$(blockdev --getsize64 "${disk%=*}")" = "${disk#*=}" ] || return 1; done
}

# Ends the recording; it is complete then.
detach() {
	[ -n "${server:-}" ] || return 0
	remove_dm recorded-data
	remove_dm recorded-meta
	python3 -I -S "$LIB/nbd.py" detach "${recorded[@]}"
	wait "$server"
	server=
}

# A helper for /dev/mapper/NAME that comes again when the table was reloaded; $helpers.
helpers_for() {
	local name=$1
	rm -f ready
	(
		child=
		trap 'kill $child 2>/dev/null; wait; exit 0' TERM
		while :; do
			python3 -I -S "$LIB/helper.py" serve "/dev/mapper/$name" "$image" ready="$PWD/ready" "${serve[@]}" 2>served &
			child=$!
			wait $child || true
			sleep 0.02 &
			wait $!
		done
	) &
	helpers=$!
	cleanup stop $helpers
	eventually 20 test -e ready
}

# record MIX OPERATIONS THREADS [FEATURE VALUE...]: the workload on a recorded disk that begins as $before. If that has stale
# blocks, a helper serves them with the options in the array `serve`.
record() {
	local mix=$1 operations=$(($2 * LENGTH / 100)) threads=$3
	shift 3
	recorder "$before"
	activate crash "$@"
	[ -z "$image" ] || helpers_for crash
	python3 -I -S "$LIB/record.py" crash "$marks" "$SEED" $((managed / 8)) "$operations" "$threads" "$mix" "$(table "$@")" operations
	[ -z "$image" ] || stop $helpers
	deactivate crash
	detach
}

# check NAME HOT-EXTENTS [OPTION...]: all states of the recording.
check() {
	local name=$1 hot=$2
	shift 2
	[ "$meta" != - ] || set -- --tail "$@"
	[ -z "$image" ] || set -- --master "$image" "$@"
	export PRISTINE LIB KEEP_STATE IMAGE=$image FEATURES=${FEATURES:-}
	"$REPLAY" check recording --before "$before" --data-bytes "$data_bytes" --operations operations --seed "$SEED" --subsets "$SUBSETS" \
		--hot "$hot" --sample "$SAMPLES" "$@" -- \
		bash "$LIB/in-kernel" "$managed" "$sample_data" "$sample_meta" >verdict 2>said || {
		tail -n 30 said verdict
		fail "states after a power cut break the contract: $(grep -m 1 '^wrong' verdict || tail -n 1 said)"
	}
	cat verdict
	report "$name: $(tail -n 2 verdict | head -n 1); $(tail -n 1 verdict)"
	# A check that tried next to nothing is none.
	[ "$(sed -n 's/ states, .*//p' verdict)" -gt 50 ] || fail "too few states"
}

# Some run by default, in the lab kernel; all with TEST_LONG=1, or by name.
in_long() {
	long_form
}

test_crash_states_of_random_writes() {
	long_in_vm
	disk_with 12 1 --log-pages 16
	record random 130 3 hot_extents 16 checkpoint_ms 50
	check random 16
}

test_crash_states_of_sequential_writes() {
	in_long
	disk_with 12 1 --log-pages 16 --extent-size 64K
	record sequential 100 2 hot_extents 64 checkpoint_ms 100
	check sequential 64
}

test_crash_states_of_discards() {
	in_long
	disk_with 12 1 --log-pages 16 --extent-size 256K
	record discard 100 2 hot_extents 32 checkpoint_ms 50
	check discard 32
}

test_crash_states_of_many_flushes() {
	long_in_vm
	disk_with 12 1 --log-pages 64
	record fsync 120 3 hot_extents 4096 checkpoint_ms 0
	check fsync 4096
}

test_crash_states_of_suspend_and_reload() {
	in_long
	disk_with 12 1 --log-pages 16
	record suspend 100 2 hot_extents 16 checkpoint_ms 100
	check suspend 16
}

test_crash_states_of_checkpoints_under_load() {
	long_in_vm
	disk_with 12 1 --log-pages 16
	record checkpoint 120 4 hot_extents 32 checkpoint_ms 20
	check checkpoint 32
}

# Many small extents, of which few may be hot.
test_crash_states_of_hot_set_churn() {
	in_long
	disk_with 24 1 --log-pages 16 --extent-size 64K
	record churn 130 3 hot_extents 16 checkpoint_ms 30
	check churn 16
}

test_crash_states_with_metadata_in_the_tail() {
	long_in_vm
	disk_with 12 0 --log-pages 16
	record suspend 100 2 hot_extents 16 checkpoint_ms 50
	check "suspend, metadata in the tail" 16
}

# A map of several pages for each plane, written to all over, so that checkpoints store some pages and keep others.
test_crash_states_of_a_map_of_several_pages() {
	long_form
	FILL=12 disk_with 300 1 --log-pages 16
	record churn 100 3 hot_extents 16 checkpoint_ms 50
	# The state of so large a disk is not handed to the kernel; growing does that with two pages.
	SAMPLES=0 check "map of several pages" 16
}

# A cut, recovery, which is cut as well, more work, and a cut again: rules 4 and 7, and no number of a record is used twice.
test_crash_states_after_crashes() {
	long_in_vm
	disk_with 12 1 --log-pages 16
	crash_again churn --master before
}

# crash_again MIX [OPTION...]: OPTION goes to the check.
crash_again() {
	local mix=$1 n rounds=1
	shift
	[ "${TEST_LONG:-0}" != 1 ] || rounds=4
	record "$mix" 60 2 hot_extents 16 checkpoint_ms 50
	# The states that the kernel recovered are kept as they were; the last one is where it goes on.
	for ((n = 1; n <= rounds; n++)); do
		SAMPLES=1 KEEP_STATE=cut-$n
		check "$mix, after $((n - 1)) crashes" 16 "$@"
		[ -s "cut-$n" ] || fail "no state was chosen"
		before=cut-$n SEED=$((SEED + 1))
		record "$mix" 60 2 hot_extents 16 checkpoint_ms 50
	done
	SAMPLES=1 KEEP_STATE=
	check "$mix, after $rounds crashes" 16 "$@"
}

# Blocks that are stale at first: they are read, written as a whole and in part, and hydrated, while checkpoints come all the
# time. What is stale counts for what the master holds.
test_crash_states_of_stale_blocks() {
	long_in_vm
	stale_disk_with 12 1 --log-pages 16
	serve=(hydrate pause=20)
	record stale 90 3 hot_extents 16 checkpoint_ms 30
	check stale 16
}

# No checkpoints but those that the workload asks for: what a flush promises long has no other record than its own.
test_crash_states_of_stale_blocks_with_few_checkpoints() {
	in_long
	stale_disk_with 12 1 --log-pages 16
	record stale-read 150 4 hot_extents 64 checkpoint_ms 0
	check "stale, no timer" 64
}

test_crash_states_of_stale_blocks_under_checkpoints() {
	in_long
	stale_disk_with 12 1 --log-pages 16 --extent-size 64K
	serve=(threads=4 hydrate pause=40)
	record stale-checkpoint 130 4 hot_extents 16 checkpoint_ms 10
	check "stale, many checkpoints" 16
}

test_crash_states_of_stale_blocks_and_suspend() {
	in_long
	stale_disk_with 12 0 --log-pages 16
	serve=(hydrate pause=100)
	record stale-suspend 110 2 hot_extents 16 checkpoint_ms 50
	check "stale, suspend, metadata in the tail" 16
}

# A part is stale still, and of the others some are dirty.
test_crash_states_of_a_device_that_is_stale_in_part() {
	in_long
	stale_disk_with 12 1 --log-pages 16
	activate part
	serve=()
	helpers_for part
	local block
	for block in 0 500 1100 1200 2000; do
		python3 -I -S "$LIB/helper.py" read /dev/mapper/part $((block * 8)) 1000 "$image"
	done
	stomp write /dev/mapper/part 100+70 700+3 2500+300
	stop "$helpers"
	deactivate part
	cp --sparse=always "$sample_file" part
	before=part
	serve=(hydrate pause=60)
	record stale 130 3 hot_extents 16 checkpoint_ms 30
	check "stale in part" 16
}

test_crash_states_of_stale_blocks_after_crashes() {
	in_long
	stale_disk_with 12 1 --log-pages 16
	serve=(hydrate pause=150)
	crash_again stale
}

# What was changed is taken back, and then the device goes over to another generation, while pristined hydrates what an
# earlier revert left stale: each is one step, before which all is as it was and after which all is the image's.
test_crash_states_of_a_revert_and_a_change_of_generation() {
	local generation id=() steps=() n
	disk_with 6 1 --log-pages 16
	head -c 4M /dev/urandom >./1
	cp 1 2
	for n in 100 101 102 300 700; do dd if=/dev/urandom of=2 bs=4096 seek="$n" count=9 conv=notrunc status=none; done
	for generation in 1 2; do
		# Beyond the image the device is zero.
		truncate -s $((managed * 512)) $generation
		"$PRISTINE" -q image build $generation -o store --channel lab --keep-free >/dev/null
		id[generation]=$("$PRISTINE" image list store --json | jq -r '.channels[0].image')
	done
	dd if=1 of="$data" bs=1M conv=notrunc,fsync status=none
	format_device "$data" "$meta" --log-pages 16 --initial clean --image "${id[1]}" --image-size $((managed * 512)) --generation 1
	activate crash
	stomp write /dev/mapper/crash 40+30 100 310+20
	deactivate crash
	"$PRISTINE" -q device revert "$data" --metadata "$meta" >/dev/null
	activate crash
	cp 1 0
	head -c 200K /dev/urandom >changes
	for n in 50 105 600; do
		dd if=changes of=/dev/mapper/crash bs=4096 seek=$n count=10 oflag=direct conv=notrunc status=none
		dd if=changes of=0 bs=4096 seek=$n count=10 conv=notrunc status=none
	done
	deactivate crash
	sync
	cp --sparse=always "$sample_file" before
	# A revert, a change of generation, and one back.
	steps=("${id[1]}:0:1" "${id[1]}:1:1" "${id[2]}:2:2" "${id[1]}:1:1")
	recorder before
	activate crash checkpoint_ms 30
	"$PRISTINE_TOP/build/userspace/pristined" --device crash --store "$PWD/store" --state none --hydrate full --rate 300K --stay 2>served &
	helpers=$!
	cleanup stop $helpers
	eventually 20 has_helper crash
	"$PRISTINE" device revert crash
	mark_step 1
	eventually 20 has_helper crash
	sleep 0.3
	"$PRISTINE" device update crash --store store --image lab
	mark_step 2
	eventually 20 has_helper crash
	sleep 0.3
	"$PRISTINE" device update crash --store store --image "${id[1]}"
	mark_step 3
	stop $helpers
	deactivate crash
	detach
	: >operations
	image=$PWD/1 SAMPLES=0
	# shellcheck disable=SC2046 # each is a word
	check "revert and change of generation" 16 $(printf -- '--step %s ' "${steps[@]}")
}
has_helper() { [ "$("$PRISTINE" device status "$1" --json | jq .fetch.helper)" = true ]; }
mark_step() {
	python3 -I -S - "$marks" "$1" <<-'PY'
		import socket, sys
		with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
		    s.sendto(f"step {sys.argv[2]}".encode(), sys.argv[1])
	PY
}

# The data device is larger than it was, and the managed device grows when it is activated: a plane gets a second page, so
# that the checkpoint areas move, and what is stored of the stale plane would lie over the current checkpoint. Until the
# growth is durable the old size is in force, and growing again goes on from there.
test_crash_states_of_growing() {
	long_form
	FILL=12 disk_with 128 1 --log-pages 16
	image=$PWD/image
	dd if="$sample_data" of="$image" bs=1M conv=sparse status=none
	make_dm small "0 $((120 << 11)) linear $sample_data 0"
	data=/dev/mapper/small managed=$((120 * 2048 - 8))
	format_device "$data" "$meta" --log-pages 16 --initial clean --size $((managed * 512)) --image "$(printf '%064d' 7)" --image-size 12M
	activate old
	stomp write /dev/mapper/old 100+70 700+3 30000+300
	deactivate old
	"$PRISTINE" -q device revert "$data" --metadata "$meta" >/dev/null
	activate old
	stomp write /dev/mapper/old 20 110+5
	deactivate old
	assert_eq "$(meta_tool get "$meta" checkpoint_area)" 1 "the area that is in the way"
	remove_dm small
	sync
	cp --sparse=always "$sample_file" before
	data=$sample_data managed=$((128 * 2048 - 8))
	serve=(hydrate pause=20)
	# Each state of so large a disk takes its time, so there are few, also in the long form.
	LENGTH=50 record stale 40 2 hot_extents 16 checkpoint_ms 50 grow 1
	SUBSETS=1 SAMPLES=1 FEATURES="2 grow 1" check growing 16 --grow $managed
}

run_tests "$@"
