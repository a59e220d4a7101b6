// SPDX-License-Identifier: GPL-2.0

//! Manifests that are old, new, cut, damaged or hostile.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{build_bytes, noise, read_image, Packs};
use pristine_image::manifest::{BlockRef, FrameTable, ManifestWriter};
use pristine_image::{
    BuildOptions, Digest, FormatError, Head, ImageId, Info, Manifest, PackId, DIGESTS_PER_PAGE,
};

/// The image behind the golden files: 4 blocks of noise, a hole over the end of the first page, 3 blocks of text, and
/// 2 blocks that came before.
fn golden_image() -> Vec<u8> {
    let mut image = noise(20261121, 4 * 4096);
    image.resize((DIGESTS_PER_PAGE + 6) * 4096, 0);
    let text = b"pristine golden image, version 1\n";
    image.extend(text.iter().cycle().take(3 * 4096));
    image.extend_from_within(4096..3 * 4096);
    image
}

const GOLDEN_ID: &str = "4560a1cc7bfe23e1c7bde8936d1208ec46c006e39c715efd69acd03415614c97";

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// Images that were published must stay readable, and keep their ids, for ever.
///
/// The files were made by `PRISTINE_WRITE_GOLDEN=1 cargo test -p pristine-image --test manifest golden`, once for each
/// version of the format; those of old versions are never made again.
#[test]
fn golden_files_of_version_1_are_read() {
    let image = golden_image();
    if std::env::var_os("PRISTINE_WRITE_GOLDEN").is_some() {
        let mut info = Info::new();
        info.set("name", "golden");
        let options = BuildOptions {
            info,
            ..BuildOptions::default()
        };
        let (built, packs) = build_bytes(&image, &options);
        std::fs::create_dir_all(golden("")).unwrap();
        std::fs::write(golden("v1.manifest"), &built.manifest).unwrap();
        for pack in packs.0.values() {
            std::fs::write(golden("v1.pack.zst"), pack).unwrap();
        }
        println!("image {}", built.image);
    }
    let id: ImageId = GOLDEN_ID.parse().unwrap();
    let bytes = std::fs::read(golden("v1.manifest")).unwrap();
    let manifest = Manifest::parse(&bytes, Some(&id)).unwrap();
    manifest.check_all(&bytes).unwrap();
    assert_eq!(manifest.info().get("name"), Some("golden"));
    let pack = std::fs::read(golden("v1.pack.zst")).unwrap();
    let mut packs = Packs::default();
    packs.0.insert(PackId::new(Digest::of(&pack)), pack);
    assert!(read_image(&manifest, &bytes, &packs) == image);
    // And the id of the same content is still the same.
    let (built, _) = build_bytes(&image, &BuildOptions::default());
    assert_eq!(built.image, id);
}

/// A manifest of a bit more than a page, with all kinds of sections.
fn sample() -> (ImageId, Vec<u8>) {
    let mut info = Info::new();
    info.set("name", "sample");
    let options = BuildOptions {
        info,
        ..BuildOptions::default()
    };
    let (built, _) = build_bytes(&golden_image(), &options);
    (built.image, built.manifest)
}

fn read_all(bytes: &[u8], id: &ImageId) -> Result<(), FormatError> {
    Manifest::parse(bytes, Some(id))?.check_all(bytes)
}

#[test]
fn a_manifest_cut_anywhere_is_found() {
    let (id, bytes) = sample();
    read_all(&bytes, &id).unwrap();
    for cut in 0..bytes.len() {
        let error = read_all(&bytes[..cut], &id).unwrap_err();
        assert!(
            matches!(error, FormatError::Truncated { .. }),
            "{cut}: {error}"
        );
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(
        read_all(&longer, &id),
        Err(FormatError::Invalid { .. })
    ));
}

#[test]
fn a_bit_flipped_anywhere_is_found() {
    let (id, bytes) = sample();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(read_all(&bad, &id).is_err(), "bit {bit}");
        // Without knowing the id, too: each byte has a checksum.
        let claimed = Manifest::parse(&bad, None).and_then(|manifest| manifest.check_all(&bad));
        assert!(claimed.is_err(), "bit {bit}");
    }
}

#[test]
fn errors_name_what_is_wrong() {
    let (id, bytes) = sample();
    let patched = |at: usize, with: &[u8]| {
        let mut bad = bytes.clone();
        bad[at..at + with.len()].copy_from_slice(with);
        read_all(&bad, &id).unwrap_err()
    };
    assert_eq!(patched(0, b"\x7fELF"), FormatError::NotAManifest);
    let newer = patched(8, &7u32.to_le_bytes());
    assert_eq!(
        newer,
        FormatError::NewerVersion {
            found: 7,
            supported: 1
        }
    );
    assert!(newer.is_unsupported() && newer.to_string().contains("upgrade"));
    assert!(patched(40, &8192u32.to_le_bytes())
        .to_string()
        .contains("head"));
    let other = ImageId::new(Digest::of(b"other"));
    let error = read_all(&bytes, &other).unwrap_err();
    assert_eq!(
        error,
        FormatError::WrongImage {
            expected: other,
            found: id
        }
    );
}

