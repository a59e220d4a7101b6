#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The `pristine device` commands on real devices: what they do, what they refuse, and with which exit code.
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

PRISTINE=${PRISTINE:-$PRISTINE_TOP/build/userspace/pristine}

device() { "$PRISTINE" device "$@"; }

# re TEXT: a regular expression for just this text.
# shellcheck disable=SC2001 # what is replaced is a class with a back reference
re() { sed 's/[][\.*^$+?(){}|]/\\&/g' <<<"$1"; }

# pair MIB [OPTION...]: disks $data and $meta, formatted by the command itself.
pair() {
	local mib=$1
	shift
	make_disk data "$mib"
	make_disk meta 2
	device format "$data" --metadata "$meta" "$@" >/dev/null
}

start() { # NAME [OPTION...]
	local name=$1
	shift
	device activate "$name" "$data" --metadata "$meta" --module "$PRISTINE_KO" "$@"
	cleanup remove_dm "$name"
}

# field NAME: a number of the JSON on stdin.
field() { python3 -I -S -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

dirty_runs() {
	python3 -I -S -c '
import json, sys
for r in json.load(sys.stdin)["runs"]:
    if r["state"] == "dirty":
        print("%d-%d" % (r["start"], r["start"] + r["blocks"]))'
}

test_commands_from_format_to_deactivate() {
	pair 32
	start cmd
	[ -b /dev/mapper/cmd ] || fail "there is no /dev/mapper/cmd"
	assert_match "$(dmsetup table cmd)" " pristine .* meta_uuid "
	assert_eq "$(device status cmd --json | field dirty)" 0
	dd if=/dev/urandom of=/dev/mapper/cmd bs=4k seek=300 count=3 oflag=direct status=none
	assert_eq "$(device map cmd --json | dirty_runs)" "300-303" "the map of the active device"
	assert_eq "$(device map /dev/mapper/cmd --json | dirty_runs)" "300-303" "the map by its path"
	assert_match "$(device map cmd --ascii)" '^ +0 [KM]iB [.]+[+][.]' "the picture"
	device checkpoint cmd
	assert_eq "$(device map "$data" -m "$meta" --json 2>/dev/null | dirty_runs)" "300-303" "the checkpoint on disk"
	assert_match "$(device list)" '^cmd +rw '
	device deactivate cmd
	[ ! -e /dev/mapper/cmd ] || fail "/dev/mapper/cmd is still there"
	assert_eq "$(device map "$data" -m "$meta" --json | dirty_runs)" "300-303" "what was left on disk"
	device check "$data" -m "$meta"
	assert_match "$(device dump "$data" -m "$meta")" 'clean +true'
	start cmd
	assert_eq "$(device map cmd --json | dirty_runs)" "300-303" "the map after the second activation"
}

test_commands_metadata_in_the_tail() {
	make_disk data 32
	device format "$data"
	device activate cmd "$data" --module "$PRISTINE_KO"
	cleanup remove_dm cmd
	stomp write /dev/mapper/cmd 7
	assert_match "$(device status cmd)" 'reserved tail'
	device deactivate cmd
	assert_eq "$(device map "$data" --json | dirty_runs)" "7-8"
}

test_commands_refuse_a_second_activation() {
	pair 16
	start cmd
	exits 7 "cmd is already active" device activate cmd "$data" -m "$meta"
	exits 7 "is already active as cmd" device activate other "$data" -m "$meta"
	exits 7 "in use by /dev/mapper/cmd" device check "$data" -m "$meta"
	exits 7 "in use by /dev/mapper/cmd" device format "$data" -m "$meta" --force
	exits 7 "in use by the file|in use by /dev/loop" device format "$data_file" -m "$meta_file" --force
	assert_eq "$(stat_of cmd mode)" rw
}

test_commands_refuse_to_stop_what_is_mounted() {
	pair 64
	start cmd
	mkfs.ext4 -q /dev/mapper/cmd
	mkdir mnt
	mount /dev/mapper/cmd mnt
	exits 7 "cmd is in use by the mount at .*/mnt" device deactivate cmd --wait 0
	umount mnt
	device deactivate cmd
	exits 3 "there is no device named cmd" device deactivate cmd
	exits 3 "there is no device named cmd" device status cmd
}

test_commands_name_both_kernels_if_the_module_is_of_another() {
	local other=$WORK/other.ko release
	release=$(uname -r)
	pair 16
	sed "s/vermagic=${release//./\\.}/vermagic=9${release:1}/" "$PRISTINE_KO" >"$other"
	rmmod dm_pristine 2>/dev/null || true
	exits 8 "was built for kernel $(re "9${release:1}"), this is $(re "$release")" \
		device activate cmd "$data" -m "$meta" --module "$other"
	mkdir empty
	exits 13 "neither loaded nor found in empty" device activate cmd "$data" -m "$meta" --module empty
	exits 0 "no managed devices" device list
	exits 2 "is not a kernel module" device activate cmd "$data" -m "$meta" --module "$PRISTINE_TOP/Makefile"
	cp "$PRISTINE_KO" empty/dm-pristine.ko
	device activate cmd "$data" -m "$meta" --module empty
	cleanup remove_dm cmd
}

test_commands_refuse_what_is_not_ready() {
	local image=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
	pair 16
	local first=$meta
	pair 16
	exits 5 "belongs to another data device" device activate cmd "$data" -m "$first" --module "$PRISTINE_KO"
	# Flag 2 is "needs check".
	meta_tool set "$meta" flags 3
	exits 14 "needs a check" device activate cmd "$data" -m "$meta" --module "$PRISTINE_KO"
	exits 0 "asked for this check" device check "$data" -m "$meta"
	exits 14 "nothing is damaged" device repair "$data" -m "$meta" --dry-run
	exits 0 "repaired" device repair "$data" -m "$meta"
	start cmd
	device deactivate cmd
	device format "$data" -m "$meta" --force --initial stale --image $image --image-size 8M --provisioning
	exits 12 "2,048 of 2,048 blocks are stale" device activate cmd "$data" -m "$meta" --module "$PRISTINE_KO"
	assert_match "$SAID" "provisioning has not finished"
	exits 0 "" device activate cmd "$data" -m "$meta" --module "$PRISTINE_KO" --stale --fetch-timeout-ms 100
	exits 0 "" device status cmd
	device deactivate cmd
	exits 2 "keeps its metadata on a separate device" device activate cmd "$data" --module "$PRISTINE_KO"
	make_disk data 16
	exits 3 "no pristine metadata found" device activate cmd "$data" --module "$PRISTINE_KO"
}

test_commands_leave_nothing_of_a_failed_activation() {
	pair 16
	local frail_disk=$meta frail_sectors
	frail_sectors=$(sectors "$meta")
	# It can be read, so the check before finds nothing; the target must write and cannot.
	make_dm frail "0 $frail_sectors flakey $frail_disk 0 0 3600 1 error_writes"
	meta=/dev/mapper/frail
	exits 6 "cannot start cmd: .*the kernel says: .*writing the superblock failed" \
		device activate cmd "$data" -m "$meta" --module "$PRISTINE_KO"
	assert_match "$(dmsetup ls)" '^frail'
	! dmsetup info cmd >/dev/null 2>&1 || fail "the device was left behind"
	[ ! -e /dev/mapper/cmd ] || fail "/dev/mapper/cmd was left behind"
	dmsetup load frail --table "0 $frail_sectors linear $frail_disk 0"
	dmsetup resume frail
	start cmd
}

test_commands_say_that_the_metadata_device_failed() {
	pair 16
	local frail_disk=$meta frail_sectors
	frail_sectors=$(sectors "$meta")
	make_dm frail "0 $frail_sectors linear $meta 0"
	meta=/dev/mapper/frail
	start cmd --checkpoint-ms 0
	stomp write /dev/mapper/cmd 3
	dmsetup load frail --table "0 $frail_sectors error"
	dmsetup suspend --nolockfs --noflush frail
	dmsetup resume frail
	assert_fails stomp write /dev/mapper/cmd 2000
	exits 0 "READ-ONLY: the metadata device failed" device status cmd
	exits 0 "^cmd +ro " device status
	exits 6 "checkpoint" device checkpoint cmd
	dmsetup load frail --table "0 $frail_sectors linear $frail_disk 0"
	dmsetup suspend --nolockfs --noflush frail
	dmsetup resume frail
	device deactivate cmd
}

run_tests "$@"
