// SPDX-License-Identifier: GPL-2.0

//! The promise of a flush for blocks that the durable metadata call stale (rules 2, 3 and 4 of the contract).
//!
//! Such a block is noted when it is written to. A flush seals the notes that there are and goes to the data device; when
//! that has answered, a record calls the blocks valid, and only then the flush is answered. In this order, because a
//! record that came before the content would serve what was never written, and an answer that came before the
//! record would promise what recovery calls stale.
//!
//! A flush without notes costs nothing. A checkpoint makes the notes from before its copy superfluous; it flushes the
//! data device between the copy and the superblock.

use kernel::prelude::*;
use kernel::sync::atomic::Relaxed;

use super::checkpointer::Retire;
use super::committer::RESERVED_PAGES;
use super::fetch::{tag, Fetcher};
use super::Pristine;
use crate::dm::{BioList, Status};
use crate::shared::log::{Entry, MAX_RUN, RECORD_ENTRIES};

impl Pristine {
    /// The job for bios that have come back from the data device.
    pub(super) fn bios_ended(&self) {
        let Some(fetcher) = &self.fetcher else { return };
        if !self.is_writable() {
            // Those that waited for room that a checkpoint would have made.
            self.route_crowd(fetcher);
        }
        loop {
            let mut promised = BioList::new();
            let mut end = 0;
            let mut must_flush = false;
            let mut none = true;
            while let Some(bio) = fetcher.hooks.take() {
                none = false;
                let (kind, number) = tag::parts(fetcher.hooks.tag(&bio));
                let good = !bio.failed();
                match kind {
                    tag::WRITE | tag::WRITE_FUA => self.end_write(fetcher, number, good),
                    tag::FLUSH if good => end = number.max(end),
                    _ => {}
                }
                match kind {
                    tag::FLUSH if good => promised.push(bio),
                    tag::WRITE_FUA | tag::FUA if good => {
                        must_flush = true;
                        promised.push(bio);
                    }
                    _ => bio.complete(Ok(())),
                }
            }
            if none {
                return;
            }
            if promised.is_empty() {
                continue;
            }
            let mut result = Ok(());
            if must_flush {
                // The bio's content is durable, but what it left of its blocks may not be.
                end = fetcher.desk.lock().notes.seal();
                result = self.meta.flush_data();
            }
            let result = result.and_then(|()| self.record_notes(fetcher, end));
            while let Some(bio) = promised.pop() {
                bio.complete(result.map_err(|_| Status::IoError));
            }
        }
    }

    /// Records the notes with numbers below `end`, whose blocks' content is durable.
    fn record_notes(&self, fetcher: &Fetcher, end: u64) -> Result {
        let mut runs = fetcher.recording.lock();
        let count = {
            let desk = fetcher.desk.lock();
            let notes = desk.notes.until(end);
            match runs.get_mut(..notes.len()) {
                Some(to) => to.copy_from_slice(notes),
                None => return Err(EINVAL),
            }
            notes.len()
        };
        if count == 0 {
            return Ok(());
        }
        if !self.is_writable() {
            return Err(EROFS);
        }
        let noted = runs.get(..count).unwrap_or(&[]);
        let entries: u64 = noted.iter().map(|run| run.len().div_ceil(MAX_RUN)).sum();
        let records = entries.div_ceil(RECORD_ENTRIES as u64); // CAST: 496.
        let mut log = self.log.lock();
        if log.used() + records + RESERVED_PAGES >= self.layout.log_pages {
            drop(log);
            drop(runs);
            // It covers them all.
            return self.checkpoint(Retire::Surplus).map(|_| ());
        }
        let written = self.put_all(&mut log, records, noted.iter().copied(), Entry::Valid);
        self.publish_log(&log);
        drop(log);
        drop(runs);
        if written.is_err() {
            self.fail("writing the log failed");
            return written;
        }
        self.stats.valid.add(count as u64, Relaxed); // CAST: usize to u64.
        let crowd = fetcher.drop_notes(end);
        self.route_all(fetcher, crowd);
        Ok(())
    }
}
