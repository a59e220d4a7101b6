// SPDX-License-Identifier: GPL-2.0

//! Publishers, promoters, pinners and collectors at once, on a store in memory, in any order of their steps and with
//! crashes at any step, against an oracle: whatever a channel's live generations or a pin need stays complete.
//!
//! Each request to the store is a step. The scheduler lets one step happen at a time, and chooses whose by the seed,
//! so a failure comes again with its seed. Time is the model's own: it jumps, so that leases of the dead run out, but
//! never by more than a quarter of a lease's time while a request is on its way, which is what the leases rely on.
//!
//! `TEST_LONG=1` runs more seeds; `MODEL_SEED=n` one alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use common::open;
use pristine_image::{build, BuildOptions, Source};
use pristine_store::{
    collect, pin, pin_name, promote, publish, unpin, CancelToken, DirStore, Error, ErrorKind,
    GcOptions, ImageId, ImageReader, ImageSelector, LeaseOptions, ObjectName, Pin, PublishOptions,
    Result, RetryPolicy, Store, StorePacks,
};
use pristine_testkit::noise;
use world::{ModelClock, ModelStore, Rng, World, LEASE};

/// A directory with the images that are published; they share packs.
struct Library {
    _directory: tempfile::TempDir,
    store: Arc<dyn Store>,
    images: Vec<ImageId>,
    /// What each image needs, as paths.
    needs: BTreeMap<ImageId, BTreeSet<String>>,
}

fn library() -> Library {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::open_or_create(&directory.path().join("store")).unwrap();
    let mut images = Vec::new();
    // Blocks of which neighbours have some in common.
    for first in 0..5u64 {
        let blocks = (first..first + 3).flat_map(|seed| noise(seed + 1, 4096));
        let file = directory.path().join("image");
        std::fs::write(&file, blocks.collect::<Vec<u8>>()).unwrap();
        let options = BuildOptions {
            level: 1,
            frame_blocks: 1,
            pack_target: 4096,
            ..BuildOptions::default()
        };
        let source = Source::open(&file).unwrap();
        let cancel = CancelToken::new();
        let mut packs = StorePacks(&store);
        let built = build(&source, &options, &mut packs, &|_| (), cancel.flag()).unwrap();
        store
            .put(&ObjectName::Manifest(built.image), &built.manifest)
            .unwrap();
        images.push(built.image);
    }
    let store: Arc<dyn Store> = Arc::new(store);
    let mut needs = BTreeMap::new();
    for image in &images {
        let reader = open(Arc::clone(&store), &image.to_string()).unwrap();
        let packs = reader.manifest().frames().packs().iter();
        let mut paths: BTreeSet<String> =
            packs.map(|pack| ObjectName::Pack(pack.id).path()).collect();
        assert_eq!(paths.len(), 3);
        paths.insert(ObjectName::Manifest(*image).path());
        needs.insert(*image, paths);
    }
    Library {
        _directory: directory,
        store,
        images,
        needs,
    }
}

/// One of those who use the store.
struct Actor<'a> {
    library: &'a Library,
    store: Arc<dyn Store>,
    world: Arc<World>,
    rng: Rng,
    number: usize,
    keep: u64,
    /// Publishing that succeeded: channel, generation, image.
    done: Vec<(String, u64, ImageId)>,
}

const CHANNELS: [&str; 2] = ["stable", "canary"];

impl Actor<'_> {
    fn lease(&self) -> LeaseOptions {
        LeaseOptions {
            time: LEASE,
            poll: Duration::from_secs(20),
            heartbeat: false,
            clock: Arc::new(ModelClock::new(&self.world, self.number)),
        }
    }

    fn publish_options(&self) -> PublishOptions {
        PublishOptions {
            retry: RetryPolicy::once(),
            parallel: 1,
            lease: self.lease(),
            ..PublishOptions::default()
        }
    }

    fn run(mut self, actions: usize) -> Vec<(String, u64, ImageId)> {
        for _ in 0..actions {
            match self.act() {
                Ok(()) => (),
                Err(error) if self.world.crashed(self.number) => {
                    drop(error);
                    break;
                }
                // Lost races, what is in use, what is not there yet, what was held up: told, and nothing happened.
                Err(error) => match error.kind() {
                    ErrorKind::Conflict | ErrorKind::NotFound => (),
                    _ => panic!("actor {}: {error}", self.number),
                },
            }
        }
        self.world.finish(self.number);
        self.done
    }

    fn act(&mut self) -> Result<()> {
        let image = self.library.images[self.rng.below(self.library.images.len() as u64) as usize];
        let channel = CHANNELS[self.rng.below(2) as usize];
        match self.rng.below(10) {
            0..4 => {
                let reader = open(Arc::clone(&self.library.store), &image.to_string())?;
                let to = channel.parse().unwrap();
                let options = self.publish_options();
                let published = publish(&reader, &self.store, &to, &options, &|_, _| ())?;
                let generation = published.release.release().generation;
                self.done.push((channel.to_owned(), generation, image));
            }
            4..6 => {
                let from: ImageSelector = CHANNELS[self.rng.below(2) as usize].parse().unwrap();
                let to = channel.parse().unwrap();
                let published = promote(&self.store, &from, &to, &self.publish_options())?;
                let release = published.release.release();
                self.done
                    .push((channel.to_owned(), release.generation, release.image));
            }
            6..8 => {
                let options = GcOptions {
                    keep: self.keep,
                    grace: Duration::ZERO,
                    retry: RetryPolicy::once(),
                    lease: self.lease(),
                    ..GcOptions::default()
                };
                collect(&self.store, &options, &|_, _| ())?;
            }
            _ => self.read_under_a_pin(image)?,
        }
        Ok(())
    }

    /// What a reader leases, it reads to the end.
    fn read_under_a_pin(&mut self, image: ImageId) -> Result<()> {
        let name = pin_name(&format!("reader-{}", self.number)).unwrap();
        let wanted = Pin {
            image,
            until: None,
            by: "the model".to_owned(),
        };
        pin(
            &self.store,
            &name,
            &wanted,
            &self.lease(),
            &CancelToken::new(),
        )?;
        let read = || -> Result<()> {
            let selector = ImageSelector::Id(image);
            let (once, cancel) = (RetryPolicy::once(), CancelToken::new());
            let reader = ImageReader::open(Arc::clone(&self.store), &selector, once, &cancel)?;
            for pack in reader.manifest().frames().packs() {
                self.store.get(&ObjectName::Pack(pack.id), pack.len)?;
            }
            Ok(())
        };
        match read() {
            Err(Error::NotFound { object, .. }) if !self.world.crashed(self.number) => {
                panic!("{object} went from under a pin");
            }
            result => result?,
        }
        // Some pins stay.
        if self.rng.below(3) > 0 {
            unpin(self.store.as_ref(), &name)?;
        }
        Ok(())
    }
}

