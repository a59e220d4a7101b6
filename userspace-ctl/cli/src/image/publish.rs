// SPDX-License-Identifier: GPL-2.0

//! `pristine image publish`

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use pristine_image::delta::make::MakeOptions;
use pristine_image::BLOCK_SIZE;
use pristine_store::sealed::seal_image;
use pristine_store::{
    open_for_writing, open_store, publish, repack, CancelToken, ChannelName, DeltaOptions,
    DirStore, HttpOptions, ImageReader, ImageSelector, NewRelease, PublishOptions, Published,
    SignedRelease, Store,
};
use pristine_trust::{now, time, Signature};
use serde::Serialize;

use super::seal::{SealArgs, Sealing};
use super::{open, open_image, parse_channel, parse_selector, short, writer_lease};
use crate::exit::{Code, Failure, Outcome};
use crate::key::{SignArgs, TrustArgs};
use crate::ui::{human_bytes, Style, Ui};

/// Arguments of `pristine image publish`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  pristine image publish build/debian.pri /srv/store --channel stable
  pristine image publish build/debian.pri /srv/store --channel stable --dry-run
  To an object store; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY:
    pristine image publish build/debian.pri s3://images/lab --channel stable
  pristine image publish build/debian.pri /srv/store --channel stable --key mill.key --expires 30d

What the target's packs hold already, of whatever image, is not sent again: if the image's own packs hold such blocks \
beside new ones, the new ones are put into packs of their own first.

Packs and manifest come first, the channel moves last: machines see the old generation or the new one, never a part. \
A publish that was interrupted goes on where it stopped when it is run again. If another publisher moves the \
channel meanwhile, this one fails with exit code 7 and leaves the channel alone.

With --key the release is signed in minisign's format, and machines that have the public key refuse what nobody signed. \
The same image again with another key or --expires is a new generation, and costs no transfer.

With --encrypt-to what is stored is encrypted with a store key, which is in the store, encrypted to each recipient (age1..., \
`pristine key new --age` or age-keygen). The store then knows sizes and what is read when, and nothing of the content; the image \
gets another id, which does not tell it either. Later images share blocks with it if an identity opens the key (--identity), and \
a channel that is encrypted stays so. `pristine image rewrap` opens the key to others:
    pristine image publish golden.pri /srv/store --channel lab --encrypt-to age1... --identity mine

JSON fields: channel, generation, image, image_bytes, encrypted, expires, oldest, signed_by, unchanged, sent_objects, sent_bytes, \
present_objects, present_bytes, delta_bytes, delta_left_out, trace_runs, elapsed_ms, dry_run.")]
pub struct PublishArgs {
    /// Where the image is: a built image, or any other store (directory or URL)
    from: String,
    /// Store to publish to: a directory, made if it is missing, or s3://BUCKET/PREFIX?endpoint=URL&region=NAME
    to: String,
    /// Channel to move to the image
    #[arg(long, value_name = "NAME", value_parser = parse_channel)]
    channel: ChannelName,
    /// Which image, by id or channel; needed if there are several
    #[arg(long, value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    /// Make deltas from so many images that the channel had last, so that machines fetch little
    #[arg(long, value_name = "N", default_value_t = 1)]
    deltas: usize,
    /// zstd level of the deltas: 1 is fast, 22 is small
    #[arg(long, value_name = "LEVEL", default_value_t = 19, value_parser = clap::value_parser!(i32).range(1..=22))]
    delta_level: i32,
    #[command(flatten)]
    release: ReleaseArgs,
    #[command(flatten)]
    seal: SealArgs,
    /// Only say what would be sent, to the byte (without deltas, which are not made then)
    #[arg(long)]
    dry_run: bool,
}

/// What a new release of a channel says, and who vouches for it and for what it comes from.
#[derive(Args, Debug)]
pub(super) struct ReleaseArgs {
    #[command(flatten)]
    pub(super) sign: SignArgs,
    /// From then on machines do not trust the release any more: 12h, 30d, 8w
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    expires: Option<u64>,
    /// The oldest generation of the channel that machines may still accept [default: as before]
    #[arg(long, value_name = "GENERATION")]
    pub(super) oldest: Option<u64>,
    #[command(flatten)]
    pub(super) trust: TrustArgs,
}

impl ReleaseArgs {
    /// When it expires, in seconds since 1970.
    pub(super) fn expires(&self) -> Option<u64> {
        self.expires.map(|after| now().saturating_add(after))
    }
}

#[derive(Serialize)]
struct Report {
    channel: String,
    generation: u64,
    image: String,
    image_bytes: u64,
    /// The store key.
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest: Option<u64>,
    signed_by: Vec<String>,
    unchanged: bool,
    sent_objects: u64,
    sent_bytes: u64,
    present_objects: u64,
    present_bytes: u64,
    delta_bytes: u64,
    /// Of a delta that was made and saves too little to be kept.
    delta_left_out: u64,
    trace_runs: u64,
    elapsed_ms: u64,
    dry_run: bool,
}

