// SPDX-License-Identifier: GPL-2.0

//! Peers: machines that have blocks of an image and give them to their neighbours. The server only introduces them to each
//! other; it neither sees nor vouches for what they send, and who fetches verifies it.
//!
//! | request | |
//! | --- | --- |
//! | `PUT /peers/<image id>/<port>` | the machine that asks serves this image's blocks on this port, for the time of a lease; answers as GET does |
//! | `PUT /peers/<image id>/<address:port>` | the same of another machine; only from networks that may |
//! | `DELETE /peers/<image id>/<port>`, `.../<address:port>` | it does no longer |
//! | `GET /peers/<image id>` | a handful of them, chosen by chance, without the one that asks |
//!
//! The answer is a text, `lease SECONDS` and a line `peer ADDRESS:PORT` for each. Who may read the image may ask all of
//! this. Nothing of it is stored: after a restart the machines have announced themselves again within one lease.

mod registry;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http::{header, Method, StatusCode};
use ipnet::IpNet;
use pristine_store::{ImageId, ObjectName};

use crate::answer::Asker;
use crate::metrics::Refusal;
use crate::reply::{Body, Reply, TEXT};
use crate::request::Request;
use crate::shared::Shared;
use crate::source::Trouble;

pub(crate) use registry::{Full, Registry};

/// How peers are introduced to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSettings {
    /// For how long an announcement counts, in whole seconds, at least 5. Default 60 s.
    pub lease: Duration,
    /// Announcements at a time. Default 65,536, which take some 10 MiB.
    pub total: usize,
    /// Announcements of one client, over all images. Default 8.
    pub per_client: usize,
    /// Peers in an answer. Default 16.
    pub handful: usize,
    /// Networks whose machines may announce others. Default: none.
    pub announcers: Vec<IpNet>,
}

impl Default for PeerSettings {
    fn default() -> Self {
        PeerSettings {
            lease: Duration::from_secs(60),
            total: 1 << 16,
            per_client: 8,
            handful: 16,
            announcers: Vec::new(),
        }
    }
}

/// What a path below `/peers/` names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerPath {
    pub(crate) image: ImageId,
    peer: Option<Named>,
}

/// How a peer is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    /// Who asks, on this port.
    Port(u16),
    Address(SocketAddr),
}

impl PeerPath {
    /// From the part of a path after `/peers/`. One spelling for each.
    pub(crate) fn parse(rest: &str) -> Option<Self> {
        let (image, peer) = match rest.split_once('/') {
            None => (rest, None),
            Some((image, peer)) => (image, Some(peer)),
        };
        let peer = match peer {
            None => None,
            Some(text) => Some(Named::parse(text).filter(|named| named.port() != 0)?),
        };
        Some(PeerPath {
            image: image.parse().ok()?,
            peer,
        })
    }
}

impl Named {
    fn parse(text: &str) -> Option<Self> {
        let (named, spelled) = match text.parse::<u16>() {
            Ok(port) => (Named::Port(port), port.to_string()),
            Err(_) => {
                let address: SocketAddr = text.parse().ok()?;
                (Named::Address(address), address.to_string())
            }
        };
        (spelled == text).then_some(named)
    }

    fn port(self) -> u16 {
        match self {
            Named::Port(port) => port,
            Named::Address(address) => address.port(),
        }
    }
}

fn refuse(shared: &Shared, status: StatusCode, text: &'static str) -> Reply {
    shared.metrics.refused(Refusal::Peer);
    Reply::plain(status, text)
}

