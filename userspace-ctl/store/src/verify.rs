// SPDX-License-Identifier: GPL-2.0

//! Verifying an image in a store: everything is read again and checked, and everything wrong is told.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};

use pristine_image::manifest::PackRef;
use pristine_image::pack::decode_frame;
use pristine_image::{Digest, ImageId, Manifest, BLOCK_SIZE};
use pristine_seal::object as sealed;
use pristine_seal::pack::check as check_sealed;

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::reader::ImageReader;
use crate::retry::{CancelToken, RetryPolicy};
use crate::sealed::stored_image;
use crate::store::Store;

/// The most problems that are listed; all are counted.
const MAX_PROBLEMS: usize = 100;

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The object, by its path in the store.
    pub object: String,
    /// What is wrong with it.
    pub what: String,
}

/// What was checked, and what is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Packs read.
    pub packs: u64,
    /// Bytes read, manifest included.
    pub bytes: u64,
    /// Distinct blocks whose content was checked.
    pub blocks: u64,
    /// Distinct blocks that are missing or wrong.
    pub bad_blocks: u64,
    /// What is wrong, up to 100 problems.
    pub problems: Vec<Problem>,
    /// How many problems there are.
    pub problem_count: u64,
}

impl Verified {
    /// Whether all is well.
    pub fn is_ok(&self) -> bool {
        self.problem_count == 0
    }

    /// Adds what was found elsewhere.
    fn add(&mut self, other: Verified) {
        self.packs += other.packs;
        self.bytes += other.bytes;
        self.blocks += other.blocks;
        self.bad_blocks += other.bad_blocks;
        self.problem_count += other.problem_count;
        let room = MAX_PROBLEMS.saturating_sub(self.problems.len());
        self.problems.extend(other.problems.into_iter().take(room));
    }

    fn problem(&mut self, object: &ObjectName, what: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem {
                object: object.path(),
                what: what.into(),
            });
        }
    }
}

