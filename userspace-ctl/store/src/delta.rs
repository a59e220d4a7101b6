// SPDX-License-Identifier: GPL-2.0

//! Making deltas between images in stores.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::delta::make::{make, BlockVisitor, Content, MakeError, MakeOptions};
use pristine_image::delta::{compare, Comparison};
use pristine_image::{FormatError, ImageId, BLOCK_SIZE};

use crate::error::{Error, Result};
use crate::fetch::{BlockSink, FetchOptions};
use crate::history::read_release;
use crate::object::{ChannelName, ObjectName};
use crate::reader::{ImageReader, ImageSelector};
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::{Put, Store};
use crate::update::ReaderDigests;

/// A delta that is in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeDelta {
    /// Its length in bytes.
    pub bytes: u64,
    /// It was there before.
    pub present: bool,
    /// It was made, saves too little, and is not in the store.
    pub left_out: bool,
}

/// Whether a delta of `delta` bytes is worth its place in a store: it saves each machine at least a quarter of the `without`
/// bytes that it fetches otherwise.
fn is_worth_it(delta: u64, without: u64) -> bool {
    delta.saturating_mul(4) <= without.saturating_mul(3)
}

/// Which deltas to make when an image is published.
#[derive(Clone)]
pub struct DeltaOptions {
    /// From so many images that the channel had last; 0 for none.
    pub count: usize,
    /// How.
    pub make: MakeOptions,
    /// Gets the new blocks that are done, of all, for each delta.
    pub progress: Arc<dyn Fn(u64, u64) + Send + Sync>,
}

impl Default for DeltaOptions {
    /// No deltas.
    fn default() -> Self {
        DeltaOptions {
            count: 0,
            make: MakeOptions::default(),
            progress: Arc::new(|_, _| ()),
        }
    }
}

impl fmt::Debug for DeltaOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("DeltaOptions");
        debug.field("count", &self.count).field("make", &self.make);
        debug.finish_non_exhaustive()
    }
}

/// Makes the deltas to `new`, which is in `target` already, from the images that `channel` had last. Images that are not
/// there any more have none, nor have those that are encrypted with another key, or encrypted while `new` is not. The
/// deltas of an encrypted image are encrypted with its key. One that saves little of what machines fetch without it (less than
/// a quarter) is not kept: what is altogether new compresses hardly better than in the packs that have it as well.
///
/// # Errors
/// As [`put_delta`].
pub fn put_deltas(
    target: &Arc<dyn Store>,
    channel: &ChannelName,
    new: &ImageReader,
    options: &DeltaOptions,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<Vec<MadeDelta>> {
    let mut made = Vec::new();
    if options.count == 0 {
        return Ok(made);
    }
    // As the image is read there, with the key that it has.
    let view = new.shared_store();
    let target = if new.is_encrypted() { &view } else { target };
    for old in last_images(target.as_ref(), channel, new.image(), options.count)? {
        let selector = ImageSelector::Id(old);
        let old = match ImageReader::open(Arc::clone(target), &selector, retry, cancel) {
            Ok(old) => old,
            Err(Error::NoImage { .. } | Error::NoKey { .. }) => continue,
            Err(error) if error.is_corruption() => continue,
            Err(error) => return Err(error),
        };
        if !old.is_encrypted() || new.is_encrypted() {
            let progress = options.progress.as_ref();
            let target = target.as_ref();
            let make = &options.make;
            made.push(put_if(
                &old,
                new,
                target,
                make,
                progress,
                cancel,
                Keep::IfWorthIt,
            )?);
        }
    }
    Ok(made)
}

/// The images other than `new` that a channel had last, the newest first.
pub(crate) fn last_images(
    store: &dyn Store,
    channel: &ChannelName,
    new: ImageId,
    count: usize,
) -> Result<Vec<ImageId>> {
    let mut images: Vec<ImageId> = Vec::new();
    let mut add = |image| {
        if image != new && !images.contains(&image) {
            images.push(image);
        }
        images.len() < count
    };
    let Some((current, _)) = store.read_pointer(channel)? else {
        return Ok(images);
    };
    let mut more = add(current.release().image);
    let mut generation = current.release().generation;
    while more && generation > 1 {
        generation -= 1;
        match read_release(store, channel, generation) {
            Ok(release) => more = add(release.release().image),
            // Those before it are gone as well, or this one is damaged.
            Err(Error::NotFound { .. }) => break,
            Err(error) if error.is_corruption() => continue,
            Err(error) => return Err(error),
        }
    }
    Ok(images)
}

/// Makes the delta from `old` to `new`, images in any stores, and puts it into `target`, unless it is there. `progress` gets
/// the new blocks that are done, of all.
///
/// # Errors
/// [`Error::Delta`], and what can go wrong with the stores.
pub fn put_delta(
    old: &ImageReader,
    new: &ImageReader,
    target: &dyn Store,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
) -> Result<MadeDelta> {
    put_if(old, new, target, options, progress, cancel, Keep::Always)
}

/// Which deltas stay in the store.
enum Keep {
    Always,
    /// Those that [`is_worth_it`] says so of.
    IfWorthIt,
}

/// As [`put_delta`], if the delta is to be kept.
fn put_if(
    old: &ImageReader,
    new: &ImageReader,
    target: &dyn Store,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
    keep: Keep,
) -> Result<MadeDelta> {
    let object = ObjectName::Delta {
        new: new.image(),
        old: old.image(),
    };
    if let Some(bytes) = target.size(&object)? {
        return Ok(MadeDelta {
            bytes,
            present: true,
            left_out: false,
        });
    }
    let is_kept = (!old.is_encrypted() && !new.is_encrypted()) || target.seals_deltas();
    if !is_kept {
        return Err(target.unsupported(
            "take this delta: one of the images is encrypted, and the delta would not be"
                .to_owned(),
        ));
    }
    let comparison = compared(old, new)?;
    let delta = make_from(&comparison, old, new, options, progress, cancel)?;
    let mut made = MadeDelta {
        bytes: delta.len() as u64,
        present: false,
        left_out: match keep {
            Keep::Always => false,
            Keep::IfWorthIt => {
                !is_worth_it(delta.len() as u64, bytes_without(&comparison, old, new)?)
            }
        },
    };
    if !made.left_out {
        made.present = target.put(&object, &delta)? == Put::AlreadyThere;
    }
    Ok(made)
}

/// Bytes that a machine with the old image fetches if there is no delta: the manifest, as far as it differs from the old
/// one's, and what the old image has nowhere.
fn bytes_without(comparison: &Comparison, old: &ImageReader, new: &ImageReader) -> Result<u64> {
    let (before, after) = (old.manifest(), new.manifest());
    let len = |page| {
        let range = after.page_range(page);
        range.end - range.start
    };
    let same = (0..after.pages()).filter(|page| before.page_hash(*page) == after.page_hash(*page));
    let known: u64 = same.map(len).sum();
    let slots = comparison.slots.iter().cloned();
    let content = new.bytes_of(slots, &FetchOptions::default())?;
    Ok(content + after.head().file_len() - known)
}

/// Makes the delta from `old` to `new`; returns its bytes.
///
/// # Errors
/// As [`put_delta`].
pub fn make_delta(
    old: &ImageReader,
    new: &ImageReader,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
) -> Result<Vec<u8>> {
    make_from(&compared(old, new)?, old, new, options, progress, cancel)
}

/// What is wrong with the manifest of an image.
fn wrong(image: &ImageReader) -> impl Fn(FormatError) -> Error + '_ {
    let object = ObjectName::Manifest(image.image());
    move |error| Error::format(image.store().location(), &object, error)
}

