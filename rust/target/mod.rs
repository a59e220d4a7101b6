// SPDX-License-Identifier: GPL-2.0

//! The target `pristine`: policy on top of [`crate::dm`] and [`crate::shared`], without `unsafe`.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`tracker`] | state of blocks and extents in memory; the fast path |
//! | [`fetch`] | stale blocks: what is under way |
//! | [`route`] | stale blocks: who waits for what |
//! | [`channel`] | stale blocks: the helper |
//! | [`notes`] | stale blocks: what a flush promises |
//! | [`pending`] | writes that wait for the committer |
//! | [`committer`] | the slow path: intents into the log, in groups |
//! | [`area`] | what a checkpoint area holds |
//! | [`checkpointer`] | exact bits into the checkpoint areas, extents out of the hot set |
//! | [`retirer`] | exact bits into the log, extents out of the hot set |
//! | [`undo`] | originals into the undo area, before their blocks change |
//! | [`load`] | from the disk to memory, at activation |
//! | [`meta`] | the metadata's pages on their device |
//! | [`control`] | `/dev/pristine` |
//!
//! A write takes this way: `map` asks the tracker whether its blocks may be written; if not, the bio waits for the
//! committer. Reads and flushes go straight through: a flush of the data device is enough, because every record
//! that an acknowledged write needs was durable before the write was sent.
//!
//! Lock order: the registry of targets, [`Pristine::checkpoint`], [`Pristine::log`], [`Pristine::pending`] or a fetcher's desk.

mod area;
mod channel;
mod checkpointer;
mod committer;
mod control;
mod fetch;
mod load;
mod meta;
mod notes;
mod pending;
mod retirer;
mod route;
mod tracker;
mod undo;

use core::fmt::{self, Write as _};

use kernel::alloc::{flags::GFP_KERNEL, KBox};
use kernel::prelude::*;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, new_spinlock, Mutex, SpinLock};

use crate::dm::{
    self, may_print, trace, Claim, CtrError, Device, Hooks, Jobs, Limits, Managed, MapBio, Mapped,
    NoIo, Notifier, Output, StatusKind,
};
use crate::shared::geometry::Geometry;
use crate::shared::layout::Layout;
use crate::shared::state::Mode;
use crate::shared::status::Status;
use crate::shared::superblock::{ImageId, Uuid};
use crate::shared::table::{Features, Hex, Table};

use checkpointer::{Checkpointer, Retire};
use committer::Log;
pub(crate) use control::Control;
use fetch::Fetcher;
use load::{complain, read_superblock, Found};
use meta::{errno, MetaIo};
use pending::Pending;
pub(crate) use tracker::Tracker;

/// The target's jobs.
mod job {
    /// Write intents for the bios that wait.
    pub(super) const COMMIT: u32 = 0;
    /// Write a checkpoint because the hot set or the log is filling up.
    pub(super) const MAKE_ROOM: u32 = 1;
    /// Write a checkpoint because changes have waited for one long enough.
    pub(super) const SETTLE: u32 = 2;
    /// Go on with bios that have come back from the data device.
    pub(super) const ENDED: u32 = 3;
    /// End fetches that take too long.
    pub(super) const EXPIRE: u32 = 4;
    /// How many there are.
    pub(super) const COUNT: u32 = 5;
}

/// Longest wait for a checkpoint when the machine goes down, in milliseconds.
const REBOOT_WAIT_MS: u32 = 10_000;

/// Counters, and copies of numbers that live behind locks.
#[derive(Default)]
struct Stats {
    records: Counter,
    intents: Counter,
    valid: Counter,
    checkpoints: Counter,
    meta_bytes: Counter,
    refused: Counter,
    hot: Counter,
    log_used: Counter,
    checkpoint_seq: Counter,
    generation: Counter,
    undo_used: Counter,
    undo_kept: Counter,
    /// See `undo::Undo::state_code`.
    undo_state: Counter,
    /// Blocks copied since the table was loaded, and those that could not be read.
    undo_copied: Counter,
    undo_unread: Counter,
}

/// A number that any task may read or change.
struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl core::ops::Deref for Counter {
    type Target = Atomic<u64>;

    fn deref(&self) -> &Atomic<u64> {
        &self.0
    }
}

