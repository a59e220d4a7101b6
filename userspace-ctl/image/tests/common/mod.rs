// SPDX-License-Identifier: GPL-2.0

//! Helpers of the image tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicBool;

use pristine_image::pack::decode_frame;
use pristine_image::{build, BuildOptions, Built, Digest, Manifest, PackId, PackSink, Source};

/// Packs in memory.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Packs(pub BTreeMap<PackId, Vec<u8>>);

impl Packs {
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl PackSink for Packs {
    fn pack(&mut self, id: &PackId, bytes: &[u8]) -> io::Result<()> {
        assert_eq!(id.as_bytes(), Digest::of(bytes).as_bytes());
        self.0.insert(*id, bytes.to_vec());
        Ok(())
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn build_bytes(image: &[u8], options: &BuildOptions) -> (Built, Packs) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image).unwrap();
    let source = Source::open(file.path()).unwrap();
    let mut packs = Packs::default();
    let cancel = AtomicBool::new(false);
    let built = build(&source, options, &mut packs, &|_| (), &cancel).unwrap();
    (built, packs)
}

/// The whole image, each block checked.
pub fn read_image(manifest: &Manifest, bytes: &[u8], packs: &Packs) -> Vec<u8> {
    let mut image = Vec::new();
    let mut last = (None, Vec::new());
    for number in 0..manifest.pages() {
        let range = manifest.page_range(number);
        let stored = &bytes[range.start as usize..range.end as usize];
        for block in manifest.decode_page(number, stored).unwrap().blocks() {
            let Some(slot) = block.slot else {
                image.extend([0; 4096]);
                continue;
            };
            let frame = manifest.frames().frame_of(slot).unwrap();
            if last.0 != Some(frame.index) {
                let pack = &packs.0[&manifest.frames().packs()[frame.pack as usize].id];
                let at = frame.offset as usize;
                let stored = &pack[at..at + frame.len as usize];
                last = (
                    Some(frame.index),
                    decode_frame(stored, frame.blocks as usize).unwrap(),
                );
            }
            let at = (slot - frame.first_slot) as usize * 4096;
            let content = &last.1[at..at + 4096];
            assert_eq!(Digest::of(content), block.digest);
            image.extend_from_slice(content);
        }
    }
    image
}
