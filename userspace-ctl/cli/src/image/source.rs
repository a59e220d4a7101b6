// SPDX-License-Identifier: GPL-2.0

//! Opening what an image is made from, of any format.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use indicatif::ProgressBar;
use pristine_image::ext4::{self, Ext4Error, Ext4Options};
use pristine_image::{BuildError, RawFile, ReadAt};
use pristine_store::{CancelToken, RetryPolicy};
use pristine_transfer::oci::Platform;
use pristine_transfer::{default_limit, Content, Error, Format, OpenOptions, Opened, Watch};

use super::parse_size;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// Options about the format of a source.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sources")]
pub struct SourceArgs {
    /// What the source is (within .xz, .zst or .gz): raw, qcow2, tar, oci or caibx; with raw it is not even unpacked
    /// [default: known by its first bytes]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// The most that a source may unpack to, like 20G [default: what is free where the output is, without 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_size: Option<u64>,
    /// Store no packs, but where the source is: its blocks are read from there, by range, whenever they are wanted. For a
    /// multi-block .xz, a qcow2 or a raw disk, behind a URL or at a path that stays
    #[arg(long)]
    pub reference: bool,
    /// Read the backing file that a qcow2 image names, and those that that names
    #[arg(long)]
    follow_backing: bool,
    /// The chunks of a .caibx: a directory or a URL [default: default.castr beside it]
    #[arg(long, value_name = "DIR|URL")]
    chunk_store: Option<String>,
    /// Which platform's image to take of a container image, like linux/arm64 [default: this machine's]
    #[arg(long, value_name = "OS/ARCH")]
    platform: Option<Platform>,
    /// Which image to take, by name, of several in an OCI layout or archive
    #[arg(long, value_name = "NAME")]
    oci_name: Option<String>,
    /// Size of the file system made from a tree or an archive, like 2G [default: leaves about a quarter free]
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Label of the file system made from a tree or an archive, at most 16 bytes
    #[arg(long, default_value = "pristine")]
    label: String,
    /// UUID of the file system made from a tree or an archive [default: made from the image's name]
    #[arg(long)]
    uuid: Option<String>,
}

/// A source that is ready to be read, and what must live as long.
pub struct Prepared {
    /// The disk.
    pub disk: Arc<dyn ReadAt>,
    /// What it is, from the outside in.
    pub formats: Vec<String>,
    temporary: Option<Temporary>,
}

impl Prepared {
    /// Ends it; temporary files go.
    pub fn close(self) {
        drop(self.temporary);
    }
}

/// Opens a source; `temporary` is a directory for temporary files.
pub fn prepare(
    location: &str,
    args: &SourceArgs,
    temporary: &Path,
    (name, time): (&str, u64),
    ui: &Ui,
) -> Outcome<Prepared> {
    let bar = ui.bytes_bar("opening", 0);
    let progress = |what: &str, done: u64, total: Option<u64>| show(&bar, what, done, total);
    let watch = Watch {
        progress: &progress,
        cancel: CancelToken::new(),
    };
    let opened = open(location, args, temporary, watch.clone());
    let opened = opened.inspect_err(|_| bar.finish_and_clear())?;
    for note in &opened.notes {
        ui.note(note);
    }
    let mut staging = None;
    let tree = match opened.content {
        Content::Disk(source) => {
            bar.finish_and_clear();
            return Ok(Prepared {
                disk: Arc::from(source.into_input()),
                formats: opened.formats,
                temporary: None,
            });
        }
        content if args.reference => {
            bar.finish_and_clear();
            drop(content);
            let what = format!("{location} is no disk: there is nothing to refer to");
            return Err(Failure::new(Code::Usage, what).hint("leave --reference out"));
        }
        Content::Directory(path) => path,
        Content::Tree(tree) => {
            let directory = tempfile::tempdir_in(temporary).map_err(|error| {
                Failure::io(format!("cannot write to {}", temporary.display()), &error)
            })?;
            let path = directory.path().join("tree");
            std::fs::create_dir(&path)
                .map_err(|error| Failure::io("cannot make a directory", &error))?;
            let staged = tree.stage(&path, &watch);
            staged.inspect_err(|_| bar.finish_and_clear())?;
            staging = Some(directory);
            path
        }
    };
    bar.finish_and_clear();
    let image = make_file_system(&tree, args, temporary, (name, time), ui, location)?;
    drop(staging);
    Ok(Prepared {
        disk: Arc::new(RawFile::open(&image.0).map_err(build_failure)?),
        formats: opened.formats,
        temporary: Some(image),
    })
}

