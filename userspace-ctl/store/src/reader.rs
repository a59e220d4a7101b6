// SPDX-License-Identifier: GPL-2.0

//! An image in a store, opened by id or by channel.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::manifest::BlockRef;
use pristine_image::{Head, ImageId, Manifest, Page, DIGESTS_PER_PAGE};
use pristine_trust::{Policy, Trusted};

use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName};
use crate::release::SignedRelease;
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::Store;

/// Read at first: holds the whole manifest of a small image, and the parts always needed of a larger one.
const FIRST_READ: u64 = 256 << 10;
/// Manifests of up to this size (an image of about 8 GiB of content) are kept in memory, larger ones read in parts.
const WHOLE_LIMIT: u64 = 32 << 20;
/// Bytes read at once of the pages of a large manifest.
const CHUNK: u64 = 512 << 10;
/// Such chunks kept.
const CHUNKS_KEPT: usize = 16;
/// Decoded pages kept: each covers 4 MiB of image and takes 40 KiB.
const PAGES_KEPT: usize = 64;

/// Names an image: its id, or a channel whose current generation is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSelector {
    /// By id.
    Id(ImageId),
    /// What a channel points to.
    Channel(ChannelName),
}

impl FromStr for ImageSelector {
    type Err = crate::object::ParseChannelError;

    /// 64 hexadecimal digits are an id, anything else is a channel.
    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match text.parse() {
            Ok(id) => Ok(ImageSelector::Id(id)),
            Err(_) => text.parse().map(ImageSelector::Channel),
        }
    }
}

impl fmt::Display for ImageSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSelector::Id(id) => write!(f, "image {id}"),
            ImageSelector::Channel(channel) => write!(f, "channel {channel}"),
        }
    }
}

/// Which image a selector means, before anything of it is read.
#[derive(Clone, Debug)]
pub struct Found {
    /// The image.
    pub image: ImageId,
    /// The channel's current release, if it was looked up by channel.
    pub release: Option<SignedRelease>,
    /// Why the release is trusted.
    pub trusted: Trusted,
}

impl Found {
    /// Reads the channel's pointer, if `selector` is a channel, and checks that `policy` trusts the release there.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such channel, [`Error::Untrusted`], and what can go wrong on the way.
    pub fn look_up(
        store: &dyn Store,
        selector: &ImageSelector,
        policy: &Policy,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let channel = match selector {
            ImageSelector::Id(image) => {
                return Ok(Found {
                    image: *image,
                    release: None,
                    trusted: Trusted::default(),
                })
            }
            ImageSelector::Channel(channel) => channel,
        };
        let worth = |error: &Error| error.is_transient() || error.is_corruption();
        let (signed, trusted) = loop {
            let read = || store.read_pointer(channel);
            let Some((signed, _)) = retry.run(cancel, worth, read)? else {
                return Err(Error::NotFound {
                    location: store.location().to_owned(),
                    object: format!("channel {channel}"),
                });
            };
            match signed.check(policy, store.location()) {
                Ok(trusted) => break (signed, trusted),
                Err(error) if store.was_wrong(&error) => continue,
                Err(error) => return Err(error),
            }
        };
        Ok(Found {
            image: signed.release().image,
            release: Some(signed),
            trusted,
        })
    }
}

/// An image whose manifest is verified against its id.
#[derive(Debug)]
pub struct ImageReader {
    store: Arc<dyn Store>,
    object: ObjectName,
    manifest: Manifest,
    release: Option<SignedRelease>,
    trusted: Trusted,
    retry: RetryPolicy,
    cancel: CancelToken,
    /// The whole manifest, if it is not too large.
    whole: Option<Vec<u8>>,
    chunks: Mutex<Recent<Vec<u8>>>,
    pages: Mutex<Recent<Page>>,
}

impl ImageReader {
    /// As [`ImageReader::open_trusted`], with a channel's release trusted whoever made it: for images that are named by
    /// their id, and for who only copies them.
    ///
    /// # Errors
    /// As [`ImageReader::open_trusted`].
    pub fn open(
        store: Arc<dyn Store>,
        selector: &ImageSelector,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        ImageReader::open_trusted(store, selector, &Policy::default(), retry, cancel)
    }

    /// Opens an image: reads its channel's pointer and checks that `policy` trusts the release there (if the image is named
    /// by channel: an id needs nobody to vouch for it), reads what is always needed of its manifest, and verifies it.
    /// Retries as `retry` says, also what arrives damaged.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such channel, [`Error::Untrusted`], [`Error::NoImage`], [`Error::Format`] for a
    /// manifest that is damaged, newer, or of another image, and what can go wrong on the way.
    pub fn open_trusted(
        store: Arc<dyn Store>,
        selector: &ImageSelector,
        policy: &Policy,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let found = Found::look_up(store.as_ref(), selector, policy, retry, cancel)?;
        ImageReader::open_found(store, found, retry, cancel)
    }

