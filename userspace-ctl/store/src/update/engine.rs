// SPDX-License-Identifier: GPL-2.0

//! Applying a delta to a disk, in place.
//!
//! Pages are put together in ascending order: from what the disk holds in the same place and elsewhere, and from frames
//! that are unpacked against it. A page whose hash is right is written where it differs; any other page is taken apart by
//! its digests from the manifest, block by block, and what is not right is left to be fetched. So neither a wrong
//! delta nor a disk that is not what the delta expects can put a wrong block anywhere: at worst more is fetched.
//! What is overwritten while later pages still need it is kept in memory, within bounds.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{sync_channel, Receiver};

use pristine_image::delta::{decode_frame, Delta, PageChange, Step};
use pristine_image::{is_zero, merkle, Digest, FormatError, BLOCK_SIZE};

use super::object::StoredDelta;
use super::stash::{Stash, Uses};
use super::{Local, UpdateOptions, Updated};
use crate::error::{Error, Result};
use crate::store::Store;

/// Requests whose frames may wait in memory.
const FRAMES_AHEAD: usize = 4;

/// Digests of a page's blocks, from the manifest.
pub(super) type PageDigests<'a> = dyn FnMut(u64) -> Result<Vec<Digest>> + 'a;

/// Applies `delta`; with frames from `stored`, or without any. What could not be made right is in [`Updated::missing`].
pub(super) fn apply(
    store: &dyn Store,
    delta: &Delta,
    stored: Option<&StoredDelta>,
    digests: &mut PageDigests<'_>,
    local: &mut dyn Local,
    options: &UpdateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Updated> {
    let format = |error: FormatError| Error::Format {
        location: store.location().to_owned(),
        object: format!("the delta to image {}", delta.head().new),
        error,
    };
    let skipped: Vec<bool> = (0..delta.pages())
        .map(|page| is_skipped(delta, page, local, options))
        .collect();
    let skip = |page: u64| skipped.get(page as usize).copied().unwrap_or(true);
    let uses = Uses::of(delta, &skip).map_err(format)?;
    let wanted = match stored {
        Some(_) => wanted_frames(delta, &skip).map_err(format)?,
        None => Vec::new(),
    };
    let (sender, receiver) = sync_channel(FRAMES_AHEAD);
    std::thread::scope(|scope| {
        if let Some(stored) = stored {
            let (retry, cancel) = (options.retry, &options.cancel);
            let wanted = &wanted;
            scope.spawn(move || stored.send(store, wanted, retry, cancel, &sender));
        } else {
            drop(sender);
        }
        let mut engine = Engine {
            delta,
            local,
            frames: Frames {
                delta,
                receiver,
                decoded: VecDeque::new(),
                next: 0,
                ended: false,
            },
            stash: Stash::new(options.memory),
            uses,
            report: Updated::default(),
        };
        for page in 0..delta.pages() {
            options.cancel.check()?;
            if !skip(page) {
                engine.page(page, digests).map_err(|error| match error {
                    PageError::Format(error) => format(error),
                    PageError::Local(error) => Error::Sink(error),
                    PageError::Other(error) => error,
                })?;
            }
            progress(delta.page_blocks(page).end, delta.blocks());
        }
        let mut report = engine.report;
        report.kept_peak = engine.stash.peak as u64;
        report.kept_lost = engine.stash.lost;
        Ok(report)
    })
}

fn is_skipped(delta: &Delta, page: u64, local: &dyn Local, options: &UpdateOptions) -> bool {
    match delta.change(page) {
        Some(PageChange::Same(_)) if options.trust_unchanged => true,
        _ => local.is_right(delta.page_blocks(page)),
    }
}

/// The frames that hold slots of pages that are not skipped.
fn wanted_frames(
    delta: &Delta,
    skip: &dyn Fn(u64) -> bool,
) -> std::result::Result<Vec<usize>, FormatError> {
    let mut wanted: Vec<usize> = Vec::new();
    for page in (0..delta.pages()).filter(|&page| !skip(page)) {
        for run in delta.steps(page) {
            let run = run?;
            if let Step::New(slot) = run.step {
                let frames = delta.frame_of(slot)..=delta.frame_of(slot + run.count - 1);
                let (Some(first), Some(last)) = frames.into_inner() else {
                    continue;
                };
                let next = wanted.last().map_or(0, |last| last + 1);
                wanted.extend(first.max(next)..=last);
            }
        }
    }
    Ok(wanted)
}

enum PageError {
    Format(FormatError),
    Local(io::Error),
    Other(Error),
}

impl From<FormatError> for PageError {
    fn from(error: FormatError) -> Self {
        PageError::Format(error)
    }
}

impl From<io::Error> for PageError {
    fn from(error: io::Error) -> Self {
        PageError::Local(error)
    }
}

/// Frames as they come, and those that are unpacked: of these, what the page in work and later ones need.
struct Frames<'a> {
    delta: &'a Delta,
    receiver: Receiver<Result<(usize, Vec<u8>)>>,
    /// Index and content; no content for a frame that could not be unpacked.
    decoded: VecDeque<(usize, Option<Vec<u8>>)>,
    /// Frames before this one came, or will not.
    next: usize,
    ended: bool,
}

