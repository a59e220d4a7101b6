// SPDX-License-Identifier: GPL-2.0

//! Packs of a server that knows no ranges: taken whole, and kept for the next ranges of them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::{Digest, PackId};

use crate::error::{Error, Result};

/// Bytes kept at most; a pack that has more is read anew for each range, up to the range's end.
const MAX_KEPT: u64 = 64 << 20;

/// The packs that were taken whole most recently.
#[derive(Debug, Default)]
pub(super) struct PlainPacks {
    needed: AtomicBool,
    /// The newest last. Whoever fetches a pack holds the lock, so that others who want the same do not fetch it too.
    kept: Mutex<VecDeque<(PackId, Arc<Vec<u8>>)>>,
}

impl PlainPacks {
    /// The server ignored a range.
    pub(super) fn note(&self) {
        self.needed.store(true, Ordering::Relaxed);
    }

    /// A range of a pack, if the server is known to ignore ranges and the pack is not too large for this; with the pack's
    /// length. `fetch` gets the whole pack, of at most the bytes it is told.
    pub(super) fn range(
        &self,
        id: &PackId,
        range: &Range<u64>,
        fetch: impl FnOnce(u64) -> Result<Vec<u8>>,
    ) -> Result<Option<(Vec<u8>, u64)>> {
        if !self.needed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, pack)) = kept.iter().find(|(kept, _)| kept == id) {
            return Ok(Some(part(pack, range)));
        }
        let pack = match fetch(MAX_KEPT) {
            Err(Error::TooLarge { .. }) => return Ok(None),
            pack => Arc::new(pack?),
        };
        // What is damaged is for who asked to find out, and must not come again.
        if Digest::of(&pack).as_bytes() == id.as_bytes() {
            let total = |kept: &VecDeque<(PackId, Arc<Vec<u8>>)>| {
                kept.iter().map(|(_, pack)| pack.len() as u64).sum::<u64>()
            };
            while !kept.is_empty() && total(&kept) + pack.len() as u64 > MAX_KEPT {
                kept.pop_front();
            }
            kept.push_back((*id, Arc::clone(&pack)));
        }
        Ok(Some(part(&pack, range)))
    }
}

fn part(pack: &[u8], range: &Range<u64>) -> (Vec<u8>, u64) {
    let len = pack.len() as u64;
    let (start, end) = (range.start.min(len), range.end.min(len));
    let bytes = pack.get(start as usize..end as usize).unwrap_or_default();
    (bytes.to_vec(), len)
}