pub(super) fn run(args: &PublishArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let source = open(&args.from)?;
    let image = open_image(&source, args.image.as_ref(), &args.release.trust.policy()?)?;
    // Passwords before anything that takes time.
    let signers = args.release.sign.signers(args.dry_run)?;
    let target = open_target(&args.to, args.dry_run)?;
    // From here on: a store key that is found there stays there.
    let _lease = match &target {
        Some(target) if !args.dry_run => Some(writer_lease(target, "publish", ui)?),
        _ => None,
    };
    let sealing = args
        .seal
        .sealing(&image, target.as_ref(), &args.channel, ui)?;
    if sealing.as_ref().is_some_and(|sealing| sealing.is_new) {
        ui.note("a new store key is made: blocks are shared with no image that is there (an identity that opens an older key, --identity, would)");
    }
    let bar = ui.bytes_bar("publishing", 0);
    let delta_bar = bar.clone();
    let options = PublishOptions {
        dry_run: args.dry_run,
        deltas: DeltaOptions {
            count: args.deltas,
            make: MakeOptions {
                level: args.delta_level,
                ..MakeOptions::default()
            },
            progress: Arc::new(move |done, total| {
                delta_bar.set_prefix("making the delta");
                delta_bar.set_length(total * BLOCK_SIZE as u64);
                delta_bar.set_position(done * BLOCK_SIZE as u64);
            }),
        },
        expires: args.release.expires(),
        oldest: args.release.oldest,
        signers,
        ..PublishOptions::default()
    };
    let published = match target {
        Some(target) => {
            let target = match &sealing {
                Some(sealing) => {
                    if !args.dry_run {
                        sealing.put_key(target.as_ref())?;
                    }
                    sealing.over(target)
                }
                None => target,
            };
            let scratch = Scratch::new(args, sealing.is_some());
            let repacked = repack_for(&image, &target, &scratch, ui)?;
            let image = repacked.as_ref().unwrap_or(&image);
            let sealed = seal(image, sealing.as_ref())?;
            let image = sealed.as_ref().unwrap_or(image);
            let published = publish(image, &target, &args.channel, &options, &|done, total| {
                bar.set_length(total);
                bar.set_position(done);
            });
            bar.finish_and_clear();
            let published = published?;
            for remark in target.remarks() {
                ui.note(remark);
            }
            published
        }
        None => {
            let sealed = seal(&image, sealing.as_ref())?;
            let image = sealed.as_ref().unwrap_or(&image);
            // What would be encrypted there is longer; nothing is read from where it is.
            let store = match &sealing {
                Some(sealing) => sealing.over(image.shared_store()),
                None => image.shared_store(),
            };
            dry_run_on_nothing(image, store.as_ref(), &args.channel, &options)
        }
    };
    let release = published.release.release();
    let report = Report {
        channel: args.channel.to_string(),
        generation: release.generation,
        image: release.image.to_string(),
        image_bytes: release.size,
        encrypted: sealing.as_ref().map(|sealing| sealing.key.id().to_string()),
        expires: release.expires,
        oldest: release.oldest,
        signed_by: keys_of(&published.release),
        unchanged: published.unchanged,
        sent_objects: published.sent_objects,
        sent_bytes: published.sent_bytes,
        present_objects: published.present_objects,
        present_bytes: published.present_bytes,
        delta_bytes: published.delta_bytes,
        delta_left_out: published.delta_left_out,
        trace_runs: published.trace_runs,
        elapsed_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    ui.result(&report, |out| print(&report, ui, out))
}

/// The ids of the keys that signed a release.
fn keys_of(release: &SignedRelease) -> Vec<String> {
    let signatures = release.signatures().iter();
    let signatures = signatures.flat_map(|signature| signature.parse::<Signature>());
    signatures
        .map(|signature| signature.key_id().to_string())
        .collect()
}

/// A time on the command line, in seconds: a number of hours, days or weeks.
pub(super) fn parse_duration(text: &str) -> Result<u64, String> {
    let unit = match text.chars().last() {
        Some('h') => 3600,
        Some('d') => 86_400,
        Some('w') => 7 * 86_400,
        _ => 0,
    };
    let number = text.get(..text.len().saturating_sub(1)).unwrap_or_default();
    let number = number
        .parse::<u32>()
        .ok()
        .filter(|number| *number > 0 && unit > 0);
    let seconds = number.map(|number| u64::from(number) * unit);
    seconds.ok_or_else(|| format!("{text:?} is not a time like 12h, 30d or 8w"))
}

/// A directory for packs that are made to be sent, gone when this is dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(args: &PublishArgs, encrypted: bool) -> Self {
        let target = Path::new(args.to.strip_prefix("file://").unwrap_or(&args.to));
        // Beside the target there is room for what goes into it; a dry run leaves the target alone, and what is to be
        // encrypted is not for where the target is.
        let parent = match target.is_dir() && !args.dry_run && !encrypted {
            true => target.join(".tmp"),
            false => std::env::temp_dir(),
        };
        Scratch(parent.join(format!("publish-{}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Mostly it was never made.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The image with what the target has of it left out, if it is to be sent in new packs.
fn repack_for(
    image: &ImageReader,
    target: &Arc<dyn Store>,
    scratch: &Scratch,
    ui: &Ui,
) -> Outcome<Option<ImageReader>> {
    let bar = ui.bytes_bar("comparing", image.size());
    let store = || -> pristine_store::Result<Arc<dyn Store>> {
        Ok(Arc::new(DirStore::open_or_create(&scratch.0)?))
    };
    let progress = |done| bar.set_position(done);
    let repacked = repack(image, target, &store, &CancelToken::new(), &progress);
    bar.finish_and_clear();
    Ok(repacked?)
}

/// The image as it is published encrypted, if it is and is not yet.
fn seal(image: &ImageReader, sealing: Option<&Sealing>) -> Outcome<Option<ImageReader>> {
    match sealing {
        Some(sealing) if image.manifest().blinding().is_none() => {
            Ok(Some(seal_image(image, &sealing.key, &CancelToken::new())?))
        }
        _ => Ok(None),
    }
}

/// The store to publish to; `None` for one that does not exist and must not be made.
fn open_target(to: &str, dry_run: bool) -> Outcome<Option<Arc<dyn Store>>> {
    if !dry_run {
        return Ok(Some(open_for_writing(to, HttpOptions::default())?));
    }
    match open_store(to).map_err(Failure::from) {
        Err(error) if error.code() == Code::NotFound && !Path::new(to).exists() => Ok(None),
        result => result.map(Some),
    }
}

/// What publishing to an empty store would take: everything.
fn dry_run_on_nothing(
    image: &ImageReader,
    store: &dyn Store,
    channel: &ChannelName,
    options: &PublishOptions,
) -> Published {
    let lens = store.stored_lens(image.manifest());
    let bytes: u64 = lens.packs.iter().sum();
    let new = NewRelease {
        image: image.image(),
        size: image.size(),
        published: None,
        expires: options.expires,
        oldest: options.oldest,
    };
    Published {
        release: SignedRelease::unsigned(new.after(channel, None)),
        unchanged: false,
        sent_objects: lens.packs.len() as u64 + 1,
        sent_bytes: bytes + lens.manifest,
        present_objects: 0,
        present_bytes: 0,
        delta_bytes: 0,
        delta_left_out: 0,
        trace_runs: 0,
    }
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let (would, sent) = match report.dry_run {
        true => ("would be ", "to send"),
        false => ("is ", "sent"),
    };
    if report.unchanged {
        writeln!(
            out,
            "{} is at image {} already (generation {})",
            ui.paint(Style::Bold, &report.channel),
            short(&report.image),
            report.generation
        )?;
    } else {
        writeln!(
            out,
            "{} {would}at generation {}: image {}",
            ui.paint(Style::Bold, &report.channel),
            report.generation,
            report.image
        )?;
    }
    if let Some(key) = &report.encrypted {
        writeln!(out, "encrypted with store key {key}")?;
    }
    if !report.signed_by.is_empty() {
        writeln!(out, "signed by {}", report.signed_by.join(", "))?;
    }
    if let Some(expires) = report.expires {
        writeln!(out, "expires {}", time(expires))?;
    }
    writeln!(
        out,
        "{sent}: {} objects, {} bytes ({}); there before: {} objects ({})",
        report.sent_objects,
        report.sent_bytes,
        human_bytes(report.sent_bytes),
        report.present_objects,
        human_bytes(report.present_bytes),
    )?;
    if report.delta_bytes > 0 {
        let bytes = report.delta_bytes;
        writeln!(
            out,
            "made: a delta from what the channel had, {bytes} bytes ({})",
            human_bytes(bytes)
        )?;
    }
    if report.delta_left_out > 0 {
        let bytes = human_bytes(report.delta_left_out);
        writeln!(
            out,
            "no delta is kept: with its {bytes} machines would save less than a quarter of what they fetch"
        )?;
    }
    if report.trace_runs > 0 {
        let runs = report.trace_runs;
        writeln!(
            out,
            "the boot trace of what the channel had is this image's, too ({runs} runs)"
        )?;
    }
    if report.dry_run {
        writeln!(out, "nothing was sent (dry run)")?;
    }
    Ok(())
}
