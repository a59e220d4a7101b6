// SPDX-License-Identifier: GPL-2.0

//! From one image to another, on a disk that holds the old one, for the fewest bytes.
//!
//! [`Update::plan`] finds the cheapest way there is: a delta in the store; else both manifests, so that what the disk
//! holds elsewhere need not be fetched. [`Update::apply`] goes it, in place. It can be cut and run again at any
//! instant: what it finds on the disk is a hint that is proved by digests, and what does not fit is fetched.

mod digests;
mod engine;
mod object;
mod stash;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pristine_image::delta::{compare, Delta, DigestList, PageChange, Step};
use pristine_image::merkle::Blinding;
use pristine_image::{Digest, ImageId};

use crate::error::{Error, Result};
use crate::fetch::{BlockSink, FetchOptions};
use crate::object::ObjectName;
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::Store;

pub use digests::digests_of_disk;
pub(crate) use digests::ReaderDigests;
pub use object::StoredDelta;

/// A disk that goes from one image to another, in blocks of [`pristine_image::BLOCK_SIZE`]. What is written is read
/// back as it was written.
pub trait Local {
    /// Reads blocks from `first` on; what lies beyond the disk's end reads as zeros.
    ///
    /// # Errors
    /// The operating system's.
    fn read(&mut self, first: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes blocks from `first` on.
    ///
    /// # Errors
    /// The operating system's.
    fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()>;

    /// Makes blocks zero.
    ///
    /// # Errors
    /// The operating system's.
    fn zero(&mut self, blocks: Range<u64>) -> io::Result<()>;

    /// These blocks are the new image's now, verified. Called after they were written, once for each block, unless
    /// [`Local::is_right`] said so before.
    ///
    /// # Errors
    /// Any error ends the update.
    fn right(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let _ = blocks;
        Ok(())
    }

    /// Whether all of these blocks are known to be the new image's, so that nothing need be done about them.
    fn is_right(&self, blocks: Range<u64>) -> bool {
        let _ = blocks;
        false
    }
}

/// How to update.
#[derive(Clone, Debug)]
pub struct UpdateOptions {
    /// Bytes of memory for old blocks that are needed after they were overwritten; what does not fit is fetched.
    /// Default 128 MiB.
    pub memory: u64,
    /// Believe that pages are right which are the same in both images: the caller knows that the disk holds the old
    /// image there. Default false.
    pub trust_unchanged: bool,
    /// Requests at once for what must be fetched from packs. Default 4.
    pub parallel: usize,
    /// How often a failed request is tried again.
    pub retry: RetryPolicy,
    /// Stops the update.
    pub cancel: CancelToken,
}

impl Default for UpdateOptions {
    fn default() -> Self {
        UpdateOptions {
            memory: 128 << 20,
            trust_unchanged: false,
            parallel: 4,
            retry: RetryPolicy::default(),
            cancel: CancelToken::new(),
        }
    }
}

/// What an update did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Updated {
    /// Blocks found or made right, with those fetched from packs.
    pub right: u64,
    /// Blocks written, zeros included.
    pub written: u64,
    /// Frames of the delta that were unpacked.
    pub frames: u64,
    /// Frames of the delta that did not come, or not fit what the disk holds.
    pub frames_unusable: u64,
    /// Pages that had to be looked at block by block.
    pub pages_by_digest: u64,
    /// Blocks that could be had neither from the disk nor from the delta. [`Update::apply`] fetches them.
    pub missing: Vec<Range<u64>>,
    /// Blocks fetched from packs.
    pub fetched: u64,
    /// The most old blocks that were kept in memory at a time.
    pub kept_peak: u64,
    /// Old blocks that there was no memory for.
    pub kept_lost: u64,
}

/// What a disk holds before an update.
pub enum Before<'a> {
    /// An image. Blocks that are not that image's any more cost more, and nothing else.
    Image(ImageId),
    /// Content with these digests, see [`digests_of_disk`]: perhaps an image.
    Content(&'a DigestList),
}

/// Blocks as ranges.
pub type Blocks = Vec<Range<u64>>;

/// The way from what a disk holds to an image.
pub struct Update {
    store: Arc<dyn Store>,
    image: ImageId,
    way: Way,
    reader: OnceLock<ImageReader>,
    retry: RetryPolicy,
    cancel: CancelToken,
}

enum Way {
    Stored(StoredDelta),
    Compared(Delta),
}

/// What an update takes at most, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of the delta, if there is one.
    pub delta: Option<u64>,
    /// Blocks that differ from what the disk holds in the same place.
    pub changed: u64,
    /// Of these, blocks that the disk holds elsewhere.
    pub moved: u64,
    /// Of these, blocks that the disk does not hold.
    pub new: u64,
}

