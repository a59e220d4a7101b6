// SPDX-License-Identifier: GPL-2.0

//! Where the structures of the metadata lie.
//!
//! ```text
//! separate metadata device                     data device with a reserved tail
//!
//!   page 0   superblock copy 0                   page 0 …          managed blocks
//!   page 15  superblock copy 1                   (unused space, if the device is larger)
//!                                                  …               undo area, if there is one
//!   page 16  log ring                            end - n           log ring
//!     …      checkpoint area 0                     …               checkpoint area 0
//!     …      checkpoint area 1                     …               checkpoint area 1
//!     …      undo area, if there is one          end - 16          superblock copy 1
//!                                                end - 1           superblock copy 0
//! ```
//!
//! The anchors lie at a fixed distance from the edge, so that either is found without the other. With a separate
//! metadata device the last page of the data device holds its label, which is how metadata knows its data device.
//!
//! When the device grows ([`Superblock::grown`](super::superblock::Superblock::grown)) the log ring keeps its size. On a separate
//! metadata device it and area 0 stay where they begin, so that a current checkpoint in area 0 is safe from the
//! larger one that is written to area 1. In a tail all of it moves to the new end. The undo area keeps its size, and is empty
//! if it moved.

use super::checkpoint;
use super::error::{Error, Result};
use super::geometry::Geometry;
use super::undo;
use super::PAGE_SECTORS;

/// Pages at the edge of the device kept for the anchors.
pub const ANCHOR_PAGES: u64 = 16;
/// Fewest pages of a log ring.
pub const MIN_LOG_PAGES: u64 = 16;
/// Most pages of a log ring.
pub const MAX_LOG_PAGES: u64 = 65536;

/// Where the metadata lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// On a device of its own.
    Separate,
    /// At the end of the data device.
    Tail,
}

impl Placement {
    /// The page of superblock copy `copy` (0 or 1) on a device of `device_pages` whole pages.
    pub fn anchor(self, copy: u8, device_pages: u64) -> Result<u64> {
        let distance = if copy == 0 { 0 } else { ANCHOR_PAGES - 1 };
        if device_pages < ANCHOR_PAGES {
            return Err(Error::TooSmall(device_pages, ANCHOR_PAGES));
        }
        Ok(match self {
            Self::Separate => distance,
            Self::Tail => device_pages - 1 - distance,
        })
    }
}

/// The place of every structure, in pages of the device that holds the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the metadata lives.
    pub placement: Placement,
    /// First page of the log ring.
    pub log_start: u64,
    /// Pages of the log ring, `MIN_LOG_PAGES..=MAX_LOG_PAGES`.
    pub log_pages: u64,
    /// First page of each checkpoint area.
    pub area_start: [u64; 2],
    /// Pages of one checkpoint area.
    pub area_pages: u64,
    /// First page of the undo area; 0 if there is none.
    pub undo_start: u64,
    /// Pages of the undo area, `undo::MIN_PAGES..=undo::MAX_PAGES`; 0 if there is none.
    pub undo_pages: u64,
}

impl Layout {
    /// The default log length for a device: one record page for each 8 MiB (half of a thousandth of its size),
    /// between 16 and 1024.
    pub fn default_log_pages(geometry: &Geometry) -> u64 {
        (geometry.sectors() >> 14).clamp(MIN_LOG_PAGES, 1024)
    }

    /// Pages that the metadata takes in all, anchors included.
    pub fn total_pages(geometry: &Geometry, log_pages: u64) -> u64 {
        ANCHOR_PAGES
            .saturating_add(log_pages)
            .saturating_add(checkpoint::area_pages(geometry).saturating_mul(2))
    }

    /// Lays out metadata without an undo area for `geometry` on a device of `device_pages` whole pages.
    ///
    /// # Errors
    ///
    /// [`Error::TooSmall`] if it does not fit; with [`Placement::Tail`] the managed blocks must fit before it.
    pub fn new(
        placement: Placement,
        geometry: &Geometry,
        device_pages: u64,
        log_pages: u64,
    ) -> Result<Self> {
        Self::with_undo(placement, geometry, device_pages, log_pages, 0)
    }

