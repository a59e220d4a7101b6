// SPDX-License-Identifier: GPL-2.0

//! Blocks from neighbours: machines that have an image on their disks and give its blocks away, found through the server
//! of the store. `PEERS.md` beside this crate has the protocol.
//!
//! Peers are a shortcut and never needed: whoever reads asks one or two of them, with little patience, for blocks that it
//! knows the digests of, and takes what fits. All else (no peer has it, a peer is slow, is gone, or lies) is fetched from
//! the store as if there were no peers. A peer that was of no use is left alone for a while.

mod list;
mod map;
mod neighbours;
mod peer;
pub mod wire;

pub use list::{PeerList, MAX_LIST};
pub use map::{SectionMap, SECTION};
pub use neighbours::{Batch, Neighbours, PeerTotals, Wanted};
pub use peer::{Patience, PeerState};
