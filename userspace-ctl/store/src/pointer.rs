// SPDX-License-Identifier: GPL-2.0

//! A channel's pointer: which image is its current generation.
//!
//! A small text, the one mutable object of a channel:
//!
//! ```text
//! pristine-channel 1
//! channel stable
//! generation 3
//! image 5c1f...
//! size 2147483648
//! published 1795253000
//! check 0123456789abcdef
//! ```
//!
//! The lines after the first may come in any order, and lines with unknown keys are ignored, so that later programs can
//! add to them; `check` comes last and holds the first 8 bytes of the BLAKE3 of all before it.

use pristine_image::{Digest, ImageId};

use crate::error::{Error, Result};
use crate::object::ChannelName;

const VERSION: u64 = 1;
/// The most bytes that a pointer may have.
pub(crate) const MAX_LEN: u64 = 4096;

/// What a channel points to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// The channel that it belongs to.
    pub channel: ChannelName,
    /// The generation: 1 for the first, and only growing.
    pub generation: u64,
    /// The image.
    pub image: ImageId,
    /// The image's size in bytes.
    pub size: u64,
    /// When it was published, in seconds since 1970.
    pub published: u64,
}

/// A certain state of a pointer, for compare-and-swap: the digest of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision(Digest);

impl Revision {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Revision(Digest::of(bytes))
    }
}

impl Pointer {
    /// The pointer as text.
    pub fn encode(&self) -> String {
        let text = format!(
            "pristine-channel {VERSION}\nchannel {}\ngeneration {}\nimage {}\nsize {}\npublished {}\n",
            self.channel, self.generation, self.image, self.size, self.published
        );
        let check = check(text.as_bytes());
        format!("{text}check {check}\n")
    }

    /// Parses the pointer of `channel`.
    ///
    /// # Errors
    /// [`Error::Pointer`] for damage or the pointer of another channel, [`Error::Newer`].
    pub fn parse(bytes: &[u8], channel: &ChannelName, location: &str) -> Result<Self> {
        let damaged = |why: &str| Error::Pointer {
            location: location.to_owned(),
            channel: channel.clone(),
            why: why.to_owned(),
        };
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
        let version = text
            .strip_prefix("pristine-channel ")
            .and_then(|rest| rest.split_once('\n'))
            .and_then(|(version, _)| version.parse::<u64>().ok())
            .ok_or_else(|| damaged("it does not begin with \"pristine-channel VERSION\""))?;
        if version > VERSION {
            return Err(Error::Newer {
                location: location.to_owned(),
                what: format!("the pointer of channel {channel}"),
                found: version,
                supported: VERSION,
            });
        }
        let (body, last) = text
            .strip_suffix('\n')
            .and_then(|text| text.rfind('\n').map(|at| text.split_at(at + 1)))
            .ok_or_else(|| damaged("it is truncated"))?;
        let stated = last
            .strip_prefix("check ")
            .ok_or_else(|| damaged("it is truncated"))?;
        if check(body.as_bytes()) != stated {
            return Err(damaged("its checksum is wrong"));
        }
        let field = |key: &str| {
            let mut lines = body.lines().filter_map(|line| line.split_once(' '));
            lines
                .find(|(found, _)| *found == key)
                .map(|(_, value)| value)
                .ok_or_else(|| damaged(&format!("it has no {key:?}")))
        };
        let number = |key: &str| {
            let value = field(key)?.parse::<u64>();
            value.map_err(|_| damaged(&format!("its {key:?} is not a number")))
        };
        if field("channel")? != channel.as_str() {
            return Err(damaged("it belongs to another channel"));
        }
        let image = field("image")?;
        Ok(Pointer {
            channel: channel.clone(),
            generation: number("generation")?,
            image: image
                .parse()
                .map_err(|_| damaged("its \"image\" is not an image id"))?,
            size: number("size")?,
            published: number("published")?,
        })
    }
}

fn check(bytes: &[u8]) -> String {
    let mut text = Digest::of(bytes).to_string();
    text.truncate(16);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer() -> Pointer {
        Pointer {
            channel: "stable".parse().unwrap(),
            generation: 3,
            image: ImageId::new(Digest::of(b"image")),
            size: 2 << 30,
            published: 1_795_253_000,
        }
    }

    #[test]
    fn round_trip() {
        let pointer = pointer();
        let text = pointer.encode();
        let back = Pointer::parse(text.as_bytes(), &pointer.channel, "here").unwrap();
        assert_eq!(back, pointer);
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        let pointer = pointer();
        let bytes = pointer.encode().into_bytes();
        for cut in 0..bytes.len() {
            assert!(Pointer::parse(&bytes[..cut], &pointer.channel, "here").is_err());
        }
        for at in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(
                Pointer::parse(&bad, &pointer.channel, "here").is_err(),
                "bit {at}"
            );
        }
    }

    #[test]
    fn other_channels_and_newer_versions_are_refused() {
        let text = pointer().encode();
        let error = Pointer::parse(text.as_bytes(), &"canary".parse().unwrap(), "here");
        assert!(matches!(error, Err(Error::Pointer { .. })));
        let newer = text.replace("pristine-channel 1", "pristine-channel 2");
        let error = Pointer::parse(newer.as_bytes(), &pointer().channel, "here");
        assert!(matches!(error, Err(Error::Newer { found: 2, .. })));
    }

    #[test]
    fn unknown_lines_are_ignored() {
        let text = pointer().encode();
        let body = text.rsplit_once("check").unwrap().0.to_owned() + "expires 99\n";
        let text = format!("{body}check {}\n", check(body.as_bytes()));
        let back = Pointer::parse(text.as_bytes(), &pointer().channel, "here").unwrap();
        assert_eq!(back, pointer());
    }
}
