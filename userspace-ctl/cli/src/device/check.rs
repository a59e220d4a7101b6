// SPDX-License-Identifier: GPL-2.0

//! `pristine device check`.

use std::io::{self, Write};

use clap::Args;
use pristine_metadata::{check, Access, Report, Severity, Stores};

use super::LooseWhere;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device check /dev/vda --metadata /dev/vdb1
  pristine device check --metadata meta.img         a copy of a metadata device
  pristine device repair /dev/vda                   what to do about damage

Everything is read: both superblock copies, the label, both checkpoint areas, the whole log. Findings are
  info     as a power cut or ordinary use leaves it
  warning  wrong, but in a part that nobody needs now
  damage   wrong, and everything is still known
  fatal    the metadata cannot be used
The exit code is 0 up to warnings, 4 for damage, 5 if the metadata belongs to another data device.";

/// Options of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    place: LooseWhere,
}

pub fn run(args: &CheckArgs, ui: &Ui) -> Outcome {
    let stores = Stores::open(&args.place.devices()?, Access::ReadExclusive)?;
    let report = read(stores, ui)?;
    ui.result(&report, |out| write(out, &report, ui))?;
    verdict(&report)
}

fn read(stores: Stores<pristine_metadata::MetaDevice>, ui: &Ui) -> Outcome<Report> {
    let bar = ui.count_bar("checking", 1);
    let read = check(stores, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(read?.0)
}

fn style(severity: Severity) -> Style {
    match severity {
        Severity::Info => Style::Dim,
        Severity::Warning => Style::Warn,
        Severity::Damage | Severity::Fatal => Style::Bad,
    }
}

fn write(out: &mut dyn Write, report: &Report, ui: &Ui) -> io::Result<()> {
    for f in &report.findings {
        let label = ui.paint(style(f.severity), &format!("{:<7}", f.severity));
        let at = f.page.map(|p| format!(" (page {p})")).unwrap_or_default();
        // The core's errors begin with the structure's name already.
        let what = if f.what.starts_with(&f.structure) {
            f.what.clone()
        } else {
            format!("{}: {}", f.structure, f.what)
        };
        writeln!(out, "{label}  {what}{at}")?;
        writeln!(out, "         {}", ui.paint(Style::Dim, &f.advice))?;
    }
    if !report.findings.is_empty() {
        writeln!(out)?;
    }
    let pages = human_count(report.pages_read);
    match (&report.blocks, report.usable) {
        (Some(blocks), true) => {
            let word = match report.worst() {
                Some(Severity::Damage) => ui.paint(Style::Bad, "damaged but usable"),
                _ => ui.paint(Style::Good, "good"),
            };
            writeln!(
                out,
                "{word}: {pages} pages read; {} blocks, {} dirty, {} stale",
                human_count(blocks.total),
                human_count(blocks.dirty),
                human_count(blocks.stale)
            )?;
        }
        _ => {
            let word = ui.paint(Style::Bad, "not usable");
            writeln!(out, "{word}: {pages} pages read")?;
        }
    }
    Ok(())
}

fn verdict(report: &Report) -> Outcome {
    if report.identity_mismatch {
        return Err(Failure::new(
            Code::Identity,
            "the metadata belongs to another data device",
        )
        .hint("check which disk is which"));
    }
    match report.worst() {
        Some(Severity::Fatal) => Err(Failure::new(
            Code::Damaged,
            "the metadata is damaged and cannot be used",
        )
        .hint("pristine device repair writes it anew; what is lost becomes dirty")),
        Some(Severity::Damage) => Err(Failure::new(
            Code::Damaged,
            "the metadata is damaged, but everything is still known",
        )
        .hint("pristine device repair puts it right")),
        _ => Ok(()),
    }
}
