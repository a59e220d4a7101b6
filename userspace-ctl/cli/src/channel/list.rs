// SPDX-License-Identifier: GPL-2.0

//! `pristine channel list`

use std::io::{self, Write};

use clap::Args;
use pristine_store::{history, open_store, ChannelName, Error, SignedRelease};
use pristine_trust::time;
use serde::Serialize;

use super::signers::{cell, distrust, signed_by, SignedBy};
use crate::exit::{Code, Failure, Outcome};
use crate::image::{parse_channel, short};
use crate::key::TrustArgs;
use crate::ui::{Style, Table, Ui};

/// Arguments of `pristine channel list`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine channel list /srv/store stable
  pristine channel list http://server:8080 stable --trusted-keys keys --json

The newest first; the first one is what the channel is at. A ? after a key says that it is not trusted here.

JSON fields: store, channel, releases (generation, image, image_bytes, published, expires, oldest, parent, signed_by (key, \
label, trusted), untrusted; or generation, error).")]
pub struct ListArgs {
    /// The store, a directory or a URL
    store: String,
    /// The channel
    #[arg(value_parser = parse_channel)]
    channel: ChannelName,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    store: String,
    channel: String,
    releases: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    generation: u64,
    #[serde(flatten)]
    facts: Option<Facts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct Facts {
    image: String,
    image_bytes: u64,
    published: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<String>,
    signed_by: Vec<SignedBy>,
    /// Why it is not trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    untrusted: Option<String>,
}

pub(super) fn run(args: &ListArgs, ui: &Ui) -> Outcome {
    let store = open_store(&args.store)?;
    let policy = args.trust.policy()?;
    let releases = history(store.as_ref(), &args.channel)?;
    if releases.is_empty() {
        let error = Error::NotFound {
            location: store.location().to_owned(),
            object: format!("channel {}", args.channel),
        };
        let hint = format!("see what is there: pristine image list {}", args.store);
        return Err(Failure::from(error).hint(hint));
    }
    let facts = |signed: &SignedRelease| {
        let release = signed.release();
        Facts {
            image: release.image.to_string(),
            image_bytes: release.size,
            published: release.published,
            expires: release.expires,
            oldest: release.oldest,
            parent: release.parent.map(|parent| parent.to_string()),
            signed_by: signed_by(signed, &policy.keys),
            untrusted: distrust(signed, &policy),
        }
    };
    let entry = |(generation, release): &(u64, Result<SignedRelease, Error>)| Entry {
        generation: *generation,
        facts: release.as_ref().ok().map(facts),
        error: release.as_ref().err().map(ToString::to_string),
    };
    let report = Report {
        store: store.location().to_owned(),
        channel: args.channel.to_string(),
        releases: releases.iter().rev().map(entry).collect(),
    };
    ui.result(&report, |out| print(&report, ui, out))?;
    match report.releases.iter().filter(|r| r.error.is_some()).count() {
        0 => Ok(()),
        bad => Err(Failure::new(
            Code::Damaged,
            format!("{bad} releases are damaged"),
        )),
    }
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let heading = [
        "GENERATION",
        "IMAGE",
        "PUBLISHED",
        "EXPIRES",
        "OLDEST",
        "SIGNED BY",
    ];
    let mut table = Table::new(&heading, &[0, 4]);
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for entry in &report.releases {
        let Some(facts) = &entry.facts else {
            let generation = entry.generation.to_string();
            let dash = || "-".to_owned();
            table.row(vec![generation, dash(), dash(), dash(), dash(), dash()]);
            continue;
        };
        table.row(vec![
            entry.generation.to_string(),
            short(&facts.image),
            time(facts.published),
            text(facts.expires.map(time)),
            text(facts.oldest.map(|oldest| oldest.to_string())),
            cell(&facts.signed_by),
        ]);
    }
    table.write(ui, out)?;
    for entry in &report.releases {
        if let Some(error) = &entry.error {
            writeln!(out, "{} {error}", ui.paint(Style::Bad, "damaged:"))?;
        }
    }
    // What counts is what the channel is at.
    let first = report.releases.first().and_then(|e| e.facts.as_ref());
    if let Some(why) = first.and_then(|facts| facts.untrusted.as_ref()) {
        writeln!(
            out,
            "{} the first one: {why}",
            ui.paint(Style::Bad, "not trusted:")
        )?;
    }
    Ok(())
}
