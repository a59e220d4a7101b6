// SPDX-License-Identifier: GPL-2.0

//! Where the blobs of a container image are: in a directory, or in an archive that is read in place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pristine_image::RawFile;
use serde::de::DeserializeOwned;
use tar::EntryType;

use super::documents::{self, Descriptor, MAX_DOCUMENT};
use super::{check, digest_of};
use crate::error::{Error, Result};
use crate::input::{Input, Part, Sequential};
use crate::tree::members::Members;

/// Members looked at to know what an archive is: those of images have few, and small ones first.
const LOOK: usize = 4096;
/// The most members of an archive of an image.
const MAX_MEMBERS: usize = 100_000;

/// The files of an image layout.
#[derive(Debug)]
pub(crate) enum Blobs {
    Directory(PathBuf),
    Archive {
        input: Input,
        /// Where each file is in the archive.
        files: BTreeMap<String, (u64, u64)>,
        /// Links, as docker makes them between layers that are the same.
        links: BTreeMap<String, String>,
    },
}

/// Whether an archive is one of a container image: it has the files by which these are known at its root.
pub(crate) fn is_archive(reader: Sequential) -> bool {
    let mut reader = reader;
    let Ok(end) = std::io::Seek::seek(&mut reader, std::io::SeekFrom::End(0)) else {
        return false;
    };
    let mut members = Members::new(reader, end, "");
    let (mut layout, mut index, mut docker, mut other) = (false, false, false, 0);
    for _ in 0..LOOK {
        // What is wrong is told by who reads it.
        let Ok(Some(member)) = members.next() else {
            break;
        };
        match plain(&member.name).as_deref() {
            Some("oci-layout") => layout = true,
            Some("index.json") => index = true,
            Some("manifest.json") => docker = true,
            Some(name) if name.is_empty() || name.starts_with("blobs") => {}
            Some("repositories") => {}
            // docker's older archives have a directory or a file for each layer, named by its digest.
            Some(name) if name.get(..64).is_some_and(is_hex) => {}
            _ => other += 1,
        }
    }
    (layout && index) || (docker && other == 0)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The name of a member without `./` and slashes at the end; `None` if it has any tricks in it.
fn plain(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let parts = name
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".");
    let parts: Vec<&str> = parts.collect();
    (!parts.contains(&"..")).then(|| parts.join("/"))
}

impl Blobs {
    /// The layout in a directory.
    pub(crate) fn directory(path: &Path) -> Self {
        Blobs::Directory(path.to_owned())
    }