fn run(library: &Library, seed: u64) {
    let mut rng = Rng::new(seed);
    let actors = 2 + rng.below(3) as usize;
    let keep = 1 + rng.below(3);
    let world = World::new(seed, actors, keep, library.needs.clone());
    for actor in 0..actors {
        if rng.below(3) == 0 {
            world.crash_after(actor, rng.below(60));
        }
    }
    let actions = 3 + rng.below(4) as usize;
    let done: Vec<(String, u64, ImageId)> = std::thread::scope(|scope| {
        let spawn = |number: usize| {
            let actor = Actor {
                library,
                store: Arc::new(ModelStore::new(&world, number)),
                world: Arc::clone(&world),
                rng: Rng::new(seed ^ (number as u64 + 1) << 32),
                number,
                keep,
                done: Vec::new(),
            };
            scope.spawn(move || {
                // Whatever happens, the others go on.
                let _end = world::Ending(Arc::clone(&actor.world), actor.number);
                actor.run(actions)
            })
        };
        let threads: Vec<_> = (0..actors).map(spawn).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        let results: std::thread::Result<Vec<Vec<_>>> = results.collect();
        let Ok(results) = results else {
            panic!("seed {seed} (MODEL_SEED={seed} runs it alone)");
        };
        results.into_iter().flatten().collect()
    });
    world.check_broken(seed);
    // Nothing that was published is lost from the history.
    for (channel, generation, image) in done {
        assert_eq!(
            world.generation(&channel, generation),
            Some(image),
            "seed {seed}: generation {generation} of {channel}"
        );
    }
    // When all is quiet and the leases of the dead have run out, just what is needed is left.
    world.survive();
    world.sleep_for_long();
    let store: Arc<dyn Store> = Arc::new(ModelStore::new(&world, 0));
    let options = GcOptions {
        keep,
        grace: Duration::ZERO,
        retry: RetryPolicy::once(),
        lease: LeaseOptions {
            time: LEASE,
            heartbeat: false,
            clock: Arc::new(ModelClock::new(&world, 0)),
            ..LeaseOptions::default()
        },
        ..GcOptions::default()
    };
    let planned = collect(
        &store,
        &GcOptions {
            dry_run: true,
            ..options.clone()
        },
        &|_, _| (),
    );
    let collected = collect(&store, &options, &|_, _| ()).unwrap();
    world.check_broken(seed);
    let planned = planned.unwrap();
    assert_eq!(planned.removed, collected.removed, "seed {seed}");
    world.check_exact(seed);
}

#[test]
fn whatever_happens_live_generations_stay_complete() {
    let library = library();
    if let Ok(seed) = std::env::var("MODEL_SEED") {
        return run(&library, seed.parse().unwrap());
    }
    let seeds = match std::env::var("TEST_LONG").as_deref() {
        Ok("1") => 20_000,
        _ => 1000,
    };
    for seed in 0..seeds {
        run(&library, seed);
    }
}

#[test]
fn the_model_notices_a_collector_without_a_lease() {
    // Shows that the test above can fail: what a careless collector would remove, is noticed.
    let library = library();
    let world = World::new(0, 1, 1, library.needs.clone());
    world.survive();
    let store: Arc<dyn Store> = Arc::new(ModelStore::new(&world, 0));
    let reader = open(Arc::clone(&library.store), &library.images[0].to_string());
    let options = PublishOptions {
        parallel: 1,
        lease: LeaseOptions {
            heartbeat: false,
            clock: Arc::new(ModelClock::new(&world, 0)),
            ..LeaseOptions::default()
        },
        ..PublishOptions::default()
    };
    let channel = "stable".parse().unwrap();
    publish(&reader.unwrap(), &store, &channel, &options, &|_, _| ()).unwrap();
    let pack = library.needs[&library.images[0]]
        .iter()
        .next_back()
        .unwrap();
    store.remove(&ObjectName::from_path(pack).unwrap()).unwrap();
    assert!(world.broken().is_some());
}
