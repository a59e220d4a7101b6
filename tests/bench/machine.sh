# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# What the benchmarks that measure time have in common. Sourced, never run.

# shellcheck source=scripts/env.sh
. "$(dirname -- "$0")/../../scripts/env.sh"

cd "$PRISTINE_TOP"
release=$(scripts/kernel-metadata --release)
modules=$PRISTINE_CACHE/kernels/$release/modules
out=$PRISTINE_TOP/build/bench
mkdir -p "$out"

# in_machine FILE OPTION... COMMAND: runs a command in the stock kernel and keeps, as build/bench/FILE.json, what it
# says in its last line that begins with "BENCH ".
in_machine() {
	local file=$out/$1.json log=$out/$1.log status=0
	shift
	virtme/run-vm --timeout "${BENCH_TIMEOUT:-1800}" "${@:1:$#-1}" \
		"insmod build/$release/dm-pristine.ko && ${*: -1}" >"$log" 2>&1 || status=$?
	sed -n 's/^BENCH //p' "$log" | tail -n 1 >"$file.new"
	if [ $status != 0 ] || [ ! -s "$file.new" ]; then
		tail -n 40 "$log" >&2
		pr_die "the benchmark did not end well (status $status)" "the machine's output is in $log"
	fi
	mv "$file.new" "$file"
}
