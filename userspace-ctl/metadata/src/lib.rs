// SPDX-License-Identifier: GPL-2.0

//! The metadata of a managed device as userspace handles it, while the kernel does not: [`format()`], [`Metadata`]
//! to load and to commit, [`Growth`], [`check`](mod@check), [`repair`] and [`dump`](mod@dump).
//!
//! What lies where, and what it means, is in `pristine_shared`; this crate adds the I/O, in an order that a power cut at
//! any instant cannot turn into a wrong answer.
//!
//! ```no_run
//! use pristine_metadata::{Access, BlockState, Changes, Devices, Metadata, Select};
//!
//! # fn main() -> Result<(), pristine_metadata::Error> {
//! let devices = Devices::new("/dev/vda", Some("/dev/vdb"));
//! let mut metadata = Metadata::open(&devices, Access::Write)?;
//! let (mut planes, _) = metadata.load()?;
//! for run in planes.runs(Select::NotClean).collect::<Vec<_>>() {
//!     // … write the master's blocks to the data device, and flush it; only then:
//!     planes.set(run, BlockState::Clean);
//! }
//! metadata.commit(&planes, &Changes::default())?;
//! # Ok(())
//! # }
//! ```

pub mod check;
mod commit;
pub mod dump;
mod error;
mod format;
mod grow;
mod open;
mod planes;
pub mod probe;
pub mod repair;
mod signature;
mod storage;
pub mod undo;

pub use check::{check, Finding, Report, Severity};
pub use commit::{Changes, Image};
pub use error::{Class, Error, Result};
pub use format::{format, format_on, FormatOptions};
pub use grow::{preview as preview_growth, GrowOptions, Growth};
pub use open::{Devices, Metadata, Stores};
pub use planes::{Initial, Planes, Select};
pub use pristine_shared as shared;
pub use pristine_shared::geometry::{Geometry, Run};
pub use pristine_shared::recovery::LogEnd;
pub use pristine_shared::state::BlockState;
pub use pristine_shared::superblock::Superblock;
pub use storage::{Access, MetaDevice, Storage, Window};
pub use undo::{Originals, Undone};