/// Rewrites the head's checksum after a change of the head, as a hostile writer would.
fn reseal(bytes: &mut [u8]) {
    let sections = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(&bytes[..96])
        .update(&bytes[128..128 + sections * 64]);
    bytes[96..128].copy_from_slice(hasher.finalize().as_bytes());
}

#[test]
fn hostile_heads_are_refused() {
    let (id, bytes) = sample();
    let patched = |at: usize, with: &[u8]| {
        let mut bad = bytes.clone();
        bad[at..at + with.len()].copy_from_slice(with);
        reseal(&mut bad);
        read_all(&bad, &id).unwrap_err()
    };
    // Features, sizes and geometry.
    assert_eq!(
        patched(16, &4u64.to_le_bytes()),
        FormatError::UnknownFeatures(4)
    );
    for size in [0, 4095, 1 << 60, u64::MAX] {
        patched(32, &u64::to_le_bytes(size));
    }
    patched(40, &512u32.to_le_bytes());
    patched(44, &1u32.to_le_bytes());
    patched(88, &u64::MAX.to_le_bytes());
    // Sections: unknown and required, overlapping, absurdly long.
    let section = 128;
    let error = patched(section, &99u32.to_le_bytes());
    assert_eq!(error, FormatError::UnknownSection(99));
    patched(section + 8, &0u64.to_le_bytes());
    patched(section + 16, &u64::MAX.to_le_bytes());
    patched(section + 24, &u64::MAX.to_le_bytes());
    // A larger image than the pages speak for.
    let size = (golden_image().len() as u64 + 4096).to_le_bytes();
    assert!(matches!(patched(32, &size), FormatError::WrongImage { .. }));
}

#[test]
fn unknown_optional_sections_are_skipped() {
    let (id, mut bytes) = sample();
    // The info section (the third) becomes one of an unknown type.
    let info = 128 + 2 * 64;
    assert_eq!(bytes[info..info + 4], 16u32.to_le_bytes());
    bytes[info..info + 4].copy_from_slice(&1000u32.to_le_bytes());
    reseal(&mut bytes);
    let manifest = Manifest::parse(&bytes, Some(&id)).unwrap();
    manifest.check_all(&bytes).unwrap();
    assert_eq!(manifest.info().get("name"), None);
}

/// Memory of this process, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A large image, all of it distinct blocks, loads in parts and in little memory. 4 GiB, or `PRISTINE_TEST_GIB`; one of
/// 100 GiB must load in 200 ms (checked in release builds, for debug builds take that long to make it).
#[test]
fn a_large_manifest_loads_in_parts() {
    const FRAME: u64 = 32;
    let gib = std::env::var("PRISTINE_TEST_GIB").map_or(4, |text| text.parse().unwrap());
    let blocks: u64 = gib << 18;
    let mut frames = FrameTable::new();
    let mut offset = 0;
    let mut packs = 0u64;
    for frame in 0..blocks / FRAME {
        frames.push_frame(offset, 70_000, FRAME as u32).unwrap();
        offset += 70_000;
        if offset > 32 << 20 || frame + 1 == blocks / FRAME {
            let id = PackId::new(Digest::of(&packs.to_le_bytes()));
            frames.end_pack(id, u64::from(offset) + 100).unwrap();
            packs += 1;
            offset = 0;
        }
    }
    let mut writer = ManifestWriter::new();
    let mut digest = [0; 32];
    for block in 0..blocks {
        // Stands for a digest: distinct, and much cheaper here.
        digest[..8].copy_from_slice(&block.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        writer.push(BlockRef {
            digest: Digest::from_bytes(digest),
            slot: Some(block),
        });
    }
    let (id, bytes) = writer.finish(&frames, &Info::new()).unwrap();
    let memory = resident();
    let begin = std::time::Instant::now();
    let head = Head::parse(&bytes[..Head::MAX_LEN]).unwrap();
    let mut read = 0;
    let manifest = Manifest::load(head, Some(&id), |range| {
        read += range.end - range.start;
        Ok::<_, FormatError>(bytes[range.start as usize..range.end as usize].to_vec())
    });
    let manifest = manifest.unwrap();
    let time = begin.elapsed();
    // The pages, 8 MiB of digests for each GiB, stay where they are.
    assert!(read < 3 << 20, "{read} bytes read");
    let range = manifest.page_range(777);
    let page = manifest.decode_page(777, &bytes[range.start as usize..range.end as usize]);
    assert_eq!(page.unwrap().block(1).unwrap().slot, Some(777 * 1024 + 1));
    let memory = resident().saturating_sub(memory);
    println!(
        "{} bytes, loaded in {time:?} from {read}, {memory} KiB more memory",
        bytes.len()
    );
    assert!(memory < 64 << 10, "{memory} KiB");
    if !cfg!(debug_assertions) {
        assert!(time.as_millis() < 200, "{time:?}");
    }
}
