// SPDX-License-Identifier: GPL-2.0

//! When the bytes of an answer may go out, and how long a client may take to take them.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clients::Counted;
use crate::settings::{Settings, MIN_RATE};
use crate::shared::Shared;
use crate::turns::Turn;

/// The most bytes that are sent in one turn.
const TURN: u64 = 1 << 20;
/// The fewest, also to slow clients.
const SMALL_TURN: u64 = 16 << 10;

/// Sees to it that limits are kept.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    shared: Arc<Shared>,
    client: Arc<Counted>,
    client_bytes: Option<u64>,
    total_bytes: Option<u64>,
}

impl Pace {
    pub(crate) fn new(shared: &Arc<Shared>, client: &Arc<Counted>, settings: &Settings) -> Self {
        Pace {
            shared: Arc::clone(shared),
            client: Arc::clone(client),
            client_bytes: settings.client_bytes,
            total_bytes: settings.total_bytes,
        }
    }

    /// How many bytes to send in one turn: so few that a limit is no matter of stop and go.
    pub(crate) fn most(&self) -> u64 {
        let rate = self.client_bytes.into_iter().chain(self.total_bytes).min();
        rate.map_or(TURN, |rate| (rate / 8).clamp(SMALL_TURN, TURN))
    }

    /// Waits until so many bytes may be sent. Few bytes need no turn: they cost others nothing.
    pub(crate) async fn turn(&self, bytes: u64) -> Option<Turn> {
        sleep(self.client.bytes(bytes, self.client_bytes)).await;
        let turn = match bytes > SMALL_TURN {
            true => Some(self.again().await),
            false => None,
        };
        if let Some(rate) = self.total_bytes {
            let wait = {
                let mut total = self.shared.total.lock().await;
                total.take(bytes, rate, Instant::now())
            };
            // The turn is kept meanwhile, so that the others queue by client.
            sleep(wait).await;
        }
        turn
    }

    /// A turn for bytes that were waited for before.
    pub(crate) async fn again(&self) -> Turn {
        if let Some(turn) = self.shared.turns.try_take() {
            return turn;
        }
        let _waits = self.shared.metrics.waits();
        self.shared.turns.take(self.client.key).await
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.shared.metrics.sent(bytes);
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

/// Most limits are none, and a timer costs more than the look.
pub(crate) async fn sleep(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

/// How long a client may still be waited for, in one answer.
#[derive(Debug)]
pub(crate) struct Patience {
    stall: Duration,
    waited: Duration,
    taken: u64,
}

impl Patience {
    pub(crate) fn new(stall: Duration) -> Self {
        Patience {
            stall,
            waited: Duration::ZERO,
            taken: 0,
        }
    }

    /// The client took so many bytes.
    pub(crate) fn took(&mut self, bytes: u64) {
        self.taken += bytes;
    }

    /// Waits for the client, but not too long: [`io::ErrorKind::TimedOut`].
    pub(crate) async fn wait<T>(
        &mut self,
        what: impl Future<Output = io::Result<T>>,
    ) -> io::Result<T> {
        let earned = Duration::from_secs(self.taken / MIN_RATE);
        let left = (self.stall + earned).saturating_sub(self.waited);
        let begin = Instant::now();
        let done = tokio::time::timeout(left.min(self.stall), what).await;
        self.waited += begin.elapsed();
        done.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}
