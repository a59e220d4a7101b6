// SPDX-License-Identifier: GPL-2.0

//! Updates: from any old disk, by good, bad and hostile deltas, cut anywhere; the end is always the new image.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use common::{http, open, quick};
use pristine_image::delta::make::MakeOptions;
use pristine_image::{build, BuildOptions, Digest, ImageId, Source, BLOCK_SIZE};
use pristine_store::update::{digests_of_disk, Before, Local, Update, UpdateOptions, Updated};
use pristine_store::{put_delta, CancelToken, DirStore, Error, ObjectName, Store, StorePacks};
use pristine_testkit::FaultyServer;

const PAGE: usize = 1024 * BLOCK_SIZE;

/// Random numbers; the seed decides, so failures repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 20
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for part in bytes.chunks_mut(4) {
            part.copy_from_slice(&self.next().to_le_bytes()[..part.len()]);
        }
    }
}

/// Content that looks a little like files: text, noise, zeros.
fn old_image(random: &mut Random, blocks: usize) -> Vec<u8> {
    let mut image = vec![0; blocks * BLOCK_SIZE];
    let mut at = 0;
    while at < blocks {
        let end = (at + 1 + random.below(200)).min(blocks);
        let part = &mut image[at * BLOCK_SIZE..end * BLOCK_SIZE];
        match random.below(4) {
            0 => (),
            1 => random.fill(part),
            _ => {
                for line in part.chunks_mut(160) {
                    let text =
                        format!("{:x} package version {}\n", random.next(), random.below(90));
                    let len = text.len().min(line.len());
                    line[..len].copy_from_slice(&text.as_bytes()[..len]);
                }
            }
        }
        at = end;
    }
    image
}

/// What an update does to an image: parts move, change a little, grow, go, and come anew.
fn new_image(random: &mut Random, old: &[u8]) -> Vec<u8> {
    let mut image = old.to_vec();
    let blocks = old.len() / BLOCK_SIZE;
    for _ in 0..12 {
        let count = 1 + random.below(120);
        let (from, to) = (random.below(blocks - count), random.below(blocks - count));
        let target = to * BLOCK_SIZE..(to + count) * BLOCK_SIZE;
        match random.below(5) {
            0 => {
                image[target].copy_from_slice(&old[from * BLOCK_SIZE..(from + count) * BLOCK_SIZE])
            }
            1 => image[target].fill(0),
            2 => random.fill(&mut image[target]),
            3 => {
                // The same a few bytes further on: no block is the same, and nothing much is new.
                let shift = 1 + random.below(300);
                let from = from * BLOCK_SIZE;
                let len = target.len() - shift;
                image[target.start + shift..target.end].copy_from_slice(&old[from..from + len]);
            }
            _ => {
                for _ in 0..count {
                    let at = target.start + random.below(target.len());
                    image[at] ^= 1;
                }
                // And the same once more elsewhere: new content that comes twice.
                let copy = image[target.clone()].to_vec();
                let again = random.below(blocks - count) * BLOCK_SIZE;
                image[again..again + copy.len()].copy_from_slice(&copy);
            }
        }
    }
    image
}

struct Lab {
    dir: tempfile::TempDir,
    store: Arc<dyn Store>,
    images: [(ImageId, Vec<u8>); 2],
}

fn add(store: &DirStore, image: &[u8]) -> ImageId {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), image).unwrap();
    let source = Source::open(file.path()).unwrap();
    let options = BuildOptions {
        level: 1,
        pack_target: 1 << 20,
        ..BuildOptions::default()
    };
    let cancel = AtomicBool::new(false);
    let built = build(&source, &options, &mut StorePacks(store), &|_| (), &cancel).unwrap();
    let name = ObjectName::Manifest(built.image);
    store.put(&name, &built.manifest).unwrap();
    built.image
}

fn make_options() -> MakeOptions {
    MakeOptions {
        level: 3,
        frame_blocks: 300,
        reference_blocks: 500,
        threads: Some(2),
    }
}

impl Lab {
    fn new(seed: u64, delta: bool) -> Lab {
        let mut random = Random(seed);
        let blocks = 2400 + random.below(400);
        let old = old_image(&mut random, blocks);
        let mut new = new_image(&mut random, &old);
        // Sometimes it grows or shrinks, also by whole pages.
        match random.below(4) {
            0 => new.truncate((1500 + random.below(500)) * BLOCK_SIZE),
            1 => {
                let more = old_image(&mut random, 1200);
                new.extend(more);
            }
            _ => (),
        }
        Lab::of(old, new, delta)
    }

