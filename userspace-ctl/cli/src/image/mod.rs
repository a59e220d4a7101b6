// SPDX-License-Identifier: GPL-2.0

//! `pristine image`: build, publish, list and verify master images.

mod apply;
mod build;
mod delta;
mod diff;
mod export;
mod gc;
mod list;
mod pin;
mod promote;
mod publish;
mod rewrap;
mod seal;
mod show;
mod source;
mod trace;
mod verify;

use std::path::Path;
use std::sync::Arc;

use clap::Subcommand;
use pristine_store::{
    open_for_writing, open_store, CancelToken, ChannelName, Error, ErrorKind, HttpOptions,
    ImageReader, ImageSelector, Keyring, Lease, LeaseOptions, RetryPolicy, SealedStore, Store,
    TrustError, TrustPolicy,
};

use pristine_transfer::reference::ReferenceStore;

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

/// `pristine image ...`
#[derive(Subcommand, Debug)]
pub enum ImageCommand {
    /// Build an image from a disk image, a block device, a directory tree or an archive, of many formats
    #[command(visible_alias = "import")]
    Build(Box<build::BuildArgs>),
    /// Copy an image to a store and make it a channel's next generation
    Publish(publish::PublishArgs),
    /// Make what turns one image into another cheaply
    Delta(delta::DeltaArgs),
    /// Turn a file or device that holds an older image into a newer one, in place
    Apply(apply::ApplyArgs),
    /// Make what a channel is at the next generation of another one; no data is copied
    Promote(promote::PromoteArgs),
    /// List the channels and images of a store
    List(list::ListArgs),
    /// Write an image out again, byte for byte: to a file, a block device or a stream
    Export(export::ExportArgs),
    /// Show an image: its size, where it comes from, where it is published
    Show(show::ShowArgs),
    /// Compare two images by block, by file and by package
    Diff(diff::DiffArgs),
    /// Open encrypted images to more recipients, or to fewer; no data is encrypted again
    Rewrap(rewrap::RewrapArgs),
    /// Keep an image although no channel needs it any more
    Pin(pin::PinArgs),
    /// Remove a pin
    Unpin(pin::UnpinArgs),
    /// Boot traces: publish, show or remove the order in which machines prefetch an image
    #[command(subcommand)]
    Trace(trace::TraceCommand),
    /// Remove from a store what no channel and no pin needs
    Gc(gc::GcArgs),
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
        ImageCommand::Promote(args) => promote::run(args, ui),
        ImageCommand::List(args) => list::run(args, ui),
        ImageCommand::Export(args) => export::run(args, ui),
        ImageCommand::Show(args) => show::run(args, ui),
        ImageCommand::Diff(args) => diff::run(args, ui),
        ImageCommand::Rewrap(args) => rewrap::run(args, ui),
        ImageCommand::Pin(args) => pin::run(args, ui),
        ImageCommand::Unpin(args) => pin::run_unpin(args, ui),
        ImageCommand::Trace(command) => trace::run(command, ui),
        ImageCommand::Gc(args) => gc::run(args, ui),
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
            ErrorKind::Untrusted => Code::Untrusted,
            ErrorKind::NoKey => Code::NoKey,
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
            Error::Untrusted { error, .. } => failure.hint(match error {
                TrustError::UnknownKey { .. } => {
                    "if the key is right, trust it: pristine key trust KEY.pub"
                }
                TrustError::Expired { .. } => {
                    "publish the image again, with a later time: pristine image publish --expires"
                }
                TrustError::Unsigned { .. } => {
                    "sign it as it is published: pristine image publish --key FILE"
                }
                _ => "who could write to the store, or is something on the way there? an image can be named by its id",
            }),
            Error::NoKey { location, .. } => failure.hint(format!(
                "give the identity that opens it (--identity FILE), or have who has it open it to yours: \
                 pristine image rewrap {location} --encrypt-to age1..."
            )),
            Error::InUse { .. } => {
                failure.hint("run it again when they are done; who died stops counting after 5 minutes")
            }
            Error::LeaseLost { .. } => failure.hint("run it again; what was done is not done again"),
            Error::Note { .. } => failure.hint("remove it: pristine image unpin STORE NAME"),
            Error::ReadOnly { .. } => {
                failure.hint("give the directory of the store, not the URL that it is served at")
            }
            _ => failure,
        }
    }
}

