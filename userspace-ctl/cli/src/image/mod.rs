// SPDX-License-Identifier: GPL-2.0

//! `pristine image`: build, publish, list and verify master images.

mod apply;
mod build;
mod delta;
mod list;
mod publish;
mod verify;

use std::path::Path;
use std::sync::Arc;

use clap::Subcommand;
use pristine_store::{
    open_store, CancelToken, ChannelName, Error, ErrorKind, ImageReader, ImageSelector,
    RetryPolicy, Store,
};

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// `pristine image ...`
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Build an image from a raw disk image, a block device or a directory tree
    Build(build::BuildArgs),
    /// Copy an image to a store and make it a channel's next generation
    Publish(publish::PublishArgs),
    /// Make what turns one image into another cheaply
    Delta(delta::DeltaArgs),
    /// Turn a file or device that holds an older image into a newer one, in place
    Apply(apply::ApplyArgs),
    /// List the channels and images of a store
    List(list::ListArgs),
    /// Reread images of a store and check every block
    Verify(verify::VerifyArgs),
}

/// Runs a command.
pub fn run(command: &ImageCommand, ui: &Ui) -> Outcome {
    match command {
        ImageCommand::Build(args) => build::run(args, ui),
        ImageCommand::Publish(args) => publish::run(args, ui),
        ImageCommand::Delta(args) => delta::run(args, ui),
        ImageCommand::Apply(args) => apply::run(args, ui),
        ImageCommand::List(args) => list::run(args, ui),
        ImageCommand::Verify(args) => verify::run(args, ui),
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let code = match error.kind() {
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::Damaged => Code::Damaged,
            ErrorKind::Unsupported => Code::Unsupported,
            ErrorKind::Conflict => Code::Busy,
            ErrorKind::Denied => Code::Denied,
            ErrorKind::Network | ErrorKind::Io | ErrorKind::Sink => Code::Io,
            ErrorKind::Usage => Code::Usage,
            _ => Code::Failure,
        };
        let failure = Failure::new(code, error.to_string());
        match &error {
            Error::NotAStore { .. } => failure.hint(
                "a store is made by building or publishing into it: pristine image publish --help",
            ),
            Error::NoImage { location, .. } => {
                failure.hint(format!("see what is there: pristine image list {location}"))
            }
            Error::Unreachable { .. } | Error::Timeout { .. } => failure
                .hint("is the server running there, and the address right? pristine serve --help"),
            Error::Conflict { .. } => failure
                .hint("look at what was published, and publish again if yours is still the newer"),
            Error::ReadOnly { .. } => {
                failure.hint("give the directory of the store, not the URL that it is served at")
            }
            _ => failure,
        }
    }
}

/// Opens the image in `store` that `selector` names; without one, the only image there.
fn open_image(store: &Arc<dyn Store>, selector: Option<&ImageSelector>) -> Outcome<ImageReader> {
    let only;
    let selector = match selector {
        Some(selector) => selector,
        None => {
            only = only_image(store.as_ref())?;
            &only
        }
    };
    let cancel = CancelToken::new();
    let opened = ImageReader::open(Arc::clone(store), selector, RetryPolicy::default(), &cancel);
    opened.map_err(|error| {
        let list = format!(
            "see what is there: pristine image list {}",
            store.location()
        );
        match (&error, selector) {
            (Error::NotFound { .. }, ImageSelector::Channel(_)) => Failure::from(error).hint(list),
            _ => Failure::from(error),
        }
    })
}

fn only_image(store: &dyn Store) -> Outcome<ImageSelector> {
    let images = store.images()?;
    match images.as_slice() {
        [image] => Ok(ImageSelector::Id(*image)),
        [] => {
            let what = format!("there is no image in {}", store.location());
            let hint = format!(
                "build one: pristine image build SOURCE -o {}",
                store.location()
            );
            Err(Failure::new(Code::NotFound, what).hint(hint))
        }
        several => {
            let what = format!("{} holds {} images", store.location(), several.len());
            let hint = format!(
                "say which, by id or channel: pristine image list {}",
                store.location()
            );
            Err(Failure::new(Code::Usage, what).hint(hint))
        }
    }
}

pub(crate) fn open(location: &str) -> Outcome<Arc<dyn Store>> {
    Ok(open_store(location)?)
}

fn parse_selector(text: &str) -> Result<ImageSelector, String> {
    text.parse()
        .map_err(|_| "neither an image id (64 hexadecimal digits) nor a channel name".to_owned())
}

fn parse_channel(text: &str) -> Result<ChannelName, String> {
    text.parse()
        .map_err(|error: pristine_store::ParseChannelError| error.to_string())
}

/// A size on the command line: bytes, or with a suffix K, M, G or T (powers of 1024).
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is not a size like 4G, 512M or 1048576");
    let upper = text.to_ascii_uppercase();
    let plain = upper.trim_end_matches('B').trim_end_matches('I');
    let (digits, shift) = match plain.char_indices().last() {
        Some((at, 'K')) => (&plain[..at], 10),
        Some((at, 'M')) => (&plain[..at], 20),
        Some((at, 'G')) => (&plain[..at], 30),
        Some((at, 'T')) => (&plain[..at], 40),
        _ => (plain, 0),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    let bytes = number.checked_mul(1 << shift).filter(|&bytes| bytes > 0);
    bytes.ok_or_else(error)
}

/// The name that an image gets from the path of its source.
fn name_of(path: &Path) -> String {
    let name = path.file_stem().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// A time as `2026-11-21 09:30:05Z`.
fn format_time(seconds: u64) -> String {
    let days = seconds / 86400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Days to a date in the Gregorian calendar, counted in eras of 400 years that begin in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}Z")
}

/// The first digits of an id, enough for people.
fn short(id: &impl ToString) -> String {
    id.to_string().chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        for bad in ["", "G", "-1", "1.5G", "99999999999T", "0", "x"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_formatted() {
        assert_eq!(format_time(0), "1970-01-01 00:00:00Z");
        assert_eq!(format_time(951_782_399), "2000-02-28 23:59:59Z");
        assert_eq!(format_time(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(format_time(1_795_253_405), "2026-11-21 09:30:05Z");
    }
}
