#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 4 of the contract, superset: after any crash the recovered dirty set holds every block that differs from the
# master. Marking too much is allowed, and bounded by the hot extents; after a clean stop nothing too much is marked.
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=180

test_superset_is_exact_after_remove() {
	make_pair 64
	activate su
	# Blocks at both ends, across extents, words and the bounds of the device; one of them twice.
	local last=$((managed / 8))
	stomp write /dev/mapper/su 0 63+2 255+2 1000 4096+300 4100+3 $((last - 1))
	assert_eq "$(stat_of su dirty)" 307
	deactivate su
	offline_dirty >runs
	assert_runs "0-1 63-65 255-257 1000-1001 4096-4396 $((last - 1))-$last" runs
	# And it stays so: what is loaded again is the same, and what is added is exact too.
	activate su
	assert_eq "$(stat_of su dirty)" 307
	stomp write /dev/mapper/su 2000+2
	deactivate su
	offline_dirty >runs
	assert_runs "0-1 63-65 255-257 1000-1001 2000-2002 4096-4396 $((last - 1))-$last" runs
}

test_superset_is_exact_after_suspend_and_message() {
	make_pair 64
	activate su checkpoint_ms 0
	stomp write /dev/mapper/su 700 9000+5
	dmsetup suspend su
	cp "$data_file" cut.data
	cp "$meta_file" cut.meta
	dmsetup resume su
	offline_dirty cut.data cut.meta >runs
	assert_runs "700-701 9000-9005" runs "after a suspend"
	stomp write /dev/mapper/su 5000
	dmsetup message su 0 checkpoint
	cp "$meta_file" cut.meta
	offline_dirty cut.data cut.meta >runs
	assert_runs "700-701 5000-5001 9000-9005" runs "after a checkpoint"
}

# After a checkpoint some extents stay hot, and their intents must outlive the records before: writes to them cost no
# new record, so nothing else tells recovery of them.
test_superset_hot_extents_outlive_a_checkpoint() {
	make_pair 64 --log-pages 16
	activate su hot_extents 16 checkpoint_ms 0
	local n places=() before block fresh found=0
	# A log that is half full makes a checkpoint due, which keeps half of the hot set.
	# Each is written to three times: of the first touch of some only the very block is told.
	for n in $(seq 0 12); do places+=($((n * 256 + 7)) $((n * 256 + 8)) $((n * 256 + 9))); done
	stomp write /dev/mapper/su "${places[@]}"
	eventually 20 newer_checkpoint 1
	settled
	[ "$(stat_of su hot)" -gt 0 ] || fail "the checkpoint left no extent hot"
	# Of these as many were announced after the checkpoint as there are new records; the others it has carried over.
	fresh=$(stat_of su log)
	# From the newest on, until one is cold and would change the hot set.
	: >written
	for n in $(seq 12 -1 0); do
		before="$(stat_of su log) $(stat_of su checkpoint)"
		block=$((n * 256 + 99))
		dd if=/dev/urandom of=/dev/mapper/su bs=4k seek="$block" count=1 oflag=direct status=none
		cp "$meta_file" next.meta
		[ "$(stat_of su log) $(stat_of su checkpoint)" = "$before" ] || break
		# No record was needed, so it was hot.
		found=$((found + 1))
		echo "$block $((block + 1))" >>written
		mv next.meta cut.meta
	done
	[ "$found" -gt "$fresh" ] || fail "no extent stayed hot over the checkpoint ($found hot, $fresh announced since)"
	offline_dirty "$data_file" cut.meta >dirty
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "hot and not recovered as dirty: $(head -n 3 lost)"
}

# Extents go out of the hot set by way of the log as well: it tells their exact bits, and no checkpoint is written.
test_superset_of_extents_settled_by_the_log() {
	make_pair 64 --log-pages 256
	activate su hot_extents 16 checkpoint_ms 0
	local n places=() checkpoint
	checkpoint=$(stat_of su checkpoint)
	# Twice each, so that all get hot.
	for n in $(seq 0 49); do places+=($((n * 256 + 7)) $((n * 256 + 9))); done
	stomp write /dev/mapper/su "${places[@]}"
	# One settled extent is written to again: what is announced anew counts again.
	stomp write /dev/mapper/su 300
	cp "$meta_file" cut.meta
	[ "$(stat_of su checkpoint)" = "$checkpoint" ] || fail "a checkpoint was written"
	offline_dirty "$data_file" cut.meta >dirty
	for n in "${places[@]}" 300; do echo "$n $((n + 1))"; done >written
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "written and not recovered as dirty: $(head -n 3 lost)"
	n=$(awk '{ sum += $2 - $1 } END { print sum }' dirty)
	[ "$n" -le $((16 * 256 + 101)) ] || fail "$n blocks are recovered as dirty, of 101 written and 16 hot extents"
}

