// SPDX-License-Identifier: GPL-2.0

//! Exports to a stream, from the first byte to the last: for `dd`, `ssh` and compressors.
//!
//! Blocks come in any order, so the image is fetched in windows: while one is written, the next is fetched.

use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};

use pristine_image::BLOCK_SIZE;
use pristine_store::{BlockSink, ImageReader};

use super::{ExportOptions, Exported};
use crate::error::{Error, Result};

/// Blocks in a window: 32 MiB. Three windows are in memory at most.
const WINDOW: u64 = 8192;

/// Exports to a stream.
///
/// # Errors
/// Those of the stream, and what can go wrong with the store.
pub fn to_stream(
    image: &ImageReader,
    out: &mut (dyn Write + Send),
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    let mut exported = Exported {
        bytes: image.size(),
        ..Exported::default()
    };
    let (windows, received) = sync_channel::<Vec<u8>>(1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || -> io::Result<()> {
            for window in received {
                out.write_all(&window)?;
            }
            out.flush()
        });
        let mut fetched = Ok(());
        let mut first = 0;
        while first < image.blocks() {
            let end = (first + WINDOW).min(image.blocks());
            let window = match fetch_window(image, first..end, options, &mut exported) {
                Ok(window) => window,
                Err(error) => {
                    fetched = Err(error);
                    break;
                }
            };
            if windows.send(window).is_err() {
                // The writer has failed, and says why.
                break;
            }
            first = end;
            let done = end * BLOCK_SIZE as u64;
            options.watch.step("exporting", done, Some(image.size()));
        }
        drop(windows);
        let written = writer
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the writer died")));
        fetched?;
        written.map_err(|error| Error::io("write the stream", error))
    })?;
    Ok(exported)
}

/// Exports to a stream that is compressed with zstd, at a level from 1 to 19.
///
/// # Errors
/// As [`to_stream`].
pub fn to_zstd_stream(
    image: &ImageReader,
    out: &mut (dyn Write + Send),
    level: i32,
    options: &ExportOptions<'_>,
) -> Result<Exported> {
    let write = |error: io::Error| Error::io("write the stream", error);
    let mut encoder = zstd::stream::Encoder::new(out, level).map_err(write)?;
    encoder.include_checksum(true).map_err(write)?;
    encoder.include_contentsize(true).map_err(write)?;
    encoder
        .set_pledged_src_size(Some(image.size()))
        .map_err(write)?;
    let exported = to_stream(image, &mut encoder, options)?;
    encoder
        .finish()
        .and_then(|out| out.flush())
        .map_err(write)?;
    Ok(exported)
}

/// Exports to a file that is compressed with zstd, at a level from 1 to 19.
///
/// # Errors
/// [`Error::Exists`] unless it may be replaced, and as [`to_stream`].
pub fn to_zstd(
    image: &ImageReader,
    output: &Path,
    level: i32,
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
    let write = |error: io::Error| Error::io(format!("write {}", output.display()), error);
    let file = tempfile::NamedTempFile::new_in(directory).map_err(write)?;
    let exported = to_zstd_stream(image, &mut file.as_file(), level, options)?;
    file.as_file().sync_all().map_err(write)?;
    // As any new file, not as private as a temporary one.
    let path = file.into_temp_path();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&path, mode).map_err(write)?;
    path.persist(output).map_err(|error| write(error.error))?;
    super::file::sync_directory(directory)?;
    Ok(exported)
}

fn fetch_window(
    image: &ImageReader,
    blocks: Range<u64>,
    options: &ExportOptions<'_>,
    exported: &mut Exported,
) -> Result<Vec<u8>> {
    let window = Window {
        first: blocks.start,
        bytes: Mutex::new(vec![0; (blocks.end - blocks.start) as usize * BLOCK_SIZE]),
    };
    let report = image.fetch([blocks], &options.fetch, &window)?;
    exported.fetched_blocks += report.blocks;
    exported.zero_blocks += report.zero_blocks;
    exported.received_bytes += report.bytes;
    exported.requests += report.requests;
    let bytes = window.bytes.into_inner();
    Ok(bytes.unwrap_or_else(PoisonError::into_inner))
}

struct Window {
    first: u64,
    bytes: Mutex<Vec<u8>>,
}

impl BlockSink for Window {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let start = (first - self.first) as usize * BLOCK_SIZE;
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        match bytes.get_mut(start..start + data.len()) {
            Some(place) => place.copy_from_slice(data),
            None => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }

    fn zeros(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }
}
