// SPDX-License-Identifier: GPL-2.0

//! Neighbours: what is given, what is taken, and what becomes of those that lie, dawdle or die.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use common::{places, settings, Kernel, Running};
use pristine_helper::helper::Settings;
use pristine_helper::pace::Hydrate;
use pristine_helper::peers::clean::{CleanBlocks, Shape};
use pristine_helper::peers::serve::{Limits, PeerServer};
use pristine_helper::stop::End;
use pristine_helper::units::Units;
use pristine_store::peers::wire::{Answer, Ask, Entry, Request, Status, ANSWER_LEN, REQUEST_LEN};
use pristine_store::peers::Neighbours;
use pristine_store::{Digest, ImageId};
use pristine_testkit::{fake_peer, sample_image, FaultyServer, TestStore};

/// The disk of a machine, as its server of blocks sees it.
struct Disk {
    kernel: Arc<Kernel>,
    /// A block that is written while blocks are read.
    written_meanwhile: Mutex<Option<u64>>,
}

impl CleanBlocks for Disk {
    fn shape(&self) -> io::Result<Shape> {
        Ok(Shape {
            image: self.kernel.image(),
            blocks: self.kernel.blocks(),
            units: Units::new(self.kernel.shift()).unwrap(),
        })
    }

    fn clean(&self, first: u64, words: u64) -> io::Result<Vec<u64>> {
        Ok(self.kernel.clean(first, words))
    }

    fn read(&self, blocks: Range<u64>) -> io::Result<Vec<u8>> {
        let data = self.kernel.disk(blocks);
        if let Some(block) = self.written_meanwhile.lock().unwrap().take() {
            self.kernel.write(block);
        }
        Ok(data)
    }
}

fn serve_with(kernel: &Arc<Kernel>, limits: Limits, meanwhile: Option<u64>) -> PeerServer {
    let disk = Disk {
        kernel: Arc::clone(kernel),
        written_meanwhile: Mutex::new(meanwhile),
    };
    let server = PeerServer::start(Box::new(disk), "127.0.0.1:0".parse().unwrap(), limits).unwrap();
    server.given().plain.store(true, Ordering::Release);
    server
}

fn serve(kernel: &Arc<Kernel>) -> PeerServer {
    let limits = Limits {
        rate: None,
        connections: 64,
        of_one: 64,
        ..Limits::default()
    };
    serve_with(kernel, limits, None)
}

/// A machine that holds all of the image.
fn whole(image: &[u8], id: ImageId) -> Arc<Kernel> {
    let kernel = Kernel::new(id, image, 0, 12);
    kernel.only_stale(&[]);
    kernel
}

fn content(image: &[u8], block: u64) -> &[u8] {
    &image[block as usize * 4096..][..4096]
}

fn blocks_with_content(image: &[u8]) -> u64 {
    image
        .chunks(4096)
        .filter(|b| b.iter().any(|b| *b != 0))
        .count() as u64
}

fn ask(
    peer: SocketAddr,
    image: ImageId,
    entries: &[(u64, &[u8])],
) -> io::Result<(Answer, Vec<u8>)> {
    let mut stream = TcpStream::connect(peer)?;
    let request = Request {
        image,
        ask: Ask::Blocks(entries.len() as u32),
    };
    let mut bytes = request.encode().to_vec();
    for (block, content) in entries {
        let digest = Digest::of(content);
        bytes.extend(
            Entry {
                block: *block,
                digest,
            }
            .encode(),
        );
    }
    stream.write_all(&bytes)?;
    let mut header = [0; ANSWER_LEN];
    stream.read_exact(&mut header)?;
    let answer = Answer::decode(&header, request.ask).map_err(io::Error::other)?;
    let mut data = vec![0; answer.len as usize];
    stream.read_exact(&mut data)?;
    Ok((answer, data))
}

