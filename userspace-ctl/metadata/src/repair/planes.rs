// SPDX-License-Identifier: GPL-2.0

//! What damaged checkpoints still say.

use pristine_shared::checkpoint::{self, PageState, Place, Plane};
use pristine_shared::error::Structure;
use pristine_shared::geometry::Run;
use pristine_shared::recovery::Sink;
use pristine_shared::superblock::Superblock;
use pristine_shared::{Page, PAGE_SIZE};

use super::{log, Step};
use crate::error::{Error, Result};
use crate::planes::{Initial, Planes};
use crate::storage::Storage;

/// A checkpoint that is read page by page.
struct Area<'a> {
    sb: &'a Superblock,
    area: u8,
    seq: u64,
}

/// What one plane page says.
enum Bits {
    Zero,
    Ones,
    Stored(Box<Page>),
}

impl Area<'_> {
    fn start(&self) -> Option<u64> {
        let area = usize::from(self.area);
        self.sb.layout.area_start.get(area).copied()
    }

    fn place(&self, index: u64) -> Option<Place<'_>> {
        Some(Place {
            meta_uuid: &self.sb.meta_uuid,
            area: self.area,
            seq: self.seq,
            index: u32::try_from(index).ok()?,
        })
    }

    /// The page of the area at which plane page `n` lies, counted through both planes.
    fn page_of(&self, n: u64) -> Option<u64> {
        Some(self.start()? + checkpoint::index_pages(&self.sb.geometry) + n)
    }

    /// Plane page `n`, if it and its index page are good.
    fn read<S: Storage>(&self, meta: &mut S, n: u64) -> Option<Bits> {
        let mut page = [0; PAGE_SIZE];
        let index = n / checkpoint::ENTRIES_PER_INDEX;
        let place = self.place(index)?;
        meta.read(self.start()? + index, &mut page).ok()?;
        checkpoint::verify_index(&page, &place).ok()?;
        match checkpoint::index_state(&page, &place, n).ok()? {
            PageState::Zero => return Some(Bits::Zero),
            PageState::Ones => return Some(Bits::Ones),
            PageState::Stored => {}
        }
        meta.read(self.page_of(n)?, &mut page).ok()?;
        checkpoint::verify_plane(&page, &self.place(n)?).ok()?;
        let geometry = &self.sb.geometry;
        let of_plane = n % checkpoint::plane_pages(geometry);
        let inside = (0..checkpoint::PAGE_WORDS).all(|i| {
            checkpoint::word(&page, i) & !checkpoint::valid_mask(geometry, of_plane, i) == 0
        });
        inside.then(|| Bits::Stored(Box::new(page)))
    }
}

fn put(planes: &mut Planes, plane: Plane, page: u64, bits: &Bits) {
    match bits {
        Bits::Zero => {}
        Bits::Ones => {
            let run = checkpoint::blocks_in_page(planes.geometry(), page);
            Sink::set(planes, plane, run);
        }
        Bits::Stored(stored) => {
            for i in 0..checkpoint::PAGE_WORDS {
                let at = page * checkpoint::PAGE_WORDS as u64 + i as u64;
                planes.or_word(plane, at, checkpoint::word(stored, i));
            }
        }
    }
}

/// The planes of the current checkpoint, or where it is damaged a superset of them.
pub(super) fn load<S: Storage>(
    meta: &mut S,
    sb: &Superblock,
    steps: &mut Vec<Step>,
) -> Result<Planes> {
    let mut planes = Planes::new(sb.geometry, Initial::Clean);
    load_plane(meta, sb, Plane::Stale, &mut planes, steps)?;
    load_plane(meta, sb, Plane::Dirty, &mut planes, steps)?;
    Ok(planes)
}

