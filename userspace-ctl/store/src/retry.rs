// SPDX-License-Identifier: GPL-2.0

//! Trying again, a bounded number of times and never at the same moment as everybody else.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Tells long operations to stop; clones are the same token.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        CancelToken::default()
    }

    /// Cancels everything that watches it.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// The flag itself, for what takes one.
    pub fn flag(&self) -> &AtomicBool {
        &self.0
    }

    /// # Errors
    /// [`Error::Cancelled`] if it was.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Sleeps, unless it is cancelled.
    pub(crate) fn sleep(&self, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// How often and how soon to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, at least 1. Default 6.
    pub attempts: u32,
    /// The wait before the second attempt; it doubles with each. Default 200 ms.
    pub first_delay: Duration,
    /// The longest wait. Default 5 s.
    pub max_delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            attempts: 6,
            first_delay: Duration::from_millis(200),
            max_delay: Duration::from_secs(5),
        }
    }
}

impl RetryPolicy {
    /// One attempt and no more.
    pub fn once() -> Self {
        RetryPolicy {
            attempts: 1,
            ..RetryPolicy::default()
        }
    }

    /// The wait after `failures` failures: exponential, and a random part of up to a half left out, so that machines
    /// that failed together do not come back together.
    pub fn delay(&self, failures: u32) -> Duration {
        let doubled = 1u32 << failures.saturating_sub(1).min(16);
        let full = self.first_delay.saturating_mul(doubled).min(self.max_delay);
        // RandomState is seeded by the system, and differs for each one made.
        let random = RandomState::new().hash_one(failures) % 1024;
        full - full / 2 * random as u32 / 1024
    }

    /// Runs `operation` until it succeeds, fails for good, or the attempts are used up. `worth` says which errors
    /// are worth another attempt.
    ///
    /// # Errors
    /// The last error of `operation`, or [`Error::Cancelled`].
    pub fn run<T>(
        &self,
        cancel: &CancelToken,
        worth: impl Fn(&Error) -> bool,
        mut operation: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let mut failures = 0;
        loop {
            cancel.check()?;
            match operation() {
                Err(error) if worth(&error) && failures + 1 < self.attempts => {
                    failures += 1;
                    cancel.sleep(self.delay(failures))?;
                }
                result => return result,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_and_are_bounded() {
        let policy = RetryPolicy::default();
        for failures in 1..40 {
            let full = Duration::from_millis(200)
                .saturating_mul(1 << (failures - 1).min(16))
                .min(Duration::from_secs(5));
            let delay = policy.delay(failures);
            assert!(delay <= full && delay >= full / 2, "{failures}: {delay:?}");
        }
    }

    #[test]
    fn attempts_are_counted() {
        let policy = RetryPolicy {
            attempts: 3,
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(2),
        };
        let mut calls = 0;
        let result: Result<()> = policy.run(
            &CancelToken::new(),
            |_| true,
            || {
                calls += 1;
                Err(Error::Cancelled)
            },
        );
        assert!(result.is_err());
        assert_eq!(calls, 3);
    }
}
