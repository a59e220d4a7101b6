// SPDX-License-Identifier: GPL-2.0

//! Disks in memory that remember what was written when, and can show what a power cut could leave of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod kernel;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::{Page, PAGE_SIZE};
use pristine_metadata::{Metadata, Storage, Stores};

/// What is on a disk: the pages that were written, and one byte for all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pages: u64,
    fill: u8,
    written: BTreeMap<u64, Rc<Page>>,
}

impl Content {
    /// `pages` pages full of `fill`.
    pub fn new(pages: u64, fill: u8) -> Self {
        Self {
            pages,
            fill,
            written: BTreeMap::new(),
        }
    }

    pub fn page(&self, page: u64) -> Option<Page> {
        (page < self.pages).then(|| {
            self.written
                .get(&page)
                .map_or([self.fill; PAGE_SIZE], |p| **p)
        })
    }

    /// The same on a disk of another size: what is new holds `fill`, and what is past its end is lost.
    pub fn resized(&self, pages: u64) -> Self {
        let mut resized = self.clone();
        resized.pages = pages;
        resized.written.retain(|at, _| *at < pages);
        resized
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The pages that were ever written; all others hold the first content.
    pub fn written(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.written.iter().map(|(n, page)| (*n, &**page))
    }

    pub fn page_mut(&mut self, page: u64) -> Option<&mut Page> {
        let fill = self.fill;
        (page < self.pages).then(|| {
            Rc::make_mut(
                self.written
                    .entry(page)
                    .or_insert_with(|| Rc::new([fill; PAGE_SIZE])),
            )
        })
    }
}

/// Bytes that a disk writes as one.
const SECTOR: usize = 512;

/// A small generator of random numbers (xorshift64*), so that a failure can be seen again.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
}

#[derive(Clone)]
enum Op {
    Write {
        disk: usize,
        page: u64,
        data: Box<Page>,
    },
    Sync {
        disk: usize,
    },
}

/// What happens to the sectors in flight when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// None of them arrived.
    None,
    /// All of them arrived.
    All,
    /// Some arrived, in any order.
    Some,
    /// Some arrived in any order, and some of the last page's are neither old nor new.
    Garbled,
}

/// The disks of one machine and the order of everything done to them.
#[derive(Clone)]
pub struct Machine {
    start: Vec<Content>,
    ops: Rc<RefCell<Vec<Op>>>,
}

impl Machine {
    /// Disks with this content.
    pub fn new(start: Vec<Content>) -> Self {
        Self {
            start,
            ops: Rc::default(),
        }
    }

    /// Disk `n`, to be written to.
    pub fn disk(&self, n: usize) -> Disk {
        Disk {
            number: n,
            content: self.start[n].clone(),
            ops: Some(self.ops.clone()),
            path: PathBuf::from(format!("/disk/{n}")),
            fails_after: None,
        }
    }

    /// Points at which the power can go: before the first operation, between any two, after the last.
    pub fn points(&self) -> usize {
        self.ops.borrow().len() + 1
    }

    /// What is on the disks when the power goes before operation `at`.
    pub fn cut(&self, at: usize, how: Cut, random: &mut Random) -> Vec<Content> {
        let ops = self.ops.borrow();
        let mut disks = self.start.clone();
        for (number, content) in disks.iter_mut().enumerate() {
            let durable = ops[..at]
                .iter()
                .rposition(|op| matches!(op, Op::Sync { disk } if *disk == number))
                .unwrap_or(0);
            let mut flying: Vec<(u64, usize, &[u8])> = Vec::new();
            for (i, op) in ops[..at].iter().enumerate() {
                let Op::Write { disk, page, data } = op else {
                    continue;
                };
                if *disk != number {
                    continue;
                }
                if i < durable {
                    *content.page_mut(*page).unwrap() = **data;
                    continue;
                }
                for s in (0..PAGE_SIZE).step_by(SECTOR) {
                    flying.push((*page, s, &data[s..s + SECTOR]));
                }
            }
            match how {
                Cut::None => flying.clear(),
                Cut::All => {}
                Cut::Some | Cut::Garbled => {
                    let keep = random.below(5);
                    flying.retain(|_| random.below(4) < keep);
                    // Two writes of one sector may arrive the wrong way round as well.
                    for i in (1..flying.len()).rev() {
                        flying.swap(i, random.below(i as u64 + 1) as usize);
                    }
                }
            }
            for (page, at, data) in &flying {
                content.page_mut(*page).unwrap()[*at..*at + SECTOR].copy_from_slice(data);
            }
            if how == Cut::Garbled {
                if let Some((page, at, _)) = flying.last() {
                    for byte in &mut content.page_mut(*page).unwrap()[*at..*at + SECTOR] {
                        *byte = random.next() as u8;
                    }
                }
            }
        }
        disks
    }

