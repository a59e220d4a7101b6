// SPDX-License-Identifier: GPL-2.0

//! The list of peers that a server gives: `lease SECONDS`, and a line `peer ADDRESS:PORT` for each. Lines that begin with
//! another word are of later versions, and ignored.

use std::net::SocketAddr;
use std::time::Duration;

/// The most bytes of a list that are read, and so some 250 peers.
pub const MAX_LIST: u64 = 8 << 10;

/// A list of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerList {
    /// For how long an announcement counts.
    pub lease: Duration,
    /// Some of the others.
    pub peers: Vec<SocketAddr>,
}

impl PeerList {
    /// Understands a list; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let lease: u64 = lines.next()?.strip_prefix("lease ")?.parse().ok()?;
        let peers = lines.filter_map(|line| line.strip_prefix("peer ")?.parse().ok());
        Some(PeerList {
            // Whatever a server says, it is not asked all the time, and not forgotten.
            lease: Duration::from_secs(lease.clamp(5, 3600)),
            peers: peers.filter(|peer: &SocketAddr| peer.port() != 0).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let text =
            "lease 60\npeer 10.0.0.1:80\nlater thing\npeer [fe80::1]:1\npeer x\npeer 1.2.3.4:0\n";
        let list = PeerList::parse(text).unwrap();
        assert_eq!(list.lease, Duration::from_secs(60));
        let expected = ["10.0.0.1:80", "[fe80::1]:1"].map(|text| text.parse().unwrap());
        assert_eq!(list.peers, expected);
        for bad in ["", "peer 10.0.0.1:80", "lease x", "<html>"] {
            assert_eq!(PeerList::parse(bad), None, "{bad}");
        }
    }
}
