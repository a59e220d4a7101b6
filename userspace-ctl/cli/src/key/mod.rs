// SPDX-License-Identifier: GPL-2.0

//! `pristine key`: keys, signatures, and whom to trust.

mod age;
mod args;
mod list;
mod new;
mod sign;
mod trust;
mod verify;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Subcommand;

pub use args::{SignArgs, TrustArgs};

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// `pristine key ...`
#[derive(Subcommand, Debug)]
pub enum KeyCommand {
    /// Make a key to sign releases with, or an identity that opens encrypted images
    New(new::NewArgs),
    /// Sign a file as minisign does
    Sign(sign::SignFileArgs),
    /// Verify the signature of a file against trusted keys
    Verify(verify::VerifyArgs),
    /// Trust a public key, or cease to
    Trust(trust::TrustKeyArgs),
    /// List the trusted keys
    List(list::ListArgs),
}

/// Runs a command.
pub fn run(command: &KeyCommand, ui: &Ui) -> Outcome {
    match command {
        KeyCommand::New(args) => new::run(args, ui),
        KeyCommand::Sign(args) => sign::run(args, ui),
        KeyCommand::Verify(args) => verify::run(args, ui),
        KeyCommand::Trust(args) => trust::run(args, ui),
        KeyCommand::List(args) => list::run(args, ui),
    }
}

/// A path with something added to its end.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut text = path.as_os_str().to_owned();
    text.push(suffix);
    text.into()
}

/// Writes a file that must not be there yet, durably.
fn write_new(path: &Path, text: &str, mode: u32) -> Outcome {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    let written = options.open(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Failure::new(Code::Exists, format!("{} is there already", path.display()))
                .hint("it is not overwritten: choose another name, or remove it")
        }
        _ => Failure::io(format!("cannot write {}", path.display()), &error),
    })
}
