# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Managed devices for scenarios, on top of scenario.sh:
#
#   make_pair MIB [OPTION...]   disks $data and $meta (files $data_file, $meta_file), formatted
#   make_tail MIB [OPTION...]   one disk $data with the metadata in its tail; $meta is "-"
#   activate NAME [FEATURE...]  loads the module, makes the managed device /dev/mapper/NAME
#   deactivate NAME             removes it
#   offline_dirty               prints the runs of dirty blocks that recovery finds ("first end" each)
#   online_dirty NAME           prints those that the kernel knows of
#   make_cuttable MIB META-MIB [OPTION...], cut_under_load NAME CHECK
#                               a pair that is cut off at an instant, and what lies there then
#   null_disk, scsi_disk        disks with properties that a loop device cannot have
#   limit DEVICE NAME           a limit of the device's queue
#   stat_of NAME FIELD          a field of the status line: mode dirty blocks stale hot limit log pages checkpoint
#
# OPTION is one of those of `pristine device format`.

LIB=$PRISTINE_TOP/tests/lib
# Without the site's modules Python starts in half the time, which counts in an emulated machine.
stomp() { python3 -I -S "$LIB/stomp.py" "$@"; }
meta_tool() { python3 -I -S "$LIB/meta.py" "$@"; }
control() { python3 -I -S "$LIB/control.py" "$@"; }

# stop PID...: ends background jobs of the test and waits for them.
stop() {
	kill "$@" 2>/dev/null || true
	wait "$@" 2>/dev/null || true
}

# managed_sectors FILE OFFSET: the size of the managed device, from the superblock copy at this byte.
managed_sectors() { od -An -tu8 -j$(($2 + 88)) -N8 "$1" | tr -d ' '; }

format_device() { # DATA META|- [OPTION...]
	local data=$1 meta=$2
	shift 2
	local where=("$data")
	[ "$meta" = - ] || where+=(--metadata "$meta")
	"$PRISTINE" -q device format "${where[@]}" --force "$@" >/dev/null
}

make_pair() { # MIB [OPTION...]
	local mib=$1
	shift
	make_disk data "$mib"
	make_disk meta 2
	format_device "$data" "$meta" "$@"
	managed=$(managed_sectors "$meta" 0)
}

make_tail() { # MIB [OPTION...]
	local mib=$1
	shift
	make_disk data "$mib"
	meta=- meta_file=-
	format_device "$data" - "$@"
	managed=$(managed_sectors "$data" $((mib * 1048576 - 4096)))
}

# make_cuttable MIB META-MIB [OPTION...]: $data, full of noise, and $meta on one disk, so that both can be cut off at one instant,
# formatted; the file original holds what is there then.
make_cuttable() {
	cuttable_mib=$1
	make_disk disk $(($1 + $2))
	make_dm both "0 $(sectors "$disk") linear $disk 0"
	make_dm part-data "0 $(($1 << 11)) linear /dev/mapper/both 0"
	make_dm part-meta "0 $(($2 << 11)) linear /dev/mapper/both $(($1 << 11))"
	data=/dev/mapper/part-data meta=/dev/mapper/part-meta
	head -c "$1M" /dev/urandom >"$data"
	shift 2
	format_device "$data" "$meta" "$@"
	managed=$(managed_sectors "$meta" 0)
	sync
	cp "$disk_file" original
}

# cut_under_load NAME CHECK: writes of all kinds to the active device NAME, 24 MiB or larger, on such a pair, which is cut off four
# times; CHECK is called with a word on which cut it is, and finds in cut.data and cut.meta what lay on the disks then. After the
# last, last_cut puts it there again.
cut_under_load() {
	local n loader fio
	python3 -I -S "$LIB/stomp.py" load "/dev/mapper/$1" 1 $((14 * 256)) ops &
	loader=$!
	cleanup stop "$loader"
	fio --name=j --filename="/dev/mapper/$1" --rw=randwrite --bsrange=512-16k --blockalign=512 --direct=1 --ioengine=libaio \
		--iodepth=8 --offset=15M --size=8M --time_based --runtime=100 --rate_iops=150 --randseed=7 --output=fio.log &
	fio=$!
	cleanup stop "$fio"
	eventually 20 test -s ops
	for n in 1 2 3 4; do
		sleep 0.$((RANDOM % 5))
		# All that is under way arrives, nothing else does: an instant.
		dmsetup suspend --nolockfs both
		cp "$disk_file" cut
		dmsetup resume both
		kill -0 "$loader" || fail "the load died"
		last_cut
		cmp -s -n $((managed * 512)) cut.data original && fail "nothing was written"
		"$2" "cut $n"
	done
	stop "$loader" "$fio"
}
last_cut() {
	head -c "${cuttable_mib}M" cut >cut.data
	dd if=cut of=cut.meta bs=1M skip="$cuttable_mib" status=none
}

