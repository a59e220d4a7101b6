// SPDX-License-Identifier: GPL-2.0

//! `pristine device probe`.

use std::path::PathBuf;

use clap::Args;
use pristine_metadata::probe::{probe, Role};
use pristine_metadata::shared::table::Hex;
use pristine_metadata::{Access, MetaDevice};
use serde::Serialize;

use crate::exit::{Code, Failure, Outcome};
use crate::ui::Ui;

pub const EXAMPLES: &str = "\
Examples:
  pristine device probe /dev/vda
  pristine device probe --export /dev/vda     # for udev, see 59-pristine.rules

Reads the first and the last pages only. Exit status 3 when the device is no part of a managed device.";

/// Options of `probe`.
#[derive(Args, Debug)]
pub struct ProbeArgs {
    /// The device (or an image file of it)
    #[arg(value_name = "DEVICE")]
    device: PathBuf,
    /// Print properties for udev: PRISTINE_ROLE=..., PRISTINE_META_UUID=..., PRISTINE_DATA_UUID=...
    #[arg(long)]
    export: bool,
}

#[derive(Serialize)]
struct Report {
    role: &'static str,
    metadata_in_tail: bool,
    meta_uuid: Option<String>,
    data_uuid: Option<String>,
}

pub fn run(args: &ProbeArgs, ui: &Ui) -> Outcome {
    let mut device = MetaDevice::open(&args.device, Access::Read)?;
    let Some(found) = probe(&mut device) else {
        return Err(Failure::new(
            Code::NotFound,
            format!(
                "{}: neither a data nor a metadata device of Pristine",
                args.device.display()
            ),
        ));
    };
    let report = Report {
        role: found.role.word(),
        metadata_in_tail: found.role == Role::Tail,
        meta_uuid: found.meta_uuid.map(|u| Hex(&u).to_string()),
        data_uuid: found.data_uuid.map(|u| Hex(&u).to_string()),
    };
    ui.result(&report, |out| {
        let uuids = [("META", &report.meta_uuid), ("DATA", &report.data_uuid)];
        if args.export {
            writeln!(out, "PRISTINE_ROLE={}", report.role)?;
            for (name, uuid) in uuids {
                if let Some(uuid) = uuid {
                    writeln!(out, "PRISTINE_{name}_UUID={uuid}")?;
                }
            }
            return Ok(());
        }
        let place = if report.metadata_in_tail {
            ", with its metadata in its tail"
        } else {
            ""
        };
        writeln!(out, "{} device{place}", report.role)?;
        for (name, uuid) in uuids {
            if let Some(uuid) = uuid {
                writeln!(out, "  {} UUID  {uuid}", name.to_lowercase())?;
            }
        }
        Ok(())
    })
}
