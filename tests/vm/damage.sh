#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# A flipped bit in each structure of the metadata: the kernel refuses it (or tolerates it, where another copy tells the
# same), changes nothing, and `pristine device check` names the structure.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

# Metadata with something in every structure, as a power cut leaves it: bad.data, bad.meta.
cut_metadata() {
	make_pair 32
	activate da checkpoint_ms 0
	stomp write /dev/mapper/da 10 3000+5
	dmsetup message da 0 checkpoint
	stomp write /dev/mapper/da 500
	stomp write /dev/mapper/da 1500
	stomp write /dev/mapper/da 2500
	cp "$data_file" cut.data
	cp "$meta_file" cut.meta
	deactivate da
	offline_dirty cut.data cut.meta >want
	fresh
	assert_eq "$(meta_tool records bad.meta | wc -w)" 3 "records that are needed"
}

fresh() {
	cp cut.data bad.data
	cp cut.meta bad.meta
}

# attach: bad.data and bad.meta as disks $data and $meta.
attach() {
	data=$(losetup --show -f bad.data)
	meta=$(losetup --show -f bad.meta)
	cleanup detach
	cleanup remove_dm da
}
detach() {
	losetup -d "$data" "$meta" 2>/dev/null || true
}

# refused STRUCTURE-NAME: with the files bad.*.
refused() {
	local bad
	attach
	cp bad.meta bad.before
	assert_fails dmsetup create da --table "$(table)"
	remove_dm da
	detach
	assert_match "$SAID" "Structure needs cleaning" "the error of the activation ($1)"
	kernel_said "$1" || fail "the kernel did not name the $1"
	assert_same bad.meta bad.before "the metadata after a refusal"
	check_names "$1"
}

# check_names STRUCTURE-NAME: `device check` says that it is damaged.
check_names() {
	assert_fails "$PRISTINE" device check bad.data --metadata bad.meta
	assert_match "$SAID" "$1" "what device check says"
}

# tolerated: the kernel uses the files bad.*, and knows all that it should.
tolerated() {
	attach
	dmsetup create da --table "$(table)" || fail "the kernel refuses what it need not"
	online_dirty da >got
	assert_same got want "the dirty blocks in spite of the damage"
	remove_dm da
	detach
}

test_damage_in_one_superblock_copy_is_tolerated() {
	local copy
	cut_metadata
	"$PRISTINE" device check bad.data --metadata bad.meta || fail "device check finds damage in what a power cut left"
	for copy in 0 1; do
		fresh
		meta_tool flip bad.meta sb"$copy"
		check_names "superblock copy $copy"
		tolerated
		# And mended, for both copies are written when a device is used.
		"$PRISTINE" device check bad.data --metadata bad.meta || fail "the damaged superblock copy $copy was not written anew"
	done
}

test_damage_in_both_superblock_copies_is_refused() {
	cut_metadata
	meta_tool flip bad.meta sb0
	meta_tool flip bad.meta sb1
	refused "superblock copy 0"
}

test_damage_in_the_label_is_refused() {
	cut_metadata
	meta_tool flip bad.data label
	refused "data device label"
}

test_damage_in_the_checkpoint_is_refused() {
	local structure name
	cut_metadata
	for structure in index plane; do
		fresh
		name=$(meta_tool flip bad.meta "$structure")
		refused "$name"
	done
}

test_damage_in_a_log_record_is_refused() {
	local structure name
	cut_metadata
	for structure in log-first log-last; do
		fresh
		name=$(meta_tool flip bad.meta "$structure")
		refused "$name"
		# The last byte, in the last sector.
		fresh
		name=$(meta_tool flip bad.meta "$structure" 4095)
		refused "$name"
	done
}

# A record that is gone altogether, though later ones are there.
test_damage_that_loses_a_log_record_is_refused() {
	local where
	cut_metadata
	where=$(meta_tool where bad.meta log-first)
	dd if=/dev/zero of=bad.meta bs=4096 count=1 seek=$((${where%% *} / 4096)) conv=notrunc status=none
	refused "${where#* }"
}

test_damage_by_a_torn_last_record_is_a_power_cut() {
	cut_metadata
	meta_tool tear bad.meta
	# Nothing that it announced was sent to the data device, so its extent need not be known.
	"$PRISTINE" device check bad.data --metadata bad.meta || fail "device check takes a torn record for damage"
	offline_dirty bad.data bad.meta >want
	tolerated
}

# What nobody needs is not looked at by the kernel.
test_damage_in_the_other_checkpoint_area_is_tolerated() {
	cut_metadata
	meta_tool flip bad.meta old-index
	tolerated
}

run_tests "$@"
