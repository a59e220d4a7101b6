// SPDX-License-Identifier: GPL-2.0

//! `pristine image diff`

use std::io::{self, Write};
use std::sync::Arc;

use clap::Args;
use pristine_image::BLOCK_SIZE;
use pristine_store::compare::{compare, compare_files, Comparison, FileComparison, Origin};
use pristine_store::{CancelToken, ImageSelector};
use serde::Serialize;

use super::{open, open_image, parse_selector, short};
use crate::exit::Outcome;
use crate::key::TrustArgs;
use crate::ui::{human_bytes, human_count, Style, Table, Ui};

/// Arguments of `pristine image diff`.
#[derive(Args, Debug)]
#[command(after_long_help = "\
Examples:
  What would machines on stable get from canary?
    pristine image diff /srv/store stable canary
  A fresh build against what is published, all files:
    pristine image diff http://server:8080 stable debian --with build/debian.pri --all

Blocks are compared by their digests; of the images themselves only inode tables, directories and the package \
database are read. Files and Debian packages are told for ext2, ext3 and ext4; of other file systems ranges of blocks.

JSON fields: old, new, old_bytes, new_bytes, blocks_changed, blocks_zero, blocks_moved (the old image has the content \
elsewhere), blocks_new, blocks_new_distinct, packages (package, old, new, files, blocks, blocks_new), files (path, status, \
bytes, blocks, blocks_new, package), blocks_elsewhere, files_unknown (why), ranges (first, blocks, origin).")]
pub struct DiffArgs {
    /// The store, a directory or a URL
    store: String,
    /// The old image, by id or channel
    #[arg(value_name = "OLD", value_parser = parse_selector)]
    old: ImageSelector,
    /// The new image, by id or channel
    #[arg(value_name = "NEW", value_parser = parse_selector)]
    new: ImageSelector,
    /// The store that the new image is in, if it is another
    #[arg(long, value_name = "STORE")]
    with: Option<String>,
    /// Print all packages, files or ranges, not only the largest
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    trust: TrustArgs,
}

#[derive(Serialize)]
struct Report {
    old: String,
    new: String,
    old_bytes: u64,
    new_bytes: u64,
    blocks_changed: u64,
    blocks_zero: u64,
    blocks_moved: u64,
    blocks_new: u64,
    blocks_new_distinct: u64,
    packages: Option<Vec<PackageReport>>,
    files: Option<Vec<FileReport>>,
    blocks_elsewhere: u64,
    files_unknown: Option<String>,
    ranges: Vec<RangeReport>,
}

#[derive(Serialize)]
struct PackageReport {
    package: String,
    old: Option<String>,
    new: Option<String>,
    files: u64,
    blocks: u64,
    blocks_new: u64,
}

#[derive(Serialize)]
struct FileReport {
    path: String,
    status: &'static str,
    bytes: u64,
    blocks: u64,
    blocks_new: u64,
    package: Option<String>,
}

#[derive(Serialize)]
struct RangeReport {
    first: u64,
    blocks: u64,
    origin: &'static str,
}

pub(super) fn run(args: &DiffArgs, ui: &Ui) -> Outcome {
    let store = open(&args.store)?;
    let other = match &args.with {
        Some(other) => open(other)?,
        None => Arc::clone(&store),
    };
    let policy = args.trust.policy()?;
    let old = Arc::new(open_image(&store, Some(&args.old), &policy)?);
    let new = Arc::new(open_image(&other, Some(&args.new), &policy)?);
    let comparison = compare(&old, &new, &CancelToken::new())?;
    let files = compare_files(&old, &new, &comparison)?;
    let bytes = (old.size(), new.size());
    let ids = (old.image().to_string(), new.image().to_string());
    let report = report(ids, bytes, comparison, files);
    ui.result(&report, |out| print(&report, args.all, ui, out))
}

