// SPDX-License-Identifier: GPL-2.0

//! A store with what is encrypted in it shown as if it were not.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::{FormatError, ImageId, Manifest, PackId};
use pristine_seal::chunks::sealed_range;
use pristine_seal::object::{self, is_sealed, Head, Public, HEAD_LEN, MAX_PUBLIC_LEN};
use pristine_seal::{chunks, pack, StoreKey};

use super::{no_key, public_of, Keyring};
use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::store::{Put, Store, StoredLens};

/// Heads that are remembered, so that a range of an object takes one request.
const HEADS_KEPT: usize = 1024;

/// A sealed object's head, with its key.
#[derive(Clone, Debug)]
struct Opened {
    head: Head,
    key: StoreKey,
}

#[derive(Debug)]
struct Shared {
    inner: Arc<dyn Store>,
    keyring: Arc<Keyring>,
    /// `None` is for an object that is not sealed.
    heads: Mutex<HashMap<ObjectName, Option<Arc<Opened>>>>,
}

/// What is put is encrypted to this.
#[derive(Clone, Debug)]
struct Packs {
    key: StoreKey,
    /// Whom new manifests say that they are encrypted to; `None` for a view that is for reading.
    recipients: Option<Vec<String>>,
}

/// A store that decrypts, and encrypts what is put if it was made for that.
#[derive(Clone, Debug)]
pub struct SealedStore {
    shared: Arc<Shared>,
    packs: Option<Packs>,
}

impl SealedStore {
    /// Over `inner`, with the identities of `keyring`.
    pub fn new(inner: Arc<dyn Store>, keyring: Arc<Keyring>) -> Self {
        SealedStore {
            shared: Arc::new(Shared {
                inner,
                keyring,
                heads: Mutex::default(),
            }),
            packs: None,
        }
    }

    /// Over `inner`, for images that are encrypted with `key`, to `recipients` as their manifests will say.
    pub fn sealing(inner: Arc<dyn Store>, key: StoreKey, recipients: Vec<String>) -> Self {
        let keyring = Arc::new(Keyring::default().with_key(key.clone()));
        SealedStore {
            packs: Some(Packs {
                key,
                recipients: Some(recipients),
            }),
            ..SealedStore::new(inner, keyring)
        }
    }

    fn inner(&self) -> &dyn Store {
        self.shared.inner.as_ref()
    }

    fn format(&self, object: &ObjectName) -> impl Fn(FormatError) -> Error {
        let (location, object) = (self.location().to_owned(), *object);
        move |error| Error::format(&location, &object, error)
    }

    fn known(&self, object: &ObjectName) -> Option<Option<Arc<Opened>>> {
        let heads = self.shared.heads.lock();
        let heads = heads.unwrap_or_else(PoisonError::into_inner);
        heads.get(object).cloned()
    }

    fn keep(&self, object: &ObjectName, opened: Option<Arc<Opened>>) {
        let heads = self.shared.heads.lock();
        let mut heads = heads.unwrap_or_else(PoisonError::into_inner);
        if heads.len() >= HEADS_KEPT {
            heads.clear();
        }
        heads.insert(*object, opened);
    }

    /// What an object that begins with `start` is; it is remembered. Damage is not: the next attempt reads it again.
    fn opened(&self, object: &ObjectName, start: &[u8]) -> Result<Option<Arc<Opened>>> {
        if !is_sealed(start) {
            self.keep(object, None);
            return Ok(None);
        }
        let head = Head::parse(start).map_err(self.format(object))?;
        let key = match self.shared.keyring.key(self.inner(), head.key)? {
            Ok(key) => key,
            Err(why) => return Err(no_key(self.inner(), object, start, &why)),
        };
        // The head itself is proved by the first chunk: its key follows from it.
        let opened = Arc::new(Opened { head, key });
        self.keep(object, Some(Arc::clone(&opened)));
        Ok(Some(opened))
    }

    /// The head of an object, read if it is not known; `None` for what is not sealed.
    fn head(&self, object: &ObjectName) -> Result<Option<Arc<Opened>>> {
        match self.known(object) {
            Some(known) => Ok(known),
            None => {
                let start = self.inner().get_start(object, HEAD_LEN)?;
                self.opened(object, &start)
            }
        }
    }

