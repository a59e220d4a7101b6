// SPDX-License-Identifier: GPL-2.0

//! The life of a disk, by chance: sessions that write and discard, hydration, instant and eager reverts, generations that
//! come and go, at a boot and while the device is active, and power cuts at any instant of all that the agent, the command and
//! hydration do. An oracle knows what each block must
//! show. By default some lives; for so many minutes with TEST_MINUTES. A failure names its seed, and TEST_SEED repeats it.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::*;
use pristine_agent::config::Revert;
use pristine_agent::flow::{begin, prepare, Fetch};
use pristine_agent::master::Master;
use pristine_agent::restore::{Disk, Pace};
use pristine_metadata::{BlockState, Changes, Class, Metadata, Planes, Run, Select, Superblock};

const BLOCKS: usize = 60;

/// A disk, and what it must show.
struct Life {
    dice: Dice,
    images: Vec<Image>,
    platters: Platters,
    shows: Vec<u8>,
}

fn load(platters: &Platters) -> Result<(Superblock, Planes), Class> {
    let world = platters.world();
    let mut metadata = Metadata::open_on(platters.stores(&world)).map_err(|e| e.class())?;
    let (planes, _) = metadata.load().map_err(|e| e.class())?;
    Ok((*metadata.superblock(), planes))
}

