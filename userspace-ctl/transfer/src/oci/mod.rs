// SPDX-License-Identifier: GPL-2.0

//! Container images: OCI image layouts (a directory, or an archive of one) and what `docker save` writes.
//!
//! After the OCI image specification 1.1. Everything that is named by a digest is compared with it (SHA256): indexes,
//! manifests, configurations and layers as they are stored, and layers unpacked as the configuration lists them.

mod blobs;
mod documents;

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use pristine_image::ReadAt;
use sha2::{Digest as _, Sha256};

pub(crate) use blobs::{is_archive, Blobs};
use documents::{Config, Descriptor, DockerImage, Index, Manifest};

use crate::error::{Error, Result};
use crate::hex;
use crate::input::Input;
use crate::open::OpenOptions;
use crate::spool::Spool;
use crate::stream::Compression;
use crate::tree::TreeBuilder;

/// Indexes within indexes.
const MAX_NESTED: u32 = 4;
/// The most layers; overlayfs takes 500 at most.
const MAX_LAYERS: usize = 1000;

/// Whether a directory is an OCI image layout.
pub(crate) fn is_layout(path: &Path) -> bool {
    path.join("oci-layout").is_file() && path.join("index.json").is_file()
}

/// A platform that an image is for, like `linux/arm64` or `linux/arm/v7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Like `linux`.
    pub os: String,
    /// Like `amd64`.
    pub architecture: String,
    /// Like `v7`.
    pub variant: Option<String>,
}

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    fn accepts(&self, other: &documents::Platform) -> bool {
        let variant = self.variant.is_none() || self.variant == other.variant;
        self.os == other.os && self.architecture == other.architecture && variant
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts: Vec<&str> = text.split('/').collect();
        let word =
            |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric());
        match parts.as_slice() {
            [os, architecture, rest @ ..] if rest.len() < 2 && parts.iter().all(word) => {
                Ok(Platform {
                    os: (*os).to_owned(),
                    architecture: (*architecture).to_owned(),
                    variant: rest.first().map(|&variant| variant.to_owned()),
                })
            }
            _ => Err("give OS/ARCHITECTURE, like linux/amd64 or linux/arm/v7".to_owned()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A layer: where it is, and what it must be.
#[derive(Debug)]
struct Layer {
    input: Input,
    /// Of the layer as it is stored; archives of older versions of docker do not say.
    stored: Option<String>,
    /// Of the layer unpacked.
    unpacked: String,
}

/// Puts together the files of the image that the options choose.
///
/// # Errors
/// [`Error::Damaged`] for what is missing or has another digest, [`Error::Usage`] if several images fit or none,
/// [`Error::Unsafe`] and what else can be wrong with layers.
pub(crate) fn unpack(
    blobs: &Blobs,
    options: &OpenOptions<'_>,
    formats: &mut Vec<String>,
) -> Result<TreeBuilder> {
    let layers = match blobs.document("index.json")? {
        Some(index) => layout_layers(blobs, &index, options)?,
        None => docker_layers(blobs, options)?,
    };
    if layers.len() > MAX_LAYERS {
        let why = format!(
            "it has {} layers, at most {MAX_LAYERS} make sense",
            layers.len()
        );
        return Err(Error::unsupported(blobs.name(), why));
    }
    formats.push(format!("{} layers", layers.len()));
    let limit = options.limit()?;
    let mut left = limit;
    let mut builder = TreeBuilder::new(limit);
    for layer in layers {
        let input = open_layer(&layer, options, &mut left)?;
        builder.apply(&input, true, &options.watch)?;
    }
    Ok(builder)
}

fn layout_layers(blobs: &Blobs, index: &[u8], options: &OpenOptions<'_>) -> Result<Vec<Layer>> {
    let index: Index = documents::parse(index, &blobs.name(), "index.json")?;
    let descriptor = choose(blobs, index, options)?;
    let manifest: Manifest = blobs.read(&descriptor)?;
    let config: Config = blobs.read(&manifest.config)?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        let why = "its manifest and its configuration list different numbers of layers";
        return Err(Error::damaged(blobs.name(), why));
    }
    let layers = manifest.layers.iter().zip(diff_ids);
    layers
        .map(|(layer, unpacked)| {
            if layer.media_type.contains("encrypted") {
                let why = "a layer is encrypted; decrypt the image first, like skopeo copy --decryption-key";
                return Err(Error::unsupported(blobs.name(), why));
            }
            Ok(Layer {
                input: blobs.blob(layer)?,
                stored: Some(layer.digest.clone()),
                unpacked,
            })
        })
        .collect()
}

/// The manifest that is wanted, through indexes within indexes.
fn choose(blobs: &Blobs, index: Index, options: &OpenOptions<'_>) -> Result<Descriptor> {
    let host = Platform::host();
    let platform = options.platform.as_ref().unwrap_or(&host);
    let mut index = index;
    for level in 0..MAX_NESTED {
        let mut found = index.manifests;
        // Attestations and signatures are no images.
        found.retain(|descriptor| !descriptor.is_attachment());
        if let Some(name) = options.oci_name.as_ref().filter(|_| level == 0) {
            let names: Vec<String> = found.iter().filter_map(Descriptor::name).collect();
            found.retain(|descriptor| descriptor.has_name(name));
            if found.is_empty() {
                let names = list(names);
                let text = format!("{} has no image named {name:?}, but {names}", blobs.name());
                return Err(Error::Usage(text));
            }
        }
        let platforms: Vec<String> = found
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref().map(ToString::to_string))
            .collect();
        found.retain(|descriptor| {
            let declared = descriptor.platform.as_ref();
            declared.is_none_or(|declared| platform.accepts(declared))
        });
        let chosen = match found.as_slice() {
            [one] => one.clone(),
            [] if platforms.is_empty() => {
                return Err(Error::damaged(blobs.name(), "it lists no image"));
            }
            [] => {
                let platforms = list(platforms);
                let text = format!(
                    "{} has no image for {platform}, but for {platforms}; choose with --platform",
                    blobs.name()
                );
                return Err(Error::Usage(text));
            }
            several => {
                let names = list(several.iter().filter_map(Descriptor::name).collect());
                let text = format!(
                    "{} has {} images that fit ({names}); choose with --oci-name or --platform",
                    blobs.name(),
                    several.len()
                );
                return Err(Error::Usage(text));
            }
        };
        if !chosen.is_index() {
            return Ok(chosen);
        }
        index = blobs.read(&chosen)?;
    }
    Err(Error::damaged(blobs.name(), "its indexes lead in a circle"))
}

