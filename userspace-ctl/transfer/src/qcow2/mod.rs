// SPDX-License-Identifier: GPL-2.0

//! qcow2 images, read in place: local, behind a web server, or within a compressed file.
//!
//! A table of tables (L1) and tables (L2) say for each cluster of the disk where it is: in the file, compressed, zero,
//! or in the backing file. A backing file is read only when the caller asks for it. (The crates that read qcow2 want a
//! newer compiler, or a local file; nothing of what only writing needs is here.)

mod header;

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::{Decompress, FlushDecompress, Status};
use pristine_image::{RawFile, ReadAt};

pub(crate) use header::{Header, MAGIC};

use crate::cache::PieceCache;
use crate::error::{Error, Result};
use crate::input::Input;

/// Images on images.
const MAX_CHAIN: u32 = 16;
/// Tables and unpacked clusters that are kept, in bytes.
const KEEP: u64 = 16 << 20;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Where a cluster of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    /// Nowhere: what the backing file has there, or zero.
    Missing,
    Zero,
    /// At an offset in the file.
    Plain(u64),
    /// At an offset in the file, in at most so many bytes.
    Compressed(u64, u64),
}

/// The disk in a qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2Image {
    input: Input,
    header: Header,
    l1: Vec<u64>,
    tables: PieceCache,
    clusters: PieceCache,
    backing: Option<Box<dyn ReadAt>>,
}

impl Qcow2Image {
    /// Opens an image; `path` is where it is, if it is a local file. A backing file is read if `follow` says so.
    ///
    /// # Errors
    /// [`Error::Unsafe`] for a backing file that is not to be read, [`Error::Unsupported`], [`Error::Damaged`].
    pub(crate) fn open(input: Input, path: Option<&Path>, follow: bool) -> Result<Self> {
        Self::open_level(input, path, follow, 0)
    }

    fn open_level(input: Input, path: Option<&Path>, follow: bool, level: u32) -> Result<Self> {
        let header = Header::read(&input)?;
        let backing = match &header.backing {
            None => None,
            Some(backing) if !follow => {
                let why = format!(
                    "it refers to another file, {:?}, for what it does not hold itself. If you trust it, read both \
                     with --follow-backing; or flatten it: qemu-img convert -O raw IMAGE disk.img",
                    backing.name
                );
                return Err(Error::refused(&input.name, why));
            }
            Some(backing) => Some(open_backing(&input, path, backing, level)?),
        };
        let mut bytes = vec![0; (header.l1_entries * 8) as usize];
        input
            .bytes
            .read_at(header.l1_offset, &mut bytes)
            .map_err(|error| Error::io(format!("read {}", input.name), error))?;
        let l1 = bytes.chunks_exact(8).map(entry).collect();
        Ok(Qcow2Image {
            input,
            header,
            l1,
            tables: PieceCache::new(KEEP),
            clusters: PieceCache::new(KEEP),
            backing,
        })
    }

    fn damaged(&self, why: &str) -> io::Error {
        Error::damaged(&self.input.name, format!("as a qcow2 image: {why}")).into()
    }

    fn cluster_len(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Reads bytes of the file that one of its tables refers to.
    fn read_file(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.input.bytes.len()) {
            return Err(self.damaged("it refers to bytes beyond its end; it is cut"));
        }
        self.input.bytes.read_at(at, buffer)
    }

    /// Where the cluster with this number is.
    fn cluster(&self, number: u64) -> io::Result<Cluster> {
        let bits = self.header.cluster_bits - 3;
        let table = self.l1.get((number >> bits) as usize).copied();
        let table = table.unwrap_or(0) & OFFSET;
        if table == 0 {
            return Ok(Cluster::Missing);
        }
        if table % self.cluster_len() != 0 {
            return Err(self.damaged("a table does not lie on a cluster"));
        }
        let content = self.tables.get(table, || {
            let mut content = vec![0; self.cluster_len() as usize];
            self.read_file(table, &mut content)?;
            Ok(content)
        })?;
        let at = (number & ((1 << bits) - 1)) as usize * 8;
        let value = content.get(at..at + 8).map_or(0, entry);
        if value & COMPRESSED != 0 {
            // The lower bits are the offset, those above count sectors after the first.
            let split = 62 - (self.header.cluster_bits - 8);
            let offset = value & ((1 << split) - 1);
            let sectors = ((value & (COMPRESSED - 1)) >> split) + 1;
            return Ok(Cluster::Compressed(offset, sectors * 512 - offset % 512));
        }
        let offset = value & OFFSET;
        if self.header.has_zero_flag && value & ZERO != 0 {
            return Ok(Cluster::Zero);
        }
        if offset % self.cluster_len() != 0 {
            return Err(self.damaged("a cluster does not lie where clusters do"));
        }
        Ok(match offset {
            0 => Cluster::Missing,
            offset => Cluster::Plain(offset),
        })
    }

