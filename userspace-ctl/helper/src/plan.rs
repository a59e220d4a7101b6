// SPDX-License-Identifier: GPL-2.0

//! Where the blocks of an image lie: which are zero, and which frames hold the others.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use pristine_image::{Digest, Page, DIGESTS_PER_PAGE};
use pristine_store::{Error, ImageReader};

use crate::cache::Key;

/// A frame, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRef {
    /// Its name.
    pub key: Key,
    /// Its length in bytes.
    pub len: u32,
    /// Blocks in it.
    pub blocks: u32,
}

/// A block that is not zero.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The block, counted in image blocks.
    pub block: u64,
    /// Which of [`Plan::frames`] holds it.
    pub frame: usize,
    /// Its index there.
    pub index: u32,
    /// What it must be.
    pub digest: Digest,
}

/// Where blocks lie.
#[derive(Debug, Default)]
pub struct Plan {
    /// The frames, each once.
    pub frames: Vec<FrameRef>,
    /// The blocks that are not zero.
    pub places: Vec<Place>,
}

/// Pages of the manifest, the last one at hand.
pub struct Pages<'a> {
    layout: &'a ImageReader,
    last: Option<(u64, Arc<Page>)>,
}

impl<'a> Pages<'a> {
    /// Of a manifest.
    pub fn new(layout: &'a ImageReader) -> Self {
        Self { layout, last: None }
    }

    /// Digest and slot of a block; `None` for a zero one, also beyond the end of the image.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::page`].
    pub fn block(&mut self, block: u64) -> Result<Option<(Digest, u64)>, Error> {
        if block >= self.layout.blocks() {
            return Ok(None);
        }
        let number = block / DIGESTS_PER_PAGE as u64;
        let page = match &self.last {
            Some((last, page)) if *last == number => page,
            _ => &self.last.insert((number, self.layout.page(number)?)).1,
        };
        // CAST: below DIGESTS_PER_PAGE.
        let found = page.block((block % DIGESTS_PER_PAGE as u64) as usize);
        Ok(found.and_then(|b| b.slot.map(|slot| (b.digest, slot))))
    }

    /// How many zero blocks `blocks` begins with.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::page`].
    pub fn zeros(&mut self, blocks: Range<u64>) -> Result<u64, Error> {
        let mut at = blocks.start;
        while at < blocks.end {
            if at >= self.layout.blocks() {
                return Ok(blocks.end - blocks.start);
            }
            let number = at / DIGESTS_PER_PAGE as u64;
            if self.layout.manifest().page_range(number).is_empty() {
                at = ((number + 1) * DIGESTS_PER_PAGE as u64).min(blocks.end);
            } else if self.block(at)?.is_none() {
                at += 1;
            } else {
                break;
            }
        }
        Ok(at.min(blocks.end) - blocks.start)
    }
}

impl Plan {
    /// Where `wanted` lie, in image blocks.
    ///
    /// # Errors
    ///
    /// As [`ImageReader::page`].
    pub fn new(layout: &ImageReader, wanted: &[Range<u64>]) -> Result<Self, Error> {
        let table = layout.manifest().frames();
        let mut plan = Plan::default();
        let mut known: HashMap<u32, usize> = HashMap::new();
        let mut last = None;
        let mut pages = Pages::new(layout);
        for block in wanted.iter().cloned().flatten() {
            let Some((digest, slot)) = pages.block(block)? else {
                continue;
            };
            // What is not planned counts as zero, so whatever has no frame (no page is decoded that says so) ends it.
            let frame = table.frame_of(slot);
            let frame = frame.and_then(|f| Some((f, table.packs().get(f.pack as usize)?)));
            let Some((frame, pack)) = frame else {
                return Err(Error::Content {
                    location: layout.store().location().to_owned(),
                    object: "the manifest".to_owned(),
                    block,
                    attempts: 1,
                });
            };
            // Blocks that lie side by side are mostly in one frame.
            let number = match last {
                Some((index, number)) if index == frame.index => number,
                _ => *known.entry(frame.index).or_insert_with(|| {
                    plan.frames.push(FrameRef {
                        key: (pack.id, frame.offset),
                        len: frame.len,
                        blocks: frame.blocks,
                    });
                    plan.frames.len() - 1
                }),
            };
            last = Some((frame.index, number));
            plan.places.push(Place {
                block,
                frame: number,
                // CAST: below the frame's blocks.
                index: (slot - frame.first_slot) as u32,
                digest,
            });
        }
        Ok(plan)
    }

    /// The places, those in a row that are of one frame together.
    pub fn by_frame(&self) -> impl Iterator<Item = &[Place]> {
        self.places.chunk_by(|a, b| a.frame == b.frame)
    }
}

/// Sorts frames into requests: of one pack each, at most `max` bytes from the first to the last (a frame that is larger
/// goes alone), gaps of at most `gap` bytes.
pub fn requests(mut frames: Vec<FrameRef>, max: u64, gap: u64) -> Vec<Vec<FrameRef>> {
    frames.sort_unstable_by_key(|f| (*f.key.0.as_bytes(), f.key.1));
    let end = |f: &FrameRef| u64::from(f.key.1) + u64::from(f.len);
    let mut requests: Vec<Vec<FrameRef>> = Vec::new();
    for frame in frames {
        if let Some(request) = requests.last_mut() {
            let fits = request.first().zip(request.last()).is_some_and(|(a, z)| {
                a.key.0 == frame.key.0
                    && u64::from(frame.key.1).saturating_sub(end(z)) <= gap
                    && end(&frame) - u64::from(a.key.1) <= max
            });
            if fits {
                request.push(frame);
                continue;
            }
        }
        requests.push(vec![frame]);
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;
    use pristine_image::PackId;

    #[test]
    fn near_frames_share_a_request() {
        let pack = |n: u8| PackId::new(Digest::of(&[n]));
        let frame = |pack, offset, len| FrameRef {
            key: (pack, offset),
            len,
            blocks: 1,
        };
        let (a, b) = (pack(1), pack(2));
        let frames = vec![
            frame(a, 2000, 100),
            frame(b, 100, 100),
            frame(a, 0, 1000),
            frame(a, 1050, 900),
            frame(a, 9000, 100),
        ];
        let found = requests(frames, 4096, 100);
        let mut shape: Vec<Vec<u32>> = found
            .iter()
            .map(|r| r.iter().map(|f| f.key.1).collect())
            .collect();
        shape.sort();
        assert_eq!(shape, vec![vec![0, 1050, 2000], vec![100], vec![9000]]);
        let found = requests(vec![frame(a, 0, 5000), frame(a, 5000, 5000)], 4096, 100);
        assert_eq!(found.len(), 2);
    }
}
