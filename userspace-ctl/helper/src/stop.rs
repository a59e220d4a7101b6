// SPDX-License-Identifier: GPL-2.0

//! How the helper comes to an end, and why.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pristine_store::CancelToken;

/// Why it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing is stale any more.
    Complete,
    /// It was asked to stop.
    Asked,
    /// Another helper took the device over.
    TakenOver,
    /// The device is gone.
    Gone,
    /// The device means another image or generation than it did when the helper attached.
    Changed(String),
    /// The kernel refuses what it should not.
    Failed(String),
}

/// Tells all threads to stop. The first reason is the one that counts.
#[derive(Debug, Default)]
pub struct Stop {
    end: Mutex<Option<End>>,
    changed: Condvar,
    stopping: AtomicBool,
    cancel: CancelToken,
}

impl Stop {
    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the helper. What is in hand is still finished.
    pub fn end(&self, why: End) {
        let mut end = self.lock();
        end.get_or_insert(why);
        self.stopping.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether it is coming to an end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Why it comes to an end, if it does.
    pub fn why(&self) -> Option<End> {
        self.lock().clone()
    }

    /// Begins anew: it was not the end.
    pub fn reset(&self) {
        let mut end = self.lock();
        *end = None;
        self.stopping.store(false, Ordering::Release);
        self.cancel.flag().store(false, Ordering::Release);
    }

    /// Drops what is in hand, too.
    pub fn cancel(&self) {
        self.cancel.cancel();
        let _end = self.lock();
        self.changed.notify_all();
    }

    /// The token of those that have something in hand.
    pub fn token(&self) -> &CancelToken {
        &self.cancel
    }

    /// Sleeps; less when the helper comes to an end meanwhile. Whether it goes on.
    pub fn sleep(&self, time: Duration) -> bool {
        self.wait(time, |end| end.is_none())
    }

    /// Sleeps; less when the helper comes to an end meanwhile, or when `flag` is set, which is cleared then. Whether it goes
    /// on.
    pub fn sleep_until_set(&self, time: Duration, flag: &AtomicBool) -> bool {
        self.wait(time, |end| end.is_none() && !flag.load(Ordering::Acquire));
        flag.store(false, Ordering::Release);
        !self.is_stopping()
    }

    /// Sets a flag that [`Stop::sleep_until_set`] waits for.
    pub fn set(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::Release);
        let _end = self.lock();
        self.changed.notify_all();
    }

    /// Sleeps; less when what is in hand is to be dropped. Whether it goes on.
    pub fn sleep_in_hand(&self, time: Duration) -> bool {
        self.wait(time, |_| !self.cancel.is_cancelled())
    }

    fn wait(&self, time: Duration, go_on: impl Fn(&Option<End>) -> bool) -> bool {
        let until = Instant::now() + time;
        let mut end = self.lock();
        while go_on(&end) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let woken = self.changed.wait_timeout(end, left);
            end = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }
}
