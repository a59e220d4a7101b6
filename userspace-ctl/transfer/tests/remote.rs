// SPDX-License-Identifier: GPL-2.0

//! Sources behind a web server (nginx), and images that leave their blocks there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::sync::Arc;

use common::{noise_disk, open, read_disk, watch, Lab};
use pristine_image::manifest::Info;
use pristine_image::ReadAt;
use pristine_store::{
    verify, BlockSink, CancelToken, DirStore, Error as StoreError, FetchOptions, ImageReader,
    ImageSelector, ObjectName, RetryPolicy, Store,
};
use pristine_testkit::FaultyServer;
use pristine_transfer::http::{HttpClient, HttpFile};
use pristine_transfer::reference::{build_reference, ReferenceStore};
use pristine_transfer::xz::{XzImage, XzIndex};
use pristine_transfer::{Content, Error};

fn client() -> HttpClient {
    HttpClient::new(RetryPolicy::once(), &CancelToken::new())
}

/// Puts a disk and its `.xz` of blocks of 256 KiB where a server finds them.
fn put_xz(lab: &Lab, disk: &[u8]) {
    lab.write("disk.img", disk);
    lab.sh("xz -c -0 --block-size=256KiB disk.img > disk.img.xz");
}

#[test]
fn an_xz_behind_a_server_is_fetched_by_block() {
    let lab = Lab::new();
    let disk = pristine_testkit::noise(3, 8 << 20);
    put_xz(&lab, &disk);
    let stored = fs::metadata(lab.path("disk.img.xz")).unwrap().len();
    let server = FaultyServer::start(&lab.path("")).unwrap();
    let url = format!("{}/disk.img.xz", server.url());
    let file = Arc::new(HttpFile::open(&url, client()).unwrap());
    assert_eq!(file.len(), stored);
    let index = XzIndex::read(file.as_ref(), &url).unwrap();
    assert_eq!(index.blocks().len(), 32);
    let image = XzImage::new(Arc::clone(&file) as Arc<dyn ReadAt>, index, &url).unwrap();
    let before = (file.requests(), file.received());
    let mut block = vec![0; 4096];
    image.read_at(5 << 20, &mut block).unwrap();
    assert_eq!(block, disk[5 << 20..(5 << 20) + 4096]);
    // One range request, of one block.
    assert_eq!(file.requests() - before.0, 1);
    assert!(file.received() - before.1 < 300 << 10);
    // And what lies in the same block is there.
    image.read_at((5 << 20) + 100_000, &mut block).unwrap();
    assert_eq!(file.requests() - before.0, 1);
    let whole = read_disk(open(&lab, &url, |_| ()).unwrap()).unwrap();
    assert!(whole == disk);
}

#[test]
fn qcow2_and_raw_are_read_where_they_are() {
    let lab = Lab::new();
    let disk = noise_disk(2 << 20);
    lab.write("disk.img", &disk);
    lab.sh("qemu-img convert -c -O qcow2 disk.img disk.qcow2");
    let server = FaultyServer::start(&lab.path("")).unwrap();
    for name in ["disk.img", "disk.qcow2"] {
        let opened = open(&lab, &format!("{}/{name}", server.url()), |options| {
            options.by_range = true
        });
        assert!(read_disk(opened.unwrap()).unwrap() == disk, "{name}");
    }
    let missing = open(&lab, &format!("{}/other", server.url()), |_| ());
    assert!(matches!(
        missing,
        Err(Error::Store(StoreError::NotFound { .. }))
    ));
}

#[test]
fn a_server_without_ranges_is_downloaded_from() {
    let lab = Lab::new();
    let disk = noise_disk(1 << 20);
    put_xz(&lab, &disk);
    let server = FaultyServer::start(&lab.path("")).unwrap();
    server.set_rules("@1-:ignore-range".parse().unwrap());
    let url = format!("{}/disk.img.xz", server.url());
    let opened = open(&lab, &url, |_| ()).unwrap();
    assert!(
        opened.notes[0].contains("downloaded whole"),
        "{:?}",
        opened.notes
    );
    assert!(read_disk(opened).unwrap() == disk);
    let refused = open(&lab, &url, |options| options.by_range = true);
    assert!(matches!(refused, Err(Error::Unsupported { .. })));
    let limited = open(&lab, &url, |options| options.max_size = Some(1000));
    assert!(matches!(limited, Err(Error::TooLarge { .. })));
}

struct Collect(std::sync::Mutex<Vec<u8>>);

