// SPDX-License-Identifier: GPL-2.0

//! `pristine key sign`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use pristine_store::Signer;
use pristine_trust::now;
use serde::Serialize;

use super::args::{secret_key, PasswordArgs};
use super::with_suffix;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Style, Ui};

/// Arguments of `pristine key sign`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine key sign SHA256SUMS --key mill.key     makes SHA256SUMS.minisig
  minisign -V -p mill.pub -m SHA256SUMS

Releases are signed as they are published: pristine image publish --key.

JSON fields: file, signature_file, key, comment.")]
pub struct SignFileArgs {
    /// The file to sign
    file: PathBuf,
    /// The secret key
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    #[command(flatten)]
    password: PasswordArgs,
    /// Where the signature goes [default: the file with .minisig]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// A line that is signed as well [default: the time and the file's name]
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
}

#[derive(Serialize)]
struct Report {
    file: String,
    signature_file: String,
    key: String,
    comment: String,
}

pub(super) fn run(args: &SignFileArgs, ui: &Ui) -> Outcome {
    let path = &args.file;
    let text = fs::read(path)
        .map_err(|error| Failure::io(format!("cannot read {}", path.display()), &error))?;
    let key = secret_key(&args.key, 0, &args.password)?;
    let comment = args.comment.clone().unwrap_or_else(|| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("timestamp:{}\tfile:{name}", now())
    });
    let signature = key
        .sign(&text, &comment)
        .map_err(|error| Failure::new(Code::Usage, error.to_string()))?;
    let output = args.output.clone();
    let output = output.unwrap_or_else(|| with_suffix(path, ".minisig"));
    fs::write(&output, signature)
        .map_err(|error| Failure::io(format!("cannot write {}", output.display()), &error))?;
    let report = Report {
        file: path.display().to_string(),
        signature_file: output.display().to_string(),
        key: key.key_id().to_string(),
        comment,
    };
    ui.result(&report, |out| {
        let id = ui.paint(Style::Bold, &report.key);
        writeln!(out, "{}: signed by key {id}", report.signature_file)
    })
}