#[test]
fn only_clean_blocks_are_given_and_only_to_who_knows_their_digest() {
    let image = sample_image(1, 4);
    let id = ImageId::from_bytes([9; 32]);
    let kernel = whole(&image, id);
    kernel.only_stale(&[30..35, 35..40]);
    kernel.write(5);
    let server = serve(&kernel);
    let changed = [0x77; 4096];
    let wanted = [
        (4, content(&image, 4)),
        (5, content(&image, 5)),
        (5, &changed[..]),
        (6, content(&image, 7)),
        (30, content(&image, 30)),
        (30, &[0xee; 4096][..]),
        (41, content(&image, 41)),
        (1 << 40, content(&image, 0)),
    ];
    let (answer, data) = ask(server.address(), id, &wanted).unwrap();
    assert_eq!((answer.status, answer.mask), (Status::Ok, 0b100_0001));
    assert!(data == [content(&image, 4), content(&image, 41)].concat());
    // Nothing of it made anybody fetch.
    assert_eq!(kernel.stale_blocks(), 10);
    // Before it is known that the image is not encrypted, nothing is given.
    server.given().plain.store(false, Ordering::Release);
    let (answer, _) = ask(server.address(), id, &wanted).unwrap();
    assert_eq!(answer.status, Status::OtherImage);
    server.given().plain.store(true, Ordering::Release);
    let other = ImageId::from_bytes([8; 32]);
    let (answer, data) = ask(server.address(), other, &wanted).unwrap();
    assert_eq!((answer.status, data.len()), (Status::OtherImage, 0));
}

#[test]
fn a_block_that_is_written_while_it_is_read_is_not_given() {
    let image = sample_image(1, 4);
    let id = ImageId::from_bytes([9; 32]);
    let kernel = whole(&image, id);
    let server = serve_with(&kernel, Limits::default(), Some(11));
    let wanted: Vec<_> = (10..13)
        .map(|block| (block, content(&image, block)))
        .collect();
    let (answer, data) = ask(server.address(), id, &wanted).unwrap();
    assert_eq!(answer.mask, 0b101);
    assert!(data == [wanted[0].1, wanted[2].1].concat());
}

#[test]
fn who_may_not_or_comes_too_often_is_refused() {
    let image = sample_image(1, 4);
    let id = ImageId::from_bytes([9; 32]);
    let kernel = whole(&image, id);
    let one = [(4, content(&image, 4))];
    let elsewhere = Limits {
        allowed: vec!["10.0.0.0/8".parse().unwrap()],
        ..Limits::default()
    };
    let server = serve_with(&kernel, elsewhere, None);
    assert!(ask(server.address(), id, &one).is_err());
    let few = Limits {
        of_one: 1,
        ..Limits::default()
    };
    let server = serve_with(&kernel, few, None);
    let mut first = TcpStream::connect(server.address()).unwrap();
    first.write_all(b"P").unwrap();
    // The second is closed at once; the first is there still, until it speaks nonsense.
    let mut second = TcpStream::connect(server.address()).unwrap();
    assert!(matches!(second.read(&mut [0]), Ok(0) | Err(_)));
    first.write_all(&[0; REQUEST_LEN]).unwrap();
    assert!(matches!(first.read(&mut [0]), Ok(0) | Err(_)));
    let slow = Limits {
        rate: Some(1),
        ..Limits::default()
    };
    let server = serve_with(&kernel, slow, None);
    let (answer, _) = ask(server.address(), id, &one).unwrap();
    assert_eq!(answer.status, Status::Ok);
    let (answer, _) = ask(server.address(), id, &one).unwrap();
    assert_eq!(answer.status, Status::Busy);
}

/// A helper among neighbours fills a device, of which these blocks are read meanwhile.
fn complete_among(
    kernel: &Arc<Kernel>,
    url: &str,
    neighbours: &Arc<Neighbours>,
    blocks: Range<u64>,
) {
    let helper = Running::start_among(
        kernel,
        &[url.to_owned()],
        settings(Hydrate::Full),
        places(),
        Some(Arc::clone(neighbours)),
    );
    kernel.read(blocks);
    assert_eq!(helper.join(), End::Complete);
    kernel.check(&[]);
}

#[test]
fn a_neighbour_gives_all_of_an_image() {
    let image = sample_image(2, 16);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    let full = whole(&image, id);
    full.write(100);
    let peer = serve(&full);
    let neighbours = Arc::new(Neighbours::new(id, None));
    neighbours.learn(&[peer.address()]);
    neighbours.look_after(&[]);
    let kernel = Kernel::new(id, &image, 0, 12);
    complete_among(&kernel, &server.url(), &neighbours, 1000..1010);
    let totals = neighbours.totals();
    let all = blocks_with_content(&image);
    // A few can have come from the store because the neighbour had enough to do.
    assert!(
        totals.blocks >= all / 2 && totals.missed >= 1,
        "{totals:?} of {all}"
    );
    assert_eq!((totals.wrong, totals.failed), (0, 0));
    let given = peer.given().blocks.load(Ordering::Relaxed);
    assert!(given >= totals.blocks, "{given}");
}

