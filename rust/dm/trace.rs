// SPDX-License-Identifier: GPL-2.0

//! The tracepoints of `pristine_trace.h`. One that is off costs an instruction that does nothing: the static key
//! is looked at here, before the arguments are made.

use core::ptr::NonNull;

use kernel::bindings;

use super::raw;

/// What became of a bio; the numbers are those of `pristine_show_decision`.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Decision {
    /// Sent on by `map`.
    Remap = 0,
    /// Kept for later.
    Defer = 1,
    /// Sent on after it was kept.
    Release = 2,
    /// Answered: it would have had to wait and must not.
    Again = 3,
    /// Answered with an error.
    Error = 4,
    /// Answered well.
    Done = 5,
}

/// Whether a tracepoint is on.
macro_rules! enabled {
    ($name:ident) => {{
        #[cfg(CONFIG_TRACEPOINTS)]
        // SAFETY: It is the static key of a tracepoint, defined by C.
        unsafe {
            kernel::jump_label::static_branch_unlikely!(raw::$name, bindings::tracepoint, key)
        }
        #[cfg(not(CONFIG_TRACEPOINTS))]
        false
    }};
}

/// A device number as the kernel keeps it.
fn dev((major, minor): (u32, u32)) -> u32 {
    (major << 20) | (minor & ((1 << 20) - 1))
}

/// A decision on a bio.
///
/// # Safety
///
/// `bio` must be valid, and still be the caller's.
#[inline(always)]
pub(super) unsafe fn map(bio: NonNull<bindings::bio>, decision: Decision) {
    if enabled!(__tracepoint_pristine_map) {
        // SAFETY: The caller vouches for the bio.
        unsafe { raw::rust_do_trace_pristine_map(bio.as_ptr(), decision as u32) };
    }
}

/// Record `seq` is durable, and announces `extents` extents.
#[inline(always)]
pub fn commit(device: impl FnOnce() -> (u32, u32), seq: u64, extents: usize) {
    if enabled!(__tracepoint_pristine_commit) {
        // CAST: A record has far fewer than 2^32 extents.
        // SAFETY: No requirements.
        unsafe { raw::rust_do_trace_pristine_commit(dev(device()), seq, extents as u32) };
    }
}

/// A checkpoint begins while `hot` extents are hot and recovery would need `log` records.
#[inline(always)]
pub fn checkpoint_begin(device: impl FnOnce() -> (u32, u32), hot: u64, log: u64) {
    if enabled!(__tracepoint_pristine_checkpoint_begin) {
        // SAFETY: No requirements.
        unsafe { raw::rust_do_trace_pristine_checkpoint_begin(dev(device()), hot, log) };
    }
}

/// A checkpoint has ended.
#[inline(always)]
pub fn checkpoint_end(
    device: impl FnOnce() -> (u32, u32),
    result: &Result<u64, kernel::error::Error>,
) {
    if enabled!(__tracepoint_pristine_checkpoint_end) {
        let (seq, error) = match result {
            Ok(seq) => (*seq, 0),
            Err(e) => (0, e.to_errno()),
        };
        // SAFETY: No requirements.
        unsafe { raw::rust_do_trace_pristine_checkpoint_end(dev(device()), seq, error) };
    }
}

/// The device turns read-only.
#[inline(always)]
pub fn fail(device: impl FnOnce() -> (u32, u32), why: &str) {
    if enabled!(__tracepoint_pristine_fail) {
        // CAST: The texts are short.
        // SAFETY: The text is readable for its length.
        unsafe {
            raw::rust_do_trace_pristine_fail(dev(device()), why.as_ptr().cast(), why.len() as u32);
        };
    }
}
