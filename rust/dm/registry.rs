// SPDX-License-Identifier: GPL-2.0

//! The targets that exist, for those who come from outside of device-mapper: ioctls and the reboot notifier.

use core::any::TypeId;
use core::ffi::c_void;
use core::ptr::NonNull;

use kernel::alloc::{flags::GFP_KERNEL, KVec};
use kernel::prelude::*;

use super::Target;

/// One target.
///
/// # Invariants
///
/// `target` points to a target of type `kind` that is not dropped before it is removed from the list.
struct Entry {
    target: NonNull<c_void>,
    kind: TypeId,
}

// SAFETY: Targets are `Send` and `Sync` (see `Target`).
unsafe impl Send for Entry {}

kernel::sync::global_lock! {
    // SAFETY: `Registry::init` is called by `Registration::new`, before any target can exist.
    unsafe(uninit) static TARGETS: Mutex<KVec<Entry>> = KVec::new();
}

kernel::sync::global_lock! {
    // SAFETY: As `TARGETS`.
    unsafe(uninit) static CLAIMS: Mutex<KVec<[u8; 16]>> = KVec::new();
}

/// A name that one target at a time can hold: device-mapper lets several devices open the same disk.
///
/// # Invariants
///
/// The name is in `CLAIMS`, once.
pub struct Claim([u8; 16]);

impl Claim {
    /// Claims a name.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it is held.
    pub fn new(name: [u8; 16]) -> Result<Self> {
        let mut claims = CLAIMS.lock();
        if claims.contains(&name) {
            return Err(EBUSY);
        }
        claims.push(name, GFP_KERNEL)?;
        // INVARIANT: It was not there, and is now.
        Ok(Self(name))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMS.lock().retain(|name| *name != self.0);
    }
}

/// The list of targets.
///
/// A target is in it from the end of its construction to the start of its destruction. Whoever visits targets
/// holds the list's mutex, so destruction waits for visitors. Lock order: this mutex before any lock of a target.
pub struct Registry;

impl Registry {
    /// # Safety
    ///
    /// Must be called once, before any other function of the registry.
    pub(super) unsafe fn init() {
        // SAFETY: The caller vouches for it.
        unsafe {
            TARGETS.init();
            CLAIMS.init();
        }
    }

    /// # Safety
    ///
    /// `target` must stay where it is until [`Registry::remove`] was called with it.
    pub(super) unsafe fn add<T: Target>(target: NonNull<T>) -> Result {
        // INVARIANT: The caller vouches for it.
        let entry = Entry {
            target: target.cast(),
            kind: TypeId::of::<T>(),
        };
        TARGETS.lock().push(entry, GFP_KERNEL)?;
        Ok(())
    }

    pub(super) fn remove<T: Target>(target: NonNull<T>) {
        TARGETS.lock().retain(|entry| entry.target != target.cast());
    }

    /// Calls `visit` on the targets of type `T`, oldest first, until it returns `false`. It may sleep; it must
    /// not construct or destroy a target.
    pub fn for_each<T: Target>(mut visit: impl FnMut(&T) -> bool) {
        let list = TARGETS.lock();
        for entry in list.iter().filter(|entry| entry.kind == TypeId::of::<T>()) {
            // SAFETY: By the type invariant of `Entry` the target is a `T` and there, as it cannot be removed
            // while the mutex is held.
            if !visit(unsafe { entry.target.cast::<T>().as_ref() }) {
                break;
            }
        }
    }
}
