// SPDX-License-Identifier: GPL-2.0

//! Encrypted images: whoever has the identity reads them as others, and nobody else learns or changes anything.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{
    http, identity, key, open, options, publish_to, quick, sealed, sealing, touch, with,
    with_delta, Memory,
};
use pristine_image::delta::DigestList;
use pristine_image::Digest;
use pristine_store::sealed::{put_key, sealed_id, Identities, Identity, StoreKey};
use pristine_store::update::{blinding_of, Before, Update};
use pristine_store::{
    collect, promote, publish, repack, stored_image, verify, verify_stored, CancelToken, DirStore,
    Error, ErrorKind, GcOptions, ImageId, ImageReader, ImageSelector, ObjectKind, ObjectName,
    PublishOptions, Published, Store, Verifier,
};
use pristine_testkit::{noise, sample_image, FaultyServer, TestStore, TEST_IDENTITY};

struct Lab {
    target: TestStore,
    plain: TestStore,
}

impl Lab {
    fn new() -> Self {
        Lab {
            target: TestStore::new().unwrap(),
            plain: TestStore::new().unwrap(),
        }
    }

    fn raw(&self) -> Arc<dyn Store> {
        self.target.open().unwrap()
    }

    /// As who has the identity sees it.
    fn clear(&self) -> Arc<dyn Store> {
        with(self.raw(), vec![identity()])
    }

    /// Publishes an image encrypted, as the command does.
    fn publish_with(&self, image: &[u8], key: &StoreKey, options: &PublishOptions) -> Published {
        let id = self.plain.add(image, "x").unwrap();
        let reader = open(self.plain.open().unwrap(), &id.to_string()).unwrap();
        let target = sealing(self.raw(), key);
        let scratch = tempfile::tempdir().unwrap();
        let cancel = CancelToken::new();
        let store = || -> pristine_store::Result<Arc<dyn Store>> {
            Ok(Arc::new(DirStore::open_or_create(
                &scratch.path().join("s"),
            )?))
        };
        let repacked = repack(&reader, &target, &store, &cancel, &|_| ()).unwrap();
        let reader = repacked.as_ref().unwrap_or(&reader);
        let channel = "stable".parse().unwrap();
        publish(&sealed(reader, key), &target, &channel, options, &|_, _| ()).unwrap()
    }

    fn publish(&self, image: &[u8]) -> ImageId {
        let published = self.publish_with(image, &key(), &PublishOptions::default());
        published.release.release().image
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut left = vec![self.target.root()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => left.push(path),
                    false => files.push(path),
                }
            }
        }
        files.sort();
        files
    }

    fn files_in(&self, part: &str) -> Vec<PathBuf> {
        let root = self.target.root().join(part);
        let files = self.files().into_iter();
        files.filter(|path| path.starts_with(&root)).collect()
    }
}

/// Reads all of an image, and compares it.
fn read_all(store: Arc<dyn Store>, selector: &str, image: &[u8]) -> Result<(), Error> {
    let reader = open(store, selector)?;
    let memory = Memory::new(&reader);
    let all = 0..reader.blocks();
    reader.fetch([all.clone()], &options(), &memory)?;
    memory.check(image, &[all]);
    Ok(())
}

