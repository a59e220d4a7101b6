// SPDX-License-Identifier: GPL-2.0

//! `pristine image export`

use std::io::{self, BufRead, IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use pristine_store::{CancelToken, FetchOptions, ImageReader, ImageSelector};
use pristine_transfer::export::{
    to_device, to_file, to_qemu, to_stream, to_zstd, ExportOptions, Exported,
};
use pristine_transfer::Watch;
use serde::Serialize;

use super::source::show;
use super::{open, open_image, parse_selector, short};
use crate::exit::{Code, Failure, Outcome};
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Ui};

/// Arguments of `pristine image export`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  A raw, sparse file:
    pristine image export http://server:8080 disk.img --image stable
  For QEMU, or compressed:
    pristine image export build/debian.pri debian.qcow2
    pristine image export build/debian.pri debian.img.zst
  Onto a disk (it asks before it overwrites):
    pristine image export /srv/store /dev/sdb --image stable
  Through a pipe:
    pristine image export /srv/store - --image stable | ssh host 'dd of=/dev/vdb bs=1M'

The result is the image byte for byte; every block is verified. A file has its name only once it is complete; an export \
that was cut goes on where it stopped when it is run again. A disk that is mounted is refused; what it has behind the \
image is left alone.

JSON fields: image, output, format, bytes, fetched_blocks, zero_blocks, kept_blocks, received_bytes, requests, \
elapsed_ms. With the output - they go to stderr.")]
pub struct ExportArgs {
    /// Where the image is: a built image, or any other store (directory or URL)
    from: String,
    /// A file, a block device, or - for standard output
    output: PathBuf,
    /// Which image, by id or channel; needed if there are several
    #[arg(long, value_name = "ID|CHANNEL", value_parser = parse_selector)]
    image: Option<ImageSelector>,
    #[command(flatten)]
    trust: TrustArgs,
    /// Format of the file [default: by its name: .qcow2, .zst, else raw]
    #[arg(long, value_enum)]
    format: Option<OutputFormat>,
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
    /// Overwrite a block device without asking
    #[arg(long)]
    yes: bool,
    /// Only say what would be written
    #[arg(long)]
    dry_run: bool,
    /// zstd level of a .zst: 1 is fast, 19 is small
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    #[arg(help_heading = "Tuning")]
    level: i32,
    /// Requests at once
    #[arg(long, default_value_t = 4, help_heading = "Tuning", value_parser = parse_parallel)]
    parallel: usize,
}

/// What an export is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum OutputFormat {
    /// The bytes of the disk
    Raw,
    /// qcow2, by qemu-img
    Qcow2,
    /// The bytes of the disk, compressed with zstd
    Zst,
}

fn parse_parallel(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err("give a number from 1 to 64".to_owned()),
    }
}

#[derive(Serialize)]
struct Report {
    image: String,
    output: String,
    format: OutputFormat,
    bytes: u64,
    fetched_blocks: u64,
    zero_blocks: u64,
    kept_blocks: u64,
    received_bytes: u64,
    requests: u64,
    elapsed_ms: u64,
    dry_run: bool,
}

