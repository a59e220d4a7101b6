// SPDX-License-Identifier: GPL-2.0

//! The trait behind which all stores look the same.

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use pristine_image::{Digest, ImageId, Manifest};
use pristine_seal::StoreKey;

use crate::dir::DirStore;
use crate::error::{Error, Result};
use crate::http::{HttpOptions, HttpStore};
use crate::note::{NoteKind, NoteName, Noted};
use crate::object::{ChannelName, ObjectKind, ObjectName};
use crate::peers::PeerList;
use crate::release::SignedRelease;

/// What [`Store::put`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object is there now.
    Created,
    /// It was there before, and was left alone.
    AlreadyThere,
}

/// What a store has read since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Requests made.
    pub requests: u64,
    /// Bytes of content received (without protocol overhead), also in requests that failed.
    pub bytes: u64,
}

/// A certain state of a pointer, for compare-and-swap: the digest of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revision(Digest);

impl Revision {
    /// The revision of a pointer with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Revision(Digest::of(bytes))
    }
}

/// What an image's objects take in a store, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredLens {
    /// The manifest.
    pub manifest: u64,
    /// The packs, in the order of the manifest.
    pub packs: Vec<u64>,
}

impl StoredLens {
    /// As they are.
    pub fn plain(manifest: &Manifest) -> Self {
        let packs = manifest.frames().packs().iter();
        StoredLens {
            manifest: manifest.head().file_len(),
            packs: packs.map(|pack| pack.len).collect(),
        }
    }
}

/// An object in a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub object: ObjectName,
    /// Its length in bytes.
    pub len: u64,
    /// When it was stored, in milliseconds since 1970 by the store's clock.
    pub modified: u64,
}

/// A place where images live.
///
/// Nothing that a store returns is trusted; readers verify it. Implementations hardly retry: [`crate::retry`] does,
/// above them. All methods may be called from several threads at once.
///
/// A store over another one names that ([`Store::delegate`]) and what it does otherwise. Every other one says itself where it
/// is and how objects, pointers and lists are read and written; what it leaves out is refused as what it cannot do.
pub trait Store: Send + Sync + Debug {
    /// The store that does all that this one does not do itself.
    fn delegate(&self) -> Option<&dyn Store> {
        None
    }

    /// Its path or URL, for messages.
    fn location(&self) -> &str {
        self.delegate().map_or("", |inner| inner.location())
    }

