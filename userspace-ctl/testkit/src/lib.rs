// SPDX-License-Identifier: GPL-2.0

//! For tests: a store server that misbehaves as it is told, and images to serve.
//!
//! ```no_run
//! use pristine_testkit::FaultyServer;
//! # fn main() -> std::io::Result<()> {
//! let server = FaultyServer::start("/srv/store".as_ref())?;
//! server.set_rules("packs/@1-2:status=500".parse().map_err(std::io::Error::other)?);
//! println!("{}", server.url());
//! # Ok(()) }
//! ```

mod fixture;
mod http;
mod nginx;
mod peer;
mod rules;
mod s3;
mod server;

pub use fixture::{noise, sample_image, TestStore, TEST_IDENTITY};
pub use nginx::{authority, Nginx};
pub use peer::fake_peer;
pub use rules::{Fault, Rule, Rules};
pub use s3::{S3Kind, S3Service};
pub use server::{FaultyServer, Options};