    /// Opens an image that was found: reads what is always needed of its manifest, and verifies it.
    ///
    /// # Errors
    /// As [`ImageReader::open_trusted`].
    pub fn open_found(
        store: Arc<dyn Store>,
        found: Found,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        ImageReader::open_with(store, found, WHOLE_LIMIT, retry, cancel)
    }

    /// As [`ImageReader::open`], for who wants a few blocks alone: of the manifest only what is asked for is read.
    ///
    /// # Errors
    /// As [`ImageReader::open_trusted`].
    pub fn open_sparse(
        store: Arc<dyn Store>,
        image: ImageId,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let found = Found {
            image,
            release: None,
            trusted: Trusted::default(),
        };
        ImageReader::open_with(store, found, FIRST_READ, retry, cancel)
    }

    fn open_with(
        store: Arc<dyn Store>,
        found: Found,
        whole_limit: u64,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let worth = |error: &Error| error.is_transient() || error.is_corruption();
        let Found {
            image,
            release,
            trusted,
        } = found;
        let (manifest, whole, view) = retry.run(cancel, worth, || {
            let loaded = load_manifest(store.as_ref(), &image, whole_limit);
            let (manifest, whole) = loaded.inspect_err(|error| {
                if error.is_corruption() {
                    store.was_wrong(error);
                }
            })?;
            Ok((manifest, whole, store.view_of(&image)?))
        })?;
        let store = view.unwrap_or(store);
        let stated = release.as_ref().map(SignedRelease::release);
        if let Some(release) = stated.filter(|release| release.size != manifest.size()) {
            return Err(Error::Pointer {
                location: store.location().to_owned(),
                channel: release.channel.clone(),
                why: format!(
                    "it says {} bytes, the image has {}",
                    release.size,
                    manifest.size()
                ),
            });
        }
        Ok(ImageReader {
            store,
            object: ObjectName::Manifest(image),
            manifest,
            release,
            trusted,
            retry,
            cancel: cancel.clone(),
            whole,
            chunks: Mutex::new(Recent::new(CHUNKS_KEPT)),
            pages: Mutex::new(Recent::new(PAGES_KEPT)),
        })
    }

    /// The image's id.
    pub fn image(&self) -> ImageId {
        self.manifest.image()
    }

    /// The image's size in bytes, a multiple of [`crate::BLOCK_SIZE`].
    pub fn size(&self) -> u64 {
        self.manifest.size()
    }

    /// Blocks in the image.
    pub fn blocks(&self) -> u64 {
        self.manifest.blocks()
    }

    /// The channel's current release, if the image was opened by channel.
    pub fn release(&self) -> Option<&SignedRelease> {
        self.release.as_ref()
    }

    /// Why the release is trusted.
    pub fn trusted(&self) -> &Trusted {
        &self.trusted
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether the image is stored encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.manifest.is_encrypted()
    }

    /// The store it comes from.
    pub fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// The store it comes from, to be shared.
    pub fn shared_store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }

    /// What the manifest says about a block; `None` beyond the image's end.
    ///
    /// # Errors
    /// As [`ImageReader::page`].
    pub fn block(&self, block: u64) -> Result<Option<BlockRef>> {
        if block >= self.blocks() {
            return Ok(None);
        }
        let page = self.page(block / DIGESTS_PER_PAGE as u64)?;
        Ok(page.block((block % DIGESTS_PER_PAGE as u64) as usize))
    }

    /// A verified page of the manifest.
    ///
    /// # Errors
    /// [`Error::Format`] for damage, and what can go wrong on the way.
    pub fn page(&self, number: u64) -> Result<Arc<Page>> {
        if let Some(page) = lock(&self.pages).get(number) {
            return Ok(page);
        }
        let range = self.manifest.page_range(number);
        let worth = |error: &Error| error.is_transient() || error.is_corruption();
        let page = self.retry.run(&self.cancel, worth, || {
            let bytes = self.manifest_bytes(range.clone());
            let page = bytes.and_then(|bytes| {
                let page = self.manifest.decode_page(number, &bytes);
                page.map_err(|error| Error::format(self.store.location(), &self.object, error))
            });
            page.inspect_err(|error| {
                if matches!(error, Error::Format { .. }) {
                    // The next attempt must not find the same bytes.
                    lock(&self.chunks).clear();
                    self.store.was_wrong(error);
                }
            })
        })?;
        let page = Arc::new(page);
        lock(&self.pages).put(number, Arc::clone(&page));
        Ok(page)
    }

    fn manifest_bytes(&self, range: Range<u64>) -> Result<Vec<u8>> {
        if let Some(whole) = &self.whole {
            return Ok(part(whole, range.start, range.end).to_vec());
        }
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let number = at / CHUNK;
            let chunk = self.chunk(number)?;
            let end = range.end.min((number + 1) * CHUNK);
            bytes.extend_from_slice(part(&chunk, at - number * CHUNK, end - number * CHUNK));
            at = end;
        }
        Ok(bytes)
    }

    fn chunk(&self, number: u64) -> Result<Arc<Vec<u8>>> {
        if let Some(chunk) = lock(&self.chunks).get(number) {
            return Ok(chunk);
        }
        let end = ((number + 1) * CHUNK).min(self.manifest.head().file_len());
        let chunk = self.store.get_range(&self.object, number * CHUNK..end)?;
        let chunk = Arc::new(chunk);
        lock(&self.chunks).put(number, Arc::clone(&chunk));
        Ok(chunk)
    }
}