    fn of(old: Vec<u8>, new: Vec<u8>, delta: bool) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::open_or_create(dir.path()).unwrap();
        let images = [old, new].map(|image| (add(&store, &image), image));
        let lab = Lab {
            dir,
            store: Arc::new(store),
            images,
        };
        if delta {
            let [old, new] =
                [0, 1].map(|n| open(lab.store.clone(), &lab.images[n].0.to_string()).unwrap());
            let cancel = CancelToken::new();
            let made = put_delta(
                &old,
                &new,
                lab.store.as_ref(),
                &make_options(),
                &|_, _| (),
                &cancel,
            )
            .unwrap();
            assert!(!made.present);
        }
        lab
    }

    fn old(&self) -> &[u8] {
        &self.images[0].1
    }

    fn new_content(&self) -> &[u8] {
        &self.images[1].1
    }

    fn object(&self) -> ObjectName {
        ObjectName::Delta {
            new: self.images[1].0,
            old: self.images[0].0,
        }
    }

    fn delta_path(&self) -> PathBuf {
        self.dir.path().join(self.object().path())
    }

    fn plan(&self, store: &Arc<dyn Store>) -> pristine_store::Result<Update> {
        let before = Before::Image(self.images[0].0);
        let cancel = CancelToken::new();
        Update::plan(store, &before, self.images[1].0, None, quick(), &cancel).map(Option::unwrap)
    }

    /// Applies it to a disk, and checks that the end is the new image.
    fn update(&self, disk: &mut Disk, options: &UpdateOptions) -> Updated {
        let update = self.plan(&self.store).unwrap();
        let updated = update.apply(disk, options, &mut |_, _| ()).unwrap();
        self.check(disk);
        assert_eq!(
            updated.right as usize,
            self.new_content().len() / BLOCK_SIZE
        );
        updated
    }

    fn disk(&self, content: &[u8]) -> Disk {
        let mut content = content.to_vec();
        content.resize(self.old().len().max(self.new_content().len()), 0);
        Disk {
            content,
            wanted: self.new_content().to_vec(),
            writes_left: None,
        }
    }

    fn check(&self, disk: &Disk) {
        assert!(disk.content[..self.new_content().len()] == *self.new_content());
    }
}

fn options() -> UpdateOptions {
    UpdateOptions {
        retry: quick(),
        ..UpdateOptions::default()
    }
}

/// A disk in memory, that fails after some writes if it is to, and knows what may be called right.
struct Disk {
    content: Vec<u8>,
    wanted: Vec<u8>,
    writes_left: Option<usize>,
}

impl Disk {
    fn target(&mut self, first: u64, len: usize) -> io::Result<&mut [u8]> {
        if let Some(left) = &mut self.writes_left {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("the power is gone"))?;
        }
        let at = first as usize * BLOCK_SIZE;
        Ok(&mut self.content[at..at + len])
    }
}

impl Local for Disk {
    fn read(&mut self, first: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        let rest = self
            .content
            .get(first as usize * BLOCK_SIZE..)
            .unwrap_or_default();
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }

    fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
        self.target(first, data.len())?.copy_from_slice(data);
        // Whatever is written is right: nothing is ever written on a guess.
        let at = first as usize * BLOCK_SIZE;
        assert!(
            self.wanted[at..at + data.len()] == *data,
            "a wrong block from {first} on"
        );
        Ok(())
    }

    fn zero(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let zeros = vec![0; (blocks.end - blocks.start) as usize * BLOCK_SIZE];
        self.write(blocks.start, &zeros)
    }

    fn right(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let range = blocks.start as usize * BLOCK_SIZE..blocks.end as usize * BLOCK_SIZE;
        assert!(self.content[range.clone()] == self.wanted[range]);
        Ok(())
    }
}

#[test]
fn random_updates_cost_no_more_than_their_delta() {
    for seed in 0..4 {
        let lab = Lab::new(seed, true);
        let update = lab.plan(&lab.store).unwrap();
        let cost = update.cost().unwrap();
        let before = lab.store.traffic().bytes;
        let to_fetch = update.bytes_to_fetch().unwrap();
        let mut disk = lab.disk(lab.old());
        let updated = update.apply(&mut disk, &options(), &mut |_, _| ()).unwrap();
        lab.check(&disk);
        assert_eq!(
            (updated.fetched, updated.pages_by_digest),
            (0, 0),
            "seed {seed}"
        );
        assert_eq!(lab.store.traffic().bytes - before, to_fetch, "seed {seed}");
        assert_eq!(
            cost.delta,
            Some(fs::metadata(lab.delta_path()).unwrap().len())
        );
        assert!(updated.kept_lost == 0 && updated.written <= cost.changed);
        // Once more: all is right, and nothing is written.
        let updated = lab.update(&mut disk, &options());
        assert_eq!(updated.written, 0);
    }
}