/// The failure of looking for an image, with what to do about it.
fn list_hint(error: Error, selector: &ImageSelector, location: &str) -> Failure {
    match (&error, selector) {
        (Error::NotFound { .. }, ImageSelector::Channel(_)) => {
            Failure::from(error).hint(format!("see what is there: pristine image list {location}"))
        }
        _ => Failure::from(error),
    }
}

/// Opens the image in `store` that `selector` names; without one, the only image there. If it is named by a channel,
/// `policy` must trust the release there.
fn open_image(
    store: &Arc<dyn Store>,
    selector: Option<&ImageSelector>,
    policy: &TrustPolicy,
) -> Outcome<ImageReader> {
    let only;
    let selector = match selector {
        Some(selector) => selector,
        None => {
            only = only_image(store.as_ref())?;
            &only
        }
    };
    let cancel = CancelToken::new();
    let retry = RetryPolicy::default();
    let store = follow(Arc::clone(store));
    let opened = ImageReader::open_trusted(Arc::clone(&store), selector, policy, retry, &cancel);
    opened.map_err(|error| list_hint(error, selector, store.location()))
}

/// The store with its references followed: packs that it does not have are read from where these lead.
pub fn follow(store: Arc<dyn Store>) -> Arc<dyn Store> {
    let (retry, cancel) = (RetryPolicy::default(), CancelToken::new());
    Arc::new(ReferenceStore::new(store, retry, &cancel))
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

/// The store at a location; what is encrypted there is in the clear for who has an identity that opens it.
pub(crate) fn open(location: &str) -> Outcome<Arc<dyn Store>> {
    decrypting(open_store(location)?)
}

/// As [`open`], to be written to.
pub(crate) fn open_to_write(location: &str) -> Outcome<Arc<dyn Store>> {
    decrypting(open_for_writing(location, HttpOptions::default())?)
}

fn decrypting(store: Arc<dyn Store>) -> Outcome<Arc<dyn Store>> {
    Ok(match Keyring::configured(&[])? {
        Some(keyring) => Arc::new(SealedStore::new(store, Arc::new(keyring))),
        None => store,
    })
}

/// A lease for writing to a store, for as long as it lives.
fn writer_lease(store: &Arc<dyn Store>, purpose: &str, ui: &Ui) -> Outcome<Lease> {
    let (options, cancel) = (LeaseOptions::default(), CancelToken::new());
    let waiting = |who: &str| ui.note(format!("waiting for {who}"));
    Ok(Lease::write(store, purpose, &options, &cancel, &waiting)?)
}

pub(crate) fn parse_selector(text: &str) -> Result<ImageSelector, String> {
    text.parse()
        .map_err(|_| "neither an image id (64 hexadecimal digits) nor a channel name".to_owned())
}

pub(crate) fn parse_channel(text: &str) -> Result<ChannelName, String> {
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
    let mut name = Path::new(path.file_name().unwrap_or(path.as_os_str()));
    // disk.img.xz is "disk".
    for _ in 0..2 {
        let known = [
            "img", "raw", "qcow2", "xz", "zst", "gz", "tar", "caibx", "tgz", "txz",
        ];
        let extension = name.extension().and_then(|extension| extension.to_str());
        if !extension.is_some_and(|extension| known.contains(&extension)) {
            break;
        }
        name = Path::new(name.file_stem().unwrap_or(name.as_os_str()));
    }
    name.to_string_lossy().into_owned()
}

/// The first digits of an id, enough for people.
pub(crate) fn short(id: &impl ToString) -> String {
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
}