#[test]
fn who_has_the_identity_reads_it_by_one_range_a_block() {
    let (lab, image) = (Lab::new(), sample_image(1, 8));
    let id = lab.publish(&image);
    read_all(lab.clear(), "stable", &image).unwrap();
    read_all(lab.clear(), &id.to_string(), &image).unwrap();
    let server = FaultyServer::start(&lab.target.root()).unwrap();
    let store = with(
        http(&server.url()),
        vec![Identity::generate().unwrap(), identity()],
    );
    read_all(Arc::clone(&store), "stable", &image).unwrap();
    let reader = open(store, "stable").unwrap();
    for block in [0, 7, 100, 1023, 1024] {
        let before = server.requests();
        let memory = Memory::new(&reader);
        let wanted = block..block + 1;
        reader.fetch([wanted.clone()], &options(), &memory).unwrap();
        memory.check(&image, &[wanted]);
        assert!(server.requests() - before <= 1, "block {block}");
    }
    // The image has another id than in the clear, the same each time.
    let plain = lab.plain.open().unwrap().images().unwrap();
    assert!(!plain.contains(&id));
    assert_eq!(sealed_id(&plain[0], &key()), id);
    let again = lab.publish_with(&image, &key(), &PublishOptions::default());
    assert!(again.unchanged && again.sent_objects == 0);
    // Verified like others, with the key and without.
    let reader = open(lab.clear(), "stable").unwrap();
    let cancel = CancelToken::new();
    let verified = verify(&reader, &cancel, &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{:?}", verified.problems);
    for store in [lab.raw(), lab.clear()] {
        let verified = verify_stored(&store, id, &cancel, &|_, _| ()).unwrap();
        assert!(
            verified.is_ok() && verified.packs > 3,
            "{:?}",
            verified.problems
        );
    }
}

#[test]
fn without_a_key_the_error_says_whose_it_is() {
    let (lab, image) = (Lab::new(), sample_image(2, 4));
    let id = lab.publish(&image);
    let recipient = identity().recipient().to_string();
    let stranger = Identity::generate().unwrap();
    let strange = stranger.recipient().to_string();
    for (store, why) in [
        (lab.raw(), "no identity was given"),
        (with(lab.raw(), Vec::new()), "no identity was given"),
        (with(lab.raw(), vec![stranger.clone()]), strange.as_str()),
    ] {
        let error = open(store, "stable").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoKey);
        let text = error.to_string();
        assert!(text.contains(&recipient) && text.contains(why), "{text}");
    }
    // What a store's keeper does takes no key.
    let store = lab.raw();
    let stored = stored_image(&store, id, quick(), &CancelToken::new()).unwrap();
    assert_eq!(
        (stored.size, stored.key),
        (image.len() as u64, Some(key().id()))
    );
    assert_eq!(stored.recipients, [recipient]);
    let gc = GcOptions {
        grace: std::time::Duration::ZERO,
        ..GcOptions::default()
    };
    let collected = collect(&store, &gc, &|_, _| ()).unwrap();
    assert_eq!(collected.removed.objects, 0);
    // One more recipient, without anything being encrypted again.
    let before = lab.files_in("packs");
    put_key(store.as_ref(), &key(), &[stranger.recipient()]).unwrap();
    assert_eq!(lab.files_in("packs"), before);
    read_all(with(lab.raw(), vec![stranger]), "stable", &image).unwrap();
}

