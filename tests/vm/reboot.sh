#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# What a machine leaves on its disks when it goes down with the managed device active: after an orderly shutdown or reboot
# the map is exact, after a power cut it is a superset.
#
# runs-on: host
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=240

# disks: data.img and meta.img, formatted, and original, what data.img held.
disks() {
	truncate -s 64M data.img
	truncate -s 2M meta.img
	data=$PWD/data.img meta=$PWD/meta.img
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	cp data.img original
}

# machine RUN-VM-OPTION... -- COMMAND: the managed device is /dev/mapper/root in it.
machine() {
	local options=()
	while [ "$1" != -- ]; do options+=("$1"); shift; done
	"$PRISTINE_TOP/virtme/run-vm" --name test-reboot-$$ --timeout 120 --module dm_mod --disk "$data" --disk "$meta" "${options[@]}" -- "
		insmod $PRISTINE_KO
		dmsetup create root --table '0 $managed pristine /dev/vda /dev/vdb 2 checkpoint_ms 0' || exit 1
		$2"
}

test_superset_is_exact_after_an_orderly_shutdown() {
	disks
	# The machine powers off when the command is done, and nobody stops the device.
	machine -- 'python3 -I -S tests/lib/stomp.py write /dev/mapper/root 7 300+5 9000; dmsetup status root'
	offline_dirty >runs
	assert_runs "7-8 300-305 9000-9001" runs "after a shutdown"
	"$PRISTINE" device check "$data" --metadata "$meta"
	# And after a reboot, on top of what was there.
	machine --allow-warnings -- 'python3 -I -S tests/lib/stomp.py write /dev/mapper/root 20; sync; busybox reboot -f; sleep 60' || true
	offline_dirty >runs
	assert_runs "7-8 20-21 300-305 9000-9001" runs "after a reboot"
}

test_superset_after_power_cuts() {
	disks
	local n seed=$RANDOM
	for n in 1 2; do
		echo "seed $seed" >&2
		machine --cut 'cut now' --allow-warnings -- "
			python3 -I -S tests/lib/stomp.py load /dev/mapper/root $seed 4000 /run/ops &
			while [ ! -s /run/ops ]; do sleep 0.1; done
			sleep 0.$((RANDOM % 10)); sleep 1
			wc -l </run/ops; echo cut now; sleep 60" || true
		offline_dirty >dirty || fail "cut $n: recovery failed"
		stomp differ original "$data" | managed_part >differing
		[ -s differing ] || fail "cut $n: nothing was written"
		stomp missing differing dirty >lost
		[ ! -s lost ] || fail "cut $n: changed, and not recovered as dirty: $(head -n 3 lost)"
		seed=$((seed + 1))
	done
}

run_tests "$@"
