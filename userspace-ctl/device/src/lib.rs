// SPDX-License-Identifier: GPL-2.0

//! What userspace asks of the kernel: device-mapper devices ([`dm`]), the managed devices' own interface
//! ([`control`]), the helper's channel ([`channel`]), kernel modules ([`module`]) and block devices ([`block`]).
//!
//! It talks to the kernel by ioctls alone. Nothing here needs udev, libdevmapper or a program to be installed, since the
//! agent runs before there are any; where udev runs, it is told what it wants to know.

pub mod block;
pub mod channel;
pub mod control;
pub mod dm;
mod error;
mod ioctl;
mod kmsg;
pub mod module;

pub use error::{Class, Error, Result};
pub use pristine_shared as shared;
