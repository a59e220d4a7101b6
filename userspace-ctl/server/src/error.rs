// SPDX-License-Identifier: GPL-2.0

//! Why the server cannot serve.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::access::RulesError;

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// What should be served is no store.
    #[error(transparent)]
    Store(#[from] pristine_store::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The rules of access make no sense.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// Certificates or keys cannot be used.
    #[error("cannot use {}: {why}", .file.display())]
    Tls {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Settings that do not go together.
    #[error("{0}")]
    Settings(String),
    /// Serving ended with an error.
    #[error("cannot go on serving: {0}")]
    Serve(io::Error),
}
