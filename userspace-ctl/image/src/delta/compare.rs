// SPDX-License-Identifier: GPL-2.0

//! From the digests of two images to the steps that lead from one to the other.

use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::ops::Range;

use super::map::{
    Run, RunWriter, Step, ZeroPages, NEW_CHANGED, NEW_NONE, NEW_SAME, NEW_ZERO, OLD_HASH, OLD_NONE,
    OLD_ZERO,
};
use super::{MAX_MAP_LEN, MAX_RUNS};
use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::merkle::{self, Blinding};
use crate::wire::put_varint;
use crate::{BLOCK_SIZE, DIGESTS_PER_PAGE};

const PAGE: u64 = DIGESTS_PER_PAGE as u64;

/// The digests of an image; `E` says why they cannot be had.
pub trait ImageDigests<E> {
    /// The image.
    fn image(&self) -> ImageId;
    /// What its id is blinded with, if it is an encrypted one.
    fn blinding(&self) -> Option<Blinding> {
        None
    }
    /// Blocks in it.
    fn blocks(&self) -> u64;
    /// The hash of a page.
    ///
    /// # Errors
    /// What can go wrong on the way.
    fn page_hash(&self, page: u64) -> Result<Digest, E>;
    /// The digests of a page's blocks.
    ///
    /// # Errors
    /// What can go wrong on the way.
    fn digests(&self, page: u64) -> Result<Vec<Digest>, E>;
}

/// How two images differ.
#[derive(Debug)]
pub struct Comparison {
    /// The old image and its size in bytes.
    pub old: (ImageId, u64),
    /// The new image and its size in bytes.
    pub new: (ImageId, u64),
    /// The blocks of the new image that the old one does not have, each content once, in order: the slots.
    pub slots: Vec<Range<u64>>,
    /// Blocks that differ from what the old image has in the same place.
    pub changed: u64,
    /// Of these, blocks that the old image has elsewhere.
    pub moved: u64,
    /// What the ids of the old and the new image are blinded with.
    blindings: [Option<Blinding>; 2],
    kinds: Vec<u8>,
    hashes: Vec<u8>,
    runs: Vec<u8>,
}

impl Comparison {
    /// The bytes of the map, with the table of frames appended.
    pub(super) fn encode(&self, frames: &[u8]) -> Vec<u8> {
        let mut map = Vec::new();
        if self.is_blinded() {
            for blinding in &self.blindings {
                map.extend(blinding.unwrap_or_default());
            }
        }
        map.extend_from_slice(&self.kinds);
        map.extend_from_slice(&self.hashes);
        put_varint(&mut map, self.runs.len() as u64);
        map.extend_from_slice(&self.runs);
        map.extend_from_slice(frames);
        map
    }
}

impl Comparison {
    /// Whether one of the images is an encrypted one.
    pub(super) fn is_blinded(&self) -> bool {
        self.blindings.iter().any(Option::is_some)
    }
}

fn pages(blocks: u64) -> u64 {
    blocks.div_ceil(PAGE)
}

fn blocks_in(blocks: u64, page: u64) -> usize {
    blocks.saturating_sub(page * PAGE).min(PAGE) as usize
}

