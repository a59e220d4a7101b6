// SPDX-License-Identifier: GPL-2.0

//! Helpers of the store tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pristine_store::sealed::{
    put_key, seal_image, Identities, Identity, Keyring, SealedStore, StoreKey,
};
use pristine_store::{
    publish, BlockSink, CancelToken, FetchOptions, HttpOptions, HttpStore, ImageReader,
    ImageSelector, PublishOptions, Published, Result, RetryPolicy, Store,
};
use pristine_testkit::TEST_IDENTITY;

/// Three attempts, and no waiting to speak of.
pub fn quick() -> RetryPolicy {
    RetryPolicy {
        attempts: 3,
        first_delay: Duration::from_millis(1),
        max_delay: Duration::from_millis(2),
    }
}

pub fn options() -> FetchOptions {
    FetchOptions {
        retry: quick(),
        ..FetchOptions::default()
    }
}

pub fn http(url: &str) -> Arc<dyn Store> {
    http_until(url, CancelToken::new())
}

/// A store whose requests end when `cancel` is.
pub fn http_until(url: &str, cancel: CancelToken) -> Arc<dyn Store> {
    let options = HttpOptions {
        connect_timeout: Duration::from_secs(2),
        read_timeout: Duration::from_millis(700),
        cancel,
        ..HttpOptions::default()
    };
    Arc::new(HttpStore::open(url, options).unwrap())
}

pub fn open(store: Arc<dyn Store>, selector: &str) -> Result<ImageReader> {
    let selector: ImageSelector = selector.parse().unwrap();
    ImageReader::open(store, &selector, quick(), &CancelToken::new())
}

/// Publishes an image as it is, with the defaults.
pub fn publish_to(
    image: &ImageReader,
    target: &Arc<dyn Store>,
    channel: &str,
) -> Result<Published> {
    let options = PublishOptions {
        retry: quick(),
        ..PublishOptions::default()
    };
    let channel = channel.parse().unwrap();
    publish(image, target, &channel, &options, &|_, _| ())
}

/// The identity that images are encrypted to.
pub fn identity() -> Identity {
    TEST_IDENTITY.parse::<Identities>().unwrap().0.remove(0)
}

/// A store key that everybody knows.
pub fn key() -> StoreKey {
    StoreKey::from_bytes([0x42; 32])
}

/// A store as who has these identities sees it.
pub fn with(store: Arc<dyn Store>, identities: Vec<Identity>) -> Arc<dyn Store> {
    Arc::new(SealedStore::new(store, Arc::new(Keyring::new(identities))))
}

/// A store that encrypts what is put with `key`, which [`identity`] opens there.
pub fn sealing(store: Arc<dyn Store>, key: &StoreKey) -> Arc<dyn Store> {
    let recipient = identity().recipient();
    put_key(store.as_ref(), key, &[recipient]).unwrap();
    let names = vec![recipient.to_string()];
    Arc::new(SealedStore::sealing(store, key.clone(), names))
}

/// An image that is not encrypted, as it is once it is.
pub fn sealed(image: &ImageReader, key: &StoreKey) -> ImageReader {
    seal_image(image, key, &CancelToken::new()).unwrap()
}

/// The options with which a delta from the image before is made, quickly.
pub fn with_delta() -> PublishOptions {
    let mut options = PublishOptions::default();
    options.deltas.count = 1;
    options.deltas.make.level = 3;
    options
}

/// Changes a byte in each block of a range: a delta has little to say of that.
pub fn touch(image: &mut [u8], bytes: Range<usize>) {
    for at in bytes.step_by(4096) {
        image[at] ^= 0x5a;
    }
}

/// Takes blocks, and checks that each comes once.
pub struct Memory {
    blocks: Mutex<Vec<Option<Box<[u8]>>>>,
}

impl Memory {
    pub fn new(image: &ImageReader) -> Self {
        let blocks = vec![None; image.blocks() as usize];
        Memory {
            blocks: Mutex::new(blocks),
        }
    }

    fn put(&self, block: u64, data: &[u8]) {
        let mut blocks = self.blocks.lock().unwrap();
        let place = &mut blocks[block as usize];
        assert!(place.is_none(), "block {block} came twice");
        *place = Some(data.into());
    }

    /// Blocks that came.
    pub fn count(&self) -> usize {
        self.blocks.lock().unwrap().iter().flatten().count()
    }

    /// Checks that what came is right, and that exactly `wanted` came.
    pub fn check(&self, image: &[u8], wanted: &[Range<u64>]) {
        let blocks = self.blocks.lock().unwrap();
        for (number, (found, right)) in blocks.iter().zip(image.chunks(4096)).enumerate() {
            let is_wanted = wanted.iter().any(|range| range.contains(&(number as u64)));
            match found {
                Some(found) => assert!(is_wanted && found[..] == *right, "block {number}"),
                None => assert!(!is_wanted, "block {number} did not come"),
            }
        }
    }

    /// Checks that nothing wrong came.
    pub fn check_prefix(&self, image: &[u8]) {
        let blocks = self.blocks.lock().unwrap();
        for (number, (found, right)) in blocks.iter().zip(image.chunks(4096)).enumerate() {
            if let Some(found) = found {
                assert!(found[..] == *right, "block {number}");
            }
        }
    }
}

impl BlockSink for Memory {
    fn blocks(&self, first: u64, data: &[u8]) -> io::Result<()> {
        assert!(!data.is_empty() && data.len() % 4096 == 0);
        for (block, content) in (first..).zip(data.chunks(4096)) {
            self.put(block, content);
        }
        Ok(())
    }

    fn zeros(&self, blocks: Range<u64>) -> io::Result<()> {
        for block in blocks {
            self.put(block, &[0; 4096]);
        }
        Ok(())
    }
}