fn list(mut names: Vec<String>) -> String {
    names.sort();
    names.dedup();
    match names.is_empty() {
        true => "none that has a name".to_owned(),
        false => names.join(", "),
    }
}

fn docker_layers(blobs: &Blobs, options: &OpenOptions<'_>) -> Result<Vec<Layer>> {
    let missing = || {
        Error::damaged(
            blobs.name(),
            "it has neither an index.json nor a manifest.json",
        )
    };
    let document = blobs.document("manifest.json")?.ok_or_else(missing)?;
    let mut images: Vec<DockerImage> = documents::parse(&document, &blobs.name(), "manifest.json")?;
    let names: Vec<String> = images.iter().flat_map(|image| image.tags()).collect();
    if let Some(name) = &options.oci_name {
        images.retain(|image| image.tags().iter().any(|tag| tag == name));
    }
    let image = match images.as_slice() {
        [image] => image,
        [] => {
            let text = format!(
                "{} has no image of this name, but {}",
                blobs.name(),
                list(names)
            );
            return Err(Error::Usage(text));
        }
        several => {
            let text = format!(
                "{} has {} images ({}); choose with --oci-name",
                blobs.name(),
                several.len(),
                list(names)
            );
            return Err(Error::Usage(text));
        }
    };
    let config = blobs
        .document(&image.config)?
        .ok_or_else(|| Error::damaged(blobs.name(), format!("{:?} is not in it", image.config)))?;
    // The configuration's name is its digest, in one form or another.
    let named = image.config.trim_end_matches(".json").rsplit('/').next();
    if let Some(digest) = named.filter(|name| name.len() == 64) {
        check(
            &format!("sha256:{digest}"),
            &Sha256::digest(&config),
            &image.config,
            &blobs.name(),
        )?;
    }
    let config: Config = documents::parse(&config, &blobs.name(), &image.config)?;
    if config.rootfs.diff_ids.len() != image.layers.len() {
        let why = "its manifest and its configuration list different numbers of layers";
        return Err(Error::damaged(blobs.name(), why));
    }
    let layers = image.layers.iter().zip(config.rootfs.diff_ids);
    layers
        .map(|(path, unpacked)| {
            Ok(Layer {
                input: blobs.file(path)?,
                stored: None,
                unpacked,
            })
        })
        .collect()
}

