// SPDX-License-Identifier: GPL-2.0

//! The HTTP server of a store, behind `pristine serve`.
//!
//! It serves what [`pristine_store`] names and nothing else: a request's path must be that of an object, of a channel's
//! pointer, of the marker, or of one of the lists (`images/`, `channels/`, `releases/<channel>/`). So there are no path tricks, and nothing
//! that a publisher is still writing is ever seen. Objects never change, and say so to caches; pointers are read whole
//! (they are moved by rename), with an ETag of their content.
//!
//! | layer | |
//! | --- | --- |
//! | `listen` | accepts connections; drains them at the end |
//! | `connection`, `tls` | one connection: its client, its TLS, its version of HTTP |
//! | `http1`, `link` | HTTP/1.1, with `sendfile` for plain TCP |
//! | `http2` | HTTP/2, by hyper |
//! | `answer`, `access`, `scope` | what is asked for, and who may have it |
//! | `peers` | machines that serve each other, introduced here |
//! | `source` | where it comes from: a directory, or another store through a cache |
//! | `pace`, `turns`, `clients` | limits, and fair queueing between clients |
//!
//! HTTP/1.1 is spoken here rather than by a library because of `sendfile`: through a library's body each byte would be
//! copied twice more. `make bench-serve` compares it with nginx, which sends files the same way.
//!
//! [`Server::bind`] opens the sockets, so that their addresses are known; [`Server::run`] serves until its shutdown future
//! is done, and then finishes the answers that are under way. [`Handle::reload`] changes settings, rules and certificates
//! meanwhile; connections stay.

mod access;
mod answer;
mod clients;
mod connection;
mod error;
mod http1;
mod http2;
mod link;
mod listen;
mod listing;
mod metrics;
mod pace;
mod peers;
mod range;
mod reply;
mod request;
mod scope;
mod settings;
mod shared;
mod source;
pub mod systemd;
mod tls;
mod turns;

use std::future::Future;
use std::io;

pub use access::{AccessRules, Channels, Grant, RulesError, TokenRule};
pub use error::ServeError;
pub use listen::{Handle, Options, Origin, Server};
pub use peers::PeerSettings;
pub use settings::{Settings, TlsFiles, MIN_RATE};
pub use shared::{Access, Logs};

/// Done when the process gets SIGTERM or SIGINT.
///
/// # Errors
/// If the signals cannot be caught.
pub fn termination() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{signal, SignalKind};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}

/// Raises the number of files that this process may have open as far as it may, and returns it.
pub fn raise_file_limit() -> u64 {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let wanted = Rlimit {
            current: maximum,
            maximum,
        };
        // What could not be raised stays as it was, and is what is returned.
        let _ = setrlimit(Resource::Nofile, wanted);
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
