// SPDX-License-Identifier: GPL-2.0

//! The shared core as the kernel builds it: with the kernel's CRC32C and its zerocopy.

use kernel::prelude::*;

#[kunit_tests(pristine_shared)]
mod tests {
    use crate::dm::Buffer;
    use crate::shared::bits::words;
    use crate::shared::checkpoint::{self, PageState, Place, Plane};
    use crate::shared::error::{Error, Result as SharedResult, Structure};
    use crate::shared::geometry::{Geometry, Run};
    use crate::shared::layout::{Layout, Placement};
    use crate::shared::log::{Entry, Writer};
    use crate::shared::recovery::{self, Sink, Source};
    use crate::shared::superblock::{Root, Superblock};
    use crate::shared::undo::Undo;
    use crate::shared::{crc, Page};
    use kernel::prelude::*;

    const PAGES: u64 = 64;

    /// Metadata in memory: 64 MiB managed, an empty checkpoint in area 0.
    struct Disk(Buffer);

    impl Disk {
        fn new() -> Result<(Self, Superblock)> {
            let bad = |_| EINVAL;
            let geometry = Geometry::new(64 << 11, 12, 20).map_err(bad)?;
            let layout = Layout::new(Placement::Separate, &geometry, PAGES, 16).map_err(bad)?;
            let sb = Superblock {
                sequence: 1,
                meta_uuid: [7; 16],
                data_uuid: [8; 16],
                // The label lies behind what is managed.
                data_sectors: (64 << 11) + 8,
                image_bytes: 0,
                geometry,
                layout,
                clean: false,
                needs_check: false,
                provisioning: false,
                root: Root {
                    area: 0,
                    seq: 1,
                    log_seq: 1,
                    previous_log_seq: 0,
                    dirty_blocks: 0,
                    stale_blocks: 0,
                },
                generation: 3,
                image_id: [9; 32],
                undo: Undo::default(),
            };
            let mut disk = Self(Buffer::new(PAGES as usize)?);
            disk.write_superblocks(&sb)?;
            let place = Place {
                meta_uuid: &sb.meta_uuid,
                area: 0,
                seq: 1,
                index: 0,
            };
            let index = disk.page(layout.area_start[0])?;
            checkpoint::encode_index(index, &place, |_| PageState::Zero);
            Ok((disk, sb))
        }

        fn page(&mut self, n: u64) -> Result<&mut Page> {
            self.0.page(n as usize).ok_or(EINVAL)
        }

        fn write_superblocks(&mut self, sb: &Superblock) -> Result {
            for copy in [0, 1] {
                let at = Placement::Separate
                    .anchor(copy, PAGES)
                    .map_err(|_| EINVAL)?;
                sb.encode(self.page(at)?);
            }
            Ok(())
        }

        fn record(&mut self, sb: &Superblock, seq: u64, run: Run) -> Result {
            self.entries(sb, seq, &[Entry::Intent(run)])
        }

        fn entries(&mut self, sb: &Superblock, seq: u64, entries: &[Entry]) -> Result {
            let mut writer = Writer::new(self.page(sb.layout.log_page(seq))?);
            for entry in entries {
                assert!(writer.push(*entry));
            }
            writer.finish(&sb.meta_uuid, seq);
            Ok(())
        }
    }

    impl Source for Disk {
        fn read(&mut self, page: u64, into: &mut Page) -> SharedResult {
            into.copy_from_slice(self.0.page(page as usize).ok_or(Error::Io(page))?);
            Ok(())
        }
    }

    #[derive(Default)]
    struct Count {
        dirty: u64,
        /// Of the first 64 extents.
        intended: u64,
    }

    fn mask(extents: Run) -> u64 {
        words(extents).find(|(i, _)| *i == 0).map_or(0, |(_, m)| m)
    }

    impl Sink for Count {
        fn or_word(&mut self, _plane: Plane, _word: u64, bits: u64) {
            self.dirty += u64::from(bits.count_ones());
        }

        fn set(&mut self, _plane: Plane, run: Run) {
            self.dirty += run.len();
        }

        fn intend(&mut self, extents: Run) {
            self.intended |= mask(extents);
        }

        fn settle(&mut self, extents: Run) {
            self.intended &= !mask(extents);
        }

        fn validate(&mut self, _: Run) {}

        fn conclude(&mut self, geometry: &Geometry) {
            for extent in 0..64 {
                if self.intended & (1 << extent) != 0 {
                    self.set(Plane::Dirty, geometry.blocks_of_extent(extent));
                }
            }
        }
    }