fn load_plane<S: Storage>(
    meta: &mut S,
    sb: &Superblock,
    plane: Plane,
    planes: &mut Planes,
    steps: &mut Vec<Step>,
) -> Result {
    let geometry = &sb.geometry;
    let current = Area {
        sb,
        area: sb.root.area,
        seq: sb.root.seq,
    };
    let pages = checkpoint::plane_pages(geometry);
    let wanted = match plane {
        Plane::Dirty => sb.root.dirty_blocks,
        Plane::Stale => sb.root.stale_blocks,
    };
    let mut bad = Vec::new();
    let mut stored = Vec::new();
    for page in 0..pages {
        match current.read(meta, checkpoint::plane_index(geometry, plane, page)) {
            Some(bits) => {
                if matches!(bits, Bits::Stored(_)) {
                    stored.push(page);
                }
                put(planes, plane, page, &bits);
            }
            None => bad.push(page),
        }
    }
    let found = planes.ones(plane);
    let in_bad: u64 = bad
        .iter()
        .map(|page| checkpoint::blocks_in_page(geometry, *page).len())
        .sum();
    if found > wanted || wanted - found > in_bad {
        // Good pages, but not all of this checkpoint: a write of one was lost.
        bad.append(&mut stored);
        bad.sort_unstable();
        clear(planes, plane);
    }
    if bad.is_empty() {
        return Ok(());
    }
    let all = wanted == geometry.blocks();
    let mut previous = Previous::new(sb);
    for page in bad {
        let n = checkpoint::plane_index(geometry, plane, page);
        let (what, exact) = if wanted == 0 {
            ("the superblock says that it is all zero", true)
        } else if all {
            put(planes, plane, page, &Bits::Ones);
            ("the superblock says that it is all one", true)
        } else if plane == Plane::Stale {
            return Err(Error::Irreparable {
                path: meta.path().into(),
                what: "the pages that say which blocks are stale are damaged",
            });
        } else if previous.put(meta, page, planes) {
            let what = "taken from the checkpoint before and all records since; blocks of written extents become dirty";
            (what, false)
        } else {
            put(planes, plane, page, &Bits::Ones);
            ("is lost: all blocks that it told of become dirty", false)
        };
        steps.push(Step {
            // CAST: MAX_BLOCKS keeps plane pages below 2^32.
            structure: Structure::Plane(sb.root.area, n as u32).to_string(),
            page: current.page_of(n),
            what: what.into(),
            exact,
        });
    }
    Ok(())
}

fn clear(planes: &mut Planes, plane: Plane) {
    match plane {
        Plane::Dirty => planes.dirty.fill(0),
        Plane::Stale => planes.stale.fill(0),
    }
}

/// The checkpoint before the current one, in the other area, and what the log adds up to the current one.
///
/// With these records it is a superset of the current checkpoint: no bit of the dirty plane is ever cleared between two
/// checkpoints that the superblock calls connected, and every bit that was set had its extent announced.
struct Previous<'a> {
    sb: &'a Superblock,
    /// `None` until it was looked for.
    since: Option<Option<Vec<Run>>>,
}

impl<'a> Previous<'a> {
    fn new(sb: &'a Superblock) -> Self {
        Self { sb, since: None }
    }

    /// Puts page `page` of the dirty plane into `planes`, if it is known.
    fn put<S: Storage>(&mut self, meta: &mut S, page: u64, planes: &mut Planes) -> bool {
        let root = &self.sb.root;
        // Blocks that were stale then may be dirty now without a record.
        if root.previous_log_seq == 0 || root.stale_blocks != 0 {
            return false;
        }
        let area = Area {
            sb: self.sb,
            area: 1 - root.area.min(1),
            seq: root.seq.saturating_sub(1),
        };
        let Some(bits) = area.read(meta, page) else {
            return false;
        };
        let sb = self.sb;
        let since = self
            .since
            .get_or_insert_with(|| log::between(meta, sb, root.previous_log_seq, root.log_seq));
        let Some(since) = since else { return false };
        put(planes, Plane::Dirty, page, &bits);
        let told = checkpoint::blocks_in_page(&sb.geometry, page);
        for run in since {
            let run = Run {
                start: run.start.max(told.start),
                end: run.end.min(told.end),
            };
            if !run.is_empty() {
                Sink::set(planes, Plane::Dirty, run);
            }
        }
        true
    }
}
