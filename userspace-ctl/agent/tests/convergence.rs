// SPDX-License-Identifier: GPL-2.0

//! Rules 2 and 7 of the contract: provisioning, revert and a change of image can be cut at any instant and run again,
//! and end at the same bytes; and at no instant does the metadata call a block clean that is not the master's.
//!
//! Both devices are in memory and record what is done to them. For every prefix of that record, what was not
//! flushed is lost in part (at random, by sector), the agent's steps run again on what is left, and so on.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use pristine_agent::config::Revert;
use pristine_agent::failure::Failure;
use pristine_agent::flow::{begin, prepare};
use pristine_agent::master::{BlockDigest, Master, Sink, Traffic};
use pristine_agent::restore::{Disk, Pace};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::{Page, PAGE_SIZE, SECTOR_SIZE};
use pristine_metadata::{BlockState, Changes, Class, Metadata, Run, Select, Storage, Stores};

const BLOCK: usize = 4096;
const BATCH: u64 = 24;

#[derive(Clone)]
enum Op {
    Write(Side, usize, Vec<u8>),
    Flush(Side),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Data,
    Meta,
}

/// A small generator of numbers (xorshift), so that a failure can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[derive(Default)]
struct World {
    data: Vec<u8>,
    meta: Vec<u8>,
    ops: Vec<Op>,
    /// The disk says that it flushed, and did not: with this the tests must fail.
    lying: bool,
}

impl World {
    fn side(&mut self, side: Side) -> &mut Vec<u8> {
        match side {
            Side::Data => &mut self.data,
            Side::Meta => &mut self.meta,
        }
    }

    fn write(&mut self, side: Side, at: usize, bytes: &[u8]) {
        self.side(side)[at..at + bytes.len()].copy_from_slice(bytes);
        self.ops.push(Op::Write(side, at, bytes.to_vec()));
    }

    fn flush(&mut self, side: Side) {
        if !(self.lying && side == Side::Data) {
            self.ops.push(Op::Flush(side));
        }
    }
}

type Shared = Rc<RefCell<World>>;

struct Device(Shared, Side);

impl Storage for Device {
    fn path(&self) -> &Path {
        Path::new(if self.1 == Side::Data { "data" } else { "meta" })
    }
    fn sectors(&self) -> u64 {
        self.0.borrow_mut().side(self.1).len() as u64 / SECTOR_SIZE
    }
    fn writable(&self) -> bool {
        true
    }
    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()> {
        let at = page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.0.borrow_mut().side(self.1)[at..at + PAGE_SIZE]);
        Ok(())
    }
    fn write(&mut self, page: u64, from: &Page) -> io::Result<()> {
        self.0
            .borrow_mut()
            .write(self.1, page as usize * PAGE_SIZE, from);
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush(self.1);
        Ok(())
    }
}

impl Disk for Device {
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let at = offset as usize;
        into.copy_from_slice(&self.0.borrow().data[at..at + into.len()]);
        Ok(())
    }
    fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.borrow_mut().write(Side::Data, offset as usize, from);
        Ok(())
    }
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let zeros = vec![0; len as usize];
        self.0
            .borrow_mut()
            .write(Side::Data, offset as usize, &zeros);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush(Side::Data);
        Ok(())
    }
}

#[derive(Clone)]
struct Image {
    content: Vec<u8>,
    /// Images that it knows the difference to.
    known: Vec<Vec<u8>>,
    traffic: Traffic,
}

fn id_of(content: &[u8]) -> [u8; 32] {
    *pristine_image::Digest::of(content).as_bytes()
}

impl Image {
    fn new(seed: u64, blocks: usize) -> Self {
        let mut dice = Dice(seed);
        let mut content = vec![0; blocks * BLOCK];
        for block in content.chunks_mut(BLOCK) {
            if dice.roll(3) > 0 {
                block.fill_with(|| dice.roll(251) as u8);
            }
        }
        Image {
            content,
            known: vec![],
            traffic: Traffic::default(),
        }
    }

