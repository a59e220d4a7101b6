#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# Rule 5 of the contract, identity: metadata is bound to the data device's size and UUID, to the image and to the
# generation. What does not match is refused with a clear error, and nothing is changed.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

IMAGE=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
OTHER=ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100

# refused ERRNO-TEXT KERNEL-REGEX TABLE: activation fails with this error, the kernel says why, and neither device has
# changed by a byte.
refused() {
	local saved=$meta_file
	[ "$saved" != - ] || saved=$data_file
	load_module
	cp "$saved" before.meta
	cleanup remove_dm id
	assert_fails dmsetup create id --table "$3"
	assert_match "$SAID" "$1" "the error of the activation"
	kernel_said "$2" || fail "the kernel did not say: $2"
	# It may have been refused when the table became active.
	remove_dm id
	cmp "$saved" before.meta || fail "a refused activation changed the metadata"
}

test_identity_metadata_of_another_device() {
	make_pair 16
	local first_meta=$meta
	make_pair 16
	# The same size, another UUID.
	meta=$first_meta
	refused "Wrong medium type" "belongs to another data device" "$(table)"
}

test_identity_swapped_devices() {
	make_pair 16
	local swap=$meta
	meta=$data data=$swap
	managed=$(($(sectors "$data") - 8))
	meta_file=$data_file
	refused "No data available|Invalid argument|Wrong medium type" "no pristine metadata|sectors" "$(table)"
}

test_identity_resized_data_device() {
	make_pair 16
	make_dm grown "0 $(($(sectors "$data"))) linear $data 0
$(sectors "$data") 2048 zero"
	local good=$data
	data=/dev/mapper/grown
	refused "Wrong medium type" "data device has 34816 sectors, the metadata was made for 32768" "$(table)"
	make_dm shrunk "0 $(($(sectors "$good") - 8)) linear $good 0"
	data=/dev/mapper/shrunk managed=$((managed - 8))
	refused "Wrong medium type" "data device has 32760 sectors, the metadata was made for 32768" "$(table)"
	data=$good managed=$((managed + 8))
	activate id
}

test_identity_tail_of_a_resized_device() {
	make_tail 16
	make_dm grown "0 $(($(sectors "$data"))) linear $data 0
$(sectors "$data") 2048 zero"
	data=/dev/mapper/grown
	refused "No data available" "no pristine metadata found" "$(table)"
}

test_identity_target_of_another_length() {
	make_pair 16
	managed=$((managed - 8))
	refused "Wrong medium type" "target length is $managed sectors, the metadata manages $((managed + 8))" "$(table)"
}

test_identity_features_that_do_not_match() {
	make_pair 16 --initial clean --image "$IMAGE" --image-size $((16 * 1048576 - 4096)) --generation 7
	local uuid
	uuid=$(meta_tool get "$meta" meta_uuid)
	managed=$(managed_sectors "$meta" 0)
	refused "Wrong medium type" "belongs to another image" "$(table image "$OTHER")"
	refused "Wrong medium type" "is of generation 7, not 8" "$(table generation 8)"
	refused "Wrong medium type" "metadata device is not the one asked for" "$(table meta_uuid 000102030405060708090a0b0c0d0e0f)"
	refused "Wrong medium type" "is of generation 7, not 8" "$(table image "$IMAGE" meta_uuid "$uuid" generation 8)"
	activate id image "$IMAGE" generation 7 meta_uuid "$uuid"
	assert_eq "$(stat_of id generation)" 7
	assert_match "$(dmsetup table id)" "image $IMAGE"
}

test_identity_newer_format_and_unknown_features() {
	make_pair 16
	cp "$meta_file" good
	meta_tool set "$meta" version 2
	refused "Protocol not supported" "format version 2 is newer than the 1 known here" "$(table)"
	dd if=good of="$meta" bs=1M status=none conv=notrunc,fsync
	meta_tool set "$meta" incompat 0x8000
	refused "Protocol not supported" "unknown features 0x8000" "$(table)"
	dd if=good of="$meta" bs=1M status=none conv=notrunc,fsync
	meta_tool set "$meta" ro_compat 4
	refused "Protocol not supported" "unknown features 0x4" "$(table)"
	dd if=good of="$meta" bs=1M status=none conv=notrunc,fsync
	# A feature that is compatible is no hindrance.
	meta_tool set "$meta" compat 1
	activate id
}

test_identity_metadata_that_needs_more_than_this() {
	make_pair 16
	cp "$meta_file" good
	# Flag 2 is "needs check".
	meta_tool set "$meta" flags 3
	refused "Structure needs cleaning" "needs a check after an earlier failure" "$(table)"
	dd if=good of="$meta" bs=1M status=none conv=notrunc,fsync
	meta_tool set "$meta" flags 0x101
	refused "Structure needs cleaning" "superblock copy 0 is damaged \(field flags" "$(table)"
}

test_identity_nothing_formatted() {
	make_disk data 16
	make_disk meta 2
	managed=32760
	refused "No data available" "no pristine metadata found" "$(table)"
	meta=- meta_file=-
	refused "No data available" "no pristine metadata found" "$(table)"
}

# The metadata becomes another while the table is loaded and not active yet.
test_identity_formatted_between_load_and_resume() {
	make_pair 16
	load_module
	dmsetup create id --notable
	cleanup remove_dm id
	dmsetup load id --table "$(table)"
	meta_tool set "$meta" meta_uuid 000102030405060708090a0b0c0d0e0f
	cp "$meta_file" before.meta
	assert_fails dmsetup resume id
	assert_match "$SAID" "Wrong medium type"
	kernel_said "formatted since the table was loaded" || fail "the kernel did not say so"
	assert_same "$meta_file" before.meta "the metadata"
}

run_tests "$@"
