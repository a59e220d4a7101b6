// SPDX-License-Identifier: GPL-2.0

//! The names of what a store holds. There is no way to name anything else: no path tricks.

use std::fmt;
use std::str::FromStr;

use pristine_image::{ImageId, PackId};
use pristine_seal::KeyId;

/// The marker file of a store, which says that it is one and of which version.
pub const MARKER_NAME: &str = "pristine-store";
/// What the marker file contains.
pub const MARKER_TEXT: &str = "pristine-store 1\n";
/// The version of the store's layout.
pub const STORE_VERSION: u64 = 1;

/// An object that never changes once it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectName {
    /// `images/<id>.manifest`
    Manifest(ImageId),
    /// `packs/<first two digits>/<id>.zst`
    Pack(PackId),
    /// `releases/<channel>/<generation>`
    Release(ReleaseName),
    /// `deltas/<new>/<old>.delta`
    Delta {
        /// The image that it leads to.
        new: ImageId,
        /// The image that it leads from.
        old: ImageId,
    },
    /// `references/<first two digits>/<id>.ref`: where the content of a pack lies that is not stored. It lives as long
    /// as its pack is needed.
    Reference(PackId),
    /// `traces/<image id>.trace`: in which order a boot asks for the image's blocks. A hint: of all objects this one may
    /// be removed and come back with another content.
    Trace(ImageId),
    /// `keys/<key>/<tag>.age`: a store key, wrapped for a recipient. See [`crate::sealed`].
    Key {
        /// The key.
        key: KeyId,
        /// The recipient's tag.
        tag: RecipientTag,
    },
}

/// What stands for a recipient in the name of a wrapped key: see [`pristine_seal::age::Recipient::tag`].
pub type RecipientTag = KeyId;

/// A kind of objects; each has a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// [`ObjectName::Manifest`]
    Manifest,
    /// [`ObjectName::Pack`]
    Pack,
    /// [`ObjectName::Release`]
    Release,
    /// [`ObjectName::Delta`]
    Delta,
    /// [`ObjectName::Reference`]
    Reference,
    /// [`ObjectName::Trace`]
    Trace,
    /// [`ObjectName::Key`]
    Key,
}

impl ObjectKind {
    /// All kinds.
    pub const ALL: [ObjectKind; 7] = [
        ObjectKind::Manifest,
        ObjectKind::Pack,
        ObjectKind::Release,
        ObjectKind::Delta,
        ObjectKind::Reference,
        ObjectKind::Trace,
        ObjectKind::Key,
    ];

    /// The directory of these objects.
    pub fn directory(self) -> &'static str {
        match self {
            ObjectKind::Manifest => "images",
            ObjectKind::Pack => "packs",
            ObjectKind::Release => "releases",
            ObjectKind::Delta => "deltas",
            ObjectKind::Reference => "references",
            ObjectKind::Trace => "traces",
            ObjectKind::Key => "keys",
        }
    }
}

impl ObjectName {
    /// Its kind.
    pub fn kind(&self) -> ObjectKind {
        match self {
            ObjectName::Manifest(_) => ObjectKind::Manifest,
            ObjectName::Pack(_) => ObjectKind::Pack,
            ObjectName::Release(_) => ObjectKind::Release,
            ObjectName::Delta { .. } => ObjectKind::Delta,
            ObjectName::Reference(_) => ObjectKind::Reference,
            ObjectName::Trace(_) => ObjectKind::Trace,
            ObjectName::Key { .. } => ObjectKind::Key,
        }
    }

    /// Its path in the store, relative and with `/`.
    pub fn path(&self) -> String {
        match self {
            ObjectName::Manifest(id) => format!("images/{id}.manifest"),
            ObjectName::Pack(id) => {
                let name = id.to_string();
                format!("packs/{}/{name}.zst", &name[..2])
            }
            ObjectName::Release(name) => format!("releases/{name}"),
            ObjectName::Delta { new, old } => format!("deltas/{new}/{old}.delta"),
            ObjectName::Reference(id) => {
                let name = id.to_string();
                format!("references/{}/{name}.ref", &name[..2])
            }
            ObjectName::Trace(image) => format!("traces/{image}.trace"),
            ObjectName::Key { key, tag } => format!("keys/{key}/{tag}.age"),
        }
    }

    /// The object that has this path.
    pub fn from_path(path: &str) -> Option<Self> {
        let name = if let Some(file) = path.strip_prefix("images/") {
            ObjectName::Manifest(file.strip_suffix(".manifest")?.parse().ok()?)
        } else if let Some(rest) = path.strip_prefix("releases/") {
            let (channel, generation) = rest.split_once('/')?;
            let generation = generation.parse().ok()?;
            ObjectName::Release(ReleaseName::new(&channel.parse().ok()?, generation))
        } else if let Some(rest) = path.strip_prefix("deltas/") {
            let (new, file) = rest.split_once('/')?;
            ObjectName::Delta {
                new: new.parse().ok()?,
                old: file.strip_suffix(".delta")?.parse().ok()?,
            }
        } else if let Some(rest) = path.strip_prefix("keys/") {
            let (key, file) = rest.split_once('/')?;
            ObjectName::Key {
                key: key.parse().ok()?,
                tag: file.strip_suffix(".age")?.parse().ok()?,
            }
        } else if let Some(rest) = path.strip_prefix("references/") {
            let (_, file) = rest.split_once('/')?;
            ObjectName::Reference(file.strip_suffix(".ref")?.parse().ok()?)
        } else if let Some(file) = path.strip_prefix("traces/") {
            ObjectName::Trace(file.strip_suffix(".trace")?.parse().ok()?)
        } else {
            let (_, file) = path.strip_prefix("packs/")?.split_once('/')?;
            ObjectName::Pack(file.strip_suffix(".zst")?.parse().ok()?)
        };
        // Only one spelling is right.
        (name.path() == path).then_some(name)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectName::Manifest(id) => write!(f, "the manifest of image {id}"),
            ObjectName::Pack(id) => write!(f, "pack {id}"),
            ObjectName::Delta { new, old } => {
                write!(f, "the delta from image {old} to image {new}")
            }
            ObjectName::Reference(id) => write!(f, "the reference for pack {id}"),
            ObjectName::Trace(image) => write!(f, "the boot trace of image {image}"),
            ObjectName::Key { key, tag } => write!(f, "store key {key} for recipient {tag}"),
            ObjectName::Release(name) => {
                let (channel, generation) = (name.channel(), name.generation());
                write!(f, "generation {generation} of channel {channel}")
            }
        }
    }
}