    /// A whole object of at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::TooLarge`], and what can go wrong on the way.
    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        match self.delegate() {
            Some(inner) => inner.get(object, limit),
            None => Err(self.unsupported(format!("read {object}"))),
        }
    }

    /// Exactly the bytes in `range` of an object.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Truncated`] if the object ends before, and what can go wrong on the way.
    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        match self.delegate() {
            Some(inner) => inner.get_range(object, range),
            None => Err(self.unsupported(format!("read {object}"))),
        }
    }

    /// The first `len` bytes of an object, or all of it if it has fewer.
    ///
    /// # Errors
    /// [`Error::NotFound`], and what can go wrong on the way.
    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        match self.delegate() {
            Some(inner) => inner.get_start(object, len),
            None => Err(self.unsupported(format!("read {object}"))),
        }
    }

    /// An object's length in bytes, `None` if it is not there.
    ///
    /// # Errors
    /// What can go wrong on the way.
    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        match self.delegate() {
            Some(inner) => inner.size(object),
            None => Err(self.unsupported(format!("read {object}"))),
        }
    }

    /// Stores an object, unless it is there: objects never change. It is durable when this returns, and nobody ever
    /// sees a part of it.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], and what can go wrong on the way.
    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        match self.delegate() {
            Some(inner) => inner.put(object, bytes),
            None => Err(self.unsupported(format!("store {object}"))),
        }
    }

    /// The images in the store, in no particular order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the store cannot tell, and what can go wrong on the way.
    fn images(&self) -> Result<Vec<ImageId>> {
        match self.delegate() {
            Some(inner) => inner.images(),
            None => Err(self.unsupported("list its images".to_owned())),
        }
    }

    /// The channels in the store, in alphabetical order.
    ///
    /// # Errors
    /// As [`Store::images`].
    fn channels(&self) -> Result<Vec<ChannelName>> {
        match self.delegate() {
            Some(inner) => inner.channels(),
            None => Err(self.unsupported("list its channels".to_owned())),
        }
    }

    /// The generations in a channel's history, in ascending order. Ones above the pointer's are of publishers that are
    /// not done, or never will be.
    ///
    /// # Errors
    /// As [`Store::images`].
    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        match self.delegate() {
            Some(inner) => inner.releases(channel),
            None => Err(self.unsupported(format!("list the releases of {channel}"))),
        }
    }

    /// What a channel points to, `None` if there is no such channel.
    ///
    /// # Errors
    /// [`Error::Pointer`], [`Error::Newer`], and what can go wrong on the way.
    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        match self.delegate() {
            Some(inner) => inner.read_pointer(channel),
            None => Err(self.unsupported(format!("read channel {channel}"))),
        }
    }

    /// Moves a channel's pointer, if its revision is still `expected` (`None`: there is no such channel yet). Use
    /// [`crate::history::append`], which keeps the history too.
    ///
    /// # Errors
    /// [`Error::Conflict`] if somebody else moved it before, [`Error::ReadOnly`], and what can go wrong on the way.
    fn swap_pointer(
        &self,
        expected: Option<&Revision>,
        pointer: &SignedRelease,
    ) -> Result<Revision> {
        match self.delegate() {
            Some(inner) => inner.swap_pointer(expected, pointer),
            None => Err(self.unsupported(format!("move channel {}", pointer.release().channel))),
        }
    }

    /// What was read since the store was opened.
    fn traffic(&self) -> Traffic {
        self.delegate()
            .map_or_else(Traffic::default, |inner| inner.traffic())
    }

    /// All objects of a kind, in no particular order. What does not have the name of such an object is left out.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the store cannot tell, and what can go wrong on the way.
    fn list(&self, kind: ObjectKind) -> Result<Vec<Listed>> {
        match self.delegate() {
            Some(inner) => inner.list(kind),
            None => Err(self.unsupported(format!("list its {}", kind.directory()))),
        }
    }

    /// Removes an object; it is no error if it is not there.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::ReadOnly`], and what can go wrong on the way.
    fn remove(&self, object: &ObjectName) -> Result<()> {
        match self.delegate() {
            Some(inner) => inner.remove(object),
            None => Err(self.unsupported(format!("remove {object}"))),
        }
    }

    /// The notes of a kind, in no particular order. All that were written before this was called are there.
    ///
    /// # Errors
    /// As [`Store::list`].
    fn notes(&self, kind: NoteKind) -> Result<Vec<Noted>> {
        match self.delegate() {
            Some(inner) => inner.notes(kind),
            None => Err(self.unsupported(format!("list its {}", kind.directory()))),
        }
    }

    /// The text of a note, at most [`crate::note::MAX_NOTE_LEN`] bytes of it; `None` if it is not there.
    ///
    /// # Errors
    /// As [`Store::list`].
    fn read_note(&self, name: &NoteName) -> Result<Option<Vec<u8>>> {
        match self.delegate() {
            Some(inner) => inner.read_note(name),
            None => Err(self.unsupported(format!("read {name}"))),
        }
    }

    /// Writes a note, or replaces it; it counts as written now also if its text is the same.
    ///
    /// # Errors
    /// As [`Store::remove`].
    fn write_note(&self, name: &NoteName, bytes: &[u8]) -> Result<()> {
        match self.delegate() {
            Some(inner) => inner.write_note(name, bytes),
            None => Err(self.unsupported(format!("write {name}"))),
        }
    }

    /// Removes a note; it is no error if it is not there.
    ///
    /// # Errors
    /// As [`Store::remove`].
    fn remove_note(&self, name: &NoteName) -> Result<()> {
        match self.delegate() {
            Some(inner) => inner.remove_note(name),
            None => Err(self.unsupported(format!("remove {name}"))),
        }
    }

    /// What it sent turned out to be wrong, and how. Whether another attempt has another source, which a store that is
    /// one alone does not.
    fn was_wrong(&self, error: &Error) -> bool {
        self.delegate().is_some_and(|inner| inner.was_wrong(error))
    }

    /// Machines that serve an image's blocks, as the store's server knows them. With `port` it is told that this machine
    /// does, there; this holds for the time of a lease.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no server, or it introduces nobody; and what can go wrong on the way.
    fn peers(&self, image: &ImageId, port: Option<u16>) -> Result<PeerList> {
        match self.delegate() {
            Some(inner) => inner.peers(image, port),
            None => {
                Err(self
                    .unsupported("introduce peers (only `pristine serve --peers` can)".to_owned()))
            }
        }
    }

    /// What a publisher should know about this store and cannot see; known once something was published.
    fn remarks(&self) -> Vec<String> {
        self.delegate()
            .map_or_else(Vec::new, |inner| inner.remarks())
    }

    /// This store as the packs of an image are to be read from it, if that makes a difference: because they are encrypted,
    /// see [`crate::sealed`].
    ///
    /// # Errors
    /// What can go wrong on the way to the image's manifest and its key.
    fn view_of(&self, image: &ImageId) -> Result<Option<Arc<dyn Store>>> {
        match self.delegate() {
            Some(inner) => inner.view_of(image),
            None => Ok(None),
        }
    }

    /// The store below, as anybody sees it, if this one decrypts what is there.
    fn below(&self) -> Option<Arc<dyn Store>> {
        self.delegate().and_then(|inner| inner.below())
    }

    /// The key that what is put here is encrypted with, if there is one.
    fn sealing_key(&self) -> Option<&StoreKey> {
        self.delegate().and_then(|inner| inner.sealing_key())
    }

    /// What a manifest and its packs take here.
    fn stored_lens(&self, manifest: &Manifest) -> StoredLens {
        match self.delegate() {
            Some(inner) => inner.stored_lens(manifest),
            None => StoredLens::plain(manifest),
        }
    }

    /// Whether deltas that are put here are encrypted.
    fn seals_deltas(&self) -> bool {
        self.delegate().is_some_and(|inner| inner.seals_deltas())
    }

    /// The error for what a store of this kind cannot do.
    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported {
            location: self.location().to_owned(),
            what,
        }
    }
}

