// SPDX-License-Identifier: GPL-2.0

//! From the generation that a device has to the one that its channel is at: whether to go there, and what changes by it.

use std::ops::Range;
use std::sync::Arc;

use pristine_image::DIGESTS_PER_PAGE;

use crate::{
    read_release, CancelToken, ChannelName, Error, ErrorKind, ImageId, ImageReader, ImageSelector,
    Release, Result, RetryPolicy, Store, TrustError, TrustPolicy,
};

/// What a channel, or whoever names an image, says about the image that a device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It is the one.
    Current,
    /// There is another one.
    Moved,
    /// The channel names an older generation, this one, which is not followed.
    Older(u64),
}

/// How a channel's generation and image compare with a device's. Generation 0 means that no channel was asked, and counts
/// as no older one.
pub fn news(channel: (u64, &[u8; 32]), device: (u64, &[u8; 32]), allow_older: bool) -> News {
    match channel.0 {
        0 if channel.1 == device.1 => News::Current,
        generation if generation != 0 && generation < device.0 && !allow_older => {
            News::Older(generation)
        }
        _ if channel == device => News::Current,
        _ => News::Moved,
    }
}

/// Whether a device may go back to `release`, as far as the release allows that the device has (generation and image), if
/// that can still be found: `oldest` in it says how far back anybody may go.
///
/// # Errors
///
/// [`Error::Untrusted`], or the store does not serve.
pub fn may_go_back(
    store: &dyn Store,
    channel: &ChannelName,
    trust: &TrustPolicy,
    device: (u64, &[u8; 32]),
    release: &Release,
) -> Result<()> {
    if trust.keys.is_empty() || release.generation >= device.0 {
        return Ok(());
    }
    let had = match read_release(store, channel, device.0) {
        Ok(had) => had,
        // The device followed another channel, or the store was set up anew.
        Err(Error::NotFound { .. } | Error::Pointer { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    // It may have expired since, and still says what it says.
    let then = TrustPolicy {
        clock: Some(0),
        not_before: 0,
        oldest: 0,
        ..trust.clone()
    };
    let of_device = had.release().image.as_bytes() == device.1;
    if !of_device || had.check(&then, store.location()).is_err() {
        return Ok(());
    }
    match had.release().oldest {
        Some(oldest) if oldest > release.generation => Err(Error::Untrusted {
            location: store.location().to_owned(),
            channel: channel.clone(),
            generation: release.generation,
            error: TrustError::TooOld {
                generation: release.generation,
                oldest,
            },
        }),
        _ => Ok(()),
    }
}

/// The modified list from `old` to `new`: the blocks (of 4 KiB) whose content differs, in order, joined where they meet; blocks
/// beyond the end of either image differ. `None` if the store of `new` does not have the old image any more.
///
/// It comes from the manifests of both images, of which the pages are read whose hashes differ; never from a delta,
/// though that is smaller. A delta's list of blocks has no proof of its own: a block that it wrongly leaves out would be called
/// clean and served wrong.
///
/// # Errors
///
/// The store does not serve.
pub fn modified(
    old: ImageId,
    new: &ImageReader,
    retry: RetryPolicy,
    cancel: &CancelToken,
) -> Result<Option<Vec<Range<u64>>>> {
    let store: Arc<dyn Store> = new.shared_store();
    match ImageReader::open(store, &ImageSelector::Id(old), retry, cancel) {
        Ok(old) => differing(&old, new).map(Some),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Damaged) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The blocks that differ between two images; pages with the same hash are not read.
fn differing(old: &ImageReader, new: &ImageReader) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let (old_manifest, new_manifest) = (old.manifest(), new.manifest());
    let digests = |image: &ImageReader, page: u64| -> Result<Vec<_>> {
        if page >= image.manifest().pages() {
            return Ok(Vec::new());
        }
        let page = image.page(page)?;
        Ok(page.blocks().map(|block| block.digest).collect())
    };
    for page in 0..old_manifest.pages().max(new_manifest.pages()) {
        // The hash of a page stands for its length as well.
        if old_manifest.page_hash(page) == new_manifest.page_hash(page) {
            continue;
        }
        let (before, after) = (digests(old, page)?, digests(new, page)?);
        let first = page * DIGESTS_PER_PAGE as u64;
        for index in 0..before.len().max(after.len()) {
            if before.get(index) == after.get(index) {
                continue;
            }
            let block = first + index as u64;
            match runs.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_generation_is_no_news() {
        let (old, new) = ([1; 32], [2; 32]);
        assert_eq!(news((5, &old), (5, &old), false), News::Current);
        assert_eq!(news((6, &new), (5, &old), false), News::Moved);
        assert_eq!(news((6, &old), (5, &old), false), News::Moved);
        assert_eq!(news((4, &old), (5, &new), false), News::Older(4));
        assert_eq!(news((4, &new), (5, &new), false), News::Older(4));
        assert_eq!(news((4, &old), (5, &new), true), News::Moved);
        // The device was filled by an image's id, and is to follow a channel now.
        assert_eq!(news((1, &new), (0, &old), false), News::Moved);
        // An image that is asked for by its id has no generation.
        assert_eq!(news((0, &old), (5, &old), false), News::Current);
        assert_eq!(news((0, &old), (5, &new), false), News::Moved);
    }
}
