// SPDX-License-Identifier: GPL-2.0

//! Stores in S3, against a real service: one that honours conditional puts, and one that ignores half of them.

#![cfg(feature = "s3")]
// Whole images are single ranges of blocks.
#![allow(clippy::single_range_in_vec_init)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use common::{
    identity, key, open, options, publish_to, sealed, sealing, touch, with, with_delta, Memory,
};
use pristine_store::{
    collect, history, open_store, promote, publish, verify, CancelToken, Digest, Error, ErrorKind,
    GcOptions, HttpOptions, NoteKind, NoteName, ObjectKind, ObjectName, PackId, PublishOptions,
    Put, Release, S3Store, SignedRelease, Store,
};
use pristine_testkit::{noise, sample_image, S3Kind, S3Service, TestStore};

/// Credentials, once for all tests of this program: they come from the environment.
fn credentials() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        std::env::set_var("AWS_ACCESS_KEY_ID", "test");
        std::env::set_var("AWS_SECRET_ACCESS_KEY", "test");
    });
}

fn service(kind: S3Kind) -> S3Service {
    credentials();
    S3Service::start(kind).unwrap()
}

fn store(service: &S3Service, prefix: &str) -> Arc<dyn Store> {
    let store = S3Store::open(&service.location(prefix), &HttpOptions::default()).unwrap();
    store.prepare().unwrap();
    Arc::new(store)
}

fn pack(bytes: &[u8]) -> ObjectName {
    ObjectName::Pack(PackId::new(Digest::of(bytes)))
}

#[test]
fn objects_and_notes() {
    let service = service(S3Kind::Conditional);
    let store = store(&service, "one/two");
    let object = pack(b"content");
    assert_eq!(store.size(&object).unwrap(), None);
    let error = store.get(&object, 100).unwrap_err();
    assert!(matches!(error, Error::NotFound { .. }), "{error}");
    assert_eq!(store.put(&object, b"content").unwrap(), Put::Created);
    assert_eq!(store.put(&object, b"another").unwrap(), Put::AlreadyThere);
    assert_eq!(store.get(&object, 100).unwrap(), b"content");
    assert_eq!(store.get_range(&object, 2..5).unwrap(), b"nte");
    assert_eq!(store.get_start(&object, 100).unwrap(), b"content");
    assert_eq!(store.get_start(&object, 3).unwrap(), b"con");
    assert!(matches!(store.get(&object, 6), Err(Error::TooLarge { .. })));
    for beyond in [5..8, 7..9, 100..110] {
        let error = store.get_range(&object, beyond).unwrap_err();
        assert!(matches!(error, Error::Truncated { len: 7, .. }), "{error}");
    }
    let listed = store.list(ObjectKind::Pack).unwrap();
    assert_eq!(
        (listed.len(), listed[0].object, listed[0].len),
        (1, object, 7)
    );
    assert!(listed[0].modified > 1_700_000_000_000);
    store.remove(&object).unwrap();
    store.remove(&object).unwrap();
    assert_eq!(store.list(ObjectKind::Pack).unwrap(), vec![]);
    let note = NoteName::new(NoteKind::Pin, "release").unwrap();
    assert_eq!(store.read_note(&note).unwrap(), None);
    store.write_note(&note, b"text").unwrap();
    assert_eq!(store.read_note(&note).unwrap().unwrap(), b"text");
    assert_eq!(store.notes(NoteKind::Pin).unwrap()[0].name, note);
    store.remove_note(&note).unwrap();
    assert_eq!(store.notes(NoteKind::Pin).unwrap(), vec![]);
}

#[test]
fn large_objects_go_in_parts_and_come_back_whole() {
    let service = service(S3Kind::Conditional);
    let store = store(&service, "");
    let bytes = noise(1, (20 << 20) + 17);
    let object = pack(&bytes);
    store.put(&object, &bytes).unwrap();
    assert_eq!(store.size(&object).unwrap(), Some(bytes.len() as u64));
    assert!(store.get(&object, 64 << 20).unwrap() == bytes);
    let end = bytes.len() as u64;
    assert!(store.get_range(&object, end - 9..end).unwrap() == bytes[bytes.len() - 9..]);
}

