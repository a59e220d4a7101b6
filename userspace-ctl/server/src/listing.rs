// SPDX-License-Identifier: GPL-2.0

//! What is in the store: names, one a line, of images, of channels, or the generations of a channel.

use pristine_store::{ChannelName, Error, Store};

/// A list that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum List {
    /// `images/`
    Images,
    /// `channels/`
    Channels,
    /// `releases/<channel>/`
    Releases(ChannelName),
}

impl List {
    /// # Errors
    /// The store cannot be read, or cannot list.
    pub(crate) fn read(self, store: &dyn Store) -> Result<String, Error> {
        let lines: Vec<String> = match self {
            List::Images => {
                let ids = store.images()?;
                ids.iter().map(|id| format!("{id}.manifest\n")).collect()
            }
            List::Channels => {
                let names = store.channels()?;
                names.iter().map(|name| format!("{name}\n")).collect()
            }
            List::Releases(channel) => {
                let generations = store.releases(&channel)?;
                generations.iter().map(|g| format!("{g}\n")).collect()
            }
        };
        Ok(lines.concat())
    }
}
