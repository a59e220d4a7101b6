#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Everything at the same time: mixed I/O of fio with its verification and of stress.py with its own, while the device is suspended,
# reloaded, asked for checkpoints and for its map, and another comes and goes. With TEST_LONG=1 for half an hour
# (TEST_STRESS_SECONDS, or TEST_MINUTES, says otherwise).
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

SECONDS_OF_STRESS=6
[ "${TEST_LONG:-0}" != 1 ] || SECONDS_OF_STRESS=${TEST_STRESS_SECONDS:-1800}
[ -z "${TEST_MINUTES:-}" ] || SECONDS_OF_STRESS=$((TEST_MINUTES * 60))
TEST_TIMEOUT=$((SECONDS_OF_STRESS * 2 + 120))

# fio_until SECOND NAME OPTION...: fio, again and again with other seeds.
fio_until() {
	local end=$1 name=$2 seed=0
	shift 2
	while [ $SECONDS -lt "$end" ]; do
		seed=$((seed + 1))
		fio --name="$name" --filename=/dev/mapper/stress --direct=1 --randseed=$seed --output="$name.log" --eta=never "$@" || {
			cat "$name.log" >&2
			return 1
		}
	done
	echo "$seed" >"$name.runs"
}

# Loses nothing, whatever is done to the device meanwhile; the map is a superset all the while and exact in the end.
test_superset_and_flush_under_stress() {
	long_in_vm
	local data2 meta2 data2_file meta2_file managed2 table2 end pids=() pid runs='' name
	make_disk data2 16
	make_disk meta2 1
	format_device "$data2" "$meta2"
	managed2=$(managed_sectors "$meta2" 0)
	make_disk data 112
	make_disk meta 2
	# Whatever anybody writes is not this, so that what was touched differs.
	head -c 112M /dev/zero | tr '\0' 'o' >"$data_file"
	format_device "$data" "$meta" --log-pages 32
	managed=$(managed_sectors "$meta" 0)
	cp "$data_file" original
	activate stress hot_extents 16 checkpoint_ms 50
	table2="0 $managed2 pristine $data2 $meta2"

	end=$((SECONDS + SECONDS_OF_STRESS))
	fio_until $end mixed --ioengine=libaio --iodepth=8 --rw=randwrite --bsrange=4k-64k --offset=0 --size=8M \
		--verify=crc32c --verify_backlog=64 & pids+=($!)
	fio_until $end sectors --ioengine=psync --rw=randwrite --bsrange=512-8k --blockalign=512 --offset=16M --size=512k --fsync=8 \
		--verify=crc32c & pids+=($!)
	fio_until $end trims --ioengine=libaio --iodepth=4 --rw=randtrimwrite --bs=128k --offset=24M --size=8M & pids+=($!)
	fio_until $end sequential --ioengine=libaio --iodepth=4 --rw=write --bs=1M --offset=40M --size=16M --end_fsync=1 \
		--verify=crc32c & pids+=($!)
	for pid in "${pids[@]}"; do cleanup stop "$pid"; done
	python3 -I -S "$LIB/stress.py" stress "$(table)" $((64 * 256)) $((40 * 256)) "$SECONDS_OF_STRESS" "${TEST_SEED:-1}" touched \
		stress2 "$table2" >counts || fail "stress.py failed"
	for pid in "${pids[@]}"; do wait "$pid" || fail "fio found a wrong block or an error"; done
	for name in mixed sectors trims sequential; do runs+=", $(cat $name.runs) times $name"; done

	# All of it is on the data device, which is a file that can be read while the device is active.
	stomp sync /dev/mapper/stress
	stomp differ original "$data_file" >raw
	managed_part <raw >differing
	online_dirty stress >online
	stomp missing differing online >lost
	[ ! -s lost ] || fail "changed, but not dirty in the kernel: $(head -n 5 lost)"
	stomp missing touched differing >lost
	[ ! -s lost ] || fail "written, but not on the disk: $(head -n 5 lost)"
	[ "$(stat_of stress mode)" = rw ] || fail "the device is no longer writable"
	deactivate stress
	offline_dirty >offline
	assert_same offline online "the map on disk and that in memory"
	assert_same offline differing "the map and what differs"
	"$PRISTINE" -q device check "$data" --metadata "$meta"
	"$PRISTINE" -q device check "$data2" --metadata "$meta2"
	cat counts
	report "$SECONDS_OF_STRESS s: $(cat counts)$runs"
}

run_tests "$@"