#[test]
fn a_store_learns_nothing() {
    let lab = Lab::new();
    let (first, mut second) = (sample_image(3, 4), sample_image(3, 4));
    touch(&mut second, 1 << 20..2 << 20);
    lab.publish(&first);
    lab.publish_with(&second, &key(), &with_delta());
    assert_eq!(lab.files_in("deltas").len(), 1);
    // What is known of the images: content, digests, ids, names of packs, and frames as they are in the clear.
    let mut needles: HashMap<u64, &str> = HashMap::new();
    let mut add = |bytes: &[u8], what| {
        let start: [u8; 8] = bytes[..8].try_into().unwrap();
        // Zeros and small numbers are anywhere, and so are the project's name and the digest of nothing.
        let nothing = Digest::of(b"");
        if nothing.as_bytes().windows(8).any(|w| w == start) {
            return;
        }
        let distinct: HashSet<u8> = start.into_iter().collect();
        if distinct.len() >= 6 && !b"pristine pristine ".windows(8).any(|w| w == start) {
            needles.insert(u64::from_le_bytes(start), what);
        }
    };
    for block in first.chunks(4096).chain(second.chunks(4096)) {
        add(&block[..8], "content");
        add(&block[2048..2056], "content");
        let digest = Digest::of(block);
        add(digest.as_bytes(), "a digest");
        add(&digest.to_string().as_bytes()[..8], "a digest in text");
    }
    let plain = lab.plain.open().unwrap();
    for kind in [ObjectKind::Manifest, ObjectKind::Pack] {
        for listed in plain.list(kind).unwrap() {
            let bytes = plain.get(&listed.object, u64::MAX).unwrap();
            for part in bytes.chunks(16).filter(|part| part.len() == 16) {
                // Constants of the formats apart.
                add(&part[4..12], "a manifest or a pack");
            }
            match listed.object {
                ObjectName::Manifest(id) => {
                    add(id.as_bytes(), "an id");
                    add(id.to_string().as_bytes(), "an id in text");
                }
                ObjectName::Pack(id) => {
                    add(id.as_bytes(), "a pack's name");
                    add(id.to_string().as_bytes(), "a pack's name in text");
                }
                _ => (),
            }
        }
    }
    assert!(needles.len() > 3_000);
    let short = |start: u64| (start & 0xf_ffff) as usize;
    let mut looks_like = vec![false; 1 << 20];
    for start in needles.keys() {
        looks_like[short(*start)] = true;
    }
    let files = lab.files();
    assert!(files.len() > 8);
    for path in files {
        let name = path.to_string_lossy().into_owned();
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend(name.bytes());
        for (at, window) in bytes.windows(8).enumerate() {
            let start = u64::from_le_bytes(window.try_into().unwrap());
            if !looks_like[short(start)] {
                continue;
            }
            if let Some(what) = needles.get(&start) {
                panic!("{name} shows {what} at {at}: {window:02x?}");
            }
        }
    }
    // And by other keys it is another image.
    assert_ne!(
        sealed_id(&ImageId::from_bytes([1; 32]), &key()),
        sealed_id(
            &ImageId::from_bytes([1; 32]),
            &StoreKey::from_bytes([3; 32])
        )
    );
}

#[test]
fn images_share_blocks_and_have_encrypted_deltas() {
    let lab = Lab::new();
    let first = sample_image(4, 8);
    let mut second = first.clone();
    touch(&mut second, 1 << 20..2 << 20);
    let old = lab.publish(&first);
    let before: u64 = lab
        .files()
        .iter()
        .map(|f| f.metadata().unwrap().len())
        .sum();
    let published = lab.publish_with(&second, &key(), &with_delta());
    let new = published.release.release().image;
    let after: u64 = lab
        .files()
        .iter()
        .map(|f| f.metadata().unwrap().len())
        .sum();
    // The MiB that changed, in a pack, and the delta.
    assert!(after - before < 3 << 20, "{before} {after}");
    read_all(lab.clear(), "stable", &second).unwrap();
    read_all(lab.clear(), &old.to_string(), &first).unwrap();
    let plan = |store: &Arc<dyn Store>| {
        let cancel = CancelToken::new();
        Update::plan(store, &Before::Image(old), new, None, quick(), &cancel)
    };
    let update = plan(&lab.clear()).unwrap().unwrap();
    assert!(update.cost().unwrap().delta.is_some());
    assert_eq!(update.cost().unwrap().new, 256);
    assert!(matches!(
        plan(&lab.raw()).map(drop),
        Err(Error::NoKey { .. })
    ));
    // Promoting keeps all as it is.
    let store = lab.clear();
    let from = ImageSelector::Id(new);
    let channel = "canary".parse().unwrap();
    promote(&store, &from, &channel, &PublishOptions::default()).unwrap();
    read_all(lab.clear(), "canary", &second).unwrap();
    // It takes no key.
    for (channel, from) in [("old", old.to_string()), ("new", "stable".to_owned())] {
        let (from, channel) = (from.parse().unwrap(), channel.parse().unwrap());
        let options = PublishOptions::default();
        let promoted = promote(&lab.raw(), &from, &channel, &options).unwrap();
        assert_eq!(promoted.release.release().size, first.len() as u64);
    }
    read_all(lab.clear(), "old", &first).unwrap();
    read_all(lab.clear(), "new", &second).unwrap();
    // A disk that holds the old image is known by the id that this has, and the delta found.
    let of =
        |store: &Arc<dyn Store>, image| blinding_of(store, image, quick(), &CancelToken::new());
    assert_eq!(of(&lab.clear(), new).unwrap(), Some(key().blinding()));
    assert_eq!(of(&lab.raw(), new).unwrap(), None);
    let digests = first
        .chunks(4096)
        .map(|block| match block.iter().all(|b| *b == 0) {
            true => Digest::zero_block(),
            false => Digest::of(block),
        });
    let digests = DigestList::new(digests.collect()).blinded(Some(key().blinding()));
    assert_eq!(digests.image(), old);
    let (store, before) = (lab.clear(), Before::Content(&digests));
    let update = Update::plan(&store, &before, new, None, quick(), &CancelToken::new());
    assert!(update.unwrap().unwrap().cost().unwrap().delta.is_some());
    // Another key shares nothing, and takes no image of the first.
    let other = StoreKey::from_bytes([9; 32]);
    let published = lab.publish_with(&first, &other, &PublishOptions::default());
    assert!(published.sent_bytes > 4 << 20);
    let reader = open(lab.clear(), &new.to_string()).unwrap();
    for target in [lab.raw(), lab.clear(), sealing(lab.raw(), &other)] {
        let published = publish_to(&reader, &target, "canary");
        assert!(matches!(published, Err(Error::Unsupported { .. })));
    }
}