/// Names an entry of a channel's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReleaseName {
    /// The channel's name, zeros after it: an object's name is small and can be copied.
    channel: [u8; MAX_CHANNEL_NAME],
    generation: u64,
}

impl ReleaseName {
    /// The entry of a generation.
    pub fn new(channel: &ChannelName, generation: u64) -> Self {
        let mut bytes = [0; MAX_CHANNEL_NAME];
        for (to, from) in bytes.iter_mut().zip(channel.as_str().bytes()) {
            *to = from;
        }
        ReleaseName {
            channel: bytes,
            generation,
        }
    }

    /// The channel's name.
    pub fn channel(&self) -> &str {
        let end = self.channel.iter().position(|b| *b == 0);
        let name = &self.channel[..end.unwrap_or(MAX_CHANNEL_NAME)];
        // Channel names are ASCII.
        std::str::from_utf8(name).unwrap_or_default()
    }

    /// The generation.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl fmt::Display for ReleaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.channel(), self.generation)
    }
}

/// The most bytes of a channel's name.
const MAX_CHANNEL_NAME: usize = 64;

/// The name of a channel: 1 to 64 of `a-z A-Z 0-9 . _ -`, the first a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelName(String);

/// Text that is no channel name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a channel name: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit")]
pub struct ParseChannelError(String);

impl ChannelName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The pointer's path in the store.
    pub fn path(&self) -> String {
        format!("channels/{}", self.0)
    }

    /// The path of the directory with its history.
    pub fn history_path(&self) -> String {
        format!("releases/{}", self.0)
    }
}

impl FromStr for ChannelName {
    type Err = ParseChannelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let first_ok = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        let all_ok = text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        // 64 hexadecimal digits would be taken for an image id.
        let is_id = text.parse::<ImageId>().is_ok();
        if first_ok && all_ok && text.len() <= MAX_CHANNEL_NAME && !is_id {
            Ok(ChannelName(text.to_owned()))
        } else {
            Err(ParseChannelError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_round_trip_and_nothing_else_parses() {
        let hex = "0123456789abcdef".repeat(4);
        for object in [
            ObjectName::Manifest(hex.parse().unwrap()),
            ObjectName::Pack(hex.parse().unwrap()),
            ObjectName::Trace(hex.parse().unwrap()),
            ObjectName::Delta {
                new: hex.parse().unwrap(),
                old: "f".repeat(64).parse().unwrap(),
            },
            ObjectName::Release(ReleaseName::new(&"z".repeat(64).parse().unwrap(), 1)),
            ObjectName::Release(ReleaseName::new(&"a.b-c".parse().unwrap(), u64::MAX)),
            ObjectName::Key {
                key: hex[..32].parse().unwrap(),
                tag: "f".repeat(32).parse().unwrap(),
            },
        ] {
            assert_eq!(ObjectName::from_path(&object.path()), Some(object));
        }
        for path in [
            "".to_owned(),
            "images/".to_owned(),
            format!("images/../images/{hex}.manifest"),
            format!("/images/{hex}.manifest"),
            format!("images/{}.manifest", hex.to_uppercase()),
            format!("packs/ff/{hex}.zst"),
            format!("packs/01/../01/{hex}.zst"),
            format!("packs/{hex}.zst"),
            format!("deltas/{hex}.delta"),
            format!("traces/{hex}"),
            format!("traces/../traces/{hex}.trace"),
            format!("keys/{hex}/{hex}.age"),
            format!("keys/{}.age", &hex[..32]),
            format!("deltas/{hex}/../{hex}.delta"),
            "../etc/passwd".to_owned(),
            "releases/stable".to_owned(),
            "releases/stable/".to_owned(),
            "releases/stable/03".to_owned(),
            "releases/stable/+3".to_owned(),
            "releases/stable/-3".to_owned(),
            "releases/stable/3/".to_owned(),
            "releases/../3".to_owned(),
            "releases/.hidden/3".to_owned(),
            "releases/stable/99999999999999999999".to_owned(),
            ".tmp/1".to_owned(),
        ] {
            assert_eq!(ObjectName::from_path(&path), None, "{path}");
        }
    }

    #[test]
    fn channel_names() {
        for good in ["stable", "debian-13.canary_2", "9", &"z".repeat(64)] {
            assert!(good.parse::<ChannelName>().is_ok(), "{good}");
        }
        let id = "0123456789abcdef".repeat(4);
        for bad in [
            "",
            ".",
            "..",
            ".hidden",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"z".repeat(65),
            &id,
        ] {
            assert!(bad.parse::<ChannelName>().is_err(), "{bad}");
        }
    }
}
