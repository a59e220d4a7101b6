// SPDX-License-Identifier: GPL-2.0
/* Makes the tracepoints of pristine_trace.h, and the functions through which Rust calls them. */

#include <linux/bio.h>

#include "shim.h"

#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include "pristine_trace.h"
