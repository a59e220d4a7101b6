// SPDX-License-Identifier: GPL-2.0

//! What makes a release trusted.
//!
//! | | with keys | without keys |
//! | --- | --- | --- |
//! | signature | at least one, good, of a trusted key; others do not matter | not looked at |
//! | expiry | refused from that time on | not looked at: it proves nothing |
//! | generation | refused below [`Policy::oldest`] | likewise |
//!
//! So keys are rotated by signing with the old one and the new one until all machines trust the new one, and then with
//! the new one alone.
//!
//! The clock: in an initramfs it may say anything, 1970 above all, for it may have no battery, and nobody set it yet. A
//! machine that did not boot for that would be worse than one that trusts a release some days too long. But a clock that
//! shows a time before the release was published is certainly wrong, and the truth is at least that time. So the later
//! of the two counts, with [`Policy::not_before`], a time that is known to be past, as a third. A clock that is too fast
//! makes releases expire too early; then the machine goes on with what it has.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::key::{KeyId, PublicKey};
use crate::keys::Keys;
use crate::signature::Signature;

/// Why a release is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// Nobody signed it, and somebody should have.
    #[error("it is not signed; trusted keys: {}", list(.trusted))]
    Unsigned {
        /// The trusted keys.
        trusted: Vec<String>,
    },
    /// Only strangers signed it.
    #[error("it is signed by {}, which is not trusted; trusted keys: {}", list(.signed_by), list(.trusted))]
    UnknownKey {
        /// The keys that it claims to be signed with.
        signed_by: Vec<KeyId>,
        /// The trusted keys.
        trusted: Vec<String>,
    },
    /// A signature that claims to be of a trusted key is not.
    #[error(
        "its signature by key {key} is wrong: it was changed after it was signed, or never signed"
    )]
    BadSignature {
        /// The key.
        key: String,
    },
    /// It has expired.
    #[error("it expired at {}, and it is {} now", time(*.expires), time(*.now))]
    Expired {
        /// When it expired, in seconds since 1970.
        expires: u64,
        /// What time it is.
        now: u64,
    },
    /// It is older than what is allowed.
    #[error("it is generation {generation}, and the oldest allowed one is {oldest}")]
    TooOld {
        /// Its generation.
        generation: u64,
        /// The oldest allowed.
        oldest: u64,
    },
}

fn list(keys: &[impl ToString]) -> String {
    let keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
    keys.join(", ")
}

/// What a release says about itself, as far as trust goes. Times are in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Its generation.
    pub generation: u64,
    /// When it was published.
    pub published: u64,
    /// When it expires.
    pub expires: Option<u64>,
}

/// What makes a release trusted. The default trusts anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// One of these must have signed it; if there are none, nobody need have.
    pub keys: Keys,
    /// The oldest generation that is allowed.
    pub oldest: u64,
    /// A time, in seconds since 1970, that is certainly past, whatever the clock says.
    pub not_before: u64,
    /// What the clock says, in seconds since 1970; `None` to look.
    pub clock: Option<u64>,
}

/// Why a release is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trusted {
    /// The trusted keys that signed it; empty if none were asked for.
    pub signed_by: Vec<PublicKey>,
    /// The clock shows a time before the release was published, so that its expiry could not really be checked.
    pub clock_is_behind: bool,
}

impl Policy {
    /// Trusts what one of these keys signed.
    pub fn with_keys(keys: Keys) -> Self {
        Policy {
            keys,
            ..Policy::default()
        }
    }

    /// Whether a release is trusted that says `terms`, in just the bytes of `text`, with `signatures` (each the four lines
    /// of a `.minisig` file; one that cannot be read counts as none).
    ///
    /// # Errors
    /// [`TrustError`]: what is wrong with it.
    pub fn check(
        &self,
        text: &[u8],
        signatures: &[String],
        terms: &Terms,
    ) -> Result<Trusted, TrustError> {
        let mut trusted = Trusted::default();
        if !self.keys.is_empty() {
            trusted.signed_by = self.signers(text, signatures)?;
            let clock = self.clock.unwrap_or_else(now);
            trusted.clock_is_behind = clock < terms.published;
            let now = clock.max(terms.published).max(self.not_before);
            if let Some(expires) = terms.expires.filter(|expires| *expires <= now) {
                return Err(TrustError::Expired { expires, now });
            }
        }
        if terms.generation < self.oldest {
            return Err(TrustError::TooOld {
                generation: terms.generation,
                oldest: self.oldest,
            });
        }
        Ok(trusted)
    }

    /// The trusted keys that signed it; never empty.
    fn signers(&self, text: &[u8], signatures: &[String]) -> Result<Vec<PublicKey>, TrustError> {
        let trusted = || self.keys.iter().map(ToString::to_string).collect();
        let signatures: Vec<Signature> = signatures.iter().flat_map(|s| s.parse()).collect();
        let mut good: Vec<PublicKey> = Vec::new();
        let mut bad = None;
        for signature in &signatures {
            for key in self.keys.with_id(signature.key_id()) {
                if !signature.verify(key, text) {
                    bad = Some(key.to_string());
                } else if !good.contains(key) {
                    good.push(key.clone());
                }
            }
        }
        match bad {
            _ if !good.is_empty() => Ok(good),
            Some(key) => Err(TrustError::BadSignature { key }),
            None if signatures.is_empty() => Err(TrustError::Unsigned { trusted: trusted() }),
            None => Err(TrustError::UnknownKey {
                signed_by: signatures.iter().map(Signature::key_id).collect(),
                trusted: trusted(),
            }),
        }
    }
}

/// What the clock says, in seconds since 1970; 0 if it says a time before that.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs())
}

/// A time as `2026-11-21 09:30:05Z`.
pub fn time(seconds: u64) -> String {
    let days = seconds / 86400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Days to a date in the Gregorian calendar, counted in eras of 400 years that begin in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_formatted() {
        assert_eq!(time(0), "1970-01-01 00:00:00Z");
        assert_eq!(time(951_782_399), "2000-02-28 23:59:59Z");
        assert_eq!(time(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(time(1_795_253_405), "2026-11-21 09:30:05Z");
        // No time of any release makes it fail.
        assert!(time(u64::MAX).len() > 20);
    }
}
