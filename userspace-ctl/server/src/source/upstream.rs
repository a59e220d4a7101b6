// SPDX-License-Identifier: GPL-2.0

//! Objects of another store, through a cache in memory.
//!
//! Objects are cut into chunks, and a chunk that many wait for is fetched once. What comes from there is not verified here:
//! a part of a pack cannot be, and clients verify each block anyway. A client that got something wrong asks again with
//! `Cache-Control: no-cache`, and the chunk is fetched anew. A failure is remembered for a moment, so that those who wait
//! do not try it one after the other.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pristine_store::{ChannelName, ObjectName, Store};
use quick_cache::sync::Cache;
use quick_cache::Weighter;
use tokio::sync::Semaphore;

use super::{blocking, Trouble};
use crate::metrics::Metrics;

/// What is fetched at once.
const CHUNK: u64 = 256 << 10;
/// Requests at a time.
const REQUESTS: usize = 16;
/// Lengths of objects that are remembered.
const LENGTHS: usize = 16 << 10;
/// How long a failure counts.
const FAILED_TIME: Duration = Duration::from_secs(1);
/// What was fetched this recently is not fetched again, whatever clients say.
const FRESH_TIME: Duration = Duration::from_secs(1);
/// How long a pointer counts.
const POINTER_TIME: Duration = Duration::from_secs(1);
/// Pointers that are remembered.
const POINTERS: usize = 1024;

/// What a fetch yielded, and when.
#[derive(Clone, Debug)]
struct Fetched<T> {
    at: Instant,
    result: Result<T, Trouble>,
}

#[derive(Clone, Debug)]
struct ByLength;

impl Weighter<(String, u64), Fetched<Bytes>> for ByLength {
    fn weight(&self, _: &(String, u64), fetched: &Fetched<Bytes>) -> u64 {
        // With what the key and the entry take.
        let len = fetched.result.as_ref().map_or(0, Bytes::len);
        len as u64 + 256
    }
}

