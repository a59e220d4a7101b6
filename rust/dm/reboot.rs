// SPDX-License-Identifier: GPL-2.0

//! Notice that the machine is about to restart, halt or power off.

use core::marker::PhantomData;

use kernel::error::to_result;
use kernel::prelude::*;

use super::{raw, Registry, Target};

/// While it lives, [`Target::reboot`] is called on all registered targets before the machine goes down.
///
/// There is one notifier in the module, so only one of these can exist; it is made by the module's initializer.
///
/// # Invariants
///
/// The notifier is registered.
pub struct RebootNotifier<T: Target>(PhantomData<T>);

/// # Safety
///
/// May only be called by the notifier chain, in process context.
unsafe extern "C" fn call<T: Target>() {
    Registry::for_each(|target: &T| {
        target.reboot();
        true
    });
}

impl<T: Target> RebootNotifier<T> {
    /// Registers the notifier.
    pub fn register() -> Result<Self> {
        // SAFETY: The function stays where it is until the module goes, which drops the registration first.
        to_result(unsafe { raw::pristine_reboot_register(Some(call::<T>)) })?;
        // INVARIANT: It was just registered.
        Ok(Self(PhantomData))
    }
}

impl<T: Target> Drop for RebootNotifier<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is registered.
        unsafe { raw::pristine_reboot_unregister() }
    }
}
