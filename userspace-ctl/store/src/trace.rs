// SPDX-License-Identifier: GPL-2.0

//! Boot traces in stores: one machine's boot tells all others what to fetch first.
//!
//! A trace is a hint that nothing depends on, see [`pristine_image::trace`]. It goes with its image when garbage is
//! collected, and the next generation of a channel inherits its order when that is published.

use std::ops::Range;

use pristine_image::{trace, ImageId};

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::store::{Put, Store};

/// The trace of an image: runs of its blocks, in the order in which to fetch them. `None` if there is none.
///
/// # Errors
/// [`Error::Format`] for garbage, [`Error::TooLarge`], and what can go wrong with the store.
pub fn read_trace(store: &dyn Store, image: ImageId) -> Result<Option<Vec<Range<u64>>>> {
    let object = ObjectName::Trace(image);
    let bytes = match store.get(&object, trace::MAX_BYTES) {
        Ok(bytes) => bytes,
        Err(Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let runs = trace::parse(&bytes, &image);
    let runs = runs.map_err(|error| Error::format(store.location(), &object, error))?;
    Ok(Some(runs))
}

/// Puts the trace of an image into a store, unless it has one.
///
/// # Errors
/// What can go wrong with the store.
pub fn put_trace(store: &dyn Store, image: ImageId, runs: &[Range<u64>]) -> Result<Put> {
    store.put(&ObjectName::Trace(image), &trace::format(&image, runs))
}

/// Gives an image that is about to be a channel's next generation the trace of the one before, unless it has one.
/// Gives the number of runs that it has from there, 0 if there are none.
///
/// # Errors
/// What can go wrong with the store. A trace or an old image that is damaged is as good as none.
#[cfg(feature = "build")]
pub fn inherit_trace(
    store: &std::sync::Arc<dyn Store>,
    channel: &crate::object::ChannelName,
    new: &crate::reader::ImageReader,
    retry: crate::retry::RetryPolicy,
    cancel: &crate::retry::CancelToken,
) -> Result<u64> {
    use crate::reader::{ImageReader, ImageSelector};
    use crate::update::ReaderDigests;

    let image = new.image();
    if store.size(&ObjectName::Trace(image))?.is_some() {
        return Ok(0);
    }
    let Some(old) = crate::delta::last_images(store.as_ref(), channel, image, 1)?.pop() else {
        return Ok(0);
    };
    let inherited = (|| {
        let Some(runs) = read_trace(store.as_ref(), old)? else {
            return Ok(Vec::new());
        };
        let selector = ImageSelector::Id(old);
        let old = ImageReader::open(std::sync::Arc::clone(store), &selector, retry, cancel)?;
        trace::inherit(&runs, &ReaderDigests(&old), &ReaderDigests(new)).map_err(|error| {
            error.or(|error| Error::format(store.location(), &ObjectName::Manifest(image), error))
        })
    })();
    let runs = match inherited {
        Ok(runs) => runs,
        Err(Error::NoImage { .. } | Error::NoKey { .. } | Error::TooLarge { .. }) => return Ok(0),
        Err(error) if error.is_corruption() => return Ok(0),
        Err(error) => return Err(error),
    };
    if runs.is_empty() {
        return Ok(0);
    }
    put_trace(store.as_ref(), image, &runs)?;
    Ok(runs.len() as u64)
}