/// Answers a request below `/peers/` of somebody who may read the image.
pub(crate) async fn answer(
    shared: &Shared,
    settings: &PeerSettings,
    asker: &Asker,
    request: &Request,
    path: &PeerPath,
) -> Result<Reply, Trouble> {
    let Some(source) = asker.address else {
        return Ok(Reply::plain(StatusCode::FORBIDDEN, "no address\n"));
    };
    let own = |port| SocketAddr::new(source.ip().to_canonical(), port);
    let peer = match path.peer {
        None => None,
        Some(Named::Port(port)) => Some(own(port)),
        Some(Named::Address(address)) => {
            let other = address.ip().to_canonical() != source.ip().to_canonical();
            let from = source.ip().to_canonical();
            if other && !settings.announcers.iter().any(|net| net.contains(&from)) {
                let text = "a machine announces itself only, here\n";
                return Ok(refuse(shared, StatusCode::FORBIDDEN, text));
            }
            let ip = address.ip().to_canonical();
            if ip.is_unspecified() || ip.is_multicast() {
                let text = "this is no address of a machine\n";
                return Ok(refuse(shared, StatusCode::BAD_REQUEST, text));
            }
            Some(SocketAddr::new(ip, address.port()))
        }
    };
    let now = Instant::now();
    match (&request.method, peer) {
        (&Method::GET | &Method::HEAD, None) => Ok(list(shared, settings, path, own(0), now)),
        (&Method::PUT, Some(peer)) => {
            // Of images that are not here nobody needs to know; it also bounds what can be announced.
            let manifest = ObjectName::Manifest(path.image);
            shared
                .source
                .object(manifest, false, &shared.metrics)
                .await?;
            match shared
                .peers
                .announce(path.image, peer, own(0).ip(), settings, now)
            {
                Ok(()) => {
                    shared.metrics.announced();
                    Ok(list(shared, settings, path, peer, now))
                }
                Err(Full::Client) => {
                    let text = "this client has announced enough already\n";
                    Ok(refuse(shared, StatusCode::TOO_MANY_REQUESTS, text))
                }
                Err(Full::All) => {
                    let text = "enough peers are known already\n";
                    Ok(refuse(shared, StatusCode::SERVICE_UNAVAILABLE, text))
                }
            }
        }
        (&Method::DELETE, Some(peer)) => {
            shared.peers.withdraw(&path.image, &peer);
            Ok(Reply::new(StatusCode::NO_CONTENT, Body::Empty))
        }
        _ => Ok(Reply::plain(
            StatusCode::METHOD_NOT_ALLOWED,
            "GET the peers of an image, PUT or DELETE one\n",
        )
        .with(header::ALLOW, "GET, HEAD, PUT, DELETE")),
    }
}

/// The list for `asker`, who is not on it. Asked for without a port, it is told from the others by its address only if no
/// two of them share one; another machine behind the same address may well be a neighbour.
fn list(
    shared: &Shared,
    settings: &PeerSettings,
    path: &PeerPath,
    asker: SocketAddr,
    now: Instant,
) -> Reply {
    let chosen = shared
        .peers
        .some(&path.image, &asker, settings.handful, now);
    let mut text = format!("lease {}\n", settings.lease.as_secs());
    for peer in chosen {
        text.push_str(&format!("peer {peer}\n"));
    }
    Reply::new(StatusCode::OK, Body::Bytes(text.into()))
        .with(header::CONTENT_TYPE, TEXT)
        .with(header::CACHE_CONTROL, "no-store")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let image = "0123456789abcdef".repeat(4);
        let peer = |rest: &str| {
            let path = PeerPath::parse(&format!("{image}{rest}"))?;
            Some(path.peer)
        };
        assert_eq!(peer(""), Some(None));
        assert_eq!(peer("/80"), Some(Some(Named::Port(80))));
        let address = "10.0.0.1:80".parse().unwrap();
        assert_eq!(peer("/10.0.0.1:80"), Some(Some(Named::Address(address))));
        let address = "[fe80::1]:80".parse().unwrap();
        assert_eq!(peer("/[fe80::1]:80"), Some(Some(Named::Address(address))));
        for bad in [
            "/",
            "/0",
            "/080",
            "/+80",
            "/65536",
            "/x",
            "/80/",
            "/10.0.0.1",
            "/10.0.0.1:0",
            "/[fe80:0::1]:80",
            "/host:80",
            "x",
        ] {
            assert_eq!(peer(bad), None, "{bad}");
        }
        assert_eq!(PeerPath::parse("x/80"), None);
    }
}