impl BlockSink for Collect {
    fn blocks(&self, first: u64, data: &[u8]) -> std::io::Result<()> {
        let at = first as usize * 4096;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zeros(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn an_image_can_leave_its_blocks_where_they_are() {
    let lab = Lab::new();
    let disk = noise_disk(6 << 20);
    put_xz(&lab, &disk);
    let server = FaultyServer::start(&lab.path("")).unwrap();
    let url = format!("{}/disk.img.xz", server.url());
    let Content::Disk(source) = open(&lab, &url, |options| options.by_range = true)
        .unwrap()
        .content
    else {
        panic!("not a disk");
    };
    let made = build_reference(
        source.input(),
        source.input(),
        &url,
        false,
        &Info::new(),
        &watch(),
    )
    .unwrap();
    let root = lab.path("store");
    let store: Arc<dyn Store> = Arc::new(DirStore::open_or_create(&root).unwrap());
    store
        .put(&ObjectName::Manifest(made.image), &made.manifest)
        .unwrap();
    for (pack, reference) in made.references(&url, source.len()) {
        store
            .put(&ObjectName::Reference(pack), reference.encode().as_bytes())
            .unwrap();
    }
    // The id is that of the same disk in a store of its own.
    let raw = open(&lab, "disk.img", |_| ()).unwrap();
    let Content::Disk(raw) = raw.content else {
        panic!("not a disk")
    };
    let cancel = std::sync::atomic::AtomicBool::new(false);
    let built = pristine_image::build(
        &raw,
        &common::build_options(),
        &mut common::Nowhere,
        &|_| (),
        &cancel,
    );
    assert_eq!(built.unwrap().image, made.image);

    let open_image = |store: Arc<dyn Store>| {
        let selector = ImageSelector::Id(made.image);
        ImageReader::open(store, &selector, RetryPolicy::once(), &CancelToken::new()).unwrap()
    };
    let options = FetchOptions {
        retry: RetryPolicy::once(),
        ..FetchOptions::default()
    };
    let fetch = |reader: &ImageReader| {
        let sink = Collect(std::sync::Mutex::new(vec![0; reader.size() as usize]));
        let all = std::iter::once(0..reader.blocks());
        reader
            .fetch(all, &options, &sink)
            .map(|_| sink.0.into_inner().unwrap())
    };
    // Without following references, packs are missing.
    assert!(matches!(
        fetch(&open_image(Arc::clone(&store))),
        Err(StoreError::NotFound { .. })
    ));
    let follow = || -> Arc<dyn Store> {
        let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
        Arc::new(ReferenceStore::new(Arc::clone(&store), retry, &cancel))
    };
    let reader = open_image(follow());
    assert!(fetch(&reader).unwrap() == disk);
    let verified = verify(&reader, &CancelToken::new(), &|_, _| ()).unwrap();
    assert!(verified.is_ok(), "{:?}", verified.problems);
    assert!(verified.blocks > 0);

    // Another disk in its place is noticed, by its size or by its blocks.
    let mut other = disk.clone();
    other[4096 * 3] ^= 1;
    put_xz(&lab, &other);
    assert!(matches!(
        fetch(&open_image(follow())),
        Err(StoreError::Content { .. })
    ));
    put_xz(&lab, &other[..4 << 20]);
    let smaller = fetch(&open_image(follow())).unwrap_err();
    assert!(smaller.to_string().contains("was changed"), "{smaller}");
}

#[test]
fn a_remote_store_cannot_refer_to_local_files() {
    let lab = Lab::new();
    let disk = noise_disk(1 << 20);
    lab.write("disk.img", &disk);
    let path = lab.path("disk.img").display().to_string();
    let Content::Disk(source) = open(&lab, "disk.img", |_| ()).unwrap().content else {
        panic!("not a disk");
    };
    let made = build_reference(
        source.input(),
        source.input(),
        "x",
        false,
        &Info::new(),
        &watch(),
    )
    .unwrap();
    let root = lab.path("store");
    let store = DirStore::open_or_create(&root).unwrap();
    store
        .put(&ObjectName::Manifest(made.image), &made.manifest)
        .unwrap();
    let references = made.references(&path, source.len());
    for (pack, reference) in &references {
        store
            .put(&ObjectName::Reference(*pack), reference.encode().as_bytes())
            .unwrap();
    }
    let server = FaultyServer::start(&root).unwrap();
    let remote = pristine_store::open_store(&server.url()).unwrap();
    let pack = ObjectName::Pack(references[0].0);
    let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
    let refused = ReferenceStore::new(remote, retry, &cancel).get_range(&pack, 0..100);
    assert!(
        matches!(refused, Err(StoreError::Unsupported { .. })),
        "{refused:?}"
    );
    let local: Arc<dyn Store> = Arc::new(store);
    assert!(ReferenceStore::new(local, retry, &cancel)
        .get_range(&pack, 0..100)
        .is_ok());
}
