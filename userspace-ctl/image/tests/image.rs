// SPDX-License-Identifier: GPL-2.0

//! Building images, and reading them back from manifest and packs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::{build_bytes, noise, read_image, Packs};
use pristine_image::{build, BuildError, BuildOptions, FormatError, Info, Known, Manifest, Source};

const MIB: usize = 1 << 20;

#[test]
fn an_image_comes_back_as_it_was() {
    // More than two pages, an odd number of blocks, noise, text, zeros, and repetitions.
    let mut image = noise(1, 3 * MIB);
    image.extend(vec![0; 5 * MIB]);
    image.extend(b"pristine ".repeat(100_000).iter().take(200 * 4096));
    image.extend(noise(2, 4096 * 3));
    image.extend_from_within(4096 * 7..4096 * 100);
    let (built, packs) = build_bytes(&image, &BuildOptions::default());
    let manifest = Manifest::parse(&built.manifest, Some(&built.image)).unwrap();
    manifest.check_all(&built.manifest).unwrap();
    assert_eq!(manifest.size(), image.len() as u64);
    assert_eq!(built.zero_blocks, 5 * 256);
    assert_eq!(built.blocks, image.len() as u64 / 4096);
    assert!(read_image(&manifest, &built.manifest, &packs) == image);
}

#[test]
fn duplicates_and_zeros_cost_nothing() {
    let once = noise(3, 2 * MIB);
    let (alone, _) = build_bytes(&once, &BuildOptions::default());
    let mut thrice = once.repeat(3);
    thrice.extend(vec![0; 64 * MIB]);
    let (built, packs) = build_bytes(&thrice, &BuildOptions::default());
    assert_eq!(built.unique_blocks, 512);
    assert_eq!(built.pack_bytes, alone.pack_bytes);
    assert_eq!(packs.len(), 1);
    let extra = built.manifest.len() - alone.manifest.len();
    // The third copy lies in another page than the first, which needs the digests again.
    assert!(extra < 512 * 32 + 1000, "{extra} bytes more");
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let mut image = noise(4, 20 * MIB);
    image[5 * MIB..9 * MIB].fill(7);
    let make = |threads| {
        let options = BuildOptions {
            threads: Some(threads),
            pack_target: 4 * MIB as u64,
            ..BuildOptions::default()
        };
        build_bytes(&image, &options)
    };
    let ((one, packs_of_one), (three, packs_of_three)) = (make(1), make(3));
    assert_eq!(one.manifest, three.manifest);
    assert!(packs_of_one == packs_of_three);
    assert!(one.packs >= 4);
}

#[test]
fn the_id_is_of_the_content_alone() {
    let image = noise(5, MIB);
    let (a, _) = build_bytes(&image, &BuildOptions::default());
    let mut info = Info::new();
    info.set("name", "another");
    let options = BuildOptions {
        level: 1,
        frame_blocks: 8,
        info,
        ..BuildOptions::default()
    };
    let (b, packs) = build_bytes(&image, &options);
    assert_eq!(a.image, b.image);
    let manifest = Manifest::parse(&b.manifest, Some(&a.image)).unwrap();
    assert_eq!(manifest.info().get("name"), Some("another"));
    assert!(read_image(&manifest, &b.manifest, &packs) == image);
    let (longer, _) = build_bytes(&[image, vec![0; 4096]].concat(), &BuildOptions::default());
    assert_ne!(longer.image, a.image);
}

#[test]
fn holes_are_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse.img");
    let file = File::create(&path).unwrap();
    // 1 TiB, which nobody could read here.
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&noise(6, 8192), 700 << 30).unwrap();
    let (built, packs) = build_path(&path, &BuildOptions::default()).unwrap();
    assert_eq!(built.unique_blocks, 2);
    assert_eq!(built.blocks, 1 << 28);
    assert!(
        built.manifest.len() < 300_000,
        "{} bytes",
        built.manifest.len()
    );
    let manifest = Manifest::parse(&built.manifest, None).unwrap();
    let page = manifest.decode_page((700 << 30) / (4 << 20), {
        let range = manifest.page_range((700 << 30) / (4 << 20));
        &built.manifest[range.start as usize..range.end as usize]
    });
    assert_eq!(
        page.unwrap().blocks().filter(|b| b.slot.is_some()).count(),
        2
    );
    assert_eq!(packs.len(), 1);
}

fn build_path(
    path: &Path,
    options: &BuildOptions,
) -> Result<(pristine_image::Built, Packs), BuildError> {
    let mut packs = Packs::default();
    let source = Source::open(path)?;
    let built = build(
        &source,
        options,
        &mut packs,
        &|_| (),
        &AtomicBool::new(false),
    )?;
    Ok((built, packs))
}

