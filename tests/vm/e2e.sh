# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# runs-on: host
#
# Whole machines: the agent in its initramfs, a real Debian (or a small system) on the managed device, power cuts, and
# all that can be wrong before a system starts. The scenarios are in tests/demo/scenarios.py.

TEST_TIMEOUT=1500
. "${0%/*}/../lib/scenario.sh"

scenario() {
	local dir=$PRISTINE_TOP/build/test/e2e${KREL:+@$KREL}/$1
	rm -rf "$dir"
	python3 "$PRISTINE_TOP/tests/demo/scenarios.py" "$1" "$dir"
	# The disks of what went well are of no use; the consoles stay.
	find "$dir" \( -name '*.img' -o -name store -o -name '*initramfs' -o -name '*.ko' \) -prune -exec rm -rf {} +
}

with_debian() {
	PRISTINE_MASTER=$("$PRISTINE_TOP/scripts/master-image")
	DEMO_PACKAGE=$("$PRISTINE_TOP/tests/demo/package")
	export PRISTINE_MASTER DEMO_PACKAGE
	scenario "$1"
}

# Whole sessions in whole machines: the ones that show most run always.
test_revert_after_a_reboot() { with_debian revert_after_a_reboot; }
test_convergence_of_cuts_in_session_and_revert() { with_debian convergence_of_cuts_in_session_and_revert; }
test_small_system_and_its_policies() { scenario small_system_and_its_policies; }
test_identity_and_damage_are_refused() { scenario identity_and_damage_are_refused; }

test_convergence_of_cuts_in_provisioning() { long_form; with_debian convergence_of_cuts_in_provisioning; }
test_convergence_of_cuts_that_lose_writes() { long_form; scenario convergence_of_cuts_that_lose_writes; }
test_convergence_with_a_server_that_is_down() { long_form; scenario convergence_with_a_server_that_is_down; }
test_convergence_with_a_faulty_server() { long_form; scenario convergence_with_a_faulty_server; }
test_an_update_fetches_what_differs() { long_form; scenario an_update_fetches_what_differs; }
test_too_small_a_disk_is_refused() { long_form; scenario too_small_a_disk_is_refused; }
test_bad_settings_are_named() { long_form; scenario bad_settings_are_named; }
test_a_module_of_another_kernel_is_refused() { long_form; scenario a_module_of_another_kernel_is_refused; }

run_tests "$@"