#[test]
fn without_a_delta_only_what_the_disk_does_not_hold_is_fetched() {
    for seed in 10..12 {
        let lab = Lab::new(seed, false);
        let mut disk = lab.disk(lab.old());
        let update = lab.plan(&lab.store).unwrap();
        let (cost, to_fetch) = (update.cost().unwrap(), update.bytes_to_fetch().unwrap());
        let before = lab.store.traffic().bytes;
        let updated = update.apply(&mut disk, &options(), &mut |_, _| ()).unwrap();
        lab.check(&disk);
        assert_eq!(cost.delta, None);
        assert_eq!(lab.store.traffic().bytes - before, to_fetch, "seed {seed}");
        // New content that comes several times is fetched for each place, as its first one is not right by then.
        assert!(
            updated.fetched >= cost.new && updated.fetched <= cost.changed,
            "seed {seed}"
        );
        // The same from the disk's content alone.
        let mut disk = lab.disk(lab.old());
        let digests =
            digests_of_disk(&mut disk, lab.old().len() as u64 / 4096, &mut |_| ()).unwrap();
        assert_eq!(digests.image(), lab.images[0].0);
        let cancel = CancelToken::new();
        let before = Before::Content(&digests);
        let update = Update::plan(&lab.store, &before, lab.images[1].0, None, quick(), &cancel)
            .unwrap()
            .unwrap();
        let again = update.apply(&mut disk, &options(), &mut |_, _| ()).unwrap();
        lab.check(&disk);
        assert_eq!(again.fetched, updated.fetched);
    }
}

#[test]
fn dirty_blocks_and_little_memory_cost_bytes_and_nothing_else() {
    for seed in 20..22 {
        let lab = Lab::new(seed, seed % 2 == 0);
        let mut random = Random(seed);
        let mut disk = lab.disk(lab.old());
        for _ in 0..random.below(300) {
            let at = random.below(lab.old().len());
            disk.content[at] ^= 0x55;
        }
        let options = UpdateOptions {
            memory: (random.below(40) * BLOCK_SIZE) as u64,
            ..options()
        };
        lab.update(&mut disk, &options);
        // A disk that holds something else altogether.
        let mut disk = lab.disk(&[]);
        random.fill(&mut disk.content);
        let updated = lab.update(&mut disk, &options);
        assert!(updated.fetched > 0);
    }
}

#[test]
fn an_update_that_is_cut_anywhere_goes_on() {
    for seed in 30..32 {
        let lab = Lab::new(seed, seed % 2 == 0);
        let mut random = Random(seed);
        let mut disk = lab.disk(lab.old());
        let mut cuts = 0;
        loop {
            disk.writes_left = Some(1 + random.below(9));
            let update = lab.plan(&lab.store).unwrap();
            match update.apply(&mut disk, &options(), &mut |_, _| ()) {
                Ok(_) => break,
                Err(Error::Sink(_)) => cuts += 1,
                Err(error) => panic!("{error}"),
            }
            assert!(cuts < 1000);
        }
        lab.check(&disk);
        assert!(cuts > 0);
    }
}

#[test]
fn pages_that_are_right_are_not_looked_at() {
    struct Half(Disk);
    impl Local for Half {
        fn read(&mut self, first: u64, into: &mut [u8]) -> io::Result<()> {
            self.0.read(first, into)
        }
        fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
            assert!(!self.is_right(first..first + 1));
            self.0.write(first, data)
        }
        fn zero(&mut self, blocks: Range<u64>) -> io::Result<()> {
            self.0.zero(blocks)
        }
        fn is_right(&self, blocks: Range<u64>) -> bool {
            blocks.start == 0
        }
    }
    let lab = Lab::new(40, true);
    let mut disk = Half(lab.disk(lab.old()));
    disk.0.content[..PAGE].copy_from_slice(&lab.new_content()[..PAGE]);
    let update = lab.plan(&lab.store).unwrap();
    update.apply(&mut disk, &options(), &mut |_, _| ()).unwrap();
    lab.check(&disk.0);
}

