// SPDX-License-Identifier: GPL-2.0

//! Images and stores for tests.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use pristine_image::{build, BuildOptions, ImageId, Source};
use pristine_store::sealed::{
    put_key, seal_image, Identities, Identity, Recipient, SealedStore, StoreKey,
};
use pristine_store::{
    publish, CancelToken, DirStore, ImageReader, ImageSelector, ObjectName, PublishOptions,
    RetryPolicy, Store, StorePacks,
};

/// What goes wrong in a fixture goes wrong in the test.
type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// An image of `mib` MiB (at least 4) with noise, repetitions, text and zeros.
pub fn sample_image(seed: u64, mib: usize) -> Vec<u8> {
    let len = mib.max(4) << 20;
    let mut image = noise(seed, len / 2);
    // The first block comes again, and a run of others.
    let again = image[..4096].to_vec();
    image.extend(again);
    image.extend_from_within(4096 * 9..4096 * 70);
    image.extend(vec![0; len / 4]);
    let text = format!("pristine {seed} ").into_bytes();
    image.extend(text.iter().cycle().take(64 << 10));
    image.extend(noise(seed + 1, 64 << 10));
    image.resize(len, 0);
    image
}

/// A store in a temporary directory, which goes with it.
#[derive(Debug)]
pub struct TestStore {
    directory: tempfile::TempDir,
}

impl TestStore {
    /// An empty store.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn new() -> Result<Self, Failed> {
        let directory = tempfile::tempdir()?;
        let store = TestStore { directory };
        DirStore::open_or_create(&store.root())?;
        Ok(store)
    }

    /// A store with one image on the channel `stable`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn with_image(image: &[u8]) -> Result<(Self, ImageId), Failed> {
        let store = TestStore::new()?;
        let id = store.add(image, "stable")?;
        Ok((store, id))
    }

    /// The store's directory.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("store")
    }

    /// Opens it.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(&self) -> Result<Arc<dyn Store>, Failed> {
        Ok(Arc::new(DirStore::open(&self.root())?))
    }

    /// Builds an image, in packs of 1 MiB, and publishes it to a channel.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn add(&self, image: &[u8], channel: &str) -> Result<ImageId, Failed> {
        let id = build_into(&self.root(), image)?;
        let store = self.open()?;
        let cancel = CancelToken::new();
        let retry = RetryPolicy::once();
        let selector = ImageSelector::Id(id);
        let reader = ImageReader::open(Arc::clone(&store), &selector, retry, &cancel)?;
        let options = PublishOptions::default();
        publish(&reader, &store, &channel.parse()?, &options, &|_, _| ())?;
        Ok(id)
    }
}

/// The text of an identity that tests use: that of age's own test vectors.
pub const TEST_IDENTITY: &str =
    "AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6\n";

impl TestStore {
    /// Builds an image and publishes it to a channel, encrypted to [`TEST_IDENTITY`], with the same store key each time.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn add_encrypted(&self, image: &[u8], channel: &str) -> Result<ImageId, Failed> {
        let plain = TestStore::with_image(image)?;
        let cancel = CancelToken::new();
        let (retry, selector) = (RetryPolicy::once(), ImageSelector::Id(plain.1));
        let reader = ImageReader::open(plain.0.open()?, &selector, retry, &cancel)?;
        let key = StoreKey::from_bytes([0x42; 32]);
        let identities: Identities = TEST_IDENTITY.parse()?;
        let recipients: Vec<Recipient> = identities.0.iter().map(Identity::recipient).collect();
        let store = self.open()?;
        put_key(store.as_ref(), &key, &recipients)?;
        let sealed = seal_image(&reader, &key, &cancel)?;
        let names = recipients.iter().map(ToString::to_string).collect();
        let target: Arc<dyn Store> = Arc::new(SealedStore::sealing(store, key, names));
        let mut options = PublishOptions::default();
        options.deltas.count = 1;
        options.deltas.make.level = 3;
        publish(&sealed, &target, &channel.parse()?, &options, &|_, _| ())?;
        Ok(sealed.image())
    }
}

fn build_into(root: &Path, image: &[u8]) -> Result<ImageId, Failed> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), image)?;
    let source = Source::open(file.path())?;
    let store = DirStore::open_or_create(root)?;
    let options = BuildOptions {
        level: 1,
        pack_target: 1 << 20,
        ..BuildOptions::default()
    };
    let mut packs = StorePacks(&store);
    let cancel = AtomicBool::new(false);
    let built = build(&source, &options, &mut packs, &|_| (), &cancel)?;
    store.put(&ObjectName::Manifest(built.image), &built.manifest)?;
    Ok(built.image)
}
