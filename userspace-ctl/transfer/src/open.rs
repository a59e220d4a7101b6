// SPDX-License-Identifier: GPL-2.0

//! Opening a source, whatever its format: it is known by its first bytes, never by its name.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use pristine_image::{RawFile, ReadAt, Source};
use pristine_store::{CancelToken, RetryPolicy};

use crate::casync::{self, CaibxIndex, CasyncImage};
use crate::error::{Error, Result};
use crate::http::{is_url, HttpClient, HttpFile};
use crate::input::{Cached, Input, Sequential};
use crate::oci::{self, Platform};
use crate::qcow2::{self, Qcow2Image};
use crate::spool::{default_limit, Spool};
use crate::stream::Compression;
use crate::tree::{Tree, TreeBuilder};
use crate::xz::{XzImage, XzIndex, MAX_BLOCK};

/// Formats within formats: `.tar` in `.gz`, and one more.
const MAX_LAYERS: u32 = 2;
/// Bytes by which formats are known.
const HEAD: u64 = 4096;

/// Who watches a long operation, and may end it.
#[derive(Clone)]
pub struct Watch<'a> {
    /// Gets what is being done, how many bytes of it are, and of how many if that is known.
    pub progress: &'a (dyn Fn(&str, u64, Option<u64>) + Sync),
    /// Ends it.
    pub cancel: CancelToken,
}

impl Watch<'_> {
    pub(crate) fn step(&self, what: &str, done: u64, total: Option<u64>) {
        (self.progress)(what, done, total);
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self.cancel.is_cancelled() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

/// A format that a source is said to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of a disk, as they are.
    Raw,
    /// qcow2.
    Qcow2,
    /// A tar archive of a root file system.
    Tar,
    /// A container image, as an OCI layout or as `docker save` writes it.
    Oci,
    /// An index of casync.
    Caibx,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Ok(match text {
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            "tar" => Format::Tar,
            "oci" => Format::Oci,
            "caibx" => Format::Caibx,
            _ => return Err("give raw, qcow2, tar, oci or caibx".to_owned()),
        })
    }
}

/// How to open a source.
pub struct OpenOptions<'a> {
    /// A directory for temporary files, on a file system with room for what must be unpacked.
    pub temporary: &'a Path,
    /// The most bytes that the source may unpack to; `None` for what is free where temporary files are.
    pub max_size: Option<u64>,
    /// The format of the source, or of what is in it if it is compressed; `None` to find out. A source that is said to
    /// be raw is not even unpacked.
    pub format: Option<Format>,
    /// Whether a qcow2 image may have other files read.
    pub follow_backing: bool,
    /// The chunks of a casync index: a directory or a URL; `None` for `default.castr` beside the index.
    pub chunk_store: Option<String>,
    /// Which image to take of an OCI image for several platforms; `None` for this machine's.
    pub platform: Option<Platform>,
    /// Which image to take, by name, of several in an OCI layout or archive.
    pub oci_name: Option<String>,
    /// Refuse a source that cannot be read by range, rather than unpack it.
    pub by_range: bool,
    /// How often to try again what fails in the network.
    pub retry: RetryPolicy,
    /// Who watches.
    pub watch: Watch<'a>,
}

impl OpenOptions<'_> {
    /// The limit for what is unpacked.
    pub(crate) fn limit(&self) -> Result<u64> {
        match self.max_size {
            Some(limit) => Ok(limit),
            None => default_limit(self.temporary),
        }
    }
}

/// An open source.
#[derive(Debug)]
pub struct Opened {
    /// Its content.
    pub content: Content,
    /// What it is, from the outside in: `["xz, 60 blocks", "raw"]`.
    pub formats: Vec<String>,
    /// What the user should know, like what could not be kept.
    pub notes: Vec<String>,
}

/// What a source holds.
#[derive(Debug)]
pub enum Content {
    /// A whole disk.
    Disk(Source),
    /// A directory on this machine.
    Directory(PathBuf),
    /// The files of an archive.
    Tree(Tree),
}

/// Opens a file, a block device, a directory or a URL.
///
/// # Errors
/// [`Error`]: what cannot be opened or read, is damaged, unknown, larger than allowed, or up to something.
pub fn open(location: &str, options: &OpenOptions<'_>) -> Result<Opened> {
    let mut opener = Opener {
        location,
        options,
        formats: Vec::new(),
        notes: Vec::new(),
    };
    let content = opener.open()?;
    if let (Content::Disk(source), Some(limit)) = (&content, options.max_size) {
        if source.len() > limit {
            return Err(Error::TooLarge {
                what: location.to_owned(),
                limit,
            });
        }
    }
    Ok(Opened {
        content,
        formats: opener.formats,
        notes: opener.notes,
    })
}