/// A layer as a tar archive that can be read anywhere, with its digests compared.
fn open_layer(layer: &Layer, options: &OpenOptions<'_>, left: &mut u64) -> Result<Input> {
    let name = &layer.input.name;
    let watch = &options.watch;
    if let Some(stored) = &layer.stored {
        let mut hash = HashReader::new(layer.input.sequential());
        let mut reader = |buffer: &mut [u8]| hash.read(buffer);
        drain(&mut reader, name, watch, layer.input.bytes.len())?;
        check(stored, &hash.hash.finalize(), "it", name)?;
    }
    let head = layer.input.head(16)?;
    let Some(compression) = Compression::detect(&head) else {
        if layer.stored.as_ref() != Some(&layer.unpacked) {
            let mut hash = HashReader::new(layer.input.sequential());
            let mut reader = |buffer: &mut [u8]| hash.read(buffer);
            drain(&mut reader, name, watch, layer.input.bytes.len())?;
            check(&layer.unpacked, &hash.hash.finalize(), "it", name)?;
        }
        return Ok(layer.input.clone());
    };
    let mut spool = Spool::new(options.temporary)?;
    let mut hash = HashReader::new(compression.unpack(&layer.input)?);
    spool.fill(&mut hash, name, *left, None, watch)?;
    *left = left.saturating_sub(spool.len());
    check(&layer.unpacked, &hash.hash.finalize(), "unpacked, it", name)?;
    Ok(Input {
        name: name.clone(),
        bytes: Arc::new(spool),
    })
}

fn drain(
    read: &mut dyn FnMut(&mut [u8]) -> io::Result<usize>,
    name: &str,
    watch: &crate::open::Watch<'_>,
    total: u64,
) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        watch.check()?;
        match read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => done += len as u64,
            Err(error) => return Err(Error::io(format!("read {name}"), error)),
        }
        watch.step("checking", done, Some(total));
    }
}

/// Compares a digest with the one in a document.
fn check(expected: &str, found: &[u8], what: &str, name: &str) -> Result<()> {
    let Some(digits) = expected.strip_prefix("sha256:") else {
        let why = format!("it names content by {expected:?}; only sha256 is known");
        return Err(Error::unsupported(name, why));
    };
    let found = hex(found);
    if digits != found {
        let why = format!("{what} has the digest {found}, and should have {digits}");
        return Err(Error::damaged(name, why));
    }
    Ok(())
}

/// Hashes what is read through it.
struct HashReader<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> HashReader<R> {
    fn new(inner: R) -> Self {
        HashReader {
            inner,
            hash: Sha256::new(),
        }
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..len).unwrap_or_default());
        Ok(len)
    }
}

/// The digest of a small document.
fn digest_of(bytes: &dyn ReadAt) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut content = vec![0; bytes.len() as usize];
    bytes.read_at(0, &mut content)?;
    let digest = Sha256::digest(&content).to_vec();
    Ok((content, digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms() {
        let arm: Platform = "linux/arm/v7".parse().unwrap();
        assert_eq!(arm.to_string(), "linux/arm/v7");
        assert_eq!(arm.variant.as_deref(), Some("v7"));
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "li nux/x"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
