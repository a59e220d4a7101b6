// SPDX-License-Identifier: GPL-2.0

//! Formats that disk images come from and go to.
//!
//! [`open`] opens a source whatever its format: raw disks, block devices, qcow2, .xz, .zst and .gz around them, tar
//! archives and container images of root file systems, and images of casync; local, or behind a web server. What can
//! be read by range is read by range: a multi-block .xz file is never unpacked whole ([`xz`]).
//!
//! Nothing that is read is believed: sizes are bounded before memory or disk is taken, digests are compared where the
//! format has some, and names in archives cannot lead out of where they are unpacked ([`tree`]).

mod cache;
pub mod casync;
pub mod error;
pub mod export;
pub mod http;
pub mod input;
pub mod oci;
mod open;
mod qcow2;
pub mod reference;
mod spool;
mod stream;
pub mod tree;
pub mod xz;

pub use error::{from_io, Error, Result};
pub use open::{open, Content, Format, OpenOptions, Opened, Shared, Watch};
pub use spool::default_limit;
pub use stream::Compression;
pub use tree::Tree;

/// Bytes as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
