// SPDX-License-Identifier: GPL-2.0

//! Blocks from neighbours while a disk is filled and put back before the boot: verified, and whatever a neighbour does, the
//! disk ends as the image.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use common::*;
use pristine_agent::config::{ImageSpec, StoreSpec};
use pristine_agent::master::Master;
use pristine_agent::store_master::{Access, StoreMaster};
use pristine_metadata::Run;
use pristine_store::peers::wire::{Answer, Entry, Status};
use pristine_store::{ImageId, TrustPolicy};
use pristine_testkit::{fake_peer, FaultyServer, TestStore};

const BLOCKS: usize = 2300;
const BATCH: u64 = 300;

/// What a neighbour does when it is asked for blocks; whether it goes on then.
type Act = Box<dyn Fn(&mut TcpStream, &[Entry]) -> bool + Send + Sync>;

fn master(server: &FaultyServer) -> StoreMaster {
    let spec: StoreSpec = server.url().parse().unwrap();
    let channel = ImageSpec::Channel("stable".into());
    let (access, trust) = (Access::default(), TrustPolicy::default());
    let opened = StoreMaster::open(&spec.into(), &access, &channel, &trust, 2, 2);
    opened.unwrap().with_peers(true)
}

/// All blocks that are asked for, with this content.
fn give(stream: &mut TcpStream, entries: &[Entry], content: impl Fn(u64) -> Vec<u8>) -> bool {
    let answer = Answer {
        status: Status::Ok,
        len: (entries.len() * BLOCK) as u32,
        mask: u64::MAX >> (64 - entries.len()),
    };
    let data: Vec<u8> = entries.iter().flat_map(|e| content(e.block)).collect();
    stream.write_all(&answer.encode()).is_ok() && stream.write_all(&data).is_ok()
}

struct Asked {
    /// Requests for blocks that the neighbour saw.
    requests: u64,
    /// What the store sent for it, in bytes.
    from_store: u64,
}

/// Fills a disk, and puts it back after it was used, with a neighbour that acts so.
fn with_neighbour(image: &Image, act: Act) -> Asked {
    let (store, id) = TestStore::with_image(&image.content).unwrap();
    let asked = Arc::new(AtomicU64::new(0));
    let counts = Arc::clone(&asked);
    let peer = fake_peer(BLOCKS as u64, move |stream, entries| {
        counts.fetch_add(1, Ordering::Relaxed);
        act(stream, entries)
    });
    let list = store.root().join("peers");
    std::fs::create_dir(&list).unwrap();
    let text = format!("lease 60\npeer {}\n", peer.unwrap());
    std::fs::write(list.join(id.to_string()), text).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    // The neighbour is known before the second answer comes.
    server.set_rules("packs/:delay=200".parse().unwrap());
    let (empty, id): (_, &ImageId) = (Platters::new(image, true), &id);
    let mut filling = master(&server);
    let world = run_agent(&empty, &mut filling, BATCH);
    check_holds(&world, &empty, &image.content, id.as_bytes());
    let from_store = filling.traffic().bytes;
    change(
        &world,
        &now(&world, true),
        &[Run {
            start: 100,
            end: 1900,
        }],
    );
    let used = now(&world, true);
    let world = run_agent(&used, &mut master(&server), BATCH);
    check_holds(&world, &used, &image.content, id.as_bytes());
    Asked {
        requests: asked.load(Ordering::Relaxed),
        from_store,
    }
}

#[test]
fn a_neighbour_spares_the_store_and_a_bad_one_is_a_detour() {
    let image = Image::new(11, BLOCKS);
    let content = image.content.clone();
    let honest = with_neighbour(
        &image,
        Box::new(move |stream, entries| {
            give(stream, entries, |block| {
                content[block as usize * BLOCK..][..BLOCK].to_vec()
            })
        }),
    );
    assert!(honest.requests > 10, "{}", honest.requests);
    // Wrong content; half an answer; none at all.
    let acts: [Act; 3] = [
        Box::new(|stream, entries| give(stream, entries, |_| vec![0x5a; BLOCK])),
        Box::new(|stream, entries| {
            give(stream, &entries[..1], |_| vec![0; BLOCK / 2]);
            false
        }),
        Box::new(|_, _| false),
    ];
    for act in acts {
        let bad = with_neighbour(&image, act);
        // It is left alone once that is known, by each of the two runs: not asked again for each batch.
        assert!((1..=8).contains(&bad.requests), "{}", bad.requests);
        assert!(bad.from_store > honest.from_store);
    }
}
