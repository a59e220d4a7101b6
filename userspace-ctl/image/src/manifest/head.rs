// SPDX-License-Identifier: GPL-2.0

//! The head of a manifest: its version, the image's size and id, and where the sections lie.

use std::ops::Range;

use crate::digest::{Digest, ImageId};
use crate::error::FormatError;
use crate::wire::Reader;
use crate::{BLOCK_SIZE, DIGESTS_PER_PAGE, MAX_BLOCKS};

pub(super) const MAGIC: [u8; 8] = *b"\x89PRISTM\n";
/// The newest format version that this library reads, and the one that it writes.
pub const FORMAT_VERSION: u32 = 1;
pub(super) const FIXED_LEN: usize = 128;
pub(super) const SECTION_LEN: usize = 64;
/// The head's checksum covers the fixed part up to here, and the section table.
pub(super) const CHECKSUM_AT: usize = 96;
const MAX_SECTIONS: usize = 64;
/// Features that this library knows and that an older one must not ignore.
const KNOWN_INCOMPAT: u64 = 0;

/// Section types. Types from 16 up are optional in version 1 unless their flag says otherwise.
pub mod kind {
    /// Hash, stored length and checksum of each page.
    pub const PAGE_INDEX: u32 = 1;
    /// Packs, and the frames in them.
    pub const FRAMES: u32 = 2;
    /// The pages, one after the other.
    pub const PAGES: u32 = 3;
    /// Facts for people: name, time of creation, file system.
    pub const INFO: u32 = 16;
    /// Reserved: signatures over the image id and the sections 18 to 20.
    pub const SIGNATURES: u32 = 17;
    /// Reserved: channel, generation, expiry, oldest generation allowed.
    pub const RELEASE: u32 = 18;
    /// Reserved: the parent image and what of it is the same.
    pub const PARENT: u32 = 19;
    /// Reserved: file-system hints (type, UUID, order in which a boot needs blocks).
    pub const FS_HINTS: u32 = 20;
    /// The number that the id of an encrypted image is blinded with.
    pub const ENCRYPTION: u32 = 21;
}

pub(super) const FLAG_REQUIRED: u32 = 1;
pub(super) const FLAG_ZSTD: u32 = 2;

/// An entry of the section table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its type, see [`kind`].
    pub kind: u32,
    flags: u32,
    offset: u64,
    stored_len: u64,
    raw_len: u64,
    checksum: Digest,
}

impl Section {
    pub(super) fn new(kind: u32, flags: u32, offset: u64, stored: &[u8], raw_len: u64) -> Self {
        Section {
            kind,
            flags,
            offset,
            stored_len: stored.len() as u64,
            raw_len,
            checksum: Digest::of(stored),
        }
    }

    /// The same section elsewhere in a manifest.
    pub(super) fn moved_to(&self, offset: u64) -> Self {
        Section {
            offset,
            ..self.clone()
        }
    }