fn report(
    ids: (String, String),
    bytes: (u64, u64),
    comparison: Comparison,
    files: FileComparison,
) -> Report {
    let packages = files.packages.map(|packages| {
        let packages = packages.into_iter().map(|change| PackageReport {
            package: change.package,
            old: change.old,
            new: change.new,
            files: change.files,
            blocks: change.blocks,
            blocks_new: change.new_blocks,
        });
        packages.collect()
    });
    let listed = files.files.into_iter().map(|change| FileReport {
        path: change.path,
        status: change.status.name(),
        bytes: change.size,
        blocks: change.blocks,
        blocks_new: change.new,
        package: change.package,
    });
    let ranges = comparison.changes.iter().map(|change| RangeReport {
        first: change.blocks.start,
        blocks: change.blocks.end - change.blocks.start,
        origin: match change.origin {
            Origin::Zero => "zero",
            Origin::Moved => "moved",
            Origin::New => "new",
        },
    });
    Report {
        old: ids.0,
        new: ids.1,
        old_bytes: bytes.0,
        new_bytes: bytes.1,
        blocks_changed: comparison.changed,
        blocks_zero: comparison.zero,
        blocks_moved: comparison.moved,
        blocks_new: comparison.new,
        blocks_new_distinct: comparison.new_distinct,
        packages,
        files: files.unknown.is_none().then(|| listed.collect()),
        blocks_elsewhere: files.elsewhere,
        files_unknown: files.unknown,
        ranges: ranges.collect(),
    }
}

/// How much of a list is shown without `--all`.
const SHOWN: usize = 20;

fn print(report: &Report, all: bool, ui: &Ui, out: &mut dyn Write) -> io::Result<()> {
    writeln!(
        out,
        "{} to {}: {} of {} blocks differ at their places",
        short(&report.old),
        short(&report.new),
        human_count(report.blocks_changed),
        human_count(report.new_bytes / BLOCK_SIZE as u64),
    )?;
    writeln!(
        out,
        "{} have new content ({} distinct, {}), {} have content from elsewhere in the old image, {} are zero",
        human_count(report.blocks_new),
        human_count(report.blocks_new_distinct),
        human_bytes(report.blocks_new_distinct * BLOCK_SIZE as u64),
        human_count(report.blocks_moved),
        human_count(report.blocks_zero),
    )?;
    let limit = if all { usize::MAX } else { SHOWN };
    let more = |out: &mut dyn Write, len: usize| match len.saturating_sub(limit) {
        0 => Ok(()),
        more => writeln!(out, "and {} more (--all)", human_count(more as u64)),
    };
    let version = |version: &Option<String>| version.clone().unwrap_or_else(|| "-".to_owned());
    if let Some(packages) = report.packages.as_ref().filter(|list| !list.is_empty()) {
        writeln!(out)?;
        let heading = ["PACKAGE", "OLD", "NEW", "FILES", "BLOCKS", "NEW BLOCKS"];
        let mut table = Table::new(&heading, &[3, 4, 5]);
        for package in packages.iter().take(limit) {
            table.row(vec![
                package.package.clone(),
                version(&package.old),
                version(&package.new),
                human_count(package.files),
                human_count(package.blocks),
                human_count(package.blocks_new),
            ]);
        }
        table.write(ui, out)?;
        more(out, packages.len())?;
    }
    if let Some(files) = report.files.as_ref().filter(|list| !list.is_empty()) {
        writeln!(out)?;
        let mut table = Table::new(&["FILE", "STATUS", "BLOCKS", "NEW BLOCKS"], &[2, 3]);
        // What only moved says little, and there is much of it.
        let told: Vec<_> = files
            .iter()
            .filter(|f| all || f.status != "moved")
            .collect();
        for file in told.iter().take(limit) {
            table.row(vec![
                file.path.clone(),
                file.status.to_owned(),
                human_count(file.blocks),
                human_count(file.blocks_new),
            ]);
        }
        table.write(ui, out)?;
        more(out, told.len())?;
        let moved = files.iter().filter(|file| file.status == "moved").count() as u64;
        writeln!(
            out,
            "{} files have only moved; {} blocks that differ are in no file",
            human_count(moved),
            human_count(report.blocks_elsewhere),
        )?;
    }
    if let Some(why) = &report.files_unknown {
        writeln!(out, "{} {why}", ui.paint(Style::Warn, "no files:"))?;
        let mut table = Table::new(&["FIRST BLOCK", "BLOCKS", "CONTENT"], &[0, 1]);
        for range in report.ranges.iter().take(limit) {
            let (first, blocks) = (human_count(range.first), human_count(range.blocks));
            table.row(vec![first, blocks, range.origin.to_owned()]);
        }
        table.write(ui, out)?;
        more(out, report.ranges.len())?;
    }
    Ok(())
}
