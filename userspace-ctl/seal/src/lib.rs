// SPDX-License-Identifier: GPL-2.0

//! Encryption of what a store holds, so that the store learns nothing of it and can swap nothing.
//!
//! A *store key* ([`StoreKey`]) of 32 random bytes encrypts all images that are published with it, which so share their
//! blocks. It lies in the store, wrapped for each recipient in a file of age's ([`age`]), and in no other place.
//! Everything else follows from it: the names of packs, the key of each object, and the number that makes image ids say
//! nothing of the content. `FORMAT.md` of the image crate describes it all to the byte.
//!
//! An object is sealed in *chunks* ([`chunks`]) of 4 KiB, each encrypted and authenticated by itself, so that any range of it
//! is had by one range request. Packs are chunks alone; manifests and deltas have a head that names the store key
//! ([`object`]).

pub mod age;
pub mod chunks;
mod key;
pub mod object;
pub mod pack;

pub use key::{KeyId, ParseKeyIdError, StoreKey, UnwrapError};