# When half of the hot set is taken, the first touch of an extent tells the very block and makes nothing hot.
test_superset_of_blocks_told_one_by_one() {
	make_pair 64 --log-pages 256
	activate su hot_extents 16 checkpoint_ms 0
	local n places=() checkpoint
	checkpoint=$(stat_of su checkpoint)
	for n in $(seq 0 49); do places+=($((n * 256 + 7))); done
	stomp write /dev/mapper/su "${places[@]}"
	cp "$meta_file" cut.meta
	[ "$(stat_of su checkpoint)" = "$checkpoint" ] || fail "a checkpoint was written"
	[ "$(stat_of su hot)" = 8 ] || fail "$(stat_of su hot) extents are hot, not half of 16"
	offline_dirty "$data_file" cut.meta >dirty
	for n in "${places[@]}"; do echo "$n $((n + 1))"; done >written
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "written and not recovered as dirty: $(head -n 3 lost)"
	n=$(awk '{ sum += $2 - $1 } END { print sum }' dirty)
	[ "$n" = $((8 * 256 + 42)) ] || fail "$n blocks are recovered as dirty, of 8 hot extents and 42 blocks"
	# And a checkpoint has them, now that their records count no more.
	dmsetup message su 0 checkpoint
	cp "$meta_file" cut.meta
	offline_dirty "$data_file" cut.meta >dirty
	stomp missing written dirty >lost
	[ ! -s lost ] || fail "written and not in the checkpoint: $(head -n 3 lost)"
}

# Waits until no checkpoint is under way: its number does not change for a while.
settled() {
	local seq
	while seq=$(stat_of su checkpoint); sleep 0.5; [ "$(stat_of su checkpoint)" != "$seq" ]; do :; done
}
newer_checkpoint() { [ "$(stat_of su checkpoint)" -gt "$1" ]; }

# Both disks are cut off at one instant under load, again and again; what lies there then is recovered, offline and
# by the kernel.
test_superset_of_all_changes_when_cut_under_load() {
	long_form vm
	make_cuttable 24 2 --log-pages 16
	activate su hot_extents 16 checkpoint_ms 150
	cut_under_load su nothing_is_lost
	local blocks over
	blocks=$(stat_of su dirty)
	deactivate su
	# What memory knew, without what only the hot extents might have held.
	offline_dirty >dirty
	over=$(stomp count dirty)
	assert_eq "$over" "$blocks" "dirty blocks after a clean stop"
	# The last cut again, by the kernel.
	offline_dirty cut.data cut.meta >dirty
	recovered_by_kernel_too
}

nothing_is_lost() { # WHEN
	offline_dirty cut.data cut.meta >dirty || fail "$1: recovery failed"
	stomp differ original cut.data >differing
	stomp missing differing dirty >lost
	[ ! -s lost ] || fail "$1: changed, but not recovered as dirty: $(head -n 5 lost)"
}

# The kernel recovers cut.data and cut.meta to the set in the file dirty.
recovered_by_kernel_too() {
	local d m
	d=$(losetup --show -f cut.data)
	m=$(losetup --show -f cut.meta)
	dmsetup create again --table "0 $managed pristine $d $m"
	online_dirty again >online
	remove_dm again
	losetup -d "$d"
	losetup -d "$m"
	assert_same online dirty "what the kernel recovers and what userspace does"
	# And it left the metadata clean and exact.
	offline_dirty cut.data cut.meta >after
	assert_same after dirty "the set after the kernel's recovery"
}

# Over-marking is bounded: with at most 16 hot extents no cut may call more blocks dirty than were written, and 16
# extents for those that are hot and as many for those that a checkpoint under way is retiring.
test_superset_over_marking_is_bounded() {
	make_pair 200 --log-pages 64
	activate su hot_extents 16 checkpoint_ms 0
	local n over worst=0
	for n in $(seq 0 3 150); do
		dd if=/dev/urandom of=/dev/mapper/su bs=4k count=1 seek=$((n * 256 + 17)) oflag=direct status=none
		if [ $((n % 30)) = 0 ]; then
			cp "$meta_file" cut.meta
			offline_dirty "$data_file" cut.meta >dirty
			over=$(($(stomp count dirty) - n / 3 - 1))
			[ "$over" -le "$worst" ] || worst=$over
		fi
	done
	[ "$worst" -le $((32 * 256)) ] || fail "$worst blocks too many were called dirty; at most 32 extents may be"
	[ "$worst" -gt 0 ] || fail "this cannot be: nothing was hot"
}

run_tests "$@"
