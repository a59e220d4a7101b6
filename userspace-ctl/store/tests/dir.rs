// SPDX-License-Identifier: GPL-2.0

//! Directories as stores.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use pristine_store::{
    open_store, Digest, DirStore, Error, NoteKind, NoteName, ObjectKind, ObjectName, PackId, Put,
    Store,
};

fn pack(bytes: &[u8]) -> ObjectName {
    ObjectName::Pack(PackId::new(Digest::of(bytes)))
}

#[test]
fn only_a_store_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("a/b/store");
    assert!(matches!(
        DirStore::open(&root),
        Err(Error::NotAStore { .. })
    ));
    assert!(matches!(
        DirStore::open(directory.path()),
        Err(Error::NotAStore { .. })
    ));
    DirStore::open_or_create(&root).unwrap();
    DirStore::open_or_create(&root).unwrap();
    DirStore::open(&root).unwrap();
    open_store(&root.display().to_string()).unwrap();
    open_store(&format!("file://{}", root.display())).unwrap();
    assert!(matches!(open_store(""), Err(Error::BadLocation { .. })));
    assert!(matches!(
        open_store("ftp://x/"),
        Err(Error::BadLocation { .. })
    ));
    // Somebody's home directory does not become a store.
    fs::write(directory.path().join("letter.txt"), "x").unwrap();
    let error = DirStore::open_or_create(directory.path()).unwrap_err();
    assert!(matches!(error, Error::NotAStore { .. }), "{error}");
    fs::write(root.join("pristine-store"), "pristine-store 2\n").unwrap();
    assert!(matches!(
        DirStore::open(&root),
        Err(Error::Newer { found: 2, .. })
    ));
    fs::write(root.join("pristine-store"), "garbage").unwrap();
    assert!(matches!(
        DirStore::open(&root),
        Err(Error::NotAStore { .. })
    ));
}

#[test]
fn a_creation_that_was_cut_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join(".tmp")).unwrap();
    DirStore::open_or_create(directory.path()).unwrap();
}

#[test]
fn objects_never_change() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::open_or_create(directory.path()).unwrap();
    let object = pack(b"content");
    assert_eq!(store.size(&object).unwrap(), None);
    assert!(matches!(
        store.get(&object, 100),
        Err(Error::NotFound { .. })
    ));
    assert_eq!(store.put(&object, b"content").unwrap(), Put::Created);
    assert_eq!(store.put(&object, b"another").unwrap(), Put::AlreadyThere);
    assert_eq!(store.get(&object, 100).unwrap(), b"content");
    assert_eq!(store.get_range(&object, 2..5).unwrap(), b"nte");
    assert_eq!(store.get_start(&object, 100).unwrap(), b"content");
    assert!(matches!(store.get(&object, 6), Err(Error::TooLarge { .. })));
    let beyond = store.get_range(&object, 5..8);
    assert!(matches!(beyond, Err(Error::Truncated { len: 7, .. })));
    // Nothing of the writing is left.
    assert_eq!(
        fs::read_dir(directory.path().join(".tmp")).unwrap().count(),
        0
    );
}

#[test]
fn old_temporaries_go_and_new_ones_stay() {
    let directory = tempfile::tempdir().unwrap();
    DirStore::open_or_create(directory.path()).unwrap();
    let tmp = directory.path().join(".tmp");
    for (name, age) in [("old", 2 * 86400), ("new", 60)] {
        fs::write(tmp.join(name), "x").unwrap();
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
        let file = fs::File::options()
            .write(true)
            .open(tmp.join(name))
            .unwrap();
        file.set_modified(time).unwrap();
    }
    DirStore::open_or_create(directory.path()).unwrap();
    assert!(!tmp.join("old").exists());
    assert!(tmp.join("new").exists());
}

#[test]
fn objects_are_listed_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::open_or_create(directory.path()).unwrap();
    assert_eq!(store.list(ObjectKind::Pack).unwrap(), vec![]);
    let objects = [pack(b"one"), pack(b"another")];
    for (object, bytes) in objects.iter().zip([&b"one"[..], b"another"]) {
        store.put(object, bytes).unwrap();
    }
    // What has no name of a pack is none.
    fs::write(directory.path().join("packs/letter.txt"), "x").unwrap();
    let mut listed = store.list(ObjectKind::Pack).unwrap();
    listed.sort_by_key(|listed| listed.len);
    let names: Vec<ObjectName> = listed.iter().map(|listed| listed.object).collect();
    assert_eq!(names, objects);
    assert!(listed
        .iter()
        .all(|listed| listed.modified > 1_700_000_000_000));
    store.remove(&objects[0]).unwrap();
    store.remove(&objects[0]).unwrap();
    assert_eq!(store.list(ObjectKind::Pack).unwrap().len(), 1);
    assert_eq!(store.size(&objects[1]).unwrap(), Some(7));
}

#[test]
fn notes_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::open_or_create(directory.path()).unwrap();
    let name = NoteName::new(NoteKind::Pin, "release").unwrap();
    assert_eq!(store.read_note(&name).unwrap(), None);
    for text in ["one", "two", "two"] {
        store.write_note(&name, text.as_bytes()).unwrap();
        assert_eq!(store.read_note(&name).unwrap().unwrap(), text.as_bytes());
    }
    // Written again with the same text, it is as young as one that was just made.
    let path = directory.path().join(name.path());
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(store.notes(NoteKind::Pin).unwrap()[0].modified, 0);
    store.write_note(&name, b"two").unwrap();
    let noted = store.notes(NoteKind::Pin).unwrap();
    assert!(noted[0].modified > 1_700_000_000_000 && noted[0].name == name);
    assert_eq!(store.notes(NoteKind::Lease).unwrap(), vec![]);
    store.remove_note(&name).unwrap();
    store.remove_note(&name).unwrap();
    assert_eq!(store.notes(NoteKind::Pin).unwrap(), vec![]);
}

#[test]
fn objects_are_readable_by_a_web_server() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirStore::open_or_create(directory.path()).unwrap();
    let object = pack(b"content");
    store.put(&object, b"content").unwrap();
    let mode = fs::metadata(directory.path().join(object.path()))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o444, 0o444, "{mode:o}");
}
