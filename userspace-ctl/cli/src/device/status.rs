// SPDX-License-Identifier: GPL-2.0

//! `pristine device status`, `list` and `checkpoint`.

use std::io::{self, Write};

use clap::Args;
use pristine_device::control::{Control, Id};
use pristine_device::dm::{Dm, Managed};
use pristine_device::module;
use pristine_metadata::dump::uuid_text;
use pristine_metadata::shared::abi::StatsArgs;
use pristine_metadata::shared::state::Mode;
use pristine_metadata::shared::table::Hex;
use pristine_metadata::shared::{PAGE_SIZE, SECTOR_SIZE};
use serde::Serialize;

use super::{device_name, fetch, percent};
use crate::exit::Outcome;
use crate::ui::{human_bytes, human_count, Style, Table, Ui};

pub const EXAMPLES: &str = "\
Examples:
  pristine device status            all managed devices
  pristine device status root       one of them, with what the kernel counted
  pristine device status --json | jq '.[].dirty'

MODE is rw; ro after the metadata device failed (nothing goes untracked: writes are refused); fail if the device
never had its state.";

pub const CHECKPOINT_EXAMPLES: &str = "\
Examples:
  pristine device checkpoint root && pristine device map root";

/// Options of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Name of a managed device; without it all are shown
    #[arg(value_name = "NAME")]
    name: Option<String>,
}

/// Options of `checkpoint`.
#[derive(Args, Debug)]
pub struct CheckpointArgs {
    /// Name of the managed device
    #[arg(value_name = "NAME")]
    name: String,
}

