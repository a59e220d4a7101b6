// SPDX-License-Identifier: GPL-2.0

//! Target types and their callbacks.

use core::cell::UnsafeCell;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;

use kernel::alloc::{flags::GFP_KERNEL, KBox, KVec};
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::{c_char, c_int, c_uint, c_void};
use kernel::prelude::*;
use kernel::str::CString;

use super::{debug, raw, Device, IoClient, Jobs, Limits, MapBio, Mapped, Output, Registry};

/// Why a target could not be constructed: the number for the caller, the text for the log.
pub struct CtrError {
    /// The error.
    pub errno: Error,
    /// What is wrong, for `ti->error`.
    pub message: &'static CStr,
}

impl CtrError {
    /// An error with its text.
    pub const fn new(errno: Error, message: &'static CStr) -> Self {
        Self { errno, message }
    }
}

impl From<Error> for CtrError {
    fn from(errno: Error) -> Self {
        Self {
            errno,
            message: c"Out of memory",
        }
    }
}

/// Which status is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusKind {
    /// State and counters.
    Info,
    /// The words of the table line.
    Table,
    /// What an integrity measurement is to see: `key=value` pairs, each followed by a comma, then a semicolon.
    Ima,
}

/// A device-mapper target that has a table to itself (`DM_TARGET_SINGLETON`).
///
/// Constructed by [`Target::new`] when a table is loaded, dropped when the table goes. Between them device-mapper
/// calls, in this order: `preresume` when the table becomes active, `map` while it is, `postsuspend` when all
/// bios have ended and none will come; then `preresume` again, or the end. `status` and `message` may come at any
/// time.
pub trait Target: Send + Sync + Sized + 'static {
    /// The name in table lines.
    const NAME: &'static CStr;
    /// The version of the target type.
    const VERSION: [u32; 3];

    /// Makes a target of the words that follow the name in the table line.
    fn new(constructor: &Constructor<'_>, words: &[&str]) -> Result<Pin<KBox<Self>>, CtrError>;

    /// The device that the target's sectors lie on, one to one.
    fn data(&self) -> &Device;

    /// The target's jobs.
    fn jobs(&self) -> &Jobs;

    /// Decides on a bio. Called by many tasks at once; must not wait for I/O.
    fn map(&self, bio: MapBio) -> Mapped;

    /// Runs job `id` in a worker.
    fn run(&self, id: u32);

    /// The table becomes active; an error keeps the device suspended.
    fn preresume(&self, device: &Managed<'_>) -> Result;

    /// The device is about to be suspended: bios come still, but those that cannot end must not hold it up for ever. With
    /// `noflush`, they may be answered with [`Status::Requeue`](super::Status::Requeue).
    fn presuspend(&self, noflush: bool);

    /// The suspension that was announced did not come about.
    fn presuspend_undo(&self);

    /// The table is no longer active, and no bio is under way.
    fn postsuspend(&self);

    /// Writes a status line.
    fn status(&self, kind: StatusKind, output: &mut Output<'_>);

    /// Handles a message; `Ok(true)` if `output` holds an answer.
    fn message(&self, words: &[&str], output: &mut Output<'_>) -> Result<bool>;

    /// Changes the limits of the managed device.
    fn limits(&self, limits: &mut Limits<'_>);

    /// The machine is about to go down; I/O still works.
    fn reboot(&self);

    /// The number of the managed device, (major, minor), while the table is active.
    fn number(&self) -> Option<(u32, u32)>;

    /// Writes what debugfs shows of what happened so far: lines of name and number.
    fn counters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;

    /// Writes what debugfs shows of how things are now: lines of name and number.
    fn state(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result;
}

/// A table line's target while it is constructed.
pub struct Constructor<'a> {
    ti: NonNull<raw::dm_target>,
    _life: PhantomData<&'a ()>,
}

impl Constructor<'_> {
    /// The length of the target in sectors.
    pub fn sectors(&self) -> u64 {
        // SAFETY: `ti` is valid while it is constructed.
        unsafe { (*self.ti.as_ptr()).len }
    }

    /// Opens a device, given as a path or as major:minor, for reading and writing. One that is read-only is refused
    /// here; the block layer would let writes to it through.
    pub fn device(&self, path: &str) -> Result<Device> {
        let path = CString::try_from_fmt(fmt!("{path}"))?;
        // CAST: The open flags are small.
        let mode = (raw::PRISTINE_MODE_READ | raw::PRISTINE_MODE_WRITE) as bindings::blk_mode_t;
        let mut dev = core::ptr::null_mut();
        // SAFETY: `ti` is valid while it is constructed, the path ends with a NUL, `dev` is writable.
        to_result(unsafe {
            raw::dm_get_device(self.ti.as_ptr(), path.as_char_ptr(), mode, &mut dev)
        })?;
        let dev = NonNull::new(dev).ok_or(ENODEV)?;
        // SAFETY: `dev` was just got for `ti`. A target is dropped in `dtr` at the latest, and its devices with it.
        let device = unsafe { Device::from_raw(self.ti, dev) };
        if device.is_read_only() {
            return Err(EROFS);
        }
        Ok(device)
    }

    pub(super) fn raw(&self) -> NonNull<raw::dm_target> {
        self.ti
    }

    /// A client for the target's own I/O.
    pub fn io(&self) -> Result<IoClient> {
        IoClient::new()
    }
}

/// The number of the managed device: (major, minor).
///
/// # Safety
///
/// `ti` must be part of a table.
unsafe fn number(ti: NonNull<raw::dm_target>) -> (u32, u32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: A table is made for a device, which outlives it.
    unsafe { raw::pristine_table_dev(ti.as_ptr(), &mut major, &mut minor) };
    (major, minor)
}

/// The managed device, as far as a target in it may know it.
pub struct Managed<'a> {
    ti: NonNull<raw::dm_target>,
    _life: PhantomData<&'a ()>,
}

impl Managed<'_> {
    /// Its device number: (major, minor).
    pub fn number(&self) -> (u32, u32) {
        // SAFETY: `ti` is part of a table that is bound to a device.
        unsafe { number(self.ti) }
    }

    /// What tells userspace of changes of the device, for as long as the target lives.
    pub fn notifier(&self) -> Notifier {
        Notifier { ti: self.ti }
    }
}

/// Tells userspace of changes of a managed device.
///
/// # Invariants
///
/// `ti` is the target that owns this value, bound to a device.
pub struct Notifier {
    ti: NonNull<raw::dm_target>,
}

// SAFETY: Events may be sent by any thread.
unsafe impl Send for Notifier {}

impl Notifier {
    /// Wakes those who wait for events of the device, and sends a change uevent with `pair` (`KEY=value`).
    /// May sleep.
    pub fn event(&self, pair: &CStr) {
        // SAFETY: By the type invariant `ti` is there; the pair ends with a NUL.
        unsafe { raw::pristine_table_uevent(self.ti.as_ptr(), pair.as_char_ptr()) }
    }
}

/// A registered target type.
///
/// # Invariants
///
/// `raw` is registered with device-mapper and stays where it is.
pub struct Registration<T: Target> {
    raw: KBox<UnsafeCell<raw::target_type>>,
    _target: PhantomData<T>,
}

// SAFETY: A target type may be unregistered by any thread.
unsafe impl<T: Target> Send for Registration<T> {}
// SAFETY: There are no methods on it.
unsafe impl<T: Target> Sync for Registration<T> {}

impl<T: Target> Registration<T> {
    /// Registers the target type. To be called once, by the module's initializer: it also sets up the
    /// [`Registry`].
    pub fn new(module: &'static ThisModule) -> Result<Self> {
        // SAFETY: The module has one target type, registered once in its initializer, before any target exists.
        unsafe {
            Registry::init();
            debug::init();
        }
        let vtable = raw::target_type {
            // CAST: Flag bits.
            features: u64::from(
                raw::DM_TARGET_SINGLETON
                    | raw::DM_TARGET_PASSES_INTEGRITY
                    | raw::DM_TARGET_NOWAIT
                    | raw::DM_TARGET_PASSES_CRYPTO
                    | raw::DM_TARGET_ATOMIC_WRITES,
            ),
            name: T::NAME.as_char_ptr(),
            module: module.as_ptr(),
            version: T::VERSION,
            ctr: Some(ctr::<T>),
            dtr: Some(dtr::<T>),
            map: Some(map::<T>),
            preresume: Some(preresume::<T>),
            presuspend: Some(presuspend::<T>),
            presuspend_undo: Some(presuspend_undo::<T>),
            postsuspend: Some(postsuspend::<T>),
            status: Some(status::<T>),
            message: Some(message::<T>),
            iterate_devices: Some(iterate_devices::<T>),
            io_hints: Some(io_hints::<T>),
            ..Default::default()
        };
        let raw = KBox::new(UnsafeCell::new(vtable), GFP_KERNEL)?;
        // SAFETY: The vtable is complete and stays in its box until it is unregistered.
        to_result(unsafe { raw::dm_register_target(raw.get()) })?;
        // INVARIANT: It was just registered.
        Ok(Self {
            raw,
            _target: PhantomData,
        })
    }
}

impl<T: Target> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant it is registered; device-mapper holds the module while targets exist.
        unsafe { raw::dm_unregister_target(self.raw.get()) }
    }
}

