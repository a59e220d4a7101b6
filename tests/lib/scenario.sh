# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# The frame of a scenario: one shell script with functions named test_<rule>_<what>. It begins with
#
#     . "${0%/*}/../lib/scenario.sh"
#
# and ends with
#
#     run_tests "$@"
#
# Between them there may be a function `setup`, run before each test; $TEST is the test's name.
#
# Each test runs in a process of its own with `set -eu`, a time limit (TEST_TIMEOUT seconds, 120 unless the
# script says otherwise) and a scratch directory $WORK. What it makes is undone in reverse order when it
# ends, however it ends (`cleanup`). Afterwards the kernel's messages are read: a warning, a KASAN or
# lockdep report fails the test that caused it, and so do device-mapper or loop devices left behind. The
# script ends by removing the module, so that a leaked reference shows.
#
#   tests/vm/x.sh              runs all of its tests (in the guest)
#   tests/vm/x.sh NAME...      runs those
#   tests/vm/x.sh --list       lists them
#
# A script with a line `# runs-on: host` is run outside any machine (in the sysroot) and boots its own;
# the kernel is not looked at then.
#
# In the environment: TEST_LANE (lab or vm), PRISTINE_KO (the module), PRISTINE (the command line tool),
# PRISTINE_TOP (the checkout), PRISTINE_MODULES (where the kernel's own modules are, as modprobe's -d takes it).

set -euo pipefail
TEST_TIMEOUT=${TEST_TIMEOUT:-120}
PRISTINE_TOP=${PRISTINE_TOP:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)}
SCENARIO=$0
ON_HOST=$(grep -qx '# runs-on: host' "$SCENARIO" && echo 1 || echo 0)

# -- for tests --------------------------------------------------------------------------------------

CLEANUPS=()

# cleanup COMMAND...: runs it when the test ends; the last registered first.
cleanup() { CLEANUPS+=("$(printf '%q ' "$@")"); }

# fail MESSAGE: ends the test as failed.
fail() {
	printf 'FAIL: %s\n' "$*" >&2
	exit 1
}

# skip MESSAGE: ends the test as skipped (it counts as neither passed nor failed).
skip() {
	printf 'SKIP: %s\n' "$*" >&2
	exit 77
}

