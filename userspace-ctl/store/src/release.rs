// SPDX-License-Identifier: GPL-2.0

//! Releases: which image is a certain generation of a channel, who says so, and for how long.
//!
//! A small text, in a channel's pointer `channels/<name>` and, the same bytes, in the history
//! `releases/<name>/<generation>`:
//!
//! ```text
//! pristine-channel 1
//! channel stable
//! generation 3
//! image 5c1f...
//! size 2147483648
//! published 1795253000
//! expires 1797845000
//! oldest 2
//! parent 90ab...
//! untrusted comment: signature from minisign secret key
//! RUQ...
//! trusted comment: pristine channel stable generation 3
//! 3Xb...
//! check 0123456789abcdef
//! ```
//!
//! The *release* are the lines up to the first signature or to `check`: just these bytes are signed. The lines after
//! the first may come in any order, each once; `expires`, `oldest` and `parent` may be missing, and lines with
//! unknown keys are ignored, so that later programs can add to them. Then up to 8 signatures follow, each of the
//! four lines of a `.minisig` file. `check` holds the first 8 bytes of the BLAKE3 of all before it, against damage.

use pristine_image::{Digest, ImageId};
use pristine_trust::{Policy, Terms, Trusted};

use crate::error::{Error, Result};
use crate::object::ChannelName;

const VERSION: u64 = 1;
/// The most bytes that a release with its signatures may have.
pub const MAX_RELEASE_LEN: u64 = 16 << 10;
/// The most signatures of a release.
pub const MAX_SIGNATURES: usize = 8;

const SIGNATURE: &str = "untrusted comment: ";
const TRUSTED: &str = "trusted comment: ";

/// Which image is a certain generation of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// The channel that it belongs to.
    pub channel: ChannelName,
    /// The generation: from 1 on, and only growing.
    pub generation: u64,
    /// The image.
    pub image: ImageId,
    /// The image's size in bytes.
    pub size: u64,
    /// When it was published, in seconds since 1970.
    pub published: u64,
    /// From when on it must not be trusted any more, in seconds since 1970.
    pub expires: Option<u64>,
    /// The oldest generation of the channel that a machine may still accept; at most this generation.
    pub oldest: Option<u64>,
    /// The image of the release before.
    pub parent: Option<ImageId>,
}

impl Release {
    /// The release as text: what is signed.
    pub fn encode(&self) -> String {
        let mut text = format!(
            "pristine-channel {VERSION}\nchannel {}\ngeneration {}\nimage {}\nsize {}\npublished {}\n",
            self.channel, self.generation, self.image, self.size, self.published
        );
        let mut optional = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                text.push_str(&format!("{key} {value}\n"));
            }
        };
        optional("expires", self.expires.map(|time| time.to_string()));
        optional("oldest", self.oldest.map(|oldest| oldest.to_string()));
        optional("parent", self.parent.map(|parent| parent.to_string()));
        text
    }

    /// Parses the text; says what is wrong with it.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let lines: Vec<(&str, &str)> = text
            .split_terminator('\n')
            .skip(1)
            .map(|line| line.split_once(' ').unwrap_or((line, "")))
            .collect();
        let optional = |key: &str| {
            let mut found = lines.iter().filter(|(name, _)| *name == key);
            let value = found.next().map(|(_, value)| *value);
            match found.next() {
                // Which of them is meant would be a guess.
                Some(_) => Err(format!("it has several {key:?}")),
                None => Ok(value),
            }
        };
        let field = |key: &str| optional(key)?.ok_or_else(|| format!("it has no {key:?}"));
        let id = |key: &str, value: &str| {
            let id = value.parse::<ImageId>();
            id.map_err(|_| format!("its {key:?} is not an image id"))
        };
        let oldest = optional("oldest")?;
        let parent = optional("parent")?;
        let expires = optional("expires")?;
        let release = Release {
            channel: field("channel")?.parse().map_err(|e| format!("{e}"))?,
            generation: number("generation", field("generation")?)?,
            image: id("image", field("image")?)?,
            size: number("size", field("size")?)?,
            published: number("published", field("published")?)?,
            expires: expires.map(|value| number("expires", value)).transpose()?,
            oldest: oldest.map(|value| number("oldest", value)).transpose()?,
            parent: parent.map(|value| id("parent", value)).transpose()?,
        };
        if release.generation == 0 {
            return Err("its generation is 0".to_owned());
        }
        if release.oldest.is_some_and(|o| o > release.generation) {
            return Err("it is older than its own \"oldest\" allows".to_owned());
        }
        Ok(release)
    }
}

/// Only one spelling of a number is right.
fn number(key: &str, value: &str) -> std::result::Result<u64, String> {
    let number = value.parse::<u64>().ok();
    let number = number.filter(|number| number.to_string() == value);
    number.ok_or_else(|| format!("its {key:?} is not a number"))
}

/// A release with its exact text and its signatures, if it has any. Nothing here is verified but against damage before
/// [`SignedRelease::check`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRelease {
    release: Release,
    text: String,
    signatures: Vec<String>,
}

