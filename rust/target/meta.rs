// SPDX-License-Identifier: GPL-2.0

//! The metadata's pages on their device.

use kernel::prelude::*;

use crate::dm::{Buffer, Device, Errno, IoClient, WriteFlags};
use crate::shared::error::Error as Damage;
use crate::shared::layout::Placement;
use crate::shared::recovery::Source;
use crate::shared::superblock::{Label, Superblock, Uuid};
use crate::shared::{Page, PAGE_SECTORS};

/// The errno for a refusal of the shared core: what `dmsetup` and the ioctls show. The log has the words.
pub(super) fn errno(damage: &Damage) -> Error {
    match damage {
        Damage::Io(_) => EIO,
        Damage::NotFormatted => Errno::NoData.into(),
        Damage::NewerVersion(..) | Damage::UnknownFeatures(_) => Errno::ProtoNoSupport.into(),
        Damage::StaleBlocks(_) => Errno::Stale.into(),
        Damage::TooSmall(..) => ENOSPC,
        Damage::BadGeometry(_) | Damage::TailMoves => EINVAL,
        d if d.is_identity() => Errno::MediumType.into(),
        _ => Errno::Unclean.into(),
    }
}

/// The devices of a target, and the client for I/O on the one that holds the metadata.
pub(super) struct MetaIo {
    data: Device,
    /// `None` when the metadata is in the reserved tail of the data device.
    metadata: Option<Device>,
    client: IoClient,
    /// Sectors of the data device, and whole pages of the device that holds the metadata, when the table was loaded. A
    /// device may grow while it is in use; label and anchors stay where they are until the metadata follows.
    data_sectors: u64,
    pages: u64,
}

impl MetaIo {
    pub(super) fn new(data: Device, metadata: Option<Device>, client: IoClient) -> Self {
        let data_sectors = data.sectors();
        let pages = metadata.as_ref().map_or(data_sectors, |d| d.sectors()) / PAGE_SECTORS;
        Self {
            data,
            metadata,
            client,
            data_sectors,
            pages,
        }
    }

    pub(super) fn data(&self) -> &Device {
        &self.data
    }

    pub(super) fn metadata(&self) -> Option<&Device> {
        self.metadata.as_ref()
    }

    fn device(&self) -> &Device {
        self.metadata.as_ref().unwrap_or(&self.data)
    }

    pub(super) fn placement(&self) -> Placement {
        match self.metadata {
            Some(_) => Placement::Separate,
            None => Placement::Tail,
        }
    }

    /// Whole pages of the device that holds the metadata, as of when the table was loaded.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Sectors of the data device, as of when the table was loaded; fewer if it has shrunk since.
    pub(super) fn data_sectors(&self) -> u64 {
        self.data.sectors().min(self.data_sectors)
    }

    /// Reads pages from `page` on into the first `pages` pages of `buffer`.
    pub(super) fn read(&self, page: u64, buffer: &mut Buffer, pages: usize) -> Result {
        let into = buffer.pages().get_mut(..pages).ok_or(EINVAL)?;
        self.client.read(self.device(), page, into)
    }

    /// Writes the first `pages` pages of `buffer` at page `page`.
    pub(super) fn write(
        &self,
        page: u64,
        buffer: &mut Buffer,
        pages: usize,
        flags: WriteFlags,
    ) -> Result {
        self.client.write(self.device(), page, buffer, pages, flags)
    }

    /// Makes durable what was written to the data device.
    pub(super) fn flush_data(&self) -> Result {
        self.client.flush(&self.data)
    }

    /// Reads pages of the data device.
    pub(super) fn read_data(&self, page: u64, into: &mut [Page]) -> Result {
        self.client.read(&self.data, page, into)
    }

    /// Writes sectors of the data device.
    pub(super) fn write_data(
        &self,
        sector: u64,
        buffer: &mut Buffer,
        bytes: core::ops::Range<usize>,
    ) -> Result {
        self.client.write_at(&self.data, sector, buffer, bytes)
    }

    /// Makes sectors of the data device zero.
    pub(super) fn zero_data(&self, sector: u64, count: u64) -> Result {
        self.client.zero(&self.data, sector, count)
    }

