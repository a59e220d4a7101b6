// SPDX-License-Identifier: GPL-2.0

//! Settings as they are found in the file and on the kernel command line, and what they mean together.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use pristine_store::Token;
use pristine_trust::{Keys, PublicKey};

use super::{
    meaning, Config, ConfigError, Damaged, DeviceSpec, Hydrate, IpSpec, Offline, OnError, Peers,
    Provision, Revert, StoreList, StoreSpec, Then, KEYS, PREFIX,
};

/// Keys and values as they were found, the later ones winning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pairs: Vec<(String, String)>,
    /// What the stores among them were found in.
    stores_from: Option<String>,
    warnings: Vec<String>,
}

impl Settings {
    /// Adds the lines of a file.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Syntax`] for the first line that is none.
    pub fn add_file(&mut self, file: &str, text: &str) -> Result<(), ConfigError> {
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                return Err(ConfigError::Syntax {
                    file: file.into(),
                    line: n + 1,
                    text: line.into(),
                });
            };
            let key = key.trim();
            let key = key.strip_prefix(PREFIX).unwrap_or(key);
            let value = value.trim();
            let value = value
                .strip_prefix('"')
                .and_then(|v| v.strip_suffix('"'))
                .unwrap_or(value);
            self.add(key, value, file);
        }
        Ok(())
    }

    /// Adds the agent's keys of a kernel command line; others belong to others. Of those, `init=` counts, as for
    /// the kernel itself.
    pub fn add_command_line(&mut self, line: &str) {
        for word in split_command_line(line) {
            let (key, value) = word.split_once('=').unwrap_or((&word, "yes"));
            if let Some(key) = key.strip_prefix(PREFIX) {
                self.add(key, value, "the kernel command line");
            } else if key == "init" && value.starts_with('/') {
                self.add(key, value, "the kernel command line");
            }
        }
    }

    fn add(&mut self, key: &str, value: &str, from: &str) {
        // The kernel takes - and _ in names for the same; so do people.
        let key = key.replace('_', "-");
        if KEYS.iter().any(|(k, _)| *k == key) {
            // Stores on the command line replace those of the file; beside each other they add up.
            if key == "store" && self.stores_from.as_deref() != Some(from) {
                self.pairs.retain(|(k, _)| *k != key);
                self.stores_from = Some(from.into());
            }
            // Keys add up: each is one more that may have signed.
            let adds_up = key == "key" || key == "store";
            self.pairs.retain(|(k, _)| *k != key || adds_up);
            self.pairs.push((key, value.into()));
        } else {
            self.warnings.push(format!(
                "{from} has an unknown setting, {PREFIX}{key}; it is ignored"
            ));
        }
    }

    /// What should be said, though it stops nothing.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.pairs
            .iter()
            .find(|(k, _)| k == key)
            .map(|(_, v)| v.as_str())
    }

    fn parse<T>(
        &self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.text(key) else {
            return Ok(None);
        };
        parse(value).map(Some).map_err(|why| ConfigError::Value {
            key: format!("{PREFIX}{key}"),
            value: value.into(),
            why,
            meaning: meaning(key),
        })
    }

    fn needed<T: FromStr<Err = String>>(&self, key: &'static str) -> Result<T, ConfigError> {
        self.parse(key, T::from_str)?.ok_or(ConfigError::Missing {
            key,
            meaning: meaning(key),
        })
    }

    fn or<T: FromStr<Err = String>>(
        &self,
        key: &'static str,
        default: T,
    ) -> Result<T, ConfigError> {
        Ok(self.parse(key, T::from_str)?.unwrap_or(default))
    }

    fn stores(&self) -> Result<StoreList, ConfigError> {
        let mut stores: Vec<StoreSpec> = Vec::new();
        for (_, value) in self.pairs.iter().filter(|(key, _)| key == "store") {
            for word in value.split(',') {
                let store = word.trim().parse().map_err(|why| ConfigError::Value {
                    key: format!("{PREFIX}store"),
                    value: value.clone(),
                    why,
                    meaning: meaning("store"),
                })?;
                if !stores.contains(&store) {
                    stores.push(store);
                }
            }
        }
        if stores.is_empty() {
            return Err(ConfigError::Missing {
                key: "store",
                meaning: meaning("store"),
            });
        }
        let timeout = match self.number("fetch-timeout", 1, 600, 0)? {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        };
        Ok(StoreList { stores, timeout })
    }

    fn keys(&self) -> Result<Keys, ConfigError> {
        let mut keys = Keys::default();
        for (_, value) in self.pairs.iter().filter(|(key, _)| key == "key") {
            for word in value.split(',') {
                let key = word.trim().parse::<PublicKey>();
                keys.add(key.map_err(|error| ConfigError::Value {
                    key: format!("{PREFIX}key"),
                    value: value.clone(),
                    why: error.to_string(),
                    meaning: meaning("key"),
                })?);
            }
        }
        Ok(keys)
    }

    fn number(
        &self,
        key: &'static str,
        from: u64,
        upto: u64,
        default: u64,
    ) -> Result<u64, ConfigError> {
        let parsed = self.parse(key, |v| {
            v.parse::<u64>()
                .ok()
                .filter(|n| (from..=upto).contains(n))
                .ok_or_else(|| format!("not a number from {from} to {upto}"))
        })?;
        Ok(parsed.unwrap_or(default))
    }

    fn yes(&self, key: &'static str) -> Result<bool, ConfigError> {
        let parsed = self.parse(key, |v| match v {
            "yes" | "1" => Ok(true),
            "no" | "0" => Ok(false),
            _ => Err("neither yes nor no".into()),
        })?;
        Ok(parsed.unwrap_or(false))
    }

    fn token(&self) -> Result<Option<Token>, ConfigError> {
        // A wrong one is not shown: it may be nearly right.
        let token = self.text("token").map(Token::new).transpose();
        token.map_err(|_| ConfigError::Value {
            key: format!("{PREFIX}token"),
            value: "...".into(),
            why: "not one word of visible ASCII".into(),
            meaning: meaning("token"),
        })
    }

    /// The action after a failure, which must be known even if the rest of the configuration makes no sense.
    pub fn on_error(&self) -> OnError {
        self.or("onerror", OnError::Retry).unwrap_or(OnError::Retry)
    }

    /// The first program of the system, likewise.
    pub fn init(&self) -> String {
        self.text("init").unwrap_or("/sbin/init").into()
    }

    /// Bytes per second.
    fn rate(&self, key: &'static str) -> Result<Option<String>, ConfigError> {
        self.parse(key, |v| {
            let digits = v.trim_end_matches(['K', 'M', 'G']);
            match digits.parse::<u32>() {
                Ok(n) if n > 0 && v.len() <= digits.len() + 1 => Ok(v.to_string()),
                _ => Err("not a number of bytes such as 500K or 20M".into()),
            }
        })
    }

    /// What is wrong with the details is told also when they are not in use.
    fn peers(&self) -> Result<Option<Peers>, ConfigError> {
        let on = self.parse("peers", |v| match v {
            "on" | "yes" => Ok(true),
            "off" | "no" => Ok(false),
            _ => Err("neither on nor off".into()),
        })?;
        let port = self.number("peers-port", 1, u64::from(u16::MAX), 7117)?;
        let from = self.parse("peers-from", |v| {
            v.split(',')
                .map(|net| {
                    let wrong = |_| format!("{net} is no network such as 10.1.0.0/16");
                    net.parse::<IpNet>().map_err(wrong)
                })
                .collect::<Result<Vec<_>, String>>()
        })?;
        let peers = Peers {
            port: u16::try_from(port).unwrap_or(u16::MAX),
            from: from.unwrap_or_default(),
            rate: self.rate("peers-rate")?,
        };
        Ok(on.unwrap_or(false).then_some(peers))
    }

    /// Checks everything.
    ///
    /// # Errors
    ///
    /// The first value that is missing or makes no sense.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let word = |v: &str| match v {
            "" => Err("empty".to_string()),
            v => Ok(v.to_string()),
        };
        let auto = |v: &str| {
            let v = word(v)?;
            Ok((v != "auto").then_some(v))
        };
        let seconds = |key, default| {
            self.number(key, 1, 86_400, default)
                .map(Duration::from_secs)
        };
        Ok(Config {
            data: self.needed("data")?,
            metadata: self
                .parse("metadata", |v| match v {
                    "tail" => Ok(None),
                    v => DeviceSpec::from_str(v).map(Some),
                })?
                .flatten(),
            store: self.stores()?,
            token: self.token()?,
            identity: self.parse("identity", |v| match v.starts_with('/') {
                true => Ok(PathBuf::from(v)),
                false => Err("not an absolute path".into()),
            })?,
            image: self.needed("image")?,
            name: self
                .parse("name", |v| {
                    // What device-mapper and the shells of initramfs scripts both take.
                    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                    if v.is_empty()
                        || v.len() > 64
                        || v.starts_with(['.', '-'])
                        || !v.chars().all(good)
                    {
                        return Err("not a name of at most 64 letters, digits, - _ .".into());
                    }
                    Ok(v.to_string())
                })?
                .unwrap_or_else(|| "root".into()),
            revert: self.or("revert", Revert::Eager)?,
            undo: self.parse("undo", undo_size)?.unwrap_or(0),
            provision: self.or("provision", Provision::Auto)?,
            allow_older: self.yes("allow-older")?,
            keys: self.keys()?,
            signed: self.yes("signed")?,
            oldest: self.number("oldest", 0, u64::MAX, 0)?,
            hydrate: self.or("hydrate", Hydrate::Idle)?,
            hydrate_rate: self.rate("hydrate-rate")?,
            peers: self.peers()?,
            offline: self.or("offline", Offline::Wait)?,
            damaged: self.or("damaged", Damaged::Refuse)?,
            on_error: self.or("onerror", OnError::Retry)?,
            then: self.or("then", Then::Boot)?,
            ip: self.or("ip", IpSpec::Dhcp)?,
            interface: self.parse("interface", auto)?.flatten(),
            rootfs: self.parse("rootfs", auto)?.flatten(),
            rootflags: self.text("rootflags").unwrap_or("").into(),
            init: self
                .parse("init", |v| match v.starts_with('/') {
                    true => Ok(v.to_string()),
                    false => Err("not an absolute path".into()),
                })?
                .unwrap_or_else(|| "/sbin/init".into()),
            module: self.parse("module", auto)?.flatten().map(PathBuf::from),
            device_timeout: seconds("device-timeout", 30)?,
            network_timeout: seconds("network-timeout", 30)?,
            parallel: usize::try_from(self.number("parallel", 1, 64, 8)?).unwrap_or(8),
            debug: self.yes("debug")?,
        })
    }
}

/// The bytes that `text` says, with K, M, G or T for powers of 1024; "off" for none.
fn undo_size(text: &str) -> Result<u64, String> {
    let bad = || "not off or a size such as 512M or 2G".to_owned();
    if text == "off" {
        return Ok(0);
    }
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("K") => 10,
        Some("M") => 20,
        Some("G") => 30,
        Some("T") => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes >= MIN_UNDO => Ok(bytes),
        Some(_) => Err(format!("less than {MIN_UNDO} bytes keeps nothing")),
        None => Err(bad()),
    }
}

/// The smallest undo area.
const MIN_UNDO: u64 = pristine_shared::undo::MIN_PAGES * pristine_shared::PAGE_SIZE as u64;

/// The words of a kernel command line; double quotes keep spaces together and are dropped, as in the kernel.
fn split_command_line(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}