# long_form [LANE]: the test runs with TEST_LONG=1, or when it is asked for by name; else it is skipped (in LANE
# alone, when one is given: a test that does not depend on the stock kernel says `long_form vm`).
long_form() {
	[ "${TEST_LONG:-0}" = 1 ] || [ -n "${ONLY:-}" ] || { [ $# -gt 0 ] && [ "${TEST_LANE:-}" != "$1" ]; } ||
		skip "with TEST_LONG=1"
}

# assert_eq GOT WANT [WHAT]
assert_eq() { [ "$1" = "$2" ] || fail "${3:-values differ}: got '$1', want '$2'"; }

# assert_match TEXT REGEX [WHAT]: one of the lines matches. Without a process: in the lab each costs tens of milliseconds.
assert_match() {
	{ local - line; set +x; } 2>/dev/null
	while IFS= read -r line; do
		if [[ $line =~ $2 ]]; then return; fi
	done <<<"$1"
	fail "${3:-text}: '$1' does not match '$2'"
}

# assert_fails COMMAND...: the command must fail; what it said is left in $SAID.
assert_fails() {
	local status=0
	SAID=$("$@" 2>&1) || status=$?
	[ $status != 0 ] || fail "it should have failed: $* (it said: $SAID)"
	# A program that crashed or was not found did not refuse anything.
	[ $status -lt 126 ] || fail "it crashed or is missing (status $status): $* (it said: $SAID)"
}

# exits CODE REGEX COMMAND...: the command ends with this code and says this; what it said is left in $SAID.
exits() {
	local want=$1 says=$2 status=0
	shift 2
	SAID=$("$@" 2>&1) || status=$?
	assert_eq $status "$want" "the exit code of '$*' (it said: $SAID)"
	assert_match "$SAID" "$says" "what '$*' said"
}

# assert_same FILE FILE [WHAT]: byte for byte.
assert_same() { cmp -- "$1" "$2" || fail "${3:-$1 and $2 differ}"; }

# eventually SECONDS COMMAND...: waits until the command succeeds.
eventually() {
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || fail "never happened: $*"
		sleep 0.05
	done
}

# expect_dmesg REGEX: the test wants the kernel to say this; such lines are no failure, their absence is.
expect_dmesg() { printf '%s\n' "$1" >>"$WORK/.expected"; }

# kernel_said REGEX: whether the kernel said this since the test began.
kernel_said() { grep -qE -- "$1" <<<"$(messages_since_begin)"; }

# report TEXT: is shown beside the result of the test.
report() { printf '%s\n' "$*" >>"$WORK/.report"; }

# load_module [PARAMETER...]: loads the module unless it is loaded.
load_module() {
	grep -q '^dm_pristine ' /proc/modules || insmod "${PRISTINE_KO:?}" "$@"
}

# long_in_vm: skips the test in the emulated machine, where it takes long and shows nothing that the lab does not, unless
# TEST_LONG=1.
long_in_vm() {
	[ "${TEST_LANE:-}" != vm ] || [ "${TEST_LONG:-0}" = 1 ] || skip "in the emulated machine only with TEST_LONG=1"
}

# stock_module NAME [PARAMETER...]: loads a module of the machine's own kernel for as long as the test runs, and what that
# needs for good; one that is built in or loaded already will do.
stock_module() {
	grep -q "^${1//-/_} " /proc/modules && return 0
	modprobe -d "${PRISTINE_MODULES:?}" "$@" || fail "the kernel has no module $1"
	if grep -q "^${1//-/_} " /proc/modules; then cleanup unload_stock_module "$1"; fi
}
unload_stock_module() { eventually 10 rmmod "$1"; }

# make_disk VARIABLE MIB [LOSETUP-OPTION...]: makes an empty disk of this size in memory; VARIABLE becomes its
# device, VARIABLE_file the file below it.
make_disk() {
	local _file _dev _var=$1 _mib=$2
	shift 2
	DISKS=$((${DISKS:-0} + 1))
	_file=$WORK/disk-$_var.$DISKS
	truncate -s "${_mib}M" "$_file"
	_dev=$(losetup --show -f "$@" "$_file")
	cleanup losetup -d "$_dev"
	printf -v "$_var" %s "$_dev"
	printf -v "${_var}_file" %s "$_file"
}

# make_dm NAME TABLE: a device-mapper device; /dev/mapper/NAME.
make_dm() {
	dmsetup create "$1" --table "$2" || fail "cannot create $1 with the table $2"
	cleanup remove_dm "$1"
}

# remove_dm NAME: removes a device-mapper device if it is there; waits for openers (such as blkid) to go.
remove_dm() {
	local i
	for i in 1 2 3 4 5 6 7 8 9 10; do
		dmsetup remove "$1" 2>/dev/null && return 0
		dmsetup info "$1" >/dev/null 2>&1 || return 0
		sleep 0.1
	done
	dmsetup remove "$1" || { echo "cannot remove $1" >&2; return 1; }
}

# sectors DEVICE: its size in sectors of 512 bytes.
sectors() { blockdev --getsz "$1"; }

# -- the frame --------------------------------------------------------------------------------------

list_tests() { declare -F | sed -n 's/^declare -f \(test_.*\)/\1/p'; }

messages_since_begin() {
	# All of the input is read: who ends early kills the writer, which pipefail takes for a failure.
	dmesg | awk '/pristine-test: begin/ { n = 0 } { line[n++] = $0 } END { for (i = 0; i < n; i++) print line[i] }'
}

undo() {
	local status=$? i
	{ set +x; } 2>/dev/null
	trap - EXIT
	set +e
	cd /
	for ((i = ${#CLEANUPS[@]} - 1; i >= 0; i--)); do
		if ! eval "${CLEANUPS[i]}"; then
			echo "FAIL: cleaning up failed: ${CLEANUPS[i]}" >&2
			[ $status != 0 ] || status=1
		fi
	done
	exit $status
}

# devices_now: sets DEVICES to device-mapper's devices and the loop devices in use.
devices_now() {
	local path name
	DEVICES=
	for path in /sys/block/dm-*/dm/name; do
		if { read -r name <"$path"; } 2>/dev/null; then DEVICES+="$name "; fi
	done
	for path in /sys/block/loop*/loop; do
		[ ! -e "$path" ] || { name=${path%/loop}; DEVICES+="${name##*/} "; }
	done
}

# run_one NAME: in a process of its own.
run_one() {
	WORK=$TEST_WORK
	# For setup().
	# shellcheck disable=SC2034
	TEST=$1
	trap undo EXIT
	trap 'exit 143' TERM INT HUP
	cd "$WORK"
	set -x
	if declare -F setup >/dev/null; then setup; fi
	"$1"
	{ set +x; } 2>/dev/null
	exit 0
}

# kernel_verdict: prints what the kernel complained of during the test, and what it should have said and
# did not.
kernel_verdict() {
	local bad said line expected=$1/.expected
	said=$(messages_since_begin)
	bad=$(grep -E -f "$PRISTINE_TOP/virtme/trouble" <<<"$said" || true)
	if [ -s "$expected" ]; then
		[ -z "$bad" ] || bad=$(grep -vE -f "$expected" <<<"$bad" || true)
		while read -r line; do
			grep -qE -- "$line" <<<"$said" || echo "the kernel did not say: $line"
		done <"$expected"
	fi
	[ -z "$bad" ] || printf 'the kernel complained:\n%s\n' "$bad"
}

run_tests() {
	local i only=() name before after complaint status work log begin passed=0 failed=0 skipped=0
	case ${1:-} in
	--list) list_tests; exit 0 ;;
	--one) run_one "$2" ;;
	esac
	only=("$@")
	if [ ${#only[@]} = 0 ]; then mapfile -t only < <(list_tests); fi
	for name in "${only[@]}"; do
		work=$(mktemp -d "${TMPDIR:-/tmp}/pristine-test.XXXXXX")
		log=$work/.log
		[ "$ON_HOST" = 1 ] || printf 'pristine-test: begin %s\n' "$name" >/dev/kmsg
		echo "# begin $name"
		devices_now
		before=$DEVICES
		begin=$SECONDS status=0
		TEST_WORK=$work timeout -k 10 "$TEST_TIMEOUT" bash "$SCENARIO" --one "$name" >"$log" 2>&1 || status=$?
		[ $status != 124 ] || echo "FAIL: not done after $TEST_TIMEOUT s" >>"$log"
		if [ "$ON_HOST" = 0 ]; then
			# A device that someone (a killed process, the kernel itself) still holds goes a little later.
			for i in {1..50}; do
				devices_now
				after=$DEVICES
				[ "$before" != "$after" ] || break
				sleep 0.1
			done
			[ "$before" = "$after" ] || { status=1; echo "FAIL: devices left behind: $after (before: $before)" >>"$log"; }
			complaint=$(kernel_verdict "$work")
			[ -z "$complaint" ] || { status=1; printf 'FAIL: %s\n' "$complaint" >>"$log"; }
		fi
		case $status in
		0) passed=$((passed + 1)); echo "ok $name ($((SECONDS - begin)) s)" ;;
		77) skipped=$((skipped + 1)); echo "ok $name # skip $(sed -n 's/^SKIP: //p' "$log" | tail -n 1)" ;;
		*)
			failed=$((failed + 1))
			tail -n "${TEST_LINES:-60}" "$log" | sed 's/^/    /'
			[ "$ON_HOST" = 1 ] || messages_since_begin | tail -n "${TEST_LINES:-60}" | sed 's/^/    kernel: /'
			echo "not ok $name ($((SECONDS - begin)) s): $(grep '^FAIL: ' "$log" | head -n 1)"
			;;
		esac
		[ ! -e "$work/.report" ] || sed "s/^/# $name: /" "$work/.report"
		rm -rf "$work" 2>/dev/null || true
	done
	if [ "$ON_HOST" = 0 ] && [ "${TEST_LONG:-0}" = 1 ] && grep -q '^dm_pristine ' /proc/modules &&
		{ echo scan >/sys/kernel/debug/kmemleak; } 2>/dev/null; then
		name=no_memory_leaks_after_$(basename "$SCENARIO" .sh)
		echo "# begin $name"
		# Only what is older than 5 s counts, and what two scans in a row miss.
		sleep 6
		echo scan >/sys/kernel/debug/kmemleak
		complaint=$(grep -B 12 -A 8 -F '[dm_pristine]' /sys/kernel/debug/kmemleak || true)
		echo clear >/sys/kernel/debug/kmemleak
		if [ -z "$complaint" ]; then
			passed=$((passed + 1)); echo "ok $name"
		else
			failed=$((failed + 1)); printf '%s\n' "$complaint" | sed 's/^/    /'; echo "not ok $name"
		fi
	fi
	if [ "$ON_HOST" = 0 ] && grep -q '^dm_pristine ' /proc/modules; then
		name=module_unloads_after_$(basename "$SCENARIO" .sh)
		printf 'pristine-test: begin %s\n' "$name" >/dev/kmsg
		echo "# begin $name"
		if rmmod dm_pristine && complaint=$(kernel_verdict /nonexistent) && [ -z "$complaint" ]; then
			passed=$((passed + 1)); echo "ok $name"
		else
			failed=$((failed + 1)); echo "not ok $name: the module does not unload clean: ${complaint:-still in use}"
		fi
	fi
	echo "# $(basename "$SCENARIO"): $passed passed, $failed failed, $skipped skipped"
	if [ $failed = 0 ]; then exit 0; fi
	exit 10
}
