#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
#
# The helper, pristined, with the real kernel: it serves reads and hydrates, comes, goes, is killed and replaced, and says
# so with its exit codes. What stores can do to it is tested without a kernel (cargo test -p pristine-helper).
#
# stock-kernel: always
. "${0%/*}/../lib/scenario.sh"
. "$PRISTINE_TOP/tests/lib/device.sh"

TEST_TIMEOUT=120
PRISTINED=$PRISTINE_TOP/build/userspace/pristined

# stale_device NAME [OPTION...]: a managed device of 32 MiB, all stale, whose $image is in $store; $id is the image's.
stale_device() {
	local name=$1
	shift
	store=$PWD/store
	image=$PWD/image
	if [ ! -e "$image" ]; then
		head -c $((16 << 20)) /dev/urandom >"$image"
		# Half of it is zero.
		truncate -s $((31 << 20)) "$image"
		id=$("$PRISTINE" -q image build "$image" -o "$store" --json | jq -r .image)
	fi
	make_disk data 32
	make_disk meta 2
	format_device "$data" "$meta" --initial stale --image "$id" --image-size $((31 << 20)) --generation 3 "$@"
	managed=$(managed_sectors "$meta" 0)
	head -c $((8 << 20)) /dev/zero | tr '\0' w | dd of="$data_file" bs=64k conv=notrunc status=none
	activate "$name"
}

# serve NAME [OPTION...]: a helper in the background, $server.
serve() {
	local name=$1
	shift
	"$PRISTINED" --device "$name" --store "$store" --state "$PWD/state.json" "$@" 2>served &
	server=$!
	cleanup kill_server $server
	eventually 20 is_attached "$name" || return 1
}
kill_server() { kill -9 "$1" 2>/dev/null || true; }
is_attached() { [ "$("$PRISTINE" device status "$1" --json | jq .fetch.helper)" = true ]; }

# ends_with CODE: the helper ends with this exit code.
ends_with() {
	local status=0
	wait "$server" || status=$?
	assert_eq "$status" "$1" "exit code ($(cat served))"
}
is_image() { cmp -n $((31 << 20)) "/dev/mapper/$1" "$image" || fail "$1 is not the image"; }
flush() { blockdev --flushbufs "/dev/mapper/$1"; }
hydrated() { [ "$(stat_of "$1" stale)" = 0 ]; }

test_pristined_hydrates_and_ends() {
	stale_device hy
	serve hy --hydrate full
	ends_with 0
	hydrated hy || fail "$(stat_of hy stale) blocks are stale"
	is_image hy
	assert_eq "$(stat_of hy dirty)" 0
	assert_eq "$(jq -r .phase state.json)" "done"
	# There is nothing for another one, as long as the device is not loaded again.
	said=$("$PRISTINED" --device hy --store "$store" --state none 2>&1) || fail "it ended with $?: $said"
	deactivate hy
	activate hy
	said=$("$PRISTINED" --device /dev/mapper/hy --store "$store" 2>&1) || fail "it ended with $?: $said"
	assert_match "$said" 'nothing on hy is stale'
	is_image hy
}

# Without read-ahead, so that there is something left to read when the helper is killed or replaced.
test_pristined_serves_reads_while_it_is_killed_and_replaced() {
	stale_device rd
	serve rd --hydrate off --no-read-ahead
	cmp -n 65536 /dev/mapper/rd "$image"
	assert_eq "$("$PRISTINE" device status rd --json | jq '.fetch.errors')" 0
	# Another one is refused, unless it takes the device over.
	local status=0
	"$PRISTINED" --device rd --store "$store" --state none 2>second || status=$?
	assert_eq $status 7 "exit code ($(cat second))"
	local old=$server
	(is_image rd) &
	local reader=$!
	for _ in 1 2 3; do
		sleep 0.2
		"$PRISTINED" --device rd --store "$store" --state none --take-over --hydrate off --no-read-ahead 2>taken &
		server=$!
		cleanup kill_server $server
		status=0
		wait "$old" || status=$?
		assert_eq $status 20 "exit code of the one that lost it"
		old=$server
	done
	kill -9 "$server"
	sleep 0.2
	serve rd --hydrate off --no-read-ahead
	wait $reader || fail "the reader failed"
	kill -TERM "$server"
	ends_with 0
	# With none, reads wait; the next one finds them.
	flush rd
	serve rd --hydrate full
	ends_with 0
	is_image rd
}