    /// Another image of which every third block is the same.
    fn successor(&self, seed: u64) -> Self {
        let mut other = Image::new(seed, self.content.len() / BLOCK);
        for (n, block) in other.content.chunks_mut(BLOCK).enumerate() {
            if n % 3 == 0 {
                block.copy_from_slice(&self.content[n * BLOCK..(n + 1) * BLOCK]);
            }
        }
        other
    }

    fn block(&self, n: u64) -> &[u8] {
        &self.content[n as usize * BLOCK..(n as usize + 1) * BLOCK]
    }
}

impl Master for Image {
    fn id(&self) -> [u8; 32] {
        id_of(&self.content)
    }
    fn generation(&self) -> u64 {
        1
    }
    fn bytes(&self) -> u64 {
        self.content.len() as u64
    }
    fn digests(&mut self, run: Run) -> Result<Vec<BlockDigest>, Failure> {
        Ok((run.start..run.end)
            .map(|n| *pristine_image::Digest::of(self.block(n)).as_bytes())
            .collect())
    }
    fn fetch(&mut self, runs: &[Run], sink: &mut Sink<'_>) -> Result<(), Failure> {
        // The last first, and up to three at a time: order must not matter.
        for run in runs.iter().rev() {
            let mut at = run.start;
            while at < run.end {
                let end = run.end.min(at + 3);
                self.traffic.requests += 1;
                self.traffic.bytes += (end - at) * BLOCK as u64;
                sink(at, &self.content[at as usize * BLOCK..end as usize * BLOCK])?;
                at = end;
            }
        }
        Ok(())
    }
    fn differing_from(&mut self, other: &[u8; 32]) -> Result<Option<Vec<Run>>, Failure> {
        let Some(old) = self.known.iter().find(|k| id_of(k) == *other) else {
            return Ok(None);
        };
        let blocks = self.content.len() / BLOCK;
        Ok(Some(
            (0..blocks as u64)
                .filter(|&n| old[n as usize * BLOCK..(n as usize + 1) * BLOCK] != *self.block(n))
                .map(|n| Run {
                    start: n,
                    end: n + 1,
                })
                .collect(),
        ))
    }
    fn traffic(&self) -> Traffic {
        self.traffic
    }
}

/// What is on the platters of both devices.
#[derive(Clone)]
struct Platters {
    data: Vec<u8>,
    meta: Vec<u8>,
    separate: bool,
}

impl Platters {
    fn new(image: &Image, separate: bool) -> Self {
        let mut dice = Dice(99);
        let mut data = vec![0; image.content.len() + BLOCK * if separate { 1 } else { 80 }];
        // What a used disk holds.
        data.fill_with(|| dice.roll(7) as u8);
        let meta = vec![0; if separate { 100 * BLOCK } else { 0 }];
        Platters {
            data,
            meta,
            separate,
        }
    }

    fn world(&self) -> Shared {
        Rc::new(RefCell::new(World {
            data: self.data.clone(),
            meta: self.meta.clone(),
            ..World::default()
        }))
    }

    fn stores(&self, world: &Shared) -> Stores<Device> {
        if self.separate {
            Stores {
                meta: Device(world.clone(), Side::Meta),
                data: Some(Device(world.clone(), Side::Data)),
                placement: Placement::Separate,
            }
        } else {
            Stores {
                meta: Device(world.clone(), Side::Data),
                data: None,
                placement: Placement::Tail,
            }
        }
    }

    /// After a cut before operation `cut`: of what was not flushed, each sector is there or not.
    fn after(&self, ops: &[Op], cut: usize, dice: &mut Dice) -> Self {
        let mut after = self.clone();
        let last_flush = |side: Side| {
            ops[..cut]
                .iter()
                .rposition(|o| matches!(o, Op::Flush(s) if *s == side))
                .unwrap_or(0)
        };
        let flushed = [last_flush(Side::Data), last_flush(Side::Meta)];
        let luck = dice.roll(4);
        for (n, op) in ops[..cut].iter().enumerate() {
            let Op::Write(side, at, bytes) = op else {
                continue;
            };
            let durable = n < flushed[usize::from(*side == Side::Meta)];
            let to = if *side == Side::Data {
                &mut after.data
            } else {
                &mut after.meta
            };
            for (i, sector) in bytes.chunks(512).enumerate() {
                let kept = match luck {
                    0 => false,
                    1 => true,
                    _ => dice.roll(2) == 0,
                };
                if durable || kept {
                    to[at + i * 512..at + i * 512 + sector.len()].copy_from_slice(sector);
                }
            }
        }
        after
    }
}

