// SPDX-License-Identifier: GPL-2.0

//! `pristine device check`.

use std::io::{self, Write};

use clap::Args;
use pristine_metadata::{check, Access, Changes, Metadata, Report, Severity, Stores};
use serde::Serialize;

use super::LooseWhere;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device check /dev/vda --metadata /dev/vdb1
  pristine device check --metadata meta.img         a copy of a metadata device
  pristine device check /dev/vda --repair           renew a damaged superblock copy, clear \"needs check\"

Everything is read: both superblock copies, the label, both checkpoint areas, the whole log. Findings are
  info     as a power cut or ordinary use leaves it
  warning  wrong, but in a part that nobody needs now
  damage   wrong, and everything is still known; --repair puts it right
  fatal    the metadata cannot be used
The exit code is 0 up to warnings, 4 for damage, 5 if the metadata belongs to another data device.";

/// Options of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    place: LooseWhere,
    /// If all is known in spite of the damage, write it anew
    #[arg(long)]
    repair: bool,
}

#[derive(Serialize)]
struct Checked {
    #[serde(flatten)]
    report: Report,
    repaired: bool,
}

pub fn run(args: &CheckArgs, ui: &Ui) -> Outcome {
    let devices = args.place.devices()?;
    let access = if args.repair {
        Access::Write
    } else {
        Access::ReadExclusive
    };
    let stores = Stores::open(&devices, access)?;
    let (mut report, stores) = read(stores, ui)?;
    let mut repaired = false;
    let asks = report.worst() == Some(Severity::Damage)
        || report
            .findings
            .iter()
            .any(|f| f.what.contains("asked for this check"));
    if args.repair && report.usable && asks {
        show_findings(&report, ui);
        let mut metadata = Metadata::open_on(stores)?;
        let (planes, _) = metadata.load()?;
        metadata.commit(
            &planes,
            &Changes {
                needs_check: Some(false),
                ..Changes::default()
            },
        )?;
        drop(metadata);
        report = read(Stores::open(&devices, access)?, ui)?.0;
        repaired = true;
    }
    let checked = Checked { report, repaired };
    ui.result(&checked, |out| write(out, &checked, ui))?;
    verdict(&checked.report)
}

fn read(
    stores: Stores<pristine_metadata::MetaDevice>,
    ui: &Ui,
) -> Outcome<(Report, Stores<pristine_metadata::MetaDevice>)> {
    let bar = ui.count_bar("checking", 1);
    let read = check(stores, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(read?)
}

/// What was found before a repair, as remarks.
fn show_findings(report: &Report, ui: &Ui) {
    for f in &report.findings {
        ui.note(format!("{}: {} {}", f.severity, f.structure, f.what));
    }
}

fn style(severity: Severity) -> Style {
    match severity {
        Severity::Info => Style::Dim,
        Severity::Warning => Style::Warn,
        Severity::Damage | Severity::Fatal => Style::Bad,
    }
}

fn write(out: &mut dyn Write, checked: &Checked, ui: &Ui) -> io::Result<()> {
    let report = &checked.report;
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
    if checked.repaired {
        writeln!(out, "repaired: the state was written anew")?;
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
        .hint("the agent provisions the device again; so does pristine device format --force")),
        Some(Severity::Damage) => Err(Failure::new(
            Code::Damaged,
            "the metadata is damaged, but everything is still known",
        )
        .hint("pristine device check --repair puts it right")),
        _ => Ok(()),
    }
}