test_pristined_waits_while_the_device_is_suspended() {
	stale_device su
	dmsetup suspend su
	"$PRISTINED" --device su --store "$store" --state none --hydrate full --rate 2M 2>served &
	server=$!
	cleanup kill_server $server
	sleep 0.5
	dmsetup resume su
	eventually 20 is_attached su
	for _ in 1 2 3; do
		sleep 0.3
		dmsetup suspend su
		sleep 0.3
		dmsetup resume su
	done
	cmp -n 65536 /dev/mapper/su "$image"
	eventually 60 hydrated su
	ends_with 0
	is_image su
}

test_pristined_goes_on_when_the_table_is_loaded_again() {
	stale_device re
	serve re --hydrate off --no-read-ahead
	cmp -n 65536 /dev/mapper/re "$image"
	(is_image re) &
	local reader=$!
	for _ in 1 2; do
		sleep 0.3
		dmsetup reload re --table "$(table)"
		dmsetup suspend re
		sleep 0.3
		dmsetup resume re
	done
	wait $reader || fail "the reader failed"
	eventually 20 is_attached re
	kill -TERM "$server"
	ends_with 0
}

test_pristined_ends_with_the_device() {
	stale_device go
	serve go --hydrate off
	cmp -n 4096 /dev/mapper/go "$image"
	deactivate go
	ends_with 21
	local status=0
	"$PRISTINED" --device go --store "$store" --state none 2>said || status=$?
	assert_eq $status 3 "exit code ($(cat said))"
}

test_pristined_blocks_of_16_kib() {
	stale_device bl --block-size 16K
	serve bl --hydrate idle
	cmp -n 65536 /dev/mapper/bl "$image"
	ends_with 0
	is_image bl
}

test_pristined_boot_trace() {
	stale_device tr
	serve tr --hydrate off --trace-dir "$PWD/traces"
	# One request each: what is asked for counts, not what is kept with it.
	dd if=/dev/mapper/tr of=/dev/null bs=32k skip=375 count=1 iflag=direct status=none
	dd if=/dev/mapper/tr of=/dev/null bs=32k skip=13 count=1 iflag=direct status=none
	kill -TERM "$server"
	ends_with 0
	assert_eq "$(sed -n 3,4p "traces/$id.trace" | tr '\n' ,)" "3000 8,104 8,"
	deactivate tr
	stale_device tr2
	serve tr2 --hydrate full --trace-dir "$PWD/traces"
	ends_with 0
	grep -q 'following a boot trace' served || fail "$(cat served)"
	is_image tr2
}

