// SPDX-License-Identifier: GPL-2.0

//! Stores of Pristine images, and verified parallel fetching from them.
//!
//! A store holds, under a directory or a URL:
//!
//! | path | what it is | changes |
//! | --- | --- | --- |
//! | `pristine-store` | the marker: `pristine-store 1` | never |
//! | `images/<image id>.manifest` | the manifest of an image | never |
//! | `packs/<xx>/<digest>.zst` | a pack, in the directory of its name's first two digits | never |
//! | `references/<xx>/<digest>.ref` | where the content of a pack is that is not stored | never |
//! | `releases/<channel>/<generation>` | the history of a channel, see [`release`] | never |
//! | `channels/<name>` | a channel's pointer: a copy of its current release | moved by compare-and-swap |
//! | `deltas/<new id>/<old id>.delta` | what turns one image into another, see [`update`]; optional | never |
//! | `traces/<image id>.trace` | in which order a boot asks for blocks, see [`trace`]; optional | never, but for removal |
//! | `keys/<key>/<tag>.age` | a store key, wrapped for a recipient, see [`sealed`] | never; may be removed |
//! | `pins/<name>` | an image that is kept though no channel needs it, see [`pin`] | written and removed |
//! | `leases/<kind>-<nonce>` | somebody is writing, or removing, see [`lease`](mod@lease) | written and removed |
//! | `claims/`, `probes/` | how publishers keep apart in S3, see [`s3`] | written and removed |
//! | `.lock`, `.tmp/` | the lock of pointer moves; files being written (directories only) | |
//!
//! Any web server that serves such a directory is a store that can be read ([`HttpStore`]); [`DirStore`] reads and
//! writes. [`open_store`] opens either.
//!
//! To read an image, open an [`ImageReader`] and [`ImageReader::fetch`] blocks into a [`BlockSink`]: they are
//! fetched in parallel with ranges coalesced, and each block is verified against the image's id before the sink
//! sees it, whatever it came from. That the id is the right one, a trusted signature says
//! ([`ImageReader::open_trusted`]), or whoever asks for the image by its id.

#[cfg(feature = "build")]
mod blocks;
#[cfg(feature = "build")]
pub mod compare;
mod credentials;
#[cfg(feature = "build")]
pub mod delta;
pub mod dir;
pub mod error;
mod fetch;
pub mod gc;
pub mod generation;
pub mod history;
pub mod http;
pub mod lease;
pub mod mirrors;
pub mod note;
pub mod object;
pub mod peers;
pub mod pin;
pub mod publish;
mod reader;
pub mod release;
pub mod retry;
#[cfg(feature = "s3")]
pub mod s3;
pub mod sealed;
#[cfg(feature = "build")]
pub mod share;
mod store;
pub mod trace;
pub mod update;
pub mod verify;

#[cfg(feature = "build")]
pub use blocks::ImageBlocks;
pub use credentials::{ClientFiles, Token, TOKEN_VARIABLE};
#[cfg(feature = "build")]
pub use delta::{make_delta, put_delta, put_deltas, DeltaOptions, MadeDelta};
pub use dir::DirStore;
pub use error::{Error, ErrorKind, Result};
pub use fetch::{BlockSink, FetchOptions, FetchReport};
pub use gc::{collect, Amount, Collected, GcOptions};
pub use generation::{may_go_back, modified, news, News};
pub use history::{append, history, read_release, NewRelease};
pub use http::{HttpOptions, HttpStore};
pub use lease::{Lease, LeaseOptions};
pub use mirrors::Mirrors;
pub use note::{NoteKind, NoteName, Noted};
pub use object::{ChannelName, ObjectKind, ObjectName, ParseChannelError, ReleaseName};
pub use pin::{pin, pin_name, pins, read_pin, unpin, Pin};
pub use publish::{promote, publish, PublishOptions, Published};
pub use reader::{Found, ImageReader, ImageSelector};
pub use release::{Release, SignedRelease};
pub use retry::{CancelToken, RetryPolicy};
#[cfg(feature = "s3")]
pub use s3::S3Store;
pub use sealed::{stored_image, Keyring, SealedStore, StoredImage};
#[cfg(feature = "build")]
pub use share::{check_packs, known_blocks, repack, KnownBlocks};
pub use store::{
    open_for_writing, open_store, open_store_with, Listed, Put, Revision, Store, StorePacks,
    StoredLens, Traffic,
};
#[cfg(feature = "build")]
pub use trace::inherit_trace;
pub use trace::{put_trace, read_trace};
pub use verify::{verify, verify_stored, Verified, Verifier};

pub use pristine_trust::{Policy as TrustPolicy, SignError, Signer, TrustError, Trusted};

pub use pristine_image::{Digest, FormatError, ImageId, PackId, BLOCK_SIZE};