    /// Calls `check` with what every cut at every point leaves; random ones `tries` times. Returns how many.
    pub fn each_cut(
        &self,
        tries: u64,
        hows: &[Cut],
        mut check: impl FnMut(Vec<Content>, &str),
    ) -> u64 {
        let mut states = 0;
        for at in 0..self.points() {
            for how in hows {
                let n = match how {
                    Cut::None | Cut::All => 1,
                    _ => tries,
                };
                for seed in 0..n {
                    let mut random = Random::new(seed * 1000 + at as u64 + 1);
                    let name = format!("cut {how:?} at {at} of {}, seed {seed}", self.points());
                    check(self.cut(at, *how, &mut random), &name);
                    states += 1;
                }
            }
        }
        states
    }
}

/// A disk in memory.
#[derive(Debug)]
pub struct Disk {
    number: usize,
    pub content: Content,
    ops: Option<Rc<RefCell<Vec<Op>>>>,
    path: PathBuf,
    /// Writes and syncs that succeed before one that fails; what fails may have arrived.
    pub fails_after: Option<u64>,
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Op::Write { disk, page, .. } => write!(f, "write {disk}:{page}"),
            Op::Sync { disk } => write!(f, "sync {disk}"),
        }
    }
}

impl Disk {
    /// A disk that nobody records.
    pub fn plain(content: Content) -> Self {
        Self {
            number: 0,
            content,
            ops: None,
            path: PathBuf::from("/disk/plain"),
            fails_after: None,
        }
    }

    fn strike(&mut self) -> io::Result<()> {
        match &mut self.fails_after {
            Some(0) => {
                self.fails_after = None;
                Err(io::ErrorKind::Other.into())
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn log(&self, op: Op) {
        if let Some(ops) = &self.ops {
            ops.borrow_mut().push(op);
        }
    }
}

impl Storage for Disk {
    fn path(&self) -> &Path {
        &self.path
    }

    fn sectors(&self) -> u64 {
        self.content.pages * (PAGE_SIZE / SECTOR) as u64
    }

    fn writable(&self) -> bool {
        true
    }

    fn read(&mut self, page: u64, into: &mut Page) -> io::Result<()> {
        *into = self
            .content
            .page(page)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }

    fn write(&mut self, page: u64, from: &Page) -> io::Result<()> {
        *self
            .content
            .page_mut(page)
            .ok_or(io::ErrorKind::UnexpectedEof)? = *from;
        self.log(Op::Write {
            disk: self.number,
            page,
            data: Box::new(*from),
        });
        self.strike()
    }

    fn sync(&mut self) -> io::Result<()> {
        // What was to be flushed when it failed may be lost, so only a success counts as one.
        self.strike()?;
        self.log(Op::Sync { disk: self.number });
        Ok(())
    }
}

/// Disk 0 as data device and disk 1 as metadata device, or disk 0 with a tail.
pub fn stores(machine: &Machine, placement: Placement) -> Stores<Disk> {
    match placement {
        Placement::Tail => Stores {
            meta: machine.disk(0),
            data: None,
            placement,
        },
        Placement::Separate => Stores {
            meta: machine.disk(1),
            data: Some(machine.disk(0)),
            placement,
        },
    }
}

/// Opens what a cut left.
pub fn open(
    disks: Vec<Content>,
    placement: Placement,
) -> pristine_metadata::Result<Metadata<Disk>> {
    let machine = Machine::new(disks);
    Metadata::open_on(stores(&machine, placement))
}

/// A machine whose disks are what these hold now.
pub fn disks_of(metadata: &mut Metadata<Disk>) -> Vec<Content> {
    let stores = metadata.stores_mut();
    match &stores.data {
        None => vec![stores.meta.content.clone()],
        Some(data) => vec![data.content.clone(), stores.meta.content.clone()],
    }
}
