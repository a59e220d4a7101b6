// SPDX-License-Identifier: GPL-2.0

//! A store in a directory.
//!
//! Files are written under `.tmp/`, synced, and then linked to their names, so that a name never shows a part of an
//! object, not even after a power cut. Pointers are moved under an exclusive lock on `.lock`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use pristine_image::ImageId;
use rustix::fs::{AtFlags, FlockOperation, Timespec, Timestamps};

use crate::error::{Error, Result};
use crate::note::{NoteKind, NoteName, Noted, MAX_NOTE_LEN};
use crate::object::{ChannelName, ObjectKind, ObjectName, MARKER_NAME, MARKER_TEXT, STORE_VERSION};
use crate::release::{SignedRelease, MAX_RELEASE_LEN};
use crate::store::{Listed, Put, Revision, Store, Traffic};

/// Left-overs of writers that died are removed after this time.
const TMP_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

static TMP_COUNTER: AtomicU64 = AtomicU64::new(0);

/// A store in a directory.
#[derive(Debug)]
pub struct DirStore {
    root: PathBuf,
    location: String,
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl DirStore {
    /// Opens an existing store.
    ///
    /// # Errors
    /// [`Error::NotAStore`], [`Error::Newer`], [`Error::Io`].
    pub fn open(root: &Path) -> Result<Self> {
        let not_a_store = |why: &str| Error::NotAStore {
            path: root.to_owned(),
            why: why.to_owned(),
        };
        let marker = root.join(MARKER_NAME);
        let text = match fs::read_to_string(&marker) {
            Ok(text) => text,
            Err(_) if !root.exists() => return Err(not_a_store("there is no such directory")),
            Err(_) if !root.is_dir() => return Err(not_a_store("it is not a directory")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(not_a_store("the file \"pristine-store\" is missing"));
            }
            Err(error) => {
                return Err(Error::io(
                    format!("cannot read {}", marker.display()),
                    error,
                ))
            }
        };
        let version = text
            .strip_prefix("pristine-store ")
            .and_then(|rest| rest.trim_end().parse::<u64>().ok())
            .ok_or_else(|| not_a_store("its file \"pristine-store\" is damaged"))?;
        let location = root.display().to_string();
        if version > STORE_VERSION {
            return Err(Error::Newer {
                location,
                what: "the store".to_owned(),
                found: version,
                supported: STORE_VERSION,
            });
        }
        Ok(DirStore {
            root: root.to_owned(),
            location,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// Opens a store, and makes it first if the directory is missing or empty.
    ///
    /// # Errors
    /// As [`DirStore::open`]; [`Error::NotAStore`] for a directory that holds something else.
    pub fn open_or_create(root: &Path) -> Result<Self> {
        let io = |error| Error::io(format!("cannot create the store {}", root.display()), error);
        let empty = match fs::read_dir(root) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(root).map_err(io)?;
                true
            }
            Err(error) => return Err(io(error)),
        };
        // A creation that was cut left only what is hidden.
        if empty || (!root.join(MARKER_NAME).exists() && only_hidden(root).map_err(io)?) {
            let store = DirStore {
                root: root.to_owned(),
                location: root.display().to_string(),
                requests: AtomicU64::new(0),
                bytes: AtomicU64::new(0),
            };
            store.write_file(MARKER_NAME, MARKER_TEXT.as_bytes(), true)?;
        }
        let store = DirStore::open(root)?;
        store.remove_old_temporaries();
        Ok(store)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn object_error(&self, object: &ObjectName, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::NotFound => Error::NotFound {
                location: self.location.clone(),
                object: object.to_string(),
            },
            _ => Error::io(
                format!("cannot read {}", self.path(object).display()),
                error,
            ),
        }
    }

    fn change_error(&self, what: &str, path: &Path, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => Error::ReadOnly {
                location: self.location.clone(),
                why: error.to_string(),
            },
            _ => Error::io(format!("cannot {what} {}", path.display()), error),
        }
    }

    fn path(&self, object: &ObjectName) -> PathBuf {
        self.root.join(object.path())
    }

    fn open_object(&self, object: &ObjectName) -> Result<(File, u64)> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let open = || {
            let file = File::open(self.path(object))?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        open().map_err(|error| self.object_error(object, error))
    }

    fn read(&self, object: &ObjectName, file: &File, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start)
            .map_err(|error| self.object_error(object, error))?;
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Writes a file durably and at once; with `create_only`, one that is there already is left alone.
    fn write_file(&self, name: &str, bytes: &[u8], create_only: bool) -> Result<Put> {
        let path = self.root.join(name);
        let fail = |error: io::Error| self.change_error("write", &path, error);
        let directory = path.parent().unwrap_or(&self.root);
        self.make_directory(directory).map_err(fail)?;
        let tmp_directory = self.root.join(".tmp");
        fs::create_dir_all(&tmp_directory).map_err(fail)?;
        let number = TMP_COUNTER.fetch_add(1, Ordering::Relaxed);
        // The time too, for process ids come again.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.unwrap_or_default().as_nanos();
        let tmp = tmp_directory.join(format!("{}-{number}-{now}", std::process::id()));
        let result = write_new(&tmp, bytes).and_then(|()| {
            if create_only {
                link(&tmp, &path)
            } else {
                fs::rename(&tmp, &path).map(|()| Put::Created)
            }
        });
        // Gone after a rename; otherwise it must not stay.
        let _ = fs::remove_file(&tmp);
        let put = result.map_err(fail)?;
        sync_directory(directory).map_err(fail)?;
        Ok(put)
    }

    /// Creates a directory of the store, durably.
    fn make_directory(&self, directory: &Path) -> io::Result<()> {
        if directory.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(directory)?;
        let parents = directory.ancestors().skip(1);
        for parent in parents.take_while(|parent| parent.starts_with(&self.root)) {
            sync_directory(parent)?;
        }
        Ok(())
    }

    fn remove_old_temporaries(&self) {
        let Ok(entries) = fs::read_dir(self.root.join(".tmp")) else {
            return;
        };
        for entry in entries.flatten() {
            let age = entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .ok()
                .and_then(|time| SystemTime::now().duration_since(time).ok());
            if age.is_some_and(|age| age > TMP_MAX_AGE) {
                // Another process may have been faster.
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn names(&self, directory: &str) -> Result<Vec<String>> {
        let path = self.root.join(directory);
        let fail = |error| Error::io(format!("cannot list {}", path.display()), error);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(fail(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            if let Ok(name) = entry.map_err(fail)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Keeps other processes from moving pointers and making releases, as long as the file is open.
    fn lock(&self) -> Result<File> {
        let path = self.root.join(".lock");
        let fail = |error: io::Error| match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => Error::ReadOnly {
                location: self.location.clone(),
                why: error.to_string(),
            },
            _ => Error::io(format!("cannot lock {}", path.display()), error),
        };
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let lock = options.open(&path).map_err(fail)?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| fail(error.into()))?;
        Ok(lock)
    }

    /// The files of a directory and of those in it: paths relative to it, lengths and times.
    fn files(&self, directory: &str) -> Result<Vec<(String, fs::Metadata)>> {
        let mut found = Vec::new();
        for name in self.names(directory)? {
            let below = format!("{directory}/{name}");
            let path = self.root.join(&below);
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {
                    let files = self.files(&below)?.into_iter();
                    found
                        .extend(files.map(|(path, metadata)| (format!("{name}/{path}"), metadata)));
                }
                Ok(metadata) => found.push((name, metadata)),
                // Removed since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                Err(error) => {
                    return Err(Error::io(format!("cannot list {}", path.display()), error))
                }
            }
        }
        Ok(found)
    }

    fn remove_file(&self, name: &str) -> Result<()> {
        let path = self.root.join(name);
        let fail = |error| self.change_error("remove", &path, error);
        match fs::remove_file(&path) {
            Ok(()) => sync_directory(path.parent().unwrap_or(&self.root)).map_err(fail),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(fail(error)),
        }
    }

    fn pointer_bytes(&self, channel: &ChannelName) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(channel.path());
        let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
        match File::open(&path) {
            Ok(file) => {
                let mut bytes = Vec::new();
                let mut limited = file.take(MAX_RELEASE_LEN + 1);
                limited.read_to_end(&mut bytes).map_err(fail)?;
                self.requests.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(fail(error)),
        }
    }
}

impl Store for DirStore {
    fn location(&self) -> &str {
        &self.location
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        let (file, len) = self.open_object(object)?;
        if len > limit {
            return Err(Error::TooLarge {
                location: self.location.clone(),
                object: object.to_string(),
                limit,
            });
        }
        self.read(object, &file, 0..len)
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let (file, len) = self.open_object(object)?;
        if len < range.end {
            return Err(Error::Truncated {
                location: self.location.clone(),
                object: object.to_string(),
                len,
                needed: range.end,
            });
        }
        self.read(object, &file, range)
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        let (file, there) = self.open_object(object)?;
        self.read(object, &file, 0..len.min(there))
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        match fs::metadata(self.path(object)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.object_error(object, error)),
        }
    }

    fn put(&self, object: &ObjectName, bytes: &[u8]) -> Result<Put> {
        // Two writers of a release, a delta or a trace need not write the same: of those, one is first.
        let lock = match object {
            ObjectName::Release(_)
            | ObjectName::Delta { .. }
            | ObjectName::Trace(_)
            | ObjectName::Key { .. } => Some(self.lock()?),
            ObjectName::Manifest(_) | ObjectName::Pack(_) | ObjectName::Reference(_) => None,
        };
        if self.size(object)?.is_some() {
            return Ok(Put::AlreadyThere);
        }
        let put = self.write_file(&object.path(), bytes, true);
        drop(lock);
        put
    }

    fn images(&self) -> Result<Vec<ImageId>> {
        let names = self.names("images")?;
        let ids = names
            .iter()
            .filter_map(|name| name.strip_suffix(".manifest"));
        Ok(ids.filter_map(|id| id.parse().ok()).collect())
    }

    fn channels(&self) -> Result<Vec<ChannelName>> {
        let names = self.names("channels")?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        Ok(generations(&self.names(&channel.history_path())?))
    }

    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        let Some(bytes) = self.pointer_bytes(channel)? else {
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
        let channel = &pointer.release().channel;
        let lock = self.lock()?;
        let current = self.pointer_bytes(channel)?;
        let revision = current.as_deref().map(Revision::of);
        if revision.as_ref() != expected {
            let parse = |bytes: Vec<u8>| SignedRelease::parse(&bytes, channel, &self.location);
            let now = match current.map(parse) {
                Some(Ok(now)) => {
                    let now = now.release();
                    format!("to generation {} (image {})", now.generation, now.image)
                }
                Some(Err(_)) => "to something unreadable".to_owned(),
                None => "and does not exist any more".to_owned(),
            };
            return Err(Error::Conflict {
                location: self.location.clone(),
                channel: channel.clone(),
                now,
            });
        }
        let bytes = pointer.encode().into_bytes();
        self.write_file(&channel.path(), &bytes, false)?;
        // The lock goes with the file.
        drop(lock);
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
        let files = self.files(directory)?;
        let object = |(path, metadata): &(String, fs::Metadata)| {
            let object = ObjectName::from_path(&format!("{directory}/{path}"))?;
            Some(Listed {
                object,
                len: metadata.len(),
                modified: modified(metadata),
            })
        };
        Ok(files.iter().filter_map(object).collect())
    }

    fn remove(&self, object: &ObjectName) -> Result<()> {
        self.remove_file(&object.path())
    }

    fn notes(&self, kind: NoteKind) -> Result<Vec<Noted>> {
        let files = self.files(kind.directory())?;
        let note = |(name, metadata): &(String, fs::Metadata)| {
            let name = NoteName::new(kind, name).ok()?;
            let modified = modified(metadata);
            Some(Noted { name, modified })
        };
        Ok(files.iter().filter_map(note).collect())
    }

    fn read_note(&self, name: &NoteName) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(name.path());
        let read = || {
            let mut bytes = Vec::new();
            File::open(&path)?
                .take(MAX_NOTE_LEN)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }

    fn write_note(&self, name: &NoteName, bytes: &[u8]) -> Result<()> {
        // A file that stays the same gets a new time alone: a directory being listed then cannot miss it, as it might
        // one that is being replaced.
        let path = self.root.join(name.path());
        if fs::read(&path).is_ok_and(|there| there == bytes) {
            match touch(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => (),
                result => return result.map_err(|error| self.change_error("write", &path, error)),
            }
        }
        self.write_file(&name.path(), bytes, false).map(drop)
    }

    fn remove_note(&self, name: &NoteName) -> Result<()> {
        self.remove_file(&name.path())
    }
}

/// Milliseconds since 1970.
fn modified(metadata: &fs::Metadata) -> u64 {
    let modified = metadata.modified().ok();
    let since = modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// Sets a file's time to now, by the clock of whoever holds the file.
fn touch(path: &Path) -> io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::empty())?;
    Ok(())
}

/// The names that are generations, as numbers in ascending order.
pub(crate) fn generations(names: &[String]) -> Vec<u64> {
    let parse = |name: &String| {
        let generation = name.parse::<u64>().ok();
        // Only one spelling is right.
        generation.filter(|generation| generation.to_string() == *name)
    };
    let mut generations: Vec<u64> = names.iter().filter_map(parse).collect();
    generations.sort_unstable();
    generations
}

fn only_hidden(root: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(root)? {
        if !entry?.file_name().as_encoded_bytes().starts_with(b".tmp") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn link(from: &Path, to: &Path) -> io::Result<Put> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(Put::Created),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Put::AlreadyThere),
        // File systems without hard links. Two writers of one name write the same content, or hold the lock, so the one
        // that comes later may replace the other's file.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
            ) =>
        {
            fs::rename(from, to).map(|()| Put::Created)
        }
        Err(error) => Err(error),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