#[derive(Serialize)]
struct Shown {
    name: String,
    path: String,
    major: u32,
    minor: u32,
    mode: &'static str,
    suspended: bool,
    open_count: u32,
    data: String,
    metadata: Option<String>,
    bytes: u64,
    block_bytes: u64,
    extent_bytes: u64,
    blocks: u64,
    dirty: u64,
    stale: u64,
    hot_extents: u64,
    hot_limit: u64,
    log_used: u64,
    log_pages: u64,
    checkpoint: u64,
    image: Option<String>,
    generation: u64,
    meta_uuid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    undo: Option<Undo>,
    #[serde(skip_serializing_if = "Option::is_none")]
    counters: Option<Counters>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fetch: Option<fetch::Fetch>,
    /// What the helper wrote last.
    #[serde(skip_serializing_if = "Option::is_none")]
    helper: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct Undo {
    /// open, full or failed.
    state: &'static str,
    used_bytes: u64,
    bytes: u64,
    /// Dirty blocks without an original.
    missing: u64,
}

#[derive(Serialize)]
struct Counters {
    deferred: u64,
    records: u64,
    intents: u64,
    checkpoints: u64,
    metadata_bytes_written: u64,
    refused_writes: u64,
    memory_bytes: u64,
}

impl From<StatsArgs> for Counters {
    fn from(s: StatsArgs) -> Self {
        Self {
            deferred: s.deferred,
            records: s.records,
            intents: s.intents,
            checkpoints: s.checkpoints,
            metadata_bytes_written: s.meta_bytes,
            refused_writes: s.refused,
            memory_bytes: s.memory,
        }
    }
}

fn shown(managed: &Managed) -> Shown {
    let (device, status) = (&managed.device, &managed.status);
    Shown {
        name: device.name.clone(),
        path: managed.path().display().to_string(),
        major: device.major,
        minor: device.minor,
        mode: status.mode.word(),
        suspended: device.suspended,
        open_count: device.open_count,
        data: device_name(&managed.data),
        metadata: managed.metadata.as_deref().map(device_name),
        bytes: managed.sectors * SECTOR_SIZE,
        block_bytes: status.block_size,
        extent_bytes: status.extent_size,
        blocks: status.blocks,
        dirty: status.dirty,
        stale: status.stale,
        hot_extents: status.hot,
        hot_limit: status.hot_limit,
        log_used: status.log_used,
        log_pages: status.log_pages,
        checkpoint: status.checkpoint,
        image: (status.image != [0; 32]).then(|| Hex(&status.image).to_string()),
        generation: status.generation,
        meta_uuid: uuid_text(&status.meta_uuid),
        undo: status.undo.map(|undo| Undo {
            state: undo.state.word(),
            used_bytes: undo.used * PAGE_SIZE as u64,
            bytes: undo.pages * PAGE_SIZE as u64,
            missing: undo.missing,
        }),
        counters: None,
        fetch: None,
        helper: None,
    }
}

pub fn status(args: &StatusArgs, ui: &Ui) -> Outcome {
    match &args.name {
        Some(name) => one(name, ui),
        None => all(ui),
    }
}

fn one(name: &str, ui: &Ui) -> Outcome {
    let managed = Dm::open()?.managed(name)?;
    let mut shown = shown(&managed);
    let id = Id {
        major: shown.major,
        minor: shown.minor,
    };
    // The counters are an extra: an older module may not have them.
    if let Ok(control) = Control::open() {
        shown.counters = control.stats(id).ok().map(Counters::from);
        shown.fetch = fetch::fetch(&control, id);
        shown.helper = shown.fetch.as_ref().and(fetch::helper_state(name));
    }
    ui.result(&shown, |out| detail(out, &shown, managed.status.mode, ui))
}

fn mode_text(ui: &Ui, mode: Mode) -> String {
    match mode {
        Mode::ReadWrite => ui.paint(Style::Good, "read-write"),
        Mode::ReadOnly => ui.paint(Style::Bad, "READ-ONLY: the metadata device failed"),
        Mode::Failed => ui.paint(Style::Bad, "FAILED: the metadata could not be read"),
    }
}

fn detail(out: &mut dyn Write, s: &Shown, mode: Mode, ui: &Ui) -> io::Result<()> {
    let blocks = |n: u64| {
        format!(
            "{} blocks, {} ({})",
            human_count(n),
            human_bytes(n.saturating_mul(s.block_bytes)),
            percent(n, s.blocks)
        )
    };
    let suspended = if s.suspended { ", suspended" } else { "" };
    writeln!(
        out,
        "{}  {}{suspended}",
        ui.paint(Style::Bold, &s.path),
        mode_text(ui, mode)
    )?;
    writeln!(
        out,
        "  size        {}, {} blocks of {}",
        human_bytes(s.bytes),
        human_count(s.blocks),
        human_bytes(s.block_bytes)
    )?;
    writeln!(out, "  dirty       {}", blocks(s.dirty))?;
    writeln!(out, "  stale       {}", blocks(s.stale))?;
    writeln!(out, "  data        {}", s.data)?;
    let metadata = s
        .metadata
        .as_deref()
        .unwrap_or("reserved tail of the data device");
    writeln!(
        out,
        "  metadata    {metadata}  {}",
        ui.paint(Style::Dim, &s.meta_uuid)
    )?;
    match &s.image {
        Some(image) => writeln!(out, "  image       {image}, generation {}", s.generation)?,
        None => writeln!(out, "  image       none")?,
    }
    writeln!(
        out,
        "  log         {} of {} records since checkpoint {}",
        s.log_used, s.log_pages, s.checkpoint
    )?;
    writeln!(
        out,
        "  hot         {} of at most {} extents of {}",
        s.hot_extents,
        s.hot_limit,
        human_bytes(s.extent_bytes)
    )?;
    if let Some(undo) = &s.undo {
        let text = format!(
            "{} of {} used",
            human_bytes(undo.used_bytes),
            human_bytes(undo.bytes)
        );
        let missing = match undo.missing {
            0 => "each dirty block has its original".to_owned(),
            n => format!(
                "{} dirty blocks have no original, and come from the master when reverted",
                human_count(n)
            ),
        };
        let state = match undo.state {
            "open" => String::new(),
            "full" => ui.paint(Style::Warn, "FULL: "),
            _ => ui.paint(Style::Bad, "FAILED, it cannot be written: "),
        };
        writeln!(out, "  undo        {text}; {state}{missing}")?;
    }
    if let Some(f) = &s.fetch {
        fetch::write(out, f, s.helper.as_ref(), s.stale, s.block_bytes, ui)?;
    }
    if let Some(c) = &s.counters {
        writeln!(
            out,
            "  since start {} records for {} extents, {} checkpoints, {} of metadata written",
            human_count(c.records),
            human_count(c.intents),
            human_count(c.checkpoints),
            human_bytes(c.metadata_bytes_written)
        )?;
        writeln!(
            out,
            "              {} bios waited for an intent, {} writes refused, {} of kernel memory",
            human_count(c.deferred),
            human_count(c.refused_writes),
            human_bytes(c.memory_bytes)
        )?;
    }
    Ok(())
}

fn all(ui: &Ui) -> Outcome {
    let devices = if module::is_loaded(module::MODULE) {
        let managed = Dm::open()?.all_managed()?;
        managed.iter().map(shown).collect()
    } else {
        ui.note("the kernel module dm_pristine is not loaded, so no device is active");
        Vec::new()
    };
    ui.result(&devices, |out| {
        if devices.is_empty() {
            return writeln!(out, "no managed devices");
        }
        let heading = [
            "NAME", "MODE", "SIZE", "DIRTY", "SHARE", "STALE", "DATA", "METADATA",
        ];
        let mut table = Table::new(&heading, &[2, 3, 4, 5]);
        for s in &devices {
            table.row(vec![
                s.name.clone(),
                s.mode.into(),
                human_bytes(s.bytes),
                human_bytes(s.dirty.saturating_mul(s.block_bytes)),
                percent(s.dirty, s.blocks),
                human_bytes(s.stale.saturating_mul(s.block_bytes)),
                s.data.clone(),
                s.metadata.clone().unwrap_or_else(|| "(tail)".into()),
            ]);
        }
        table.write(ui, out)
    })
}

#[derive(Serialize)]
struct Checkpointed {
    name: String,
    checkpoint: u64,
}

pub fn checkpoint(args: &CheckpointArgs, ui: &Ui) -> Outcome {
    let managed = Dm::open()?.managed(&args.name)?;
    let id = Id {
        major: managed.device.major,
        minor: managed.device.minor,
    };
    let done = Checkpointed {
        name: args.name.clone(),
        checkpoint: Control::open()?.checkpoint(id)?,
    };
    ui.result(&done, |out| {
        writeln!(
            out,
            "checkpoint {} of {} is on disk",
            done.checkpoint, done.name
        )
    })
}
