// SPDX-License-Identifier: GPL-2.0

//! Images of casync and desync: an index (`.caibx`) and a store of chunks (`.castr`), local or behind a web server.

mod index;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pristine_image::ReadAt;
use sha2::{Digest as _, Sha256, Sha512_256};

pub use index::{CaibxIndex, Chunk, ChunkDigest, MAX_CHUNK};

use crate::cache::PieceCache;
use crate::error::{Error, Result};
use crate::hex;
use crate::http::{is_url, HttpClient};
use crate::input::{Bytes, Input};
use crate::stream::Compression;

/// The name that casync gives to a store when none is said.
pub(crate) const DEFAULT_STORE: &str = "default.castr";
/// Unpacked chunks that are kept, in bytes.
const KEEP: u64 = 32 << 20;
/// The most that compression may add to a chunk.
const OVERHEAD: u64 = 64 << 10;

/// Where chunks are.
#[derive(Debug)]
enum ChunkStore {
    Directory(PathBuf),
    Url { base: String, client: HttpClient },
}

/// A disk image that is cut into chunks.
#[derive(Debug)]
pub struct CasyncImage {
    index: CaibxIndex,
    store: ChunkStore,
    unpacked: PieceCache,
}

impl CasyncImage {
    /// An image whose index is read; `store` is the directory or the URL of its chunks.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the store is a directory that is not there.
    pub fn new(index: CaibxIndex, store: &str, client: HttpClient) -> Result<Self> {
        let store = if is_url(store) {
            ChunkStore::Url {
                base: store.trim_end_matches('/').to_owned(),
                client,
            }
        } else {
            let path = PathBuf::from(store);
            if !path.is_dir() {
                return Err(Error::NotFound {
                    what: store.to_owned(),
                    why: "there is no such chunk store; give it with --chunk-store".to_owned(),
                });
            }
            ChunkStore::Directory(path)
        };
        Ok(CasyncImage {
            index,
            store,
            unpacked: PieceCache::new(KEEP),
        })
    }

    fn chunk(&self, number: usize) -> io::Result<Arc<Vec<u8>>> {
        let chunk = self.index.chunks().get(number).copied();
        let chunk = chunk.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.unpacked.get(number as u64, || Ok(self.load(&chunk)?))
    }

    /// Reads a chunk, unpacks it and compares its digest.
    fn load(&self, chunk: &Chunk) -> Result<Vec<u8>> {
        let id = hex(&chunk.id);
        let path = format!("{}/{id}", &id[..4]);
        let len = chunk.end - chunk.start;
        let stored = match self.store.read(&format!("{path}.cacnk"), len + OVERHEAD)? {
            Some(stored) => stored,
            // Without the suffix, chunks are not compressed.
            None => self.store.read(&path, len)?.ok_or_else(|| Error::NotFound {
                what: self.store.name(),
                why: format!("chunk {id} is not there; the store is incomplete, or is that of another index"),
            })?,
        };
        let name = format!("chunk {id} in {}", self.store.name());
        let content = unpack(stored, len, &name)?;
        let digest: [u8; 32] = match self.index.digest() {
            ChunkDigest::Sha256 => Sha256::digest(&content).into(),
            ChunkDigest::Sha512_256 => Sha512_256::digest(&content).into(),
        };
        if content.len() as u64 != len || digest != chunk.id {
            return Err(Error::damaged(
                name,
                "its content is not what its name says",
            ));
        }
        Ok(content)
    }
}

/// Unpacks a chunk: zstd, xz or gzip by its first bytes, else it is as it is. Yields at most one byte too many.
fn unpack(stored: Vec<u8>, len: u64, name: &str) -> Result<Vec<u8>> {
    let Some(compression) = Compression::detect(&stored) else {
        return Ok(stored);
    };
    let input = Input {
        name: name.to_owned(),
        bytes: Arc::new(Bytes(stored)),
    };
    let mut content = Vec::with_capacity(len.min(MAX_CHUNK) as usize);
    compression
        .unpack(&input)?
        .take(len + 1)
        .read_to_end(&mut content)
        .map_err(|error| Error::io(format!("unpack {name}"), error))?;
    Ok(content)
}

impl ChunkStore {
    fn name(&self) -> String {
        match self {
            ChunkStore::Directory(path) => path.display().to_string(),
            ChunkStore::Url { base, .. } => base.clone(),
        }
    }

    /// A file of the store, of at most `limit` bytes; `None` if it is not there.
    fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let name = format!("{}/{path}", self.name());
        let too_long = || Error::damaged(&name, "it has more bytes than the chunk can");
        let mut bytes = Vec::new();
        match self {
            ChunkStore::Directory(directory) => {
                let file = match File::open(directory.join(path)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    file => file.map_err(|error| Error::io(format!("open {name}"), error))?,
                };
                file.take(limit + 1)
                    .read_to_end(&mut bytes)
                    .map_err(|error| Error::io(format!("read {name}"), error))?;
            }
            ChunkStore::Url { client, .. } => return client.get(&name, limit),
        }
        match bytes.len() as u64 > limit {
            true => Err(too_long()),
            false => Ok(Some(bytes)),
        }
    }
}

impl ReadAt for CasyncImage {
    fn len(&self) -> u64 {
        self.index.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut buffer = buffer;
        while !buffer.is_empty() {
            let number = self.index.chunk_of(at);
            let number = number.ok_or(io::ErrorKind::UnexpectedEof)?;
            let content = self.chunk(number)?;
            let start = self
                .index
                .chunks()
                .get(number)
                .map_or(0, |chunk| chunk.start);
            let there = content.get((at - start) as usize..).unwrap_or_default();
            let len = there.len().min(buffer.len());
            let (part, rest) = buffer.split_at_mut(len);
            part.copy_from_slice(&there[..len]);
            at += len as u64;
            buffer = rest;
        }
        Ok(())
    }
}

/// The store beside an index, which casync uses when none is said.
pub(crate) fn default_store(index: &str) -> String {
    if is_url(index) {
        let directory = index
            .rsplit_once('/')
            .map_or(index, |(directory, _)| directory);
        return format!("{directory}/{DEFAULT_STORE}");
    }
    let directory = Path::new(index).parent().unwrap_or(Path::new(""));
    directory.join(DEFAULT_STORE).display().to_string()
}