    fn unpack(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        // What is said is rounded up to sectors, the file may end before.
        let there = self.input.bytes.len().saturating_sub(offset).min(len);
        let mut stored = vec![0; there as usize];
        self.read_file(offset, &mut stored)?;
        let mut content = vec![0; self.cluster_len() as usize];
        let good = match self.header.zstd {
            true => zstd::stream::Decoder::new(stored.as_slice())
                .and_then(|decoder| decoder.single_frame().read_exact(&mut content))
                .is_ok(),
            false => inflate(&stored, &mut content),
        };
        match good {
            true => Ok(content),
            false => Err(self.damaged("a compressed cluster does not unpack to a cluster")),
        }
    }

    fn read_backing(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let Some(backing) = &self.backing else {
            return Ok(());
        };
        let there = backing.len().saturating_sub(at).min(buffer.len() as u64);
        backing.read_at(at, &mut buffer[..there as usize])
    }
}

/// Unpacks raw deflate that must fill `content`; what follows it is not looked at.
fn inflate(stored: &[u8], content: &mut [u8]) -> bool {
    let mut decoder = Decompress::new(false);
    let status = decoder.decompress(stored, content, FlushDecompress::Finish);
    // With the output full, there may be nothing left but the end of the stream.
    matches!(
        status,
        Ok(Status::StreamEnd | Status::Ok | Status::BufError)
    ) && decoder.total_out() == content.len() as u64
}

fn entry(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk()
        .map_or(0, |field| u64::from_be_bytes(*field))
}

fn open_backing(
    input: &Input,
    path: Option<&Path>,
    backing: &header::Backing,
    level: u32,
) -> Result<Box<dyn ReadAt>> {
    let refuse = |why: String| Err(Error::refused(&input.name, why));
    let name = &backing.name;
    let Some(path) = path else {
        return refuse(format!(
            "it refers to {name:?}, and is no local file itself; download both"
        ));
    };
    if level + 1 >= MAX_CHAIN {
        return refuse(format!("more than {MAX_CHAIN} images refer to each other"));
    }
    let name = name.strip_prefix("file:").unwrap_or(name);
    if name.starts_with("json:") || name.split_once(':').is_some_and(|(p, _)| !p.contains('/')) {
        return refuse(format!(
            "its backing file {name:?} is not a local file; flatten it with qemu-img convert"
        ));
    }
    // Relative to the image, as it was made.
    let directory = path.parent().unwrap_or(Path::new(""));
    let found: PathBuf = directory.join(name);
    let file = Input {
        name: found.display().to_string(),
        bytes: Arc::new(RawFile::open(&found)?),
    };
    let is_qcow2 = match backing.format.as_deref() {
        Some("raw") => false,
        Some("qcow2") => true,
        Some(other) => return refuse(format!("its backing file is of format {other:?}")),
        None => file.head(4)? == MAGIC,
    };
    match is_qcow2 {
        true => Ok(Box::new(Qcow2Image::open_level(
            file,
            Some(&found),
            true,
            level + 1,
        )?)),
        false => Ok(Box::new(RawFile::open(&found)?)),
    }
}

impl ReadAt for Qcow2Image {
    fn len(&self) -> u64 {
        self.header.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let end = end.filter(|&end| end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let cluster_len = self.cluster_len();
        let mut at = offset;
        let mut rest = buffer;
        while at < end {
            let first = self.cluster(at / cluster_len)?;
            let within = at % cluster_len;
            let mut len = (cluster_len - within).min(end - at);
            if let Cluster::Plain(place) = first {
                // Clusters that follow each other in the file too are read at once.
                while at + len < end {
                    let next = Cluster::Plain(place + within + len);
                    if self.cluster((at + len) / cluster_len)? != next {
                        break;
                    }
                    len = (len + cluster_len).min(end - at);
                }
            }
            let (part, after) = rest.split_at_mut(len as usize);
            match first {
                Cluster::Missing => self.read_backing(at, part)?,
                Cluster::Zero => part.fill(0),
                Cluster::Plain(place) => self.read_file(place + within, part)?,
                Cluster::Compressed(place, stored) => {
                    let content = self.clusters.get(place, || self.unpack(place, stored))?;
                    let from = within as usize;
                    part.copy_from_slice(content.get(from..from + part.len()).unwrap_or_default());
                }
            }
            rest = after;
            at += len;
        }
        Ok(())
    }

    fn is_hole(&self, range: Range<u64>) -> bool {
        let cluster_len = self.cluster_len();
        let last = range.end.saturating_sub(1) / cluster_len;
        (range.start / cluster_len..=last).all(|number| match self.cluster(number) {
            Ok(Cluster::Zero) => true,
            Ok(Cluster::Missing) => match &self.backing {
                None => true,
                Some(backing) => {
                    let start = (number * cluster_len).min(backing.len());
                    let end = (start + cluster_len).min(backing.len());
                    start == end || backing.is_hole(start..end)
                }
            },
            _ => false,
        })
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.input.bytes.is_unchanged()
    }
}
