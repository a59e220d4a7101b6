// SPDX-License-Identifier: GPL-2.0

//! Making a manifest that of an encrypted image: its id then says nothing of the content.

use super::head::{kind, Head, Section, FLAG_REQUIRED, SECTION_LEN};
use super::Manifest;
use crate::digest::ImageId;
use crate::error::FormatError;
use crate::merkle::{self, Blinding};

/// Bytes of the encryption section.
pub(super) const LEN: u64 = 32;

/// Reads the encryption section.
pub(super) fn parse(raw: &[u8]) -> Result<Blinding, FormatError> {
    let wrong =
        |_| FormatError::invalid("the manifest's encryption section", "its length is wrong");
    raw.try_into().map_err(wrong)
}

/// A whole manifest with its id blinded; all else stays as it is. Returns the new id and the new manifest.
///
/// # Errors
/// [`FormatError`] for a manifest that is damaged, or blinded already.
pub fn blind(bytes: &[u8], blinding: &Blinding) -> Result<(ImageId, Vec<u8>), FormatError> {
    let manifest = Manifest::parse(bytes, None)?;
    if manifest.blinding().is_some() {
        let why = "the image is an encrypted one already";
        return Err(FormatError::invalid("the manifest", why));
    }
    let image = merkle::blinded(&manifest.image(), blinding);
    let head = manifest.head();
    let mut sections = Vec::with_capacity(head.sections().len() + 1);
    let mut body = Vec::with_capacity(bytes.len());
    let shift = SECTION_LEN as u64;
    for section in head.sections() {
        let range = section.range();
        let stored = bytes.get(range.start as usize..range.end as usize);
        body.extend_from_slice(stored.unwrap_or_default());
        sections.push(section.moved_to(range.start + shift));
    }
    let end = head.file_len() + shift;
    let own = Section::new(kind::ENCRYPTION, FLAG_REQUIRED, end, blinding, LEN);
    sections.push(own);
    body.extend_from_slice(blinding);
    let mut out = Head::new(image, head.size(), sections).write();
    out.extend(body);
    Manifest::parse(&out, Some(&image))?;
    Ok((image, out))
}
