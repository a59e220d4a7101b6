// SPDX-License-Identifier: GPL-2.0

//! `pristine key trust`

use std::fs;
use std::path::Path;

use clap::Args;
use pristine_trust::{Keys, PublicKey, KEY_SUFFIX};
use serde::Serialize;

use super::args::TrustArgs;
use super::write_new;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Style, Ui};

/// Arguments of `pristine key trust`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine key trust mill.pub                       into /etc/pristine/keys, from where it goes into the initramfs
  pristine key trust RWQf6LRCGA9i53ml... --label mill
  pristine key trust mill --remove                  by its label or its id

To change keys: trust the new one everywhere, publish with --key OLD --key NEW until all machines know it, publish with the \
new one alone, and remove the old one. The initramfs has copies: make it again afterwards (update-initramfs -u).

JSON fields: key, label, file, removed, unchanged.")]
pub struct TrustKeyArgs {
    /// The public key: a file, or its 56 characters; with --remove its label or id
    key: String,
    /// The name that it goes by [default: the file's]
    #[arg(long, value_name = "NAME")]
    label: Option<String>,
    /// Cease to trust it
    #[arg(long, conflicts_with = "label")]
    remove: bool,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    key: String,
    label: String,
    file: String,
    removed: bool,
    unchanged: bool,
}

/// A public key from a file, or from the characters themselves.
pub(super) fn read_key(text: &str) -> Result<PublicKey, String> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let content = fs::read_to_string(text).map_err(|error| {
        format!("neither a public key (56 characters) nor a file that can be read ({error})")
    })?;
    content
        .parse()
        .map_err(|error| format!("{text} is {error}"))
}

pub(super) fn run(args: &TrustKeyArgs, ui: &Ui) -> Outcome {
    let directory = args.trust.directory();
    let known = Keys::read_directory(directory)?;
    let file_of = |label: &str| directory.join(format!("{label}{KEY_SUFFIX}"));
    let report = if args.remove {
        let key = find(&known, &args.key, directory)?;
        let label = key.label().unwrap_or_default().to_owned();
        let file = file_of(&label);
        fs::remove_file(&file)
            .map_err(|error| Failure::io(format!("cannot remove {}", file.display()), &error))?;
        Report {
            key: key.id().to_string(),
            label,
            file: file.display().to_string(),
            removed: true,
            unchanged: false,
        }
    } else {
        let key = read_key(&args.key).map_err(|why| Failure::new(Code::Usage, why))?;
        let same = known.iter().find(|k| k.base64() == key.base64());
        let label = match same.and_then(PublicKey::label) {
            Some(label) => label.to_owned(),
            None => label(args, &key)?,
        };
        let file = file_of(&label);
        if same.is_none() {
            fs::create_dir_all(directory).map_err(|error| {
                Failure::io(format!("cannot make {}", directory.display()), &error)
            })?;
            write_new(&file, &key.to_file(), 0o644)?;
        }
        Report {
            key: key.id().to_string(),
            label,
            file: file.display().to_string(),
            removed: false,
            unchanged: same.is_some(),
        }
    };
    ui.result(&report, |out| {
        let key = ui.paint(Style::Bold, &report.key);
        let verb = match (report.removed, report.unchanged) {
            (true, _) => "is not trusted any more",
            (_, true) => "was trusted before",
            _ => "is trusted",
        };
        writeln!(out, "key {key} ({}) {verb}: {}", report.label, report.file)
    })
}

/// The name that a key is to go by, which becomes a file's name.
fn label(args: &TrustKeyArgs, key: &PublicKey) -> Outcome<String> {
    let from_file = || {
        let name = Path::new(&args.key).file_name()?.to_str()?;
        name.strip_suffix(KEY_SUFFIX).map(str::to_owned)
    };
    let label = args.label.clone().or_else(from_file);
    let label = label.unwrap_or_else(|| key.id().to_string());
    let good = |c: char| c.is_alphanumeric() || "-_.@+".contains(c);
    if label.is_empty() || label.starts_with('.') || !label.chars().all(good) {
        let what = format!("{label:?} cannot be the label of a key");
        return Err(Failure::new(Code::Usage, what)
            .hint("give another with --label: letters, digits and - _ . @ +"));
    }
    Ok(label)
}

fn find<'a>(keys: &'a Keys, name: &str, directory: &Path) -> Outcome<&'a PublicKey> {
    let by_file = read_key(name).ok();
    let is_it = |key: &&PublicKey| {
        key.label() == Some(name)
            || key.id().to_string() == name
            || by_file.as_ref().is_some_and(|k| k.base64() == key.base64())
    };
    keys.iter().find(is_it).ok_or_else(|| {
        let what = format!("no trusted key {name} in {}", directory.display());
        Failure::new(Code::NotFound, what).hint("see which there are: pristine key list")
    })
}