/// Whether a store that is not as it was is noticed, or does no harm; never is anything wrong read.
fn check_hostile(lab: &Lab, image: &[u8], what: &str) {
    let reader = match open(lab.clear(), "stable") {
        Ok(reader) => reader,
        Err(error) => {
            let told = error.is_corruption()
                || matches!(error, Error::NoImage { .. } | Error::NoKey { .. })
                || error.kind() == ErrorKind::Unsupported;
            assert!(told, "{what}: {error}");
            return;
        }
    };
    let memory = Memory::new(&reader);
    let fetched = reader.fetch(std::iter::once(0..reader.blocks()), &options(), &memory);
    memory.check_prefix(image);
    let error = fetched.expect_err(what);
    let told = error.is_corruption() || matches!(error, Error::NotFound { .. });
    assert!(told, "{what}: {error}");
}

#[test]
fn a_store_that_swaps_replays_or_flips_is_noticed() {
    let lab = Lab::new();
    let (image, other) = (sample_image(5, 4), sample_image(6, 4));
    let id = lab.publish(&image);
    let old_manifest = lab.files_in("images")[0].clone();
    let packs = lab.files_in("packs");
    let foreign = Lab::new();
    foreign.publish(&other);
    let change = |path: &Path, bytes: &[u8], what: &str| {
        let right = fs::read(path).unwrap();
        fs::write(path, bytes).unwrap();
        check_hostile(&lab, &image, what);
        fs::write(path, right).unwrap();
    };
    // A pack for another, of the same image and of another one with the same key.
    let others = foreign.files_in("packs");
    for (number, path) in packs.iter().enumerate() {
        let next = fs::read(&packs[(number + 1) % packs.len()]).unwrap();
        change(path, &next, "another pack");
        change(path, &fs::read(&others[0]).unwrap(), "another image's pack");
        // Chunks of it in another order: nothing of it moves.
        let right = fs::read(path).unwrap();
        let mut swapped = right.clone();
        let (one, two) = swapped.split_at_mut(4112);
        one.swap_with_slice(&mut two[..4112]);
        change(path, &swapped, "swapped chunks");
        for at in [0, 5000, right.len() - 33] {
            let mut flipped = right.clone();
            flipped[at] ^= 1;
            if at < right.len() - 33 {
                change(path, &flipped, "a flipped bit");
            }
        }
        change(path, &right[..right.len() / 2], "a cut pack");
    }
    // Another image's manifest, in the clear and encrypted.
    let theirs = fs::read(&foreign.files_in("images")[0]).unwrap();
    change(&old_manifest, &theirs, "another manifest");
    let in_clear = lab
        .plain
        .open()
        .unwrap()
        .list(ObjectKind::Manifest)
        .unwrap()[0]
        .object;
    let in_clear = lab.plain.open().unwrap().get(&in_clear, u64::MAX).unwrap();
    change(&old_manifest, &in_clear, "a manifest in the clear");
    let right = fs::read(&old_manifest).unwrap();
    for at in 0..right.len().min(5000) {
        // Some of the head, and some of the rest; the public part says nothing to who has the key.
        if at < 128 && at % 3 == 0 || at % 297 == 0 {
            let mut flipped = right.clone();
            flipped[at] ^= 0x10;
            change(&old_manifest, &flipped, "a flipped bit of the manifest");
        }
    }
    change(&old_manifest, &right[..200], "a cut manifest");
    // A key that is another's, or damaged.
    let wrapped = lab.files_in("keys")[0].clone();
    let strange = StoreKey::from_bytes([1; 32]);
    change(
        &wrapped,
        &strange.wrap(&[identity().recipient()]).unwrap(),
        "another key",
    );
    change(&wrapped, b"age-encryption.org/v1\n", "a damaged key");
    read_all(lab.clear(), "stable", &image).unwrap();
    // Damage shows without a key, too.
    let mut bad = fs::read(&packs[0]).unwrap();
    let middle = bad.len() / 2;
    bad[middle] ^= 1;
    fs::write(&packs[0], bad).unwrap();
    fs::remove_file(&packs[1]).unwrap();
    let verified = verify_stored(&lab.raw(), id, &CancelToken::new(), &|_, _| ()).unwrap();
    assert_eq!(verified.problem_count, 2, "{:?}", verified.problems);
}

