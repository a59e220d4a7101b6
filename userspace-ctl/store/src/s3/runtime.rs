// SPDX-License-Identifier: GPL-2.0

//! The asynchronous runtime that the client of S3 needs, kept in here: nobody outside sees a future.

use std::future::Future;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Result};
use crate::retry::CancelToken;

/// How long a cancelled operation goes on at most.
const LOOK: Duration = Duration::from_millis(50);

/// Runs futures on threads of its own. It may be used from threads of another runtime, where they may block.
#[derive(Debug)]
pub(super) struct Confined {
    /// `None` only while this is dropped.
    runtime: Option<Runtime>,
}

impl Confined {
    pub(super) fn new() -> Result<Self> {
        let built = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("pristine-s3")
            .enable_all()
            .build();
        let runtime = built.map_err(|error| Error::io("cannot start threads for S3", error))?;
        Ok(Confined {
            runtime: Some(runtime),
        })
    }

    /// Waits for a future, at most until `cancel` is cancelled; the future is dropped then.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        cancel: &CancelToken,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let runtime = self.runtime.as_ref().ok_or(Error::Cancelled)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        let task = runtime.spawn(async move {
            // Nobody waits any more: nothing to tell.
            let _ = sender.send(future.await);
        });
        loop {
            match receiver.recv_timeout(LOOK) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => {
                    task.abort();
                    return Err(Error::Cancelled);
                }
                Err(RecvTimeoutError::Timeout) => (),
                // The future panicked; its message is on stderr.
                Err(RecvTimeoutError::Disconnected) => return Err(Error::Cancelled),
            }
        }
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not block, which a runtime around this one would not allow.
            runtime.shutdown_background();
        }
    }
}