/// A managed device.
#[pin_data]
pub(crate) struct Pristine {
    meta: MetaIo,
    features: Features,
    /// Of the superblock; these do not change while the metadata keeps its UUID.
    meta_uuid: Uuid,
    image_id: ImageId,
    geometry: Geometry,
    layout: Layout,
    tracker: Tracker,
    /// If blocks were stale when the table was loaded.
    fetcher: Option<Pin<KBox<Fetcher>>>,
    /// Bytes of memory that grow with the device.
    memory: u64,
    /// A [`Mode`]; it only gets worse.
    mode: Atomic<u32>,
    /// Between `preresume` and `postsuspend`.
    active: Atomic<bool>,
    /// The machine is going down: from now on every checkpoint is exact.
    leaving: Atomic<bool>,
    stats: Stats,
    jobs: Jobs,
    #[pin]
    checkpoint: Mutex<Checkpointer>,
    #[pin]
    log: Mutex<Log>,
    #[pin]
    pending: SpinLock<Pending>,
    #[pin]
    notifier: Mutex<Option<Notifier>>,
    /// The managed device's major number, in the upper half, and minor number; 0 before the first activation.
    number: Atomic<u64>,
    /// Held while the device is active, so that no other writes to the same metadata.
    #[pin]
    claim: Mutex<Option<Claim>>,
}

impl Pristine {
    fn mode(&self) -> Mode {
        Mode::from_code(self.mode.load(Relaxed))
    }

    #[inline]
    fn is_writable(&self) -> bool {
        dm::peek(&self.mode) == Mode::ReadWrite.code()
    }

    fn is_active(&self) -> bool {
        self.active.load(Relaxed)
    }

    /// Turns the device read-only, one way, and says so (rule 6 of the contract). May sleep.
    fn fail(&self, why: &str) {
        let good = Mode::ReadWrite.code();
        if self
            .mode
            .cmpxchg(good, Mode::ReadOnly.code(), Relaxed)
            .is_err()
        {
            return;
        }
        pr_err!(
            "{}: {}; the device is read-only now, changes could not be tracked\n",
            self.meta.data().name(),
            why
        );
        trace::fail(|| self.last_number(), why);
        if let Some(notifier) = &*self.notifier.lock() {
            notifier.event(c"PRISTINE_MODE=ro");
        }
        if self.fetcher.is_some() {
            self.jobs.now(job::ENDED);
        }
    }

    /// Counts a write that is answered with an error, and says so.
    #[cold]
    fn refuse_one(&self) {
        self.stats.refused.add(1, Relaxed);
        if may_print() {
            pr_err!(
                "{}: write refused, the device is read-only since its metadata failed\n",
                self.meta.data().name()
            );
        }
    }

    /// The number of the managed device when it was last active.
    fn last_number(&self) -> (u32, u32) {
        let number = self.number.load(Relaxed);
        // CAST: The halves of 64 bits.
        ((number >> 32) as u32, number as u32)
    }

    fn info(&self) -> Status {
        Status {
            mode: self.mode(),
            block_size: self.geometry.block_size(),
            extent_size: self.geometry.extent_size(),
            dirty: self.tracker.dirty_count(),
            blocks: self.geometry.blocks(),
            stale: self.fetcher.as_ref().map_or(0, |f| f.map.count()),
            hot: self.stats.hot.load(Relaxed),
            hot_limit: u64::from(self.features.hot_extents),
            log_used: self.stats.log_used.load(Relaxed),
            log_pages: self.layout.log_pages,
            checkpoint: self.stats.checkpoint_seq.load(Relaxed),
            generation: self.stats.generation.load(Relaxed),
            image: self.image_id,
            meta_uuid: self.meta_uuid,
            undo: self.undo_status(),
        }
    }
}

impl dm::Target for Pristine {
    const NAME: &'static CStr = c"pristine";
    const VERSION: [u32; 3] = [1, 0, 0];

