#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# A flipped bit in each structure of the metadata: the kernel refuses it (or tolerates it, where another copy tells the
# same), changes nothing, and `pristine device check` names the structure. `pristine device repair` then makes it usable again,
# with every block dirty that was.
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

# mended [MOST]: a repair makes the files bad.* usable; no dirty block is lost, and at most MOST blocks are dirty then.
mended() {
	local count
	"$PRISTINE" -q device repair bad.data --metadata bad.meta --yes || fail "it cannot be repaired"
	"$PRISTINE" -q device check bad.data --metadata bad.meta || fail "a repair leaves damage"
	attach
	dmsetup create da --table "$(table)" || fail "the kernel refuses what was repaired"
	online_dirty da >got
	stomp missing want got >lost
	[ ! -s lost ] || fail "dirty blocks lost by the repair: $(cat lost)"
	count=$(stomp count got)
	[ "$count" -le "${1:-$count}" ] || fail "$count blocks are dirty after the repair, at most $1 may be"
	stomp write /dev/mapper/da 7000
	remove_dm da
	detach
}

# beyond_repair: a repair of the files bad.* is refused, and changes nothing.
beyond_repair() {
	cp bad.data before.data
	cp bad.meta before.meta
	assert_fails "$PRISTINE" -q device repair bad.data --metadata bad.meta --yes
	assert_match "$SAID" "cannot be repaired" "what a repair says"
	assert_match "$SAID" "pristine device format" "what to do then"
	assert_same bad.data before.data "the data device after a refused repair"
	assert_same bad.meta before.meta "the metadata after a refused repair"
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
	beyond_repair
}

test_damage_in_the_label_is_refused() {
	cut_metadata
	meta_tool flip bad.data label 100
	refused "data device label"
	# The UUID in it is whole, so it is the right device.
	mended 1286
	fresh
	meta_tool flip bad.data label 20
	refused "data device label"
	beyond_repair
}

test_damage_in_the_checkpoint_is_refused() {
	local structure name
	cut_metadata
	for structure in index plane; do
		fresh
		name=$(meta_tool flip bad.meta "$structure")
		refused "$name"
		# The checkpoint before knows of no block; the log since then, of five extents.
		mended 1280
	done
}

test_damage_in_a_log_record_is_refused() {
	local structure name
	cut_metadata
	for structure in log-first log-last; do
		fresh
		name=$(meta_tool flip bad.meta "$structure" 20)
		refused "$name"
		# It may have been any extent.
		mended
		# In the sector without entries, which ends the record.
		fresh
		name=$(meta_tool flip bad.meta "$structure" 700)
		refused "$name"
		mended 1286
		# Behind the end there is nothing.
		fresh
		meta_tool flip bad.meta "$structure" 4095
		tolerated
	done
}

# A record that is gone altogether, though later ones are there.
test_damage_that_loses_a_log_record_is_refused() {
	local where
	cut_metadata
	where=$(meta_tool where bad.meta log-first)
	dd if=/dev/zero of=bad.meta bs=4096 count=1 seek=$((${where%% *} / 4096)) conv=notrunc status=none
	refused "${where#* }"
	mended
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

# A page of the ring that holds none of the log, after an unclean stop: behind the end of the log whatever it is, at its end if
# a good sector shows that no record was written there in full. It is written anew, so that no record is ever mistaken for it.
test_damage_in_a_log_page_that_is_not_needed_is_tolerated() {
	local where page
	cut_metadata
	where=$(meta_tool where bad.meta log-last)
	page=$((${where%% *} / 4096 + 1))
	for page in $((page + 1)) $((page + 5)) $page; do
		fresh
		if [ "$page" = $((${where%% *} / 4096 + 1)) ]; then
			printf damaged | dd of=bad.meta bs=1 seek=$((page * 4096 + 700)) conv=notrunc status=none
		else
			head -c 4096 /dev/urandom | dd of=bad.meta bs=4096 seek=$page conv=notrunc status=none
		fi
		assert_match "$("$PRISTINE" device check bad.data --metadata bad.meta 2>&1 || true)" "not needed" "what device check says of page $page"
		tolerated
		kernel_said "1 pages of the log were damaged" || fail "the kernel did not say so"
		"$PRISTINE" device check bad.data --metadata bad.meta || fail "the page was not written anew"
	done
	# All of it: that may have been a record.
	fresh
	head -c 4096 /dev/urandom | dd of=bad.meta bs=4096 seek=$page conv=notrunc status=none
	refused "log record"
}

# After a stop in order there is no record, so no page of the ring can have been one.
test_damage_in_the_log_of_a_stopped_device_is_tolerated() {
	cut_metadata
	cp "$data_file" bad.data
	cp "$meta_file" bad.meta
	offline_dirty bad.data bad.meta >want
	dd if=/dev/urandom of=bad.meta bs=4096 seek=16 count=16 conv=notrunc status=none
	tolerated
	"$PRISTINE" device check bad.data --metadata bad.meta || fail "the ring was not written anew"
}

run_tests "$@"