/// The target of `ti`.
///
/// # Safety
///
/// `ti` must have been constructed by [`ctr`] for `T` and not been destroyed; the reference must not outlive the
/// callback.
#[inline(always)]
unsafe fn target<'a, T: Target>(ti: *mut raw::dm_target) -> &'a T {
    // SAFETY: `ctr` stored the pointer of a `KBox<T>`, which only `dtr` takes back.
    unsafe { &*(*ti).private.cast::<T>() }
}

/// The words of an argument vector; `None` for one that is not UTF-8.
///
/// # Safety
///
/// `argv` must hold `argc` C strings that outlive `'a`.
unsafe fn words<'a>(argc: c_uint, argv: *mut *mut c_char) -> Result<KVec<&'a str>> {
    let mut words = KVec::new();
    for i in 0..usize::try_from(argc)? {
        // SAFETY: The caller vouches for `argc` strings.
        let word = unsafe { CStr::from_char_ptr(*argv.add(i)) };
        words.push(word.to_str().map_err(|_| EINVAL)?, GFP_KERNEL)?;
    }
    Ok(words)
}

/// # Safety
///
/// Only for device-mapper: `ti` is being constructed, `argv` holds `argc` strings.
unsafe extern "C" fn ctr<T: Target>(
    ti: *mut raw::dm_target,
    argc: c_uint,
    argv: *mut *mut c_char,
) -> c_int {
    let construct = || -> Result<(), CtrError> {
        let ti_ref = NonNull::new(ti).ok_or(EINVAL)?;
        // SAFETY: By the requirements of this function.
        let words = unsafe { words(argc, argv) }
            .map_err(|e| CtrError::new(e, c"Table line is not valid UTF-8"))?;
        let constructor = Constructor {
            ti: ti_ref,
            _life: PhantomData,
        };
        let target = T::new(&constructor, &words)?;
        // SAFETY: The target is not moved out of its box again; `dtr` drops it in place.
        let raw_target = KBox::into_raw(unsafe { Pin::into_inner_unchecked(target) });
        let Some(pointer) = NonNull::new(raw_target) else {
            return Err(EINVAL.into());
        };
        // SAFETY: The target stays in its box until `dtr`, which removes it first.
        if let Err(e) = unsafe { Registry::add(pointer) } {
            // SAFETY: The pointer came from `into_raw` just now and was not stored.
            drop(unsafe { KBox::from_raw(raw_target) });
            return Err(e.into());
        }
        // SAFETY: A table is made for a device.
        if debug::add::<T>(unsafe { number(ti_ref) }).is_err() {
            pr_warn!("no memory for the files in debugfs\n");
        }
        // SAFETY: `ti` is ours while it is constructed; the target stays in its box until `dtr`, which stops the
        // jobs first.
        unsafe {
            (*ti).private = raw_target.cast();
            (*ti).num_flush_bios = 1;
            (*ti).num_discard_bios = 1;
            (*ti).num_secure_erase_bios = 1;
            (*ti).num_write_zeroes_bios = 1;
            pointer.as_ref().jobs().start(raw_target);
        }
        Ok(())
    };
    match construct() {
        Ok(()) => 0,
        Err(e) => {
            // SAFETY: `ti` is ours while it is constructed; device-mapper only prints the text.
            unsafe { (*ti).error = e.message.as_char_ptr().cast_mut() };
            e.errno.to_errno()
        }
    }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], and no other callback runs or will run on it.
