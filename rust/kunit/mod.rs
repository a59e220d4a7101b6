// SPDX-License-Identifier: GPL-2.0

//! KUnit suites, for what lives in the kernel and for the shared core in its kernel build.

mod tracker;