/// What the agent does with a disk; returns the platters' world afterwards.
fn agent(platters: &Platters, master: &mut Image, lying: bool) -> Result<Shared, Failure> {
    let world = platters.world();
    world.borrow_mut().lying = lying;
    let mut prepared = match Metadata::open_on(platters.stores(&world)) {
        Ok(mut metadata) => {
            let (planes, _) = metadata.load()?;
            prepare(metadata, planes, master, Revert::Eager)?
        }
        Err(e) if e.class() == Class::NotFormatted => {
            begin(platters.stores(&world), master, false, false)?
        }
        Err(e) => return Err(e.into()),
    };
    let mut disk = Device(world.clone(), Side::Data);
    let mut quiet = |_| {};
    prepared.finish(
        &mut disk,
        master,
        BATCH,
        &mut Pace::new(Duration::ZERO, &mut quiet),
    )?;
    Ok(world)
}

/// Rule 2, and the superset: what the metadata calls clean is the master's (of the image that it names).
fn check_nothing_is_called_clean_too_early(
    platters: &Platters,
    images: &[&Image],
) -> Result<(), String> {
    let world = platters.world();
    let mut metadata = match Metadata::open_on(platters.stores(&world)) {
        Ok(metadata) => metadata,
        // A format that was cut.
        Err(e) if e.class() == Class::NotFormatted => return Ok(()),
        Err(e) => return Err(format!("the metadata after a cut: {e}")),
    };
    let (planes, _) = metadata
        .load()
        .map_err(|e| format!("the log after a cut: {e}"))?;
    let id = metadata.superblock().image_id;
    let image = images
        .iter()
        .find(|i| i.id() == id)
        .ok_or("an unknown image")?;
    for n in 0..planes.blocks() {
        let local = &platters.data[n as usize * BLOCK..(n as usize + 1) * BLOCK];
        if planes.state(n) == BlockState::Clean && local != image.block(n) {
            return Err(format!("block {n} is called clean and is not the master's"));
        }
    }
    Ok(())
}

fn check_is_master(world: &Shared, platters: &Platters, master: &Image) {
    let world_now = world.borrow();
    assert!(
        world_now.data[..master.content.len()] == master.content[..],
        "the disk is not the master"
    );
    drop(world_now);
    let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
    let (planes, _) = metadata.load().unwrap();
    assert_eq!(planes.count(Select::NotClean), 0);
    assert!(!metadata.superblock().provisioning);
    assert_eq!(metadata.superblock().image_id, master.id());
}

/// Cuts the agent's work on `start` at every instant; at every fifth, cuts the second run too.
fn cut_everywhere(start: &Platters, master: &Image, others: &[&Image]) {
    let mut images = vec![master];
    images.extend(others);
    let whole = agent(start, &mut master.clone(), false).unwrap();
    check_is_master(&whole, start, master);
    let ops = whole.borrow().ops.clone();
    let mut dice = Dice(4711);
    for cut in 0..=ops.len() {
        for again in 0..2 {
            let platters = start.after(&ops, cut, &mut dice);
            check_nothing_is_called_clean_too_early(&platters, &images)
                .unwrap_or_else(|e| panic!("cut {cut} of {}: {e}", ops.len()));
            let second = agent(&platters, &mut master.clone(), false)
                .unwrap_or_else(|e| panic!("cut {cut} of {}: {e}", ops.len()));
            check_is_master(&second, &platters, master);
            let second_ops = second.borrow().ops.clone();
            if again == 0 && cut % 5 == 0 && !second_ops.is_empty() {
                let cut = dice.roll(second_ops.len() as u64) as usize;
                let platters = platters.after(&second_ops, cut, &mut dice);
                check_nothing_is_called_clean_too_early(&platters, &images).unwrap();
                let third = agent(&platters, &mut master.clone(), false).unwrap();
                check_is_master(&third, &platters, master);
            }
        }
    }
}