unsafe extern "C" fn dtr<T: Target>(ti: *mut raw::dm_target) {
    // SAFETY: `ctr` stored the pointer.
    let raw_target = unsafe { (*ti).private }.cast::<T>();
    if let Some(pointer) = NonNull::new(raw_target) {
        Registry::remove(pointer);
        if let Some(ti) = NonNull::new(ti) {
            // SAFETY: The table still has its device.
            debug::remove(unsafe { number(ti) });
        }
        // SAFETY: The target is still in its box.
        unsafe { pointer.as_ref() }.jobs().stop();
        // SAFETY: The pointer came from `KBox::into_raw`. Neither visitors nor jobs nor device-mapper use it now.
        drop(unsafe { KBox::from_raw(raw_target) });
    }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], and `bio` is handed over.
unsafe extern "C" fn map<T: Target>(ti: *mut raw::dm_target, bio: *mut bindings::bio) -> c_int {
    // SAFETY: By the requirements of this function.
    let target = unsafe { target::<T>(ti) };
    // SAFETY: Device-mapper never maps a null bio.
    let bio = unsafe { NonNull::new_unchecked(bio) };
    // SAFETY: By the requirements of this function.
    target.map(unsafe { MapBio::from_raw(bio) }).0
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`] and its table is bound to a device.
unsafe extern "C" fn preresume<T: Target>(ti: *mut raw::dm_target) -> c_int {
    let Some(ti_ref) = NonNull::new(ti) else {
        return EINVAL.to_errno();
    };
    let managed = Managed {
        ti: ti_ref,
        _life: PhantomData,
    };
    // SAFETY: By the requirements of this function.
    match unsafe { target::<T>(ti) }.preresume(&managed) {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`] and is active.