    /// Writes both copies of a superblock. What was written before is durable before the first copy is, and the
    /// first copy before the second is written; on return both are.
    pub(super) fn write_superblock(&self, sb: &Superblock, buffer: &mut Buffer) -> Result {
        let pages = self.pages();
        let placement = self.placement();
        let mut preflush = true;
        for copy in [0, 1] {
            sb.encode(buffer.first()?);
            let at = placement.anchor(copy, pages).map_err(|e| errno(&e))?;
            self.write(
                at,
                buffer,
                1,
                WriteFlags {
                    preflush,
                    fua: true,
                },
            )?;
            preflush = false;
        }
        Ok(())
    }

    /// Writes the label that goes with `sb`, and makes it durable.
    pub(super) fn write_label(&self, sb: &Superblock, buffer: &mut Buffer) -> Result {
        if self.metadata.is_none() {
            return Ok(());
        }
        let label = Label {
            data_uuid: sb.data_uuid,
            meta_uuid: sb.meta_uuid,
            data_sectors: sb.data_sectors,
        };
        label.encode(buffer.first()?);
        let page = Label::page_of(sb.data_sectors).map_err(|e| errno(&e))?;
        self.client
            .write(&self.data, page, buffer, 1, WriteFlags::default())?;
        self.flush_data()
    }

    /// The UUID that the data device carries: in its label, or, with a reserved tail, in the superblock itself.
    pub(super) fn data_uuid(&self, sb: &Superblock, buffer: &mut Page) -> Result<Uuid, Damage> {
        if self.metadata.is_none() {
            return Ok(sb.data_uuid);
        }
        let page = Label::page_of(sb.data_sectors)?;
        self.client
            .read_page(&self.data, page, buffer)
            .map_err(|_| Damage::Io(page))?;
        Ok(Label::decode(buffer)?.data_uuid)
    }

    /// Reads the metadata's pages, those that follow each other many at a time. It keeps what it has read, so it is
    /// of use only as long as nothing is written.
    pub(super) fn source(&self) -> impl Source + '_ {
        Reader {
            meta: self,
            // Without memory each page is read by itself.
            ahead: Buffer::new(READ_AHEAD).ok(),
            held: 0..0,
            next: u64::MAX,
        }
    }
}

/// Pages that are read at once. Activation reads the whole log ring, a thousand pages: one by one they would take
/// a thousand times the latency of the device.
const READ_AHEAD: usize = 32;

struct Reader<'a> {
    meta: &'a MetaIo,
    ahead: Option<Buffer>,
    /// The pages in `ahead`, from its first on.
    held: core::ops::Range<u64>,
    /// The page after the one that was asked for last.
    next: u64,
}

impl Reader<'_> {
    /// Reads `page` and those that follow, unless the device does not let it: what they hold was not asked for yet.
    fn read_ahead(&mut self, page: u64) {
        self.held = 0..0;
        let Some(buffer) = &mut self.ahead else {
            return;
        };
        // CAST: usize to u64, and back what is no more than it.
        let count = (READ_AHEAD as u64).min(self.meta.pages().saturating_sub(page));
        let Some(pages) = buffer.pages().get_mut(..count as usize) else {
            return;
        };
        let device = self.meta.device();
        if self.meta.client.read(device, page, pages).is_ok() {
            self.held = page..page + count;
        }
    }
}

impl Source for Reader<'_> {
    fn read(&mut self, page: u64, into: &mut Page) -> Result<(), Damage> {
        if !self.held.contains(&page) && page == self.next {
            self.read_ahead(page);
        }
        self.next = page.wrapping_add(1);
        if let Some(buffer) = self.ahead.as_mut().filter(|_| self.held.contains(&page)) {
            // CAST: Less than `READ_AHEAD`.
            if let Some(found) = buffer.page((page - self.held.start) as usize) {
                *into = *found;
                return Ok(());
            }
        }
        self.meta
            .client
            .read_page(self.meta.device(), page, into)
            .map_err(|_| Damage::Io(page))
    }
}
