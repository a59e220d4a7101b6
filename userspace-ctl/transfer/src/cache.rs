// SPDX-License-Identifier: GPL-2.0

//! Pieces of a compressed image that were unpacked lately. A piece that several threads want at once is made once.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Keeps pieces, the most recently used of them, up to a number of bytes.
#[derive(Debug)]
pub(crate) struct PieceCache {
    /// Bytes to keep; the newest piece is kept even if it is larger.
    budget: u64,
    state: Mutex<State>,
    made: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pieces: HashMap<u64, Piece>,
    bytes: u64,
    /// Counts uses.
    clock: u64,
}

#[derive(Debug)]
enum Piece {
    /// A thread is making it.
    Making,
    Made {
        content: Arc<Vec<u8>>,
        used: u64,
    },
}

impl PieceCache {
    pub(crate) fn new(budget: u64) -> Self {
        PieceCache {
            budget,
            state: Mutex::default(),
            made: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The piece `key`, made by `make` if it is not there.
    ///
    /// # Errors
    /// Those of `make`; who waited for another thread then tries on its own.
    pub(crate) fn get(
        &self,
        key: u64,
        make: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> io::Result<Arc<Vec<u8>>> {
        let mut state = self.lock();
        loop {
            state.clock += 1;
            let now = state.clock;
            match state.pieces.get_mut(&key) {
                Some(Piece::Made { content, used }) => {
                    *used = now;
                    return Ok(Arc::clone(content));
                }
                Some(Piece::Making) => {
                    let waited = self.made.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
                None => break,
            }
        }
        state.pieces.insert(key, Piece::Making);
        drop(state);
        // Gone again, and the waiting woken, whatever becomes of `make`.
        let claim = Claim { cache: self, key };
        let content = Arc::new(make()?);
        let mut state = self.lock();
        let used = state.clock;
        state.bytes += content.len() as u64;
        let piece = Piece::Made {
            content: Arc::clone(&content),
            used,
        };
        state.pieces.insert(key, piece);
        state.shrink(self.budget, key);
        drop(state);
        drop(claim);
        Ok(content)
    }
}

impl State {
    fn shrink(&mut self, budget: u64, keep: u64) {
        while self.bytes > budget {
            let made = self.pieces.iter().filter_map(|(&key, piece)| match piece {
                Piece::Made { used, .. } if key != keep => Some((*used, key)),
                _ => None,
            });
            let Some((_, oldest)) = made.min() else {
                return;
            };
            if let Some(Piece::Made { content, .. }) = self.pieces.remove(&oldest) {
                self.bytes -= content.len() as u64;
            }
        }
    }
}

/// The right to make a piece.
struct Claim<'a> {
    cache: &'a PieceCache,
    key: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if matches!(state.pieces.get(&self.key), Some(Piece::Making)) {
            state.pieces.remove(&self.key);
        }
        drop(state);
        self.cache.made.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_piece_is_made_once_and_failures_are_not_kept() {
        let cache = PieceCache::new(100);
        let made = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let piece = cache.get(1, || {
                        made.fetch_add(1, Ordering::Relaxed);
                        Ok(vec![1; 50])
                    });
                    assert_eq!(piece.unwrap().len(), 50);
                });
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
        let failed = cache.get(2, || Err(io::ErrorKind::Other.into()));
        assert!(failed.is_err());
        assert_eq!(cache.get(2, || Ok(vec![2; 50])).unwrap().len(), 50);
    }

    #[test]
    fn the_oldest_goes_first() {
        let cache = PieceCache::new(100);
        let get = |key| cache.get(key, || Ok(vec![0; 40])).unwrap();
        get(1);
        get(2);
        get(1);
        get(3);
        assert!(cache.lock().pieces.contains_key(&1));
        assert!(!cache.lock().pieces.contains_key(&2));
        // One that is larger than the budget is alone, but there.
        cache.get(4, || Ok(vec![0; 400])).unwrap();
        assert_eq!(cache.lock().pieces.len(), 1);
        assert_eq!(cache.lock().bytes, 400);
    }
}