    /// The layout in an archive.
    ///
    /// # Errors
    /// [`Error::Damaged`], and those of the input.
    pub(crate) fn archive(input: Input) -> Result<Self> {
        let mut members = Members::new(input.sequential(), input.bytes.len(), &input.name);
        let (mut files, mut links) = (BTreeMap::new(), BTreeMap::new());
        while let Some(member) = members.next()? {
            let Some(name) = plain(&member.name) else {
                let name = String::from_utf8_lossy(&member.name).into_owned();
                return Err(Error::refused(
                    &input.name,
                    format!("it has a file {name:?}"),
                ));
            };
            if files.len() >= MAX_MEMBERS {
                let why = format!("it has more than {MAX_MEMBERS} files");
                return Err(Error::unsupported(&input.name, why));
            }
            match (member.kind, member.pieces.as_slice()) {
                (EntryType::Regular, [(0, at, len)]) if *len == member.len => {
                    files.insert(name, (*at, *len));
                }
                (EntryType::Regular, []) => {
                    files.insert(name, (0, 0));
                }
                (EntryType::Symlink, _) => {
                    // Relative to where it is; the names of layers have one directory.
                    let target = String::from_utf8_lossy(&member.link).into_owned();
                    let target = target.strip_prefix("../").unwrap_or(&target).to_owned();
                    links.insert(name, target);
                }
                (EntryType::Link, _) => {
                    links.insert(name, plain(&member.link).unwrap_or_default());
                }
                _ => {}
            }
        }
        Ok(Blobs::Archive {
            input,
            files,
            links,
        })
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Blobs::Directory(path) => path.display().to_string(),
            Blobs::Archive { input, .. } => input.name.clone(),
        }
    }

    /// A file by its path in the layout.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is not there, [`Error::Unsafe`] for a path that leads out.
    pub(crate) fn file(&self, path: &str) -> Result<Input> {
        let missing = || Error::damaged(self.name(), format!("{path:?} is not in it"));
        let name = plain(path.as_bytes()).filter(|name| name == path);
        let name =
            name.ok_or_else(|| Error::refused(self.name(), format!("it refers to {path:?}")))?;
        match self {
            Blobs::Directory(directory) => {
                let file = directory.join(&name);
                // Nothing of a layout is a link; one could lead anywhere.
                let metadata = file.symlink_metadata().map_err(|_| missing())?;
                if !metadata.is_file() {
                    let why = format!("{path:?} in it is no regular file");
                    return Err(Error::refused(self.name(), why));
                }
                Ok(Input {
                    name: file.display().to_string(),
                    bytes: Arc::new(RawFile::open(&file)?),
                })
            }
            Blobs::Archive {
                input,
                files,
                links,
            } => {
                let place = files.get(&name).or_else(|| files.get(links.get(&name)?));
                let (at, len) = *place.ok_or_else(missing)?;
                let part = Part::new(Arc::clone(&input.bytes), at..at.saturating_add(len));
                let name = format!("{name} in {}", input.name);
                let part = part.map_err(|error| Error::io(format!("read {name}"), error))?;
                Ok(Input {
                    name,
                    bytes: Arc::new(part),
                })
            }
        }
    }

    /// A document by its path; `None` if it is not there.
    ///
    /// # Errors
    /// As [`Blobs::file`], and for one that is too long.
    pub(crate) fn document(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let there = match self {
            Blobs::Directory(directory) => directory.join(path).symlink_metadata().is_ok(),
            Blobs::Archive { files, .. } => files.contains_key(path),
        };
        if !there {
            return Ok(None);
        }
        let (content, _) = self.small(&self.file(path)?)?;
        Ok(Some(content))
    }

    fn small(&self, input: &Input) -> Result<(Vec<u8>, Vec<u8>)> {
        if input.bytes.len() > MAX_DOCUMENT {
            let why = format!("a document of {} bytes", input.bytes.len());
            return Err(Error::damaged(&input.name, why));
        }
        digest_of(input.bytes.as_ref())
            .map_err(|error| Error::io(format!("read {}", input.name), error))
    }

    /// The blob that a descriptor names; its length is compared, its digest not.
    ///
    /// # Errors
    /// As [`Blobs::file`].
    pub(crate) fn blob(&self, descriptor: &Descriptor) -> Result<Input> {
        let digest = descriptor.digest.strip_prefix("sha256:");
        let digest = digest.filter(|hex| hex.len() == 64 && is_hex(hex));
        let Some(digest) = digest else {
            let why = format!(
                "it names content by {:?}; only sha256 is known",
                descriptor.digest
            );
            return Err(Error::unsupported(self.name(), why));
        };
        let input = self.file(&format!("blobs/sha256/{digest}"))?;
        if input.bytes.len() != descriptor.size {
            let why = format!(
                "it has {} bytes, and should have {}",
                input.bytes.len(),
                descriptor.size
            );
            return Err(Error::damaged(input.name, why));
        }
        Ok(input)
    }

    /// The document that a descriptor names, with its digest compared.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is another, and as [`Blobs::blob`].
    pub(crate) fn read<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T> {
        let input = self.blob(descriptor)?;
        let (content, digest) = self.small(&input)?;
        check(&descriptor.digest, &digest, "it", &input.name)?;
        documents::parse(&content, &self.name(), &descriptor.digest)
    }
}