/// Opens the store at a URL (`http://...`, with the feature `tls` also `https://...`, with the feature `s3` also
/// `s3://...`) or a directory.
///
/// A URL is not contacted before something is asked of it. Credentials come from the environment, see
/// [`HttpOptions::from_environment`].
///
/// # Errors
/// [`Error::BadLocation`], [`Error::Credentials`]; for directories [`Error::NotAStore`], [`Error::Newer`] and [`Error::Io`].
pub fn open_store(location: &str) -> Result<Arc<dyn Store>> {
    match location.contains("://") {
        true => open_store_with(location, HttpOptions::from_environment()?),
        false => open_store_with(location, HttpOptions::default()),
    }
}

/// As [`open_store`], with options for the case that it is a URL.
///
/// # Errors
/// As [`open_store`].
pub fn open_store_with(location: &str, http: HttpOptions) -> Result<Arc<dyn Store>> {
    match location.split_once("://") {
        Some(("file", path)) => Ok(Arc::new(DirStore::open(Path::new(path))?)),
        #[cfg(feature = "s3")]
        Some(("s3", _)) => Ok(Arc::new(crate::s3::S3Store::open(location, &http)?)),
        Some(_) => Ok(Arc::new(HttpStore::open(location, http)?)),
        None if location.is_empty() => Err(Error::BadLocation {
            location: String::new(),
            why: "give a directory or a URL".to_owned(),
        }),
        None => Ok(Arc::new(DirStore::open(Path::new(location))?)),
    }
}

/// Opens a store to be written to: what is missing or empty becomes one.
///
/// # Errors
/// As [`open_store`], and [`Error::ReadOnly`] for what can only be read.
pub fn open_for_writing(location: &str, http: HttpOptions) -> Result<Arc<dyn Store>> {
    match location.split_once("://") {
        Some(("file", path)) => Ok(Arc::new(DirStore::open_or_create(Path::new(path))?)),
        #[cfg(feature = "s3")]
        Some(("s3", _)) => {
            let store = crate::s3::S3Store::open(location, &http)?;
            store.prepare()?;
            Ok(Arc::new(store))
        }
        Some(_) => {
            HttpStore::open(location, http)?;
            Err(Error::ReadOnly {
                location: location.to_owned(),
                why: "a web server's store can only be read".to_owned(),
            })
        }
        None if location.is_empty() => open_store(location),
        None => Ok(Arc::new(DirStore::open_or_create(Path::new(location))?)),
    }
}

/// Puts the packs of a build into a store.
#[cfg(feature = "build")]
impl pristine_image::PackSink for StorePacks<'_> {
    fn pack(&mut self, id: &pristine_image::PackId, bytes: &[u8]) -> std::io::Result<()> {
        match self.0.put(&ObjectName::Pack(*id), bytes) {
            Ok(_) => Ok(()),
            Err(Error::Io { error, .. }) => Err(error),
            Err(error) => Err(std::io::Error::other(error)),
        }
    }
}

/// A store as the place where a build puts its packs.
#[derive(Debug)]
pub struct StorePacks<'a>(pub &'a dyn Store);
