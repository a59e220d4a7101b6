// SPDX-License-Identifier: GPL-2.0

//! `pristined`, the helper: fetches the stale blocks of a managed device while it is used.
//!
//! The kernel asks for blocks on a channel ([`channel`]); the helper finds them in the stores of the image
//! ([`library`], [`source`]), verifies each against the image's id, and answers ([`demand`]). Before
//! who reads one block after the other it fetches ahead ([`ahead`]). When the machine is idle it
//! offers the rest ([`hydrate`]), in the order in which an earlier boot needed it ([`trace`]). The mechanism is the
//! kernel's: what is stale, who waits, what may be overwritten; the policy is here.
//!
//! # How it is started
//!
//! ```text
//! pristined --device root --store http://10.0.2.2:8080 --store http://mirror --survive
//! ```
//!
//! It runs in the foreground; whoever starts it puts it into the background. The program is linked statically, and what
//! it needs is opened and looked up at the start, so that it can outlive the file system it was started from.
//! systemd kills everything at the switch to the system and at shutdown, but for processes whose name begins with `@`:
//! either start it with such a name (`argv[0]`) or with `--survive`, which does that by itself.
//!
//! It can be killed, restarted or replaced (`--take-over`) at any time: what it did not answer waits in the kernel for
//! the next one. When the device goes over to another generation (`pristine device update`), so does it, with the stores that
//! it was given; what it had in hand for the one before is refused by the kernel.

pub mod ahead;
pub mod cache;
pub mod channel;
pub mod demand;
pub mod exit;
pub mod helper;
pub mod hydrate;
pub mod library;
pub mod loaded;
pub mod log;
pub mod options;
pub mod pace;
pub mod peers;
pub mod plan;
pub mod process;
pub mod source;
pub mod state;
pub mod stop;
pub mod trace;
pub mod units;
