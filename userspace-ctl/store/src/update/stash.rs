// SPDX-License-Identifier: GPL-2.0

//! Old blocks that are needed after they were overwritten.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use pristine_image::delta::{Delta, Step};
use pristine_image::{FormatError, BLOCK_SIZE, DIGESTS_PER_PAGE};

const PAGE: u64 = DIGESTS_PER_PAGE as u64;

/// Consecutive blocks of one page that a later page needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Use {
    first: u32,
    count: u32,
    page: u32,
}

/// Which old blocks later pages need.
#[derive(Debug)]
pub(super) struct Uses(Vec<Use>);

impl Uses {
    /// Of a delta whose pages are applied in ascending order; `skip` are pages that are not.
    pub(super) fn of(delta: &Delta, skip: &dyn Fn(u64) -> bool) -> Result<Self, FormatError> {
        let mut uses = Vec::new();
        let mut next_frame = 0;
        for page in 0..delta.pages() {
            if skip(page) {
                continue;
            }
            for run in delta.steps(page) {
                let run = run?;
                match run.step {
                    Step::Move(from) => add(&mut uses, from..from + run.count, page),
                    Step::New(slot) => {
                        // A frame is unpacked for the first page that needs it.
                        let last = delta
                            .frame_of(slot + run.count - 1)
                            .map_or(0, |last| last + 1);
                        let first = delta
                            .frame_of(slot)
                            .map_or(last, |first| first.max(next_frame));
                        for frame in delta.frames().get(first..last).unwrap_or_default() {
                            for range in delta.references(frame) {
                                add(&mut uses, range, page);
                            }
                        }
                        next_frame = next_frame.max(last);
                    }
                    Step::Same | Step::Zero | Step::Again(_) => (),
                }
            }
        }
        uses.sort_unstable();
        Ok(Uses(uses))
    }

    /// The old blocks within `blocks`, which are those of a page, that pages after it need, each with the last of these.
    pub(super) fn within(&self, blocks: &Range<u64>) -> BTreeMap<u64, u32> {
        let first = self
            .0
            .partition_point(|used| u64::from(used.first) < blocks.start);
        let mut found = BTreeMap::new();
        for used in self.0[first..]
            .iter()
            .take_while(|used| u64::from(used.first) < blocks.end)
        {
            for block in 0..u64::from(used.count) {
                let last = found
                    .entry(u64::from(used.first) + block)
                    .or_insert(used.page);
                *last = used.page.max(*last);
            }
        }
        found
    }
}

/// Notes what page `page` needs of pages before it.
fn add(uses: &mut Vec<Use>, mut range: Range<u64>, page: u64) {
    while range.start < range.end && range.start / PAGE < page {
        let end = range.end.min((range.start / PAGE + 1) * PAGE);
        // Blocks have numbers of at most 32 bits, pages of fewer.
        uses.push(Use {
            first: range.start as u32,
            count: (end - range.start) as u32,
            page: page as u32,
        });
        range.start = end;
    }
}

/// Keeps old blocks, as many as there is room for.
#[derive(Debug)]
pub(super) struct Stash {
    room: usize,
    blocks: HashMap<u64, Box<[u8]>>,
    /// What can go after a page.
    ends: BTreeMap<u32, Vec<u64>>,
    /// The most that was kept, in blocks.
    pub(super) peak: usize,
    /// Blocks that there was no room for.
    pub(super) lost: u64,
}

impl Stash {
    pub(super) fn new(bytes: u64) -> Self {
        Stash {
            room: (bytes / BLOCK_SIZE as u64) as usize,
            blocks: HashMap::new(),
            ends: BTreeMap::new(),
            peak: 0,
            lost: 0,
        }
    }

    /// Keeps an old block up to `page`.
    pub(super) fn put(&mut self, block: u64, content: &[u8], page: u32) {
        if self.blocks.len() >= self.room {
            self.lost += 1;
            return;
        }
        self.blocks.insert(block, content.into());
        self.ends.entry(page).or_default().push(block);
        self.peak = self.peak.max(self.blocks.len());
    }

    pub(super) fn get(&self, block: u64) -> Option<&[u8]> {
        self.blocks.get(&block).map(AsRef::as_ref)
    }

    /// Drops what no page after `page` needs.
    pub(super) fn end_page(&mut self, page: u32) {
        while let Some(entry) = self.ends.first_entry().filter(|entry| *entry.key() <= page) {
            for block in entry.remove() {
                self.blocks.remove(&block);
            }
        }
    }
}
