// SPDX-License-Identifier: GPL-2.0

//! What is known of a checkpoint area's content, kept up to date page by page: a checkpoint costs what changed, not
//! what the device measures.

use kernel::alloc::{flags::GFP_KERNEL, KVVec};
use kernel::prelude::*;

use crate::shared::checkpoint::{self, PageState, Plane};
use crate::shared::geometry::Geometry;

/// The content of one checkpoint area.
pub(super) struct Area {
    geometry: Geometry,
    /// For each page of both planes, the bits that are set in it.
    counts: KVVec<u16>,
    /// The words of the index.
    index: KVVec<u64>,
    /// Dirty blocks in all.
    dirty: u64,
    /// Stale blocks in all.
    stale: u64,
}

/// The state that the index gives a page with `count` bits set.
fn page_state(geometry: &Geometry, page: u64, count: u16) -> PageState {
    match u64::from(count) {
        0 => PageState::Zero,
        n if n == checkpoint::blocks_in_page(geometry, page).len() => PageState::Ones,
        _ => PageState::Stored,
    }
}

impl Area {
    /// An area with nothing in it.
    pub(super) fn new(geometry: &Geometry) -> Result<Self> {
        let pages = usize::try_from(checkpoint::plane_pages(geometry) * 2)?;
        let words = usize::try_from(checkpoint::index_words(geometry))?;
        Ok(Self {
            geometry: *geometry,
            counts: KVVec::from_elem(0, pages, GFP_KERNEL)?,
            index: KVVec::from_elem(0, words, GFP_KERNEL)?,
            dirty: 0,
            stale: 0,
        })
    }

    /// Forgets all.
    pub(super) fn reset(&mut self) {
        self.counts.as_mut_slice().fill(0);
        self.index.as_mut_slice().fill(0);
        self.dirty = 0;
        self.stale = 0;
    }

    /// Dirty blocks in the area.
    pub(super) fn dirty(&self) -> u64 {
        self.dirty
    }

    /// Stale blocks in the area.
    pub(super) fn stale(&self) -> u64 {
        self.stale
    }

    /// Bytes of memory that it takes.
    pub(super) fn bytes(&self) -> usize {
        self.counts.len() * 2 + self.index.len() * 8
    }

    /// Word `i` of the index, counted through all index pages.
    pub(super) fn index_word(&self, i: u64) -> u64 {
        let i = usize::try_from(i).ok();
        i.and_then(|i| self.index.get(i)).copied().unwrap_or(0)
    }

    /// Notes that page `page` of a plane has `count` bits set; returns whether it needs to be stored.
    pub(super) fn set(&mut self, plane: Plane, page: u64, count: u16) -> PageState {
        let n = checkpoint::plane_index(&self.geometry, plane, page);
        let Some(slot) = usize::try_from(n).ok().and_then(|p| self.counts.get_mut(p)) else {
            return PageState::Zero;
        };
        let total = match plane {
            Plane::Dirty => &mut self.dirty,
            Plane::Stale => &mut self.stale,
        };
        *total = *total - u64::from(*slot) + u64::from(count);
        *slot = count;
        let state = page_state(&self.geometry, page, count);
        let (word, shift) = checkpoint::index_slot(n);
        let word = usize::try_from(word).ok();
        if let Some(word) = word.and_then(|w| self.index.get_mut(w)) {
            *word = *word & !3u64.wrapping_shl(shift) | state.bits().wrapping_shl(shift);
        }
        state
    }

    /// Notes that page `page` of a plane has `count` more bits set.
    pub(super) fn add(&mut self, plane: Plane, page: u64, count: u64) {
        let n = checkpoint::plane_index(&self.geometry, plane, page);
        let old = usize::try_from(n)
            .ok()
            .and_then(|p| self.counts.get(p).copied());
        if let Some(old) = old {
            // CAST: A page has 32512 blocks.
            self.set(plane, page, old.saturating_add(count as u16));
        }
    }
}