    /// The same with an undo area of `undo_pages` pages; 0 for none.
    ///
    /// # Errors
    ///
    /// As [`Layout::new`].
    pub fn with_undo(
        placement: Placement,
        geometry: &Geometry,
        device_pages: u64,
        log_pages: u64,
        undo_pages: u64,
    ) -> Result<Self> {
        if undo_pages != 0 && !(undo::MIN_PAGES..=undo::MAX_PAGES).contains(&undo_pages) {
            return Err(Error::BadGeometry("undo size"));
        }
        if !(MIN_LOG_PAGES..=MAX_LOG_PAGES).contains(&log_pages) {
            return Err(Error::BadGeometry("log size"));
        }
        let total = Self::total_pages(geometry, log_pages);
        let managed = match placement {
            Placement::Separate => 0,
            Placement::Tail => geometry.sectors().div_ceil(PAGE_SECTORS),
        };
        let needed = total.saturating_add(managed).saturating_add(undo_pages);
        if device_pages < needed {
            return Err(Error::TooSmall(device_pages, needed));
        }
        let area_pages = checkpoint::area_pages(geometry);
        let log_start = match placement {
            Placement::Separate => ANCHOR_PAGES,
            Placement::Tail => device_pages - total,
        };
        let first = log_start + log_pages;
        let undo_start = match placement {
            _ if undo_pages == 0 => 0,
            Placement::Separate => first + area_pages * 2,
            Placement::Tail => log_start - undo_pages,
        };
        Ok(Self {
            placement,
            log_start,
            log_pages,
            area_start: [first, first + area_pages],
            area_pages,
            undo_start,
            undo_pages,
        })
    }

    /// Checks that a layout read from a superblock is one that [`Layout::new`] could have made for this device.
    pub fn verify(&self, geometry: &Geometry, device_pages: u64) -> Result {
        let right = Self::with_undo(
            self.placement,
            geometry,
            device_pages,
            self.log_pages,
            self.undo_pages,
        )?;
        if *self == right {
            Ok(())
        } else {
            Err(Error::BadGeometry("layout"))
        }
    }

    /// The page at which log record `seq` lies.
    pub fn log_page(&self, seq: u64) -> u64 {
        self.log_start + seq % self.log_pages.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 21;

    #[test]
    fn metadata_is_under_a_thousandth() {
        for gib in [1, 2, 10, 1024, 16 * 1024] {
            let g = Geometry::new(gib * GIB, 12, 20).unwrap();
            let pages = Layout::total_pages(&g, Layout::default_log_pages(&g));
            assert!(
                pages * PAGE_SECTORS * 1000 < gib * GIB,
                "{gib} GiB: {pages} pages"
            );
        }
    }

    #[test]
    fn structures_do_not_overlap() {
        let g = Geometry::new(2 * GIB, 12, 20).unwrap();
        let need = Layout::total_pages(&g, 64);
        let l = Layout::new(Placement::Separate, &g, need, 64).unwrap();
        assert_eq!(l.log_start, ANCHOR_PAGES);
        assert_eq!(l.area_start[1] + l.area_pages, need);
        assert_eq!(
            Layout::new(Placement::Separate, &g, need - 1, 64),
            Err(Error::TooSmall(need - 1, need))
        );

        let managed = 2 * GIB / PAGE_SECTORS;
        let t = Layout::new(Placement::Tail, &g, managed + need, 64).unwrap();
        assert_eq!(t.log_start, managed);
        let anchor = Placement::Tail.anchor(1, managed + need).unwrap();
        assert_eq!(t.area_start[1] + t.area_pages, anchor);
        assert!(Layout::new(Placement::Tail, &g, managed + need - 1, 64).is_err());
        assert!(t.verify(&g, managed + need).is_ok());
        assert!(t.verify(&g, managed + need + 1).is_err());
    }

    #[test]
    fn the_undo_area_lies_beside_all_else() {
        let g = Geometry::new(2 * GIB, 12, 20).unwrap();
        let need = Layout::total_pages(&g, 64) + 100;
        let plain = Layout::new(Placement::Separate, &g, need, 64).unwrap();
        let l = Layout::with_undo(Placement::Separate, &g, need, 64, 100).unwrap();
        assert_eq!(
            (l.log_start, l.area_start),
            (plain.log_start, plain.area_start)
        );
        assert_eq!(l.undo_start + 100, need);
        assert!(Layout::with_undo(Placement::Separate, &g, need - 1, 64, 100).is_err());
        assert!(Layout::with_undo(Placement::Separate, &g, need, 64, 1).is_err());

        let managed = 2 * GIB / PAGE_SECTORS;
        let t = Layout::with_undo(Placement::Tail, &g, managed + need, 64, 100).unwrap();
        assert_eq!((t.undo_start, t.log_start), (managed, managed + 100));
        assert!(t.verify(&g, managed + need).is_ok());
        assert!(Layout::with_undo(Placement::Tail, &g, managed + need - 1, 64, 100).is_err());
    }
}
