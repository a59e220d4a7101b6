#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 3 of the contract, flush: when a FLUSH or FUA completes to the layer above, everything acknowledged before it
# survives a power cut, with the records that are needed to find it. (That it does, crash.sh shows with all states that a
# cut can leave; here, that flushes arrive where they must.)
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# Flush requests that a disk has completed.
flushes() { awk '{ print $16 }' "/sys/block/${1#/dev/}/stat"; }

test_flush_reaches_the_data_device() {
	make_pair 16
	activate fl checkpoint_ms 0
	stomp write /dev/mapper/fl 7
	local before
	before=$(flushes "$data")
	stomp sync /dev/mapper/fl
	[ "$(flushes "$data")" -gt "$before" ] || fail "fsync of the managed device did not flush the data device"
	before=$(flushes "$data")
	dd if=/dev/zero of=/dev/mapper/fl bs=4k seek=7 count=1 oflag=direct,dsync status=none
	[ "$(flushes "$data")" -gt "$before" ] || fail "FUA of the managed device did not flush the data device"
}

test_flush_makes_records_durable() {
	make_pair 16
	activate fl checkpoint_ms 0
	local before
	before=$(flushes "$meta")
	stomp write /dev/mapper/fl 7
	[ "$(flushes "$meta")" -gt "$before" ] || fail "the record of a write was not flushed"
	before=$(flushes "$meta")
	dmsetup message fl 0 checkpoint
	[ "$(flushes "$meta")" -gt "$before" ] || fail "a checkpoint did not flush the metadata device"
}

# The power goes right after fsync returned: data and record are there.
test_flush_then_cut_keeps_data_and_record() {
	make_pair 16
	cp "$data_file" original
	# Once it drops writes, nothing that the disks had not got by then ever arrives.
	make_dm lower-data "0 $(sectors "$data") flakey $data 0 3600 0"
	make_dm lower-meta "0 $(sectors "$meta") flakey $meta 0 3600 0"
	local disk=$data metadisk=$meta dm
	data=/dev/mapper/lower-data meta=/dev/mapper/lower-meta
	activate fl
	fio --name=j --filename=/dev/mapper/fl --rw=randwrite --bs=4k --size=8M --number_ios=200 --fsync=20 --ioengine=psync --randseed=3 \
		--end_fsync=1 --output=fio.log
	for dm in lower-data:$disk lower-meta:$metadisk; do
		dmsetup load "${dm%%:*}" --table "0 $(sectors "${dm#*:}") flakey ${dm#*:} 0 0 3600 1 drop_writes"
		dmsetup suspend --nolockfs "${dm%%:*}"
		dmsetup resume "${dm%%:*}"
	done
	dd if=/dev/mapper/fl of=after bs=1M iflag=direct status=none
	cmp -n $((8 << 20)) after "$data_file" || fail "what was flushed is not on the data device"
	offline_dirty "$data_file" "$meta_file" >dirty
	stomp differ original "$data_file" | managed_part >differing
	[ -s differing ]
	stomp missing differing dirty >lost
	[ ! -s lost ] || fail "changed and flushed, but not recovered as dirty: $(cat lost)"
}

run_tests "$@"