    fn new(ctor: &dm::Constructor<'_>, words: &[&str]) -> Result<Pin<KBox<Self>>, CtrError> {
        let table =
            Table::parse(words.iter().copied()).map_err(|e| CtrError::new(EINVAL, e.message()))?;
        let data = ctor
            .device(table.data)
            .map_err(|e| CtrError::new(e, c"Cannot open the data device"))?;
        let metadata = match table.metadata {
            None => None,
            Some(path) => Some(
                ctor.device(path)
                    .map_err(|e| CtrError::new(e, c"Cannot open the metadata device"))?,
            ),
        };
        let meta = MetaIo::new(data, metadata, ctor.io()?);

        // Only what never changes is taken from here; `preresume` reads all of it again.
        let mut buffer = dm::Buffer::new(1)?;
        let Found { now: sb, wanted } =
            read_superblock(&meta, &table.features, ctor.sectors(), &mut buffer).map_err(|e| {
                complain(&meta, &e);
                let text = if e.is_identity() {
                    c"Metadata does not belong to this device, image or table (see the kernel log)"
                } else {
                    c"Metadata cannot be used (see the kernel log)"
                };
                CtrError::new(errno(&e), text)
            })?;

        let geometry = wanted.geometry;
        let tracker = Tracker::new(geometry)?;
        let checkpointer = Checkpointer::new(&geometry, table.features.hot_extents)?;
        let log = Log::new(
            &geometry,
            table.features.hot_extents,
            wanted.layout.undo_pages,
        )?;
        let jobs = Jobs::new::<Self>(job::COUNT)?;
        let fetcher = if sb.root.stale_blocks == 0 {
            None
        } else {
            Some(Fetcher::new(
                geometry,
                Hooks::new(ctor, &jobs, job::ENDED)?,
            )?)
        };
        let memory = tracker.bytes()
            + checkpointer.bytes()
            + log.bytes()
            + fetcher.as_ref().map_or(0, |f| f.bytes());
        let init = try_pin_init!(Self {
            meta,
            features: table.features,
            meta_uuid: sb.meta_uuid,
            image_id: sb.image_id,
            geometry,
            layout: wanted.layout,
            tracker,
            fetcher,
            memory: memory as u64, // CAST: usize to u64.
            mode: Atomic::new(Mode::ReadWrite.code()),
            active: Atomic::new(false),
            leaving: Atomic::new(false),
            stats: Stats::default(),
            jobs,
            checkpoint <- new_mutex!(checkpointer, "pristine::checkpoint"),
            log <- new_mutex!(log, "pristine::log"),
            pending <- new_spinlock!(Pending::new(), "pristine::pending"),
            notifier <- new_mutex!(None, "pristine::notifier"),
            number: Atomic::new(0),
            claim <- new_mutex!(None, "pristine::claim"),
        }? Error);
        Ok(KBox::pin_init(init, GFP_KERNEL)?)
    }

    fn data(&self) -> &Device {
        self.meta.data()
    }

    fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    #[inline]
    fn map(&self, bio: MapBio) -> Mapped {
        let (sector, sectors) = (bio.sector(), bio.sectors());
        let (first, last) = self.geometry.block_span(sector, sectors);
        if let Some(fetcher) = &self.fetcher {
            if sectors == 0 || !fetcher.map.is_plain(first, last, bio.is_change()) {
                return self.map_cached(fetcher, bio);
            }
        }
        // A flush is no change, whatever its direction bit says.
        if !bio.is_change() || sectors == 0 {
            return bio.remap(self.meta.data());
        }
        if self.is_writable() && self.tracker.is_dirty_word(first, last) {
            return bio.remap(self.meta.data());
        }
        self.map_change(bio)
    }

    fn run(&self, id: u32) {
        match id {
            job::COMMIT => self.commit(),
            job::MAKE_ROOM => self.make_room(),
            job::SETTLE => self.settle(),
            job::ENDED => self.bios_ended(),
            job::EXPIRE => self.expire(),
            _ => {}
        }
    }

    fn preresume(&self, device: &Managed<'_>) -> Result {
        // The device may hold the file system that reclaim would write to.
        let _scope = NoIo::enter();
        let (major, minor) = device.number();
        self.number
            .store(u64::from(major) << 32 | u64::from(minor), Relaxed);
        *self.notifier.lock() = Some(device.notifier());
        let claim = Claim::new(self.meta_uuid).inspect_err(|_| {
            pr_err!(
                "{}: another active device uses this metadata\n",
                self.meta.data().name()
            );
        })?;
        let mut cp = self.checkpoint.lock();
        if self.is_writable() {
            self.load(&mut cp)?;
        }
        *self.claim.lock() = Some(claim);
        self.active.store(true, Relaxed);
        if let Some(fetcher) = &self.fetcher {
            fetcher.open();
        }
        Ok(())
    }

    fn presuspend(&self, noflush: bool) {
        if let Some(fetcher) = &self.fetcher {
            self.hurry(fetcher, noflush);
        }
    }

    fn presuspend_undo(&self) {
        if let Some(fetcher) = &self.fetcher {
            self.take_time(fetcher);
        }
    }

