// SPDX-License-Identifier: GPL-2.0

//! Whether the service honours conditions on puts. Some refuse them; some take them and ignore them, and then a
//! compare-and-swap would always succeed. So it is tried out, on an object that nobody else knows.

use object_store::{PutMode, UpdateVersion};

use super::{PutOutcome, S3Store};
use crate::error::{Error, Result};
use crate::lease::nonce;

/// What the service honours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Conditional {
    /// Puts that create (`If-None-Match: *`).
    pub(super) create: bool,
    /// Puts that replace a certain version (`If-Match`).
    pub(super) update: bool,
}

impl S3Store {
    /// What the service honours; tried out when it is first asked for, with six requests.
    pub(super) fn conditional(&self) -> Result<&Conditional> {
        if let Some(known) = self.conditional.get() {
            return Ok(known);
        }
        let path = format!("probes/{}", nonce());
        let found = self.probe(&path);
        let cleaned = self.delete(&path, "a probe");
        let found = found?;
        cleaned?;
        Ok(self.conditional.get_or_init(|| found))
    }

    fn probe(&self, path: &str) -> Result<Conditional> {
        let put = |bytes: &[u8], mode| answer(self.put_mode(path, "a probe", bytes, mode));
        let update = |tag: String| {
            PutMode::Update(UpdateVersion {
                e_tag: Some(tag),
                version: None,
            })
        };
        let created = put(b"1", PutMode::Create)?;
        let again = put(b"2", PutMode::Create)?;
        let create = (created, again) == (Answer::Done, Answer::Refused);
        if created != Answer::Done {
            self.put_plain(path, "a probe", b"1")?;
        }
        // Of the content that was there before the last one.
        let before = self.read(path, "a probe", None, 16)?.1.e_tag;
        self.put_plain(path, "a probe", b"3")?;
        let now = self.read(path, "a probe", None, 16)?.1.e_tag;
        let (Some(before), Some(now)) = (before, now) else {
            return Ok(Conditional {
                create,
                update: false,
            });
        };
        let wrong = put(b"4", update(before))?;
        let right = match wrong {
            Answer::Refused => put(b"5", update(now))?,
            other => other,
        };
        Ok(Conditional {
            create,
            update: (wrong, right) == (Answer::Refused, Answer::Done),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It was put.
    Done,
    /// The condition was not met.
    Refused,
    /// The service does not know such conditions.
    Unknown,
}

fn answer(outcome: Result<PutOutcome>) -> Result<Answer> {
    match outcome {
        Ok(PutOutcome::Done) => Ok(Answer::Done),
        Ok(PutOutcome::ConditionFailed) => Ok(Answer::Refused),
        // 400 and 501 are what services say to headers that they do not implement.
        Err(Error::Status { status: 501, .. } | Error::Unsupported { .. }) => Ok(Answer::Unknown),
        Err(Error::Refused { why, .. }) if why.contains("400") || why.contains("mplement") => {
            Ok(Answer::Unknown)
        }
        Err(error) => Err(error),
    }
}
