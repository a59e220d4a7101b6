// SPDX-License-Identifier: GPL-2.0

//! Verifying an image in a store: everything is read again and checked, and everything wrong is told.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex, PoisonError};

use pristine_image::manifest::{Frame, PackRef};
use pristine_image::merkle::Blinding;
use pristine_image::pack::{decode_frame, seek_table};
use pristine_image::{Digest, ImageId, Manifest, PackId, BLOCK_SIZE};
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
    /// Packs checked.
    pub packs: u64,
    /// Bytes read, manifest included; without packs that were read for another image before.
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

/// Verifies images of a store. Of several ([`Verifier::of_several`]) it reads each pack once, whatever the number of images
/// that share it.
#[derive(Debug, Default)]
pub struct Verifier {
    /// What was found in packs; `None` if nobody asks again.
    known: Option<Mutex<HashMap<Known, Arc<PackContent>>>>,
    /// What is wrong with packs as they are stored.
    stored: Mutex<HashMap<PackId, Option<String>>>,
}

/// A pack, by its name and what the key that it is encrypted with blinds ids with.
type Known = (PackId, Option<Blinding>);

/// What is in a pack: all that verifying takes of it.
#[derive(Debug, Default)]
struct PackContent {
    /// Why it cannot be had.
    missing: Option<String>,
    /// Its bytes have the digest that it is named by.
    fits_name: bool,
    /// The digests of each frame's blocks, or what is wrong with it, by where the frame lies and its length.
    frames: HashMap<(u64, u32), std::result::Result<Vec<Digest>, String>>,
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
    Verifier::default().verify(image, cancel, progress)
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
    Verifier::default().verify_stored(store, image, cancel, progress)
}

impl Verifier {
    /// For several images of one store. It takes 32 bytes more for each block of the store.
    pub fn of_several() -> Self {
        Verifier {
            known: Some(Mutex::default()),
            stored: Mutex::default(),
        }
    }

    /// As [`verify`].
    ///
    /// # Errors
    /// As [`verify`].
    pub fn verify(
        &self,
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
                        let checked = cancel.check().and_then(|()| {
                            let content = self.content(image, pack, &mut verified)?;
                            verify_pack(image, pack, &content, expected, &mut verified);
                            Ok(())
                        });
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

    /// What a pack has, read now if it was not before.
    fn content(
        &self,
        image: &ImageReader,
        pack: &PackRef,
        verified: &mut Verified,
    ) -> Result<Arc<PackContent>> {
        let Some(known) = &self.known else {
            return read_pack(image, pack, false, verified).map(Arc::new);
        };
        let name = (pack.id, image.manifest().blinding().copied());
        let found = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = found.get(&name) {
            let all = frames(image, pack).all(|frame| content.has(&frame));
            if all {
                return Ok(Arc::clone(content));
            }
        }
        drop(found);
        let content = Arc::new(read_pack(image, pack, true, verified)?);
        let mut found = known.lock().unwrap_or_else(PoisonError::into_inner);
        found.insert(name, Arc::clone(&content));
        Ok(content)
    }

    /// As [`verify_stored`].
    ///
    /// # Errors
    /// As [`verify_stored`].
    pub fn verify_stored(
        &self,
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
        let mut done = verified.bytes;
        progress(done, total);
        for (id, len) in stored.packs {
            cancel.check()?;
            verified.packs += 1;
            let found = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
            let known = found.get(&id).cloned();
            drop(found);
            let problem = match known {
                Some(known) => known,
                None => {
                    let found = stored_problem(store.as_ref(), id, len, &mut verified)?;
                    let mut known = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
                    known.insert(id, found.clone());
                    found
                }
            };
            if let Some(what) = problem {
                verified.problem(&ObjectName::Pack(id), what);
            }
            done += len;
            progress(done, total);
        }
        Ok(verified)
    }
}

/// What is wrong with a pack as it is stored, if anything is.
fn stored_problem(
    store: &dyn Store,
    id: PackId,
    len: u64,
    verified: &mut Verified,
) -> Result<Option<String>> {
    match store.get(&ObjectName::Pack(id), len) {
        Ok(bytes) => {
            verified.bytes += bytes.len() as u64;
            if bytes.len() as u64 != len {
                return Ok(Some(format!("it has {} bytes, not {len}", bytes.len())));
            }
            let checked = check_sealed(&bytes, "the pack");
            Ok(checked.err().map(|error| error.to_string()))
        }
        Err(error @ (Error::NotFound { .. } | Error::TooLarge { .. })) => {
            Ok(Some(error.to_string()))
        }
        Err(error) => Err(error),
    }
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

/// The frames that an image has in a pack.
fn frames<'a>(image: &'a ImageReader, pack: &PackRef) -> impl Iterator<Item = Frame> + 'a {
    let indices = pack.frames.clone();
    indices.filter_map(|index| image.manifest().frames().frame(index))
}

