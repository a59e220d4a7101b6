// SPDX-License-Identifier: GPL-2.0

//! `pristine device dump`.

use std::io::{self, Write};

use clap::Args;
use pristine_metadata::dump::{dump, Area, Dump, PlaneDump, SuperblockDump};
use pristine_metadata::{Access, Stores};

use super::LooseWhere;
use crate::exit::{Code, Failure, Outcome};
use crate::ui::{human_count, Style, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device dump /dev/vda --metadata /dev/vdb1
  pristine device dump --metadata meta.img --json | jq '.superblocks[0].fields'

Damage is shown, never guessed at; pristine device check says what it means. A device that is active can be
dumped too: what is shown is what is on disk, which may change while it is read.";

/// Options of `dump`.
#[derive(Args, Debug)]
pub struct DumpArgs {
    #[command(flatten)]
    place: LooseWhere,
}

pub fn run(args: &DumpArgs, ui: &Ui) -> Outcome {
    let mut stores = Stores::open(&args.place.devices()?, Access::Read)?;
    let dump = dump(&mut stores);
    let nothing = dump
        .superblocks
        .iter()
        .all(|s| s.error.as_deref().is_some_and(|e| e.contains("bad magic")));
    if nothing {
        let path = args.place.metadata.as_ref().or(args.place.data.as_ref());
        let path = path.map(|p| p.display().to_string()).unwrap_or_default();
        return Err(Failure::new(
            Code::NotFound,
            format!("{path}: no pristine metadata found"),
        )
        .hint("if it is on a device of its own, say which one: --metadata DEVICE"));
    }
    ui.result(&dump, |out| write(out, &dump, ui))
}

fn write(out: &mut dyn Write, dump: &Dump, ui: &Ui) -> io::Result<()> {
    let heading =
        |out: &mut dyn Write, text: &str| writeln!(out, "{}", ui.paint(Style::Bold, text));
    let place = match dump.placement {
        "tail" => "in the reserved tail of the data device",
        _ => "on a device of its own",
    };
    heading(
        out,
        &format!("metadata {place}, {} pages", human_count(dump.device_pages)),
    )?;
    writeln!(out)?;
    superblocks(out, dump, ui)?;
    if let Some(error) = &dump.error {
        writeln!(
            out,
            "{}",
            ui.paint(Style::Bad, &format!("no copy can be used: {error}"))
        )?;
    }
    if let Some(label) = &dump.label {
        writeln!(out)?;
        heading(out, &format!("data device label at page {}", label.page))?;
        if let Some(error) = &label.error {
            writeln!(out, "  {}", ui.paint(Style::Bad, error))?;
        }
        for (name, value) in &label.fields {
            writeln!(out, "  {name:<16} {value}")?;
        }
    }
    for area in &dump.areas {
        writeln!(out)?;
        self::area(out, area, ui)?;
    }
    if dump.current.is_some() {
        writeln!(out)?;
        log(out, dump, ui)?;
    }
    if let Some(undo) = &dump.undo {
        writeln!(out)?;
        let last = undo.start + undo.pages.saturating_sub(1);
        heading(
            out,
            &format!(
                "undo area at pages {}..={last}: {} of {} pages used, {} chunks",
                undo.start, undo.used, undo.pages, undo.chunks
            ),
        )?;
        if undo.damaged_headers != 0 {
            let what = format!("{} headers are damaged", undo.damaged_headers);
            writeln!(out, "  {}", ui.paint(Style::Bad, &what))?;
        }
        let pages = run_list("pages", &undo.originals);
        writeln!(out, " {}", if pages.is_empty() { " empty" } else { &pages })?;
    }
    Ok(())
}

/// Both copies in two columns, with a mark where they differ.
fn superblocks(out: &mut dyn Write, dump: &Dump, ui: &Ui) -> io::Result<()> {
    let [first, second] = &dump.superblocks;
    let at = |s: &SuperblockDump| s.page.map_or("-".into(), |p| p.to_string());
    let used = dump
        .current
        .map_or(String::new(), |n| format!(", copy {n} is used"));
    let title = format!(
        "superblock copies at pages {} and {}{used}",
        at(first),
        at(second)
    );
    writeln!(out, "{}", ui.paint(Style::Bold, &title))?;
    for (n, copy) in dump.superblocks.iter().enumerate() {
        if let Some(error) = &copy.error {
            writeln!(out, "  copy {n}: {}", ui.paint(Style::Bad, error))?;
        }
    }
    let same = first.fields == second.fields;
    let shown = if first.fields.is_empty() {
        second
    } else {
        first
    };
    for (i, (name, value)) in shown.fields.iter().enumerate() {
        let other = second.fields.get(i).map(|(_, v)| v);
        match other {
            Some(other) if !same && other != value && !first.fields.is_empty() => {
                let mark = ui.paint(Style::Warn, "differs");
                writeln!(out, "  {name:<16} {value:<40} {other:<40} {mark}")?;
            }
            _ => writeln!(out, "  {name:<16} {value}")?,
        }
    }
    Ok(())
}

fn area(out: &mut dyn Write, area: &Area, ui: &Ui) -> io::Result<()> {
    let what = match (area.current, area.checkpoint) {
        (true, Some(seq)) => format!("current, checkpoint {seq}"),
        (false, Some(seq)) => format!("not current, checkpoint {seq}"),
        (_, None) => "not current, holds no whole checkpoint".into(),
    };
    let last = area.start + area.pages.saturating_sub(1);
    let title = format!(
        "checkpoint area {} at pages {}..={last}: {what}",
        area.number, area.start
    );
    writeln!(out, "{}", ui.paint(Style::Bold, &title))?;
    if area.checkpoint.is_some() {
        let plane = |name: &str, p: &PlaneDump| {
            format!(
                "  {name:<16} {} blocks; pages: {} stored, {} all zero, {} all one",
                human_count(p.blocks),
                human_count(p.stored),
                human_count(p.zero),
                human_count(p.ones)
            )
        };
        writeln!(out, "{}", plane("dirty plane", &area.dirty))?;
        writeln!(out, "{}", plane("stale plane", &area.stale))?;
    }
    for error in &area.errors {
        writeln!(out, "  {}", ui.paint(Style::Bad, error))?;
    }
    Ok(())
}

fn log(out: &mut dyn Write, dump: &Dump, ui: &Ui) -> io::Result<()> {
    let replayed = dump.log.iter().filter(|r| r.replayed).count();
    let title = format!(
        "log: {} pages written, {replayed} records to be replayed",
        human_count(dump.log.len() as u64)
    );
    writeln!(out, "{}", ui.paint(Style::Bold, &title))?;
    for record in &dump.log {
        let seq = record.seq.map_or("-".into(), |s| s.to_string());
        let kind = match record.kind {
            "whole" if record.replayed => ui.paint(Style::Good, "replayed"),
            "whole" => ui.paint(Style::Dim, "done"),
            other => ui.paint(Style::Warn, other),
        };
        let list = [
            ("extents", &record.extents),
            ("dirty", &record.dirty),
            ("settled", &record.settled),
            ("valid", &record.valid),
        ]
        .map(|(name, runs)| run_list(name, runs))
        .concat();
        let line = format!("  page {:<6} record {seq:<8} {kind} {list}", record.page);
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// ` name 1 4..=7`, of at most eight runs; empty if there are none.
fn run_list(name: &str, runs: &[(u64, u64)]) -> String {
    if runs.is_empty() {
        return String::new();
    }
    let mut text = format!(" {name}");
    for (start, end) in runs.iter().take(8) {
        match end - start {
            1 => text += &format!(" {start}"),
            _ => text += &format!(" {start}..={}", end - 1),
        }
    }
    if runs.len() > 8 {
        text += &format!(" and {} more", runs.len() - 8);
    }
    text
}