# null_disk VARIABLE MIB [NAME=VALUE...]: a disk of null_blk, in memory, with these properties (see
# Documentation/block/null_blk.rst).
null_disk() {
	local _var=$1 _dir=/sys/kernel/config/nullb/pristine-$1 _option
	stock_module null_blk nr_devices=0
	mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
	mkdir "$_dir"
	cleanup eval "echo 0 >$_dir/power; rmdir $_dir"
	for _option in "size=$2" memory_backed=1 "${@:3}"; do
		echo "${_option#*=}" >"$_dir/${_option%%=*}" || fail "null_blk does not take $_option"
	done
	echo 1 >"$_dir/power"
	printf -v "$_var" %s "/dev/nullb$(cat "$_dir/index")"
	[ -b "${!_var}" ] || printf -v "$_var" %s "/dev/pristine-$1"
	eventually 5 test -b "${!_var}"
}

# scsi_disk VARIABLE MIB [PARAMETER=VALUE...]: a disk of scsi_debug, in memory; one at a time.
scsi_disk() {
	local _var=$1
	modprobe -d "$PRISTINE_MODULES" -n -q scsi_debug || skip "this kernel has no scsi_debug"
	stock_module sd_mod
	stock_module scsi_debug dev_size_mb="$2" delay=0 "${@:3}"
	eventually 20 scsi_disk_is_there
	printf -v "$_var" %s "/dev/$(scsi_disk_name)"
}
scsi_disk_name() { find /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/ -mindepth 1 -maxdepth 1 -printf '%f\n'; }
scsi_disk_is_there() { [ "$(blockdev --getsz "/dev/$(scsi_disk_name)")" -gt 0 ]; }

# limit DEVICE NAME: one of its limits in sysfs, such as logical_block_size.
limit() { cat "$(sysfs_of "$1")/queue/$2"; }
# sysfs_of DEVICE: its directory in sysfs.
sysfs_of() { echo "/sys/dev/block/$(lsblk -dno MAJ:MIN "$1" | tr -d ' ')"; }

table() { # [FEATURE VALUE...]: the table line for $data and $meta
	echo "0 $managed pristine $data $meta${1:+ $# $*}"
}

activate() { # NAME [FEATURE VALUE...]
	local name=$1
	shift
	load_module
	make_dm "$name" "$(table "$@")"
}

deactivate() { remove_dm "$1"; }

offline_dirty() { # [DATA META|-]
	local where=("${1:-$data}")
	[ "${2:-$meta}" = - ] || where+=(--metadata "${2:-$meta}")
	"$PRISTINE" -q device map "${where[@]}" --json >.map || return
	jq -r '.runs[] | select(.state == "dirty") | "\(.start) \(.start + .blocks)"' .map
}

online_dirty() { control dirty "/dev/mapper/$1"; }

stat_of() { # NAME FIELD
	local words mode block extent dirty stale hot log checkpoint generation
	words=$(dmsetup status "$1")
	# <start> <length> pristine <mode> ...
	read -r _ _ _ mode block extent dirty stale hot log checkpoint generation _ <<<"$words"
	case $2 in
	mode) echo "$mode" ;;
	block) echo "$block" ;;
	extent) echo "$extent" ;;
	dirty) echo "${dirty%/*}" ;;
	blocks) echo "${dirty#*/}" ;;
	stale) echo "$stale" ;;
	hot) echo "${hot%/*}" ;;
	limit) echo "${hot#*/}" ;;
	log) echo "${log%/*}" ;;
	pages) echo "${log#*/}" ;;
	checkpoint) echo "$checkpoint" ;;
	generation) echo "$generation" ;;
	*) fail "no status field $2" ;;
	esac
}

# managed_part: of runs on standard input what belongs to the managed device; not the label behind it.
managed_part() { awk -v end=$((managed / 8)) '$1 < end { if ($2 > end) $2 = end; print $1, $2 }'; }

# assert_runs RUNS FILE [WHAT]: FILE holds exactly these runs, given as "first-end first-end ...".
assert_runs() {
	local want
	want=$(tr ' -' '\n ' <<<"$1")
	[ "$want" = "$(cat "$2")" ] || fail "${3:-dirty blocks}: got $(tr '\n ' ' -' <"$2"), want $1"
}
