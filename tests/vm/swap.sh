#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Swapping to a managed device: under memory pressure pages go out to cold extents and come back whole. A first touch
# must not wait for memory that only this very write would free.
#
# runs-on: host
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=280

# On a busy machine it takes minutes.
setup() { [ "${TEST_LONG:-0}" = 1 ] || skip "only with TEST_LONG=1"; }

# Memory with content of its own in each page, more than the machine has; then all of it is read back.
hog() { # MIB
	cat <<-END
		import mmap, sys
		PAGES = $1 * 256
		m = mmap.mmap(-1, PAGES * 4096)
		def content(n, turn): return (n * 2654435761 + turn).to_bytes(8, "little") * 512
		for turn in range(1):
		    for n in range(PAGES): m[n * 4096:n * 4096 + 4096] = content(n, turn)
		    for n in range(0, PAGES): assert m[n * 4096:n * 4096 + 4096] == content(n, turn), (n, turn)
		print("all", PAGES, "pages came back")
	END
}

test_swap_under_memory_pressure() {
	truncate -s 320M data.img
	truncate -s 2M meta.img
	data=$PWD/data.img meta=$PWD/meta.img
	format_device "$data" "$meta" --log-pages 16
	managed=$(managed_sectors "$meta" 0)
	hog 70 >hog.py
	local disks=(--disk "$data" --disk "$meta") run=("$PRISTINE_TOP/virtme/run-uml") names=(/dev/ubda /dev/ubdb)
	if [ "$TEST_LANE" = vm ]; then
		long_in_vm
		run=("$PRISTINE_TOP/virtme/run-vm" --module dm_mod) names=(/dev/vda /dev/vdb)
		hog 300 >hog.py
	fi
	cat >guest <<-END
		insmod $PRISTINE_KO
		dmsetup create sw --table '0 $managed pristine ${names[*]} 4 hot_extents 16 checkpoint_ms 100' || exit 1
		mkswap /dev/mapper/sw && swapon /dev/mapper/sw || exit 1
		cat >/run/hog.py <<'HOG'
$(cat hog.py)
		HOG
		while sleep 10; do grep -E '^pswp' /proc/vmstat; dmsetup status sw; done &
		python3 -I -S /run/hog.py || exit 1
		cat /proc/swaps; grep -E '^pswp' /proc/vmstat; dmsetup status sw
		swapoff /dev/mapper/sw || exit 1
		dmsetup remove sw
	END
	# Little memory, and the smallest hot set, so that extents have to cool while memory is short.
	"${run[@]}" --name "test-swap-$$" --timeout 240 --memory 160 "${disks[@]}" -- "$(cat guest)" >out 2>&1 ||
		{ cat out; fail "the machine did not survive, or pages were lost"; }
	cat out
	grep -q "all [0-9]* pages came back" out || fail "the pages did not come back"
	[ "$(awk '$1 == "pswpout" { print $2 }' out)" -gt 2000 ] || fail "hardly anything was swapped"
	offline_dirty >runs
	[ "$(stomp count runs)" -gt 2000 ] || fail "only $(stomp count runs) blocks are dirty"
}

run_tests "$@"
