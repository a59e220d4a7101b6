// SPDX-License-Identifier: GPL-2.0

//! The grammar of the table line.
//!
//! ```text
//! <start> <length> pristine <data> <metadata> [<#words> <feature>...]
//!
//!   data        the data device, as a path or major:minor
//!   metadata    the metadata device, or "-" for the reserved tail of the data device
//!   feature     hot_extents <n>      most extents with a live intent, 16..=65536 (default 256)
//!               checkpoint_ms <n>    longest time a change waits for a checkpoint, 0 for never (default 5000)
//!               fetch_timeout_ms <n> longest time a read waits for the helper before it fails, 0 (the default) for
//!                                    as long as it takes
//!               meta_uuid <hex>      refuse other metadata than this
//!               image <hex>          refuse metadata of another image than this
//!               generation <n>       refuse metadata of another generation than this
//!               grow <0|1>           1: the data device or the target may be larger than the metadata says; it is made to
//!                                    fit when the table becomes active (default 0: what does not fit is refused)
//! ```
//!
//! `#words` counts the words that follow, names and values alike. Block and extent size are properties of the
//! metadata, not of the table.

use core::fmt;

use super::superblock::{ImageId, Uuid};

/// Default for `hot_extents`.
pub const DEFAULT_HOT_EXTENTS: u32 = 256;
/// Default for `checkpoint_ms`.
pub const DEFAULT_CHECKPOINT_MS: u32 = 5000;

/// Why a table line is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableError {
    /// Fewer words than the grammar needs.
    MissingDevices,
    /// The count of feature words is not a number or not the number of words that follow.
    BadCount,
    /// A feature that does not exist.
    UnknownFeature,
    /// A feature without its value, or given twice.
    BadFeature,
    /// A value outside its range.
    BadValue,
}

impl TableError {
    /// The text for `ti->error`.
    pub const fn message(self) -> &'static core::ffi::CStr {
        match self {
            Self::MissingDevices => c"Need a data device and a metadata device (or -)",
            Self::BadCount => c"Feature word count does not match the words that follow",
            Self::UnknownFeature => c"Unknown feature",
            Self::BadFeature => c"Feature without value or given twice",
            Self::BadValue => c"Feature value out of range",
        }
    }
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message().to_str().unwrap_or("bad table line"))
    }
}

impl core::error::Error for TableError {}

/// A parsed table line, without start, length and target name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table<'a> {
    /// The data device.
    pub data: &'a str,
    /// The metadata device, or `None` for the reserved tail.
    pub metadata: Option<&'a str>,
    /// The features.
    pub features: Features,
}

/// The features of a table line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Most extents with a live intent.
    pub hot_extents: u32,
    /// Longest time in ms that a change waits for a checkpoint; 0 for never.
    pub checkpoint_ms: u32,
    /// Longest time in ms that a read waits for the helper; 0 for as long as it takes.
    pub fetch_timeout_ms: u32,
    /// The metadata's UUID, if it was given.
    pub meta_uuid: Option<Uuid>,
    /// The image, if it was given.
    pub image: Option<ImageId>,
    /// The generation, if it was given.
    pub generation: Option<u64>,
    /// Whether the metadata grows to the size of the target and of the data device.
    pub grow: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            hot_extents: DEFAULT_HOT_EXTENTS,
            checkpoint_ms: DEFAULT_CHECKPOINT_MS,
            fetch_timeout_ms: 0,
            meta_uuid: None,
            image: None,
            generation: None,
            grow: false,
        }
    }
}

/// The bytes that `text` spells in hexadecimal, two digits each and nothing else.
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != N * 2 {
        return None;
    }
    let digit = |b: u8| {
        char::from(b)
            .to_digit(16)
            .and_then(|d| u8::try_from(d).ok())
    };
    let mut bytes = [0; N];
    for (to, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = *<&[u8; 2]>::try_from(pair).ok()?;
        *to = (digit(high)? << 4) | digit(low)?;
    }
    Some(bytes)
}

/// Bytes shown in hexadecimal.
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl<'a> Table<'a> {
    /// Parses the words after the target name.
    pub fn parse(words: impl IntoIterator<Item = &'a str>) -> Result<Self, TableError> {
        let mut words = words.into_iter();
        let data = words.next().ok_or(TableError::MissingDevices)?;
        let metadata = words.next().ok_or(TableError::MissingDevices)?;
        let mut features = Features::default();
        let count: usize = match words.next() {
            None => 0,
            Some(n) => n.parse().map_err(|_| TableError::BadCount)?,
        };
        let mut seen = 0;
        let mut known = 0u8;
        while let Some(name) = words.next() {
            let slot = match name {
                "hot_extents" => 0,
                "checkpoint_ms" => 1,
                "meta_uuid" => 2,
                "image" => 3,
                "generation" => 4,
                "fetch_timeout_ms" => 5,
                "grow" => 6,
                _ => return Err(TableError::UnknownFeature),
            };
            if known & (1 << slot) != 0 {
                return Err(TableError::BadFeature);
            }
            known |= 1 << slot;
            let value = words.next().ok_or(TableError::BadFeature)?;
            features.set(name, value)?;
            seen += 2;
        }
        if seen != count {
            return Err(TableError::BadCount);
        }
        Ok(Self {
            data,
            metadata: (metadata != "-").then_some(metadata),
            features,
        })
    }
}

