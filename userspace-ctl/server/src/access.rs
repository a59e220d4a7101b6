// SPDX-License-Identifier: GPL-2.0

//! Who may read what.
//!
//! The rules are a text file with a line for each holder of a credential:
//!
//! ```text
//! # what      name          hash of the token    channels
//! token       lab-machines  blake3:6f0d...       lab stable
//! token       backup        blake3:91ab...       *
//! certificate pc7.example   kiosk
//! anonymous   public
//! ```
//!
//! A token is sent as `Authorization: Bearer TOKEN`; the file has only its BLAKE3, which suffices for what is as long and
//! as random as `pristine token new` makes it. A `certificate` is a client certificate with that name as a DNS name or
//! e-mail address among its alternative names, or as its common name. `anonymous` is for who shows neither. `*` is all
//! channels. A wrong token is refused, whatever else the client shows.
//!
//! Who may read a channel reads its pointer and its releases, and of images, manifests and packs exactly those that its
//! generations are made of: see [`crate::scope`].

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use pristine_store::{ChannelName, Digest};

/// Credentials and what they are good for.
#[derive(Clone, Debug, Default)]
pub struct AccessRules {
    tokens: HashMap<Digest, Arc<Grant>>,
    certificates: HashMap<String, Arc<Grant>>,
    anonymous: Option<Arc<Grant>>,
}

/// What somebody may read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Who it is, for the log.
    pub name: String,
    /// Which channels.
    pub channels: Channels,
}

/// Some channels, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channels {
    /// All there are, and everything else in the store.
    All,
    /// These.
    Some(BTreeSet<ChannelName>),
}

/// Why rules cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// The file cannot be read.
    #[error("cannot read {file}: {error}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        error: std::io::Error,
    },
    /// A line makes no sense.
    #[error("{file}, line {line}: {why}")]
    Line {
        /// The file.
        file: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
}

/// A line's first word.
const TOKEN: &str = "token";
const CERTIFICATE: &str = "certificate";
const ANONYMOUS: &str = "anonymous";
/// Before the hash of a token.
const HASH: &str = "blake3:";

/// One line of the rules that is about a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRule {
    /// Who has it.
    pub name: String,
    /// Its hash.
    pub hash: Digest,
    /// What it is good for.
    pub channels: Channels,
}

impl TokenRule {
    /// The rule for a token.
    pub fn new(name: &str, token: &str, channels: Channels) -> Self {
        TokenRule {
            name: name.to_owned(),
            hash: Digest::of(token.as_bytes()),
            channels,
        }
    }

    /// The rule of a line, `None` if the line is about something else.
    pub fn parse(line: &str) -> Option<Result<Self, String>> {
        let mut words = line.split_whitespace();
        if words.next() != Some(TOKEN) {
            return None;
        }
        Some(TokenRule::from_words(words))
    }

    fn from_words<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let name = words.next().ok_or("the name is missing")?;
        let hash = words.next().ok_or("the hash of the token is missing")?;
        let hash = hash.strip_prefix(HASH).and_then(|hex| hex.parse().ok());
        Ok(TokenRule {
            name: name.to_owned(),
            hash: hash.ok_or("the hash is not \"blake3:\" and 64 hexadecimal digits")?,
            channels: Channels::from_words(words)?,
        })
    }
}

impl fmt::Display for TokenRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TokenRule {
            name,
            hash,
            channels,
        } = self;
        write!(f, "{TOKEN} {name} {HASH}{hash} {channels}")
    }
}

impl Channels {
    fn from_words<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let mut some = BTreeSet::new();
        let mut all = false;
        for word in words {
            if word == "*" {
                all = true;
            } else {
                some.insert(word.parse().map_err(|error| format!("{error}"))?);
            }
        }
        match (all, some.is_empty()) {
            (true, true) => Ok(Channels::All),
            (false, false) => Ok(Channels::Some(some)),
            (true, false) => Err("* is all channels already".to_owned()),
            (false, true) => Err("name the channels, or * for all".to_owned()),
        }
    }

    /// Whether this one is among them.
    pub fn contains(&self, channel: &ChannelName) -> bool {
        match self {
            Channels::All => true,
            Channels::Some(some) => some.contains(channel),
        }
    }
}

impl fmt::Display for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Channels::All => f.write_str("*"),
            Channels::Some(some) => {
                let names: Vec<&str> = some.iter().map(ChannelName::as_str).collect();
                f.write_str(&names.join(" "))
            }
        }
    }
}

/// The credentials are missing or wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unauthorized;