impl Update {
    /// Finds the way to `image` for a disk that holds `before`; `None` if the old image is not known to the store any
    /// more. What was read of `image` already may be given as `reader`.
    ///
    /// # Errors
    /// What can go wrong with the store. A delta that is damaged is none.
    pub fn plan(
        store: &Arc<dyn Store>,
        before: &Before<'_>,
        image: ImageId,
        reader: Option<ImageReader>,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Option<Self>> {
        let old = match before {
            Before::Image(id) => *id,
            Before::Content(digests) => digests.image(),
        };
        let cell = OnceLock::new();
        if let Some(reader) = reader {
            // It is empty: it was made above.
            let _ = cell.set(reader);
        }
        let way = match StoredDelta::open(store.as_ref(), &old, &image, retry, cancel) {
            Ok(Some(stored)) => Some(Way::Stored(stored)),
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            // Whatever is wrong with a delta: the manifests say the same for more bytes. If it is the network, they do not
            // come either.
            Ok(None) | Err(_) => {
                let new = open_once(false, &cell, store, image, retry, cancel)?;
                compare_with(store, before, new, retry, cancel)?.map(Way::Compared)
            }
        };
        Ok(way.map(|way| Update {
            store: Arc::clone(store),
            image,
            way,
            reader: cell,
            retry,
            cancel: cancel.clone(),
        }))
    }

    /// The image, its manifest read when this is first called.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn reader(&self) -> Result<&ImageReader> {
        // With a delta, only pages that do not fit it are wanted, if any.
        let sparse = matches!(self.way, Way::Stored(_));
        open_once(
            sparse,
            &self.reader,
            &self.store,
            self.image,
            self.retry,
            &self.cancel,
        )
    }

    /// The image, if its manifest was read.
    pub fn into_reader(self) -> Option<ImageReader> {
        self.reader.into_inner()
    }

    fn delta(&self) -> &Delta {
        match &self.way {
            Way::Stored(stored) => stored.delta(),
            Way::Compared(delta) => delta,
        }
    }

    /// The image that it leads to.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// The new image's size in bytes.
    pub fn size(&self) -> u64 {
        self.delta().head().new_size
    }

    /// The blocks of all pages that differ: every other block of the new image is proved to be what the old one has there.
    pub fn changed_pages(&self) -> Blocks {
        let delta = self.delta();
        let mut changed: Blocks = Vec::new();
        for page in 0..delta.pages() {
            if let Some(PageChange::Same(_)) = delta.change(page) {
                continue;
            }
            let blocks = delta.page_blocks(page);
            match changed.last_mut() {
                Some(last) if last.end == blocks.start => last.end = blocks.end,
                _ => changed.push(blocks),
            }
        }
        changed
    }

    /// The blocks that the way fetches from packs if the disk is what it should be: none with a delta.
    fn blocks_of_packs(&self) -> Result<Blocks> {
        let delta = self.delta();
        let mut blocks = Vec::new();
        if delta.frames().is_empty() {
            for page in 0..delta.pages() {
                for run in delta.steps(page) {
                    let run = run.map_err(|error| {
                        Error::format(self.store.location(), &self.object(), error)
                    })?;
                    if let Step::New(_) = run.step {
                        blocks.push(run.block..run.block + run.count);
                    }
                }
            }
        }
        Ok(blocks)
    }

    fn object(&self) -> ObjectName {
        let head = self.delta().head();
        ObjectName::Delta {
            new: head.new,
            old: head.old,
        }
    }

    /// What it takes, for a disk that is what it should be.
    ///
    /// # Errors
    /// What can go wrong with the store.
    pub fn cost(&self) -> Result<Cost> {
        let delta = self.delta();
        let mut cost = Cost {
            delta: match &self.way {
                Way::Stored(stored) => Some(stored.len()),
                Way::Compared(_) => None,
            },
            changed: 0,
            moved: 0,
            new: 0,
        };
        for page in 0..delta.pages() {
            if delta.change(page) == Some(PageChange::Zero) {
                let blocks = delta.page_blocks(page);
                cost.changed += blocks.end - blocks.start;
            }
            for run in delta.steps(page) {
                let run = run
                    .map_err(|error| Error::format(self.store.location(), &self.object(), error))?;
                if run.step != Step::Same {
                    cost.changed += run.count;
                }
                match run.step {
                    Step::Move(_) | Step::Again(_) => cost.moved += run.count,
                    Step::New(_) => cost.new += run.count,
                    Step::Same | Step::Zero => (),
                }
            }
        }
        Ok(cost)
    }

