// SPDX-License-Identifier: GPL-2.0

//! `pristine key list`

use clap::Args;
use serde::Serialize;

use super::args::TrustArgs;
use crate::exit::Outcome;
use crate::ui::{Table, Ui};

/// Arguments of `pristine key list`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine key list
  pristine key list --trusted-keys /srv/keys --json

JSON fields: directory, keys (key, label, public).")]
pub struct ListArgs {
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    directory: String,
    keys: Vec<Key>,
}

#[derive(Serialize)]
struct Key {
    key: String,
    label: String,
    public: String,
}

pub(super) fn run(args: &ListArgs, ui: &Ui) -> Outcome {
    let keys = args.trust.keys()?;
    let key = |key: &pristine_trust::PublicKey| Key {
        key: key.id().to_string(),
        label: key.label().unwrap_or_default().to_owned(),
        public: key.base64().to_owned(),
    };
    let report = Report {
        directory: args.trust.directory().display().to_string(),
        keys: keys.iter().map(key).collect(),
    };
    ui.result(&report, |out| {
        if report.keys.is_empty() {
            return writeln!(
                out,
                "no trusted keys in {}: releases need no signature",
                report.directory
            );
        }
        let mut table = Table::new(&["KEY", "LABEL", "PUBLIC KEY"], &[]);
        for key in &report.keys {
            table.row(vec![key.key.clone(), key.label.clone(), key.public.clone()]);
        }
        table.write(ui, out)
    })
}