fn now(world: &Shared, separate: bool) -> Platters {
    let world = world.borrow();
    Platters {
        data: world.data.clone(),
        meta: world.meta.clone(),
        separate,
    }
}

/// A provisioned disk on which a session changed some blocks; their extent is dirty too, as after a cut.
fn used(image: &Image, separate: bool) -> Platters {
    let start = Platters::new(image, separate);
    let world = agent(&start, &mut image.clone(), false).unwrap();
    let mut metadata = Metadata::open_on(start.stores(&world)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    for run in [
        Run { start: 3, end: 9 },
        Run { start: 40, end: 41 },
        Run { start: 60, end: 95 },
    ] {
        planes.set(run, BlockState::Dirty);
        for n in (run.start..run.end).step_by(2) {
            let at = n as usize * BLOCK + 100;
            world.borrow_mut().data[at..at + 50].fill(0xee);
        }
    }
    metadata.commit(&planes, &Changes::default()).unwrap();
    now(&world, separate)
}

#[test]
fn convergence_of_provisioning() {
    let image = Image::new(1, 150);
    for separate in [true, false] {
        cut_everywhere(&Platters::new(&image, separate), &image, &[]);
    }
}

#[test]
fn convergence_of_revert() {
    let image = Image::new(2, 100);
    for separate in [true, false] {
        cut_everywhere(&used(&image, separate), &image, &[]);
    }
}

#[test]
fn convergence_of_a_change_of_image() {
    let old = Image::new(3, 100);
    let mut new = old.successor(5);
    for separate in [true, false] {
        let start = used(&old, separate);
        // The old image is gone from the store; then it is still there.
        new.known.clear();
        cut_everywhere(&start, &new, &[&old]);
        new.known.push(old.content.clone());
        cut_everywhere(&start, &new, &[&old]);
    }
}

#[test]
fn revert_fetches_only_what_changed() {
    let image = Image::new(2, 100);
    let start = used(&image, true);
    let mut master = image.clone();
    agent(&start, &mut master, false).unwrap();
    let changed = (0..100)
        .filter(|&n| {
            start.data[n * BLOCK..(n + 1) * BLOCK] != image.content[n * BLOCK..(n + 1) * BLOCK]
        })
        .filter(|&n| image.block(n as u64).iter().any(|b| *b != 0))
        .count() as u64;
    assert!(changed > 5);
    assert_eq!(master.traffic.bytes, changed * BLOCK as u64);
}

#[test]
fn a_change_of_image_fetches_only_what_differs() {
    let old = Image::new(3, 100);
    let start = Platters::new(&old, true);
    let world = agent(&start, &mut old.clone(), false).unwrap();
    let start = now(&world, true);
    let mut new = old.successor(5);
    let differ = (0..100u64)
        .filter(|&n| old.block(n) != new.block(n) && new.block(n).iter().any(|b| *b != 0))
        .count() as u64;
    for known in [false, true] {
        if known {
            new.known.push(old.content.clone());
        }
        let mut master = new.clone();
        agent(&start, &mut master, false).unwrap();
        assert_eq!(
            master.traffic.bytes,
            differ * BLOCK as u64,
            "known: {known}"
        );
    }
}

/// The tests above are worth something: without the flush before the commit they fail.
#[test]
fn rule_2_fails_without_the_flush_before_the_commit() {
    let image = Image::new(1, 150);
    let start = Platters::new(&image, true);
    let whole = agent(&start, &mut image.clone(), true).unwrap();
    let ops = whole.borrow().ops.clone();
    let mut dice = Dice(1);
    let caught = (0..=ops.len()).any(|cut| {
        let platters = start.after(&ops, cut, &mut dice);
        check_nothing_is_called_clean_too_early(&platters, &[&image]).is_err()
    });
    assert!(caught);
}