impl SignedRelease {
    /// A release that nobody signed.
    pub fn unsigned(release: Release) -> Self {
        SignedRelease {
            text: release.encode(),
            release,
            signatures: Vec::new(),
        }
    }

    /// Adds a signature of [`SignedRelease::text`]: the four lines of a `.minisig` file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn add_signature(&mut self, signature: &str) -> std::result::Result<(), String> {
        let mut lines = signature.split_inclusive('\n');
        let signature = take_signature(&mut lines).ok_or("it is not a signature of minisign's")?;
        if lines.next().is_some() {
            return Err("more than the four lines of a signature".to_owned());
        }
        if self.signatures.len() == MAX_SIGNATURES {
            return Err(format!("a release has at most {MAX_SIGNATURES} signatures"));
        }
        if self.encode().len() + signature.len() > MAX_RELEASE_LEN as usize {
            return Err(format!(
                "the release gets longer than {MAX_RELEASE_LEN} bytes"
            ));
        }
        self.signatures.push(signature);
        Ok(())
    }

    /// What it says.
    pub fn release(&self) -> &Release {
        &self.release
    }

    /// The bytes that are signed, as they were read.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The signatures: of each the four lines of a `.minisig` file.
    pub fn signatures(&self) -> &[String] {
        &self.signatures
    }

    /// Whether `policy` trusts it.
    ///
    /// # Errors
    /// [`Error::Untrusted`]; `location` is for that.
    pub fn check(&self, policy: &Policy, location: &str) -> Result<Trusted> {
        let Release {
            generation,
            published,
            expires,
            ..
        } = self.release;
        let terms = Terms {
            generation,
            published,
            expires,
        };
        let checked = policy.check(self.text.as_bytes(), &self.signatures, &terms);
        checked.map_err(|error| Error::Untrusted {
            location: location.to_owned(),
            channel: self.release.channel.clone(),
            generation,
            error,
        })
    }

    /// The bytes of the pointer and of the entry in the history.
    pub fn encode(&self) -> String {
        let mut text = self.text.clone();
        text.extend(self.signatures.iter().map(String::as_str));
        let check = check(text.as_bytes());
        format!("{text}check {check}\n")
    }

    /// Parses a pointer of `channel` or an entry of its history.
    ///
    /// # Errors
    /// [`Error::Pointer`] for damage or the release of another channel, [`Error::Newer`].
    pub fn parse(bytes: &[u8], channel: &ChannelName, location: &str) -> Result<Self> {
        let damaged = |why: String| Error::Pointer {
            location: location.to_owned(),
            channel: channel.clone(),
            why,
        };
        if bytes.len() as u64 > MAX_RELEASE_LEN {
            return Err(damaged(format!("it has more than {MAX_RELEASE_LEN} bytes")));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text".to_owned()))?;
        let version = text
            .strip_prefix("pristine-channel ")
            .and_then(|rest| rest.split_once('\n'))
            .and_then(|(version, _)| version.parse::<u64>().ok())
            .ok_or_else(|| {
                damaged("it does not begin with \"pristine-channel VERSION\"".to_owned())
            })?;
        if version > VERSION {
            return Err(Error::Newer {
                location: location.to_owned(),
                what: format!("the release on channel {channel}"),
                found: version,
                supported: VERSION,
            });
        }
        let signed = SignedRelease::parse_lines(text).map_err(damaged)?;
        if signed.release.channel != *channel {
            return Err(damaged("it belongs to another channel".to_owned()));
        }
        Ok(signed)
    }

    fn parse_lines(text: &str) -> std::result::Result<Self, String> {
        let (body, last) = text
            .strip_suffix('\n')
            .and_then(|text| text.rfind('\n').map(|at| text.split_at(at + 1)))
            .ok_or("it is truncated")?;
        let stated = last.strip_prefix("check ").ok_or("it is truncated")?;
        if check(body.as_bytes()) != stated {
            return Err("its checksum is wrong".to_owned());
        }
        let mut end = 0;
        for line in body.split_inclusive('\n') {
            if line.starts_with(SIGNATURE) {
                break;
            }
            end += line.len();
        }
        let (text, rest) = body.split_at(end);
        let mut signatures = Vec::new();
        let mut lines = rest.split_inclusive('\n').peekable();
        while lines.peek().is_some() {
            let signature = take_signature(&mut lines);
            signatures.push(signature.ok_or("a signature is not of the form of minisign's")?);
        }
        if signatures.len() > MAX_SIGNATURES {
            return Err(format!("it has more than {MAX_SIGNATURES} signatures"));
        }
        Ok(SignedRelease {
            release: Release::parse(text)?,
            text: text.to_owned(),
            signatures,
        })
    }
}

