// SPDX-License-Identifier: GPL-2.0

//! `pristine device repair`.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;
use pristine_metadata::repair::{plan, Summary};
use pristine_metadata::{Access, Severity, Stores};
use serde::Serialize;

use super::{percent, Where};
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device repair /dev/vda --metadata /dev/vdb1 --dry-run   say what is wrong and what would be done
  pristine device repair /dev/vda --metadata /dev/vdb1             do it; ask if the exact state is lost
  pristine device repair /dev/vda --yes --json                     never ask, for scripts

The device must not be active. What is damaged is written anew from what is still known: the other superblock copy, the
checkpoint before, the records of the log. Where that does not tell, every block that may differ from the master becomes
dirty, so a revert fetches more than it would have had to, and never less. A mark that asks for a check is taken away.

What cannot be known is not guessed: with both superblock copies lost, or the label of the data device, or the pages that
say which blocks are stale, the repair refuses; format the device again and let the agent provision it.

Exit codes of this command:
   0  nothing was wrong, or all of it is repaired
   1  it was not confirmed, so nothing was done
   4  damaged, and it cannot be repaired; with --dry-run also: damaged, and it can
   5  the metadata belongs to another data device; nothing was done
   6  a device fails: replace it
   7  the device is active, mounted or in use
  14  with --dry-run: nothing is damaged, only the mark that asks for a check is there";

/// Options of `repair`.
#[derive(Args, Debug)]
pub struct RepairArgs {
    #[command(flatten)]
    place: Where,
    /// Say what would be done, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not ask before blocks become dirty that may be clean
    #[arg(short, long)]
    yes: bool,
}

#[derive(Serialize)]
struct Repaired {
    #[serde(flatten)]
    summary: Summary,
    repaired: bool,
}

pub fn run(args: &RepairArgs, ui: &Ui) -> Outcome {
    let access = if args.dry_run {
        Access::ReadExclusive
    } else {
        Access::Write
    };
    let stores = Stores::open(&args.place.devices(), access)?;
    let bar = ui.count_bar("checking", 1);
    let planned = plan(stores, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let (plan, stores) = planned?;
    let summary = plan.summary().clone();
    let needed = !summary.steps.is_empty();

    if !needed || args.dry_run {
        let result = Repaired {
            summary,
            repaired: false,
        };
        ui.result(&result, |out| write(out, &result, ui))?;
        return if needed {
            Err(to_be_done(&result.summary))
        } else {
            Ok(())
        };
    }
    if !summary.exact && !args.yes {
        confirm(&summary, ui)?;
    }
    let (report, _) = plan.apply(stores)?;
    if !report.usable || report.worst() >= Some(Severity::Damage) {
        let what = report
            .findings
            .iter()
            .find(|f| f.severity >= Severity::Damage)
            .map(|f| format!(": {} {}", f.structure, f.what))
            .unwrap_or_default();
        return Err(
            Failure::new(Code::Io, format!("the repair did not last{what}"))
                .hint("the device does not keep what is written to it: replace it"),
        );
    }
    let result = Repaired {
        summary,
        repaired: true,
    };
    ui.result(&result, |out| write(out, &result, ui))
}

/// What a dry run ends with when there is something to do.
fn to_be_done(summary: &Summary) -> Failure {
    let damaged = summary
        .findings
        .iter()
        .any(|f| f.severity >= Severity::Damage);
    let marked = summary
        .findings
        .iter()
        .any(|f| f.structure == "superblock" && f.severity == Severity::Warning);
    let (code, what) = if !damaged && marked {
        (
            Code::NeedsCheck,
            "nothing is damaged; the mark that asks for a check is to be taken away",
        )
    } else {
        (Code::Damaged, "the metadata is damaged and can be repaired")
    };
    Failure::new(code, what).hint("the same without --dry-run does it")
}

/// Asks whether to go on although the exact state is lost.
fn confirm(summary: &Summary, ui: &Ui) -> Outcome {
    let refused = Failure::new(
        Code::Failure,
        "the exact state is lost, and it was not confirmed that blocks may become dirty",
    )
    .hint("--yes confirms it; --dry-run shows what would be done");
    if ui.json() || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(refused);
    }
    let mut err = io::stderr().lock();
    let asked = steps(&mut err, summary, ui).and_then(|()| {
        write!(
            err,
            "{} of {} blocks ({}) will count as dirty. Go on? [y/N] ",
            human_count(summary.blocks.dirty),
            human_count(summary.blocks.total),
            percent(summary.blocks.dirty, summary.blocks.total)
        )?;
        err.flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        Ok(answer)
    });
    match asked {
        Ok(answer) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        Ok(_) => Err(refused),
        Err(e) => Err(Failure::io("cannot ask", &e)),
    }
}

fn steps(out: &mut dyn Write, summary: &Summary, ui: &Ui) -> io::Result<()> {
    for step in &summary.steps {
        let label = if step.exact {
            ui.paint(Style::Good, "exact")
        } else {
            ui.paint(Style::Bad, "loss ")
        };
        let at = step
            .page
            .map(|p| format!(" (page {p})"))
            .unwrap_or_default();
        writeln!(out, "{label}  {}{at}: {}", step.structure, step.what)?;
    }
    Ok(())
}

fn write(out: &mut dyn Write, result: &Repaired, ui: &Ui) -> io::Result<()> {
    let summary = &result.summary;
    steps(out, summary, ui)?;
    let blocks = &summary.blocks;
    let word = match (summary.steps.is_empty(), result.repaired) {
        (true, _) => ui.paint(Style::Good, "good, nothing to repair"),
        (false, true) => ui.paint(Style::Good, "repaired"),
        (false, false) => ui.paint(Style::Warn, "would be repaired"),
    };
    writeln!(
        out,
        "{word}: {} blocks, {} dirty, {} stale; {}",
        human_count(blocks.total),
        human_count(blocks.dirty),
        human_count(blocks.stale),
        if summary.exact {
            "the exact state is known"
        } else {
            "some of the dirty blocks may be clean"
        }
    )
}
