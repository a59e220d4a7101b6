// SPDX-License-Identifier: GPL-2.0

//! A character device that keeps its module loaded while it is open.
//!
//! C header: `include/linux/miscdevice.h`.

use core::marker::PhantomData;

use kernel::bindings;
use kernel::error::to_result;
use kernel::miscdevice::{MiscDevice, MiscDeviceOptions};
use kernel::prelude::*;
use kernel::types::Opaque;

/// A registered misc device with the behaviour `T`.
///
/// The kernel crate's own `MiscDeviceRegistration` names the module as the owner of the file operations from 7.3 on only;
/// before, a module can be unloaded while its device is open, and closing it then runs code that is gone.
///
/// # Invariants
///
/// `device` is registered, and `operations` are those that it points to.
#[pin_data(PinnedDrop)]
pub struct ControlDevice<T: MiscDevice> {
    #[pin]
    operations: Opaque<bindings::file_operations>,
    #[pin]
    device: Opaque<bindings::miscdevice>,
    _behaviour: PhantomData<T>,
}

// SAFETY: A misc device may be unregistered by any thread.
unsafe impl<T: MiscDevice> Send for ControlDevice<T> {}
// SAFETY: There are no methods on `&self`.
unsafe impl<T: MiscDevice> Sync for ControlDevice<T> {}

impl<T: MiscDevice> ControlDevice<T> {
    /// Makes `/dev/NAME`, which `module` owns.
    pub fn register(
        module: &'static ThisModule,
        options: MiscDeviceOptions,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            operations <- Opaque::ffi_init(move |slot: *mut bindings::file_operations| {
                // SAFETY: The kernel crate's operations for `T` are a constant that lives as long as the module, and may be
                // copied; the slot may be written to.
                unsafe {
                    slot.write(core::ptr::read(options.into_raw::<T>().fops));
                    (*slot).owner = module.as_ptr();
                }
            }),
            device <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut device = options.into_raw::<T>();
                // SAFETY: `this` is where this structure is made. Only the address of a field is taken.
                device.fops = unsafe { &raw const (*this.as_ptr()).operations }.cast();
                // SAFETY: The slot may be written to.
                unsafe { slot.write(device) };
                // SAFETY: The device and its operations, which were initialized before it, are pinned, and the destructor
                // unregisters the device. `T`'s callbacks find a pointer to the device in the open file and take it
                // for their `MiscDeviceRegistration<T>`, which is a transparent wrapper of it.
                // Those who have it open hold the module, and so the operations.
                // INVARIANT: With `Ok`, the device is registered.
                to_result(unsafe { bindings::misc_register(slot) })
            }),
            _behaviour: PhantomData,
        })
    }
}

#[pinned_drop]
impl<T: MiscDevice> PinnedDrop for ControlDevice<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant it is registered.
        unsafe { bindings::misc_deregister(self.device.get()) };
    }
}