    /// The bytes of the manifest that it takes.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.stored_len
    }

    /// Its length once it is unpacked, as claimed.
    pub fn raw_len(&self) -> u64 {
        self.raw_len
    }

    pub(super) fn name(&self) -> String {
        match self.kind {
            kind::PAGE_INDEX => "the manifest's page index".to_owned(),
            kind::FRAMES => "the manifest's frame table".to_owned(),
            kind::PAGES => "the manifest's page section".to_owned(),
            kind::INFO => "the manifest's info section".to_owned(),
            kind::ENCRYPTION => "the manifest's encryption section".to_owned(),
            other => format!("the manifest's section of type {other}"),
        }
    }

    /// Checks the stored bytes without unpacking them.
    ///
    /// # Errors
    /// [`FormatError::Checksum`] or [`FormatError::Truncated`].
    pub fn check(&self, stored: &[u8]) -> Result<(), FormatError> {
        if stored.len() as u64 != self.stored_len {
            return Err(FormatError::Truncated {
                what: "a section of the manifest",
                needed: self.stored_len.saturating_sub(stored.len() as u64),
                have: stored.len() as u64,
            });
        }
        if Digest::of(stored) != self.checksum {
            return Err(FormatError::Checksum(self.name()));
        }
        Ok(())
    }

    /// Fails if the section claims more than `limit` bytes, before anything is read or allocated for it.
    pub(super) fn check_claim(&self, limit: u64) -> Result<(), FormatError> {
        // What does not compress takes a little more than it is.
        let stored_limit = limit.saturating_add(limit / 128 + 512);
        if self.raw_len > limit || self.stored_len > stored_limit {
            let why = format!(
                "it claims {} bytes ({} stored), at most {limit} make sense",
                self.raw_len, self.stored_len
            );
            return Err(FormatError::invalid(self.name(), why));
        }
        Ok(())
    }

    /// Checks the stored bytes and unpacks them; `limit` bounds what the result may take in bytes.
    ///
    /// # Errors
    /// As [`Section::check`], and [`FormatError::Invalid`] for lengths that do not fit.
    pub(super) fn unpack(&self, stored: &[u8], limit: u64) -> Result<Vec<u8>, FormatError> {
        self.check_claim(limit)?;
        self.check(stored)?;
        if self.flags & FLAG_ZSTD == 0 {
            return Ok(stored.to_vec());
        }
        let raw = zstd::bulk::decompress(stored, self.raw_len as usize)
            .map_err(|error| FormatError::invalid(self.name(), format!("zstd says: {error}")))?;
        if raw.len() as u64 != self.raw_len {
            let why = format!("it holds {} bytes, not {}", raw.len(), self.raw_len);
            return Err(FormatError::invalid(self.name(), why));
        }
        Ok(raw)
    }

    fn parse(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(Section {
            kind: reader.u32()?,
            flags: reader.u32()?,
            offset: reader.u64()?,
            stored_len: reader.u64()?,
            raw_len: reader.u64()?,
            checksum: Digest::from_bytes(reader.array()?),
        })
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.kind.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.offset.to_le_bytes());
        out.extend(self.stored_len.to_le_bytes());
        out.extend(self.raw_len.to_le_bytes());
        out.extend(self.checksum.as_bytes());
    }
}

/// The head of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    image: ImageId,
    size: u64,
    file_len: u64,
    sections: Vec<Section>,
}

impl Head {
    /// A prefix of this many bytes holds any head; a manifest may be shorter as a whole.
    pub const MAX_LEN: usize = FIXED_LEN + MAX_SECTIONS * SECTION_LEN;

    /// Parses the head from the first bytes of a manifest ([`Head::MAX_LEN`] of them, or all there are).
    ///
    /// The image id in it is only a claim until [`super::Manifest`] has checked the page hashes against it.
    ///
    /// # Errors
    /// [`FormatError`]: not a manifest, newer, truncated or damaged.
    pub fn parse(prefix: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new("the manifest's head", prefix);
        // The magic first, so that what is no manifest at all is not called a truncated one.
        let have = prefix.len().min(MAGIC.len());
        if prefix[..have] != MAGIC[..have] {
            return Err(FormatError::NotAManifest);
        }
        reader.take(MAGIC.len())?;
        let version = reader.u32()?;
        if version > FORMAT_VERSION {
            return Err(FormatError::NewerVersion {
                found: version,
                supported: FORMAT_VERSION,
            });
        }
        let sections = reader.u32()? as usize;
        let incompat = reader.u64()?;
        let _compat = reader.u64()?;
        let size = reader.u64()?;
        let block_size = reader.u32()?;
        let digests_per_page = reader.u32()?;
        let image = ImageId::from_bytes(reader.array()?);
        let file_len = reader.u64()?;
        let reserved = reader.u64()?;
        let checksum = Digest::from_bytes(reader.array()?);
        if sections > MAX_SECTIONS {
            return Err(reader.invalid(format!("it claims {sections} sections")));
        }
        let table = reader.take(sections * SECTION_LEN)?;
        if head_checksum(&prefix[..CHECKSUM_AT], table) != checksum {
            return Err(FormatError::Checksum("the manifest's head".to_owned()));
        }
        // From here on the fields are what a writer wrote; they still need to make sense.
        if incompat & !KNOWN_INCOMPAT != 0 {
            return Err(FormatError::UnknownFeatures(incompat & !KNOWN_INCOMPAT));
        }
        if version == 0 || reserved != 0 {
            return Err(reader.invalid("version 0 or a reserved field in use"));
        }
        if block_size as usize != BLOCK_SIZE || digests_per_page as usize != DIGESTS_PER_PAGE {
            let why = format!("blocks of {block_size} bytes, {digests_per_page} digests in a page");
            return Err(reader.invalid(why));
        }
        if size == 0 || size % BLOCK_SIZE as u64 != 0 || size / BLOCK_SIZE as u64 > MAX_BLOCKS {
            return Err(reader.invalid(format!("an image of {size} bytes")));
        }
        let mut table = Reader::new("the manifest's section table", table);
        let mut list = Vec::with_capacity(sections);
        let mut end = (FIXED_LEN + sections * SECTION_LEN) as u64;
        for _ in 0..sections {
            let section = Section::parse(&mut table)?;
            check_section(&section, end)?;
            // check_section has excluded an overflow.
            end = section.offset + section.stored_len;
            list.push(section);
        }
        if end != file_len {
            return Err(reader.invalid("its sections do not add up to the manifest"));
        }
        let head = Head {
            image,
            size,
            file_len,
            sections: list,
        };
        for kind in [kind::PAGE_INDEX, kind::FRAMES, kind::PAGES] {
            head.required(kind)?;
        }
        Ok(head)
    }

