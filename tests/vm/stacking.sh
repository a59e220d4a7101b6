#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Above and below other block devices: LVM, dm-crypt, md. What is written through the whole stack is where it belongs,
# and the managed device in it knows exactly what changed.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

setup() {
	long_in_vm
	case $TEST in
	*_on_lvm | *_under_crypt | *_on_raid1) ;;
	*) [ "${TEST_LONG:-0}" = 1 ] || skip "only with TEST_LONG=1" ;;
	esac
}

# A physical volume is only found on these devices, and nothing waits for udev.
lvm_on() {
	local filter='"r|.*|"' dev
	for dev; do filter="\"a|^$dev\$|\",$filter"; done
	mkdir -p lvm
	cat >lvm/lvm.conf <<-END
		devices { use_devicesfile=0 scan="/dev" filter=[$filter] obtain_device_list_from_udev=0 external_device_info_source="none" }
		activation { udev_sync=0 udev_rules=0 verify_udev_operations=1 }
		backup { backup=0 archive=0 }
		global { locking_dir="$WORK/lvm" use_lvmpolld=0 event_activation=0 }
	END
	export LVM_SYSTEM_DIR=$WORK/lvm LVM_SUPPRESS_FD_WARNINGS=1
}

# format_and_activate: a managed device on $data with metadata on $meta, and a copy of what was there.
format_and_activate() {
	format_device "$data" "$meta"
	dd if="$data" of=original bs=1M iflag=direct status=none
	managed=$(managed_sectors "$meta" 0)
	activate st checkpoint_ms 200 || fail "cannot activate"
}

verify_on() {
	fio --name=v --filename="$1" --rw=randwrite --bsrange=4k-128k --direct=1 --ioengine=libaio --iodepth=8 --size=16M --io_size=12M --verify=crc32c \
		--do_verify=1 --verify_fatal=1 --fsync=32 --randseed=7 --output=fio.log || { cat fio.log; fail "fio's verification failed"; }
	blkdiscard -f -o $((20 << 20)) -l $((3 << 20)) "$1"
	blkdiscard -f -z -o $((24 << 20)) -l $((2 << 20)) "$1"
}

# Every block of $data that changed since it was formatted is dirty; and far fewer are dirty than there are.
is_superset() {
	dd if="$data" of=now bs=1M iflag=direct status=none
	stomp differ original now | managed_part >differing
	offline_dirty >dirty
	[ -s differing ] || fail "nothing was written"
	stomp missing differing dirty >lost
	[ ! -s lost ] || fail "changed and not dirty: $(head -n 3 lost)"
}

test_stacking_on_lvm() {
	local disk
	make_disk disk 96
	lvm_on "$disk"
	vgcreate -qq vgp "$disk"
	cleanup vgremove -ff -qq vgp
	lvcreate -qq -an -Zn -L 48m -n data vgp
	lvcreate -qq -an -Zn -L 4m -n meta vgp
	vgchange -qq -ay vgp
	data=/dev/mapper/vgp-data meta=/dev/mapper/vgp-meta
	format_and_activate
	verify_on /dev/mapper/st
	deactivate st
	is_superset
	# A volume that grew is refused, its old size is taken back, and nothing is lost.
	cp dirty before
	lvextend -qq -L +16m vgp/data
	assert_fails dmsetup create st --table "$(table)"
	kernel_said "data device has [0-9]+ sectors, the metadata was made for" || fail "the kernel did not say what is wrong"
	lvreduce -qq -f -L 48m vgp/data
	activate st
	deactivate st
	offline_dirty >dirty
	assert_same before dirty "dirty blocks"
	# While it is active it grows with its volume.
	activate st
	lvextend -qq -L +16m vgp/data
	"$PRISTINE" -q device grow st >/dev/null
	assert_eq "$(sectors /dev/mapper/st)" $((64 * 2048 - 8)) "the size of the device"
	stomp write /dev/mapper/st 16382
	deactivate st
	managed=$((64 * 2048 - 8))
	offline_dirty >dirty
	stomp missing before dirty >lost
	[ ! -s lost ] || fail "dirty before it grew and not after: $(head -n 3 lost)"
	assert_eq "$(tail -n 1 dirty | cut -d' ' -f2)" $((managed / 8)) "the end of what is dirty"
}