impl AccessRules {
    /// Reads a file of rules.
    ///
    /// # Errors
    /// [`RulesError`].
    pub fn read(path: &Path) -> Result<Self, RulesError> {
        let file = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => AccessRules::parse(&text, &file),
            Err(error) => Err(RulesError::Read { file, error }),
        }
    }

    /// Understands rules; `file` is for messages.
    ///
    /// # Errors
    /// [`RulesError::Line`].
    pub fn parse(text: &str, file: &str) -> Result<Self, RulesError> {
        let mut rules = AccessRules::default();
        for (at, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            rules.add(line).map_err(|why| RulesError::Line {
                file: file.to_owned(),
                line: at + 1,
                why,
            })?;
        }
        Ok(rules)
    }

    fn add(&mut self, line: &str) -> Result<(), String> {
        let mut words = line.split_whitespace();
        let before = match words.next() {
            None => None,
            Some(TOKEN) => {
                let TokenRule {
                    name,
                    hash,
                    channels,
                } = TokenRule::from_words(words)?;
                let grant = Arc::new(Grant { name, channels });
                self.tokens.insert(hash, grant)
            }
            Some(CERTIFICATE) => {
                let name = words.next().ok_or("the name is missing")?;
                let grant = Grant {
                    name: name.to_owned(),
                    channels: Channels::from_words(words)?,
                };
                let name = name.to_ascii_lowercase();
                self.certificates.insert(name, Arc::new(grant))
            }
            Some(ANONYMOUS) => self.anonymous.replace(Arc::new(Grant {
                name: ANONYMOUS.to_owned(),
                channels: Channels::from_words(words)?,
            })),
            Some(other) => {
                return Err(format!(
                    "{other:?} is none of {TOKEN}, {CERTIFICATE} and {ANONYMOUS}"
                ));
            }
        };
        match before {
            None => Ok(()),
            Some(before) => Err(format!(
                "the same credential is there twice ({})",
                before.name
            )),
        }
    }

    /// Whether any certificate is good for something.
    pub(crate) fn knows_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// What somebody may read who shows this token and a certificate with these names.
    pub(crate) fn grant(
        &self,
        token: Option<&str>,
        names: &[String],
    ) -> Result<Arc<Grant>, Unauthorized> {
        if let Some(token) = token {
            // The hash is looked up, so time says nothing about the token.
            let grant = self.tokens.get(&Digest::of(token.as_bytes()));
            return grant.cloned().ok_or(Unauthorized);
        }
        let mut known = names.iter().filter_map(|name| self.certificates.get(name));
        let grant = known.next().or(self.anonymous.as_ref());
        grant.cloned().ok_or(Unauthorized)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(name: &str) -> ChannelName {
        name.parse().unwrap()
    }

    #[test]
    fn rules_grant_what_they_say() {
        let token = TokenRule::new("lab", "secret", Channels::Some([channel("lab")].into()));
        let text = format!(
            "# a comment\n\n{token}  # another\ncertificate PC7.example kiosk lab\nanonymous public\n\
             {}\n",
            TokenRule::new("all", "other", Channels::All)
        );
        let rules = AccessRules::parse(&text, "x").unwrap();
        let lab = rules.grant(Some("secret"), &[]).unwrap();
        assert_eq!(lab.name, "lab");
        assert!(lab.channels.contains(&channel("lab")));
        assert!(!lab.channels.contains(&channel("stable")));
        let all = rules.grant(Some("other"), &[]).unwrap();
        assert!(all.channels.contains(&channel("anything")));
        let names = ["x".to_owned(), "pc7.example".to_owned()];
        assert_eq!(rules.grant(None, &names).unwrap().name, "PC7.example");
        assert_eq!(rules.grant(None, &[]).unwrap().name, "anonymous");
        // A wrong token is not made good by anything else.
        assert_eq!(rules.grant(Some("wrong"), &names), Err(Unauthorized));
        assert_eq!(rules.grant(Some(""), &[]), Err(Unauthorized));
        let strict = AccessRules::parse("", "x").unwrap();
        assert_eq!(strict.grant(None, &names), Err(Unauthorized));
        assert_eq!(TokenRule::parse(&token.to_string()), Some(Ok(token)));
    }

    #[test]
    fn wrong_rules_are_named_by_line() {
        let hash = "0".repeat(64);
        for (text, says) in [
            ("tokens a".to_owned(), "none of token"),
            ("token".to_owned(), "name is missing"),
            ("token a".to_owned(), "hash of the token is missing"),
            ("token a blake3:12 *".to_owned(), "64 hexadecimal"),
            (format!("token a {hash} *"), "64 hexadecimal"),
            (format!("token a blake3:{hash}"), "name the channels"),
            (format!("token a blake3:{hash} * b"), "all channels already"),
            (format!("token a blake3:{hash} ../b"), "not a channel name"),
            (
                format!("token a blake3:{hash} x\ntoken b blake3:{hash} y"),
                "x, line 2: the same credential is there twice (a)",
            ),
            ("certificate a *\ncertificate A *".to_owned(), "twice"),
            ("anonymous a\nanonymous b".to_owned(), "twice"),
        ] {
            let error = AccessRules::parse(&text, "x").unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }
}
