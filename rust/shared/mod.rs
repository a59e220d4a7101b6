// SPDX-License-Identifier: GPL-2.0

//! The pure core of Pristine: everything that the kernel module and the userspace must agree on.
//!
//! This directory is compiled twice from the same source: by Kbuild as a module of `dm-pristine.ko`, and by
//! cargo as the crate `pristine-shared`. It uses `core` alone, does no I/O, allocates nothing, has no `unsafe`
//! and cannot panic on any input that comes from a disk, a table line or an ioctl.
//!
//! | module | what it describes |
//! | --- | --- |
//! | [`geometry`] | sectors, blocks and extents of a managed device |
//! | [`layout`] | where the structures lie on the metadata device or in the reserved tail |
//! | [`superblock`] | the two superblock copies and the label of the data device |
//! | [`checkpoint`] | the two checkpoint areas: index pages and plane pages |
//! | [`log`] | the ring of intent records |
//! | [`undo`] | the undo area: originals of blocks that changed |
//! | [`recovery`] | from those structures to the state that the target starts with |
//! | [`state`] | block states and device modes, and which may follow which |
//! | [`table`], [`status`] | the grammar of the table line and of the status line |
//! | [`tracker`] | what is known of blocks and extents in memory; the fast path |
//! | [`patience`] | whether a record waits for more writes |
//! | [`abi`] | the ioctls of `/dev/pristine` |
//!
//! # On-disk format, in one page
//!
//! All integers are little-endian. The unit of addressing is the *page*, 4096 bytes, counted from the start of
//! the device that holds the metadata. Two superblock copies (the *anchors*) lie at a fixed distance from that
//! device's edge: pages 0 and 15 of a separate metadata device, the last page and the 16th from the end of a data
//! device with a reserved tail. The superblock is the root of trust: it names the log ring, both checkpoint
//! areas, which area holds the current checkpoint, and the first log record that is to be replayed over it.
//! Both copies are written, one after the other and each with FUA, whenever the root changes, so that one
//! damaged copy never loses a change.
//!
//! A checkpoint is an index (two bits for each plane page: all zero, all one, stored) and the plane pages it
//! calls stored. The log is a ring of 4 KiB record pages; record `n` lies at ring position `n % pages`. Each
//! 512-byte sector of a record carries its own CRC and sequence, so that a write torn by a power cut (sectors
//! that are whole, but of different age) is told from damage (a sector whose CRC is wrong).
//!
//! Metadata may have an undo area (incompatible feature 1): chunks of a header page and the originals that it tells of, one
//! after the other. The superblock has its epoch, which is new whenever the area is emptied, how far it was written at
//! the last checkpoint, and how many blocks it keeps; chunks written since follow, each telling its place and epoch.

#![cfg_attr(not(MODULE), no_std)]
#![deny(unsafe_code)]

pub mod abi;
pub mod bits;
pub mod checkpoint;
pub mod crc;
pub mod error;
pub mod flights;
pub mod geometry;
pub mod layout;
pub mod log;
pub mod notes;
pub mod patience;
pub mod recovery;
pub mod stale;
pub mod state;
pub mod status;
pub mod superblock;
pub mod table;
pub mod tracker;
pub mod undo;

#[cfg(not(MODULE))]
pub use error::{Error, Result, Structure};

/// Bytes in a metadata page, the unit of all metadata I/O.
pub const PAGE_SIZE: usize = 4096;

/// Bytes in a sector, the unit in which Linux counts block devices.
pub const SECTOR_SIZE: u64 = 512;

/// Sectors in a metadata page.
pub const PAGE_SECTORS: u64 = 8;

/// The bytes of one metadata page.
pub type Page = [u8; PAGE_SIZE];