test_stacking_under_lvm() {
	make_disk data 64
	make_disk meta 2
	format_and_activate
	lvm_on /dev/mapper/st
	vgcreate -qq vgp /dev/mapper/st
	cleanup eval 'vgremove -ff -qq vgp 2>/dev/null || true'
	lvcreate -qq -ay -Zn -Wn -L 40m -n v vgp
	verify_on /dev/mapper/vgp-v
	vgremove -ff -qq vgp
	deactivate st
	is_superset
}

crypt_table() { echo "0 $(sectors "$1") crypt aes-xts-plain64 $(printf '%064d' 7) 0 $1 0 1 allow_discards"; }

test_stacking_on_crypt() {
	local disk
	stock_module dm_crypt
	make_disk disk 48
	make_disk meta 2
	make_dm crypt "$(crypt_table "$disk")"
	data=/dev/mapper/crypt
	format_and_activate
	verify_on /dev/mapper/st
	deactivate st
	is_superset
}

test_stacking_under_crypt() {
	stock_module dm_crypt
	make_disk data 48
	make_disk meta 2
	format_and_activate
	make_dm crypt "$(crypt_table /dev/mapper/st)"
	verify_on /dev/mapper/crypt
	remove_dm crypt
	deactivate st
	is_superset
}

# raid1 DEVICE...: an array of two that have their superblocks.
raid1() {
	mdadm --create /dev/md/pr --quiet --run --level=1 --raid-devices=2 --metadata=1.2 --bitmap=none --assume-clean --homehost=any --name=pr "$@" </dev/null
	cleanup eval 'mdadm --stop --quiet /dev/md/pr || true'
	array=$(readlink -f /dev/md/pr)
}

have_raid1() {
	modprobe -d "$PRISTINE_MODULES" -n -q raid1 || skip "this kernel has no raid1"
	stock_module raid1
}

test_stacking_on_raid1() {
	local one two
	have_raid1
	make_disk one 48
	make_disk two 48
	make_disk meta 2
	raid1 "$one" "$two"
	data=$array
	format_and_activate
	verify_on /dev/mapper/st
	# It gets on when half of what is below fails.
	mdadm --quiet --fail "$array" "$two"
	verify_on /dev/mapper/st
	deactivate st
	is_superset
}

test_stacking_under_raid1() {
	local other
	have_raid1
	make_disk data 48
	make_disk meta 2
	make_disk other 48
	format_and_activate
	raid1 /dev/mapper/st "$other"
	verify_on "$array"
	mdadm --quiet --stop "$array"
	deactivate st
	is_superset
	# Both halves hold the same.
	cmp -n $((30 << 20)) -i $((1 << 20)) now "$other_file" || fail "the halves of the mirror differ"
}

# Metadata on a mirror: it outlives one of the disks.
test_stacking_metadata_on_raid1() {
	local one two
	have_raid1
	make_disk data 48
	make_disk one 8
	make_disk two 8
	raid1 "$one" "$two"
	meta=$array
	format_and_activate
	stomp write /dev/mapper/st 3
	mdadm --quiet --fail "$array" "$one"
	stomp write /dev/mapper/st 3000
	assert_eq "$(stat_of st mode)" rw
	deactivate st
	offline_dirty >runs
	assert_runs "3-4 3000-3001" runs
}

test_stacking_of_managed_devices() {
	local low_data low_meta
	make_disk low_data 48
	make_disk low_meta 2
	data=$low_data meta=$low_meta
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	activate low
	data=/dev/mapper/low
	make_disk meta 2
	format_and_activate
	verify_on /dev/mapper/st
	deactivate st
	is_superset
	deactivate low
	offline_dirty "$low_data" "$low_meta" >low.dirty
	stomp missing differing low.dirty >lost
	[ ! -s lost ] || fail "changed and not dirty below: $(head -n 3 lost)"
}

run_tests "$@"
