/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads to make the raw bindings of rust/dm. */
#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include "shim.h"