/// Opens a disk that can be read by range as it is, without temporary files.
///
/// # Errors
/// As [`open`], and [`Error::Unsupported`] for a source that must be unpacked first.
pub(crate) fn open_by_range(
    location: &str,
    retry: RetryPolicy,
    watch: Watch<'_>,
) -> Result<Arc<dyn ReadAt>> {
    let options = OpenOptions {
        // Nothing is written to it.
        temporary: Path::new("/nonexistent"),
        max_size: None,
        format: None,
        follow_backing: false,
        chunk_store: None,
        platform: None,
        oci_name: None,
        by_range: true,
        retry,
        watch,
    };
    match open(location, &options)?.content {
        Content::Disk(source) => Ok(Arc::from(source.into_input())),
        _ => Err(Error::unsupported(
            location,
            "it is no disk, but an archive or a directory",
        )),
    }
}

struct Opener<'a> {
    location: &'a str,
    options: &'a OpenOptions<'a>,
    formats: Vec<String>,
    notes: Vec<String>,
}

/// Bytes that are being understood, and their path if they are a local file.
struct Layer {
    input: Input,
    path: Option<PathBuf>,
}

impl Opener<'_> {
    fn open(&mut self) -> Result<Content> {
        let mut layer = if is_url(self.location) {
            self.open_url()?
        } else {
            let path = Path::new(
                self.location
                    .strip_prefix("file://")
                    .unwrap_or(self.location),
            );
            let is_dir = path.metadata().is_ok_and(|metadata| metadata.is_dir());
            if is_dir && (self.options.format == Some(Format::Oci) || oci::is_layout(path)) {
                self.formats.push("OCI layout".to_owned());
                return self.oci(oci::Blobs::directory(path));
            }
            if is_dir {
                self.formats.push("directory".to_owned());
                return Ok(Content::Directory(path.to_owned()));
            }
            Layer {
                input: Input {
                    name: self.location.to_owned(),
                    bytes: Arc::new(RawFile::open(path)?),
                },
                path: Some(path.to_owned()),
            }
        };
        if self.options.format == Some(Format::Raw) {
            return Ok(self.disk(layer.input));
        }
        for _ in 0..MAX_LAYERS {
            let head = layer.input.head(HEAD)?;
            match Compression::detect(&head) {
                Some(compression) => layer = self.unpack(&layer.input, compression)?,
                None => break,
            }
        }
        self.understand(layer)
    }

    fn open_url(&mut self) -> Result<Layer> {
        let client = HttpClient::new(self.options.retry, &self.options.watch.cancel);
        let file = HttpFile::open(self.location, client)?;
        let name = self.location.to_owned();
        if file.has_ranges() {
            let bytes = Arc::new(file);
            let input = Input { name, bytes };
            return Ok(Layer { input, path: None });
        }
        if self.options.by_range {
            let why = "its server does not serve parts of files";
            return Err(Error::unsupported(name, why));
        }
        self.notes.push(format!(
            "the server of {name} does not serve parts of files: it was downloaded whole"
        ));
        let spool = Spool::new(self.options.temporary)?;
        let spool = file.download(spool, self.options.limit()?, &self.options.watch)?;
        let bytes = Arc::new(spool);
        let input = Input { name, bytes };
        Ok(Layer { input, path: None })
    }

    /// What a compressed input unpacks to: by range if its format allows it, else unpacked into a temporary file.
    fn unpack(&mut self, input: &Input, compression: Compression) -> Result<Layer> {
        let mut total = None;
        if compression == Compression::Xz {
            let index = XzIndex::read(input.bytes.as_ref(), &input.name)?;
            let blocks = index.blocks().len();
            self.formats.push(format!("xz, {blocks} blocks"));
            total = Some(index.len());
            if blocks > 1 && index.largest() <= MAX_BLOCK {
                let image = XzImage::new(Arc::clone(&input.bytes), index, &input.name)?;
                let input = Input {
                    name: input.name.clone(),
                    bytes: Arc::new(image),
                };
                return Ok(Layer { input, path: None });
            }
            let why = match blocks {
                0 | 1 => "has a single block".to_owned(),
                _ => format!("has a block of {} bytes", index.largest()),
            };
            self.notes.push(format!(
                "{} {why}, so no part of it can be read alone: it was unpacked whole. \
                 xz -T0 or xz --block-size=16MiB make files that are read by range",
                input.name
            ));
        } else {
            self.formats.push(compression.name().to_owned());
        }
        if self.options.by_range {
            let why = format!(
                "as {} it can only be unpacked whole; .xz of many blocks (xz -T0), qcow2 and raw disks are read by range",
                self.formats.join(", ")
            );
            return Err(Error::unsupported(&input.name, why));
        }
        let mut spool = Spool::new(self.options.temporary)?;
        let mut reader = compression.unpack(input)?;
        let limit = self.options.limit()?;
        spool.fill(&mut reader, &input.name, limit, total, &self.options.watch)?;
        let bytes = Arc::new(spool);
        let name = input.name.clone();
        let input = Input { name, bytes };
        Ok(Layer { input, path: None })
    }

    fn understand(&mut self, layer: Layer) -> Result<Content> {
        let head = layer.input.head(HEAD)?;
        let format = match self.options.format {
            Some(format) => format,
            None => detect(&layer.input, &head)?,
        };
        match format {
            Format::Raw => Ok(self.disk(layer.input)),
            Format::Qcow2 => self.qcow2(layer),
            Format::Caibx => self.casync(&layer.input),
            Format::Tar => self.tar(layer.input),
            Format::Oci => {
                self.formats.push("OCI archive".to_owned());
                let blobs = oci::Blobs::archive(layer.input)?;
                self.oci(blobs)
            }
        }
    }

    fn disk(&mut self, input: Input) -> Content {
        self.formats.push("raw".to_owned());
        Content::Disk(Source::new(input.name, Box::new(Shared(input.bytes))))
    }

    fn qcow2(&mut self, layer: Layer) -> Result<Content> {
        self.formats.push("qcow2".to_owned());
        let Layer { mut input, path } = layer;
        if path.is_none() {
            // Tables and compressed clusters are small; what lies around them is wanted next.
            input.bytes = Arc::new(Cached::new(input.bytes));
        }
        let name = input.name.clone();
        let follow = self.options.follow_backing;
        let image = Qcow2Image::open(input, path.as_deref(), follow)?;
        Ok(Content::Disk(Source::new(name, Box::new(image))))
    }

    fn casync(&mut self, input: &Input) -> Result<Content> {
        let index = CaibxIndex::read(input.bytes.as_ref(), &input.name)?;
        self.formats
            .push(format!("casync, {} chunks", index.chunks().len()));
        let store = match &self.options.chunk_store {
            Some(store) => store.clone(),
            None => casync::default_store(&input.name),
        };
        let client = HttpClient::new(self.options.retry, &self.options.watch.cancel);
        let image = CasyncImage::new(index, &store, client)?;
        Ok(Content::Disk(Source::new(&input.name, Box::new(image))))
    }

    fn tar(&mut self, input: Input) -> Result<Content> {
        self.formats.push("tar".to_owned());
        let limit = self.options.limit()?;
        let mut builder = TreeBuilder::new(limit);
        builder.apply(&input, false, &self.options.watch)?;
        Ok(self.tree(builder))
    }

    fn oci(&mut self, blobs: oci::Blobs) -> Result<Content> {
        let builder = oci::unpack(&blobs, self.options, &mut self.formats)?;
        Ok(self.tree(builder))
    }

    fn tree(&mut self, builder: TreeBuilder) -> Content {
        let (tree, notes) = builder.finish();
        self.notes.extend(notes);
        Content::Tree(tree)
    }
}