fn open(location: &str, args: &SourceArgs, temporary: &Path, watch: Watch<'_>) -> Outcome<Opened> {
    let options = OpenOptions {
        temporary,
        max_size: args.max_size,
        format: args.format,
        follow_backing: args.follow_backing,
        chunk_store: args.chunk_store.clone(),
        platform: args.platform.clone(),
        oci_name: args.oci_name.clone(),
        by_range: args.reference,
        retry: RetryPolicy::default(),
        watch,
    };
    pristine_transfer::open(location, &options).map_err(|error| {
        let limited = matches!(error, Error::TooLarge { .. }) && args.max_size.is_none();
        let failure = Failure::from(error);
        match (limited, default_limit(temporary)) {
            (true, Ok(_)) => failure.hint(
                "the limit is what is free there; make room, or allow more with --max-size and TMPDIR or an output \
                 on a larger file system",
            ),
            _ => failure,
        }
    })
}

/// Shows progress of whatever is being done.
pub fn show(bar: &ProgressBar, what: &str, done: u64, total: Option<u64>) {
    if bar.prefix() != what {
        bar.set_prefix(what.to_owned());
    }
    bar.set_length(total.unwrap_or(done));
    bar.set_position(done);
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Io { what, error } => Failure::io(format!("cannot {what}"), &error),
            Error::Store(error) => error.into(),
            Error::Build(error) => build_failure(error),
            Error::Damaged { .. } | Error::Unsafe { .. } => Failure::new(Code::Damaged, text),
            Error::Unsupported { .. } => Failure::new(Code::Unsupported, text),
            Error::TooLarge { .. } => {
                Failure::new(Code::Denied, text).hint("allow more with --max-size, if you trust it")
            }
            Error::TooSmall { .. } => Failure::new(Code::TooSmall, text),
            Error::Exists { .. } => {
                Failure::new(Code::Exists, text).hint("--force replaces it when all is there")
            }
            Error::Busy { .. } => Failure::new(Code::Busy, text),
            Error::NotFound { .. } => Failure::new(Code::NotFound, text),
            Error::Usage(_) => Failure::new(Code::Usage, text),
            _ => Failure::new(Code::Failure, text),
        }
    }
}

/// The failure of a build.
pub fn build_failure(error: BuildError) -> Failure {
    let text = error.to_string();
    match error {
        BuildError::Open { path, error } => {
            Failure::io(format!("cannot open {}", path.display()), &error)
        }
        // What our own readers say names the source and the place.
        BuildError::Read { error, .. } => match pristine_transfer::from_io(error) {
            Ok(inner) => inner.into(),
            Err(_) => Failure::new(Code::Io, text),
        },
        BuildError::Survey { .. } => Failure::new(Code::Io, text),
        BuildError::InUse(_) => Failure::new(Code::Busy, text)
            .hint("unmount it, or make a snapshot and build from that"),
        BuildError::NotASource(_) => Failure::new(Code::Usage, text)
            .hint("give a disk image, a block device, an archive or a directory tree"),
        BuildError::Changed(_) => {
            Failure::new(Code::Busy, text).hint("stop what writes to it, and build again")
        }
        BuildError::Size { .. } => {
            Failure::new(Code::Usage, text).hint("--pad appends zeros up to the next whole block")
        }
        BuildError::Option(_) => Failure::new(Code::Usage, text),
        BuildError::Sink(error) => Failure::io("cannot store a pack", &error),
        _ => Failure::new(Code::Failure, text),
    }
}

/// A file that is gone when this is dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // At worst the store's own cleaning finds it.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn make_file_system(
    tree: &Path,
    args: &SourceArgs,
    directory: &Path,
    (name, time): (&str, u64),
    ui: &Ui,
    location: &str,
) -> Outcome<Temporary> {
    let output = directory.join(format!("ext4-{}.img", std::process::id()));
    let options = Ext4Options {
        size: args.size,
        uuid: args
            .uuid
            .clone()
            .unwrap_or_else(|| ext4::uuid_from_name(name)),
        label: args.label.clone(),
        time,
    };
    ui.note(format!("making an ext4 file system of {location}"));
    let temporary = Temporary(output.clone());
    ext4::make(tree, &output, &options).map_err(ext4_failure)?;
    Ok(temporary)
}

fn ext4_failure(error: Ext4Error) -> Failure {
    let text = error.to_string();
    match error {
        Ext4Error::Tree { path, error } => {
            Failure::io(format!("cannot read {}", path.display()), &error)
        }
        Ext4Error::Create { path, error } => {
            Failure::io(format!("cannot create {}", path.display()), &error)
        }
        Ext4Error::NoTool(_) => {
            Failure::new(Code::NotFound, text).hint("install it: apt-get install e2fsprogs")
        }
        Ext4Error::Option(_) => Failure::new(Code::Usage, text),
        _ => Failure::new(Code::Failure, text).hint("if it ran out of space, give a larger --size"),
    }
}
