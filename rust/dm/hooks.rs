// SPDX-License-Identifier: GPL-2.0

//! Bios that come back to the target when the device below has answered them.

use core::ptr::NonNull;

use kernel::prelude::*;

use super::bio::Bio;
use super::{raw, Constructor, Device, Jobs};

/// The hooks of a target. Each of its bios carries a tag of the target's own.
///
/// # Invariants
///
/// The pointer came from `pristine_hooks_create()` for the one target that owns this value, and was not destroyed. A
/// target sees no bios but its own, so each of them has room for a tag in front of it.
pub struct Hooks(NonNull<raw::pristine_hooks>);

// SAFETY: The functions on it may be called from any thread.
unsafe impl Send for Hooks {}
// SAFETY: The functions on it do their own locking.
unsafe impl Sync for Hooks {}

impl Hooks {
    /// Hooks for the target that is being constructed; `job` of its `jobs` runs when bios have come back. The target
    /// also gets flushes from here on, whether the device below needs them or not.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub fn new(constructor: &Constructor<'_>, jobs: &Jobs, job: u32) -> Result<Self> {
        // SAFETY: The target is being constructed; its jobs live as long as its bios, and longer than the hooks, which
        // nobody uses once the last bio has ended.
        let hooks =
            unsafe { raw::pristine_hooks_create(constructor.raw().as_ptr(), jobs.raw(), job) };
        // INVARIANT: It was just created.
        NonNull::new(hooks).map(Self).ok_or(ENOMEM)
    }

    /// Gives a bio its tag.
    pub fn set_tag(&self, bio: &Bio, tag: u64) {
        // SAFETY: By the type invariant the bio has room for it.
        unsafe { raw::pristine_hooks_set_tag(bio.raw().as_ptr(), tag) }
    }

    /// The tag that a bio was given.
    pub fn tag(&self, bio: &Bio) -> u64 {
        // SAFETY: By the type invariant there is room for a tag. A bio that was never given one has some number there.
        unsafe { raw::pristine_hooks_tag(bio.raw().as_ptr()) }
    }

    /// Sends the bio to `device`, at the same sector; it comes back.
    pub fn submit(&self, bio: Bio, device: &Device) {
        let bio = bio.redirect(device);
        // SAFETY: The bio was ours and has room for the hook; the ownership goes to the block layer, and with the end of
        // the bio to the list of those that came back.
        unsafe { raw::pristine_hooks_submit(self.0.as_ptr(), bio.as_ptr()) }
    }

    /// A bio that has come back; [`Bio::failed`] tells how.
    pub fn take(&self) -> Option<Bio> {
        // SAFETY: By the type invariant the hooks are there.
        let bio = NonNull::new(unsafe { raw::pristine_hooks_take(self.0.as_ptr()) })?;
        // SAFETY: The device below is done with it, and it has left the list.
        Some(unsafe { Bio::from_raw(bio) })
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the hooks are there. The target has no bios any more.
        unsafe { raw::pristine_hooks_destroy(self.0.as_ptr()) }
    }
}
