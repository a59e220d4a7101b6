// SPDX-License-Identifier: GPL-2.0

//! Device-mapper for Rust: the only place of the module with `unsafe` and C.
//!
//! C headers: `include/linux/device-mapper.h`, `include/linux/dm-io.h`.
//!
//! A target implements [`Target`] and is registered with a [`Registration`]:
//!
//! | Rust | C |
//! | --- | --- |
//! | [`Target`] and [`Registration`] | `struct target_type`, `dm_register_target()` |
//! | [`Constructor`] | `struct dm_target` while `ctr` runs |
//! | [`Device`] | `struct dm_dev`, `dm_get_device()`/`dm_put_device()` |
//! | [`MapBio`], [`Bio`], [`BioList`] | `struct bio` handed to `map`, kept for later, and in a list |
//! | [`Mapped`] | the `DM_MAPIO_*` codes |
//! | [`IoClient`] | `struct dm_io_client`, `dm_io()` |
//! | [`ControlDevice`] | `struct miscdevice` |
//! | [`Hooks`] | `dm_per_bio_data()`, `bi_end_io` of a bio that is to come back |
//! | [`Jobs`] | delayed work on a `WQ_MEM_RECLAIM` workqueue |
//! | - | `debugfs`: the files of a managed device |
//! | [`trace`] | `TRACE_EVENT()` |
//! | [`Registry`] | - : the targets that exist, for those who come from outside |
//!
//! # Who owns a bio
//!
//! 1. The block layer hands a bio to `map`; the target holds it as a [`MapBio`].
//! 2. [`MapBio::remap`] and [`MapBio::complete`] end the ownership at once and give the [`Mapped`] that `map`
//!    must return.
//! 3. [`MapBio::defer`] turns it into a [`Bio`], which may be kept, and a [`Mapped`].
//! 4. [`Bio::submit`] sends it to the device below, [`Bio::complete`] answers it.
//!
//! There is no other way to get a [`Mapped`], and a [`MapBio`] or [`Bio`] that is dropped is answered with an I/O
//! error. So a bio can be neither lost nor answered twice.

use kernel::error::{code::EINTR, Error};

mod bio;
mod debug;
mod device;
mod errno;
mod hooks;
mod io;
mod jobs;
mod misc;
mod output;
mod reboot;
mod registry;
mod target;
pub mod trace;
mod words;

pub use bio::{Bio, BioList, MapBio, Mapped, Status};
pub use device::{Device, Limits};
pub use errno::Errno;
pub use hooks::Hooks;
pub use io::{Buffer, IoClient, NoIo, WriteFlags, SECTOR};
pub use jobs::{give_way, Jobs};
pub use misc::ControlDevice;
pub use output::Output;
pub use reboot::RebootNotifier;
pub use registry::{Claim, Registry};
pub use target::{Constructor, CtrError, Managed, Notifier, Registration, StatusKind, Target};
pub use words::{peek, AtomicWords};

/// Raw bindings, generated from `bindings.h`. Not to be used outside of this directory.
#[allow(
    dead_code,
    // Known to rustc from 1.88 on.
    unknown_lints,
    unnecessary_transmutes,
    clippy::all,
    clippy::cast_lossless,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    improper_ctypes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]
mod raw {
    use kernel::bindings::*;
    use kernel::ffi;
    include!(concat!(
        env!("PRISTINE_OBJ"),
        "/rust/dm/bindings_generated.rs"
    ));
}

/// The CRC32C of `data` appended to data whose CRC32C is `crc` (0 to start).
pub fn crc32c(crc: u32, data: &[u8]) -> u32 {
    // The kernel's function neither inverts its start value nor its result.
    // SAFETY: `data` is readable for its length.
    !unsafe { raw::pristine_crc32c(!crc, data.as_ptr().cast(), data.len()) }
}

/// Sorts numbers, smallest first. Not `sort_unstable()`, in which the compiler finds a way to panic.
pub fn sort(numbers: &mut [u64]) {
    // SAFETY: The pointer is good for so many numbers, and nobody else has them meanwhile.
    unsafe { raw::pristine_sort(numbers.as_mut_ptr(), numbers.len()) }
}

/// Whether the current task has CAP_SYS_ADMIN.
pub fn capable_admin() -> bool {
    // SAFETY: No requirements.
    unsafe { raw::pristine_capable_admin() }
}

/// Whether a message that anybody may cause again and again may be printed now: ten in five seconds. The kernel
/// says how many were not.
pub fn may_print() -> bool {
    // SAFETY: No requirements.
    unsafe { raw::pristine_may_print() }
}

/// Time since some moment, in microseconds. It never goes back.
pub fn now_us() -> u64 {
    // SAFETY: No requirements.
    unsafe { raw::pristine_now_us() }
}

/// Sleeps for `ms` milliseconds.
///
/// # Errors
///
/// `EINTR` for a signal.
pub fn sleep_ms(ms: u32) -> Result<(), Error> {
    // SAFETY: No requirements beyond being allowed to sleep.
    if unsafe { raw::pristine_sleep_ms(ms) } {
        Ok(())
    } else {
        Err(EINTR)
    }
}

/// Waits for an RCU grace period: quickly, at the cost of disturbing all CPUs, if `expedited`.
pub fn grace_period(expedited: bool) {
    if expedited {
        // SAFETY: No requirements beyond being allowed to sleep; calling it where that is forbidden is a bug that the
        // kernel reports, and no unsoundness of memory.
        unsafe { raw::pristine_synchronize_rcu_expedited() }
    } else {
        // The kernel crate wraps it from 7.3 on, as a safe function.
        // SAFETY: As above.
        unsafe { kernel::bindings::synchronize_rcu() }
    }
}
