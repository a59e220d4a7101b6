// SPDX-License-Identifier: GPL-2.0

//! How publishers keep apart on a service without conditional puts.
//!
//! No lock can be had from puts and gets alone, but a race can be noticed: a publisher first puts a *claim*, an object
//! of a name that nobody else has, `claims/<what>/<nonce>`, and then lists the claims there. Of two publishers at
//! least one sees the other's claim, for each lists after it has put. Whoever sees another one withdraws, waits for a
//! random time, and tries again, a few times. Whoever is alone reads what it expects *again*, changes it, and only then
//! takes its claim away; so who comes later either sees the claim, or the change.
//!
//! A claim that is older than a minute is of a publisher that died, and is taken away. One that lives gives up when it
//! has not changed anything within 20 seconds of its claim, so a claim that is taken away is never acted upon;
//! and what it has put it reads again, so that what went wrong in spite of all is told. Times are the service's own.

use std::time::{Duration, Instant};

use super::S3Store;
use crate::error::{Error, Result};
use crate::lease::nonce;
use crate::retry::RetryPolicy;

/// Claims older than this, in milliseconds, are of publishers that died.
const STALE: u64 = 60_000;
/// When the holder of a claim must begin its change.
const BEGIN_WITHIN: Duration = Duration::from_secs(20);
/// How often a claim is tried.
const ATTEMPTS: u32 = 6;

/// Until when a change may begin.
pub(super) struct Deadline<'a> {
    store: &'a S3Store,
    claimed: Instant,
}

impl Deadline<'_> {
    /// # Errors
    /// [`Error::Timeout`] once it is too late.
    pub(super) fn check(&self) -> Result<()> {
        if self.claimed.elapsed() < BEGIN_WITHIN {
            return Ok(());
        }
        Err(Error::Timeout {
            location: self.store.location.clone(),
            why: "a claim was too old when its turn came".to_owned(),
        })
    }
}

impl S3Store {
    /// Runs `change` while no other publisher that asks for the same claim does.
    ///
    /// # Errors
    /// Those of `change`, [`Error::InUse`] if others were always there, and what can go wrong on the way.
    pub(super) fn exclusively<T>(
        &self,
        claim: &str,
        mut change: impl FnMut(&Deadline<'_>) -> Result<T>,
    ) -> Result<T> {
        let directory = format!("claims/{claim}");
        let wait = RetryPolicy::default();
        for attempt in 1..=ATTEMPTS {
            let name = nonce();
            let path = format!("{directory}/{name}");
            let deadline = Deadline {
                store: self,
                claimed: Instant::now(),
            };
            self.put_plain(&path, "a claim", &[])?;
            let result = match self.alone(&directory, &name) {
                Ok(true) => Some(change(&deadline)),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            };
            // One that cannot be taken away becomes stale.
            let withdrawn = self.delete(&path, "a claim");
            match result {
                Some(result) => return result,
                None => withdrawn?,
            }
            self.cancel.sleep(wait.delay(attempt))?;
        }
        Err(Error::InUse {
            location: self.location.clone(),
            who: format!(
                "another publisher is changing {claim}; if it died, this passes within a minute"
            ),
        })
    }

    /// Whether there is no claim but this one; takes stale ones away.
    fn alone(&self, directory: &str, name: &str) -> Result<bool> {
        let claims = self.list_directory(directory)?;
        let time = |wanted: &str| {
            let found = claims.iter().find(|(found, _)| found == wanted);
            found.map(|(_, meta)| super::modified(meta))
        };
        let mine = time(name).ok_or_else(|| Error::Protocol {
            location: self.location.clone(),
            object: "the list of claims".to_owned(),
            why: "it lacks what was just put; the service is not consistent enough to publish to"
                .to_owned(),
        })?;
        let mut alone = true;
        for (other, meta) in claims.iter().filter(|(other, _)| other != name) {
            if super::modified(meta).saturating_add(STALE) < mine {
                self.delete(&format!("{directory}/{other}"), "a stale claim")?;
            } else {
                alone = false;
            }
        }
        Ok(alone)
    }
}
