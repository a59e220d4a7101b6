// SPDX-License-Identifier: GPL-2.0

//! The members of a tar archive: headers of POSIX (ustar and pax) and of GNU tar, and where the content lies.
//!
//! Single headers are read by the `tar` crate. What several headers say together is read here: attributes in pax
//! headers may hold any bytes, newlines included (capabilities do), and the content of a member is only located, not
//! read.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use crate::error::{Error, Result};
use crate::spool::read_full;

const BLOCK: u64 = 512;
/// The most bytes of a long name, or of a pax header: attributes can be large.
const MAX_EXTENSION: u64 = 1 << 20;
/// The most pieces of a sparse file.
const MAX_PIECES: usize = 1 << 20;

/// The numbers in a header, in octal: mode, owner, group, size, time and device.
const NUMBERS: [Range<usize>; 7] = [
    100..107,
    108..115,
    116..123,
    124..135,
    136..147,
    329..336,
    337..344,
];

/// A member of an archive.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    pub(crate) kind: EntryType,
    /// The target of a link.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    /// Keys and values of the pax headers.
    pub(crate) pax: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The content's length.
    pub(crate) len: u64,
    /// Where it is: offset in the content, offset in the archive, length.
    pub(crate) pieces: Vec<(u64, u64, u64)>,
}

/// Reads members one after the other.
pub(crate) struct Members<R> {
    name: String,
    reader: R,
    /// The archive's length.
    end: u64,
    /// Where the next header is.
    next: u64,
    /// Attributes for all that follow.
    global: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What the headers before a member's own said.
#[derive(Default)]
struct Before {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
    any: bool,
}

impl<R: Read + Seek> Members<R> {
    /// The archive of `end` bytes in `reader`; `name` is for messages.
    pub(crate) fn new(reader: R, end: u64, name: &str) -> Self {
        Members {
            name: name.to_owned(),
            reader,
            end,
            next: 0,
            global: BTreeMap::new(),
        }
    }

    fn damaged(&self, why: impl Into<String>) -> Error {
        let why = why.into();
        Error::damaged(
            &self.name,
            format!("as a tar archive, at byte {}: {why}", self.next),
        )
    }

    /// Bytes of the archive that are done.
    pub(crate) fn position(&self) -> u64 {
        self.next.min(self.end)
    }

    /// The next member; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Damaged`], and those of the reader.
    pub(crate) fn next(&mut self) -> Result<Option<Member>> {
        let mut before = Before::default();
        loop {
            let Some(header) = self.header()? else {
                if before.any {
                    return Err(self.damaged("it ends after a header that announces a member"));
                }
                return Ok(None);
            };
            let kind = header.entry_type();
            let mut size = header
                .entry_size()
                .map_err(|error| self.damaged(error.to_string()))?;
            if kind.is_gnu_longname() || kind.is_gnu_longlink() {
                let mut text = self.extension(size)?;
                text.truncate(
                    text.iter()
                        .position(|&byte| byte == 0)
                        .unwrap_or(text.len()),
                );
                let slot = match kind.is_gnu_longname() {
                    true => &mut before.name,
                    false => &mut before.link,
                };
                *slot = Some(text);
                before.any = true;
                continue;
            }
            if kind.is_pax_local_extensions() || kind.is_pax_global_extensions() {
                let bytes = self.extension(size)?;
                let map = match kind.is_pax_local_extensions() {
                    true => &mut before.pax,
                    false => &mut self.global,
                };
                let parsed = parse_pax(&bytes, map);
                parsed.map_err(|why| self.damaged(why))?;
                before.any |= kind.is_pax_local_extensions();
                continue;
            }
            let mut pax = self.global.clone();
            pax.append(&mut before.pax);
            if let Some(own) = number(&pax, b"size").map_err(|why| self.damaged(why))? {
                size = own;
            }
            // Links and directories have no content, whatever they say of a size.
            let plain = matches!(
                kind,
                EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse
            );
            if !plain && !matches!(kind, EntryType::Link) && is_known(kind) {
                size = 0;
            }
            let mut member = self.member(&header, before.name, before.link, pax)?;
            if kind == EntryType::Link && !member.pax.contains_key(&b"size"[..]) {
                size = 0;
            }
            self.content(&mut member, &header, size)?;
            return Ok(Some(member));
        }
    }

    fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<usize> {
        let fail = |name: &str, error: io::Error| Error::io(format!("read {name}"), error);
        self.reader
            .seek(SeekFrom::Start(at))
            .map_err(|error| fail(&self.name, error))?;
        read_full(&mut self.reader, buffer).map_err(|error| fail(&self.name, error))
    }

    /// The header at the next place.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut block = [0; BLOCK as usize];
        let len = self.read(self.next, &mut block)?;
        // Two blocks of zeros end an archive; some end without.
        if len == 0 || (len == block.len() && block.iter().all(|&byte| byte == 0)) {
            if len == 0 && self.next > self.end {
                return Err(self.damaged("it is cut"));
            }
            return Ok(None);
        }
        if len < block.len() {
            return Err(self.damaged("it is cut"));
        }
        let mut header = Header::from_byte_slice(&block).clone();
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        let own: u32 = block[148..156].iter().map(|&byte| u32::from(byte)).sum();
        if header.cksum().ok() != Some(sum - own + 8 * u32::from(b' ')) {
            return Err(self.damaged("the checksum of a header is wrong"));
        }
        for field in NUMBERS {
            // Some programs leave out what is zero.
            let field = &mut header.as_mut_bytes()[field];
            if field.iter().all(|&byte| byte == 0 || byte == b' ') {
                field.fill(b'0');
            }
        }
        self.next += BLOCK;
        Ok(Some(header))
    }

