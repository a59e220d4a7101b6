// SPDX-License-Identifier: GPL-2.0

//! `pristine key new --age`

use std::path::Path;

use pristine_store::sealed::{AgeError, Identity};
use pristine_trust::{now, time};
use serde::Serialize;

use super::write_new;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Style, Ui};

#[derive(Serialize)]
struct Report {
    recipient: String,
    identity_file: String,
}

/// Makes an identity in a file as `age-keygen` does.
pub(super) fn run(path: &Path, ui: &Ui) -> Outcome {
    let failed = |error: AgeError| Failure::new(Code::Failure, "no identity was made").why(error);
    let identity = Identity::generate().map_err(failed)?;
    let recipient = identity.recipient().to_string();
    let text = format!(
        "# created: {}\n# public key: {recipient}\n{}\n",
        time(now()),
        identity.to_text().as_str()
    );
    write_new(path, &text, 0o600)?;
    let report = Report {
        recipient,
        identity_file: path.display().to_string(),
    };
    ui.result(&report, |out| {
        writeln!(
            out,
            "recipient {}",
            ui.paint(Style::Bold, &report.recipient)
        )?;
        writeln!(out, "secret: {} (without a password)", report.identity_file)?;
        writeln!(
            out,
            "images are encrypted to it by: pristine image publish ... --encrypt-to {}",
            report.recipient
        )
    })
}
