// SPDX-License-Identifier: GPL-2.0

//! Unpacked frames: the most recently used stay for the next read nearby, and each is fetched by one thread at a time,
//! however many want it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use pristine_image::pack::decode_frame;
use pristine_image::{Digest, FormatError, PackId, BLOCK_SIZE};

/// A frame's name: its pack, and where it begins there in bytes. Packs are named by their content, so this is the
/// same in all stores.
pub type Key = (PackId, u32);

/// A frame, unpacked, with the digest of each of its blocks that was wanted so far.
#[derive(Debug)]
pub struct Unpacked {
    data: Vec<u8>,
    digests: Box<[OnceLock<Digest>]>,
    /// The source that it came from, to be blamed.
    pub source: usize,
}

impl Unpacked {
    /// Unpacks a frame of `blocks` blocks.
    ///
    /// # Errors
    ///
    /// It is not one.
    pub fn new(frame: &[u8], blocks: u32, source: usize) -> Result<Self, FormatError> {
        let data = decode_frame(frame, blocks as usize)?;
        let digests = data.chunks_exact(BLOCK_SIZE).map(|_| OnceLock::new());
        let digests = digests.collect();
        Ok(Self {
            data,
            digests,
            source,
        })
    }

    /// Blocks whose digests were checked already.
    pub fn verified(data: Vec<u8>, digests: Vec<Digest>, source: usize) -> Self {
        Self {
            data,
            digests: digests.into_iter().map(OnceLock::from).collect(),
            source,
        }
    }

    /// Hashes these blocks together, which costs half of what it does one by one when [`Unpacked::block`] asks.
    pub fn hash_blocks(&self, indices: impl Iterator<Item = u32>) {
        let wanted = indices.filter_map(|index| {
            let index = index as usize;
            let digest = self.digests.get(index).filter(|d| d.get().is_none())?;
            let block = self.data.get(index * BLOCK_SIZE..)?.first_chunk()?;
            Some((digest, block))
        });
        let (digests, blocks): (Vec<_>, Vec<_>) = wanted.unzip();
        for (digest, found) in digests.into_iter().zip(Digest::of_blocks(blocks)) {
            digest.get_or_init(|| found);
        }
    }

    /// The block at `index`, if it is what `digest` says.
    pub fn block(&self, index: u32, digest: &Digest) -> Option<&[u8]> {
        let index = index as usize;
        let at = index * BLOCK_SIZE;
        let data = self.data.get(at..at + BLOCK_SIZE)?;
        let found = self.digests.get(index)?.get_or_init(|| Digest::of(data));
        (found == digest).then_some(data)
    }

    fn bytes(&self) -> u64 {
        // CAST: at most 1 MiB.
        (self.data.len() + size_of_val(&*self.digests)) as u64
    }
}

#[derive(Debug)]
enum Entry {
    /// Somebody fetches it.
    Loading,
    Ready {
        frame: Arc<Unpacked>,
        used: u64,
    },
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Key, Entry>,
    /// Ready entries by when they were last used.
    order: BTreeMap<u64, Key>,
    clock: u64,
    bytes: u64,
    /// Threads that wait for what others fetch; to wake them is a system call.
    waiting: usize,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Most bytes of frames that nobody uses.
    limit: u64,
}

/// What [`Cache::claim`] found. Frames that are this claim's to fetch are given up when it is dropped.
#[derive(Debug)]
pub struct Claim<'a> {
    cache: &'a Cache,
    /// Those that are there.
    pub ready: Vec<(Key, Arc<Unpacked>)>,
    /// Those that the caller is to fetch, and nobody else does meanwhile.
    pub mine: Vec<Key>,
    /// Those that others are fetching.
    pub theirs: Vec<Key>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        for key in &self.mine {
            if matches!(inner.entries.get(key), Some(Entry::Loading)) {
                inner.entries.remove(key);
            }
        }
        self.cache.wake(&inner);
    }
}

impl Cache {
    /// An empty cache that keeps up to `limit` bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // What a thread left that died is whole: each change is one call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame, if it is there.
    pub fn get(&self, key: &Key) -> Option<Arc<Unpacked>> {
        self.lock().touch(key)
    }