/// Rereads an image's manifest and packs: each byte of the manifest, the name of each pack, each frame, and the digest
/// of each block; several packs at once. `progress` gets the bytes read and the bytes to read. Takes 33 bytes of memory
/// for each distinct block, and that of the packs.
///
/// # Errors
/// Only what keeps it from going on ([`Error::Cancelled`], the network); damage is in the result.
pub fn verify(
    image: &ImageReader,
    cancel: &CancelToken,
    progress: &dyn Fn(u64, u64),
) -> Result<Verified> {
    let mut verified = Verified::default();
    let manifest = image.manifest();
    let packs = manifest.frames().packs();
    let total = manifest.head().file_len() + packs.iter().map(|pack| pack.len).sum::<u64>();
    let object = ObjectName::Manifest(image.image());
    progress(0, total);
    let bytes = image.store().get(&object, manifest.head().file_len())?;
    verified.bytes += bytes.len() as u64;
    if let Err(error) = check_manifest(image, &bytes) {
        verified.problem(&object, error.to_string());
    }
    drop(bytes);
    let Some(expected) = slot_digests(image, &mut verified, cancel)? else {
        return Ok(verified);
    };
    let next = AtomicUsize::new(0);
    let mut done = manifest.head().file_len();
    std::thread::scope(|scope| {
        let (sender, results) = mpsc::channel();
        for _ in 0..threads().min(packs.len()) {
            let (sender, next, expected) = (sender.clone(), &next, &expected);
            scope.spawn(move || {
                while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut verified = Verified::default();
                    let checked = cancel
                        .check()
                        .and_then(|()| verify_pack(image, pack, expected, &mut verified));
                    let failed = checked.is_err();
                    // Nobody listens after the first error.
                    let sent = sender.send(checked.map(|()| (pack.len, verified)));
                    if failed || sent.is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for result in results {
            let (len, part) = match result {
                Ok(checked) => checked,
                Err(error) => {
                    next.store(packs.len(), Ordering::Relaxed);
                    return Err(error);
                }
            };
            verified.add(part);
            done += len;
            progress(done, total);
        }
        Ok(verified)
    })
}

/// Rereads what an image has in a store as far as that takes no key: that of an encrypted image all objects are there,
/// and as they were when they were stored. Whether they are right only its key tells. `progress` as for [`verify`].
///
/// # Errors
/// As [`verify`], and [`Error::NoImage`].
pub fn verify_stored(
    store: &Arc<dyn Store>,
    image: ImageId,
    cancel: &CancelToken,
    progress: &dyn Fn(u64, u64),
) -> Result<Verified> {
    let below = store.below();
    let store = below.as_ref().unwrap_or(store);
    let stored = stored_image(store, image, RetryPolicy::default(), cancel)?;
    let mut verified = Verified::default();
    let manifest = ObjectName::Manifest(image);
    let total = stored.manifest_len + stored.packs.iter().map(|(_, len)| len).sum::<u64>();
    let bytes = store.get(&manifest, stored.manifest_len)?;
    verified.bytes += bytes.len() as u64;
    if let Err(error) = sealed::Head::check_all(&bytes) {
        verified.problem(&manifest, error.to_string());
    }
    progress(verified.bytes, total);
    for (id, len) in stored.packs {
        cancel.check()?;
        let object = ObjectName::Pack(id);
        verified.packs += 1;
        match store.get(&object, len) {
            Ok(bytes) => {
                verified.bytes += bytes.len() as u64;
                if bytes.len() as u64 != len {
                    let what = format!("it has {} bytes, not {len}", bytes.len());
                    verified.problem(&object, what);
                } else if let Err(error) = check_sealed(&bytes, "the pack") {
                    verified.problem(&object, error.to_string());
                }
            }
            Err(error @ (Error::NotFound { .. } | Error::TooLarge { .. })) => {
                verified.problem(&object, error.to_string());
            }
            Err(error) => return Err(error),
        }
        progress(verified.bytes, total);
    }
    Ok(verified)
}

/// Packs that are checked at once; each is in memory as a whole, so not too many.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8))
}

fn check_manifest(
    image: &ImageReader,
    bytes: &[u8],
) -> std::result::Result<(), pristine_image::FormatError> {
    Manifest::parse(bytes, Some(&image.image()))?.check_all(bytes)
}

/// The digest that the manifest gives for each slot; `None` if it cannot be told.
fn slot_digests(
    image: &ImageReader,
    verified: &mut Verified,
    cancel: &CancelToken,
) -> Result<Option<Vec<Option<Digest>>>> {
    let object = ObjectName::Manifest(image.image());
    let manifest = image.manifest();
    let mut digests = vec![None; manifest.frames().slots() as usize];
    for number in 0..manifest.pages() {
        cancel.check()?;
        let page = match image.page(number) {
            Ok(page) => page,
            Err(error) if error.is_corruption() => {
                verified.problem(&object, error.to_string());
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        for block in page.blocks() {
            let Some(digest) = block.slot.and_then(|slot| digests.get_mut(slot as usize)) else {
                continue;
            };
            if *digest.get_or_insert(block.digest) != block.digest {
                let what = format!("page {number} gives two digests for the same content");
                verified.problem(&object, what);
            }
        }
    }
    Ok(Some(digests))
}

fn verify_pack(
    image: &ImageReader,
    pack: &PackRef,
    expected: &[Option<Digest>],
    verified: &mut Verified,
) -> Result<()> {
    let object = ObjectName::Pack(pack.id);
    let frames = || {
        let indices = pack.frames.clone();
        indices.filter_map(|index| image.manifest().frames().frame(index))
    };
    verified.packs += 1;
    let bytes = match image.store().get(&object, pack.len) {
        Ok(bytes) => bytes,
        Err(error @ (Error::NotFound { .. } | Error::TooLarge { .. })) => {
            verified.problem(&object, error.to_string());
            verified.bad_blocks += frames().map(|frame| u64::from(frame.blocks)).sum::<u64>();
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    verified.bytes += bytes.len() as u64;
    if Digest::of(&bytes).as_bytes() != pack.id.as_bytes() {
        verified.problem(&object, "its content does not fit its name");
    }
    for frame in frames() {
        let at = frame.offset as usize;
        let stored = bytes.get(at..at + frame.len as usize).unwrap_or_default();
        let wanted = expected
            .get(frame.first_slot as usize..)
            .unwrap_or_default();
        match decode_frame(stored, frame.blocks as usize) {
            Ok(data) => {
                let blocks = data.chunks_exact(BLOCK_SIZE).zip(wanted);
                for (content, digest) in blocks {
                    let Some(digest) = digest else { continue };
                    verified.blocks += 1;
                    if Digest::of(content) != *digest {
                        verified.bad_blocks += 1;
                        verified.problem(&object, format!("block with digest {digest} is wrong"));
                    }
                }
            }
            Err(error) => {
                verified.bad_blocks += u64::from(frame.blocks);
                verified.problem(&object, format!("at byte {at}: {error}"));
            }
        }
    }
    Ok(())
}