    fn forget(&self, object: &ObjectName) {
        let heads = self.shared.heads.lock();
        let mut heads = heads.unwrap_or_else(PoisonError::into_inner);
        heads.remove(object);
    }

    /// A part of a sealed object's content. What does not open is forgotten with its head, which may be what is wrong.
    fn open_part(
        &self,
        object: &ObjectName,
        opened: &Opened,
        range: &Range<u64>,
        stored: &[u8],
    ) -> Result<Vec<u8>> {
        let part = opened.head.open(&opened.key, &object.path(), range, stored);
        part.map_err(|error| {
            self.forget(object);
            self.format(object)(error)
        })
    }

    /// The key of a pack, and the pack's name in the store, if the packs here are sealed.
    fn sealed_pack(&self, object: &ObjectName) -> Option<(&StoreKey, PackId, ObjectName)> {
        match (object, &self.packs) {
            (ObjectName::Pack(id), Some(packs)) => {
                let name = pack::name(&packs.key, id);
                Some((&packs.key, *id, ObjectName::Pack(name)))
            }
            _ => None,
        }
    }

    /// Whether an object may be sealed and says so itself.
    fn says_itself(object: &ObjectName) -> bool {
        matches!(object, ObjectName::Manifest(_) | ObjectName::Delta { .. })
    }

    fn public_of(&self, packs: &Packs, object: &ObjectName, bytes: &[u8]) -> Result<Public> {
        let recipients = packs.recipients.as_deref().unwrap_or_default();
        let ObjectName::Manifest(image) = object else {
            return Ok(Public {
                recipients: recipients.to_vec(),
                ..Public::default()
            });
        };
        let format = self.format(object);
        let manifest = Manifest::parse(bytes, Some(image)).map_err(&format)?;
        if manifest.blinding() != Some(&packs.key.blinding()) {
            let why = "its id would tell what is in it";
            return Err(format(FormatError::invalid("the manifest", why)));
        }
        Ok(public_of(&manifest, &packs.key, recipients))
    }
}