impl PackContent {
    /// Whether it is known what is at a frame's place.
    fn has(&self, frame: &Frame) -> bool {
        self.missing.is_some()
            || self
                .frames
                .contains_key(&(u64::from(frame.offset), frame.len))
    }

    fn add(&mut self, bytes: &[u8], offset: u64, len: u32, blocks: usize) {
        let at = offset as usize;
        let stored = bytes.get(at..at + len as usize).unwrap_or_default();
        let digests = match decode_frame(stored, blocks) {
            Ok(data) => Ok(data.chunks_exact(BLOCK_SIZE).map(Digest::of).collect()),
            Err(error) => Err(error.to_string()),
        };
        self.frames.insert((offset, len), digests);
    }
}

/// Reads a pack; with `all` the frames of other images in it, too.
fn read_pack(
    image: &ImageReader,
    pack: &PackRef,
    all: bool,
    verified: &mut Verified,
) -> Result<PackContent> {
    let mut content = PackContent::default();
    let bytes = match image.store().get(&ObjectName::Pack(pack.id), pack.len) {
        Ok(bytes) => bytes,
        Err(error @ (Error::NotFound { .. } | Error::TooLarge { .. })) => {
            content.missing = Some(error.to_string());
            return Ok(content);
        }
        Err(error) => return Err(error),
    };
    verified.bytes += bytes.len() as u64;
    content.fits_name = Digest::of(&bytes).as_bytes() == pack.id.as_bytes();
    for frame in frames(image, pack) {
        let at = u64::from(frame.offset);
        content.add(&bytes, at, frame.len, frame.blocks as usize);
    }
    // A table that is damaged, or is not what the manifest says, has the frames that the image does not need read again.
    for entry in all
        .then(|| seek_table(&bytes))
        .into_iter()
        .flatten()
        .flatten()
    {
        let place = (entry.offset, entry.len);
        if !content.frames.contains_key(&place) {
            content.add(&bytes, entry.offset, entry.len, entry.blocks as usize);
        }
    }
    Ok(content)
}

fn verify_pack(
    image: &ImageReader,
    pack: &PackRef,
    content: &PackContent,
    expected: &[Option<Digest>],
    verified: &mut Verified,
) {
    let object = ObjectName::Pack(pack.id);
    verified.packs += 1;
    if let Some(missing) = &content.missing {
        verified.problem(&object, missing);
        let blocks = frames(image, pack).map(|frame| u64::from(frame.blocks));
        verified.bad_blocks += blocks.sum::<u64>();
        return;
    }
    if !content.fits_name {
        verified.problem(&object, "its content does not fit its name");
    }
    for frame in frames(image, pack) {
        let wanted = expected
            .get(frame.first_slot as usize..)
            .unwrap_or_default();
        let place = (u64::from(frame.offset), frame.len);
        match content.frames.get(&place) {
            Some(Ok(found)) if found.len() == frame.blocks as usize => {
                for (found, digest) in found.iter().zip(wanted) {
                    let Some(digest) = digest else { continue };
                    verified.blocks += 1;
                    if found != digest {
                        verified.bad_blocks += 1;
                        verified.problem(&object, format!("block with digest {digest} is wrong"));
                    }
                }
            }
            found => {
                verified.bad_blocks += u64::from(frame.blocks);
                let why = match found {
                    Some(Err(error)) => error,
                    _ => "its frame has another number of blocks",
                };
                verified.problem(&object, format!("at byte {}: {why}", frame.offset));
            }
        }
    }
}
