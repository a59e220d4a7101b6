// SPDX-License-Identifier: GPL-2.0

//! `/dev/pristine`: the ioctls of [`crate::shared::abi`].

use kernel::alloc::{flags::GFP_KERNEL, KBox, KVVec, KVec};
use kernel::fs::File;
use kernel::miscdevice::{MiscDevice, MiscDeviceRegistration};
use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;
use kernel::sync::{new_mutex, Mutex};
use kernel::uaccess::{UserPtr, UserSlice};
use zerocopy::IntoBytes;

use super::channel::{self, Session};
use super::checkpointer::Retire;
use super::Pristine;
use crate::dm::{capable_admin, now_us, Errno, NoIo, Registry, Target as _};
use crate::shared::abi;
use crate::shared::checkpoint::Plane;

/// An open `/dev/pristine`.
#[pin_data]
pub(crate) struct Control {
    /// What it is the helper of.
    #[pin]
    session: Mutex<Option<Session>>,
}

impl Control {
    /// The session of this file.
    ///
    /// # Errors
    ///
    /// `ENOTCONN` if there is none.
    fn session(&self) -> Result<Session> {
        self.session
            .lock()
            .as_ref()
            .copied()
            .ok_or(Errno::NotConn.into())
    }

    fn attach(&self, address: usize) -> Result {
        let mut args: abi::AttachArgs = read(address)?;
        check_version(args.version)?;
        check_admin()?;
        if args.flags & !abi::TAKE_OVER != 0 {
            return Err(EINVAL);
        }
        let number = (args.major, args.minor);
        let mut mine = self.session.lock();
        if mine.is_some_and(|session| session.is_of_another(number)) {
            return Err(EBUSY);
        }
        let take_over = args.flags & abi::TAKE_OVER != 0;
        let session = with_device(number, |device| {
            args = abi::AttachArgs {
                blocks: device.geometry.blocks(),
                generation: device.stats.generation.load(Relaxed),
                block_shift: device.geometry.block_shift(),
                reserved: 0,
                image_id: device.image_id,
                meta_uuid: device.meta_uuid,
                ..args
            };
            channel::attach(device, number, take_over)
        })?;
        *mine = Some(session);
        drop(mine);
        write(address, &args)
    }

    fn next(&self, address: usize) -> Result {
        // What the helper does may be what reclaim waits for.
        let _scope = NoIo::enter();
        let mut args: abi::NextArgs = read(address)?;
        check_version(args.version)?;
        args.verify().map_err(refuse)?;
        let session = self.session()?;
        let room = usize::try_from(args.count)?;
        let mut requests = KVec::with_capacity(room, GFP_KERNEL)?;
        requests.resize(room, abi::Request::default(), GFP_KERNEL)?;
        let user = UserPtr::from_addr(usize::try_from(args.requests)?);
        // Looked at before anything is taken: a request that cannot be handed over would be lost until the helper ends.
        let bytes = core::mem::size_of_val(requests.as_slice());
        UserSlice::new(user, bytes)
            .writer()
            .write_slice(requests.as_bytes())?;
        let count = session.next(&mut requests, args.wait_ms)?;
        let taken = requests.get(..count).unwrap_or(&[]);
        args.count = u32::try_from(count)?;
        UserSlice::new(user, core::mem::size_of_val(taken))
            .writer()
            .write_slice(taken.as_bytes())?;
        write(address, &args)
    }

    fn answer(&self, address: usize) -> Result {
        let _scope = NoIo::enter();
        let args: abi::AnswerArgs = read(address)?;
        check_version(args.version)?;
        args.verify().map_err(refuse)?;
        self.session()?.answer(&args)
    }

    fn hydrate(&self, address: usize) -> Result {
        let _scope = NoIo::enter();
        let mut args: abi::HydrateArgs = read(address)?;
        check_version(args.version)?;
        args.taken = self.session()?.hydrate(&args)?;
        write(address, &args)
    }
}

/// An argument of an ioctl, read from userspace and checked for its version.
fn read<T: zerocopy::FromBytes + IntoBytes>(address: usize) -> Result<T> {
    let mut argument = T::new_zeroed();
    let user = UserSlice::new(UserPtr::from_addr(address), core::mem::size_of::<T>());
    user.reader().read_slice(argument.as_mut_bytes())?;
    Ok(argument)
}

fn write<T: IntoBytes + zerocopy::Immutable>(address: usize, argument: &T) -> Result {
    let bytes = argument.as_bytes();
    UserSlice::new(UserPtr::from_addr(address), bytes.len())
        .writer()
        .write_slice(bytes)
}

pub(super) fn refuse(why: abi::Refusal) -> Error {
    match why {
        abi::Refusal::Version => Errno::Proto.into(),
        abi::Refusal::Invalid => EINVAL,
        abi::Refusal::PastEnd => ERANGE,
    }
}

fn check_version(version: u32) -> Result {
    abi::verify_version(version).map_err(refuse)
}

fn check_admin() -> Result {
    if capable_admin() {
        Ok(())
    } else {
        Err(EPERM)
    }
}

/// Calls `f` with the active managed device of this number.
fn with_device<R>(number: (u32, u32), f: impl FnOnce(&Pristine) -> Result<R>) -> Result<R> {
    let mut f = Some(f);
    let mut result = Err(ENODEV);
    Registry::for_each(|device: &Pristine| {
        if device.number() != Some(number) {
            return true;
        }
        if let Some(f) = f.take() {
            result = f(device);
        }
        false
    });
    result
}