impl Store for SealedStore {
    fn delegate(&self) -> Option<&dyn Store> {
        Some(self.inner())
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        let too_large = || Error::TooLarge {
            location: self.location().to_owned(),
            object: object.to_string(),
            limit,
        };
        if let Some((key, id, name)) = self.sealed_pack(object) {
            let sealed = self.inner().get(&name, pack::sealed_len(limit))?;
            let content = pack::open(key, &id, &sealed).map_err(self.format(object))?;
            return match content.len() as u64 > limit {
                true => Err(too_large()),
                false => Ok(content),
            };
        }
        if !Self::says_itself(object) {
            return self.inner().get(object, limit);
        }
        let Some(opened) = self.head(object)? else {
            return self.inner().get(object, limit);
        };
        if opened.head.len > limit {
            return Err(too_large());
        }
        let most = HEAD_LEN + chunks::sealed_len(limit) + MAX_PUBLIC_LEN + pack::DIGEST_LEN;
        let bytes = self.inner().get(object, most)?;
        let all = 0..opened.head.len;
        let range = opened.head.range(&all).map_err(self.format(object))?;
        // The whole of it: also what no key is needed for.
        Head::check_all(&bytes).map_err(|error| {
            self.forget(object);
            self.format(object)(error)
        })?;
        let stored = bytes.get(range.start as usize..range.end as usize);
        self.open_part(object, &opened, &all, stored.unwrap_or_default())
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        if let Some((key, id, name)) = self.sealed_pack(object) {
            let stored = match range.is_empty() {
                true => return Ok(Vec::new()),
                false => self.inner().get_range(&name, sealed_range(&range))?,
            };
            return pack::open_range(key, &id, &range, &stored).map_err(self.format(object));
        }
        if !Self::says_itself(object) {
            return self.inner().get_range(object, range);
        }
        let Some(opened) = self.head(object)? else {
            return self.inner().get_range(object, range);
        };
        let stored = opened.head.range(&range).map_err(self.format(object))?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let stored = self.inner().get_range(object, stored)?;
        self.open_part(object, &opened, &range, &stored)
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        if let Some((key, id, name)) = self.sealed_pack(object) {
            let most = sealed_range(&(0..len)).end + pack::DIGEST_LEN;
            let stored = self.inner().get_start(&name, most)?;
            let whole = stored.len() as u64 / chunks::SEALED_CHUNK;
            let have = len.min(whole * chunks::CHUNK);
            let stored = &stored[..sealed_range(&(0..have)).end as usize];
            return pack::open_range(key, &id, &(0..have), stored).map_err(self.format(object));
        }
        if !Self::says_itself(object) {
            return self.inner().get_start(object, len);
        }
        let most = HEAD_LEN + sealed_range(&(0..len)).end;
        let mut start = self.inner().get_start(object, most)?;
        let opened = match self.known(object) {
            Some(known) if known.is_some() == is_sealed(&start) => known,
            _ => self.opened(object, &start)?,
        };
        let Some(opened) = opened else {
            start.truncate(len as usize);
            return Ok(start);
        };
        let range = 0..len.min(opened.head.len);
        let stored = opened.head.range(&range).map_err(self.format(object))?;
        let stored = stored.start as usize..(stored.end as usize).min(start.len());
        let stored = start.get(stored).unwrap_or_default();
        match range.is_empty() {
            true => Ok(Vec::new()),
            false => self.open_part(object, &opened, &range, stored),
        }
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        let Some((key, id, name)) = self.sealed_pack(object) else {
            return self.inner().size(object);
        };
        let Some(sealed) = self.inner().size(&name)? else {
            return Ok(None);
        };
        let format = self.format(object);
        let (last, count) = pack::last_chunk(sealed).map_err(&format)?;
        let last = self.inner().get_range(&name, last)?;
        let len = pack::content_len(key, &id, count, &last).map_err(format)?;
        Ok(Some(len))
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        let Some(packs) = &self.packs else {
            return self.inner().put(object, bytes);
        };
        match object {
            ObjectName::Pack(id) => {
                let sealed = pack::seal(&packs.key, id, bytes).map_err(self.format(object))?;
                let name = ObjectName::Pack(pack::name(&packs.key, id));
                self.inner().put(&name, &sealed)
            }
            ObjectName::Manifest(_) | ObjectName::Delta { .. } => {
                let public = self.public_of(packs, object, bytes)?;
                let sealed = object::seal(&packs.key, &object.path(), &public, bytes);
                let sealed = sealed.map_err(self.format(object))?;
                self.inner().put(object, &sealed)
            }
            ObjectName::Reference(_) => {
                Err(self.unsupported("encrypt what lies elsewhere (references)".to_owned()))
            }
            // A trace says numbers of blocks, as requests for these do.
            ObjectName::Release(_) | ObjectName::Key { .. } | ObjectName::Trace(_) => {
                self.inner().put(object, bytes)
            }
        }
    }

    fn view_of(&self, image: &ImageId) -> Result<Option<Arc<dyn Store>>> {
        let opened = self.head(&ObjectName::Manifest(*image))?;
        let packs = opened.map(|opened| Packs {
            key: opened.key.clone(),
            recipients: None,
        });
        Ok(Some(Arc::new(SealedStore {
            shared: Arc::clone(&self.shared),
            packs,
        })))
    }

    fn below(&self) -> Option<Arc<dyn Store>> {
        Some(Arc::clone(&self.shared.inner))
    }

    fn stored_lens(&self, manifest: &Manifest) -> StoredLens {
        let Some(packs) = &self.packs else {
            return StoredLens::plain(manifest);
        };
        let recipients = packs.recipients.as_deref().unwrap_or_default();
        let public = public_of(manifest, &packs.key, recipients);
        StoredLens {
            manifest: object::sealed_len(manifest.head().file_len(), &public),
            packs: public.packs.iter().map(|(_, len)| *len).collect(),
        }
    }

    fn seals_deltas(&self) -> bool {
        self.packs.is_some()
    }

    fn sealing_key(&self) -> Option<&StoreKey> {
        let packs = self.packs.as_ref()?;
        packs.recipients.as_ref().map(|_| &packs.key)
    }
}