    #[test]
    fn crc32c_is_the_castagnoli_crc() {
        assert_eq!(crc::crc32c(0, b"123456789"), 0xe306_9283);
        assert_eq!(crc::crc32c(crc::crc32c(0, b"1234"), b"56789"), 0xe306_9283);
    }

    #[test]
    fn superblock_survives_one_damaged_copy() -> Result {
        let (mut disk, sb) = Disk::new()?;
        let mut buffer = Buffer::new(1)?;
        for copy in [0, 15] {
            disk.page(copy)?[100] ^= 1;
            let found =
                recovery::load_superblock(&mut disk, Placement::Separate, PAGES, buffer.first()?);
            assert!(found == Ok(sb));
            disk.page(copy)?[100] ^= 1;
        }
        for copy in [0, 15] {
            disk.page(copy)?[100] ^= 1;
        }
        let found =
            recovery::load_superblock(&mut disk, Placement::Separate, PAGES, buffer.first()?);
        assert!(found == Err(Error::BadChecksum(Structure::Superblock(0))));
        Ok(())
    }

    #[test]
    fn superset_replay_adds_announced_extents() -> Result {
        let (mut disk, sb) = Disk::new()?;
        disk.record(&sb, 1, Run { start: 3, end: 5 })?;
        disk.record(&sb, 2, Run { start: 60, end: 64 })?;
        let mut buffer = Buffer::new(2)?;
        let (index, page) = buffer.pair()?;
        let mut count = Count::default();
        assert!(recovery::load_planes(&mut disk, &sb, index, page, &mut count).is_ok());
        assert_eq!(count.dirty, 0);
        let end = recovery::replay(&mut disk, &sb, page, &mut count).map_err(|_| EINVAL)?;
        assert_eq!(end.records, 2);
        assert_eq!(end.next_seq, 4);
        assert_eq!(count.dirty, 6 * 256);
        Ok(())
    }

    #[test]
    fn superset_settled_extents_keep_what_was_told() -> Result {
        let run = |start, end| Run { start, end };
        let (mut disk, sb) = Disk::new()?;
        disk.entries(&sb, 1, &[Entry::Intent(run(3, 6))])?;
        let told = [Entry::Dirty(run(1024, 1030)), Entry::Settled(run(4, 6))];
        disk.entries(&sb, 2, &told)?;
        let mut buffer = Buffer::new(1)?;
        let mut count = Count::default();
        recovery::replay(&mut disk, &sb, buffer.first()?, &mut count).map_err(|_| EINVAL)?;
        // Extent 3 is whole, of extents 4 and 5 there is what was told.
        assert_eq!(count.dirty, 256 + 6);

        // What is announced after it counts; of a torn record nothing does.
        disk.entries(&sb, 3, &[Entry::Intent(run(5, 6))])?;
        let mut count = Count::default();
        recovery::replay(&mut disk, &sb, buffer.first()?, &mut count).map_err(|_| EINVAL)?;
        assert_eq!(count.dirty, 2 * 256 + 6);
        disk.page(sb.layout.log_page(3))?.fill(0);
        disk.page(sb.layout.log_page(2))?[512..].fill(0);
        let mut count = Count::default();
        recovery::replay(&mut disk, &sb, buffer.first()?, &mut count).map_err(|_| EINVAL)?;
        assert_eq!(count.dirty, 3 * 256);
        Ok(())
    }

    #[test]
    fn superset_damaged_record_is_refused() -> Result {
        let (mut disk, sb) = Disk::new()?;
        disk.record(&sb, 1, Run { start: 3, end: 5 })?;
        disk.record(&sb, 2, Run { start: 6, end: 7 })?;
        let mut buffer = Buffer::new(1)?;
        disk.page(sb.layout.log_page(1))?[700] ^= 4;
        let end = recovery::replay(&mut disk, &sb, buffer.first()?, &mut Count::default());
        assert!(end == Err(Error::BadChecksum(Structure::Log(1))));
        disk.page(sb.layout.log_page(1))?.fill(0);
        let end = recovery::replay(&mut disk, &sb, buffer.first()?, &mut Count::default());
        assert!(end == Err(Error::LogGap(1)));
        Ok(())
    }

    #[test]
    fn identity_of_the_data_device_is_checked() -> Result {
        let (_, sb) = Disk::new()?;
        assert!(sb.verify_data(sb.data_sectors, &[8; 16]).is_ok());
        assert!(sb.verify_data(sb.data_sectors, &[1; 16]) == Err(Error::DataUuid));
        assert!(
            sb.verify_data(65 << 11, &[8; 16]) == Err(Error::DataSize(65 << 11, sb.data_sectors))
        );
        Ok(())
    }
}
