// SPDX-License-Identifier: GPL-2.0

//! `pristine key verify`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use pristine_trust::{Keys, Policy, PublicKey, Signature, Terms};
use serde::Serialize;

use super::args::TrustArgs;
use super::trust::read_key;
use super::with_suffix;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Style, Ui};

/// Arguments of `pristine key verify`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine key verify SHA256SUMS --public mill.pub
  pristine key verify SHA256SUMS                      against the keys in /etc/pristine/keys

Takes what `minisign -S` makes, also with -l. Exits with 15 if no trusted key signed just this.

JSON fields: file, key, label, comment.")]
pub struct VerifyArgs {
    /// The signed file
    file: PathBuf,
    /// Its signature [default: the file with .minisig]
    #[arg(short, long, value_name = "FILE")]
    signature: Option<PathBuf>,
    /// The public key, as a file or as its 56 characters; several for any of them
    #[arg(long, value_name = "KEY", value_parser = read_key, conflicts_with = "trusted_keys")]
    public: Vec<PublicKey>,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    file: String,
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    comment: String,
}

pub(super) fn run(args: &VerifyArgs, ui: &Ui) -> Outcome {
    let mut keys = Keys::default();
    match args.public.is_empty() {
        true => keys.extend(args.trust.keys()?),
        false => args.public.iter().cloned().for_each(|key| keys.add(key)),
    }
    if keys.is_empty() {
        let directory = args.trust.directory().display();
        let what = format!("there are no trusted keys in {directory}");
        return Err(Failure::new(Code::NotFound, what)
            .hint("give --public KEY, or trust one: pristine key trust KEY.pub"));
    }
    let read = |path: &PathBuf, error: std::io::Error| {
        Failure::io(format!("cannot read {}", path.display()), &error)
    };
    let file = &args.file;
    let text = fs::read(file).map_err(|error| read(file, error))?;
    let path = args.signature.clone();
    let path = path.unwrap_or_else(|| with_suffix(file, ".minisig"));
    let signature = fs::read_to_string(&path).map_err(|error| read(&path, error))?;
    let parsed: Signature = signature
        .parse()
        .map_err(|error| Failure::new(Code::Damaged, format!("{} is {error}", path.display())))?;
    // A file has no generation and does not expire.
    let terms = Terms {
        generation: 0,
        published: 0,
        expires: None,
    };
    let trusted = Policy::with_keys(keys).check(&text, &[signature], &terms);
    let trusted = trusted.map_err(|error| {
        let what = format!("{} is not trusted", file.display());
        Failure::new(Code::Untrusted, what).why(error)
    })?;
    let key = trusted.signed_by.first();
    let report = Report {
        file: file.display().to_string(),
        key: parsed.key_id().to_string(),
        label: key.and_then(PublicKey::label).map(str::to_owned),
        comment: parsed.trusted_comment().to_owned(),
    };
    ui.result(&report, |out| {
        let good = ui.paint(Style::Good, "good");
        let label = report.label.as_ref();
        let label = label.map(|label| format!(" ({label})")).unwrap_or_default();
        writeln!(
            out,
            "{}: {good}, signed by key {}{label}",
            report.file, report.key
        )?;
        writeln!(out, "trusted comment: {}", report.comment)
    })
}
