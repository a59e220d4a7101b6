// SPDX-License-Identifier: GPL-2.0

//! `pristine channel export-release`

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use pristine_store::{open_store, read_release, ChannelName, Error};
use serde::Serialize;

use crate::exit::{Failure, Outcome};
use crate::image::parse_channel;
use crate::ui::Ui;

/// Arguments of `pristine channel export-release`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine channel export-release /srv/store stable -o release
  minisign -V -p mill.pub -m release
  pristine channel export-release http://server:8080 stable --generation 3 -o release

Writes the lines that are signed, and beside them the signatures as .minisig, .2.minisig and so on.

JSON fields: channel, generation, file, signature_files.")]
pub struct ExportArgs {
    /// The store, a directory or a URL
    store: String,
    /// The channel
    #[arg(value_parser = parse_channel)]
    channel: ChannelName,
    /// Which release [default: what the channel is at]
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Serialize)]
struct Report {
    channel: String,
    generation: u64,
    file: String,
    signature_files: Vec<String>,
}

pub(super) fn run(args: &ExportArgs, ui: &Ui) -> Outcome {
    let store = open_store(&args.store)?;
    let signed = match args.generation {
        Some(generation) => read_release(store.as_ref(), &args.channel, generation)?,
        None => {
            let pointer = store.read_pointer(&args.channel)?;
            let (signed, _) = pointer.ok_or_else(|| Error::NotFound {
                location: store.location().to_owned(),
                object: format!("channel {}", args.channel),
            })?;
            signed
        }
    };
    write(&args.output, signed.text())?;
    let mut signature_files = Vec::new();
    for (number, signature) in signed.signatures().iter().enumerate() {
        let mut path = args.output.as_os_str().to_owned();
        path.push(match number {
            0 => ".minisig".to_owned(),
            number => format!(".{}.minisig", number + 1),
        });
        let path = PathBuf::from(path);
        write(&path, signature)?;
        signature_files.push(path.display().to_string());
    }
    let report = Report {
        channel: args.channel.to_string(),
        generation: signed.release().generation,
        file: args.output.display().to_string(),
        signature_files,
    };
    if report.signature_files.is_empty() {
        ui.note("nobody signed it");
    }
    ui.result(&report, |out| {
        writeln!(out, "{}", report.file)?;
        report
            .signature_files
            .iter()
            .try_for_each(|file| writeln!(out, "{file}"))
    })
}

fn write(path: &Path, text: &str) -> Outcome {
    fs::write(path, text)
        .map_err(|error| Failure::io(format!("cannot write {}", path.display()), &error))
}
