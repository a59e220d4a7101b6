# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# runs-on: host
#
# Whole machines that boot at once, while what a session changed, or a new generation did, is still in the store: instant
# reverts, updates and provisioning, and what happens when the server is down. The scenarios are in tests/demo/instant.py.

TEST_TIMEOUT=1800
. "${0%/*}/../lib/scenario.sh"

scenario() {
	local dir=$PRISTINE_TOP/build/test/instant${KREL:+@$KREL}/$1
	rm -rf "$dir"
	python3 "$PRISTINE_TOP/tests/demo/instant.py" "$1" "$dir" | tee "$WORK/said"
	while read -r line; do report "$line"; done < <(sed -n 's/^figures: //p' "$WORK/said")
	# The disks of what went well are of no use; the consoles stay.
	find "$dir" \( -name '*.img' -o -name '*store' -o -name '*initramfs' -o -name '*.tar' \) -prune -exec rm -rf {} +
}

test_instant_revert_of_a_small_system() { scenario instant_revert_of_a_small_system; }
test_undo_of_a_small_system() { scenario undo_of_a_small_system; }
test_instant_policies_without_a_server() { long_form; scenario instant_policies_without_a_server; }
test_instant_generations_of_a_small_system() { scenario instant_generations_of_a_small_system; }
test_instant_revert_of_a_debian() {
	long_form
	PRISTINE_MASTER=$("$PRISTINE_TOP/scripts/master-image")
	PRISTINE_UPGRADED=$("$PRISTINE_TOP/tests/demo/upgraded-master")
	export PRISTINE_MASTER PRISTINE_UPGRADED
	scenario instant_revert_of_a_debian
}

run_tests "$@"