impl Features {
    fn set(&mut self, name: &str, value: &str) -> Result<(), TableError> {
        let bad = TableError::BadValue;
        match name {
            "hot_extents" => {
                self.hot_extents = value.parse().map_err(|_| bad)?;
                if !(16..=65536).contains(&self.hot_extents) {
                    return Err(bad);
                }
            }
            "checkpoint_ms" => {
                self.checkpoint_ms = value.parse().map_err(|_| bad)?;
                if self.checkpoint_ms > 3_600_000 {
                    return Err(bad);
                }
            }
            "fetch_timeout_ms" => {
                self.fetch_timeout_ms = value.parse().map_err(|_| bad)?;
                if self.fetch_timeout_ms > 3_600_000 {
                    return Err(bad);
                }
            }
            "meta_uuid" => self.meta_uuid = Some(parse_hex(value).ok_or(bad)?),
            "image" => self.image = Some(parse_hex(value).ok_or(bad)?),
            "generation" => self.generation = Some(value.parse().map_err(|_| bad)?),
            "grow" => {
                self.grow = match value {
                    "0" => false,
                    "1" => true,
                    _ => return Err(bad),
                }
            }
            _ => return Err(TableError::UnknownFeature),
        }
        Ok(())
    }
}

/// Shows the features as the table line has them: the count, then the words; nothing when all are defaults.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let default = Self::default();
        let hot = self.hot_extents != default.hot_extents;
        let ms = self.checkpoint_ms != default.checkpoint_ms;
        let fetch = self.fetch_timeout_ms != default.fetch_timeout_ms;
        let given = [
            hot,
            ms,
            fetch,
            self.meta_uuid.is_some(),
            self.image.is_some(),
            self.generation.is_some(),
            self.grow,
        ];
        let count = given.iter().filter(|g| **g).count();
        if count == 0 {
            return Ok(());
        }
        write!(f, " {}", count * 2)?;
        if hot {
            write!(f, " hot_extents {}", self.hot_extents)?;
        }
        if ms {
            write!(f, " checkpoint_ms {}", self.checkpoint_ms)?;
        }
        if fetch {
            write!(f, " fetch_timeout_ms {}", self.fetch_timeout_ms)?;
        }
        if let Some(uuid) = &self.meta_uuid {
            write!(f, " meta_uuid {}", Hex(uuid))?;
        }
        if let Some(image) = &self.image {
            write!(f, " image {}", Hex(image))?;
        }
        if let Some(generation) = self.generation {
            write!(f, " generation {generation}")?;
        }
        if self.grow {
            write!(f, " grow 1")?;
        }
        Ok(())
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}{}",
            self.data,
            self.metadata.unwrap_or("-"),
            self.features
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use std::string::ToString;

    fn parse(line: &str) -> Result<Table<'_>, TableError> {
        Table::parse(line.split_whitespace())
    }

    #[test]
    fn round_trip() {
        for line in [
            "/dev/vda /dev/vdb",
            "254:0 -",
            "254:0 - 4 hot_extents 64 checkpoint_ms 0",
            "254:0 254:1 4 meta_uuid 000102030405060708090a0b0c0d0e0f generation 7",
            "254:0 254:1 4 generation 7 grow 1",
        ] {
            assert_eq!(parse(line).unwrap().to_string(), line);
        }
        assert_eq!(parse("a b 0").unwrap().to_string(), "a b");
        assert_eq!(parse("a b 2 grow 0").unwrap().to_string(), "a b");
    }

    #[test]
    fn nonsense_is_refused() {
        use TableError::*;
        for (line, error) in [
            ("", MissingDevices),
            ("a", MissingDevices),
            ("a b x", BadCount),
            ("a b 2", BadCount),
            ("a b 1 hot_extents", BadFeature),
            ("a b 4 hot_extents 64 hot_extents 64", BadFeature),
            ("a b 2 hot_extents 1", BadValue),
            ("a b 2 hot_extents -1", BadValue),
            ("a b 2 image 12", BadValue),
            ("a b 2 grow 2", BadValue),
            ("a b 2 meta_uuid 0001020304050607080+0a0b0c0d0e0f", BadValue),
            ("a b 2 colour red", UnknownFeature),
            ("a b 18446744073709551616", BadCount),
        ] {
            assert_eq!(parse(line), Err(error), "{line}");
        }
    }
}
