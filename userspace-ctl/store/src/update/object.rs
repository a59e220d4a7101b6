// SPDX-License-Identifier: GPL-2.0

//! A delta in a store: its map, and its frames as a stream.

use std::ops::Range;
use std::sync::mpsc::SyncSender;

use pristine_image::delta::{Delta, DeltaHead};
use pristine_image::{FormatError, ImageId};

use crate::error::{Error, Result};
use crate::object::ObjectName;
use crate::retry::{CancelToken, RetryPolicy};
use crate::store::Store;

/// Read at first: head and map of most deltas.
const FIRST_READ: u64 = 64 << 10;
/// Frames are asked for in requests of about so many bytes.
const REQUEST: u64 = 1 << 20;

/// A delta in a store whose map is read and proved.
#[derive(Debug)]
pub struct StoredDelta {
    object: ObjectName,
    delta: Delta,
    /// Frames that came with the map: the first bytes of the object.
    start: Vec<u8>,
}

impl StoredDelta {
    /// Opens the delta from `old` to `new`; `None` if the store has none.
    ///
    /// # Errors
    /// [`Error::Format`] for one that is damaged, newer or of other images, and what can go wrong on the way.
    pub fn open(
        store: &dyn Store,
        old: &ImageId,
        new: &ImageId,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Option<Self>> {
        let object = ObjectName::Delta {
            new: *new,
            old: *old,
        };
        let worth = |error: &Error| error.is_transient() || error.is_corruption();
        match retry.run(cancel, worth, || {
            read_map(store, object, old, new).inspect_err(|error| {
                if error.is_corruption() {
                    store.was_wrong(error);
                }
            })
        }) {
            Ok((delta, start)) => Ok(Some(StoredDelta {
                object,
                delta,
                start,
            })),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The map.
    pub fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Bytes of the whole delta.
    pub fn len(&self) -> u64 {
        self.delta.head().file_len
    }

    /// Whether it is empty, which none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that are not read yet.
    pub(super) fn bytes_to_fetch(&self) -> u64 {
        self.len().saturating_sub(self.start.len() as u64)
    }

    /// Reads a part, as far as it did not come with the map.
    fn read(
        &self,
        store: &dyn Store,
        range: Range<u64>,
        retry: RetryPolicy,
        cancel: &CancelToken,
    ) -> Result<Vec<u8>> {
        let have = (self.start.len() as u64).clamp(range.start, range.end);
        let here = self.start.get(range.start as usize..have as usize);
        let mut bytes = here.unwrap_or_default().to_vec();
        if have < range.end {
            let rest = || store.get_range(&self.object, have..range.end);
            bytes.extend(retry.run(cancel, Error::is_transient, rest)?);
        }
        Ok(bytes)
    }

    /// Sends frames, in order, to `to`; ends early when nobody listens there any more.
    pub(super) fn send(
        &self,
        store: &dyn Store,
        wanted: &[usize],
        retry: RetryPolicy,
        cancel: &CancelToken,
        to: &SyncSender<Result<(usize, Vec<u8>)>>,
    ) {
        let frames = self.delta.frames();
        let range = |index: usize| {
            frames[index].offset..frames[index].offset + u64::from(frames[index].len)
        };
        let mut rest = wanted;
        while let Some((&first, _)) = rest.split_first() {
            let begin = range(first).start;
            // Frames that lie side by side, up to a request's size.
            let count = rest
                .iter()
                .zip(first..)
                .take_while(|&(&index, expected)| {
                    index == expected && (index == first || range(index).end - begin <= REQUEST)
                })
                .count();
            let end = range(first + count - 1).end;
            let bytes = match self.read(store, begin..end, retry, cancel) {
                Ok(bytes) => bytes,
                Err(error) => {
                    // Nobody listens if the other side failed first.
                    let _ = to.send(Err(error));
                    return;
                }
            };
            for &index in &rest[..count] {
                let Range { start, end } = range(index);
                let frame = bytes.get((start - begin) as usize..(end - begin) as usize);
                if to
                    .send(Ok((index, frame.unwrap_or_default().to_vec())))
                    .is_err()
                {
                    return;
                }
            }
            rest = &rest[count..];
        }
    }
}

fn read_map(
    store: &dyn Store,
    object: ObjectName,
    old: &ImageId,
    new: &ImageId,
) -> Result<(Delta, Vec<u8>)> {
    let format = |error| Error::format(store.location(), &object, error);
    let mut start = store.get_start(&object, FIRST_READ)?;
    let head = DeltaHead::parse(&start).map_err(format)?;
    for (&expected, found) in [(old, head.old), (new, head.new)] {
        if expected != found {
            return Err(format(FormatError::WrongImage { expected, found }));
        }
    }
    let map = head.map_range();
    let have = start.len() as u64;
    if have < map.end {
        start.extend(store.get_range(&object, have..map.end)?);
    }
    let stored = start
        .get(map.start as usize..map.end as usize)
        .unwrap_or_default();
    let delta = Delta::parse(head, stored).map_err(format)?;
    Ok((delta, start))
}
