// SPDX-License-Identifier: GPL-2.0

//! `pristine image pin` and `pristine image unpin`

use clap::Args;
use pristine_store::{
    pin, pin_name, unpin, CancelToken, Found, ImageSelector, LeaseOptions, NoteName, Pin,
    RetryPolicy,
};
use pristine_trust::{now, time};
use serde::Serialize;

use super::publish::parse_duration;
use super::{parse_selector, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::Ui;

/// Arguments of `pristine image pin`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  Keep what stable is at now, whatever becomes of stable:
    pristine image pin /srv/store stable --name release-9
  Keep it while it is being copied elsewhere, for at most two days:
    pristine image pin /srv/store stable --name copy-to-tape --for 2d

`pristine image gc` keeps pinned images. Pinning again under the same name sets a new time.

JSON fields: store, name, image, until.")]
pub struct PinArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Which image, by id or channel
    #[arg(value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: ImageSelector,
    /// Name of the pin, of the form of a channel's
    #[arg(long, value_parser = parse_name)]
    name: NoteName,
    /// The pin ends by itself after this time, like 12h, 2d or 4w
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    time: Option<u64>,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Arguments of `pristine image unpin`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image unpin /srv/store release-9

The image stays until `pristine image gc` finds that nothing else needs it.

JSON fields: store, name.")]
pub struct UnpinArgs {
    /// The store: a directory or s3://BUCKET/PREFIX
    store: String,
    /// Name of the pin
    #[arg(value_parser = parse_name)]
    name: NoteName,
}

#[derive(Serialize)]
struct Report {
    store: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
}

fn parse_name(text: &str) -> Result<NoteName, String> {
    pin_name(text).map_err(|_| {
        format!("{text:?} is not a pin's name: 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit")
    })
}

pub(super) fn run(args: &PinArgs, ui: &Ui) -> Outcome {
    super::open(&args.store)?;
    let store = super::open_to_write(&args.store)?;
    // No more of it is read: it may be encrypted.
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    let policy = args.trust.policy()?;
    let image = Found::look_up(store.as_ref(), &args.image, &policy, retry, &cancel)?.image;
    let until = args.time.map(|time| now().saturating_add(time));
    let wanted = Pin {
        image,
        until,
        by: std::env::var("USER").unwrap_or_else(|_| "pristine image pin".to_owned()),
    };
    let lease = LeaseOptions::default();
    pin(&store, &args.name, &wanted, &lease, &CancelToken::new())?;
    let report = Report {
        store: store.location().to_owned(),
        name: args.name.name().to_owned(),
        image: Some(image.to_string()),
        until,
    };
    ui.result(&report, |out| {
        let until = until.map_or("for good".to_owned(), |until| {
            format!("until {}", time(until))
        });
        writeln!(
            out,
            "image {} is kept {until} ({})",
            short(&image),
            args.name
        )
    })
}

pub(super) fn run_unpin(args: &UnpinArgs, ui: &Ui) -> Outcome {
    super::open(&args.store)?;
    let store = super::open_to_write(&args.store)?;
    if !unpin(store.as_ref(), &args.name)? {
        let what = format!("there is no {} in {}", args.name, args.store);
        let hint = format!("see what is there: pristine image list {}", args.store);
        return Err(Failure::new(Code::NotFound, what).hint(hint));
    }
    let report = Report {
        store: store.location().to_owned(),
        name: args.name.name().to_owned(),
        image: None,
        until: None,
    };
    ui.result(&report, |out| writeln!(out, "removed {}", args.name))
}