    fn postsuspend(&self) {
        let _scope = NoIo::enter();
        if let Some(fetcher) = &self.fetcher {
            fetcher.close();
        }
        // No bio is under way, so there is none to commit; a checkpoint that runs holds the lock.
        let mut cp = self.checkpoint.lock();
        if !self.is_active() {
            return;
        }
        if self.is_writable() {
            // On failure the device has said so and turned read-only; recovery replays the log.
            let _ = self.checkpoint_locked(&mut cp, Retire::All, true);
        }
        self.active.store(false, Relaxed);
        drop(self.claim.lock().take());
    }

    fn status(&self, kind: StatusKind, output: &mut Output<'_>) {
        let metadata = self.meta.metadata().map_or("-", |d| d.name());
        // A full buffer is device-mapper's to see.
        let _ = match kind {
            StatusKind::Info => write!(output, "{}", self.info()),
            StatusKind::Table => {
                write!(
                    output,
                    "{} {}{}",
                    self.meta.data().name(),
                    metadata,
                    self.features
                )
            }
            StatusKind::Ima => write!(
                output,
                "target_name=pristine,target_version={}.{}.{},data_device={},metadata_device={},\
                 meta_uuid={},image={};",
                Self::VERSION[0],
                Self::VERSION[1],
                Self::VERSION[2],
                self.meta.data().name(),
                metadata,
                Hex(&self.meta_uuid),
                Hex(&self.image_id),
            ),
        };
    }

    fn message(&self, words: &[&str], output: &mut Output<'_>) -> Result<bool> {
        match words {
            ["checkpoint"] => {
                let seq = self.checkpoint(Retire::All)?;
                let _ = write!(output, "{seq}");
                Ok(true)
            }
            _ => {
                if may_print() {
                    pr_warn!(
                        "{}: unknown message; known is: checkpoint\n",
                        self.meta.data().name()
                    );
                }
                Err(EINVAL)
            }
        }
    }

    fn limits(&self, limits: &mut Limits<'_>) {
        // One request shall not take more than a quarter of the hot set.
        let extents = u64::from(self.features.hot_extents / 4);
        let sectors = extents.saturating_mul(self.geometry.extent_size() >> 9);
        limits.cap_ranges(u32::try_from(sectors).unwrap_or(u32::MAX >> 9));
    }

    fn number(&self) -> Option<(u32, u32)> {
        self.is_active().then(|| self.last_number())
    }

    fn counters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = &self.stats;
        writeln!(f, "deferred {}", self.pending.lock().came())?;
        for (name, counter) in [
            ("records", &stats.records),
            ("intents", &stats.intents),
            ("checkpoints", &stats.checkpoints),
            ("meta_bytes", &stats.meta_bytes),
            ("refused", &stats.refused),
        ] {
            writeln!(f, "{name} {}", counter.load(Relaxed))?;
        }
        if self.layout.undo_pages != 0 {
            writeln!(f, "undo_copied {}", stats.undo_copied.load(Relaxed))?;
            writeln!(f, "undo_unread {}", stats.undo_unread.load(Relaxed))?;
        }
        let Some(fetcher) = &self.fetcher else {
            return Ok(());
        };
        let figures = &fetcher.figures;
        for (name, counter) in [
            ("fetch_requests", &figures.requests),
            ("fetched", &figures.fetched),
            ("hydrated", &figures.hydrated),
            ("overwritten", &figures.overwritten),
            ("fetch_errors", &figures.errors),
            ("noted", &stats.valid),
        ] {
            writeln!(f, "{name} {}", counter.load(Relaxed))?;
        }
        Ok(())
    }

    fn state(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.info();
        writeln!(f, "mode {}", info.mode)?;
        for (name, value) in [
            ("dirty", info.dirty),
            ("stale", info.stale),
            ("blocks", info.blocks),
            ("hot", info.hot),
            ("hot_limit", info.hot_limit),
            ("log_used", info.log_used),
            ("log_pages", info.log_pages),
            ("checkpoint", info.checkpoint),
            ("memory", self.memory),
        ] {
            writeln!(f, "{name} {value}")?;
        }
        Ok(())
    }

    fn reboot(&self) {
        if let Some(fetcher) = &self.fetcher {
            self.hurry(fetcher, false);
        }
        if !self.is_active() || !self.is_writable() {
            return;
        }
        // What is written after this is tracked as ever; it only costs a whole extent again. A job does it, so that
        // a metadata device that does not answer cannot keep the machine from going down.
        self.leaving.store(true, Relaxed);
        self.jobs.now(job::SETTLE);
        if !self.jobs.wait(job::SETTLE, REBOOT_WAIT_MS) {
            pr_warn!(
                "{}: no checkpoint before the machine goes down\n",
                self.meta.data().name()
            );
        }
    }
}