#[test]
fn an_image_is_published_read_and_verified() {
    let image = sample_image(1, 8);
    let (source, id) = TestStore::with_image(&image).unwrap();
    let reader = open(source.open().unwrap(), "stable").unwrap();
    let service = service(S3Kind::Conditional);
    let target = store(&service, "lab");
    let published = publish_to(&reader, &target, "stable");
    assert_eq!(published.unwrap().release.release().generation, 1);
    assert!(target.remarks().is_empty(), "{:?}", target.remarks());
    // As a machine reads it.
    let reader = open(open_store(&service.location("lab")).unwrap(), "stable").unwrap();
    assert_eq!(reader.image(), id);
    let memory = Memory::new(&reader);
    let all = [0..reader.blocks()];
    reader.fetch(all.clone(), &options(), &memory).unwrap();
    memory.check(&image, &all);
    let verified = verify(&reader, &CancelToken::new(), &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{verified:?}");
    let again = publish_to(&reader, &target, "stable");
    assert!(again.unwrap().unchanged);
    assert_eq!(target.images().unwrap(), [id]);
    assert_eq!(target.channels().unwrap(), ["stable".parse().unwrap()]);
}

#[test]
fn encrypted_images_are_published_promoted_and_collected() {
    let mut images = [sample_image(5, 8), sample_image(5, 8)];
    touch(&mut images[1], 1 << 20..2 << 20);
    let plain = TestStore::new().unwrap();
    let service = service(S3Kind::Conditional);
    let raw = store(&service, "lab");
    let clear = with(store(&service, "lab"), vec![identity()]);
    let read = |channel: &str, image: &[u8]| {
        let reader = open(Arc::clone(&clear), channel).unwrap();
        let memory = Memory::new(&reader);
        let all = [0..reader.blocks()];
        reader.fetch(all.clone(), &options(), &memory).unwrap();
        memory.check(image, &all);
    };
    let stable = "stable".parse().unwrap();
    for (generation, image) in (1..).zip(&images) {
        plain.add(image, "x").unwrap();
        let reader = open(plain.open().unwrap(), "x").unwrap();
        let target = sealing(Arc::clone(&raw), &key());
        let options = with_delta();
        let published = publish(
            &sealed(&reader, &key()),
            &target,
            &stable,
            &options,
            &|_, _| (),
        );
        let published = published.unwrap();
        assert_eq!(published.release.release().generation, generation);
        assert_eq!(published.delta_bytes > 0, generation == 2);
        read("stable", image);
    }
    let error = open(Arc::clone(&raw), "stable").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoKey, "{error}");
    // Whoever looks after the bucket needs no key, nor does who moves a channel.
    let options = PublishOptions::default();
    let canary = "canary".parse().unwrap();
    promote(&raw, &"stable".parse().unwrap(), &canary, &options).unwrap();
    read("canary", &images[1]);
    let collecting = GcOptions {
        keep: 1,
        grace: Duration::ZERO,
        ..GcOptions::default()
    };
    // Times in a bucket are whole seconds, and what was stored in this one is young.
    let begin = Instant::now();
    while collect(&raw, &collecting, &|_, _| ())
        .unwrap()
        .removed_images
        .is_empty()
    {
        assert!(begin.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(raw.images().unwrap().len(), 1);
    assert_eq!(raw.list(ObjectKind::Key).unwrap().len(), 1);
    read("stable", &images[1]);
}

/// Publishers that all move one channel; no generation is lost, none is given twice, whoever lost a race is told.
fn race(kind: S3Kind) {
    let service = service(kind);
    let target = store(&service, "race");
    let won = Mutex::new(Vec::new());
    let images: Vec<TestStore> = (0..3)
        .map(|seed| TestStore::with_image(&sample_image(seed, 4)).unwrap().0)
        .collect();
    let channel = "stable".parse().unwrap();
    std::thread::scope(|scope| {
        for image in &images {
            let (service, won) = (&service, &won);
            scope.spawn(move || {
                let target = store(service, "race");
                let reader = open(image.open().unwrap(), "stable").unwrap();
                for _ in 0..3 {
                    match publish_to(&reader, &target, "stable") {
                        Ok(published) if published.unchanged => (),
                        Ok(published) => {
                            let generation = published.release.release().generation;
                            won.lock().unwrap().push(generation);
                        }
                        Err(error) if error.kind() == ErrorKind::Conflict => (),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    let mut won = won.into_inner().unwrap();
    won.sort_unstable();
    let count = won.len();
    won.dedup();
    assert_eq!(won.len(), count);
    let releases = history(target.as_ref(), &channel).unwrap();
    let all: Vec<u64> = releases.iter().map(|(generation, _)| *generation).collect();
    assert!(won.iter().all(|generation| all.contains(generation)));
    assert_eq!(won.last(), all.last());
    assert!(releases.iter().all(|(_, release)| release.is_ok()));
}

#[test]
fn publishers_race_with_conditional_puts() {
    race(S3Kind::Conditional);
}

#[test]
fn publishers_race_where_conditions_are_ignored() {
    race(S3Kind::NoIfMatch);
}

#[test]
fn a_pointer_moves_only_from_where_it_was() {
    for kind in [S3Kind::Conditional, S3Kind::NoIfMatch] {
        let service = service(kind);
        let target = store(&service, "swap");
        let (source, _) = TestStore::with_image(&sample_image(3, 4)).unwrap();
        let source = source.open().unwrap();
        let (pointer, _) = source
            .read_pointer(&"stable".parse().unwrap())
            .unwrap()
            .unwrap();
        let first = target.swap_pointer(None, &pointer).unwrap();
        let error = target.swap_pointer(None, &pointer).unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }), "{error}");
        let next = |generation| {
            let release = pointer.release().clone();
            SignedRelease::unsigned(Release {
                generation,
                ..release
            })
        };
        let second = target.swap_pointer(Some(&first), &next(2)).unwrap();
        let error = target.swap_pointer(Some(&first), &next(3)).unwrap_err();
        assert!(error.to_string().contains("generation 2"), "{error}");
        target.swap_pointer(Some(&second), &next(3)).unwrap();
        assert_eq!(target.remarks().is_empty(), kind == S3Kind::Conditional);
        // Neither the trial nor the claims leave anything.
        let list = "GET /images?list-type=2&prefix=swap/ HTTP/1.1";
        let left = service.request(list).unwrap();
        assert!(left.contains("<Key>swap/channels/stable<"), "{left}");
        assert!(
            !left.contains("claims") && !left.contains("probes"),
            "{left}"
        );
    }
}

#[test]
fn what_is_wrong_is_told() {
    let service = service(S3Kind::Conditional);
    let location = service.location("x").replace("s3://images", "s3://nobody");
    let nobody = S3Store::open(&location, &HttpOptions::default()).unwrap();
    let error = nobody.prepare().unwrap_err();
    assert!(error.to_string().contains("bucket"), "{error}");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // A place with other things is no store, and does not become one.
    let other = store(&service, "other");
    other.put(&pack(b"x"), b"x").unwrap();
    let above = S3Store::open(&service.location(""), &HttpOptions::default()).unwrap();
    let error = above.prepare().unwrap_err();
    assert!(matches!(error, Error::BadLocation { .. }), "{error}");
    let location = service.location("x");
    drop(service);
    let gone = open_store(&location).unwrap();
    let error = gone.size(&pack(b"x")).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.is_transient());
}

#[test]
fn a_cancelled_request_ends() {
    credentials();
    // Takes connections, and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let options = HttpOptions::default();
    let cancel = options.cancel.clone();
    let location = format!("s3://images/x?endpoint={endpoint}&region=x");
    let store = S3Store::open(&location, &options).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.size(&pack(b"x")));
        let (_stream, _) = listener.accept().unwrap();
        cancel.cancel();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
    });
}