unsafe extern "C" fn presuspend<T: Target>(ti: *mut raw::dm_target) {
    // SAFETY: By the requirements of this function.
    unsafe { target::<T>(ti).presuspend(raw::pristine_is_noflush(ti)) }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`] and is active.
unsafe extern "C" fn presuspend_undo<T: Target>(ti: *mut raw::dm_target) {
    // SAFETY: By the requirements of this function.
    unsafe { target::<T>(ti) }.presuspend_undo();
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], and no bio is under way.
unsafe extern "C" fn postsuspend<T: Target>(ti: *mut raw::dm_target) {
    // SAFETY: By the requirements of this function.
    unsafe { target::<T>(ti) }.postsuspend();
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], `result` is writable for `maxlen` bytes.
unsafe extern "C" fn status<T: Target>(
    ti: *mut raw::dm_target,
    kind: raw::status_type_t,
    _flags: c_uint,
    result: *mut c_char,
    maxlen: c_uint,
) {
    // SAFETY: By the requirements of this function.
    let (target, buffer) = unsafe { (target::<T>(ti), slice(result, maxlen)) };
    let kind = match kind {
        raw::status_type_t_STATUSTYPE_INFO => StatusKind::Info,
        raw::status_type_t_STATUSTYPE_TABLE => StatusKind::Table,
        _ => StatusKind::Ima,
    };
    target.status(kind, &mut Output::new(buffer));
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], `argv` holds `argc` strings, `result` is writable for
/// `maxlen` bytes.
unsafe extern "C" fn message<T: Target>(
    ti: *mut raw::dm_target,
    argc: c_uint,
    argv: *mut *mut c_char,
    result: *mut c_char,
    maxlen: c_uint,
) -> c_int {
    // SAFETY: By the requirements of this function.
    let (target, words, buffer) =
        unsafe { (target::<T>(ti), words(argc, argv), slice(result, maxlen)) };
    match words.and_then(|words| target.message(&words, &mut Output::new(buffer))) {
        // Device-mapper takes 1 for "there is an answer in the buffer".
        Ok(answered) => c_int::from(answered),
        Err(e) => e.to_errno(),
    }
}

/// # Safety
///
/// `result` must be writable for `maxlen` bytes while the callback runs.
unsafe fn slice<'a>(result: *mut c_char, maxlen: c_uint) -> &'a mut [u8] {
    if result.is_null() {
        return &mut [];
    }
    // CAST: A 32-bit count fits.
    // SAFETY: By the requirements of this function.
    unsafe { core::slice::from_raw_parts_mut(result.cast(), maxlen as usize) }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`].
unsafe extern "C" fn iterate_devices<T: Target>(
    ti: *mut raw::dm_target,
    callout: raw::iterate_devices_callout_fn,
    data: *mut c_void,
) -> c_int {
    let Some(callout) = callout else { return 0 };
    // SAFETY: By the requirements of this function; the callout is device-mapper's own.
    unsafe { callout(ti, target::<T>(ti).data().raw(), 0, (*ti).len, data) }
}

/// # Safety
///
/// Only for device-mapper: `ti` was constructed by [`ctr`], `limits` is being made.
unsafe extern "C" fn io_hints<T: Target>(
    ti: *mut raw::dm_target,
    limits: *mut bindings::queue_limits,
) {
    // SAFETY: By the requirements of this function.
    let (target, limits) = unsafe { (target::<T>(ti), &mut *limits) };
    target.limits(&mut Limits(limits));
}
