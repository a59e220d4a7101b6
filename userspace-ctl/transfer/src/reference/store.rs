// SPDX-License-Identifier: GPL-2.0

//! A store whose missing packs are read from where their references lead.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pristine_image::{ImageId, PackId, ReadAt};
use pristine_store::{CancelToken, Error, ErrorKind, ObjectName, Result, RetryPolicy, Store};

use super::{store_error, Reference, MAX_LEN};
use crate::http::is_url;
use crate::open::{open_by_range, Watch};

/// A store, and what its references lead to. It is for reading; what is written goes to the store itself.
#[derive(Debug)]
pub struct ReferenceStore {
    inner: Arc<dyn Store>,
    /// Whether references may lead to files of this machine.
    local: bool,
    retry: RetryPolicy,
    cancel: CancelToken,
    /// By where they are.
    disks: Mutex<HashMap<String, Arc<dyn ReadAt>>>,
    references: Mutex<HashMap<PackId, Reference>>,
}

impl ReferenceStore {
    /// Puts references to use in a store. A store in a directory may refer to files by absolute path, others only to
    /// URLs.
    pub fn new(inner: Arc<dyn Store>, retry: RetryPolicy, cancel: &CancelToken) -> Self {
        let local = !inner.location().contains("://");
        ReferenceStore {
            inner,
            local,
            retry,
            cancel: cancel.clone(),
            disks: Mutex::default(),
            references: Mutex::default(),
        }
    }

    /// Whether this is a pack that is not in the store itself, which need not be asked again.
    fn is_known(&self, object: &ObjectName) -> bool {
        let known = self
            .references
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        matches!(object, ObjectName::Pack(pack) if known.contains_key(pack))
    }

    /// The reference for a pack; `None` if there is none.
    fn reference(&self, pack: &PackId) -> Result<Option<Reference>> {
        let known = self
            .references
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(reference) = known.get(pack) {
            return Ok(Some(reference.clone()));
        }
        drop(known);
        let object = ObjectName::Reference(*pack);
        let bytes = match self.inner.get(&object, MAX_LEN) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            bytes => bytes?,
        };
        let wrong = |why: String| store_error(self.location(), &object.to_string(), why);
        let reference = Reference::parse(&bytes).map_err(wrong)?;
        let mut known = self
            .references
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        known.insert(*pack, reference.clone());
        Ok(Some(reference))
    }

    /// The disk that a reference leads to.
    fn disk(&self, reference: &Reference) -> Result<Arc<dyn ReadAt>> {
        let source = &reference.source;
        // Held while it is opened: threads that want the same disk wait for it.
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(disk) = disks.get(source) {
            return Ok(Arc::clone(disk));
        }
        let allowed = is_url(source) || (self.local && source.starts_with('/'));
        if !allowed {
            return Err(Error::Unsupported {
                location: self.location().to_owned(),
                what: format!(
                    "have {source:?} read: from there, only http:// and https:// are followed"
                ),
            });
        }
        let watch = Watch {
            progress: &|_, _, _| (),
            cancel: self.cancel.clone(),
        };
        let opened = open_by_range(source, self.retry, watch);
        let disk = opened.map_err(|error| match error {
            crate::Error::Store(error) => error,
            error => Error::Io {
                what: format!("cannot open {source}, which {} refers to", self.location()),
                error: error.into(),
            },
        })?;
        if disk.len() != reference.size {
            return Err(Error::Unsupported {
                location: source.clone(),
                what: format!(
                    "be read any more: its disk had {} bytes and has {}, it was changed since the image was made",
                    reference.size,
                    disk.len()
                ),
            });
        }
        disks.insert(source.clone(), Arc::clone(&disk));
        Ok(disk)
    }

    /// Bytes of a pack that is not stored. `missing` is what the store said.
    fn read(
        &self,
        pack: &PackId,
        missing: Error,
        range: impl FnOnce(u64) -> Range<u64>,
    ) -> Result<Vec<u8>> {
        let Some(reference) = self.reference(pack)? else {
            return Err(missing);
        };
        let disk = self.disk(&reference)?;
        let (pack, source) = (reference.pack(), &reference.source);
        let range = range(pack.len());
        if range.end > pack.len() {
            return Err(Error::Truncated {
                location: source.clone(),
                object: "the pack that it stands for".to_owned(),
                len: pack.len(),
                needed: range.end,
            });
        }
        let read = pack.read(disk.as_ref(), range);
        read.map_err(|error| match crate::from_io(error) {
            Ok(crate::Error::Store(error)) => error,
            Ok(error) => Error::Io {
                what: "cannot read what a pack refers to".to_owned(),
                error: error.into(),
            },
            Err(error) => Error::Io {
                what: format!("cannot read {source}"),
                error,
            },
        })
    }
}

/// The pack that an object is, if the store does not have it.
fn missing_pack<T>(object: &ObjectName, result: &Result<T>) -> Option<PackId> {
    match (object, result) {
        (ObjectName::Pack(pack), Err(error)) if error.kind() == ErrorKind::NotFound => Some(*pack),
        _ => None,
    }
}

fn not_found(location: &str, object: &ObjectName) -> Error {
    Error::NotFound {
        location: location.to_owned(),
        object: object.to_string(),
    }
}

impl Store for ReferenceStore {
    fn delegate(&self) -> Option<&dyn Store> {
        Some(self.inner.as_ref())
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        let result = match self.is_known(object) {
            true => Err(not_found(self.location(), object)),
            false => self.inner.get(object, limit),
        };
        match (missing_pack(object, &result), result) {
            (Some(pack), Err(missing)) => {
                let bytes = self.read(&pack, missing, |len| 0..len)?;
                if bytes.len() as u64 > limit {
                    return Err(Error::TooLarge {
                        location: self.location().to_owned(),
                        object: object.to_string(),
                        limit,
                    });
                }
                Ok(bytes)
            }
            (_, result) => result,
        }
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let result = match self.is_known(object) {
            true => Err(not_found(self.location(), object)),
            false => self.inner.get_range(object, range.clone()),
        };
        match (missing_pack(object, &result), result) {
            (Some(pack), Err(missing)) => self.read(&pack, missing, |_| range),
            (_, result) => result,
        }
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        let result = match self.is_known(object) {
            true => Err(not_found(self.location(), object)),
            false => self.inner.get_start(object, len),
        };
        match (missing_pack(object, &result), result) {
            (Some(pack), Err(missing)) => self.read(&pack, missing, |whole| 0..len.min(whole)),
            (_, result) => result,
        }
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        match (self.inner.size(object)?, object) {
            (None, ObjectName::Pack(pack)) => {
                let reference = self.reference(pack)?;
                Ok(reference.map(|reference| reference.pack().len()))
            }
            (size, _) => Ok(size),
        }
    }

    fn view_of(&self, image: &ImageId) -> Result<Option<Arc<dyn Store>>> {
        let view = self.inner.view_of(image)?;
        // What is encrypted has no references; for the rest they are followed.
        Ok(view.filter(|view| view.seals_deltas()))
    }
}
