// SPDX-License-Identifier: GPL-2.0

//! The offline check: everything is read, every damage is said, nothing is changed.

use std::fmt;

use pristine_shared::error::{Error as Core, Structure};
use pristine_shared::layout::Placement;
use pristine_shared::superblock::{self, Label, Superblock};
use pristine_shared::{PAGE_SECTORS, PAGE_SIZE};

use crate::error::{Error, Result};
use crate::open::{has_label, read_copy, Metadata, Stores};
use crate::planes::Select;
use crate::storage::Storage;
use crate::undo::Originals;

mod walk;

pub(crate) use walk::area_pages;
use walk::Walk;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Severity {
    /// As a power cut or ordinary use leaves it.
    Info,
    /// Not as it should be, in a part that nobody needs now.
    Warning,
    /// Damage that the metadata survives: everything is still known.
    Damage,
    /// The metadata cannot be used.
    Fatal,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Damage => "damage",
            Self::Fatal => "fatal",
        })
    }
}

/// Something that the check found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which structure.
    pub structure: String,
    /// The page at which it lies, counted from the start of its device.
    pub page: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// What follows from it, or what to do.
    pub advice: String,
}

/// What the check found out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Report {
    /// Everything found, in the order of the structures.
    pub findings: Vec<Finding>,
    /// Whether the state of all blocks is known, which is what matters in the end.
    pub usable: bool,
    /// Whether the metadata belongs to another data device.
    pub identity_mismatch: bool,
    /// Blocks that are dirty, stale, and all of them; known if usable.
    pub blocks: Option<Blocks>,
    /// Pages read.
    pub pages_read: u64,
}

/// Blocks by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Blocks {
    /// Dirty blocks, with what the log adds.
    pub dirty: u64,
    /// Stale blocks.
    pub stale: u64,
    /// All blocks.
    pub total: u64,
}

impl Report {
    /// The worst finding; `None` if there is none.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|f| f.severity).max()
    }

    fn add(
        &mut self,
        severity: Severity,
        structure: impl fmt::Display,
        page: impl Into<Option<u64>>,
        what: impl fmt::Display,
        advice: &str,
    ) {
        self.findings.push(Finding {
            severity,
            structure: structure.to_string(),
            page: page.into(),
            what: what.to_string(),
            advice: advice.to_owned(),
        });
    }
}

const LOST: &str =
    "pristine device repair marks dirty what cannot be known; or provision the device again";

/// Checks the metadata on `stores`; `progress` is told of pages read and of how many there will be.
///
/// # Errors
///
/// Only if there is no metadata to be checked, or it is of a version that is not known here. I/O errors of the
/// device are findings.
pub fn check<S: Storage>(
    mut stores: Stores<S>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Report, Stores<S>)> {
    let mut report = Report {
        findings: Vec::new(),
        usable: false,
        identity_mismatch: false,
        blocks: None,
        pages_read: 0,
    };
    let Some((sb, equal)) = check_anchors(&mut stores, &mut report)? else {
        return Ok((report, stores));
    };
    check_data(&mut stores, &sb, &mut report);
    let total = sb.layout.log_pages + sb.layout.area_pages * 2;
    Walk::new(&mut stores.meta, &sb, &mut report, progress, total).run();
    check_undo(&mut stores, &sb, &mut report);

    // The last word has the code that the kernel and the agent use.
    if !report.identity_mismatch {
        let mut metadata = Metadata {
            stores,
            superblock: sb,
            copies_equal: equal,
            log_end: None,
        };
        match metadata.load() {
            Ok((planes, _)) => {
                report.usable = report.worst() < Some(Severity::Fatal);
                report.blocks = Some(Blocks {
                    dirty: planes.count(Select::Dirty),
                    stale: planes.count(Select::Stale),
                    total: planes.blocks(),
                });
            }
            Err(e) if report.worst() < Some(Severity::Fatal) => {
                report.add(Severity::Fatal, "recovery", None, e, LOST);
            }
            Err(_) => {}
        }
        stores = metadata.stores;
    }
    Ok((report, stores))
}

/// What [`check_undo`] calls the undo area.
pub(crate) const UNDO: &str = "undo area";

/// Looks at the originals. Nothing of the state of the blocks depends on them.
fn check_undo<S: Storage>(stores: &mut Stores<S>, sb: &Superblock, report: &mut Report) {
    if sb.layout.undo_pages == 0 {
        return;
    }
    let originals = Originals::of(sb, &mut stores.meta, &mut |_, _| {});
    let (used, pages) = originals.used();
    report.pages_read += used;
    if originals.damaged() != 0 {
        report.add(
            Severity::Warning,
            UNDO,
            sb.layout.undo_start,
            format!("{} originals or headers in it are damaged", originals.damaged()),
            "the blocks that they belong to come from the master when they are reverted; the revert empties the area",
        );
    }
    report.add(
        Severity::Info,
        UNDO,
        sb.layout.undo_start,
        format!(
            "has the originals of {} blocks, in {used} of {pages} pages",
            originals.blocks()
        ),
        "pristine device revert --undo puts them back",
    );
}