fn all_of(entries: &[Entry]) -> Answer {
    let count = entries.len() as u32;
    Answer {
        status: Status::Ok,
        len: count * 4096,
        mask: u64::MAX >> (64 - count),
    }
}

fn lies(stream: &mut TcpStream, entries: &[Entry]) -> bool {
    let answer = all_of(entries);
    let _ = stream.write_all(&answer.encode());
    let _ = stream.write_all(&vec![0x5a; answer.len as usize]);
    false
}

fn dies(stream: &mut TcpStream, entries: &[Entry]) -> bool {
    let answer = all_of(entries);
    let _ = stream.write_all(&answer.encode());
    let _ = stream.write_all(&vec![0x5a; answer.len as usize / 2 + 1]);
    false
}

fn hangs(stream: &mut TcpStream, _: &[Entry]) -> bool {
    // Until the other side has had enough.
    let _ = stream.read(&mut [0]);
    false
}

fn trickles(stream: &mut TcpStream, entries: &[Entry]) -> bool {
    let answer = all_of(entries).encode();
    for byte in answer.iter().cycle() {
        if stream.write_all(&[*byte]).is_err() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    false
}

fn babbles(stream: &mut TcpStream, _: &[Entry]) -> bool {
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nserver: something else\r\n\r\n");
    false
}

#[test]
fn bad_neighbours_cost_little_and_spoil_nothing() {
    let image = sample_image(3, 8);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    for (act, wrong) in [
        (lies as fn(&mut TcpStream, &[Entry]) -> bool, true),
        (dies, false),
        (hangs, false),
        (trickles, false),
        (babbles, false),
    ] {
        let bad = fake_peer(2048, act).unwrap();
        let neighbours = Arc::new(Neighbours::new(id, None));
        neighbours.learn(&[bad]);
        neighbours.look_after(&[]);
        assert_eq!(neighbours.states()[0].sections, 8);
        let kernel = Kernel::new(id, &image, 0, 12);
        complete_among(&kernel, &server.url(), &neighbours, 0..8);
        let totals = neighbours.totals();
        assert_eq!(totals.blocks, 0);
        assert!(totals.failed > 0, "{totals:?}");
        assert_eq!(totals.wrong > 0, wrong, "{totals:?}");
        let state = &neighbours.states()[0];
        assert!(state.left_alone && state.error.is_some(), "{state:?}");
    }
}

#[test]
fn in_a_storm_the_store_sends_each_block_about_once() {
    const MACHINES: usize = 6;
    let image = sample_image(4, 64);
    let (store, id) = TestStore::with_image(&image).unwrap();
    let server = FaultyServer::start(&store.root()).unwrap();
    let all = blocks_with_content(&image);
    let kernels: Vec<_> = (0..MACHINES)
        .map(|_| Kernel::new(id, &image, 0, 12))
        .collect();
    let servers: Vec<_> = kernels.iter().map(serve).collect();
    let neighbours: Vec<_> = (0..MACHINES)
        .map(|me| {
            let neighbours = Arc::new(Neighbours::new(id, None));
            let others = servers.iter().enumerate().filter(|(other, _)| *other != me);
            let others: Vec<_> = others.map(|(_, server)| server.address()).collect();
            neighbours.learn(&others);
            neighbours
        })
        .collect();
    // At the speed of a line that all share; at that of this machine's memory all would be over before anybody
    // knew what the others have.
    let settings = Settings {
        rate: Some(12 << 20),
        ..settings(Hydrate::Full)
    };
    let helpers: Vec<_> = kernels
        .iter()
        .zip(&neighbours)
        .map(|(kernel, neighbours)| {
            let (urls, known) = ([server.url()], Some(Arc::clone(neighbours)));
            Running::start_among(kernel, &urls, settings, places(), known)
        })
        .collect();
    for helper in helpers {
        assert_eq!(helper.join(), End::Complete);
    }
    for kernel in &kernels {
        kernel.check(&[]);
    }
    let shared: u64 = neighbours.iter().map(|n| n.totals().blocks).sum();
    let copies = (MACHINES as u64 * all - shared) as f64 / all as f64;
    eprintln!("the store sent each block {copies:.2} times to {MACHINES} machines");
    // About 2; without sharing it is 6.
    assert!(copies < MACHINES as f64 * 0.75, "{copies}");
    for neighbours in neighbours {
        assert_eq!(neighbours.totals().wrong, 0);
    }
}