#[test]
fn damaged_deltas_cost_bytes_and_nothing_else() {
    let lab = Lab::new(50, true);
    let good = fs::read(lab.delta_path()).unwrap();
    let mut random = Random(50);
    let mut damaged: Vec<Vec<u8>> = Vec::new();
    for round in 0..12 {
        let mut bytes = good.clone();
        match round % 3 {
            // In the head or the map, which have a checksum; in the frames, which are hints.
            0 => bytes[random.below(160)] ^= 1 << random.below(8),
            1 => {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            _ => bytes.truncate(random.below(bytes.len())),
        }
        damaged.push(bytes);
    }
    damaged.push(Vec::new());
    for bytes in damaged {
        fs::write(lab.delta_path(), bytes).unwrap();
        let mut disk = lab.disk(lab.old());
        lab.update(&mut disk, &options());
    }
}

/// A delta with another map, and a head that fits it.
fn forge(delta: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let number = |at: usize| u64::from_le_bytes(delta[at..at + 8].try_into().unwrap()) as usize;
    let (stored, len) = (number(96), number(104));
    let mut map = zstd::bulk::decompress(&delta[160..160 + stored], len).unwrap();
    change(&mut map);
    let packed = zstd::bulk::compress(&map, 3).unwrap();
    let mut head = delta[..128].to_vec();
    let file_len = 160 + packed.len() + (delta.len() - 160 - stored);
    for (at, value) in [(96, packed.len()), (104, map.len()), (112, file_len)] {
        head[at..at + 8].copy_from_slice(&(value as u64).to_le_bytes());
    }
    let mut covered = head.clone();
    covered.extend_from_slice(&packed);
    head.extend(Digest::of(&covered).as_bytes());
    head.extend(packed);
    head.extend_from_slice(&delta[160 + stored..]);
    head
}

#[test]
fn hostile_deltas_cost_bytes_and_nothing_else() {
    let lab = Lab::new(60, true);
    let good = fs::read(lab.delta_path()).unwrap();
    let mut random = Random(60);
    let mut taken = 0;
    for _ in 0..16 {
        let bytes = forge(&good, |map| {
            for _ in 0..1 + random.below(3) {
                // After the kinds and hashes of pages: runs, references, lengths.
                let skip = 4 + 6 * 32;
                let at = skip + random.below(map.len() - skip);
                map[at] = random.next() as u8;
            }
        });
        fs::write(lab.delta_path(), bytes).unwrap();
        let mut disk = lab.disk(lab.old());
        taken += u64::from(
            lab.plan(&lab.store)
                .unwrap()
                .cost()
                .unwrap()
                .delta
                .is_some(),
        );
        lab.update(&mut disk, &options());
    }
    assert!(taken > 0, "not one forged map was read");
    // The delta of other images.
    let other = Lab::new(61, true);
    fs::write(lab.delta_path(), fs::read(other.delta_path()).unwrap()).unwrap();
    lab.update(&mut lab.disk(lab.old()), &options());
    // Sizes that make no sense are refused before they cost memory.
    for at in [16, 24, 96, 104, 112] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX - 4095).to_le_bytes());
        let covered = bytes[..128].to_vec();
        bytes[128..160].copy_from_slice(Digest::of(&covered).as_bytes());
        fs::write(lab.delta_path(), bytes).unwrap();
        lab.update(&mut lab.disk(lab.old()), &options());
    }
}

#[test]
fn an_image_that_is_not_known_any_more_is_no_beginning() {
    let lab = Lab::new(70, false);
    let before = Before::Image(ImageId::from_bytes([7; 32]));
    let cancel = CancelToken::new();
    let update =
        Update::plan(&lab.store, &before, lab.images[1].0, None, quick(), &cancel).unwrap();
    assert!(update.is_none());
}

#[test]
fn bad_servers_do_not_spoil_an_update() {
    for rules in [
        "deltas/:wrong",
        "deltas/@2-:wrong",
        "deltas/@2-:cut=1000",
        "deltas/@2-:short=100000",
        "deltas/:status=404",
        "deltas/:status=500",
        "deltas/:ignore-range",
        "deltas/:other-range",
        "@1-2:status=503",
    ] {
        let lab = Lab::new(80, true);
        let server = FaultyServer::start(lab.dir.path()).unwrap();
        server.set_rules(rules.parse().unwrap());
        let store = http(&server.url());
        let update = lab.plan(&store).unwrap();
        let mut disk = lab.disk(lab.old());
        update.apply(&mut disk, &options(), &mut |_, _| ()).unwrap();
        lab.check(&disk);
    }
}
