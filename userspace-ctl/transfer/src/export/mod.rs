// SPDX-License-Identifier: GPL-2.0

//! Writing an image out again, byte for byte: to a file, a block device or a stream.
//!
//! Blocks are fetched in parallel, and each is verified against the image id before it is written. A file is written
//! under a temporary name beside its own and renamed when all of it is durable. What an export that was cut left
//! there is compared with the image block by block, so that it goes on where it stopped and believes nothing.

mod file;
mod stream;

use std::path::Path;

use pristine_store::{FetchOptions, ImageReader};

use crate::error::{Error, Result};
use crate::open::Watch;

pub use file::{to_device, to_file};
pub use stream::{to_stream, to_zstd, to_zstd_stream};

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Bytes of the image.
    pub bytes: u64,
    /// Blocks that were fetched.
    pub fetched_blocks: u64,
    /// Blocks that are zero.
    pub zero_blocks: u64,
    /// Blocks that an export before this one, or a seed, had.
    pub kept_blocks: u64,
    /// Bytes received from the store.
    pub received_bytes: u64,
    /// Requests made to the store.
    pub requests: u64,
}

/// How to export.
#[derive(Clone)]
pub struct ExportOptions<'a> {
    /// How to fetch.
    pub fetch: FetchOptions,
    /// Whether a file that is there is replaced.
    pub replace: bool,
    /// Who watches.
    pub watch: Watch<'a>,
}

/// Exports to a file in another format of QEMU's, like qcow2.
///
/// # Errors
/// [`Error::Tool`] if there is no qemu-img or it fails, and as [`to_file`].
pub fn to_qemu(
    image: &ImageReader,
    output: &Path,
    format: &str,
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    if output.exists() && !options.replace {
        return Err(Error::Exists {
            what: output.display().to_string(),
        });
    }
    let directory = match output.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let place = tempfile::tempdir_in(directory)
        .map_err(|error| Error::io(format!("write to {}", directory.display()), error))?;
    let (raw, converted) = (place.path().join("raw"), place.path().join("converted"));
    let exported = to_file(image, &raw, options)?;
    options.watch.step("converting", 0, None);
    let result = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", format])
        .args([&raw, &converted])
        .output()
        .map_err(|error| Error::Tool {
            program: "qemu-img",
            why: format!("{error}; install it: apt-get install qemu-utils"),
        })?;
    if !result.status.success() {
        return Err(Error::Tool {
            program: "qemu-img",
            why: String::from_utf8_lossy(&result.stderr).trim().to_owned(),
        });
    }
    let write = |error| Error::io(format!("write {}", output.display()), error);
    let file = std::fs::File::open(&converted).map_err(write)?;
    file.sync_all().map_err(write)?;
    std::fs::rename(&converted, output).map_err(write)?;
    file::sync_directory(directory)?;
    Ok(exported)
}