/// A store that this server is a cache of.
pub(crate) struct Upstream {
    store: Arc<dyn Store>,
    chunks: Cache<(String, u64), Fetched<Bytes>, ByLength>,
    lengths: Cache<String, Fetched<u64>>,
    pointers: Cache<String, Fetched<Vec<u8>>>,
    requests: Semaphore,
    metrics: Arc<Metrics>,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

impl Upstream {
    /// `memory`: bytes for chunks.
    pub(crate) fn new(store: Arc<dyn Store>, memory: u64, metrics: Arc<Metrics>) -> Self {
        let items = usize::try_from(memory / CHUNK).unwrap_or(usize::MAX);
        Upstream {
            store,
            chunks: Cache::with_weighter(items.max(16), memory.max(16 * CHUNK), ByLength),
            lengths: Cache::new(LENGTHS),
            pointers: Cache::new(POINTERS),
            requests: Semaphore::new(REQUESTS),
            metrics,
        }
    }

    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    async fn fetch<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Store) -> Result<T, pristine_store::Error> + Send + 'static,
    ) -> Result<T, Trouble> {
        let _turn = self.requests.acquire().await;
        let store = Arc::clone(&self.store);
        Ok(blocking(move || work(store.as_ref())).await??)
    }

    /// An object's length.
    pub(crate) async fn len(&self, object: &Arc<ObjectName>, reload: bool) -> Result<u64, Trouble> {
        let name = object.path();
        if let Some(found) = self.lengths.get(&name) {
            let valid = match &found.result {
                Ok(_) => !reload || found.at.elapsed() < FRESH_TIME,
                Err(_) => found.at.elapsed() < FAILED_TIME,
            };
            if valid {
                return found.result;
            }
            self.lengths.remove(&name);
        }
        if reload {
            self.forget(&name);
        }
        let asked = Arc::clone(object);
        let fetch = async {
            let result = self.fetch(move |store| store.size(&asked)).await;
            Ok::<_, Trouble>(Fetched {
                at: Instant::now(),
                result: result.and_then(|size| size.ok_or(Trouble::Missing)),
            })
        };
        self.lengths.get_or_insert_async(&name, fetch).await?.result
    }

    fn forget(&self, name: &str) {
        self.chunks
            .retain(|(of, _), fetched| of != name || fetched.at.elapsed() < FRESH_TIME);
    }

    /// Some of the bytes in `range`, which is not empty, from its start on.
    pub(crate) async fn read(
        self: &Arc<Self>,
        object: &Arc<ObjectName>,
        range: Range<u64>,
    ) -> Result<Bytes, Trouble> {
        let number = range.start / CHUNK;
        let chunk = self.chunk(object, number).await?;
        let start = usize::try_from(range.start - number * CHUNK).unwrap_or(usize::MAX);
        let end = usize::try_from(range.end - number * CHUNK).unwrap_or(usize::MAX);
        let end = end.min(chunk.len());
        if start >= end {
            return Err(Trouble::Upstream(format!("{object} got shorter")));
        }
        Ok(chunk.slice(start..end))
    }

    async fn chunk(
        self: &Arc<Self>,
        object: &Arc<ObjectName>,
        number: u64,
    ) -> Result<Bytes, Trouble> {
        let key = (object.path(), number);
        if let Some(found) = self.chunks.get(&key) {
            match found.result {
                Ok(bytes) => {
                    self.metrics.cache(true);
                    return Ok(bytes);
                }
                Err(trouble) if found.at.elapsed() < FAILED_TIME => return Err(trouble),
                Err(_) => {
                    self.chunks.remove(&key);
                }
            }
        }
        let (this, object) = (Arc::clone(self), Arc::clone(object));
        // In a task of its own, so that it goes on for the others when the client that began it leaves.
        let fetch = async move {
            let fetch = async {
                this.metrics.cache(false);
                let asked = Arc::clone(&object);
                let result = this
                    .fetch(move |store| fetch_chunk(store, &asked, number))
                    .await;
                if let Ok(bytes) = &result {
                    this.metrics.upstream(bytes.len() as u64);
                }
                let at = Instant::now();
                Ok::<_, Trouble>(Fetched { at, result })
            };
            this.chunks.get_or_insert_async(&key, fetch).await
        };
        let fetched = tokio::spawn(fetch).await;
        fetched
            .map_err(|error| Trouble::Failed(error.to_string()))??
            .result
    }

    /// A channel's pointer, at most a second old.
    pub(crate) async fn pointer(&self, channel: ChannelName) -> Result<Vec<u8>, Trouble> {
        let name = channel.path();
        if let Some(found) = self.pointers.get(&name) {
            if found.at.elapsed() < POINTER_TIME {
                return found.result;
            }
            self.pointers.remove(&name);
        }
        let fetch = async {
            let read = move |store: &dyn Store| {
                let found = store.read_pointer(&channel)?;
                Ok(found.map(|(pointer, _)| pointer.encode().into_bytes()))
            };
            let result = self.fetch(read).await;
            Ok::<_, Trouble>(Fetched {
                at: Instant::now(),
                result: result.and_then(|found| found.ok_or(Trouble::Missing)),
            })
        };
        let fetched = self.pointers.get_or_insert_async(&name, fetch).await?;
        fetched.result
    }
}

fn fetch_chunk(
    store: &dyn Store,
    object: &ObjectName,
    number: u64,
) -> Result<Bytes, pristine_store::Error> {
    let range = number * CHUNK..(number + 1) * CHUNK;
    let bytes = match store.get_range(object, range.clone()) {
        // The last chunk.
        Err(pristine_store::Error::Truncated { len, .. }) if len > range.start => {
            store.get_range(object, range.start..len)
        }
        result => result,
    };
    bytes.map(Bytes::from)
}
