// SPDX-License-Identifier: GPL-2.0

//! Making deltas between images in stores.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pristine_image::delta::compare;
use pristine_image::delta::make::{make, BlockVisitor, Content, MakeError, MakeOptions};
use pristine_image::{FormatError, BLOCK_SIZE};

use crate::error::{Error, Result};
use crate::fetch::{BlockSink, FetchOptions};
use crate::object::ObjectName;
use crate::reader::ImageReader;
use crate::retry::CancelToken;
use crate::store::{Put, Store};
use crate::update::ReaderDigests;

/// A delta that is in a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MadeDelta {
    /// Its length in bytes.
    pub bytes: u64,
    /// It was there before.
    pub present: bool,
}

/// Makes the delta from `old` to `new`, images in any stores, and puts it into `target`, unless it is there. `progress` gets
/// the new blocks that are done, of all.
///
/// # Errors
/// [`Error::Delta`], and what can go wrong with the stores.
pub fn put_delta(
    old: &ImageReader,
    new: &ImageReader,
    target: &dyn Store,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
) -> Result<MadeDelta> {
    let object = ObjectName::Delta {
        new: new.image(),
        old: old.image(),
    };
    if let Some(bytes) = target.size(&object)? {
        return Ok(MadeDelta {
            bytes,
            present: true,
        });
    }
    let delta = make_delta(old, new, options, progress, cancel)?;
    let put = target.put(&object, &delta)?;
    Ok(MadeDelta {
        bytes: delta.len() as u64,
        present: put == Put::AlreadyThere,
    })
}

/// Makes the delta from `old` to `new`; returns its bytes.
///
/// # Errors
/// As [`put_delta`].
pub fn make_delta(
    old: &ImageReader,
    new: &ImageReader,
    options: &MakeOptions,
    progress: &(dyn Fn(u64, u64) + Sync),
    cancel: &CancelToken,
) -> Result<Vec<u8>> {
    let format = |error: FormatError| {
        Error::format(
            new.store().location(),
            &ObjectName::Manifest(new.image()),
            error,
        )
    };
    let comparison =
        compare(&ReaderDigests(old), &ReaderDigests(new)).map_err(|error| error.or(format))?;
    let content = |reader| StoredContent { reader, cancel };
    let delta = make(
        &comparison,
        &content(old),
        old.manifest().frames().slots(),
        &content(new),
        options,
        progress,
        cancel.flag(),
    );
    delta.map_err(|error| match error {
        MakeError::Cancelled => Error::Cancelled,
        MakeError::Format(error) => format(error),
        error => Error::Delta {
            old: old.image(),
            new: new.image(),
            why: error.to_string(),
        },
    })
}

/// The content of an image in a store, verified like everything that is fetched.
struct StoredContent<'a> {
    reader: &'a ImageReader,
    cancel: &'a CancelToken,
}

impl StoredContent<'_> {
    fn fetch(
        &self,
        blocks: &[Range<u64>],
        parallel: usize,
        sink: &dyn BlockSink,
    ) -> io::Result<()> {
        let options = FetchOptions {
            parallel,
            cancel: self.cancel.clone(),
            ..FetchOptions::default()
        };
        let fetched = self.reader.fetch(blocks.iter().cloned(), &options, sink);
        fetched.map(|_| ()).map_err(io::Error::other)
    }
}

impl Content for StoredContent<'_> {
    fn read(&self, blocks: &[Range<u64>]) -> io::Result<Vec<u8>> {
        let mut places = Vec::with_capacity(blocks.len());
        let mut len = 0;
        for range in blocks {
            places.push((range.start, len));
            len += (range.end - range.start) as usize * BLOCK_SIZE;
        }
        let content = Mutex::new(vec![0; len]);
        let sink = Collect {
            places: &places,
            content: &content,
        };
        // One thread for each frame is at work already.
        self.fetch(blocks, 1, &sink)?;
        Ok(content.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn visit(&self, visit: &BlockVisitor<'_>) -> io::Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let all = 0..self.reader.blocks();
        self.fetch(std::slice::from_ref(&all), threads, &Visit(visit))
    }
}

/// Puts blocks where they belong in a buffer of ascending ranges; `places` has the first block of each, and where it lies.
struct Collect<'a> {
    places: &'a [(u64, usize)],
    content: &'a Mutex<Vec<u8>>,
}

impl BlockSink for Collect<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        for (block, data) in (first..).zip(data.chunks_exact(BLOCK_SIZE)) {
            let range = self.places.partition_point(|&(start, _)| start <= block);
            let place = range
                .checked_sub(1)
                .and_then(|range| self.places.get(range));
            let &(start, at) =
                place.ok_or_else(|| io::Error::other("a block that was not asked for"))?;
            let at = at + (block - start) as usize * BLOCK_SIZE;
            match content.get_mut(at..at + BLOCK_SIZE) {
                Some(into) => into.copy_from_slice(data),
                None => return Err(io::Error::other("a block that was not asked for")),
            }
        }
        Ok(())
    }

    fn zeros(&self, _: Range<u64>) -> io::Result<()> {
        // The buffer is zero.
        Ok(())
    }
}

struct Visit<'a>(&'a BlockVisitor<'a>);

impl BlockSink for Visit<'_> {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        (self.0)(first, data);
        Ok(())
    }

    fn zeros(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }
}
