// SPDX-License-Identifier: GPL-2.0

//! Taking changes back from the undo area, without the master. What lies there is in [`pristine_shared::undo`].
//!
//! It is done in this order, so that it can be cut at any instant and run again:
//!
//! 1. All of the area is read and checked. Nothing is changed that has no good original.
//! 2. The blocks that are to be put back become stale, durably; the area stays. From the first write on a block is neither
//!    the machine's nor the master's, and whoever reads the metadata next is to know.
//! 3. The originals are written, and the data device is flushed.
//! 4. The blocks become clean, in a commit that also empties the area, if no other block is dirty.
//!
//! A cut between 2 and 4 leaves stale blocks that have originals, which the next run puts back.

use pristine_shared::checkpoint::Plane;
use pristine_shared::geometry::Run;
use pristine_shared::layout::Placement;
use pristine_shared::recovery::Sink;
use pristine_shared::state::BlockState;
use pristine_shared::superblock::Superblock;
use pristine_shared::undo::{self, Entry};
use pristine_shared::{Page, PAGE_SIZE};

use crate::commit::Changes;
use crate::error::{Error, Result};
use crate::open::Metadata;
use crate::planes::{Initial, Planes, Select};
use crate::storage::{CoreSource, Storage, StorageExt};

/// The originals that an undo area has, all of them read and good.
#[derive(Clone, Debug)]
pub struct Originals {
    /// In the order of their pages, one for each.
    entries: Vec<Entry>,
    /// The blocks of which there are all pages: their bits in the dirty plane.
    blocks: Planes,
    used: u64,
    pages: u64,
    damaged: u64,
}

/// What [`Originals::restore`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// Blocks that were put back.
    pub blocks: u64,
    /// Commits to the metadata.
    pub commits: u64,
}

