// SPDX-License-Identifier: GPL-2.0

//! `pristine key new`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use pristine_trust::{SecretKey, SecretKeyError};
use serde::Serialize;

use super::args::PasswordArgs;
use super::{with_suffix, write_new};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{Style, Ui};

/// Arguments of `pristine key new`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine key new mill                        makes mill.key (secret) and mill.pub
  pristine key new ~/keys/mill --no-password   for machines that sign unattended
  pristine image publish golden.pri /srv/store --channel stable --key mill.key
  pristine key new --age identity              as age-keygen -o identity does; prints its recipient
  pristine image publish golden.pri /srv/store --channel stable --encrypt-to age1...

The files are minisign's: `minisign -S -s mill.key` and `minisign -V -p mill.pub` take them, and keys of minisign's are \
taken here. Keep mill.key where only who publishes can read it; give mill.pub to all machines (pristine key trust).

An age identity opens encrypted images on the machine that has it (/etc/pristine/identity). The file is age's own.

JSON fields: key, public, secret_file, public_file, password; with --age: recipient, identity_file.")]
pub struct NewArgs {
    /// Path of the files without .key and .pub
    name: PathBuf,
    #[command(flatten)]
    password: PasswordArgs,
    /// Do not protect the secret key with a password
    #[arg(long, conflicts_with = "password_file")]
    no_password: bool,
    /// Make an age identity, which opens encrypted images, in the file NAME instead
    #[arg(long, conflicts_with_all = ["password_file", "no_password"])]
    age: bool,
}

#[derive(Serialize)]
struct Report {
    key: String,
    public: String,
    secret_file: String,
    public_file: String,
    password: bool,
}

pub(super) fn run(args: &NewArgs, ui: &Ui) -> Outcome {
    if args.age {
        return super::age::run(&args.name, ui);
    }
    let secret_file = with_suffix(&args.name, ".key");
    let public_file = with_suffix(&args.name, ".pub");
    // Before anybody thinks of a password.
    for path in [&secret_file, &public_file] {
        if fs::symlink_metadata(path).is_ok() {
            let what = format!("{} is there already", path.display());
            return Err(Failure::new(Code::Exists, what)
                .hint("keys are not overwritten: choose another name"));
        }
    }
    let password = match args.no_password {
        true => None,
        false => Some(args.password.new_password(&secret_file)?),
    };
    let made = SecretKey::generate(password.as_deref());
    let (key, text) = made.map_err(|error: SecretKeyError| {
        Failure::new(Code::Failure, "no key was made").why(error)
    })?;
    write_new(&secret_file, &text, 0o600)?;
    write_new(&public_file, &key.public().to_file(), 0o644).inspect_err(|_| {
        // One without the other is of no use.
        let _ = fs::remove_file(&secret_file);
    })?;
    let report = Report {
        key: key.public().id().to_string(),
        public: key.public().base64().to_owned(),
        secret_file: secret_file.display().to_string(),
        public_file: public_file.display().to_string(),
        password: password.is_some(),
    };
    ui.result(&report, |out| {
        let protected = match report.password {
            true => "protected by the password",
            false => "without a password",
        };
        writeln!(out, "key {}", ui.paint(Style::Bold, &report.key))?;
        writeln!(out, "secret: {} ({protected})", report.secret_file)?;
        writeln!(out, "public: {} ({})", report.public_file, report.public)?;
        writeln!(
            out,
            "machines trust it with pristine.key={} or the file in /etc/pristine/keys",
            report.public
        )
    })
}
