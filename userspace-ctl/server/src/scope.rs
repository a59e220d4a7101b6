// SPDX-License-Identifier: GPL-2.0

//! What the readers of a channel may read: the images that its generations are, and the packs that these images need.
//!
//! It is worked out from the store: the channel's pointer and the releases before it name images, and the manifests of
//! these name packs. An object that is not known yet is a reason to look again, at most once a second.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pristine_store::history::read_release;
use pristine_store::{
    stored_image, CancelToken, ChannelName, Error, ImageId, ObjectName, PackId, RetryPolicy, Store,
};

use crate::source::{blocking, Source, Trouble};

/// How often a channel is looked at, at most.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// What all readers of a channel may read.
#[derive(Debug, Default)]
struct Scope {
    looked: Option<Instant>,
    /// Those that were looked at.
    generations: HashSet<u64>,
    images: HashSet<ImageId>,
    packs: HashSet<PackId>,
}

/// What belongs to each channel.
#[derive(Debug, Default)]
pub(crate) struct Scopes(Mutex<HashMap<ChannelName, Arc<tokio::sync::Mutex<Scope>>>>);

impl Scope {
    fn has(&self, object: &ObjectName) -> bool {
        match object {
            ObjectName::Manifest(image) => self.images.contains(image),
            ObjectName::Pack(pack) | ObjectName::Reference(pack) => self.packs.contains(pack),
            // Of the image that it leads from it tells no content.
            ObjectName::Delta { new, .. } => self.images.contains(new),
            ObjectName::Trace(image) => self.images.contains(image),
            // Of use to its recipient alone.
            ObjectName::Key { .. } => true,
            ObjectName::Release(_) => false,
        }
    }

    /// Takes up what the channel has become since.
    fn look(&mut self, store: &Arc<dyn Store>, channel: &ChannelName) -> Result<(), Error> {
        let Some((current, _)) = store.read_pointer(channel)? else {
            return Ok(());
        };
        let current = current.release();
        // A store that cannot list its releases knows the current one.
        let releases = match store.releases(channel) {
            Err(Error::Unsupported { .. }) => Vec::new(),
            releases => releases?,
        };
        for generation in releases {
            // Later ones are of publishers that are not done.
            if generation < current.generation && !self.generations.contains(&generation) {
                self.release(store, channel, generation)?;
                self.generations.insert(generation);
            }
        }
        if !self.generations.contains(&current.generation) {
            self.image(store, current.image)?;
            self.generations.insert(current.generation);
        }
        Ok(())
    }

    /// Takes up an older generation. What is gone or damaged must not hide the others.
    fn release(
        &mut self,
        store: &Arc<dyn Store>,
        channel: &ChannelName,
        generation: u64,
    ) -> Result<(), Error> {
        let read = read_release(store.as_ref(), channel, generation)
            .and_then(|signed| self.image(store, signed.release().image));
        match read {
            Err(error) if error.is_transient() => Err(error),
            _ => Ok(()),
        }
    }

    fn image(&mut self, store: &Arc<dyn Store>, image: ImageId) -> Result<(), Error> {
        if self.images.contains(&image) {
            return Ok(());
        }
        let (retry, cancel) = (RetryPolicy::once(), CancelToken::new());
        // Encrypted ones, too: no key is needed for it.
        let stored = stored_image(store, image, retry, &cancel)?;
        self.packs.extend(stored.packs.iter().map(|(id, _)| *id));
        self.images.insert(image);
        Ok(())
    }
}

impl Scopes {
    /// Whether an object belongs to a channel.
    pub(crate) async fn allows(
        &self,
        source: &Source,
        channel: &ChannelName,
        object: &ObjectName,
    ) -> Result<bool, Trouble> {
        let scope = {
            let mut scopes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(scopes.entry(channel.clone()).or_default())
        };
        // Who comes while another looks waits for what that finds.
        let mut scope = scope.lock_owned().await;
        if scope.has(object) {
            return Ok(true);
        }
        if scope.looked.is_some_and(|at| at.elapsed() < LOOK_TIME) {
            return Ok(false);
        }
        let (store, channel) = (Arc::clone(source.store()), channel.clone());
        let object = *object;
        let look = move || {
            let looked = scope.look(&store, &channel);
            scope.looked = Some(Instant::now());
            looked.map(|()| scope.has(&object))
        };
        Ok(blocking(look).await??)
    }
}