impl Frames<'_> {
    /// The next frame up to `index` as it is stored; `None` if it does not come.
    fn receive(&mut self, index: usize) -> Result<Option<Vec<u8>>> {
        while !self.ended && self.next <= index {
            match self.receiver.recv() {
                Ok(Ok((found, bytes))) => {
                    self.next = found + 1;
                    if found == index {
                        return Ok(Some(bytes));
                    }
                }
                Ok(Err(Error::Cancelled)) => return Err(Error::Cancelled),
                // Whatever is wrong with the delta: the packs have the same content.
                Ok(Err(_)) | Err(_) => self.ended = true,
            }
        }
        Ok(None)
    }

    /// The content of a slot, if its frame could be unpacked.
    fn slot(&self, slot: u64) -> Option<&[u8]> {
        let index = self.delta.frame_of(slot)?;
        let (_, content) = self.decoded.iter().find(|(found, _)| *found == index)?;
        let at = (slot - self.delta.frames()[index].first_slot) as usize * BLOCK_SIZE;
        content.as_ref()?.get(at..at + BLOCK_SIZE)
    }
}

struct Engine<'a> {
    delta: &'a Delta,
    local: &'a mut dyn Local,
    frames: Frames<'a>,
    stash: Stash,
    uses: Uses,
    report: Updated,
}

