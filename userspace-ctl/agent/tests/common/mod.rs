// SPDX-License-Identifier: GPL-2.0

//! Two devices in memory that record what is done to them, and images that are made up.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use pristine_agent::config::Revert;
use pristine_agent::failure::Failure;
use pristine_agent::flow::{begin, prepare, Fetch, Prepared};
use pristine_agent::master::{BlockDigest, Master, Sink, Traffic};
use pristine_agent::restore::{Disk, Done, Pace};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::{Page, PAGE_SIZE, SECTOR_SIZE};
use pristine_metadata::{
    BlockState, Changes, Class, Metadata, Planes, Run, Select, Storage, Stores,
};

pub const BLOCK: usize = 4096;

#[derive(Clone)]
pub enum Op {
    Write(Side, usize, Vec<u8>),
    Flush(Side),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Data,
    Meta,
}

/// A small generator of numbers (xorshift), so that a failure can be repeated.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[derive(Default)]
pub struct World {
    pub data: Vec<u8>,
    pub meta: Vec<u8>,
    pub ops: Vec<Op>,
    /// The disk says that it flushed, and did not: with this the tests must fail.
    pub lying: bool,
}

impl World {
    pub fn side(&mut self, side: Side) -> &mut Vec<u8> {
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

pub type Shared = Rc<RefCell<World>>;

pub struct Device(pub Shared, pub Side);

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

/// What the agent does with a disk before it boots; returns the platters' world afterwards.
pub fn run_agent(platters: &Platters, master: &mut impl Master, batch: u64) -> Shared {
    let world = platters.world();
    eager_agent(platters, &world, master, batch).unwrap();
    world
}

/// The disk holds an image, all of it clean, and the metadata says which.
pub fn check_holds(world: &Shared, platters: &Platters, image: &[u8], id: &[u8; 32]) {
    assert!(world.borrow().data[..image.len()] == *image);
    let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
    let (planes, _) = metadata.load().unwrap();
    assert_eq!(planes.count(Select::NotClean), 0);
    assert_eq!(metadata.superblock().image_id, *id);
}

/// A session changes every other block of these runs, and leaves all of them dirty, as after a cut.
pub fn change(world: &Shared, platters: &Platters, runs: &[Run]) {
    let mut metadata = Metadata::open_on(platters.stores(world)).unwrap();
    let (mut planes, _) = metadata.load().unwrap();
    for run in runs {
        planes.set(*run, BlockState::Dirty);
        for n in (run.start..run.end).step_by(2) {
            let at = n as usize * BLOCK + 100;
            world.borrow_mut().data[at..at + 50].fill(0xee);
        }
    }
    metadata.commit(&planes, &Changes::default()).unwrap();
}

#[derive(Clone)]
pub struct Image {
    pub content: Vec<u8>,
    /// Images that it knows the difference to.
    pub known: Vec<Vec<u8>>,
    pub traffic: Traffic,
}

pub fn id_of(content: &[u8]) -> [u8; 32] {
    *pristine_image::Digest::of(content).as_bytes()
}

impl Image {
    pub fn new(seed: u64, blocks: usize) -> Self {
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
    pub fn successor(&self, seed: u64) -> Self {
        let mut other = Image::new(seed, self.content.len() / BLOCK);
        for (n, block) in other.content.chunks_mut(BLOCK).enumerate() {
            if n % 3 == 0 {
                block.copy_from_slice(&self.content[n * BLOCK..(n + 1) * BLOCK]);
            }
        }
        other
    }

    pub fn block(&self, n: u64) -> &[u8] {
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
pub struct Platters {
    pub data: Vec<u8>,
    pub meta: Vec<u8>,
    pub separate: bool,
}

impl Platters {
    pub fn new(image: &Image, separate: bool) -> Self {
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

    pub fn world(&self) -> Shared {
        Rc::new(RefCell::new(World {
            data: self.data.clone(),
            meta: self.meta.clone(),
            ..World::default()
        }))
    }

    pub fn stores(&self, world: &Shared) -> Stores<Device> {
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
    pub fn after(&self, ops: &[Op], cut: usize, dice: &mut Dice) -> Self {
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

pub fn now(world: &Shared, separate: bool) -> Platters {
    let world = world.borrow();
    Platters {
        data: world.data.clone(),
        meta: world.meta.clone(),
        separate,
    }
}

/// What the agent does with a disk first: it goes on with one that has metadata as `go_on` says, and begins with one that has none.
pub fn opened<M: Master>(
    platters: &Platters,
    world: &Shared,
    master: &mut M,
    fetch: Fetch,
    go_on: impl FnOnce(Metadata<Device>, Planes, &mut M) -> Result<Prepared<Device>, Failure>,
) -> Result<Prepared<Device>, Failure> {
    match Metadata::open_on(platters.stores(world)) {
        Ok(mut metadata) => {
            let (planes, _) = metadata.load()?;
            go_on(metadata, planes, master)
        }
        Err(e) if e.class() == Class::NotFormatted => {
            begin(platters.stores(world), master, false, false, fetch, 0)
        }
        Err(e) => Err(e.into()),
    }
}

/// All that the agent does with a disk before an eager boot, with a commit after each `batch` blocks.
pub fn eager_agent(
    platters: &Platters,
    world: &Shared,
    master: &mut impl Master,
    batch: u64,
) -> Result<(Prepared<Device>, Done), Failure> {
    let fetch = Fetch::Before;
    let mut prepared = opened(
        platters,
        world,
        master,
        fetch,
        |metadata, planes, master| prepare(metadata, planes, master, Revert::Eager, fetch),
    )?;
    let mut disk = Device(world.clone(), Side::Data);
    let mut quiet = |_| {};
    let mut pace = Pace::new(Duration::ZERO, &mut quiet);
    let done = prepared.finish(&mut disk, master, batch, &mut pace)?;
    Ok((prepared, done))
}
