// SPDX-License-Identifier: GPL-2.0

//! `pristine image apply`

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use pristine_image::{ImageId, BLOCK_SIZE};
use pristine_store::update::{
    blinding_of, digests_of_disk, Before, Local, Update, UpdateOptions, Updated,
};
use pristine_store::{CancelToken, Found, ImageSelector, RetryPolicy, Store};
use serde::Serialize;

use super::{open, parse_selector, parse_size, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image apply`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  A disk or a file that holds an older generation becomes the newest one:
    pristine image apply http://10.0.2.2:8080 /dev/vdb --image stable
  What would that take, to the byte?
    pristine image apply http://10.0.2.2:8080 disk.img --image stable --dry-run
  Another file, made from an old one that stays as it is:
    pristine image apply /srv/store new.img --image stable --seed old.img

What the target holds is read first, to find the image that it is, if it is one: then the store's delta is all that is \
fetched. Otherwise what it holds anywhere is taken from there, and the rest is fetched. Every block is verified before \
it is written. A run that was cut is run again; with --from, the image that it began with, most of what was left to do \
comes from the delta still.

JSON fields: image, image_bytes, target, from, method (delta, blocks, none), to_fetch_bytes, fetched_bytes, blocks_changed, \
blocks_moved, blocks_new, blocks_written, blocks_fetched, frames_unusable, elapsed_ms, dry_run.")]
pub struct ApplyArgs {
    /// Store: a directory or a URL
    store: String,
    /// File or block device (not mounted) that is to hold the image
    target: PathBuf,
    /// Image or channel
    #[arg(long, value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: ImageSelector,
    /// The image that the target holds, or held before a run that was cut [default: found out]
    #[arg(long, value_name = "ID", value_parser = parse_id)]
    from: Option<ImageId>,
    /// Make the target, which must not be there yet, from a copy of this file
    #[arg(long, value_name = "FILE")]
    seed: Option<PathBuf>,
    /// Memory for content that is needed after it was overwritten
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "128M")]
    memory: u64,
    #[command(flatten)]
    trust: TrustArgs,
    /// Only say what would be fetched and written, to the byte
    #[arg(long)]
    dry_run: bool,
}

fn parse_id(text: &str) -> Result<ImageId, String> {
    text.parse()
        .map_err(|_| "not an image id (64 hexadecimal digits)".to_owned())
}

#[derive(Serialize)]
struct Report {
    image: String,
    image_bytes: u64,
    target: String,
    from: Option<String>,
    method: &'static str,
    to_fetch_bytes: u64,
    fetched_bytes: u64,
    blocks_changed: u64,
    blocks_moved: u64,
    blocks_new: u64,
    blocks_written: u64,
    blocks_fetched: u64,
    frames_unusable: u64,
    elapsed_ms: u64,
    dry_run: bool,
}

pub(super) fn run(args: &ApplyArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let store = open(&args.store)?;
    let retry = RetryPolicy::default();
    let cancel = CancelToken::new();
    let found = Found::look_up(
        store.as_ref(),
        &args.image,
        &args.trust.policy()?,
        retry,
        &cancel,
    )?;
    let mut target = Target::open(args)?;
    let mut report = Report {
        image: found.image.to_string(),
        image_bytes: 0,
        target: args.target.display().to_string(),
        from: args.from.map(|id| id.to_string()),
        method: "none",
        to_fetch_bytes: 0,
        fetched_bytes: 0,
        blocks_changed: 0,
        blocks_moved: 0,
        blocks_new: 0,
        blocks_written: 0,
        blocks_fetched: 0,
        frames_unusable: 0,
        elapsed_ms: 0,
        dry_run: args.dry_run,
    };
    let digests = match args.from {
        Some(_) => None,
        None => {
            let size = found.release.as_ref().map(|r| r.release().size);
            // The image that it holds has its id by the same key.
            let blinding = blinding_of(&store, found.image, retry, &cancel)?;
            Some(target.digests(size, ui)?.blinded(blinding))
        }
    };
    let here = digests.as_ref().map(|digests| digests.image());
    if here == Some(found.image) {
        report.image_bytes = target.len;
        report.from = report.image.clone().into();
    } else {
        let before = match (&digests, args.from) {
            (Some(digests), _) => Before::Content(digests),
            (None, Some(from)) => Before::Image(from),
            (None, None) => {
                return Err(Failure::new(
                    Code::Failure,
                    "nothing is known of the target",
                ))
            }
        };
        let update = Update::plan(&store, &before, found.image, None, retry, &cancel)?;
        let update = update.ok_or_else(|| {
            let what = format!(
                "the store has no image {}",
                report.from.as_deref().unwrap_or_default()
            );
            Failure::new(Code::NotFound, what)
                .hint("leave --from away: then the target is read to find what it holds")
        })?;
        go(
            args,
            &update,
            store.as_ref(),
            digests.is_some(),
            &mut target,
            &mut report,
            ui,
        )?;
        if report.method == "delta" {
            report.from = args.from.or(here).map(|id| id.to_string());
        }
    }
    report.fetched_bytes = store.traffic().bytes;
    report.elapsed_ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
    ui.result(&report, |out| print(&report, ui, out))
}

/// Plans are made: says what they cost, and carries them out.
fn go(
    args: &ApplyArgs,
    update: &Update,
    store: &dyn Store,
    known: bool,
    target: &mut Target,
    report: &mut Report,
    ui: &Ui,
) -> Outcome {
    let cost = update.cost()?;
    report.image_bytes = update.size();
    report.method = if cost.delta.is_some() {
        "delta"
    } else {
        "blocks"
    };
    report.blocks_changed = cost.changed;
    report.blocks_moved = cost.moved;
    report.blocks_new = cost.new;
    // What was read to come here counts as well.
    report.to_fetch_bytes = store.traffic().bytes + update.bytes_to_fetch()?;
    target.check_size(update.size())?;
    if args.dry_run {
        return Ok(());
    }
    target.begin(update.size())?;
    let options = UpdateOptions {
        memory: args.memory,
        trust_unchanged: known,
        ..UpdateOptions::default()
    };
    let bar = ui.bytes_bar("applying", update.size());
    let applied = update.apply(target, &options, &mut |done, _| {
        bar.set_position(done * BLOCK_SIZE as u64)
    });
    bar.finish_and_clear();
    let Updated { written, fetched, frames_unusable, .. } = applied.map_err(|error| {
        let failure = Failure::from(error);
        match args.from {
            Some(_) => failure.hint("run it again: what is right already is left alone"),
            None => failure.hint("run it again: what is right already is left alone; --from with the image that it held saves bytes"),
        }
    })?;
    report.blocks_written = written;
    report.blocks_fetched = fetched;
    report.frames_unusable = frames_unusable;
    target.finish(update.size())
}

/// The file or device.
struct Target {
    path: PathBuf,
    file: File,
    /// Its length in bytes before.
    len: u64,
    device: bool,
}

impl Target {
    fn open(args: &ApplyArgs) -> Outcome<Self> {
        let path = &args.target;
        if let (Some(seed), false) = (&args.seed, args.dry_run) {
            copy(seed, path)?;
        }
        // A dry run looks at the seed itself.
        let path = match &args.seed {
            Some(seed) if args.dry_run => seed,
            _ => path,
        };
        let failure = |error: &io::Error| {
            let failure = Failure::io(format!("cannot open {}", path.display()), error);
            match error.kind() {
                io::ErrorKind::NotFound => {
                    failure.hint("to begin with nothing: pristine image export --help")
                }
                _ => failure,
            }
        };
        let kind = std::fs::metadata(path)
            .map_err(|e| failure(&e))?
            .file_type();
        let device = kind.is_block_device();
        if !device && !kind.is_file() {
            let what = format!("{} is neither a file nor a block device", path.display());
            return Err(Failure::new(Code::Usage, what));
        }
        if device && !args.dry_run && pristine_device::block::is_in_use(path)? {
            let what = format!("{} is in use (mounted?)", path.display());
            return Err(Failure::new(Code::Busy, what)
                .hint("unmount it first; the system's own disk is updated by the agent at boot"));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!args.dry_run)
            .open(path)
            .map_err(|e| failure(&e))?;
        let len = pristine_device::block::size_bytes(path)?;
        Ok(Target {
            path: path.clone(),
            file,
            len,
            device,
        })
    }

    /// What it holds. A device may be larger than the image on it, so only as much is looked at as the image has.
    fn digests(
        &mut self,
        image: Option<u64>,
        ui: &Ui,
    ) -> Outcome<pristine_image::delta::DigestList> {
        let len = match image {
            Some(image) if self.device => self.len.min(image),
            _ => self.len,
        };
        let blocks = len.div_ceil(BLOCK_SIZE as u64).max(1);
        let bar = ui.bytes_bar("reading", len);
        let digests = digests_of_disk(self, blocks, &mut |done| {
            bar.set_position(done * BLOCK_SIZE as u64)
        });
        bar.finish_and_clear();
        digests.map_err(|error| Failure::io(format!("cannot read {}", self.path.display()), &error))
    }

    fn check_size(&self, image: u64) -> Outcome {
        if self.device && self.len < image {
            let what = format!(
                "{} has {} bytes, the image has {image}",
                self.path.display(),
                self.len
            );
            return Err(Failure::new(Code::TooSmall, what));
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Outcome {
        let set = self.file.set_len(len);
        set.map_err(|error| {
            Failure::io(
                format!("cannot change the size of {}", self.path.display()),
                &error,
            )
        })
    }

    fn begin(&self, image: u64) -> Outcome {
        match !self.device && self.len < image {
            true => self.set_len(image),
            false => Ok(()),
        }
    }

    /// What lay beyond the image was perhaps needed until now.
    fn finish(&self, image: u64) -> Outcome {
        if !self.device && self.len > image {
            self.set_len(image)?;
        }
        let synced = self.file.sync_all();
        synced.map_err(|error| Failure::io(format!("cannot write {}", self.path.display()), &error))
    }
}

impl Local for Target {
    fn read(&mut self, first: u64, mut into: &mut [u8]) -> io::Result<()> {
        let mut at = first * BLOCK_SIZE as u64;
        while !into.is_empty() {
            match self.file.read_at(into, at) {
                Ok(0) => {
                    into.fill(0);
                    break;
                }
                Ok(len) => {
                    into = &mut into[len..];
                    at += len as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, first * BLOCK_SIZE as u64)
    }

    fn zero(&mut self, blocks: Range<u64>) -> io::Result<()> {
        let block = BLOCK_SIZE as u64;
        pristine_device::block::zero(
            &self.file,
            blocks.start * block,
            (blocks.end - blocks.start) * block,
        )
    }
}

/// Copies a file, sharing its content where the file system can, and leaving holes where it has some.
fn copy(seed: &Path, target: &Path) -> Outcome {
    let failure = |what: &str, path: &Path, error: &io::Error| {
        Failure::io(format!("cannot {what} {}", path.display()), error)
    };
    let from = File::open(seed).map_err(|error| failure("open", seed, &error))?;
    let len = from
        .metadata()
        .map_err(|error| failure("open", seed, &error))?
        .len();
    let created = OpenOptions::new().write(true).create_new(true).open(target);
    let to = created.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Failure::new(
            Code::Exists,
            format!("{} is there already", target.display()),
        )
        .hint("with --seed a new file is made; without it, what is there is changed in place"),
        _ => failure("create", target, &error),
    })?;
    if rustix::fs::ioctl_ficlone(&to, &from).is_ok() {
        return Ok(());
    }
    to.set_len(len)
        .map_err(|error| failure("create", target, &error))?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = buffer.len().min((len - at) as usize);
        let part = &mut buffer[..part];
        from.read_exact_at(part, at)
            .map_err(|error| failure("read", seed, &error))?;
        if !pristine_image::is_zero(part) {
            to.write_all_at(part, at)
                .map_err(|error| failure("write", target, &error))?;
        }
        at += part.len() as u64;
    }
    Ok(())
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let target = ui.paint(Style::Bold, &report.target);
    let image = short(&report.image);
    match (report.method, report.dry_run) {
        ("none", _) => return writeln!(out, "{target} is image {image} already"),
        (_, true) => writeln!(out, "{target} would become image {image}")?,
        (_, false) => writeln!(out, "{target} is image {image} now")?,
    }
    writeln!(
        out,
        "{} blocks change: {} are there elsewhere, {} are new",
        human_count(report.blocks_changed),
        human_count(report.blocks_moved),
        human_count(report.blocks_new)
    )?;
    let how = match (report.method, &report.from) {
        ("delta", Some(from)) => format!("by the delta from image {}", short(from)),
        ("delta", None) => "by a delta".to_owned(),
        _ => "without a delta".to_owned(),
    };
    match report.dry_run {
        true => {
            let bytes = report.to_fetch_bytes;
            writeln!(
                out,
                "to fetch: {bytes} bytes ({}), {how}",
                human_bytes(bytes)
            )?;
            writeln!(out, "nothing was written (dry run)")
        }
        false => {
            let bytes = report.fetched_bytes;
            writeln!(
                out,
                "fetched: {bytes} bytes ({}), {how}; written: {} blocks",
                human_bytes(bytes),
                human_count(report.blocks_written)
            )
        }
    }
}
