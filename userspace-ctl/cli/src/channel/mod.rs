// SPDX-License-Identifier: GPL-2.0

//! `pristine channel`: what a channel is at, and was at before.

mod export;
mod list;
pub mod signers;

use clap::Subcommand;

use crate::exit::Outcome;
use crate::ui::Ui;

/// `pristine channel ...`
#[derive(Subcommand, Debug)]
pub enum ChannelCommand {
    /// List the releases of a channel, with who signed them
    List(list::ListArgs),
    /// Write a release and its signatures as files that minisign verifies
    ExportRelease(export::ExportArgs),
}

/// Runs a command.
pub fn run(command: &ChannelCommand, ui: &Ui) -> Outcome {
    match command {
        ChannelCommand::List(args) => list::run(args, ui),
        ChannelCommand::ExportRelease(args) => export::run(args, ui),
    }
}