/// Compares two images. Pages whose hashes are equal are not looked at in the new image; memory is about 80 bytes for each
/// block that changed.
///
/// # Errors
/// Those of the digests, and [`FormatError::Invalid`] if the images differ in more ways than a delta may have.
pub fn compare<E: From<FormatError>>(
    old: &dyn ImageDigests<E>,
    new: &dyn ImageDigests<E>,
) -> Result<Comparison, E> {
    let sources = find_sources(old, new)?;
    let mut writer = Writer {
        old,
        sources,
        first_seen: HashMap::new(),
        runs: RunWriter::default(),
        pending: None,
        old_page: None,
        slots: Vec::new(),
        slot: 0,
        changed: 0,
        moved: 0,
    };
    let mut zero = ZeroPages::default();
    let (mut kinds, mut hashes) = (Vec::new(), Vec::new());
    for page in 0..pages(old.blocks()).max(pages(new.blocks())) {
        let old_blocks = blocks_in(old.blocks(), page);
        let new_blocks = blocks_in(new.blocks(), page);
        let before = match old_blocks {
            0 => None,
            _ => Some(old.page_hash(page)?),
        };
        let mut kind = match before {
            None => OLD_NONE,
            Some(hash) if hash == zero.hash(old_blocks) => OLD_ZERO,
            Some(hash) => {
                hashes.extend(hash.as_bytes());
                OLD_HASH
            }
        };
        kind |= match new_blocks {
            0 => NEW_NONE,
            _ => match new.page_hash(page)? {
                hash if before == Some(hash) && old_blocks == new_blocks => NEW_SAME,
                hash if hash == zero.hash(new_blocks) => {
                    writer.changed += new_blocks as u64;
                    NEW_ZERO
                }
                hash => {
                    hashes.extend(hash.as_bytes());
                    writer.page(page * PAGE, &new.digests(page)?)?;
                    NEW_CHANGED
                }
            },
        };
        kinds.push(kind);
    }
    let comparison = Comparison {
        old: (old.image(), old.blocks() * BLOCK_SIZE as u64),
        new: (new.image(), new.blocks() * BLOCK_SIZE as u64),
        blindings: [old.blinding(), new.blinding()],
        slots: writer.slots,
        changed: writer.changed,
        moved: writer.moved,
        kinds,
        hashes,
        runs: writer.runs.bytes,
    };
    let len = comparison.kinds.len() + comparison.hashes.len() + comparison.runs.len();
    if writer.runs.runs > MAX_RUNS || len as u64 > MAX_MAP_LEN {
        let why = "the images differ in too many places";
        return Err(FormatError::invalid("a delta", why).into());
    }
    Ok(comparison)
}

/// The digests of changed blocks, and for each the first block of the old image that has it.
fn find_sources<E>(
    old: &dyn ImageDigests<E>,
    new: &dyn ImageDigests<E>,
) -> Result<HashMap<Digest, Option<u64>>, E> {
    let mut wanted = HashMap::new();
    for page in 0..pages(new.blocks()) {
        let in_both = page < pages(old.blocks());
        if in_both && old.page_hash(page)? == new.page_hash(page)? {
            continue;
        }
        let before = if in_both {
            old.digests(page)?
        } else {
            Vec::new()
        };
        for (index, digest) in new.digests(page)?.into_iter().enumerate() {
            if before.get(index) != Some(&digest) && digest != Digest::zero_block() {
                wanted.insert(digest, None);
            }
        }
    }
    if wanted.is_empty() {
        return Ok(wanted);
    }
    for page in 0..pages(old.blocks()) {
        for (index, digest) in old.digests(page)?.iter().enumerate() {
            if let Some(source) = wanted.get_mut(digest) {
                source.get_or_insert(page * PAGE + index as u64);
            }
        }
    }
    Ok(wanted)
}

struct Writer<'a, E> {
    old: &'a dyn ImageDigests<E>,
    sources: HashMap<Digest, Option<u64>>,
    /// Where in the new image a new block was seen first.
    first_seen: HashMap<Digest, u64>,
    runs: RunWriter,
    pending: Option<Run>,
    /// A page of the old image beside the one in work: what was moved last may go on there.
    old_page: Option<(u64, Vec<Digest>)>,
    slots: Vec<Range<u64>>,
    slot: u64,
    changed: u64,
    moved: u64,
}

