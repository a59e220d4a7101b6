// SPDX-License-Identifier: GPL-2.0

//! A store in an object store: S3, and what is compatible with it.
//!
//! Objects have the paths of a directory's files, below the prefix of the [location]. Packs of more than
//! 16 MiB go up in parts. What must be created only once, and the pointers of channels, rely on conditional puts where
//! the service has them, which is tried out and not believed; where it has none, on [claims].
//!
//! The client repeats a request up to 3 times that failed for the moment, and goes on with an answer that broke off.
//!
//! [location]: self::location
//! [claims]: self::claim

mod claim;
mod failure;
mod location;
mod probe;
mod runtime;

use std::future::Future;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, UpdateVersion,
};
use pristine_image::ImageId;

use self::location::Location;
use self::probe::Conditional;
use self::runtime::Confined;
use crate::dir::generations;
use crate::error::{Error, Result};
use crate::http::HttpOptions;
use crate::note::{NoteKind, NoteName, Noted, MAX_NOTE_LEN};
use crate::object::{ChannelName, ObjectKind, ObjectName, MARKER_NAME, MARKER_TEXT, STORE_VERSION};
use crate::release::{SignedRelease, MAX_RELEASE_LEN};
use crate::retry::CancelToken;
use crate::store::{Listed, Put, Revision, Store, Traffic};

/// Objects of more bytes than this go up in parts.
const MULTIPART_FROM: usize = 16 << 20;
/// The size of a part; S3 wants at least 5 MiB.
const PART: usize = 8 << 20;
/// Parts on their way at once.
const PARTS_AT_ONCE: usize = 4;

type ClientResult<T> = std::result::Result<T, object_store::Error>;

/// A store in an object store.
#[derive(Debug)]
pub struct S3Store {
    client: Arc<AmazonS3>,
    runtime: Confined,
    location: String,
    prefix: String,
    cancel: CancelToken,
    /// What conditions the service honours, once it was tried out.
    conditional: OnceLock<Conditional>,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl S3Store {
    /// Opens the store at a location like `s3://bucket/prefix?endpoint=http://host:3900&region=garage`; the service is
    /// not contacted yet. Credentials come from the environment, see [`self::location`].
    ///
    /// # Errors
    /// [`Error::BadLocation`], and [`Error::Io`] for certificates that cannot be read.
    pub fn open(location: &str, options: &HttpOptions) -> Result<Self> {
        let parsed = Location::parse(location)?;
        // Whoever was first is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(S3Store {
            client: Arc::new(parsed.client(location, options)?),
            runtime: Confined::new()?,
            location: location.to_owned(),
            prefix: parsed.prefix,
            cancel: options.cancel.clone(),
            conditional: OnceLock::new(),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// Makes a store of an empty place, and checks that one which is there is one.
    ///
    /// # Errors
    /// [`Error::Newer`], [`Error::BadLocation`] for a place that holds something else, and what can go wrong on the way.
    pub fn prepare(&self) -> Result<()> {
        let what = "its marker";
        match self.read_whole(MARKER_NAME, what, 100) {
            Ok(bytes) => self.check_marker(&bytes),
            Err(Error::NotFound { object, .. }) if object == what => {
                if self.holds_something()? {
                    return Err(Error::BadLocation {
                        location: self.location.clone(),
                        why: format!("it holds other things, and no object {MARKER_NAME:?}"),
                    });
                }
                self.put_plain(MARKER_NAME, what, MARKER_TEXT.as_bytes())
            }
            Err(error) => Err(error),
        }
    }

    fn check_marker(&self, bytes: &[u8]) -> Result<()> {
        let version = std::str::from_utf8(bytes)
            .ok()
            .and_then(|text| text.strip_prefix("pristine-store "))
            .and_then(|rest| rest.trim_end().parse::<u64>().ok());
        match version {
            Some(version) if version > STORE_VERSION => Err(Error::Newer {
                location: self.location.clone(),
                what: "the store".to_owned(),
                found: version,
                supported: STORE_VERSION,
            }),
            Some(_) => Ok(()),
            None => Err(Error::BadLocation {
                location: self.location.clone(),
                why: format!("its object {MARKER_NAME:?} is damaged"),
            }),
        }
    }

    fn holds_something(&self) -> Result<bool> {
        let client = Arc::clone(&self.client);
        let prefix = (!self.prefix.is_empty()).then(|| Path::from(self.prefix.as_str()));
        let first = self.wait("the list of its objects", async move {
            client.list(prefix.as_ref()).next().await.transpose()
        })?;
        Ok(first.is_some())
    }

    fn path(&self, path: &str) -> Path {
        match self.prefix.as_str() {
            "" => Path::from(path),
            prefix => Path::from(format!("{prefix}/{path}")),
        }
    }

    /// Waits for a request; its error is about `what`.
    fn wait<T: Send + 'static>(
        &self,
        what: &str,
        future: impl Future<Output = ClientResult<T>> + Send + 'static,
    ) -> Result<T> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let result = self.runtime.wait(&self.cancel, future)?;
        result.map_err(|error| failure::translate(&self.location, what, error))
    }

