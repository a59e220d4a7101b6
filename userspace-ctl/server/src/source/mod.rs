// SPDX-License-Identifier: GPL-2.0

//! Where the objects come from: a directory, or another store that this server is a cache of.

mod dir;
mod upstream;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use pristine_store::{ChannelName, Error, ErrorKind, ObjectName, Store};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::listing::List;
use crate::metrics::Metrics;
use crate::reply::Reply;

pub(crate) use dir::{Dir, OpenFile};
pub(crate) use upstream::Upstream;

/// The most bytes of an object that a connection holds in memory at a time.
pub(crate) const PIECE: u64 = 64 << 10;

/// Why there is no object.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// It is not there.
    Missing,
    /// The file system or the upstream store says no.
    Denied,
    /// The upstream store is slow or gone.
    Upstream(String),
    /// Anything else.
    Failed(String),
}

impl Trouble {
    /// What the operator should know; the client is not told.
    pub(crate) fn detail(&self) -> Option<&str> {
        match self {
            Trouble::Missing | Trouble::Denied => None,
            Trouble::Upstream(why) | Trouble::Failed(why) => Some(why),
        }
    }
}

impl From<&Trouble> for Reply {
    fn from(trouble: &Trouble) -> Self {
        match trouble {
            Trouble::Missing => Reply::plain(StatusCode::NOT_FOUND, "not in this store\n"),
            Trouble::Denied => Reply::plain(StatusCode::FORBIDDEN, "not readable\n"),
            Trouble::Upstream(_) => Reply::plain(
                StatusCode::BAD_GATEWAY,
                "the store behind this server does not serve it\n",
            ),
            Trouble::Failed(_) => {
                Reply::plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot read it\n")
            }
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Trouble::Missing,
            io::ErrorKind::PermissionDenied => Trouble::Denied,
            _ => Trouble::Failed(error.to_string()),
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::NotFound => Trouble::Missing,
            ErrorKind::Denied => Trouble::Denied,
            ErrorKind::Network => Trouble::Upstream(error.to_string()),
            _ => Trouble::Failed(error.to_string()),
        }
    }
}

/// An object that can be read.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A file, which the kernel can send by itself.
    File(Arc<OpenFile>),
    /// Comes in chunks through the cache.
    Cached {
        upstream: Arc<Upstream>,
        object: Arc<ObjectName>,
        len: u64,
    },
}

impl Content {
    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            Content::File(file) => file.len,
            Content::Cached { len, .. } => *len,
        }
    }

    /// Some of the bytes in `range`, from its start on: at least one, at most [`PIECE`].
    pub(crate) async fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let range = range.start..range.end.min(range.start + PIECE);
        match self {
            Content::File(file) => OpenFile::read(file, range).await,
            Content::Cached {
                upstream, object, ..
            } => {
                let chunk = upstream.read(object, range).await;
                let chunk = chunk.map_err(|trouble| io::Error::other(format!("{trouble:?}")))?;
                Ok(chunk.to_vec())
            }
        }
    }
}

/// Where objects come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Dir(Arc<Dir>),
    Upstream(Arc<Upstream>),
}

impl Source {
    /// The store itself, for what is seldom read.
    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        match self {
            Source::Dir(dir) => dir.store(),
            Source::Upstream(upstream) => upstream.store(),
        }
    }

    /// An object. With `reload` nothing that was cached counts.
    pub(crate) async fn object(
        &self,
        object: ObjectName,
        reload: bool,
        metrics: &Metrics,
    ) -> Result<Content, Trouble> {
        match self {
            Source::Dir(dir) => Ok(Content::File(dir.open(&object, metrics).await?)),
            Source::Upstream(upstream) => {
                let object = Arc::new(object);
                let len = upstream.len(&object, reload).await?;
                Ok(Content::Cached {
                    upstream: Arc::clone(upstream),
                    object,
                    len,
                })
            }
        }
    }

    /// A channel's pointer, as it is in the store.
    pub(crate) async fn pointer(&self, channel: ChannelName) -> Result<Vec<u8>, Trouble> {
        match self {
            Source::Dir(dir) => dir.pointer(&channel).await,
            Source::Upstream(upstream) => upstream.pointer(channel).await,
        }
    }

    /// A list of what is there.
    pub(crate) async fn list(&self, list: List) -> Result<String, Trouble> {
        let store = Arc::clone(self.store());
        Ok(blocking(move || list.read(store.as_ref())).await??)
    }
}

/// Does what may wait for a disk or a network on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Trouble> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Trouble::Failed(error.to_string()))
}

/// The memory for pieces of objects on their way to clients, bounded for all clients together.
#[derive(Clone, Debug)]
pub(crate) struct Memory(Arc<Semaphore>);

/// A piece of an object; its room is free again once it is dropped.
#[derive(Debug)]
pub(crate) struct Piece {
    bytes: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl Memory {
    /// Room for `bytes`, at least one piece.
    pub(crate) fn new(bytes: u64) -> Self {
        let pieces = usize::try_from(bytes / PIECE).unwrap_or(usize::MAX);
        Memory(Arc::new(Semaphore::new(
            pieces.clamp(1, Semaphore::MAX_PERMITS),
        )))
    }

    /// Reads a piece once there is room.
    pub(crate) async fn read(&self, content: &Content, range: Range<u64>) -> io::Result<Piece> {
        let room = Arc::clone(&self.0).acquire_owned().await;
        let _room = room.map_err(io::Error::other)?;
        let bytes = content.read(range).await?;
        Ok(Piece { bytes, _room })
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl From<Piece> for Bytes {
    fn from(piece: Piece) -> Self {
        Bytes::from_owner(piece)
    }
}
