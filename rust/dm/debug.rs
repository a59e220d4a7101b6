// SPDX-License-Identifier: GPL-2.0

//! Files in debugfs, `pristine/dm-<n>/`: one directory for each managed device.
//!
//! While a table is loaded beside the active one, a managed device has two targets; the files belong to the device
//! and show the target that is active. They are made when a table is loaded and not when it becomes active:
//! debugfs allocates memory under its locks, so whoever waits there may wait for I/O of a suspended device.

use core::convert::Infallible;
use core::fmt;

use kernel::alloc::{flags::GFP_KERNEL, KBox, KVec};
use kernel::debugfs::{Dir, File};
use kernel::prelude::*;
use kernel::str::CString;

use super::{NoIo, Registry, Target};

/// What the files know: the number of the managed device.
type Number = (u32, u32);

/// The directory of one managed device.
struct Entry {
    number: Number,
    /// Targets of the device.
    users: usize,
    // Dropped in this order: files, then their directory.
    _counters: Pin<KBox<File<Number>>>,
    _state: Pin<KBox<File<Number>>>,
    _dir: Dir,
}

/// The directories, and the one above them while there are any.
struct Tree {
    entries: KVec<Entry>,
    root: Option<Dir>,
}

kernel::sync::global_lock! {
    // SAFETY: `init` is called by `Registration::new`, before any target can exist.
    unsafe(uninit) static TREE: Mutex<Tree> = Tree { entries: KVec::new(), root: None };
}

/// # Safety
///
/// Must be called once, before any other function here.
pub(super) unsafe fn init() {
    // SAFETY: The caller vouches for it.
    unsafe { TREE.init() };
}

fn show<T: Target>(
    number: Number,
    f: &mut fmt::Formatter<'_>,
    what: impl Fn(&T, &mut fmt::Formatter<'_>) -> fmt::Result,
) -> fmt::Result {
    let mut result = Ok(());
    Registry::for_each(|target: &T| {
        if target.number() != Some(number) {
            return true;
        }
        result = what(target, f);
        false
    });
    result
}

fn counters<T: Target>(number: &Number, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    show(*number, f, T::counters)
}

fn state<T: Target>(number: &Number, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    show(*number, f, T::state)
}

/// Counts a target of the managed device of this number, and makes its directory for the first one. Nothing may be
/// locked that a target's [`Target::counters`], [`Target::state`] or [`Registry::for_each`] lock.
pub(super) fn add<T: Target>(number: Number) -> Result {
    // Other devices may be suspended; whoever is to resume them may wait for this lock.
    let _scope = NoIo::enter();
    let mut tree = TREE.lock();
    if let Some(entry) = tree.entries.iter_mut().find(|e| e.number == number) {
        entry.users += 1;
        return Ok(());
    }
    tree.entries.reserve(1, GFP_KERNEL)?;
    let name = CString::try_from_fmt(fmt!("dm-{}", number.1))?;
    let root = tree.root.get_or_insert_with(|| Dir::new(c"pristine"));
    let dir = root.subdir(&name);
    let entry = Entry {
        number,
        users: 1,
        _counters: KBox::pin_init::<Infallible>(
            dir.read_callback_file(c"counters", number, &counters::<T>),
            GFP_KERNEL,
        )?,
        _state: KBox::pin_init::<Infallible>(
            dir.read_callback_file(c"state", number, &state::<T>),
            GFP_KERNEL,
        )?,
        _dir: dir,
    };
    // The memory was reserved above.
    let _ = tree.entries.push_within_capacity(entry);
    Ok(())
}

/// Ends what [`add`] began; the directory goes with the last target.
pub(super) fn remove(number: Number) {
    let mut tree = TREE.lock();
    if let Some(entry) = tree.entries.iter_mut().find(|e| e.number == number) {
        entry.users = entry.users.saturating_sub(1);
    }
    tree.entries.retain(|entry| entry.users != 0);
    if tree.entries.is_empty() {
        tree.root = None;
    }
}
