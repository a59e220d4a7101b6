// SPDX-License-Identifier: GPL-2.0

//! Peers: this machine gives its blocks of the image to its neighbours, and takes theirs.
//!
//! | | |
//! | --- | --- |
//! | [`serve`] | answers neighbours, within limits |
//! | [`clean`] | which blocks there are to give: those that are neither dirty nor stale, from the data device |
//! | [`exchange`] | asks neighbours, looks after whom this machine knows, and announces it |
//! | [`together`] | all of it for one device, also when nothing is stale there |
//!
//! The protocol, and the side that asks, are in [`pristine_store::peers`].

pub mod clean;
pub mod exchange;
pub mod serve;
pub mod together;

/// The port that is served on, unless another is set.
pub const PORT: u16 = 7117;