# What keeps it alive while the machine waits for it, and while systemd ends everything else.
test_pristined_is_protected() {
	stale_device pt
	serve pt --hydrate off --survive
	assert_match "$(tr '\0' ' ' <"/proc/$server/cmdline")" '^@pristined ' "its name, by which systemd leaves it alone"
	[ "$(awk '/^VmLck:/ { print $2 }' "/proc/$server/status")" -gt 1024 ] || fail "its memory is not locked"
	assert_eq "$(cat "/proc/$server/oom_score_adj")" -1000
	# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE, which make an I/O flusher.
	local flags
	flags=$(sed 's/.*) //' "/proc/$server/stat" | cut -d' ' -f7)
	assert_eq $((flags & 0x180000)) $((0x180000)) "flags of the process"
	# All of its threads came after that, and have it.
	for task in /proc/"$server"/task/*/stat; do
		flags=$(sed 's/.*) //' "$task" | cut -d' ' -f7)
		echo "$task $flags" >>threads
	done
	kill -TERM "$server"
	ends_with 0
}

test_pristined_gives_up_when_told() {
	stale_device gi
	mv "$store/packs" "$store/gone"
	serve gi --hydrate off --give-up 1
	assert_fails dd if=/dev/mapper/gi of=/dev/null bs=4096 count=1 iflag=direct
	mv "$store/gone" "$store/packs"
	eventually 20 cmp -n 65536 /dev/mapper/gi "$image"
	kill -TERM "$server"
	ends_with 0
}

test_pristined_is_watched() {
	stale_device wa
	serve wa --hydrate off
	"$PRISTINE" device watch wa --interval 0.2 --count 3 --json >lines
	assert_eq "$(jq -s length lines)" 3
	jq -e -s 'all(.helper and .blocks == 7936)' lines >said || fail "$(cat lines)"
	"$PRISTINE" device watch wa --interval 0.2 --count 2 >said
	assert_match "$(cat said)" 'STALE'
	"$PRISTINE" device status wa >said
	assert_match "$(cat said)" 'helper +attached'
	assert_match "$(cat said)" 'fetched +[0-9,]+ requests: .* failed, .* open'
	cmp -n 65536 /dev/mapper/wa "$image"
	assert_match "$("$PRISTINE" device status wa)" 'reads +[0-9,]+, of which [0-9.]+ % needed no request'
	"$PRISTINE" device watch wa --interval 0.5 --count 1 >said &
	local watch=$!
	cmp -i 8000000 -n 65536 /dev/mapper/wa "$image"
	wait $watch
	for word in HYDRATED MISSES HITS LATENCY; do assert_match "$(cat said)" $word; done
	kill -TERM "$server"
	ends_with 0
	"$PRISTINE" device status wa >said
	assert_match "$(cat said)" 'helper +NONE'
}

# Two machines in one: each has a device, a helper, and a port for its neighbours.
test_pristined_peers() {
	stale_device pa
	ip link set lo up 2>/dev/null || true
	"$PRISTINE" -q serve "$store" --listen 127.0.0.1:0 --port-file port --peers --metrics 127.0.0.1:0 2>said &
	cleanup kill_server $!
	eventually 20 test -s port || fail "$(cat said)"
	# Where `device status` looks.
	local url first state_b=/run/pristine/helper-pb.json
	url=http://127.0.0.1:$(cat port)
	store=$url
	serve pa --hydrate full --peers --peers-port 7201
	first=$server
	eventually 60 hydrated pa
	is_image pa
	# What is changed there is not given, and the neighbour has it from the store.
	head -c 8192 /dev/zero | tr '\0' x | dd of=/dev/mapper/pa bs=4096 seek=1000 oflag=direct status=none
	stale_device pb
	store=$url
	serve pb --hydrate full --peers --peers-port 7202 --rate 4M --state "$state_b"
	eventually 60 hydrated pb
	is_image pb
	eventually 20 some_blocks_were_given || fail "$(cat state.json $state_b served)"
	"$PRISTINE" device status pb >said
	assert_match "$(cat said)" 'neighbours: '
	# Both stay for their neighbours.
	kill -TERM "$server"
	ends_with 0
	server=$first
	kill -TERM "$server"
	ends_with 0
	# A device on which nothing is stale has something to give, too.
	deactivate pb
	activate pb
	"$PRISTINED" --device pb --store "$url" --state none --peers --peers-port 7203 2>served &
	server=$!
	cleanup kill_server $server
	eventually 20 grep -q 'serving blocks to neighbours' served || fail "$(cat served)"
	sleep 1
	kill -TERM "$server"
	ends_with 0
}
some_blocks_were_given() {
	[ "$(jq .peers.given_blocks state.json)" -ge 1024 ] && [ "$(jq .peers.blocks "$state_b")" -ge 1024 ] &&
		[ "$(jq .peers.wrong "$state_b")" = 0 ]
}

run_tests "$@"