impl Engine<'_> {
    fn page(
        &mut self,
        page: u64,
        digests: &mut PageDigests<'_>,
    ) -> std::result::Result<(), PageError> {
        let blocks = self.delta.page_blocks(page);
        let Some(change) = self.delta.change(page) else {
            return Ok(());
        };
        let needed_later = self.uses.within(&blocks);
        if change == PageChange::Zero && needed_later.is_empty() {
            self.local.zero(blocks.clone())?;
            self.right(&blocks)?;
            return Ok(());
        }
        let mut before = vec![0; (blocks.end - blocks.start) as usize * BLOCK_SIZE];
        self.local.read(blocks.start, &mut before)?;
        let (after, all) = match change {
            PageChange::Changed(_) => self.put_together(page, &before)?,
            PageChange::Zero => (vec![0; before.len()], true),
            PageChange::Same(_) => (before.clone(), true),
        };
        for (&block, &last) in &needed_later {
            let content = nth(&before, (block - blocks.start) as usize);
            if content != nth(&after, (block - blocks.start) as usize) {
                self.stash.put(block, content, last);
            }
        }
        let expected = match change {
            PageChange::Changed(hash) | PageChange::Same(hash) => Some(hash),
            PageChange::Zero => None,
        };
        let is = |content: &[u8]| expected.is_none_or(|hash| page_hash(content) == hash);
        if all && is(&after) {
            self.write(&blocks, &before, &after)?;
            self.right(&blocks)?;
        } else if is(&before) {
            // It is what it should be: an earlier run came this far.
            self.right(&blocks)?;
        } else {
            self.by_digest(page, &blocks, &before, &after, digests)?;
        }
        self.stash.end_page(page as u32);
        Ok(())
    }

    /// The content of a page, and whether all of it could be had.
    fn put_together(
        &mut self,
        page: u64,
        before: &[u8],
    ) -> std::result::Result<(Vec<u8>, bool), PageError> {
        let first = self.delta.page_blocks(page).start;
        // What cannot be had stays as it is.
        let mut after = before.to_vec();
        let mut all = true;
        for run in self.delta.steps(page) {
            let run = run?;
            let at = (run.block - first) as usize * BLOCK_SIZE;
            let range = at..at + run.count as usize * BLOCK_SIZE;
            match run.step {
                Step::Same => (),
                Step::Zero => after[range].fill(0),
                Step::Move(from) => self.read_old(from, &mut after[range])?,
                Step::Again(from) if from >= first => {
                    let from = (from - first) as usize * BLOCK_SIZE;
                    after.copy_within(from..from + range.len(), at);
                }
                Step::Again(from) => {
                    // From earlier pages, which are written, and perhaps on into this one.
                    let earlier = run.count.min(first - from) as usize * BLOCK_SIZE;
                    self.local.read(from, &mut after[at..at + earlier])?;
                    after.copy_within(0..range.len() - earlier, at + earlier);
                }
                Step::New(slot) => {
                    self.unpack(slot..slot + run.count)?;
                    for (slot, content) in (slot..).zip(after[range].chunks_exact_mut(BLOCK_SIZE)) {
                        match self.frames.slot(slot) {
                            Some(found) => content.copy_from_slice(found),
                            None => all = false,
                        }
                    }
                }
            }
        }
        Ok((after, all))
    }

    /// Unpacks the frames of slots; drops those of earlier ones.
    fn unpack(&mut self, slots: Range<u64>) -> std::result::Result<(), PageError> {
        let (Some(first), Some(last)) = (
            self.delta.frame_of(slots.start),
            self.delta.frame_of(slots.end - 1),
        ) else {
            return Ok(());
        };
        self.frames.decoded.retain(|(index, _)| *index >= first);
        for index in first..=last {
            if self.frames.decoded.iter().any(|(found, _)| *found == index) {
                continue;
            }
            let content = match self.frames.receive(index).map_err(PageError::Other)? {
                Some(bytes) => self.unpack_frame(index, &bytes)?,
                None => None,
            };
            self.report.frames += u64::from(content.is_some());
            self.report.frames_unusable += u64::from(content.is_none());
            self.frames.decoded.push_back((index, content));
        }
        Ok(())
    }

    fn unpack_frame(
        &mut self,
        index: usize,
        bytes: &[u8],
    ) -> std::result::Result<Option<Vec<u8>>, PageError> {
        let delta = self.delta;
        let frame = &delta.frames()[index];
        let mut references = Vec::new();
        for range in delta.references(frame) {
            let at = references.len();
            references.resize(at + (range.end - range.start) as usize * BLOCK_SIZE, 0);
            self.read_old(range.start, &mut references[at..])?;
        }
        // Its own checksum tells when a reference is not what it was.
        Ok(decode_frame(bytes, &references, frame.blocks).ok())
    }

    /// Reads blocks as the old image had them, if they are still there.
    fn read_old(&mut self, first: u64, into: &mut [u8]) -> std::result::Result<(), PageError> {
        self.local.read(first, into)?;
        for (block, content) in (first..).zip(into.chunks_exact_mut(BLOCK_SIZE)) {
            if let Some(kept) = self.stash.get(block) {
                content.copy_from_slice(kept);
            }
        }
        Ok(())
    }

    /// Writes what differs.
    fn write(&mut self, blocks: &Range<u64>, before: &[u8], after: &[u8]) -> io::Result<()> {
        let count = (blocks.end - blocks.start) as usize;
        let mut at = 0;
        while at < count {
            if nth(before, at) == nth(after, at) {
                at += 1;
                continue;
            }
            let zero = is_zero(nth(after, at));
            let end = (at + 1..count)
                .find(|&n| nth(before, n) == nth(after, n) || is_zero(nth(after, n)) != zero)
                .unwrap_or(count);
            let first = blocks.start + at as u64;
            match zero {
                true => self.local.zero(first..blocks.start + end as u64)?,
                false => self
                    .local
                    .write(first, &after[at * BLOCK_SIZE..end * BLOCK_SIZE])?,
            }
            self.report.written += (end - at) as u64;
            at = end;
        }
        Ok(())
    }

    fn right(&mut self, blocks: &Range<u64>) -> io::Result<()> {
        self.report.right += blocks.end - blocks.start;
        self.local.right(blocks.clone())
    }

    /// Takes from a page that is not right as a whole what is right in it.
    fn by_digest(
        &mut self,
        page: u64,
        blocks: &Range<u64>,
        before: &[u8],
        after: &[u8],
        digests: &mut PageDigests<'_>,
    ) -> std::result::Result<(), PageError> {
        self.report.pages_by_digest += 1;
        let digests = digests(page).map_err(PageError::Other)?;
        let mut best = before.to_vec();
        let mut missing: Vec<Range<u64>> = Vec::new();
        let mut right: Vec<Range<u64>> = Vec::new();
        for (index, block) in blocks.clone().enumerate() {
            let digest = digests.get(index);
            let content = [nth(after, index), nth(before, index)]
                .into_iter()
                .find(|content| Some(&digest_of(content)) == digest);
            let list = match content {
                Some(content) => {
                    best[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE].copy_from_slice(content);
                    &mut right
                }
                None => &mut missing,
            };
            match list.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => list.push(block..block + 1),
            }
        }
        self.write(blocks, before, &best)?;
        for range in right {
            self.right(&range)?;
        }
        self.report.missing.extend(missing);
        Ok(())
    }
}

fn nth(content: &[u8], index: usize) -> &[u8] {
    &content[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE]
}

fn digest_of(content: &[u8]) -> Digest {
    match is_zero(content) {
        true => Digest::zero_block(),
        false => Digest::of(content),
    }
}

/// The hash of a page from the content of its blocks.
pub(super) fn page_hash(content: &[u8]) -> Digest {
    merkle::page_hash(&Digest::of_each_block(content))
}