#[test]
fn a_delta_that_is_another_is_none() {
    let lab = Lab::new();
    let (first, mut second) = (sample_image(7, 4), sample_image(7, 4));
    touch(&mut second, 0..1 << 20);
    let options = with_delta();
    let old = lab
        .publish_with(&first, &key(), &options)
        .release
        .release()
        .image;
    let new = lab
        .publish_with(&second, &key(), &options)
        .release
        .release()
        .image;
    let path = lab.files_in("deltas")[0].clone();
    let right = fs::read(&path).unwrap();
    let manifest = fs::read(&lab.files_in("images")[0]).unwrap();
    let mut flipped = right.clone();
    flipped[300] ^= 1;
    let cancel = CancelToken::new();
    for (bytes, is_there) in [(&right, true), (&manifest, false), (&flipped, false)] {
        fs::write(&path, bytes).unwrap();
        let store = lab.clear();
        let update = Update::plan(&store, &Before::Image(old), new, None, quick(), &cancel);
        let cost = update.unwrap().unwrap().cost().unwrap();
        assert_eq!(cost.delta.is_some(), is_there);
    }
    // Put under the way back it does not lead there.
    let back = ObjectName::Delta { new: old, old: new }.path();
    let back = lab.target.root().join(back);
    fs::create_dir_all(back.parent().unwrap()).unwrap();
    fs::write(back, right).unwrap();
    let store = lab.clear();
    let update = Update::plan(&store, &Before::Image(new), old, None, quick(), &cancel);
    assert_eq!(update.unwrap().unwrap().cost().unwrap().delta, None);
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{command:?}");
    output.stdout
}