/// Knows a format that is not a compression.
fn detect(input: &Input, head: &[u8]) -> Result<Format> {
    if head.starts_with(qcow2::MAGIC) {
        return Ok(Format::Qcow2);
    }
    if CaibxIndex::detect(head) {
        return Ok(Format::Caibx);
    }
    if is_tar(head) {
        let archive = oci::is_archive(Sequential::new(Arc::clone(&input.bytes)));
        return Ok(if archive { Format::Oci } else { Format::Tar });
    }
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let other = [
        (at(0, b"KDMV") || at(0, b"# Disk DescriptorFile"), "VMDK"),
        (at(0, b"vhdxfile"), "VHDX"),
        (at(0, b"conectix"), "VHD"),
        (at(0x40, &[0x7f, 0x10, 0xda, 0xbe]), "VDI"),
        (at(0, b"QED\0"), "QED"),
    ];
    if let Some((_, name)) = other.iter().find(|(found, _)| *found) {
        let why =
            format!("it is a {name} image; convert it: qemu-img convert -O raw IMAGE disk.img");
        return Err(Error::unsupported(&input.name, why));
    }
    if at(0, b"BZh") || at(0, b"\x04\x22\x4d\x18") {
        let why = "it is compressed with bzip2 or lz4; unpack it first (xz, zstd and gzip are read as they are)";
        return Err(Error::unsupported(&input.name, why));
    }
    Ok(Format::Raw)
}

/// Whether these are the first bytes of a tar archive: a header of POSIX or GNU tar with the right checksum.
fn is_tar(head: &[u8]) -> bool {
    let Some(header) = head.get(..512) else {
        return false;
    };
    let sum: u64 = header.iter().map(|&byte| u64::from(byte)).sum();
    let own: u64 = header[148..156].iter().map(|&byte| u64::from(byte)).sum();
    let field = String::from_utf8_lossy(&header[148..156]);
    let digits = field.trim_matches(|c: char| c == '\0' || c == ' ');
    // The checksum counts itself as spaces.
    let expected = sum - own + 8 * u64::from(b' ');
    &header[257..262] == b"ustar" && u64::from_str_radix(digits, 8) == Ok(expected)
}

/// A disk that is read by several.
#[derive(Clone, Debug)]
pub struct Shared(pub Arc<dyn ReadAt>);

impl ReadAt for Shared {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn is_hole(&self, range: std::ops::Range<u64>) -> bool {
        self.0.is_hole(range)
    }

    fn prefetch(&self, ranges: &[std::ops::Range<u64>]) -> io::Result<()> {
        self.0.prefetch(ranges)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.0.is_unchanged()
    }
}
