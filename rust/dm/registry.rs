// SPDX-License-Identifier: GPL-2.0

//! The targets that exist, for those who come from outside of device-mapper: ioctls and the reboot notifier.

use core::any::TypeId;
use core::ffi::c_void;
use core::ptr::NonNull;

use kernel::alloc::{flags::GFP_KERNEL, KVec};
use kernel::prelude::*;
use kernel::sync::{new_condvar, new_mutex, Arc, CondVar, Mutex};

use super::Target;

/// Who is visiting a target. A visit may wait for I/O that never ends, so it holds up the destruction of its own
/// target and nothing else.
#[pin_data]
struct Visits {
    #[pin]
    count: Mutex<usize>,
    #[pin]
    none: CondVar,
}

impl Visits {
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                count <- new_mutex!(0, "pristine::visits"),
                none <- new_condvar!("pristine::visits"),
            }),
            GFP_KERNEL,
        )
    }

    fn wait_for_none(&self) {
        let mut count = self.count.lock();
        while *count != 0 {
            self.none.wait(&mut count);
        }
    }
}

/// One target.
///
/// # Invariants
///
/// `target` points to a target of type `kind` that is not dropped before it was removed from the list and its
/// visits have ended.
struct Entry {
    target: NonNull<c_void>,
    kind: TypeId,
    /// Grows from one entry to the next and is never used again.
    serial: u64,
    visits: Arc<Visits>,
}

// SAFETY: Targets are `Send` and `Sync` (see `Target`).
unsafe impl Send for Entry {}

/// The entries, oldest first, and the serial number of the next.
struct Entries {
    list: KVec<Entry>,
    next: u64,
}

kernel::sync::global_lock! {
    // SAFETY: `Registry::init` is called by `Registration::new`, before any target can exist.
    unsafe(uninit) static TARGETS: Mutex<Entries> = Entries { list: KVec::new(), next: 1 };
}

/// A visit of a target, which keeps it from being dropped.
///
/// # Invariants
///
/// The visit was counted while `target`, a `T`, was in the list.
struct Visit<T> {
    target: NonNull<T>,
    serial: u64,
    visits: Arc<Visits>,
}

impl<T: Target> Visit<T> {
    /// The oldest target of this type that is younger than `serial`.
    fn after(serial: u64) -> Option<Self> {
        let entries = TARGETS.lock();
        let entry = entries
            .list
            .iter()
            .find(|entry| entry.serial > serial && entry.kind == TypeId::of::<T>())?;
        *entry.visits.count.lock() += 1;
        // INVARIANT: Counted just now, under the list's mutex; the type was compared.
        Some(Self {
            target: entry.target.cast(),
            serial: entry.serial,
            visits: entry.visits.clone(),
        })
    }

    fn target(&self) -> &T {
        // SAFETY: By the type invariants of `Visit` and `Entry` it is a `T` and there until the visit ends.
        unsafe { self.target.as_ref() }
    }
}

impl<T> Drop for Visit<T> {
    fn drop(&mut self) {
        let mut count = self.visits.count.lock();
        *count -= 1;
        if *count == 0 {
            self.visits.none.notify_all();
        }
    }
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
/// A target is in it from the end of its construction to the start of its destruction, which waits for those who
/// visit that target. They hold no lock meanwhile. Lock order: the list's mutex before any lock of a target.
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
    /// `target` must stay where it is until [`Registry::remove`] was called with it and has returned.
    pub(super) unsafe fn add<T: Target>(target: NonNull<T>) -> Result {
        let visits = Visits::new()?;
        let mut entries = TARGETS.lock();
        let serial = entries.next;
        // INVARIANT: The caller vouches for the target, and `remove` waits for the visits.
        let entry = Entry {
            target: target.cast(),
            kind: TypeId::of::<T>(),
            serial,
            visits,
        };
        entries.list.push(entry, GFP_KERNEL)?;
        entries.next = serial + 1;
        Ok(())
    }

    pub(super) fn remove<T: Target>(target: NonNull<T>) {
        let mut visits = None;
        TARGETS.lock().list.retain(|entry| {
            if entry.target != target.cast() {
                return true;
            }
            visits = Some(entry.visits.clone());
            false
        });
        // Nobody can begin another visit now.
        if let Some(visits) = visits {
            visits.wait_for_none();
        }
    }

    /// Calls `visit` on the targets of type `T`, oldest first, until it returns `false`. It may wait for I/O and
    /// holds up nobody but the destruction of the target that it visits; it must not destroy that itself.
    pub fn for_each<T: Target>(mut visit: impl FnMut(&T) -> bool) {
        let mut last = 0;
        while let Some(one) = Visit::<T>::after(last) {
            last = one.serial;
            if !visit(one.target()) {
                break;
            }
        }
    }
}