#[test]
fn age_opens_our_keys_and_we_open_ages() {
    let (lab, image) = (Lab::new(), sample_image(9, 4));
    lab.publish(&image);
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    // Ours, by age.
    fs::write(file("ours"), TEST_IDENTITY).unwrap();
    let wrapped = lab.files_in("keys")[0].clone();
    let text = run(Command::new("age")
        .arg("-d")
        .arg("-i")
        .arg(file("ours"))
        .arg(&wrapped));
    assert_eq!(
        String::from_utf8(text).unwrap(),
        format!("pristine-store-key 1 {}\n", "42".repeat(32))
    );
    // An identity of age-keygen's, and a key wrapped by age, to two at once, plain and armored.
    run(Command::new("age-keygen").arg("-o").arg(file("theirs")));
    let theirs: Identities = fs::read_to_string(file("theirs")).unwrap().parse().unwrap();
    let printed = run(Command::new("age-keygen").arg("-y").arg(file("theirs")));
    let recipient = theirs.0[0].recipient();
    assert_eq!(
        String::from_utf8(printed).unwrap().trim(),
        recipient.to_string()
    );
    fs::write(
        file("key"),
        format!("pristine-store-key 1 {}\n", "42".repeat(32)),
    )
    .unwrap();
    let place = ObjectName::Key {
        key: key().id(),
        tag: pristine_store::sealed::KeyId::from_bytes(recipient.tag()),
    };
    for armor in [None, Some("-a")] {
        run(Command::new("age")
            .args(armor)
            .args([
                "-r",
                &identity().recipient().to_string(),
                "-r",
                &recipient.to_string(),
                "-o",
            ])
            .arg(lab.target.root().join(place.path()))
            .arg(file("key")));
        read_all(with(lab.raw(), theirs.0.clone()), "stable", &image).unwrap();
    }
    // What we make for an identity of theirs, age opens as well.
    let own = Identity::generate().unwrap();
    fs::write(file("made"), own.to_text().as_str()).unwrap();
    let printed = run(Command::new("age-keygen").arg("-y").arg(file("made")));
    assert_eq!(
        String::from_utf8(printed).unwrap().trim(),
        own.recipient().to_string()
    );
    let two = key().wrap(&[recipient, own.recipient()]).unwrap();
    fs::write(file("two"), two).unwrap();
    for name in ["made", "theirs"] {
        run(Command::new("age")
            .arg("-d")
            .arg("-i")
            .arg(file(name))
            .arg(file("two")));
    }
}

/// The files were made by `PRISTINE_WRITE_GOLDEN=1 cargo test -p pristine-store --test sealed golden`, once for each version
/// of the format; later programs read them.
#[test]
fn golden_files_of_version_1_are_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sealed-v1");
    let mut image = noise(11, 4 * 4096);
    image.resize(1 << 20, 0);
    image.extend(b"pristine golden image, version 1\n".repeat(300));
    image.resize(5 << 20, 0);
    if std::env::var_os("PRISTINE_WRITE_GOLDEN").is_some() {
        let lab = Lab::new();
        let options = PublishOptions {
            time: Some(1_795_253_000),
            ..PublishOptions::default()
        };
        lab.publish_with(&image, &key(), &options);
        for part in ["images", "packs", "keys", "channels"] {
            for path in lab.files_in(part) {
                let to = golden.join(path.strip_prefix(lab.target.root()).unwrap());
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                fs::copy(path, to).unwrap();
            }
        }
        fs::copy(
            lab.target.root().join("pristine-store"),
            golden.join("pristine-store"),
        )
        .unwrap();
    }
    let store: Arc<dyn Store> = Arc::new(DirStore::open(&golden).unwrap());
    read_all(with(Arc::clone(&store), vec![identity()]), "stable", &image).unwrap();
    let id = store.images().unwrap()[0];
    let verified = verify_stored(&store, id, &CancelToken::new(), &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{:?}", verified.problems);
}

