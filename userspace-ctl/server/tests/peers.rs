// SPDX-License-Identifier: GPL-2.0

//! Machines are introduced to each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{start, Running};
use pristine_server::{Channels, PeerSettings, Settings, TokenRule};
use pristine_store::peers::Neighbours;
use pristine_store::{Error, HttpOptions, HttpStore, Store};
use pristine_testkit::{sample_image, TestStore};

fn settings(peers: PeerSettings) -> Settings {
    let mut settings = Settings::default();
    settings.peers = Some(peers);
    settings
}

fn list(server: &Running, path: &str) -> Vec<String> {
    let answer = server.get(path, "");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.field("cache-control"), Some("no-store"));
    let text = String::from_utf8(answer.body).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("lease 60"));
    let mut peers: Vec<String> = lines
        .map(|l| l.strip_prefix("peer ").unwrap().to_owned())
        .collect();
    peers.sort();
    peers
}

#[test]
fn machines_announce_themselves_and_nobody_else() {
    let (store, id) = TestStore::with_image(&sample_image(1, 4)).unwrap();
    let server = start(&store.root(), settings(PeerSettings::default()));
    let path = format!("/peers/{id}");
    assert_eq!(list(&server, &path), Vec::<String>::new());
    let put = |rest: &str| server.request("PUT", &format!("{path}/{rest}"), "").status;
    assert_eq!(put("7117"), 200);
    assert_eq!(put("7118"), 200);
    assert_eq!(put("127.0.0.1:7119"), 200);
    // Another machine, and what is none.
    assert_eq!(put("10.0.0.1:7117"), 403);
    assert_eq!(put("[::1]:7117"), 403);
    assert_eq!(put("0"), 405);
    assert_eq!(put("x"), 405);
    assert_eq!(server.request("PUT", &path, "").status, 405);
    assert_eq!(
        server.request("POST", &format!("{path}/80"), "").status,
        405
    );
    assert_eq!(
        list(&server, &path),
        ["127.0.0.1:7117", "127.0.0.1:7118", "127.0.0.1:7119"]
    );
    // Who announces itself gets the others.
    let answer = server.request("PUT", &format!("{path}/7117"), "content-length: 0\r\n");
    let text = String::from_utf8(answer.body).unwrap();
    assert!(!text.contains(":7117") && text.contains(":7118"), "{text}");
    let gone = server.request("DELETE", &format!("{path}/7118"), "");
    assert_eq!(gone.status, 204);
    assert_eq!(list(&server, &path), ["127.0.0.1:7117", "127.0.0.1:7119"]);
    assert_eq!(server.metric("peers"), 2.0);
    assert_eq!(server.metric("peer_announcements_total"), 4.0);
    assert_eq!(server.metric("refused_total{reason=\"peer\"}"), 2.0);
    // An image that is not here.
    let other = format!("/peers/{}/80", "0".repeat(64));
    assert_eq!(server.request("PUT", &other, "").status, 404);
    // The methods are for peers alone.
    let manifest = format!("/images/{id}.manifest");
    assert_eq!(server.request("PUT", &manifest, "").status, 405);
    assert_eq!(server.request("DELETE", &manifest, "").status, 405);
}

#[test]
fn a_flood_of_announcements_stays_within_limits() {
    let (store, id) = TestStore::with_image(&sample_image(1, 4)).unwrap();
    let limits = PeerSettings {
        per_client: 3,
        ..PeerSettings::default()
    };
    let server = start(&store.root(), settings(limits));
    let mut taken = 0;
    for port in 1..=200 {
        let path = format!("/peers/{id}/{port}");
        match server.request("PUT", &path, "").status {
            200 => taken += 1,
            status => assert_eq!(status, 429),
        }
    }
    assert_eq!((taken, server.metric("peers")), (3, 3.0));
    assert_eq!(list(&server, &format!("/peers/{id}")).len(), 3);
}

#[test]
fn who_may_announce_others_does() {
    let (store, id) = TestStore::with_image(&sample_image(1, 4)).unwrap();
    let limits = PeerSettings {
        total: 100,
        handful: 5,
        announcers: vec!["127.0.0.0/8".parse().unwrap()],
        ..PeerSettings::default()
    };
    let server = start(&store.root(), settings(limits));
    let put = |address: &str| {
        let path = format!("/peers/{id}/{address}");
        server.request("PUT", &path, "").status
    };
    for number in 1..=100 {
        assert_eq!(put(&format!("10.0.0.{number}:7117")), 200);
    }
    assert_eq!(put("10.0.0.101:7117"), 503);
    assert_eq!(put("224.0.0.1:7117"), 400);
    assert_eq!(put("0.0.0.0:7117"), 400);
    assert_eq!(list(&server, &format!("/peers/{id}")).len(), 5);
}

#[test]
fn they_are_off_by_default_and_follow_the_access_rules() {
    let (store, id) = TestStore::with_image(&sample_image(1, 4)).unwrap();
    let server = start(&store.root(), Settings::default());
    let path = format!("/peers/{id}/7117");
    assert_eq!(server.get(&format!("/peers/{id}"), "").status, 404);
    assert_eq!(server.request("PUT", &path, "").status, 405);
    let client = HttpStore::open(
        &format!("http://{}", server.address),
        HttpOptions::default(),
    )
    .unwrap();
    for port in [None, Some(7117)] {
        let refused = client.peers(&id, port);
        assert!(
            matches!(refused, Err(Error::Unsupported { .. })),
            "{refused:?}"
        );
    }

    let rules = store.root().with_file_name("access");
    let some = |channel: &str| Channels::Some([channel.parse().unwrap()].into());
    let text = [("a", "secret", "stable"), ("b", "other", "else")]
        .map(|(name, token, channel)| TokenRule::new(name, token, some(channel)).to_string())
        .join("\n");
    std::fs::write(&rules, text).unwrap();
    let mut with_rules = settings(PeerSettings::default());
    with_rules.access = Some(rules);
    let server = start(&store.root(), with_rules);
    let put = |fields: &str| server.request("PUT", &path, fields).status;
    assert_eq!(put(""), 401);
    assert_eq!(put("Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(put("Authorization: Bearer other\r\n"), 403);
    assert_eq!(put("Authorization: Bearer secret\r\n"), 200);
    let list = format!("/peers/{id}");
    assert_eq!(
        server.get(&list, "Authorization: Bearer other\r\n").status,
        403
    );
    assert_eq!(
        server.get(&list, "Authorization: Bearer secret\r\n").status,
        200
    );
}

#[test]
fn machines_find_each_other() {
    let (store, id) = TestStore::with_image(&sample_image(1, 4)).unwrap();
    let server = start(&store.root(), settings(PeerSettings::default()));
    let url = format!("http://{}", server.address);
    let client: Arc<dyn Store> = Arc::new(HttpStore::open(&url, HttpOptions::default()).unwrap());
    let machines: Vec<_> = (1..=3)
        .map(|port| Neighbours::new(id, Some(port)))
        .collect();
    let stores = [client];
    for machine in &machines {
        machine.look_after(&stores);
    }
    // The last one came when the others were there.
    let mut ports: Vec<u16> = machines[2]
        .states()
        .iter()
        .map(|p| p.address.port())
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [1, 2]);
    // Nobody listens there; whoever is asked for blocks then is left alone.
    assert!(machines[2].states().iter().all(|peer| peer.left_alone));
}