#[test]
fn odd_sizes_are_refused_or_padded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("odd.img");
    fs::write(&path, noise(7, 10_000)).unwrap();
    let error = build_path(&path, &BuildOptions::default()).unwrap_err();
    assert!(
        matches!(error, BuildError::Size { len: 10_000, .. }),
        "{error}"
    );
    let options = BuildOptions {
        pad: true,
        ..BuildOptions::default()
    };
    let (built, packs) = build_path(&path, &options).unwrap();
    let manifest = Manifest::parse(&built.manifest, None).unwrap();
    let mut expected = noise(7, 10_000);
    expected.resize(12288, 0);
    assert!(read_image(&manifest, &built.manifest, &packs) == expected);
    fs::write(&path, b"").unwrap();
    assert!(matches!(
        build_path(&path, &options),
        Err(BuildError::Size { .. })
    ));
}

#[test]
fn what_is_no_source_is_refused() {
    let missing = Source::open(Path::new("/nonexistent/disk.img"));
    assert!(matches!(missing, Err(BuildError::Open { .. })));
    let null = Source::open(Path::new("/dev/null"));
    assert!(matches!(null, Err(BuildError::NotASource(_))));
}

#[test]
fn a_build_can_be_cancelled_and_a_sink_can_refuse() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::write(&path, noise(8, 40 * MIB)).unwrap();
    let source = Source::open(&path).unwrap();
    let cancel = AtomicBool::new(true);
    let options = BuildOptions::default();
    let result = build(&source, &options, &mut Packs::default(), &|_| (), &cancel);
    assert!(matches!(result, Err(BuildError::Cancelled)));

    struct Full;
    impl pristine_image::PackSink for Full {
        fn pack(&mut self, _: &pristine_image::PackId, _: &[u8]) -> std::io::Result<()> {
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        }
    }
    let cancel = AtomicBool::new(false);
    let result = build(&source, &options, &mut Full, &|_| (), &cancel);
    assert!(matches!(result, Err(BuildError::Sink(_))));
}

#[test]
fn a_source_that_changes_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::write(&path, noise(9, 48 * MIB)).unwrap();
    let source = Source::open(&path).unwrap();
    let change = |_| {
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 0).unwrap();
    };
    let cancel = AtomicBool::new(false);
    let result = build(
        &source,
        &BuildOptions::default(),
        &mut Packs::default(),
        &change,
        &cancel,
    );
    assert!(matches!(result, Err(BuildError::Changed(_))));
}

#[test]
fn known_blocks_are_not_stored_again() {
    let mut first = noise(10, 6 * MIB);
    first.extend(vec![0; 2 * MIB]);
    let options = BuildOptions {
        pack_target: 2 * MIB as u64,
        ..BuildOptions::default()
    };
    let (built, mut packs) = build_bytes(&first, &options);
    let manifest = Manifest::parse(&built.manifest, None).unwrap();
    let mut known = Known::new();
    let page = |number| {
        let range = manifest.page_range(number);
        manifest.decode_page(
            number,
            &built.manifest[range.start as usize..range.end as usize],
        )
    };
    known.add(&manifest, |_| true, page).unwrap();
    assert_eq!(known.blocks(), 6 * 256);

    // The next generation: something moved, something new, and something old once more.
    let mut second = noise(11, MIB);
    second.extend_from_slice(&first[3 * MIB..7 * MIB]);
    second.extend_from_slice(&first[..4096 * 3]);
    second.extend_from_within(..4096 * 2);
    let options = BuildOptions {
        known: std::sync::Arc::new(known.clone()),
        ..options
    };
    let (next, new_packs) = build_bytes(&second, &options);
    assert_eq!(
        (next.unique_blocks, next.shared_blocks),
        (256 + 3 * 256 + 3, 3 * 256 + 3)
    );
    assert!(
        next.pack_bytes < MIB as u64 + 50_000,
        "{} bytes",
        next.pack_bytes
    );
    assert!(next.shared_packs >= 2 && next.packs == 1);
    let (again, _) = build_bytes(&second, &options);
    assert_eq!(next.manifest, again.manifest, "the same again");
    // It reads back from both sets of packs, and needs no frame without a block of its own.
    packs.0.extend(new_packs.0);
    let manifest = Manifest::parse(&next.manifest, Some(&next.image)).unwrap();
    manifest.check_all(&next.manifest).unwrap();
    assert!(read_image(&manifest, &next.manifest, &packs) == second);
    assert!(
        manifest.frames().frames() <= 8 + 24 + 2,
        "{}",
        manifest.frames().frames()
    );
    // The id is of the content alone.
    let (alone, _) = build_bytes(&second, &BuildOptions::default());
    assert_eq!(alone.image, next.image);
    // A pack that is gone is not referred to.
    let gone = manifest_of(&built);
    let mut nothing = Known::new();
    let none =
        |_: u64| -> Result<pristine_image::Page, FormatError> { panic!("no page is needed") };
    nothing.add(&gone, |_| false, none).unwrap();
    assert!(nothing.is_empty());
}

fn manifest_of(built: &pristine_image::Built) -> Manifest {
    Manifest::parse(&built.manifest, None).unwrap()
}