fn compared(old: &ImageReader, new: &ImageReader) -> Result<Comparison> {
    compare(&ReaderDigests(old), &ReaderDigests(new)).map_err(|error| error.or(wrong(new)))
}

fn make_from(
    comparison: &Comparison,
    old: &ImageReader,
    new: &ImageReader,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
) -> Result<Vec<u8>> {
    let content = |reader| StoredContent { reader, cancel };
    let delta = make(
        comparison,
        &content(old),
        old.manifest().frames().slots(),
        &content(new),
        options,
        progress,
        cancel.flag(),
    );
    delta.map_err(|error| match error {
        MakeError::Cancelled => Error::Cancelled,
        MakeError::Format(error) => wrong(new)(error),
        error => Error::Delta {
            old: old.image(),
            new: new.image(),
            why: error.to_string(),
        },
    })
}

/// The content of an image in a store, verified like everything that is fetched.
struct StoredContent<'a> {
    reader: &'a ImageReader,
    cancel: &'a CancelToken,
}

impl StoredContent<'_> {
    fn fetch(
        &self,
        blocks: &[Range<u64>],
        parallel: usize,
        sink: &dyn BlockSink,
    ) -> io::Result<()> {
        let options = FetchOptions {
            parallel,
            cancel: self.cancel.clone(),
            ..FetchOptions::default()
        };
        let fetched = self.reader.fetch(blocks.iter().cloned(), &options, sink);
        fetched.map(|_| ()).map_err(io::Error::other)
    }
}

impl Content for StoredContent<'_> {
    fn read(&self, blocks: &[Range<u64>]) -> io::Result<Vec<u8>> {
        let mut places = Vec::with_capacity(blocks.len());
        let mut len = 0;
        for range in blocks {
            places.push((range.start, len));
            len += (range.end - range.start) as usize * BLOCK_SIZE;
        }
        let content = Mutex::new(vec![0; len]);
        let sink = Collect {
            places: &places,
            content: &content,
        };
        // One thread for each frame is at work already.
        self.fetch(blocks, 1, &sink)?;
        Ok(content.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn visit(&self, visit: &BlockVisitor<'_>) -> io::Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let all = 0..self.reader.blocks();
        self.fetch(std::slice::from_ref(&all), threads, &Visit(visit))
    }
}

/// Puts blocks where they belong in a buffer of ascending ranges; `places` has the first block of each, and where it lies.
struct Collect<'a> {
    places: &'a [(u64, usize)],
    content: &'a Mutex<Vec<u8>>,
}

impl BlockSink for Collect<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        for (block, data) in (first..).zip(data.chunks_exact(BLOCK_SIZE)) {
            let range = self.places.partition_point(|&(start, _)| start <= block);
            let place = range
                .checked_sub(1)
                .and_then(|range| self.places.get(range));
            let &(start, at) =
                place.ok_or_else(|| io::Error::other("a block that was not asked for"))?;
            let at = at + (block - start) as usize * BLOCK_SIZE;
            match content.get_mut(at..at + BLOCK_SIZE) {
                Some(into) => into.copy_from_slice(data),
                None => return Err(io::Error::other("a block that was not asked for")),
            }
        }
        Ok(())
    }

    fn zeros(&self, _: Range<u64>) -> io::Result<()> {
        // The buffer is zero.
        Ok(())
    }
}

struct Visit<'a>(&'a BlockVisitor<'a>);

impl BlockSink for Visit<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        (self.0)(first, data);
        Ok(())
    }

    fn zeros(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }
}