    /// The content of a header that is about the next member.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(self.damaged(format!("a header of {size} bytes")));
        }
        let mut bytes = vec![0; size as usize];
        if self.read(self.next, &mut bytes)? < bytes.len() {
            return Err(self.damaged("it is cut"));
        }
        self.next += size.next_multiple_of(BLOCK);
        Ok(bytes)
    }

    fn member(
        &self,
        header: &Header,
        name: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
        pax: BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<Member> {
        let field =
            |result: io::Result<u64>| result.map_err(|error| self.damaged(error.to_string()));
        let by_pax = |key: &[u8]| number(&pax, key).map_err(|why| self.damaged(why));
        let uid = match by_pax(b"uid")? {
            Some(uid) => uid,
            None => field(header.uid())?,
        };
        let gid = match by_pax(b"gid")? {
            Some(gid) => gid,
            None => field(header.gid())?,
        };
        let mtime = match pax.get(&b"mtime"[..]) {
            Some(text) => time(text).ok_or_else(|| self.damaged("a time that is none"))?,
            None => (field(header.mtime())? as i64, 0),
        };
        let number = |result: io::Result<Option<u32>>| {
            let result = result.map_err(|error| self.damaged(error.to_string()));
            result.map(|value| value.unwrap_or(0))
        };
        let is_device = matches!(header.entry_type(), EntryType::Char | EntryType::Block);
        let device = match is_device {
            true => (
                number(header.device_major())?,
                number(header.device_minor())?,
            ),
            false => (0, 0),
        };
        let own = |key: &[u8]| pax.get(key).cloned();
        let path = own(b"GNU.sparse.name").or_else(|| own(b"path")).or(name);
        let link = own(b"linkpath").or(link);
        let header_link = || header.link_name_bytes().map(|link| link.into_owned());
        Ok(Member {
            name: path.unwrap_or_else(|| header.path_bytes().into_owned()),
            kind: header.entry_type(),
            link: link.or_else(header_link).unwrap_or_default(),
            mode: header
                .mode()
                .map_err(|error| self.damaged(error.to_string()))?
                & 0o7777,
            uid,
            gid,
            mtime,
            device,
            pax,
            len: 0,
            pieces: Vec::new(),
        })
    }

    /// Finds a member's content, and the header after it.
    fn content(&mut self, member: &mut Member, header: &Header, stored: u64) -> Result<()> {
        let mut map = Vec::new();
        if let Some(gnu) = header
            .as_gnu()
            .filter(|_| member.kind == EntryType::GNUSparse)
        {
            self.old_sparse(gnu.sparse.as_slice(), &mut map)?;
            let mut extended = gnu.is_extended();
            while extended {
                let mut block = GnuExtSparseHeader::new();
                if self.read(self.next, block.as_mut_bytes())? < BLOCK as usize {
                    return Err(self.damaged("it is cut"));
                }
                self.next += BLOCK;
                self.old_sparse(block.sparse.as_slice(), &mut map)?;
                extended = block.is_extended();
            }
            let len = gnu.real_size();
            member.len = len.map_err(|error| self.damaged(error.to_string()))?;
        }
        let start = self.next;
        let end = stored
            .checked_next_multiple_of(BLOCK)
            .and_then(|len| start.checked_add(len))
            .filter(|_| start.checked_add(stored).is_some_and(|end| end <= self.end))
            .ok_or_else(|| self.damaged("it ends in the middle of a file; it is cut"))?;
        let mut data = start;
        let version = |key: &[u8]| number(&member.pax, key).ok().flatten();
        match (version(b"GNU.sparse.major"), version(b"GNU.sparse.minor")) {
            (Some(1), Some(0)) => {
                let real = number(&member.pax, b"GNU.sparse.realsize");
                let real = real.map_err(|why| self.damaged(why))?;
                member.len = real.ok_or_else(|| self.damaged("a sparse file without a size"))?;
                data = self.new_sparse(start, start + stored, &mut map)?;
            }
            (None, None) if member.pax.keys().any(|key| key.starts_with(b"GNU.sparse.")) => {
                let why = "it has a sparse file in an old form; make it again with tar --sparse-version=1.0";
                return Err(Error::unsupported(&self.name, why));
            }
            _ if member.kind == EntryType::GNUSparse => {}
            _ => {
                member.len = stored;
                map.push((0, stored));
            }
        }
        let mut at = 0;
        for (offset, len) in map {
            let fits = offset >= at
                && offset.checked_add(len).is_some_and(|end| end <= member.len)
                && data
                    .checked_add(len)
                    .is_some_and(|end| end <= start + stored);
            if !fits {
                return Err(self.damaged("the pieces of a sparse file do not fit it"));
            }
            at = offset + len;
            if len > 0 {
                member.pieces.push((offset, data, len));
            }
            data += len;
        }
        self.next = end;
        Ok(())
    }

    fn old_sparse(&self, entries: &[GnuSparseHeader], map: &mut Vec<(u64, u64)>) -> Result<()> {
        for entry in entries.iter().filter(|entry| !entry.is_empty()) {
            let field = |result: io::Result<u64>| result.map_err(|e| self.damaged(e.to_string()));
            map.push((field(entry.offset())?, field(entry.length())?));
        }
        if map.len() > MAX_PIECES {
            return Err(self.damaged("a sparse file of too many pieces"));
        }
        Ok(())
    }

    /// Reads the map at the beginning of a sparse file: decimal numbers, one a line. Returns where the data begins.
    fn new_sparse(&mut self, start: u64, end: u64, map: &mut Vec<(u64, u64)>) -> Result<u64> {
        let mut at = start;
        let mut numbers: Vec<u64> = Vec::new();
        let mut digits: Option<u64> = None;
        let wanted = |numbers: &[u64]| match numbers.first() {
            Some(&count) if count > MAX_PIECES as u64 => None,
            Some(&count) => Some(1 + 2 * count as usize),
            None => Some(1),
        };
        loop {
            let wrong = || self.damaged("the map of a sparse file is wrong");
            let wanted = wanted(&numbers).ok_or_else(wrong)?;
            if numbers.len() == wanted {
                break;
            }
            let mut block = [0; BLOCK as usize];
            if at + BLOCK > end || self.read(at, &mut block)? < block.len() {
                return Err(self.damaged("the map of a sparse file is cut"));
            }
            at += BLOCK;
            for &byte in &block {
                if numbers.len() > 2 * MAX_PIECES {
                    break;
                }
                match byte {
                    b'0'..=b'9' => {
                        let digit = u64::from(byte - b'0');
                        let value = digits.unwrap_or(0).checked_mul(10);
                        let value = value.and_then(|value| value.checked_add(digit));
                        let wrong = || self.damaged("the map of a sparse file is wrong");
                        digits = Some(value.ok_or_else(wrong)?);
                    }
                    b'\n' => numbers.extend(digits.take()),
                    // The rest of the block.
                    0 => break,
                    _ => return Err(self.damaged("the map of a sparse file is wrong")),
                }
            }
        }
        for pair in numbers.get(1..).unwrap_or_default().chunks_exact(2) {
            map.push((pair[0], pair[1]));
        }
        Ok(at)
    }
}