impl Life {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let first = Image::new(dice.roll(1 << 30) + 1, BLOCKS);
        let second = first.successor(dice.roll(1 << 30) + 1);
        let third = second.successor(dice.roll(1 << 30) + 1);
        let mut images = vec![first, second, third];
        let contents: Vec<_> = images.iter().map(|i| i.content.clone()).collect();
        for image in &mut images {
            image.known.clone_from(&contents);
        }
        let platters = Platters::new(&images[0], dice.roll(2) == 0);
        let mut life = Life {
            dice,
            shows: Vec::new(),
            images,
            platters,
        };
        let master = life.images[0].clone();
        let world = life.platters.world();
        begin(
            life.platters.stores(&world),
            &master,
            false,
            false,
            Fetch::While,
            0,
        )
        .unwrap();
        life.platters = now(&world, life.platters.separate);
        life.shows = master.content;
        life.check();
        life
    }

    /// What the managed device shows once it is active, with a helper that serves.
    fn shown(&self, platters: &Platters) -> Vec<u8> {
        let (sb, planes) = load(platters).unwrap();
        let image = self.images.iter().find(|i| i.id() == sb.image_id).unwrap();
        let block = |n: u64| match planes.state(n) {
            BlockState::Stale => image.block(n),
            _ => &platters.data[n as usize * BLOCK..(n as usize + 1) * BLOCK],
        };
        (0..planes.blocks()).flat_map(block).copied().collect()
    }

    fn check(&self) {
        let shown = self.shown(&self.platters);
        let wrong = (0..BLOCKS).find(|n| {
            let range = n * BLOCK..(n + 1) * BLOCK;
            shown[range.clone()] != self.shows[range]
        });
        assert_eq!(wrong, None, "a block shows what it must not");
        // What counts as clean is the master's.
        let (sb, planes) = load(&self.platters).unwrap();
        let image = self.images.iter().find(|i| i.id() == sb.image_id).unwrap();
        for n in (0..BLOCKS as u64).filter(|n| planes.state(*n) == BlockState::Clean) {
            let range = n as usize * BLOCK..(n as usize + 1) * BLOCK;
            assert!(shown[range] == *image.block(n), "block {n} is not clean");
        }
    }

    fn run(&mut self) -> Run {
        let start = self.dice.roll(BLOCKS as u64);
        let end = (start + 1 + self.dice.roll(8)).min(BLOCKS as u64);
        Run { start, end }
    }

    /// Somebody writes whole blocks, or discards them, and shuts down.
    fn session(&mut self) {
        let world = self.platters.world();
        let mut metadata = Metadata::open_on(self.platters.stores(&world)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        for _ in 0..1 + self.dice.roll(4) {
            let run = self.run();
            let value = match self.dice.roll(4) {
                0 => 0,
                _ => self.dice.roll(255) as u8,
            };
            let bytes = run.start as usize * BLOCK..run.end as usize * BLOCK;
            world.borrow_mut().data[bytes.clone()].fill(value);
            self.shows[bytes].fill(value);
            planes.set(run, BlockState::Dirty);
        }
        metadata.commit(&planes, &Changes::default()).unwrap();
        self.platters = now(&world, self.platters.separate);
    }

    /// The helper brings some blocks; it shows nothing, wherever it is cut.
    fn hydrate(&mut self) {
        let world = self.platters.world();
        let image = self.has(&world);
        self.bring(&world, image);
        self.cut(&world);
    }

    /// All of it, or the power fails in the middle.
    fn cut(&mut self, world: &Shared) -> bool {
        let ops = world.borrow().ops.clone();
        let cut = self.dice.roll(2) == 0 && !ops.is_empty();
        self.platters = match cut {
            true => {
                let at = self.dice.roll(ops.len() as u64 + 1) as usize;
                self.platters.after(&ops, at, &mut self.dice)
            }
            false => now(world, self.platters.separate),
        };
        cut
    }

    /// The machine boots, and the agent makes the disk an image, its own or another.
    fn boot(&mut self) {
        let number = self.dice.roll(self.images.len() as u64) as usize;
        let (revert, fetch) = match self.dice.roll(2) {
            0 => (Revert::Instant, Fetch::While),
            _ => (Revert::Eager, Fetch::Before),
        };
        let mut master = self.images[number].clone();
        if self.dice.roll(4) == 0 {
            // The store does not know any more what the disk has.
            master.known.clear();
        }
        loop {
            let world = self.platters.world();
            let mut metadata = Metadata::open_on(self.platters.stores(&world)).unwrap();
            let (planes, _) = metadata.load().unwrap();
            let mut prepared = prepare(metadata, planes, &mut master, revert, fetch).unwrap();
            if fetch == Fetch::Before {
                let mut disk = Device(world.clone(), Side::Data);
                let mut quiet = |_| {};
                let mut pace = Pace::new(Duration::ZERO, &mut quiet);
                prepared
                    .finish(&mut disk, &mut master, 7, &mut pace)
                    .unwrap();
            }
            drop(prepared);
            if self.cut(&world) {
                let shown = self.shown(&self.platters);
                if shown[..] == master.content[..] {
                    self.shows.clone_from(&master.content);
                }
                // Before or after, nothing between.
                self.check();
                continue;
            }
            break;
        }
        self.shows.clone_from(&master.content);
        let (sb, planes) = load(&self.platters).unwrap();
        assert_eq!(sb.image_id, master.id());
        assert_eq!(planes.count(Select::Dirty), 0);
        if fetch == Fetch::Before {
            assert_eq!(planes.count(Select::NotClean), 0);
        }
    }

    /// Brings some of the stale blocks of a run from an image, and makes that durable, as a suspend does.
    fn bring(&mut self, world: &Shared, image: usize) {
        let mut metadata = Metadata::open_on(self.platters.stores(world)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        let run = self.run();
        let mut disk = Device(world.clone(), Side::Data);
        for n in run.start..run.end {
            if planes.state(n) == BlockState::Stale {
                Disk::write(&mut disk, n * BLOCK as u64, self.images[image].block(n)).unwrap();
                let (start, end) = (n, n + 1);
                planes.set(Run { start, end }, BlockState::Clean);
            }
        }
        Disk::flush(&mut disk).unwrap();
        metadata.commit(&planes, &Changes::default()).unwrap();
    }

    /// The number of the image that the disk has.
    fn has(&self, world: &Shared) -> usize {
        let metadata = Metadata::open_on(self.platters.stores(world)).unwrap();
        let id = metadata.superblock().image_id;
        self.images.iter().position(|i| i.id() == id).unwrap()
    }

    /// The device is active, with a helper that brings blocks. It is suspended; what was changed is taken back, or it goes over to
    /// another generation; the table is loaded anew, and the helper goes on with the generation that the device has now.
    /// Power cuts anywhere in that.
    fn change_while_active(&mut self) {
        let world = self.platters.world();
        let has = self.has(&world);
        self.bring(&world, has);
        let number = self.dice.roll(self.images.len() as u64) as usize;
        let mut master = self.images[number].clone();
        if self.dice.roll(4) == 0 {
            master.known.clear();
        }
        let mut metadata = Metadata::open_on(self.platters.stores(&world)).unwrap();
        let (mut planes, _) = metadata.load().unwrap();
        let mut changes = Changes::default();
        if number != has {
            let modified = master.differing_from(&self.images[has].id()).unwrap();
            planes.outdate(modified.as_deref(), BLOCK as u64);
            changes.image = Some(pristine_metadata::Image {
                id: master.id(),
                generation: master.generation(),
                bytes: master.bytes(),
            });
        }
        planes.make_stale();
        metadata.commit(&planes, &changes).unwrap();
        drop(metadata);
        let has = self.has(&world);
        assert_eq!(has, number);
        self.bring(&world, has);
        if !self.cut(&world) || self.shown(&self.platters) == master.content {
            self.shows.clone_from(&master.content);
        }
    }

    fn step(&mut self) {
        match self.dice.roll(8) {
            0 | 1 => self.session(),
            2 | 3 => self.hydrate(),
            4 | 5 => self.change_while_active(),
            _ => self.boot(),
        }
        self.check();
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn whatever_happens_each_block_shows_what_it_must() {
    let end = number("TEST_MINUTES").map(|m| Instant::now() + Duration::from_secs(m * 60));
    let only = number("TEST_SEED");
    let mut lives = 0;
    for seed in only.unwrap_or(1).. {
        // Shown if it fails.
        println!("TEST_SEED={seed}");
        let mut life = Life::new(seed);
        for _ in 0..30 {
            life.step();
        }
        lives += 1;
        let enough = match end {
            Some(end) => Instant::now() >= end,
            None => lives == 15,
        };
        if only.is_some() || enough {
            break;
        }
    }
    println!("{lives} lives");
}
