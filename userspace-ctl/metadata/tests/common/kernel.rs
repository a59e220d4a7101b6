// SPDX-License-Identifier: GPL-2.0

//! A model of what the kernel target does to both devices, to make metadata as it is in use.

use std::collections::BTreeSet;

use pristine_metadata::shared::log::{Entry, Writer};
use pristine_metadata::shared::PAGE_SIZE;
use pristine_metadata::{BlockState, Changes, Metadata, Planes, Run, Storage, Stores};

use super::Disk;

/// What a block of the master holds, so that a change is seen.
pub const MASTER: u8 = 0x5a;

/// A device in use.
pub struct Kernel {
    pub metadata: Metadata<Disk>,
    /// What memory knows: exact.
    pub planes: Planes,
    hot: BTreeSet<u64>,
    next_seq: u64,
    /// Whether records are made durable before the writes that they announce. Off to see that the tests notice.
    pub write_ahead: bool,
}

impl Kernel {
    /// Activates a device.
    pub fn activate(stores: Stores<Disk>) -> Self {
        let mut metadata = Metadata::open_on(stores).unwrap();
        let (planes, _) = metadata.load().unwrap();
        metadata.commit(&planes, &Changes::default()).unwrap();
        let next_seq = metadata.superblock().root.log_seq;
        Self {
            metadata,
            planes,
            hot: BTreeSet::new(),
            next_seq,
            write_ahead: true,
        }
    }

    /// Records left in the ring before a checkpoint is due.
    pub fn room(&self) -> u64 {
        let sb = self.metadata.superblock();
        sb.root.log_seq + sb.layout.log_pages - self.next_seq
    }

    /// Writes `content` to a block, with its intent before it.
    pub fn write(&mut self, block: u64, content: u8) {
        self.write_many(&[block], content);
    }

    /// Writes blocks whose intents go into one record.
    pub fn write_many(&mut self, blocks: &[u64], content: u8) {
        let geometry = *self.planes.geometry();
        let cold: BTreeSet<u64> = blocks
            .iter()
            .filter(|b| self.planes.state(**b) != BlockState::Dirty)
            .map(|b| b / geometry.blocks_per_extent())
            .filter(|e| !self.hot.contains(e))
            .collect();
        if self.write_ahead {
            self.record(&cold);
        }
        for block in blocks {
            let data = self.metadata.stores_mut().data.as_mut().unwrap();
            data.write(*block, &[content; PAGE_SIZE]).unwrap();
            let run = Run {
                start: *block,
                end: *block + 1,
            };
            self.planes.set(run, BlockState::Dirty);
        }
        if !self.write_ahead {
            self.record(&cold);
        }
    }

    fn record(&mut self, cold: &BTreeSet<u64>) {
        if cold.is_empty() {
            return;
        }
        if self.room() == 0 {
            self.checkpoint();
        }
        let sb = *self.metadata.superblock();
        let mut page = [0; PAGE_SIZE];
        let mut writer = Writer::new(&mut page);
        for extent in cold {
            assert!(writer.push(Entry::Intent(Run {
                start: *extent,
                end: *extent + 1,
            })));
        }
        writer.finish(&sb.meta_uuid, self.next_seq);
        let meta = &mut self.metadata.stores_mut().meta;
        meta.write(sb.layout.log_page(self.next_seq), &page)
            .unwrap();
        meta.sync().unwrap();
        self.next_seq += 1;
        self.hot.extend(cold);
    }

    /// Makes everything acknowledged durable.
    pub fn flush(&mut self) {
        let data = self.metadata.stores_mut().data.as_mut().unwrap();
        data.sync().unwrap();
    }

    /// Writes the exact bits, after which every extent is cold again.
    pub fn checkpoint(&mut self) {
        // `commit` looks for the end of the log on disk, as after a restart.
        self.metadata
            .commit(&self.planes, &Changes::default())
            .unwrap();
        self.next_seq = self.metadata.superblock().root.log_seq;
        self.hot.clear();
    }
}
