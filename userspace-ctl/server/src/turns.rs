// SPDX-License-Identifier: GPL-2.0

//! Fair queueing: so many answers are sent at a time, and when more want to, clients take turns. A client with a hundred
//! connections then gets no more than one with a single one.
//!
//! A turn is for a part of an answer, not for all of it, and is given up while the client does not take anything.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::clients::ClientKey;

/// The queue.
#[derive(Clone, Debug)]
pub(crate) struct Turns(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Turns taken, and how many may be.
    taken: usize,
    limit: usize,
    /// Clients that wait, each once; the first is the next.
    order: VecDeque<ClientKey>,
    waiting: HashMap<ClientKey, VecDeque<oneshot::Sender<Turn>>>,
}

/// A turn; the next one's comes when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn(Turns);

impl Turns {
    pub(crate) fn new(limit: usize) -> Self {
        Turns(Arc::new(Mutex::new(State {
            taken: 0,
            limit: limit.max(1),
            order: VecDeque::new(),
            waiting: HashMap::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes how many may be taken at a time.
    pub(crate) fn set_limit(&self, limit: usize) {
        self.state().limit = limit.max(1);
        self.pass_on();
    }

    /// A turn, if there is one at once.
    pub(crate) fn try_take(&self) -> Option<Turn> {
        let mut state = self.state();
        let free = state.taken < state.limit && state.order.is_empty();
        free.then(|| {
            state.taken += 1;
            Turn(self.clone())
        })
    }

    /// Waits for a turn of `client`.
    pub(crate) async fn take(&self, client: ClientKey) -> Turn {
        loop {
            if let Some(turn) = self.try_take() {
                return turn;
            }
            let (sender, receiver) = oneshot::channel();
            {
                let mut state = self.state();
                let queue = state.waiting.entry(client).or_default();
                queue.push_back(sender);
                if queue.len() == 1 {
                    state.order.push_back(client);
                }
            }
            // One may have become free between the two looks.
            self.pass_on();
            if let Ok(turn) = receiver.await {
                return turn;
            }
        }
    }

    /// Gives what is free to who waits. A waiter that has gone drops its turn, which passes it on again: so not under
    /// the lock.
    fn pass_on(&self) {
        while let Some(waiter) = self.state().next() {
            let _ = waiter.send(Turn(self.clone()));
        }
    }
}

impl State {
    /// Who is next, if a turn is free; the turn counts as taken.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        while self.taken < self.limit {
            let client = self.order.pop_front()?;
            let Some(queue) = self.waiting.get_mut(&client) else {
                continue;
            };
            let waiter = queue.pop_front();
            if queue.is_empty() {
                self.waiting.remove(&client);
            } else {
                self.order.push_back(client);
            }
            // Those that have gone must not cost a turn.
            if let Some(waiter) = waiter.filter(|waiter| !waiter.is_closed()) {
                self.taken += 1;
                return Some(waiter);
            }
        }
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().taken -= 1;
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{pin, Pin};
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn client(number: u8) -> ClientKey {
        ClientKey::of([10, 0, 0, number].into())
    }

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn clients_take_turns_however_many_answers_they_want() {
        let turns = Turns::new(1);
        let first = turns.try_take().unwrap();
        let mut greedy: Vec<_> = (0..10).map(|_| Box::pin(turns.take(client(1)))).collect();
        for one in &mut greedy {
            assert!(poll(one.as_mut()).is_pending());
        }
        let mut modest = pin!(turns.take(client(2)));
        assert!(poll(modest.as_mut()).is_pending());
        drop(first);
        let Poll::Ready(turn) = poll(greedy[0].as_mut()) else {
            panic!("who came first is first");
        };
        assert!(poll(modest.as_mut()).is_pending());
        drop(turn);
        assert!(poll(greedy[1].as_mut()).is_pending());
        let Poll::Ready(_turn) = poll(modest.as_mut()) else {
            panic!("the other client is next");
        };
    }

    #[test]
    fn a_turn_is_not_lost_with_who_waited_for_it() {
        let turns = Turns::new(1);
        let first = turns.try_take().unwrap();
        let mut gone = Box::pin(turns.take(client(1)));
        let mut granted_and_gone = Box::pin(turns.take(client(1)));
        let mut last = pin!(turns.take(client(2)));
        assert!(poll(gone.as_mut()).is_pending());
        assert!(poll(granted_and_gone.as_mut()).is_pending());
        assert!(poll(last.as_mut()).is_pending());
        drop(gone);
        drop(first);
        // Now it lies with the second, or with the last; if with the second, it must come back.
        drop(granted_and_gone);
        let Poll::Ready(turn) = poll(last.as_mut()) else {
            panic!("the turn was lost");
        };
        drop(turn);
        assert!(turns.try_take().is_some());
    }

    #[test]
    fn more_may_be_allowed_meanwhile() {
        let turns = Turns::new(1);
        let _first = turns.try_take().unwrap();
        let mut second = pin!(turns.take(client(1)));
        assert!(poll(second.as_mut()).is_pending());
        turns.set_limit(2);
        assert!(poll(second.as_mut()).is_ready());
    }
}