    /// Takes what is there, and the right to fetch what nobody fetches.
    pub fn claim(&self, keys: &[Key]) -> Claim<'_> {
        let mut claim = Claim {
            cache: self,
            ready: Vec::new(),
            mine: Vec::new(),
            theirs: Vec::new(),
        };
        let mut inner = self.lock();
        for key in keys {
            if let Some(frame) = inner.touch(key) {
                claim.ready.push((*key, frame));
            } else if inner.entries.contains_key(key) {
                claim.theirs.push(*key);
            } else {
                inner.entries.insert(*key, Entry::Loading);
                claim.mine.push(*key);
            }
        }
        claim
    }

    /// Puts a frame that was claimed; wakes those that wait for it.
    pub fn put(&self, key: Key, frame: &Arc<Unpacked>) {
        let mut inner = self.lock();
        inner.remove(&key);
        inner.clock += 1;
        let used = inner.clock;
        let ready = Entry::Ready {
            frame: Arc::clone(frame),
            used,
        };
        inner.entries.insert(key, ready);
        inner.order.insert(used, key);
        inner.bytes += frame.bytes();
        while inner.bytes > self.limit {
            let Some((_, oldest)) = inner.order.pop_first() else {
                break;
            };
            inner.remove(&oldest);
        }
        self.wake(&inner);
    }

    fn wake(&self, inner: &Inner) {
        if inner.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Forgets a frame, if it is still this one: its content was wrong.
    pub fn forget(&self, key: &Key, frame: &Arc<Unpacked>) {
        let mut inner = self.lock();
        if matches!(inner.entries.get(key), Some(Entry::Ready { frame: f, .. }) if Arc::ptr_eq(f, frame))
        {
            inner.remove(key);
        }
    }

    /// Waits until nobody fetches any of these, or for `time`.
    pub fn wait(&self, keys: &[Key], time: Duration) {
        let mut inner = self.lock();
        inner.waiting += 1;
        let loading = |inner: &mut Inner| {
            keys.iter()
                .any(|k| matches!(inner.entries.get(k), Some(Entry::Loading)))
        };
        let waited = self.changed.wait_timeout_while(inner, time, loading);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.waiting -= 1;
    }

    /// Bytes that are kept now.
    pub fn bytes(&self) -> u64 {
        self.lock().bytes
    }
}

impl Inner {
    fn touch(&mut self, key: &Key) -> Option<Arc<Unpacked>> {
        let Some(Entry::Ready { frame, used }) = self.entries.get_mut(key) else {
            return None;
        };
        self.clock += 1;
        self.order.remove(used);
        *used = self.clock;
        self.order.insert(self.clock, *key);
        Some(Arc::clone(frame))
    }

    fn remove(&mut self, key: &Key) {
        if let Some(Entry::Ready { frame, used }) = self.entries.remove(key) {
            self.order.remove(&used);
            self.bytes -= frame.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        (PackId::new(Digest::of(b"pack")), n)
    }

    fn frame() -> Arc<Unpacked> {
        let digest = Digest::of(&[7; BLOCK_SIZE]);
        Arc::new(Unpacked::verified(vec![7; BLOCK_SIZE], vec![digest], 0))
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let cache = Cache::new(3 * frame().bytes());
        for n in 0..3 {
            cache.put(key(n), &frame());
        }
        assert!(cache.get(&key(0)).is_some());
        cache.put(key(3), &frame());
        assert!(cache.get(&key(1)).is_none());
        for n in [0, 2, 3] {
            assert!(cache.get(&key(n)).is_some(), "{n}");
        }
        assert_eq!(cache.bytes(), 3 * frame().bytes());
    }

    #[test]
    fn a_frame_is_claimed_once_and_given_up_with_the_claim() {
        let cache = Cache::new(1 << 20);
        let first = cache.claim(&[key(1), key(2)]);
        assert_eq!(first.mine.len(), 2);
        let second = cache.claim(&[key(2), key(3)]);
        assert_eq!((second.theirs.len(), second.mine.len()), (1, 1));
        cache.put(key(1), &frame());
        drop(first);
        cache.wait(&[key(2)], Duration::from_secs(60));
        let third = cache.claim(&[key(1), key(2)]);
        assert_eq!((third.ready.len(), third.mine.len()), (1, 1));
    }

    #[test]
    fn nothing_is_kept_without_room() {
        let cache = Cache::new(0);
        cache.put(key(1), &frame());
        assert_eq!((cache.bytes(), cache.get(&key(1)).is_none()), (0, true));
    }

    #[test]
    fn only_the_frame_that_is_meant_is_forgotten() {
        let cache = Cache::new(1 << 20);
        let (old, new) = (frame(), frame());
        cache.put(key(1), &old);
        cache.put(key(1), &new);
        cache.forget(&key(1), &old);
        assert!(cache.get(&key(1)).is_some());
        cache.forget(&key(1), &new);
        assert!(cache.get(&key(1)).is_none());
    }
}
