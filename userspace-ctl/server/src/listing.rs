// SPDX-License-Identifier: GPL-2.0

//! What is in the store: names, one a line, of images or of channels.

use pristine_store::{DirStore, Error, Store};

/// A list that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum List {
    /// `images/`
    Images,
    /// `channels/`
    Channels,
}

impl List {
    pub(crate) fn read(self, store: &DirStore) -> Result<String, Error> {
        let lines: Vec<String> = match self {
            List::Images => {
                let ids = store.images()?;
                ids.iter().map(|id| format!("{id}.manifest\n")).collect()
            }
            List::Channels => {
                let names = store.channels()?;
                names.iter().map(|name| format!("{name}\n")).collect()
            }
        };
        Ok(lines.concat())
    }
}
