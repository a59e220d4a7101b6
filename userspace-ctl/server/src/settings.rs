// SPDX-License-Identifier: GPL-2.0

//! What can be set, and changed while the server runs.

use std::path::PathBuf;
use std::time::Duration;

use crate::peers::PeerSettings;

/// Limits, credentials and certificates. All of it can be changed while the server runs, see [`crate::Handle::reload`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// Who may read what, see [`crate::AccessRules`]. Without it everybody may read everything.
    pub access: Option<PathBuf>,
    /// Speak TLS, and nothing else. Whether there is any cannot be changed while the server runs.
    pub tls: Option<TlsFiles>,
    /// Connections at a time, on each address that is listened on. Default 4096.
    pub connections: usize,
    /// Connections at a time of one client, that is one IPv4 address or one /64 of IPv6. Default 256.
    pub client_connections: usize,
    /// Requests per second of one client. Default: no limit.
    pub client_requests: Option<u64>,
    /// Bytes per second to one client. Default: no limit.
    pub client_bytes: Option<u64>,
    /// Bytes per second to all clients. Default: no limit.
    pub total_bytes: Option<u64>,
    /// Answers that are sent at the same time; others wait until it is their client's turn. Default 64.
    pub active: usize,
    /// Time for a TLS handshake, and for the header of a request once it began. Default 10 s.
    pub header_time: Duration,
    /// Time that a connection may be without a request. Default 60 s.
    pub idle_time: Duration,
    /// Time that a client may take no byte of an answer. Default 30 s. A whole answer may take this and its length at
    /// [`MIN_RATE`].
    pub stall_time: Duration,
    /// Time for answers under way once the server is told to stop. Default 10 s.
    pub drain_time: Duration,
    /// Introduce machines that have an image to each other. Default: no.
    pub peers: Option<PeerSettings>,
}

/// No client is waited for that takes less than this, in bytes per second.
pub const MIN_RATE: u64 = 4 << 10;

/// Files that TLS needs, all of them PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those between it and the root.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
    /// Who signs certificates of clients. A client needs none, but one that it shows must be valid.
    pub client_ca: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            access: None,
            tls: None,
            connections: 4096,
            client_connections: 256,
            client_requests: None,
            client_bytes: None,
            total_bytes: None,
            active: 64,
            header_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(60),
            stall_time: Duration::from_secs(30),
            drain_time: Duration::from_secs(10),
            peers: None,
        }
    }
}
