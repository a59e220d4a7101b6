// SPDX-License-Identifier: GPL-2.0

//! Images whose blocks stay in a file that somebody else publishes: a cloud image as a multi-block .xz, say.
//!
//! Such an image has an ordinary manifest. Its packs are virtual ([`pack`]): what they hold follows from the disk. In
//! place of each pack the store has a *reference* (`packs/<xx>/<pack>.ref`), a few lines of text that say which part of
//! which disk the pack is:
//!
//! ```text
//! pristine-reference 1
//! source https://example.org/debian-13.raw.xz
//! size 3221225472
//! start 67108864
//! blocks 16384
//! ```
//!
//! `size` is that of the disk that the source holds, in bytes; a source of another size was changed. [`ReferenceStore`]
//! puts in place of a missing pack the bytes that its reference leads to: a block of an .xz file then costs one range
//! request. Nothing else knows of references; who reads an image verifies each block as ever.
//!
//! A reference in a store behind a web server can only lead to a URL, not to a file of the machine that reads it.

mod build;
mod pack;
mod store;

use std::fmt::Write;

use pristine_store::Error as StoreError;

pub use build::{build_reference, Referenced};
use pack::{VirtualPack, PACK_BLOCKS};
pub use store::ReferenceStore;

/// The longest reference.
const MAX_LEN: u64 = 8 << 10;
const FIRST_LINE: &str = "pristine-reference 1";

/// What a pack is a part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Where the disk is: a URL, or an absolute path.
    pub source: String,
    /// The disk's size in bytes.
    pub size: u64,
    /// Where the pack's first block begins on the disk, in bytes.
    pub start: u64,
    /// Blocks in the pack.
    pub blocks: u64,
}

impl Reference {
    /// As text.
    pub fn encode(&self) -> String {
        let mut text = format!("{FIRST_LINE}\nsource {}\n", self.source);
        for (key, value) in [
            ("size", self.size),
            ("start", self.start),
            ("blocks", self.blocks),
        ] {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{key} {value}");
        }
        text
    }

    /// From text.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(text).map_err(|_| "it is not text")?;
        let mut lines = text.strip_suffix('\n').ok_or("it is cut")?.split('\n');
        if lines.next() != Some(FIRST_LINE) {
            return Err(format!("it does not begin with {FIRST_LINE:?}"));
        }
        let mut field = |key: &str| {
            let line = lines.next().and_then(|line| line.strip_prefix(key));
            let value = line.and_then(|line| line.strip_prefix(' '));
            value.ok_or_else(|| format!("it has no {key}"))
        };
        let source = field("source")?.to_owned();
        let mut number = |key: &str| {
            let value = field(key)?;
            let number = value.parse::<u64>().ok().filter(|n| n.to_string() == value);
            number.ok_or_else(|| format!("its {key} is no number"))
        };
        let reference = Reference {
            source,
            size: number("size")?,
            start: number("start")?,
            blocks: number("blocks")?,
        };
        if lines.next().is_some() {
            return Err("lines follow its end".to_owned());
        }
        let pack = reference.pack();
        let end = pack
            .start
            .checked_add(pack.blocks * pristine_image::BLOCK_SIZE as u64);
        let inside = end.is_some_and(|end| end <= reference.size.next_multiple_of(4096));
        let sane = (1..=PACK_BLOCKS).contains(&pack.blocks) && pack.start % 4096 == 0;
        let source = reference.source.as_str();
        if !sane || !inside || reference.size > 1 << 44 || source.chars().any(char::is_control) {
            return Err("it refers to a part that no disk has".to_owned());
        }
        Ok(reference)
    }

    fn pack(&self) -> VirtualPack {
        VirtualPack {
            start: self.start,
            blocks: self.blocks.min(PACK_BLOCKS + 1),
        }
    }
}

fn store_error(location: &str, object: &str, why: impl Into<String>) -> StoreError {
    StoreError::Protocol {
        location: location.to_owned(),
        object: object.to_owned(),
        why: why.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_round_trip() {
        let reference = Reference {
            source: "https://example.org/a b.xz".to_owned(),
            size: 100 << 20,
            start: 64 << 20,
            blocks: 9216,
        };
        let text = reference.encode();
        assert_eq!(Reference::parse(text.as_bytes()), Ok(reference));
        for (from, to) in [
            ("reference 1", "reference 2"),
            ("source ", "origin "),
            ("blocks 9216", "blocks 9217"),
            ("blocks 9216", "blocks 0"),
            ("blocks 9216", "blocks 18446744073709551615"),
            ("start 67108864", "start 67108865"),
            ("start 67108864", "start 18446744073709547520"),
            ("size 1", "size 01"),
            ("size 1", "size 99999999999999991"),
            ("a b", "a\tb"),
            ("9216\n", "9216\nmore\n"),
            ("9216\n", "9216"),
        ] {
            let bad = text.replace(from, to);
            assert_ne!(bad, text, "{from}");
            assert!(Reference::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