/// Checks both superblock copies; gives the one to use.
fn check_anchors<S: Storage>(
    stores: &mut Stores<S>,
    report: &mut Report,
) -> Result<Option<(Superblock, bool)>> {
    let placement = stores.placement;
    let pages = stores.meta.pages();
    let path = stores.meta.path().to_path_buf();
    let mut buffer = [0; PAGE_SIZE];
    let copies = [0, 1].map(|n| read_copy(&mut stores.meta, placement, n, &mut buffer));
    report.pages_read += 2;
    let chosen = match superblock::choose(copies[0], copies[1]) {
        Ok(sb) if sb.layout.placement != placement => {
            return Err(Error::core(
                path,
                Core::BadField(Structure::Superblock(0), "placement"),
            ));
        }
        Ok(sb) => Some(sb),
        Err(Core::NotFormatted) if placement == Placement::Tail && has_label(&mut stores.meta) => {
            return Err(Error::NeedsMetadataDevice { data: path })
        }
        Err(
            e @ (Core::NotFormatted
            | Core::NewerVersion(..)
            | Core::UnknownFeatures(_)
            | Core::TooSmall(..)),
        ) => return Err(Error::core(path, e)),
        Err(e @ Core::Mismatched(_)) => {
            let what = format!("the copies belong to different metadata: {e}");
            report.add(
                Severity::Fatal,
                "superblocks",
                None,
                what,
                "the device was partly overwritten: format it again",
            );
            return Ok(None);
        }
        Err(_) => None,
    };
    for (n, copy) in (0u8..).zip(&copies) {
        let at = placement.anchor(n, pages).ok();
        let name = Structure::Superblock(n);
        match (copy, &chosen) {
            (Ok(sb), Some(best)) if sb == best => {}
            (Ok(sb), Some(best)) if sb.sequence < best.sequence => report.add(
                Severity::Info,
                name,
                at,
                format!(
                    "is older (sequence {}, the other has {})",
                    sb.sequence, best.sequence
                ),
                "a power cut between the two copies; the newer is used and the next write renews this one",
            ),
            (Ok(_), _) => report.add(
                Severity::Damage,
                name,
                at,
                "has the same sequence as the other copy and says something else",
                "copy 0 is used; pristine device repair trusts neither and marks all blocks dirty",
            ),
            (Err(e), Some(_)) => report.add(
                Severity::Damage,
                name,
                at,
                e,
                "the other copy is good and is used; pristine device repair renews this one",
            ),
            (Err(e), None) => report.add(
                Severity::Fatal,
                name,
                at,
                e,
                "without a superblock nothing is known: format the device again",
            ),
        }
    }
    let Some(sb) = chosen else { return Ok(None) };
    if sb.needs_check {
        report.add(
            Severity::Warning,
            "superblock",
            None,
            "an earlier failure asked for this check",
            "pristine device repair takes the mark away",
        );
    }
    Ok(Some((sb, copies[0] == copies[1])))
}

/// Checks that the data device is the one that is meant.
fn check_data<S: Storage>(stores: &mut Stores<S>, sb: &Superblock, report: &mut Report) {
    let refuse = |report: &mut Report, structure: &str, page, what: &dyn fmt::Display| {
        report.identity_mismatch = true;
        report.add(
            Severity::Fatal,
            structure,
            page,
            what,
            "check which disk is which; nothing here says what is on this data device",
        );
    };
    let data = match (stores.placement, &mut stores.data) {
        (Placement::Tail, _) => {
            if let Err(e) = sb.verify_data(stores.meta.sectors(), &sb.data_uuid) {
                refuse(report, "data device", None, &e);
            }
            return;
        }
        (Placement::Separate, None) => {
            return report.add(
                Severity::Info,
                "data device",
                None,
                "was not given, so whether it is the right one was not checked",
                "give it to check that as well",
            );
        }
        (Placement::Separate, Some(data)) => data,
    };
    let sectors = data.sectors();
    let name = "data device label";
    if let Err(e) = sb.verify_data(sectors, &sb.data_uuid) {
        return refuse(report, "data device", None, &e);
    }
    let mut page = [0; PAGE_SIZE];
    let Ok(at) = Label::page_of(sectors) else {
        return refuse(report, name, None, &"the device has no room for a label");
    };
    if sb.geometry.sectors() > at * PAGE_SECTORS {
        report.add(
            Severity::Fatal,
            "superblock",
            None,
            "manages more than the data device has",
            LOST,
        );
    }
    report.pages_read += 1;
    if data.read(at, &mut page).is_err() {
        return report.add(
            Severity::Fatal,
            name,
            at,
            "cannot be read",
            "the data device fails: replace it",
        );
    }
    match Label::decode(&page) {
        Ok(label) if label.data_uuid != sb.data_uuid => {
            refuse(report, name, Some(at), &Core::DataUuid);
        }
        Ok(label) if label.meta_uuid != sb.meta_uuid || label.data_sectors != sectors => {
            report.add(
                Severity::Damage,
                name,
                at,
                "names other metadata, or another size, than what it was found with",
                "the UUID of the data device fits, so the metadata is used",
            );
        }
        Ok(_) => {}
        Err(e @ Core::BadMagic(_)) => refuse(report, name, Some(at), &e),
        Err(e) => report.add(
            Severity::Fatal,
            name,
            at,
            e,
            "pristine device repair renews it if its UUID can still be read",
        ),
    }
}
