// SPDX-License-Identifier: GPL-2.0

//! The header of a qcow2 image, after QEMU's `docs/interop/qcow2.rst`. Numbers are big-endian.
//!
//! What an image of unknown origin must not do - name another file that is to be read - is found here, and what this
//! reader does not read is told with what to do about it.

use crate::error::{Error, Result};
use crate::input::Input;

/// The first bytes of a qcow2 image.
pub(crate) const MAGIC: &[u8] = b"QFI\xfb";
/// The header that all images have, and the fields of version 3 that are used.
const LEN_V2: u64 = 72;
const LEN: u64 = 112;
/// The most bytes of header extensions that are looked through.
const MAX_EXTENSIONS: u64 = 64 << 10;
/// The largest table of tables that QEMU allows.
const MAX_L1: u64 = 32 << 20;
/// The largest disk of which an image can be made.
const MAX_SIZE: u64 = 1 << 44;

/// Incompatible features. Dirty means that reference counts may be wrong, which reading does not use.
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// The header extension that gives the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// The file that holds what an image does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    /// Its name, as it is written in the image.
    pub(crate) name: String,
    /// Its format, if the image says.
    pub(crate) format: Option<String>,
}

/// What is used of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_bits: u32,
    /// The size of the disk, in bytes.
    pub(crate) size: u64,
    /// Where the table of tables is, and how many entries of it the disk needs.
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u64,
    /// Compressed clusters are zstd, not deflate.
    pub(crate) zstd: bool,
    pub(crate) backing: Option<Backing>,
    /// Whether an entry can say that a cluster is zero.
    pub(crate) has_zero_flag: bool,
}

impl Header {
    /// Reads the header of an image.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Damaged`] or [`Error::Unsafe`].
    pub(crate) fn read(input: &Input) -> Result<Self> {
        let name = &input.name;
        let bytes = input.head(LEN)?;
        let damaged = |why: &str| Error::damaged(name, format!("as a qcow2 image: {why}"));
        let u32_at = |at: usize| u32_at(&bytes, at).ok_or_else(|| damaged("its header is cut"));
        let u64_at = |at: usize| u64_at(&bytes, at).ok_or_else(|| damaged("its header is cut"));
        let convert = "convert it: qemu-img convert -O raw IMAGE disk.img";
        let unsupported = |why: &str| Error::unsupported(name, format!("{why}; {convert}"));
        let version = u32_at(4)?;
        if !(2..=3).contains(&version) {
            return Err(unsupported(&format!("it is qcow2 of version {version}")));
        }
        if u32_at(32)? != 0 {
            let why = "it is encrypted; decrypt it with qemu-img convert and the secret, see \
                       qemu-img(1) about --object secret and --image-opts";
            return Err(Error::unsupported(name, why));
        }
        let features = if version >= 3 { u64_at(72)? } else { 0 };
        if features & CORRUPT != 0 {
            return Err(damaged(
                "it is marked as corrupt; repair it: qemu-img check -r all IMAGE",
            ));
        }
        if features & EXTERNAL_DATA != 0 {
            let why = format!("its data lies in another file, which it names; {convert}");
            return Err(Error::refused(name, why));
        }
        if features & EXTENDED_L2 != 0 {
            return Err(unsupported("it has subclusters (extended_l2)"));
        }
        if features & !(DIRTY | COMPRESSION_TYPE) != 0 {
            let why = format!("it has features that are not known (bits {features:#x})");
            return Err(unsupported(&why));
        }
        let kind = bytes.get(104).copied().unwrap_or(0);
        let zstd = features & COMPRESSION_TYPE != 0 && kind == 1;
        if features & COMPRESSION_TYPE != 0 && kind > 1 {
            return Err(unsupported(&format!(
                "its clusters are compressed in a way ({kind}) that is not known"
            )));
        }
        let (cluster_bits, size) = (u32_at(20)?, u64_at(24)?);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(&format!("clusters of 2^{cluster_bits} bytes")));
        }
        if size > MAX_SIZE {
            let why = format!("its disk has {size} bytes, an image has at most 16 TiB");
            return Err(Error::unsupported(name, why));
        }
        // A table of clusters fills a cluster, with 8 bytes for each.
        let l1_entries = size.div_ceil(1 << (2 * cluster_bits - 3));
        let (l1_size, l1_offset) = (u32_at(36)?, u64_at(40)?);
        let end = l1_offset.checked_add(l1_entries * 8);
        if u64::from(l1_size) < l1_entries
            || l1_entries * 8 > MAX_L1
            || end.is_none_or(|end| end > input.bytes.len())
        {
            return Err(damaged(
                "its table of tables does not fit its size; is it cut?",
            ));
        }
        let backing = match u64_at(8)? {
            0 => None,
            at => {
                let start = match version {
                    2 => LEN_V2,
                    _ => u64::from(u32_at(100)?),
                };
                Some(Backing {
                    name: backing_name(input, at, u32_at(16)?)?,
                    format: backing_format(input, start, at)?,
                })
            }
        };
        Ok(Header {
            cluster_bits,
            size,
            l1_offset,
            l1_entries,
            zstd,
            backing,
            has_zero_flag: version >= 3,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .first_chunk()
        .map(|field| u32::from_be_bytes(*field))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..at + 8)?
        .first_chunk()
        .map(|field| u64::from_be_bytes(*field))
}

fn read(input: &Input, at: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    input
        .bytes
        .read_at(at, &mut bytes)
        .map_err(|error| Error::io(format!("read {}", input.name), error))?;
    Ok(bytes)
}

fn backing_name(input: &Input, at: u64, len: u32) -> Result<String> {
    let damaged = || Error::damaged(&input.name, "the name of its backing file is not in it");
    let end = at.checked_add(u64::from(len));
    if len == 0 || len > 1023 || end.is_none_or(|end| end > input.bytes.len()) {
        return Err(damaged());
    }
    String::from_utf8(read(input, at, len.into())?).map_err(|_| damaged())
}

fn backing_format(input: &Input, start: u64, end: u64) -> Result<Option<String>> {
    let end = end
        .min(start.saturating_add(MAX_EXTENSIONS))
        .min(input.bytes.len());
    let bytes = match end.checked_sub(start) {
        Some(len) => read(input, start, len)?,
        None => return Ok(None),
    };
    let mut at = 0;
    while let (Some(kind), Some(len)) = (u32_at(&bytes, at), u32_at(&bytes, at + 4)) {
        let data = bytes
            .get(at + 8..)
            .and_then(|rest| rest.get(..len as usize));
        match (kind, data) {
            (0, _) | (_, None) => break,
            (BACKING_FORMAT, Some(data)) => {
                return Ok(Some(String::from_utf8_lossy(data).into_owned()));
            }
            _ => at += 8 + (len as usize).next_multiple_of(8),
        }
    }
    Ok(None)
}