fn list(address: usize) -> Result {
    let mut args: abi::ListArgs = read(address)?;
    check_version(args.version)?;
    let mut entries = KVVec::new();
    let mut failed = None;
    Registry::for_each(|device: &Pristine| {
        let Some((major, minor)) = device.number() else {
            return true;
        };
        let entry = abi::DeviceEntry {
            major,
            minor,
            blocks: device.geometry.blocks(),
            dirty: device.tracker.dirty_count(),
            block_shift: device.geometry.block_shift(),
            mode: device.mode().code(),
            meta_uuid: device.meta_uuid,
        };
        failed = entries.push(entry, GFP_KERNEL).err();
        failed.is_none()
    });
    if let Some(e) = failed {
        return Err(e.into());
    }
    let fits = entries.len().min(usize::try_from(args.count)?);
    args.count = u32::try_from(entries.len())?;
    if let Some(part) = entries.get(..fits) {
        let user = UserPtr::from_addr(usize::try_from(args.entries)?);
        UserSlice::new(user, core::mem::size_of_val(part))
            .writer()
            .write_slice(part.as_bytes())?;
    }
    write(address, &args)
}

fn stats(address: usize) -> Result {
    let mut args: abi::StatsArgs = read(address)?;
    check_version(args.version)?;
    with_device((args.major, args.minor), |device| {
        let info = device.info();
        args = abi::StatsArgs {
            mode: info.mode.code(),
            blocks: info.blocks,
            dirty: info.dirty,
            stale: info.stale,
            hot: info.hot,
            hot_limit: info.hot_limit,
            deferred: device.pending.lock().came(),
            records: device.stats.records.load(Relaxed),
            intents: device.stats.intents.load(Relaxed),
            checkpoints: device.stats.checkpoints.load(Relaxed),
            meta_bytes: device.stats.meta_bytes.load(Relaxed),
            refused: device.stats.refused.load(Relaxed),
            log_used: info.log_used,
            log_pages: info.log_pages,
            checkpoint_seq: info.checkpoint,
            memory: device.memory,
            ..args
        };
        Ok(())
    })?;
    write(address, &args)
}

fn fetch_stats(address: usize) -> Result {
    let mut args: abi::FetchStatsArgs = read(address)?;
    check_version(args.version)?;
    with_device((args.major, args.minor), |device| {
        let Some(fetcher) = &device.fetcher else {
            // Nothing was stale, and nothing was fetched.
            args = abi::FetchStatsArgs {
                version: args.version,
                major: args.major,
                minor: args.minor,
                ..abi::FetchStatsArgs::default()
            };
            return Ok(());
        };
        let figures = &fetcher.figures;
        let desk = fetcher.desk.lock();
        let (open, oldest) = desk.flights.waiting();
        args = abi::FetchStatsArgs {
            attached: u32::from(desk.helper.is_some()),
            stale: fetcher.map.count(),
            requests: figures.requests.load(Relaxed),
            fetched: figures.fetched.load(Relaxed),
            hydrated: figures.hydrated.load(Relaxed),
            overwritten: figures.overwritten.load(Relaxed),
            errors: figures.errors.load(Relaxed),
            open,
            oldest_us: oldest.map_or(0, |since| now_us().saturating_sub(since)),
            latency_us: figures.latency_us.load(Relaxed),
            latency_max_us: figures.latency_max_us.load(Relaxed),
            ..args
        };
        Ok(())
    })?;
    write(address, &args)
}

fn map(address: usize) -> Result {
    let mut args: abi::MapArgs = read(address)?;
    check_version(args.version)?;
    check_admin()?;
    let plane = args.verify().map_err(refuse)?;
    let words = with_device((args.major, args.minor), |device| {
        let range = args.range(device.geometry.blocks()).map_err(refuse)?;
        let count = range.end - range.start;
        let mut words = KVVec::with_capacity(usize::try_from(count)?, GFP_KERNEL)?;
        for i in range {
            let word = match plane {
                Plane::Dirty => device.tracker.dirty_word(usize::try_from(i)?),
                Plane::Stale => device
                    .fetcher
                    .as_ref()
                    .map_or(0, |f| usize::try_from(i).map_or(0, |i| f.map.word(i))),
            };
            words.push(word.to_le(), GFP_KERNEL)?;
        }
        args.words = count;
        Ok(words)
    })?;
    let bytes = words.as_bytes();
    let user = UserPtr::from_addr(usize::try_from(args.bits)?);
    UserSlice::new(user, bytes.len())
        .writer()
        .write_slice(bytes)?;
    write(address, &args)
}

fn checkpoint(address: usize) -> Result {
    let mut args: abi::CheckpointArgs = read(address)?;
    check_version(args.version)?;
    check_admin()?;
    args.verify().map_err(refuse)?;
    args.checkpoint_seq = with_device((args.major, args.minor), |device| {
        device.checkpoint(Retire::All)
    })?;
    write(address, &args)
}

#[vtable]
impl MiscDevice for Control {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        let init = try_pin_init!(Self {
            session <- new_mutex!(None, "pristine::session"),
        }? Error);
        KBox::pin_init(init, GFP_KERNEL)
    }

    fn release(device: Pin<KBox<Self>>, _file: &File) {
        if let Some(session) = device.session.lock().take() {
            session.end();
        }
    }

    fn ioctl(device: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            abi::LIST => list(arg)?,
            abi::STATS => stats(arg)?,
            abi::MAP => map(arg)?,
            abi::CHECKPOINT => checkpoint(arg)?,
            abi::FETCH_STATS => fetch_stats(arg)?,
            abi::ATTACH => device.attach(arg)?,
            abi::NEXT => device.next(arg)?,
            abi::ANSWER => device.answer(arg)?,
            abi::HYDRATE => device.hydrate(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}
