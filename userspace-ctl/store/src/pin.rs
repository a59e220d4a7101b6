// SPDX-License-Identifier: GPL-2.0

//! Pins: images that are kept although no channel needs them, for good or up to a time.
//!
//! A pin is a note `pins/<name>` with the lines `image`, `until` (seconds since 1970; missing: for good) and `by`. One
//! that ends by itself is the lease of a reader that needs an image for longer than its channel keeps it.

use std::sync::Arc;

use pristine_image::ImageId;

use crate::error::{Error, Result};
use crate::lease::{Lease, LeaseOptions};
use crate::note::{self, NoteKind, NoteName};
use crate::object::{ObjectName, ParseChannelError};
use crate::retry::{CancelToken, RetryPolicy};
use crate::sealed::{stored_image, StoredImage};
use crate::store::Store;

/// A pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The image that is kept.
    pub image: ImageId,
    /// Up to when, in seconds since 1970; `None` for good.
    pub until: Option<u64>,
    /// Who wants it, for people.
    pub by: String,
}

impl Pin {
    fn encode(&self) -> Vec<u8> {
        let mut fields = vec![("image", self.image.to_string()), ("by", self.by.clone())];
        fields.extend(self.until.map(|until| ("until", until.to_string())));
        note::encode(NoteKind::Pin, &fields)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let field = |key| note::field(NoteKind::Pin, bytes, key);
        let until = match field("until") {
            Some(until) => Some(until.parse().ok()?),
            None => None,
        };
        Some(Pin {
            image: field("image")?.parse().ok()?,
            until,
            by: field("by").unwrap_or_default().to_owned(),
        })
    }

    /// Whether it keeps its image at a time, in seconds since 1970.
    pub fn holds_at(&self, now: u64) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

/// The note of a pin's name.
///
/// # Errors
/// If it is no name of a pin: they are like those of channels.
pub fn pin_name(name: &str) -> std::result::Result<NoteName, ParseChannelError> {
    NoteName::new(NoteKind::Pin, name)
}

/// Pins an image, which must be there and complete. A pin of this name for the same image gets the new time.
///
/// # Errors
/// [`Error::InUse`] if the name pins another image, [`Error::NoImage`], [`Error::NotFound`] if a pack is missing, and
/// what can go wrong with the store.
pub fn pin(
    store: &Arc<dyn Store>,
    name: &NoteName,
    pin: &Pin,
    lease: &LeaseOptions,
    cancel: &CancelToken,
) -> Result<()> {
    let lease = Lease::write(store, "pin", lease, cancel, &|_| ())?;
    if let Some(there) = read_pin(store.as_ref(), name)?.filter(|there| there.image != pin.image) {
        return Err(Error::InUse {
            location: store.location().to_owned(),
            who: format!("{name} keeps image {} already", there.image),
        });
    }
    let stored = stored_image(store, pin.image, RetryPolicy::default(), cancel)?;
    check_complete(store, pin.image, &stored, cancel)?;
    lease.keep()?;
    store.write_note(name, &pin.encode())
}

/// Makes sure that all packs of an image are there, by their lengths.
pub(crate) fn check_complete(
    store: &Arc<dyn Store>,
    image: ImageId,
    stored: &StoredImage,
    cancel: &CancelToken,
) -> Result<()> {
    // By their names there, which need no key.
    let below = store.below();
    let store = below.as_ref().unwrap_or(store);
    for &(pack, expected) in &stored.packs {
        cancel.check()?;
        let object = ObjectName::Pack(pack);
        let location = store.location().to_owned();
        match store.size(&object)? {
            Some(len) if len == expected => (),
            Some(len) => {
                return Err(Error::Truncated {
                    location,
                    object: object.to_string(),
                    len,
                    needed: expected,
                });
            }
            // Its content is elsewhere.
            None if store.size(&ObjectName::Reference(pack))?.is_some() => (),
            None => {
                let object = format!("{object}, which image {image} needs,");
                return Err(Error::NotFound { location, object });
            }
        }
    }
    Ok(())
}

/// A pin; `None` if there is none of this name.
///
/// # Errors
/// [`Error::Protocol`] for one that cannot be read, and what can go wrong with the store.
pub fn read_pin(store: &dyn Store, name: &NoteName) -> Result<Option<Pin>> {
    let Some(bytes) = store.read_note(name)? else {
        return Ok(None);
    };
    let pin = Pin::parse(&bytes).ok_or_else(|| Error::Note {
        location: store.location().to_owned(),
        note: name.to_string(),
    })?;
    Ok(Some(pin))
}

/// Removes a pin; says whether there was one. Its image stays until garbage is collected.
///
/// # Errors
/// What can go wrong with the store.
pub fn unpin(store: &dyn Store, name: &NoteName) -> Result<bool> {
    let there = store.read_note(name)?.is_some();
    store.remove_note(name)?;
    Ok(there)
}

/// All pins, by name; of those that cannot be read why.
///
/// # Errors
/// [`Error::Unsupported`] if the store cannot tell, and what can go wrong on the way.
pub fn pins(store: &dyn Store) -> Result<Vec<(NoteName, Result<Pin>)>> {
    let mut pins = Vec::new();
    for noted in store.notes(NoteKind::Pin)? {
        match read_pin(store, &noted.name) {
            // Removed since it was listed.
            Ok(None) => (),
            Ok(Some(pin)) => pins.push((noted.name, Ok(pin))),
            Err(error) => pins.push((noted.name, Err(error))),
        }
    }
    pins.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(pins)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_round_trip_and_damage_is_told() {
        for until in [None, Some(1_795_339_400)] {
            let pin = Pin {
                image: "ab".repeat(32).parse().unwrap(),
                until,
                by: "process 7 on build".to_owned(),
            };
            assert_eq!(Pin::parse(&pin.encode()), Some(pin.clone()));
            assert!(pin.holds_at(1_795_339_399));
            assert_eq!(pin.holds_at(1_795_339_400), until.is_none());
        }
        let image = "ab".repeat(32);
        for bad in [
            String::new(),
            "pristine-pin 1\n".to_owned(),
            "pristine-pin 1\nimage x\n".to_owned(),
            format!("pristine-pin 1\nimage {image}\nuntil soon\n"),
            format!("pristine-pin 2\nimage {image}\n"),
        ] {
            assert_eq!(Pin::parse(bad.as_bytes()), None, "{bad}");
        }
    }
}