pub(super) fn run(args: &ExportArgs, ui: &Ui) -> Outcome {
    let begin = Instant::now();
    let format = format_of(args)?;
    let is_stream = args.output == Path::new("-");
    if is_stream && io::stdout().is_terminal() && !args.dry_run {
        let failure = Failure::new(Code::Usage, "a disk image does not go to a terminal");
        return Err(
            failure.hint("give a file, or pipe it: pristine image export STORE - | dd of=…")
        );
    }
    let store = open(&args.from)?;
    let image = open_image(&store, args.image.as_ref(), &args.trust.policy()?)?;
    let exported = match args.dry_run {
        true => Exported {
            bytes: image.size(),
            ..Exported::default()
        },
        false => export(args, &image, format, ui)?,
    };
    let report = Report {
        image: image.image().to_string(),
        output: args.output.display().to_string(),
        format,
        bytes: exported.bytes,
        fetched_blocks: exported.fetched_blocks,
        zero_blocks: exported.zero_blocks,
        kept_blocks: exported.kept_blocks,
        received_bytes: exported.received_bytes,
        requests: exported.requests,
        elapsed_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    if is_stream && !args.dry_run {
        // Standard output has the image.
        return report_beside(&report, ui);
    }
    ui.result(&report, |out| print(&report, ui, out))
}

fn format_of(args: &ExportArgs) -> Outcome<OutputFormat> {
    let extension = args.output.extension().and_then(|text| text.to_str());
    let format = args.format.unwrap_or(match extension {
        Some("qcow2") => OutputFormat::Qcow2,
        Some("zst") => OutputFormat::Zst,
        _ => OutputFormat::Raw,
    });
    if args.output == Path::new("-") && format == OutputFormat::Qcow2 {
        let failure = Failure::new(Code::Usage, "qcow2 cannot be written to a stream");
        return Err(failure.hint("give the name of a file"));
    }
    if is_device(&args.output) && format != OutputFormat::Raw {
        let failure = Failure::new(Code::Usage, "a block device takes a raw image only");
        return Err(failure.hint("leave --format out"));
    }
    Ok(format)
}

fn is_device(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn export(
    args: &ExportArgs,
    image: &ImageReader,
    format: OutputFormat,
    ui: &Ui,
) -> Outcome<Exported> {
    let device = is_device(&args.output);
    if device && !args.yes {
        confirm(&args.output, image)?;
    }
    let bar = ui.bytes_bar("exporting", image.size());
    let progress = |what: &str, done: u64, total: Option<u64>| show(&bar, what, done, total);
    let cancel = CancelToken::new();
    let options = ExportOptions {
        fetch: FetchOptions {
            parallel: args.parallel,
            cancel: cancel.clone(),
            ..FetchOptions::default()
        },
        replace: args.force,
        watch: Watch {
            progress: &progress,
            cancel,
        },
    };
    let output = args.output.as_path();
    let exported = match format {
        _ if device => to_device(image, output, &options),
        OutputFormat::Qcow2 => to_qemu(image, output, "qcow2", &options),
        OutputFormat::Raw if output == Path::new("-") => {
            to_stream(image, &mut io::stdout(), &options)
        }
        OutputFormat::Zst if output == Path::new("-") => pristine_transfer::export::to_zstd_stream(
            image,
            &mut io::stdout(),
            args.level,
            &options,
        ),
        OutputFormat::Raw => to_file(image, output, &options),
        OutputFormat::Zst => to_zstd(image, output, args.level, &options),
    };
    bar.finish_and_clear();
    Ok(exported?)
}

/// Asks before a device is overwritten.
fn confirm(device: &Path, image: &ImageReader) -> Outcome {
    let device = device.display();
    if !io::stdin().is_terminal() {
        let failure = Failure::new(Code::Usage, format!("this would overwrite {device}"));
        return Err(failure.hint("say so with --yes"));
    }
    let size = human_bytes(image.size());
    let mut stderr = io::stderr().lock();
    let asked = write!(
        stderr,
        "This overwrites the first {size} of {device} with image {}. Go on? [y/N] ",
        short(&image.image())
    )
    .and_then(|()| stderr.flush());
    let mut answer = String::new();
    let answered = asked.and_then(|()| io::stdin().lock().read_line(&mut answer));
    answered.map_err(|error| Failure::io("cannot ask", &error))?;
    match matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        true => Ok(()),
        false => Err(Failure::new(
            Code::Denied,
            format!("{device} was left alone"),
        )),
    }
}

fn report_beside(report: &Report, ui: &Ui) -> Outcome {
    if ui.json() {
        let text = serde_json::to_string(report).unwrap_or_default();
        let _ = writeln!(io::stderr(), "{text}");
    } else {
        ui.note(format!(
            "{} bytes of image {}",
            report.bytes,
            short(&report.image)
        ));
    }
    Ok(())
}

fn print(report: &Report, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    let label = |text: &str| ui.paint(Style::Bold, &format!("{text:<9}"));
    writeln!(out, "{} {}", label("image"), report.image)?;
    writeln!(out, "{} {}", label("output"), report.output)?;
    writeln!(out, "{} {}", label("size"), human_bytes(report.bytes))?;
    if report.dry_run {
        return writeln!(out, "nothing was written (dry run)");
    }
    writeln!(
        out,
        "{} {} blocks fetched ({}, {} requests), {} zero, {} there before",
        label("content"),
        human_count(report.fetched_blocks),
        human_bytes(report.received_bytes),
        human_count(report.requests),
        human_count(report.zero_blocks),
        human_count(report.kept_blocks),
    )?;
    let seconds = report.elapsed_ms as f64 / 1000.0;
    writeln!(out, "{} {seconds:.1} s", label("time"))
}