/// The next four lines, if they are of the form of a `.minisig` file.
fn take_signature<'a>(lines: &mut impl Iterator<Item = &'a str>) -> Option<String> {
    let base64 = |line: &str| {
        let good = |c: char| c.is_ascii_alphanumeric() || "+/=".contains(c);
        let line = line.strip_suffix('\n');
        line.is_some_and(|line| !line.is_empty() && line.chars().all(good))
    };
    let mut next = |good: &dyn Fn(&str) -> bool| lines.next().filter(|line| good(line));
    let comment = next(&|line| line.starts_with(SIGNATURE) && line.ends_with('\n'))?;
    let signature = next(&base64)?;
    let trusted = next(&|line| line.starts_with(TRUSTED) && line.ends_with('\n'))?;
    let global = next(&base64)?;
    Some([comment, signature, trusted, global].concat())
}

fn check(bytes: &[u8]) -> String {
    let mut text = Digest::of(bytes).to_string();
    text.truncate(16);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINISIG: &str = "untrusted comment: a\nRUQabc+/=\ntrusted comment: b c\nxyz==\n";

    fn release() -> Release {
        Release {
            channel: "stable".parse().unwrap(),
            generation: 3,
            image: ImageId::new(Digest::of(b"image")),
            size: 2 << 30,
            published: 1_795_253_000,
            expires: Some(1_797_845_000),
            oldest: Some(2),
            parent: Some(ImageId::new(Digest::of(b"parent"))),
        }
    }

    fn signed() -> SignedRelease {
        let mut signed = SignedRelease::unsigned(release());
        signed.add_signature(MINISIG).unwrap();
        signed.add_signature(MINISIG).unwrap();
        signed
    }

    fn parse(bytes: &[u8]) -> Result<SignedRelease> {
        SignedRelease::parse(bytes, &release().channel, "here")
    }

    /// A file of these lines, with the right `check`.
    fn with_check(body: &str) -> String {
        format!("{body}check {}\n", check(body.as_bytes()))
    }

    #[test]
    fn round_trip() {
        let plain = Release {
            expires: None,
            oldest: None,
            parent: None,
            ..release()
        };
        for signed in [signed(), SignedRelease::unsigned(plain)] {
            assert_eq!(parse(signed.encode().as_bytes()).unwrap(), signed);
        }
        assert_eq!(signed().text(), release().encode());
        assert_eq!(signed().signatures(), [MINISIG, MINISIG]);
    }

    #[test]
    fn pointers_of_old_are_read() {
        let old = "pristine-channel 1\nchannel stable\ngeneration 3\n\
            image 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n\
            size 4096\npublished 1795253000\ncheck 4f8c4f0f4a24d5d5\n";
        let body = old.rsplit_once("check").unwrap().0;
        let back = parse(with_check(body).as_bytes()).unwrap();
        assert_eq!(
            (back.release().generation, back.release().oldest),
            (3, None)
        );
        assert!(back.signatures().is_empty() && back.text() == body);
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_found() {
        let bytes = signed().encode().into_bytes();
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).is_err());
        }
        for at in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(parse(&bad).is_err(), "bit {at}");
        }
    }

    #[test]
    fn other_channels_and_newer_versions_are_refused() {
        let text = signed().encode();
        let error = SignedRelease::parse(text.as_bytes(), &"canary".parse().unwrap(), "here");
        assert!(matches!(error, Err(Error::Pointer { .. })));
        let newer = text.replace("pristine-channel 1", "pristine-channel 2");
        let error = parse(newer.as_bytes());
        assert!(matches!(error, Err(Error::Newer { found: 2, .. })));
    }

    #[test]
    fn unknown_lines_are_ignored_and_kept() {
        let body = release().encode() + "colour blue\n" + MINISIG;
        let back = parse(with_check(&body).as_bytes()).unwrap();
        assert_eq!(back.release(), &release());
        assert_eq!(back.text(), release().encode() + "colour blue\n");
        assert_eq!(back.encode(), with_check(&body));
    }

    #[test]
    fn what_has_two_meanings_is_refused() {
        let text = release().encode();
        for (body, why) in [
            (text.clone() + "generation 4\n", "several"),
            (text.clone() + "expires 4\n", "several"),
            (text.replace("generation 3", "generation 03"), "number"),
            (text.replace("generation 3", "generation +3"), "number"),
            (text.replace("generation 3", "generation 3\r"), "number"),
            (text.replace("generation 3", "generation 0"), "is 0"),
            (text.replace("oldest 2", "oldest 4"), "oldest"),
            (text.replace("size 2147483648\n", ""), "no \"size\""),
            (text.clone() + MINISIG + "generation 4\n", "form"),
            (
                text.clone() + &MINISIG.replace("trusted comment: b", "x"),
                "form",
            ),
            (text.clone() + &MINISIG.repeat(9), "more than 8"),
            (text.clone() + "untrusted comment: a\n", "form"),
        ] {
            let error = parse(with_check(&body).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(why), "{body}: {error}");
        }
    }

    #[test]
    fn only_signatures_are_added() {
        let mut signed = SignedRelease::unsigned(release());
        for bad in ["", "x", &MINISIG[..MINISIG.len() - 1], &MINISIG.repeat(2)] {
            assert!(signed.add_signature(bad).is_err(), "{bad}");
        }
        let long = MINISIG.replace("b c", &"b".repeat(MAX_RELEASE_LEN as usize));
        assert!(signed.add_signature(&long).is_err());
    }
}