    /// Reads an object or a part of it, with at most `limit` bytes.
    fn read(
        &self,
        path: &str,
        what: &str,
        range: Option<GetRange>,
        limit: u64,
    ) -> Result<(Vec<u8>, ObjectMeta)> {
        let (client, path) = (Arc::clone(&self.client), self.path(path));
        let (location, object) = (self.location.clone(), what.to_owned());
        let answer = self.wait(what, async move {
            let options = GetOptions {
                range,
                ..GetOptions::default()
            };
            let answer = client.get_opts(&path, options).await?;
            Ok(collect(answer, limit).await)
        })?;
        match answer {
            Ok((bytes, meta)) => {
                self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Ok((bytes, meta))
            }
            Err(CollectError::TooLarge) => Err(Error::TooLarge {
                location,
                object,
                limit,
            }),
            Err(CollectError::Client(error)) => Err(failure::translate(&location, what, error)),
        }
    }

    fn read_whole(&self, path: &str, what: &str, limit: u64) -> Result<Vec<u8>> {
        Ok(self.read(path, what, None, limit)?.0)
    }

    fn size_of(&self, path: &str, what: &str) -> Result<Option<u64>> {
        let (client, path) = (Arc::clone(&self.client), self.path(path));
        match self.wait(what, async move { client.head(&path).await }) {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { object, .. }) if object == what => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Stores an object whatever is there.
    fn put_plain(&self, path: &str, what: &str, bytes: &[u8]) -> Result<()> {
        let (client, path) = (Arc::clone(&self.client), self.path(path));
        let bytes = bytes.to_vec();
        self.wait(what, async move {
            if bytes.len() > MULTIPART_FROM {
                put_in_parts(client.as_ref(), &path, &bytes).await
            } else {
                client.put(&path, bytes.into()).await.map(drop)
            }
        })
    }

    fn put_mode(&self, path: &str, what: &str, bytes: &[u8], mode: PutMode) -> Result<PutOutcome> {
        let (client, path) = (Arc::clone(&self.client), self.path(path));
        let payload = PutPayload::from(bytes.to_vec());
        let what_for = what.to_owned();
        let location = self.location.clone();
        self.wait(what, async move {
            let options = PutOptions::from(mode);
            Ok(match client.put_opts(&path, payload, options).await {
                Ok(_) => Ok(PutOutcome::Done),
                Err(
                    object_store::Error::AlreadyExists { .. }
                    | object_store::Error::Precondition { .. }
                    | object_store::Error::NotModified { .. },
                ) => Ok(PutOutcome::ConditionFailed),
                Err(error) => Err(failure::translate(&location, &what_for, error)),
            })
        })?
    }

    /// Stores an object, unless it is there.
    fn put_once(&self, path: &str, what: &str, bytes: &[u8], claim: &str) -> Result<Put> {
        if self.conditional()?.create {
            return Ok(match self.put_mode(path, what, bytes, PutMode::Create)? {
                PutOutcome::Done => Put::Created,
                PutOutcome::ConditionFailed => Put::AlreadyThere,
            });
        }
        self.exclusively(claim, |deadline| {
            if self.size_of(path, what)?.is_some() {
                return Ok(Put::AlreadyThere);
            }
            deadline.check()?;
            self.put_plain(path, what, bytes)?;
            Ok(Put::Created)
        })
    }

    fn delete(&self, path: &str, what: &str) -> Result<()> {
        let (client, path) = (Arc::clone(&self.client), self.path(path));
        match self.wait(what, async move { client.delete(&path).await }) {
            Err(Error::NotFound { object, .. }) if object == what => Ok(()),
            result => result,
        }
    }

    /// The objects in a directory and below: paths relative to it.
    fn list_directory(&self, directory: &str) -> Result<Vec<(String, ObjectMeta)>> {
        let (client, prefix) = (Arc::clone(&self.client), self.path(directory));
        let what = format!("the list of {directory}");
        let listed: Vec<ObjectMeta> = {
            let prefix = prefix.clone();
            self.wait(&what, async move {
                client.list(Some(&prefix)).try_collect().await
            })?
        };
        let start = format!("{prefix}/");
        let relative = |meta: ObjectMeta| {
            let path = meta.location.as_ref().strip_prefix(&start)?.to_owned();
            Some((path, meta))
        };
        Ok(listed.into_iter().filter_map(relative).collect())
    }

    /// A pointer's bytes, and the tag of just these.
    fn pointer_bytes(&self, channel: &ChannelName) -> Result<Option<(Vec<u8>, Option<String>)>> {
        let what = format!("the pointer of channel {channel}");
        match self.read(&channel.path(), &what, None, MAX_RELEASE_LEN) {
            Ok((bytes, meta)) => Ok(Some((bytes, meta.e_tag))),
            Err(Error::NotFound { object, .. }) if object == what => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn conflict(&self, channel: &ChannelName, current: Option<&[u8]>) -> Error {
        let parse = |bytes: &[u8]| SignedRelease::parse(bytes, channel, &self.location);
        let now = match current.map(parse) {
            Some(Ok(now)) => {
                let now = now.release();
                format!("to generation {} (image {})", now.generation, now.image)
            }
            Some(Err(_)) => "to something unreadable".to_owned(),
            None => "and does not exist any more".to_owned(),
        };
        Error::Conflict {
            location: self.location.clone(),
            channel: channel.clone(),
            now,
        }
    }

    /// Puts a pointer on the condition that it is as it was read.
    fn swap_conditionally(
        &self,
        channel: &ChannelName,
        tag: Option<String>,
        bytes: &[u8],
    ) -> Result<()> {
        let what = format!("the pointer of channel {channel}");
        let mode = match tag {
            None => PutMode::Create,
            Some(_) => PutMode::Update(UpdateVersion {
                e_tag: tag,
                version: None,
            }),
        };
        let outcome = self.put_mode(&channel.path(), &what, bytes, mode);
        if matches!(outcome, Ok(PutOutcome::Done)) {
            return Ok(());
        }
        // It may have been this one's own move whose answer got lost, and that was repeated.
        let now = match (self.pointer_bytes(channel), outcome) {
            (Ok(now), _) => now,
            (Err(_), Err(error)) | (Err(error), Ok(_)) => return Err(error),
        };
        match now {
            Some((now, _)) if now == bytes => Ok(()),
            now => Err(self.conflict(channel, now.as_ref().map(|(bytes, _)| bytes.as_slice()))),
        }
    }

    fn swap(&self, channel: &ChannelName, expected: Option<&Revision>, bytes: &[u8]) -> Result<()> {
        let current = || {
            let current = self.pointer_bytes(channel)?;
            let revision = current.as_ref().map(|(bytes, _)| Revision::of(bytes));
            if revision.as_ref() == expected {
                Ok(current)
            } else {
                Err(self.conflict(channel, current.as_ref().map(|(bytes, _)| bytes.as_slice())))
            }
        };
        let conditional = *self.conditional()?;
        let before = current()?;
        let tag = before.and_then(|(_, tag)| tag);
        if conditional.create && conditional.update && (tag.is_some() || expected.is_none()) {
            return self.swap_conditionally(channel, tag, bytes);
        }
        let what = format!("the pointer of channel {channel}");
        self.exclusively(&channel.path(), |deadline| {
            current()?;
            deadline.check()?;
            self.put_plain(&channel.path(), &what, bytes)?;
            // Nobody else should have written; if somebody did in spite of all, it is told.
            match self.pointer_bytes(channel)? {
                Some((now, _)) if now == bytes => Ok(()),
                now => Err(self.conflict(channel, now.as_ref().map(|(bytes, _)| bytes.as_slice()))),
            }
        })
    }
}

enum PutOutcome {
    Done,
    ConditionFailed,
}

enum CollectError {
    TooLarge,
    Client(object_store::Error),
}

/// Reads an answer; memory follows what arrives.
async fn collect(
    answer: GetResult,
    limit: u64,
) -> std::result::Result<(Vec<u8>, ObjectMeta), CollectError> {
    let meta = answer.meta.clone();
    if answer.range.end.saturating_sub(answer.range.start) > limit {
        return Err(CollectError::TooLarge);
    }
    let mut bytes = Vec::new();
    let mut stream = answer.into_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(CollectError::Client)?;
        if (bytes.len() + piece.len()) as u64 > limit {
            return Err(CollectError::TooLarge);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok((bytes, meta))
}

/// Puts a large object in parts; none of them stays if it fails.
async fn put_in_parts(client: &AmazonS3, path: &Path, bytes: &[u8]) -> ClientResult<()> {
    let mut upload = client.put_multipart(path).await?;
    let parts = bytes.chunks(PART).map(<[u8]>::to_vec);
    let sent: ClientResult<Vec<()>> = futures_util::stream::iter(parts)
        .map(|part| upload.put_part(part.into()))
        .buffered(PARTS_AT_ONCE)
        .try_collect()
        .await;
    let done = match sent {
        Ok(_) => upload.complete().await.map(drop),
        Err(error) => Err(error),
    };
    if done.is_err() {
        // What fails here is left to the service's own rules for unfinished uploads.
        let _ = upload.abort().await;
    }
    done
}

impl Store for S3Store {
    fn location(&self) -> &str {
        &self.location
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        self.read_whole(&object.path(), &object.to_string(), limit)
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let (path, what) = (object.path(), object.to_string());
        let len = range.end - range.start;
        let short = |len| Error::Truncated {
            location: self.location.clone(),
            object: what.clone(),
            len,
            needed: range.end,
        };
        match self.read(&path, &what, Some(GetRange::Bounded(range.clone())), len) {
            Ok((bytes, meta)) if (bytes.len() as u64) < len => Err(short(meta.size)),
            Ok((bytes, _)) => Ok(bytes),
            // The object ends before the range begins.
            Err(Error::Status { status: 416, .. }) => {
                Err(short(self.size_of(&path, &what)?.unwrap_or(0)))
            }
            Err(error) => Err(error),
        }
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let range = GetRange::Bounded(0..len);
        match self.read(&object.path(), &object.to_string(), Some(range), len) {
            Ok((bytes, _)) => Ok(bytes),
            // It is empty.
            Err(Error::Status { status: 416, .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        self.size_of(&object.path(), &object.to_string())
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        let (path, what) = (object.path(), object.to_string());
        if self.size_of(&path, &what)?.is_some() {
            return Ok(Put::AlreadyThere);
        }
        match object {
            // Two writers of a pack write the same bytes.
            ObjectName::Pack(_) => {
                self.put_plain(&path, &what, bytes)?;
                Ok(Put::Created)
            }
            _ => self.put_once(&path, &what, bytes, &path),
        }
    }

    fn images(&self) -> Result<Vec<ImageId>> {
        let listed = self.list(ObjectKind::Manifest)?;
        let id = |listed: &Listed| match listed.object {
            ObjectName::Manifest(id) => Some(id),
            _ => None,
        };
        Ok(listed.iter().filter_map(id).collect())
    }

    fn channels(&self) -> Result<Vec<ChannelName>> {
        let listed = self.list_directory("channels")?;
        let names = listed.iter().filter_map(|(name, _)| name.parse().ok());
        let mut names: Vec<ChannelName> = names.collect();
        names.sort();
        Ok(names)
    }

    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        let listed = self.list_directory(&channel.history_path())?;
        let names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
        Ok(generations(&names))
    }

    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        let Some((bytes, _)) = self.pointer_bytes(channel)? else {
            return Ok(None);
        };
        let pointer = SignedRelease::parse(&bytes, channel, &self.location)?;
        Ok(Some((pointer, Revision::of(&bytes))))
    }

    fn swap_pointer(
        &self,
        expected: Option<&Revision>,
        pointer: &SignedRelease,
    ) -> Result<Revision> {
        let bytes = pointer.encode().into_bytes();
        self.swap(&pointer.release().channel, expected, &bytes)?;
        Ok(Revision::of(&bytes))
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }

    fn list(&self, kind: ObjectKind) -> Result<Vec<Listed>> {
        let directory = kind.directory();
        let listed = self.list_directory(directory)?;
        let object = |(path, meta): &(String, ObjectMeta)| {
            let object = ObjectName::from_path(&format!("{directory}/{path}"))?;
            Some(Listed {
                object,
                len: meta.size,
                modified: modified(meta),
            })
        };
        Ok(listed.iter().filter_map(object).collect())
    }

    fn remove(&self, object: &ObjectName) -> Result<()> {
        self.delete(&object.path(), &object.to_string())
    }

    fn notes(&self, kind: NoteKind) -> Result<Vec<Noted>> {
        let listed = self.list_directory(kind.directory())?;
        let note = |(path, meta): &(String, ObjectMeta)| {
            let name = NoteName::new(kind, path).ok()?;
            let modified = modified(meta);
            Some(Noted { name, modified })
        };
        Ok(listed.iter().filter_map(note).collect())
    }

    fn read_note(&self, name: &NoteName) -> Result<Option<Vec<u8>>> {
        let what = name.to_string();
        match self.read_whole(&name.path(), &what, MAX_NOTE_LEN) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error::NotFound { object, .. }) if object == what => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write_note(&self, name: &NoteName, bytes: &[u8]) -> Result<()> {
        self.put_plain(&name.path(), &name.to_string(), bytes)
    }

    fn remove_note(&self, name: &NoteName) -> Result<()> {
        self.delete(&name.path(), &name.to_string())
    }

    fn remarks(&self) -> Vec<String> {
        match self.conditional.get() {
            Some(found) if !(found.create && found.update) => vec![format!(
                "{} has no conditional puts; publishers keep apart by claims, and one that lost a race is told",
                self.location
            )],
            _ => Vec::new(),
        }
    }
}

/// Milliseconds since 1970.
fn modified(meta: &ObjectMeta) -> u64 {
    u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0)
}
