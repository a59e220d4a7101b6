// SPDX-License-Identifier: GPL-2.0

//! The preboot agent of Pristine: makes a machine's disk its master image before the system starts.
//!
//! It runs as process 1 of a small initramfs, or is called by a distribution's. Its steps are figure 2 of the
//! incremental-provisioning document: no metadata, fill the disk from the image; dirty or stale blocks, fetch just
//! these (or call them stale and let the running system's helper do so); clean, go on. Then it activates the managed device and hands over to the system.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`config`] | the settings: kernel command line over a file |
//! | [`supervisor`] | process 1: runs the worker, and what follows its failure |
//! | [`worker`] | the checklist from devices and network to an active device |
//! | [`flow`] | the decisions, without I/O, and the steps on the metadata |
//! | [`restore`] | fetch, write, flush, clear: provisioning, revert and updates alike |
//! | [`master`], [`store_master`] | the image: as a trait, and from a store |
//! | [`trust`] | whose releases count |
//! | [`net`], [`devices`], [`modules`], [`activate`] | what must be brought up |
//! | [`helper`] | what fetches stale blocks while the system runs: started, and kept running |
//! | [`handover`] | mounting the root and becoming the system's init |
//! | [`report`], [`console`], [`failure`] | what it says |

pub mod activate;
pub mod config;
pub mod console;
pub mod devices;
pub mod failure;
pub mod flow;
pub mod handover;
pub mod helper;
pub mod master;
pub mod modules;
pub mod net;
pub mod report;
pub mod restore;
pub mod store_master;
pub mod supervisor;
pub mod trust;
mod undo;
pub mod update;
pub mod worker;