    /// Bytes that [`Update::apply`] will ask the store for from now on, if the disk is what it should be. Exact, without
    /// anything being read again.
    ///
    /// # Errors
    /// What can go wrong with the store.
    pub fn bytes_to_fetch(&self) -> Result<u64> {
        match &self.way {
            Way::Stored(stored) => Ok(stored.bytes_to_fetch()),
            Way::Compared(_) => self
                .reader()?
                .bytes_of(self.blocks_of_packs()?, &FetchOptions::default()),
        }
    }

    /// Applies what the disk and the delta yield, and leaves the rest in [`Updated::missing`]: for callers that fetch it
    /// their own way. `progress` gets the blocks that were looked at, of all.
    ///
    /// # Errors
    /// [`Error::Sink`] with the disk's error, and what can go wrong with the store.
    pub fn apply_local(
        &self,
        local: &mut dyn Local,
        options: &UpdateOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Updated> {
        let stored = match &self.way {
            Way::Stored(stored) => Some(stored),
            Way::Compared(_) => None,
        };
        let mut digests = |page: u64| -> Result<Vec<Digest>> {
            let page = self.reader()?.page(page)?;
            Ok(page.blocks().map(|block| block.digest).collect())
        };
        let store = self.store.as_ref();
        engine::apply(
            store,
            self.delta(),
            stored,
            &mut digests,
            local,
            options,
            progress,
        )
    }

    /// Makes the disk the new image: by what it holds and the delta, and what is missing from packs.
    ///
    /// # Errors
    /// As [`Update::apply_local`]; what was written until then is right, and applying again goes on.
    pub fn apply(
        &self,
        local: &mut (dyn Local + Send),
        options: &UpdateOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Updated> {
        let mut updated = self.apply_local(local, options, progress)?;
        if updated.missing.is_empty() {
            return Ok(updated);
        }
        let fetch = FetchOptions {
            parallel: options.parallel,
            retry: options.retry,
            cancel: options.cancel.clone(),
            ..FetchOptions::default()
        };
        let sink = LocalSink(Mutex::new(local));
        let report = self
            .reader()?
            .fetch(updated.missing.iter().cloned(), &fetch, &sink)?;
        updated.fetched = report.blocks;
        updated.written += report.blocks + report.zero_blocks;
        updated.right += report.blocks + report.zero_blocks;
        Ok(updated)
    }
}

/// With `sparse`, for a few pages of its manifest.
fn open_once<'a>(
    sparse: bool,
    cell: &'a OnceLock<ImageReader>,
    store: &Arc<dyn Store>,
    image: ImageId,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<&'a ImageReader> {
    if let Some(reader) = cell.get() {
        return Ok(reader);
    }
    let store = Arc::clone(store);
    let reader = match sparse {
        true => ImageReader::open_sparse(store, image, retry, cancel)?,
        false => ImageReader::open(store, &ImageSelector::Id(image), retry, cancel)?,
    };
    Ok(cell.get_or_init(|| reader))
}

/// What the ids of images are blinded with that are encrypted as `image` is; `None` if that is not encrypted.
///
/// # Errors
/// As [`ImageReader::open`].
pub fn blinding_of(
    store: &Arc<dyn Store>,
    image: ImageId,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<Option<Blinding>> {
    match store.view_of(&image)? {
        Some(view) if view.seals_deltas() => {
            let reader = ImageReader::open_sparse(Arc::clone(store), image, retry, cancel)?;
            Ok(reader.manifest().blinding().copied())
        }
        _ => Ok(None),
    }
}

/// The steps by digests alone; `None` if the store does not know the old image any more.
fn compare_with(
    store: &Arc<dyn Store>,
    before: &Before<'_>,
    new: &ImageReader,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<Option<Delta>> {
    let format = |error| Error::format(store.location(), &ObjectName::Manifest(new.image()), error);
    let comparison = match before {
        Before::Content(digests) => compare(*digests, &ReaderDigests(new)),
        Before::Image(id) => {
            match ImageReader::open(Arc::clone(store), &ImageSelector::Id(*id), retry, cancel) {
                Ok(old) => compare(&ReaderDigests(&old), &ReaderDigests(new)),
                Err(error) if matches!(error, Error::NoImage { .. }) || error.is_corruption() => {
                    return Ok(None)
                }
                Err(error) => return Err(error),
            }
        }
    };
    let comparison = comparison.map_err(|error| error.or(format))?;
    Delta::without_frames(&comparison).map(Some).map_err(format)
}

/// Fetched blocks, written to a disk.
struct LocalSink<'a>(Mutex<&'a mut (dyn Local + Send)>);

impl BlockSink for LocalSink<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let mut local = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        local.write(first, data)?;
        local.right(first..first + (data.len() / pristine_image::BLOCK_SIZE) as u64)
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        let mut local = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        local.zero(blocks.clone())?;
        local.right(blocks)
    }
}
