#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The udev rules: nobody takes up the devices below a managed device by what is on them.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

setup() { long_in_vm; }

install_rules() {
	mkdir -p /run/udev/rules.d
	cleanup rm -f /run/udev/rules.d/59-pristine.rules
	sed "s|@SBINDIR@/pristine|$PRISTINE|" "$PRISTINE_TOP/scripts/udev/59-pristine.rules" >/run/udev/rules.d/59-pristine.rules
}

# properties DEVICE: what udev makes of it. A daemon has to run, as `udevadm test` runs no programs.
properties() {
	if ! pidof systemd-udevd >/dev/null; then
		/usr/lib/systemd/systemd-udevd --daemon --resolve-names=never
		cleanup udevadm control --exit
	fi
	udevadm control --reload
	udevadm trigger --action=add --settle "$(readlink -f "$(sysfs_of "$1")")"
	udevadm info --query=all "$(readlink -f "$(sysfs_of "$1")")" >"$WORK/properties"
}

is_hidden() { # DEVICE ROLE
	properties "$1"
	assert_match "$(cat properties)" "ID_FS_TYPE=pristine_$2\$" "the type of $1"
	assert_match "$(cat properties)" "UDISKS_IGNORE=1\$" "what udisks sees of $1"
	assert_match "$(cat properties)" "PRISTINE_META_UUID=$uuid\$" "the metadata's UUID of $1"
	! grep -qE "ID_FS_UUID|disk/by-uuid|disk/by-label|ID_PART_TABLE" properties || { cat properties; fail "the content of $1 can be seen"; }
}

is_seen() { # DEVICE
	properties "$1"
	assert_match "$(cat properties)" "ID_FS_TYPE=ext4\$" "the type of $1"
	assert_match "$(cat properties)" "disk/by-uuid/" "the links of $1"
	! grep -qE "PRISTINE_ROLE|UDISKS_IGNORE" properties || { cat properties; fail "$1 is hidden"; }
}

test_udev_rules_are_valid() {
	install_rules
	udevadm verify /run/udev/rules.d/59-pristine.rules
}

test_udev_hides_data_and_metadata_devices() {
	make_disk data 32
	make_disk meta 2
	mkfs.ext4 -q -L golden "$data" 31m
	# Without the rules it would be seen, and before it is managed it is.
	is_seen "$data"
	install_rules
	is_seen "$data"
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	uuid=$(meta_tool get "$meta" meta_uuid)
	is_hidden "$data" data
	is_hidden "$meta" metadata
	activate ud
	is_hidden "$data" data
	is_hidden "$meta" metadata
	# A damaged first copy does not give it away.
	deactivate ud
	meta_tool flip "$meta" sb0
	is_hidden "$meta" metadata
	# The file system that was there before is seen again when the label is gone.
	dd if=/dev/zero of="$data" bs=4k count=1 seek=$(($(sectors "$data") / 8 - 1)) conv=notrunc oflag=direct status=none
	is_seen "$data"
}

test_udev_hides_a_data_device_with_a_tail() {
	make_disk data 32
	mkfs.ext4 -q "$data" 30m
	install_rules
	format_device "$data" -
	uuid=$(meta_tool get --tail "$data" meta_uuid)
	is_hidden "$data" data
}

test_udev_leaves_the_managed_device_alone() {
	make_disk data 32
	make_disk meta 2
	mkfs.ext4 -q "$data" 31m
	format_device "$data" "$meta"
	managed=$(managed_sectors "$meta" 0)
	activate ud
	assert_fails "$PRISTINE" device probe /dev/mapper/ud
	assert_match "$("$PRISTINE" device probe --export "$data")" '^PRISTINE_ROLE=data$'
	assert_match "$("$PRISTINE" device probe --json "$meta" | jq -r .role)" '^metadata$'
}

run_tests "$@"