    pub(super) fn new(image: ImageId, size: u64, sections: Vec<Section>) -> Self {
        let end = sections.last().map_or(0, |section| section.range().end);
        Head {
            image,
            size,
            file_len: end,
            sections,
        }
    }

    pub(super) fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED_LEN + self.sections.len() * SECTION_LEN);
        out.extend(MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((self.sections.len() as u32).to_le_bytes());
        out.extend(KNOWN_INCOMPAT.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend((BLOCK_SIZE as u32).to_le_bytes());
        out.extend((DIGESTS_PER_PAGE as u32).to_le_bytes());
        out.extend(self.image.as_bytes());
        out.extend(self.file_len.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        let mut table = Vec::new();
        for section in &self.sections {
            section.write(&mut table);
        }
        out.extend(head_checksum(&out, &table).as_bytes());
        out.extend(table);
        out
    }

    /// The id that the manifest claims.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// The image's size in bytes, a multiple of the block size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The manifest's length in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// The sections, in the order in which they lie in the file.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The section of a type, if there is one.
    pub fn section(&self, kind: u32) -> Option<&Section> {
        self.sections.iter().find(|section| section.kind == kind)
    }

    pub(super) fn required(&self, kind: u32) -> Result<&Section, FormatError> {
        self.section(kind).ok_or_else(|| {
            FormatError::invalid("the manifest's head", format!("no section of type {kind}"))
        })
    }

    /// Blocks in the image.
    pub fn blocks(&self) -> u64 {
        self.size / BLOCK_SIZE as u64
    }

    /// Pages that list them.
    pub fn pages(&self) -> u64 {
        self.blocks().div_ceil(DIGESTS_PER_PAGE as u64)
    }
}

fn head_checksum(fixed: &[u8], table: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(fixed).update(table);
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// A section must follow the one before without a gap (each byte of the file is covered by a checksum), and
/// must be known if it is required.
fn check_section(section: &Section, end_of_last: u64) -> Result<(), FormatError> {
    let invalid = |why: &str| Err(FormatError::invalid(section.name(), why));
    if section.offset != end_of_last {
        return invalid("it does not begin where the one before ends");
    }
    if section.offset.checked_add(section.stored_len).is_none() {
        return invalid("it is longer than any file");
    }
    let known_kind = matches!(
        section.kind,
        kind::PAGE_INDEX | kind::FRAMES | kind::PAGES | kind::INFO | kind::ENCRYPTION
    );
    let known_flags = section.flags & !(FLAG_REQUIRED | FLAG_ZSTD) == 0;
    if section.flags & FLAG_REQUIRED != 0 && !(known_kind && known_flags) {
        return Err(FormatError::UnknownSection(section.kind));
    }
    if section.flags & FLAG_ZSTD == 0 && section.raw_len != section.stored_len && known_kind {
        return invalid("its two lengths differ");
    }
    Ok(())
}
