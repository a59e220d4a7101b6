# SPDX-License-Identifier: GPL-2.0

.PHONY: modules
modules:
	@scripts/modules