/// Kinds whose headers say all.
fn is_known(kind: EntryType) -> bool {
    matches!(
        kind,
        EntryType::Directory
            | EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Fifo
    )
}

/// Reads records `length key=value\n`, where the length is that of the whole record.
fn parse_pax(
    mut bytes: &[u8],
    map: &mut BTreeMap<Vec<u8>, Vec<u8>>,
) -> std::result::Result<(), &'static str> {
    let wrong = "a pax header is malformed";
    // GNU tar pads with zeros.
    while bytes.first().is_some_and(|&byte| byte != 0) {
        let space = bytes.iter().position(|&byte| byte == b' ').ok_or(wrong)?;
        let len: usize = bytes
            .get(..space)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| digits.parse().ok())
            .ok_or(wrong)?;
        let (record, rest) = bytes.split_at_checked(len).ok_or(wrong)?;
        let body = record
            .get(space + 1..)
            .and_then(|body| body.strip_suffix(b"\n"));
        let body = body.ok_or(wrong)?;
        let equals = body.iter().position(|&byte| byte == b'=').ok_or(wrong)?;
        let (key, value) = (body[..equals].to_vec(), body[equals + 1..].to_vec());
        // An empty value takes back what was said before.
        match value.is_empty() && !key.starts_with(b"SCHILY.xattr.") {
            true => map.remove(&key),
            false => map.insert(key, value),
        };
        bytes = rest;
    }
    Ok(())
}

fn number(
    pax: &BTreeMap<Vec<u8>, Vec<u8>>,
    key: &[u8],
) -> std::result::Result<Option<u64>, &'static str> {
    let Some(text) = pax.get(key) else {
        return Ok(None);
    };
    let value = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    value
        .map(Some)
        .ok_or("a pax header has a number that is none")
}

/// Seconds with a fraction.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanos: u32 = digits.parse().ok()?;
    match whole.starts_with('-') && nanos > 0 {
        true => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
        false => Some((seconds, nanos)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_values_hold_any_bytes() {
        let mut map = BTreeMap::new();
        parse_pax(b"24 SCHILY.xattr.a=\n\x00\n=x\n9 uid=77\n\0\0", &mut map).unwrap();
        assert_eq!(map[&b"SCHILY.xattr.a"[..]], b"\n\x00\n=x");
        assert_eq!(number(&map, b"uid"), Ok(Some(77)));
        parse_pax(b"7 uid=\n", &mut map).unwrap();
        assert_eq!(number(&map, b"uid"), Ok(None));
        for bad in [
            &b"9999 a=b\n"[..],
            b"5 a=b",
            b"x a=b\n",
            b"6 abcd\n",
            b"0 a=b\n",
        ] {
            assert!(parse_pax(bad, &mut map).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(b"1700000000.5"), Some((1_700_000_000, 500_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"x"), None);
    }
}
