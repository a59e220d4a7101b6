// SPDX-License-Identifier: GPL-2.0

//! The info section: what people want to know about an image. Not covered by the image id, and never trusted.

use std::collections::BTreeMap;

use crate::error::FormatError;

/// The most bytes that the section may take.
pub(super) const MAX_LEN: u64 = 64 << 10;

/// Facts about an image: keys like `name`, `created` (seconds since 1970), `source`, `fs.type`, `fs.uuid`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    entries: BTreeMap<String, String>,
}

impl Info {
    /// No facts.
    pub fn new() -> Self {
        Info::default()
    }

    /// Sets a fact. Line breaks, and `=` in the key, are replaced by spaces: the format has no place for them.
    pub fn set(&mut self, key: &str, value: &str) {
        let clean = |text: &str, extra: char| text.replace(['\n', '\r', extra], " ");
        self.entries.insert(clean(key, '='), clean(value, '\n'));
    }

    /// A fact by its key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.get(key).map(String::as_str)
    }

    /// All facts, by key in alphabetical order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut text = String::new();
        for (key, value) in self.entries() {
            text.extend([key, "=", value, "\n"]);
        }
        text.into_bytes()
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let what = "the manifest's info section";
        let text = std::str::from_utf8(bytes)
            .map_err(|_| FormatError::invalid(what, "it is not UTF-8 text"))?;
        let mut info = Info::new();
        for line in text.lines() {
            let (key, value) = line
                .split_once('=')
                .ok_or_else(|| FormatError::invalid(what, "a line is not KEY=VALUE"))?;
            info.set(key, value);
        }
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let mut info = Info::new();
        info.set("name", "debian = 13\nno break");
        info.set("fs.type", "ext4");
        let back = Info::decode(&info.encode()).unwrap();
        assert_eq!(back, info);
        assert_eq!(back.get("name"), Some("debian = 13 no break"));
        assert!(Info::decode(b"no equals sign").is_err());
        assert!(Info::decode(b"\xff=\xff").is_err());
    }
}