#[test]
fn a_store_may_hold_both_kinds() {
    let (lab, image, other) = (Lab::new(), sample_image(12, 4), sample_image(13, 4));
    lab.publish(&image);
    lab.target.add(&other, "open").unwrap();
    for store in [lab.raw(), lab.clear()] {
        read_all(store, "open", &other).unwrap();
    }
    read_all(lab.clear(), "stable", &image).unwrap();
    // The blocks of one are nothing to the other.
    lab.target.add(&image, "open").unwrap();
    read_all(lab.raw(), "open", &image).unwrap();
    let reader: ImageReader = open(lab.clear(), "open").unwrap();
    assert!(reader.manifest().blinding().is_none());
}

#[test]
fn a_wrapped_key_goes_with_the_last_image_that_takes_it() {
    let lab = Lab::new();
    let (first, second) = (sample_image(14, 4), sample_image(15, 4));
    let stranger = Identity::generate().unwrap();
    let old = StoreKey::from_bytes([7; 32]);
    lab.publish_with(&first, &old, &PublishOptions::default());
    put_key(lab.raw().as_ref(), &old, &[stranger.recipient()]).unwrap();
    lab.publish(&second);
    let gc = |keep, grace| {
        let options = GcOptions {
            keep,
            grace: std::time::Duration::from_secs(grace),
            retry: quick(),
            ..GcOptions::default()
        };
        collect(&lab.raw(), &options, &|_, _| ()).unwrap()
    };
    assert_eq!(lab.files_in("keys").len(), 3);
    // Both images are needed; then one is, but the other's key is young.
    gc(2, 0);
    assert_eq!(lab.files_in("keys").len(), 3);
    gc(1, 3600);
    assert_eq!(lab.files_in("keys").len(), 3);
    let collected = gc(1, 0);
    assert_eq!(collected.removed_images.len(), 1);
    let left = lab.files_in("keys");
    assert_eq!(left.len(), 1);
    assert!(left[0].to_string_lossy().contains(&key().id().to_string()));
    read_all(lab.clear(), "stable", &second).unwrap();
}

#[test]
fn a_pack_that_images_share_is_read_once() {
    let lab = Lab::new();
    let first = sample_image(16, 8);
    let mut second = first.clone();
    touch(&mut second, 1 << 20..2 << 20);
    let ids = [lab.publish(&first), lab.publish(&second)];
    let cancel = CancelToken::new();
    let packs: u64 = lab
        .files_in("packs")
        .iter()
        .map(|path| path.metadata().unwrap().len())
        .sum();
    for reversed in [false, true] {
        for with_key in [false, true] {
            let verifier = Verifier::of_several();
            let mut ids = ids;
            ids[..].rotate_left(usize::from(reversed));
            let (mut read, mut manifests) = (0, 0);
            for id in ids {
                let stored = stored_image(&lab.raw(), id, quick(), &cancel).unwrap();
                manifests += stored.manifest_len;
                let verified = match with_key {
                    true => {
                        let reader = open(lab.clear(), &id.to_string()).unwrap();
                        verifier.verify(&reader, &cancel, &|_, _| ()).unwrap()
                    }
                    false => verifier
                        .verify_stored(&lab.raw(), id, &cancel, &|_, _| ())
                        .unwrap(),
                };
                assert!(verified.is_ok(), "{:?}", verified.problems);
                assert_eq!(verified.packs, stored.packs.len() as u64);
                read += verified.bytes;
            }
            assert!(read <= packs + manifests, "{read} {packs} {manifests}");
        }
    }
    // Damage is found for each image that has it.
    let shared = lab.files_in("packs")[0].clone();
    let right = fs::read(&shared).unwrap();
    let mut wrong = right.clone();
    wrong[right.len() / 2] ^= 1;
    fs::write(&shared, wrong).unwrap();
    let verifier = Verifier::of_several();
    let bad = ids.into_iter().filter(|id| {
        let found = verifier.verify_stored(&lab.raw(), *id, &cancel, &|_, _| ());
        !found.unwrap().is_ok()
    });
    assert!(bad.count() >= 1);
}