fn part(bytes: &[u8], start: u64, end: u64) -> &[u8] {
    bytes.get(start as usize..end as usize).unwrap_or_default()
}

/// Loads a manifest; the whole of it too, if it is small.
fn load_manifest(
    store: &dyn Store,
    image: &ImageId,
    whole_limit: u64,
) -> Result<(Manifest, Option<Vec<u8>>)> {
    let object = ObjectName::Manifest(*image);
    let format = |error| Error::format(store.location(), &object, error);
    let mut start = match store.get_start(&object, FIRST_READ) {
        Err(Error::NotFound { location, .. }) => {
            return Err(Error::NoImage {
                location,
                image: *image,
            });
        }
        result => result?,
    };
    if crate::sealed::is_sealed(&start) {
        return Err(crate::sealed::no_identity(store, &object, &start));
    }
    let head = Head::parse(&start).map_err(format)?;
    if head.file_len() <= whole_limit {
        let have = start.len() as u64;
        // A manifest that is shorter than it says fails here; one that is longer in parse.
        if have < head.file_len() {
            start.extend(store.get_range(&object, have..head.file_len())?);
        }
        let manifest = Manifest::parse(&start, Some(image)).map_err(format)?;
        return Ok((manifest, Some(start)));
    }
    let manifest = Manifest::load(head, Some(image), |range| {
        let in_start = range.end <= start.len() as u64;
        if in_start {
            Ok(part(&start, range.start, range.end).to_vec())
        } else {
            store.get_range(&object, range).map_err(LoadError::Store)
        }
    });
    match manifest {
        Ok(manifest) => Ok((manifest, None)),
        Err(LoadError::Store(error)) => Err(error),
        Err(LoadError::Format(error)) => Err(format(error)),
    }
}

/// What is wrong with a manifest, or with the way to it.
pub(crate) enum LoadError {
    Store(Error),
    Format(pristine_image::FormatError),
}

impl LoadError {
    /// As the store's error; `format` says in what the format is wrong.
    pub(crate) fn or(self, format: impl Fn(pristine_image::FormatError) -> Error) -> Error {
        match self {
            LoadError::Store(error) => error,
            LoadError::Format(error) => format(error),
        }
    }
}

impl From<pristine_image::FormatError> for LoadError {
    fn from(error: pristine_image::FormatError) -> Self {
        LoadError::Format(error)
    }
}

/// The most recently used of a few things.
#[derive(Debug)]
struct Recent<T> {
    limit: usize,
    /// The most recent last.
    items: VecDeque<(u64, Arc<T>)>,
}

impl<T> Recent<T> {
    fn new(limit: usize) -> Self {
        Recent {
            limit,
            items: VecDeque::with_capacity(limit),
        }
    }

    fn get(&mut self, key: u64) -> Option<Arc<T>> {
        let at = self.items.iter().rposition(|(found, _)| *found == key)?;
        let item = self.items.remove(at)?;
        let value = Arc::clone(&item.1);
        self.items.push_back(item);
        Some(value)
    }

    fn put(&mut self, key: u64, value: Arc<T>) {
        self.items.retain(|(found, _)| *found != key);
        if self.items.len() == self.limit {
            self.items.pop_front();
        }
        self.items.push_back((key, value));
    }

    fn clear(&mut self) {
        self.items.clear();
    }
}

/// A lock that outlives a thread that panicked: what it guards is a cache.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