impl<E> Writer<'_, E> {
    fn page(&mut self, first: u64, digests: &[Digest]) -> Result<(), E> {
        let page = first / PAGE;
        let before = match page < pages(self.old.blocks()) {
            true => self.old.digests(page)?,
            false => Vec::new(),
        };
        for (index, digest) in digests.iter().enumerate() {
            let block = first + index as u64;
            let step = if before.get(index) == Some(digest) {
                Step::Same
            } else {
                self.changed += 1;
                self.step(block, digest)?
            };
            self.push(block, step);
        }
        // A page's runs are decoded alone.
        if let Some(run) = self.pending.take() {
            self.runs.push(&run);
        }
        Ok(())
    }

    fn step(&mut self, block: u64, digest: &Digest) -> Result<Step, E> {
        if *digest == Digest::zero_block() {
            return Ok(Step::Zero);
        }
        // A run that goes on costs nothing.
        if let Some(Run {
            block,
            count,
            step: Step::Move(from),
        }) = self.pending
        {
            debug_assert!(count > 0 && block + count > 0);
            let next = from + count;
            if next < self.old.blocks() && self.old_digest(next)? == Some(*digest) {
                self.moved += 1;
                return Ok(Step::Move(next));
            }
        }
        if let Some(Some(from)) = self.sources.get(digest) {
            self.moved += 1;
            return Ok(Step::Move(*from));
        }
        Ok(match self.first_seen.entry(*digest) {
            Entry::Occupied(first) => Step::Again(*first.get()),
            Entry::Vacant(vacant) => {
                vacant.insert(block);
                match self.slots.last_mut() {
                    Some(last) if last.end == block => last.end += 1,
                    _ => self.slots.push(block..block + 1),
                }
                self.slot += 1;
                Step::New(self.slot - 1)
            }
        })
    }

    fn old_digest(&mut self, block: u64) -> Result<Option<Digest>, E> {
        let page = block / PAGE;
        if self
            .old_page
            .as_ref()
            .is_none_or(|(known, _)| *known != page)
        {
            self.old_page = Some((page, self.old.digests(page)?));
        }
        let digests = self.old_page.as_ref().map(|(_, digests)| digests);
        Ok(digests.and_then(|digests| digests.get((block % PAGE) as usize).copied()))
    }

    fn push(&mut self, block: u64, step: Step) {
        if let Some(run) = &mut self.pending {
            let goes_on = match (run.step, step) {
                (Step::Same, Step::Same) | (Step::Zero, Step::Zero) => true,
                (Step::New(first), Step::New(next)) | (Step::Move(first), Step::Move(next)) => {
                    first + run.count == next
                }
                (Step::Again(first), Step::Again(next)) => {
                    // What is repeated lies before the run.
                    first + run.count == next && next < run.block
                }
                _ => false,
            };
            if goes_on {
                run.count += 1;
                return;
            }
            self.runs.push(run);
        }
        self.pending = Some(Run {
            block,
            count: 1,
            step,
        });
    }
}

/// The digests of content that is no published image, in memory.
#[derive(Clone, Debug)]
pub struct DigestList {
    digests: Vec<Digest>,
    hashes: Vec<Digest>,
    blinding: Option<Blinding>,
}

impl DigestList {
    /// From the digests of all blocks; there must be one at least.
    pub fn new(digests: Vec<Digest>) -> Self {
        let hashes = digests
            .chunks(DIGESTS_PER_PAGE)
            .map(merkle::page_hash)
            .collect();
        DigestList {
            digests,
            hashes,
            blinding: None,
        }
    }

    /// As an encrypted image, if there is a blinding.
    #[must_use]
    pub fn blinded(self, blinding: Option<Blinding>) -> Self {
        DigestList { blinding, ..self }
    }

    /// What the image of these blocks is called.
    pub fn image(&self) -> ImageId {
        let size = (self.digests.len() * BLOCK_SIZE) as u64;
        merkle::image_id(size, self.hashes.iter(), self.blinding.as_ref())
    }
}

impl<E: From<FormatError>> ImageDigests<E> for DigestList {
    fn image(&self) -> ImageId {
        DigestList::image(self)
    }

    fn blinding(&self) -> Option<Blinding> {
        self.blinding
    }

    fn blocks(&self) -> u64 {
        self.digests.len() as u64
    }

    fn page_hash(&self, page: u64) -> Result<Digest, E> {
        let hash = self.hashes.get(page as usize).copied();
        hash.ok_or_else(|| {
            FormatError::invalid("a list of digests", format!("it has no page {page}")).into()
        })
    }

    fn digests(&self, page: u64) -> Result<Vec<Digest>, E> {
        let mut chunks = self.digests.chunks(DIGESTS_PER_PAGE);
        Ok(chunks.nth(page as usize).unwrap_or_default().to_vec())
    }
}
