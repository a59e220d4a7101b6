// SPDX-License-Identifier: GPL-2.0

//! Work that a target does in the background.

use core::ptr::NonNull;

use kernel::ffi::{c_uint, c_void};
use kernel::prelude::*;

use super::{raw, Target};

/// The jobs of a target, numbered from 0, each run by [`Target::run`], never twice at once, in a worker that gets
/// on under memory pressure. Until the target is constructed, and from the start of its destruction on, queueing
/// does nothing.
///
/// # Invariants
///
/// The pointer came from `pristine_jobs_create()` and was not destroyed.
pub struct Jobs(NonNull<raw::pristine_jobs>);

// SAFETY: The functions on it may be called from any thread.
unsafe impl Send for Jobs {}
// SAFETY: The functions on it do their own locking.
unsafe impl Sync for Jobs {}

/// # Safety
///
/// `data` must point to a `T` that stays where it is until the jobs are stopped.
unsafe extern "C" fn run<T: Target>(data: *mut c_void, id: c_uint) {
    // SAFETY: `Jobs::start` was called with a `T`, and its caller keeps it until the jobs are stopped.
    let target = unsafe { &*data.cast::<T>() };
    target.run(id);
}

impl Jobs {
    /// `count` jobs for a target of type `T`, not running yet.
    pub fn new<T: Target>(count: u32) -> Result<Self> {
        // SAFETY: No requirements but that of the callback, which `start` passes on.
        let jobs = unsafe { raw::pristine_jobs_create(count, Some(run::<T>)) };
        // INVARIANT: It was just created.
        NonNull::new(jobs).map(Self).ok_or(ENOMEM)
    }

    /// # Safety
    ///
    /// `target` must be the `T` that these jobs were made for, and must stay where it is until [`Jobs::stop`]
    /// has returned.
    pub(super) unsafe fn start<T: Target>(&self, target: *const T) {
        // SAFETY: By the type invariant the jobs are there; the caller vouches for the rest.
        unsafe { raw::pristine_jobs_start(self.0.as_ptr(), target.cast_mut().cast()) }
    }

    pub(super) fn raw(&self) -> *mut raw::pristine_jobs {
        self.0.as_ptr()
    }

    /// Ends the jobs: waits for those that run, drops those that wait.
    pub(super) fn stop(&self) {
        // SAFETY: By the type invariant the jobs are there.
        unsafe { raw::pristine_jobs_stop(self.0.as_ptr()) }
    }

    /// Runs job `id` as soon as possible.
    pub fn now(&self, id: u32) {
        // SAFETY: By the type invariant the jobs are there.
        unsafe { raw::pristine_jobs_queue(self.0.as_ptr(), id, 0, true) }
    }

    /// Runs job `id` after `ms` milliseconds, unless it is already due earlier or later.
    pub fn within(&self, id: u32, ms: u32) {
        // SAFETY: By the type invariant the jobs are there.
        unsafe { raw::pristine_jobs_queue(self.0.as_ptr(), id, ms, false) }
    }

    /// Waits until job `id` is neither due nor running, at most `ms` milliseconds; whether it got there.
    pub fn wait(&self, id: u32, ms: u32) -> bool {
        // SAFETY: By the type invariant the jobs are there.
        unsafe { raw::pristine_jobs_wait(self.0.as_ptr(), id, ms) }
    }
}

/// Lets those run who wait for this CPU; whether there were any. For jobs only.
pub fn give_way() -> bool {
    // SAFETY: No requirements beyond being allowed to sleep; calling it where that is forbidden is a bug that the kernel
    // reports, and no unsoundness of memory.
    unsafe { raw::pristine_give_way() }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the jobs are there, and they end here.
        unsafe { raw::pristine_jobs_destroy(self.0.as_ptr()) }
    }
}