impl Originals {
    /// Reads the area of open metadata. `progress` gets the pages read and those that there are.
    ///
    /// Damage is no error: a page whose checksum is wrong, or that cannot be read, is no original.
    pub fn read<S: Storage>(
        metadata: &mut Metadata<S>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Self {
        let sb = *metadata.superblock();
        Self::of(&sb, &mut metadata.stores_mut().meta, progress)
    }

    pub(crate) fn of<S: Storage>(
        sb: &Superblock,
        meta: &mut S,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Self {
        let mut originals = Self {
            entries: Vec::new(),
            blocks: Planes::new(sb.geometry, Initial::Clean),
            used: 0,
            pages: sb.layout.undo_pages,
            damaged: 0,
        };
        let mut page = [0; PAGE_SIZE];
        let whole = Run {
            start: 0,
            end: sb.geometry.whole_blocks(),
        };
        let limit = undo::pages_of(&sb.geometry, whole).end;
        let mut all = Vec::new();
        let mut source = CoreSource::new(meta);
        let found = undo::walk(&mut source, sb, 0, &mut page, |chunk, header| {
            all.extend(undo::entries_of(header, chunk).filter(|e| e.page < limit));
        });
        originals.used = found.end;
        originals.damaged = found.damaged;
        let total = all.len() as u64;
        for (n, entry) in (0..).zip(all) {
            if n % 1024 == 0 {
                progress(n, total);
            }
            let good = match entry.at {
                None => true,
                Some(at) => {
                    meta.read(sb.layout.undo_start.saturating_add(at), &mut page)
                        .is_ok()
                        && entry.verify(&page)
                }
            };
            if good {
                originals.entries.push(entry);
            } else {
                originals.damaged += 1;
            }
        }
        progress(total, total);
        originals.entries.sort_unstable_by_key(|e| e.page);
        // A block that was clean again between has two, which are the same.
        originals.entries.dedup_by_key(|e| e.page);
        originals.count(sb);
        originals
    }

    /// Finds the blocks of which all pages are there.
    fn count(&mut self, sb: &Superblock) {
        let geometry = &sb.geometry;
        let per_block = 1usize << undo::page_bits(geometry);
        let mut rest = self.entries.as_slice();
        while let Some(first) = rest.first() {
            let block = undo::blocks_in(geometry, first.page);
            let count = rest
                .iter()
                .take_while(|e| undo::blocks_in(geometry, e.page) == block)
                .count();
            if count == per_block {
                let run = Run {
                    start: block,
                    end: block + 1,
                };
                Sink::set(&mut self.blocks, Plane::Dirty, run);
            }
            rest = rest.get(count..).unwrap_or(&[]);
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Blocks that have one.
    pub fn blocks(&self) -> u64 {
        self.blocks.count(Select::Dirty)
    }

    /// Whether `block` has one.
    pub fn has(&self, block: u64) -> bool {
        self.blocks.state(block) == BlockState::Dirty
    }

    /// Pages of the area that are in use, and all of them; (0, 0) without an area.
    pub fn used(&self) -> (u64, u64) {
        (self.used, self.pages)
    }

    /// Originals, and headers of chunks, that are damaged or cannot be read.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// How many of the blocks that `want` selects have none.
    pub fn missing(&self, planes: &Planes, want: Select) -> u64 {
        (0..planes.dirty.len())
            .map(|i| planes.word(want, i) & !self.blocks.word(Select::Dirty, i))
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Puts back all blocks that are dirty or stale and have an original, and makes `planes` and the metadata say so. Blocks
    /// without one are left as they are. `progress` gets blocks put back and those to be put back.
    ///
    /// # Errors
    ///
    /// Those of the devices. It can be run again.
    pub fn restore<S: Storage>(
        &self,
        metadata: &mut Metadata<S>,
        planes: &mut Planes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Undone> {
        let sb = *metadata.superblock();
        let mut done = Undone::default();
        let wanted: Vec<Run> = runs(planes, |i| {
            planes.word(Select::NotClean, i) & self.blocks.word(Select::Dirty, i)
        });
        if wanted.is_empty() {
            return Ok(done);
        }
        metadata.data_store()?;
        let total = wanted.iter().map(Run::len).sum();
        for run in &wanted {
            planes.set(*run, BlockState::Stale);
        }
        let stale = Changes {
            keep_undo: true,
            ..Changes::default()
        };
        metadata.commit(planes, &stale)?;
        done.commits += 1;

        let mut page = [0; PAGE_SIZE];
        let mut written = Vec::new();
        for run in wanted {
            for block in run.start..run.end {
                if done.blocks % 1024 == 0 {
                    progress(done.blocks, total);
                }
                if self.put_back(metadata, &sb, block, &mut page)? {
                    done.blocks += 1;
                    written.push(block);
                }
            }
        }
        metadata.data_store()?.flush()?;
        for block in written {
            let run = Run {
                start: block,
                end: block + 1,
            };
            planes.set(run, BlockState::Clean);
        }
        metadata.commit(planes, &Changes::default())?;
        done.commits += 1;
        progress(done.blocks, total);
        Ok(done)
    }

    /// Writes one block; `false` if its original is not what it was when it was looked at.
    fn put_back<S: Storage>(
        &self,
        metadata: &mut Metadata<S>,
        sb: &Superblock,
        block: u64,
        page: &mut Page,
    ) -> Result<bool> {
        let pages = undo::pages_of(
            &sb.geometry,
            Run {
                start: block,
                end: block + 1,
            },
        );
        for number in pages.start..pages.end {
            let entry = self.entries.binary_search_by_key(&number, |e| e.page);
            let Some(entry) = entry.ok().and_then(|i| self.entries.get(i)) else {
                return Ok(false);
            };
            match entry.at {
                None => page.fill(0),
                Some(at) => {
                    let meta = &mut metadata.stores_mut().meta;
                    meta.read_page(sb.layout.undo_start.saturating_add(at), page)?;
                }
            }
            if !entry.verify(page) {
                return Ok(false);
            }
            metadata.data_store()?.write_page(number, page)?;
        }
        Ok(true)
    }
}

/// The runs of bits that `word` has set.
fn runs(planes: &Planes, word: impl Fn(usize) -> u64) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some((is_set, run)) = pristine_shared::bits::next_run(&word, at, planes.blocks()) {
        if is_set {
            runs.push(run);
        }
        at = run.end;
    }
    runs
}

impl<S: Storage> Metadata<S> {
    /// The data device.
    fn data_store(&mut self) -> Result<&mut S> {
        match (self.stores.placement, &mut self.stores.data) {
            (Placement::Tail, _) => Ok(&mut self.stores.meta),
            (Placement::Separate, Some(data)) => Ok(data),
            (Placement::Separate, None) => Err(Error::NeedsDataDevice {
                metadata: self.stores.meta.path().into(),
            }),
        }
    }
}
