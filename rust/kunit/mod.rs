// SPDX-License-Identifier: GPL-2.0

//! KUnit suites: what lives in the kernel alone, and the shared core in its kernel build.

mod dm;
mod shared;
mod stale;
mod tracker;
