// SPDX-License-Identifier: GPL-2.0

//! The way back from damage: what can be known of the state is written anew, in whole structures.
//!
//! The rule is the superset: after a repair every block that differs from the master is dirty, and no stale block counts
//! as valid. Where a part of the state is lost, all that it told of becomes dirty, unless something else proves more:
//!
//! | lost | what tells |
//! | --- | --- |
//! | a superblock copy | the other copy, and the log: an older copy's checkpoint is there until both copies are new |
//! | a plane page, an index page | the superblock, if none or all of the blocks are dirty; else the checkpoint before in the other area with all records since; else nothing, and the page's blocks become dirty |
//! | a log record | its good sectors, if they hold all entries or show that the record was never finished; the superblock, if it says that the log adds nothing; else nothing, and all blocks become dirty |
//! | the label | its UUID, if that can still be read |
//!
//! Whose metadata this is, and which blocks are stale, is never guessed: if that is lost the repair refuses.
//!
//! A repair can be cut at any instant and run again: the new state goes where no superblock refers to, and what the old
//! state needs is overwritten only after both superblock copies name the new one.

mod log;
mod planes;

use pristine_shared::error::{Error as Core, Structure};
use pristine_shared::geometry::Run;
use pristine_shared::layout::Placement;
use pristine_shared::recovery::Sink;
use pristine_shared::superblock::{self, Label, Superblock, MAX_SEQUENCE};
use pristine_shared::{Page, PAGE_SECTORS, PAGE_SIZE};

use crate::check::{check, Blocks, Finding, Report, Severity, UNDO};
use crate::commit::Changes;
use crate::error::{Error, Result};
use crate::open::{read_copy, Metadata, Stores};
use crate::planes::{Planes, Select};
use crate::storage::{Storage, StorageExt};

use log::Survey;

/// One thing that a repair does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Step {
    /// The structure that is renewed.
    pub structure: String,
    /// The page at which it lies, counted from the start of its device.
    pub page: Option<u64>,
    /// What is done.
    pub what: String,
    /// Whether nothing is lost by it. If not, blocks become dirty that may be clean.
    pub exact: bool,
}

/// What a repair will do, or did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Summary {
    /// Everything that is wrong.
    pub findings: Vec<Finding>,
    /// What is done about it; empty if nothing needs to be done.
    pub steps: Vec<Step>,
    /// Whether the state of every block is what it was. If not, some became dirty that may be clean.
    pub exact: bool,
    /// The blocks after the repair.
    pub blocks: Blocks,
}

/// A repair that is known to be possible. Nothing was written yet.
#[derive(Debug)]
pub struct Plan {
    summary: Summary,
    superblock: Superblock,
    copies_equal: bool,
    planes: Planes,
    next_log_seq: u64,
    /// Pages of the ring to be blanked, once nobody needs them.
    bad_log_pages: Vec<u64>,
    /// The label, if it is to be written.
    label: Option<(u64, Page)>,
    /// Whether a page of an area was bad, so that both areas are to be written.
    bad_area: bool,
}

impl Plan {
    /// What would be done.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Does it, on the devices that the plan was made from, and gives what a check says then.
    ///
    /// # Errors
    ///
    /// When the devices fail. The repair can be run again.
    pub fn apply<S: Storage>(self, mut stores: Stores<S>) -> Result<(Report, Stores<S>)> {
        if self.summary.steps.is_empty() {
            return check(stores, &mut |_, _| {});
        }
        for device in [Some(&stores.meta), stores.data.as_ref()]
            .into_iter()
            .flatten()
        {
            if !device.writable() {
                return Err(Error::ReadOnly {
                    path: device.path().into(),
                });
            }
        }
        if let (Some((page, label)), Some(data)) = (&self.label, &mut stores.data) {
            data.write_page(*page, label)?;
            data.flush()?;
        }
        let mut metadata = Metadata {
            stores,
            superblock: self.superblock,
            copies_equal: self.copies_equal,
            log_end: None,
        };
        let changes = Changes {
            needs_check: Some(false),
            ..Changes::default()
        };
        metadata.commit_at(&self.planes, &changes, self.next_log_seq)?;
        // The old state is not needed any more.
        let meta = &mut metadata.stores.meta;
        for page in &self.bad_log_pages {
            meta.write_page(*page, &[0; PAGE_SIZE])?;
        }
        meta.flush()?;
        if self.bad_area {
            metadata.commit_at(&self.planes, &changes, self.next_log_seq)?;
        }
        check(metadata.stores, &mut |_, _| {})
    }
}

/// Reads everything and finds out what a repair can do. Gives the devices back for [`Plan::apply`].
///
/// # Errors
///
/// [`Error::Irreparable`] if the identity of the device or the staleness of its blocks is lost; those of
/// [`check`](crate::check()); [`Class::Identity`](crate::Class::Identity) if the metadata belongs to another data device.
pub fn plan<S: Storage>(
    stores: Stores<S>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Plan, Stores<S>)> {
    if stores.placement == Placement::Separate && stores.data.is_none() {
        return Err(Error::NeedsDataDevice {
            metadata: stores.meta.path().into(),
        });
    }
    let (report, mut stores) = check(stores, progress)?;
    let (sb, copies_equal, conflict) = choose(&mut stores, &report)?;
    let mut steps = Vec::new();
    let label = verify_data(&mut stores, &sb, &mut steps)?;

    // First the log, for the planes may need it.
    let survey = Survey::read(&mut stores.meta, &sb, &mut steps);
    let mut planes = planes::load(&mut stores.meta, &sb, &mut steps)?;
    for run in &survey.dirty {
        planes.set_dirty(*run);
    }
    for run in &survey.valid {
        planes.validate(*run);
    }
    if survey.lost || conflict {
        if sb.root.stale_blocks != 0 {
            return Err(irreparable(
                &stores,
                "which blocks are still stale is not known, as records of the log are lost",
            ));
        }
        planes.set_dirty(Run {
            start: 0,
            end: sb.geometry.blocks(),
        });
    }
    let bad_area = report
        .findings
        .iter()
        .any(|f| f.severity >= Severity::Warning && f.structure.starts_with("checkpoint area"));
    other_steps(&report, conflict, &mut steps);

    // An original that is damaged is lost, and no part of the state.
    let needed = report
        .findings
        .iter()
        .any(|f| f.severity >= Severity::Warning && f.structure != UNDO);
    if steps.is_empty() {
        steps.push(Step {
            structure: "state".into(),
            page: None,
            what: "written anew".into(),
            exact: true,
        });
    }
    let summary = Summary {
        findings: report.findings,
        exact: !needed || steps.iter().all(|s| s.exact),
        steps: if needed { steps } else { Vec::new() },
        blocks: Blocks {
            dirty: planes.count(Select::Dirty),
            stale: planes.count(Select::Stale),
            total: planes.blocks(),
        },
    };
    let plan = Plan {
        summary,
        superblock: sb,
        copies_equal,
        planes,
        next_log_seq: survey.next_seq.min(MAX_SEQUENCE),
        bad_log_pages: survey.bad_pages,
        label,
        bad_area,
    };
    Ok((plan, stores))
}

impl Planes {
    /// Makes blocks dirty; those that are stale stay so.
    fn set_dirty(&mut self, run: Run) {
        Sink::set(self, pristine_shared::checkpoint::Plane::Dirty, run);
    }
}

fn irreparable<S: Storage>(stores: &Stores<S>, what: &'static str) -> Error {
    Error::Irreparable {
        path: stores.meta.path().into(),
        what,
    }
}

/// The superblock to go by, whether both copies are equal to it, and whether they contradict each other.
fn choose<S: Storage>(stores: &mut Stores<S>, report: &Report) -> Result<(Superblock, bool, bool)> {
    let mut buffer = [0; PAGE_SIZE];
    let placement = stores.placement;
    let copies = [0, 1].map(|n| read_copy(&mut stores.meta, placement, n, &mut buffer));
    match (copies, superblock::choose(copies[0], copies[1])) {
        ([Ok(a), Ok(b)], Ok(sb)) if a != b && a.sequence == b.sequence => {
            // Both were written whole and say different things, which no power cut does.
            let same = Superblock {
                root: a.root,
                clean: a.clean,
                needs_check: a.needs_check,
                undo: a.undo,
                ..b
            };
            if same != a || b.root.stale_blocks != 0 || a.root.stale_blocks != 0 {
                return Err(irreparable(
                    stores,
                    "the superblock copies contradict each other",
                ));
            }
            Ok((sb, false, true))
        }
        (copies, Ok(sb)) => Ok((sb, copies.iter().all(|c| *c == Ok(sb)), false)),
        (_, Err(Core::Mismatched(_))) => Err(irreparable(
            stores,
            "the superblock copies belong to different metadata, so whose this is cannot be told",
        )),
        _ => {
            debug_assert!(report.worst() == Some(Severity::Fatal));
            Err(irreparable(
                stores,
                "both superblock copies are damaged, so whose metadata this is cannot be told",
            ))
        }
    }
}

/// Checks that the data device is the one that is meant. Gives its label, if that is to be written anew.
fn verify_data<S: Storage>(
    stores: &mut Stores<S>,
    sb: &Superblock,
    steps: &mut Vec<Step>,
) -> Result<Option<(u64, Page)>> {
    let meta_path = stores.meta.path().to_path_buf();
    let sectors = match &stores.data {
        Some(data) => data.sectors(),
        None => stores.meta.sectors(),
    };
    let identity = |e| Error::core(&meta_path, e);
    sb.verify_size(sectors).map_err(identity)?;
    let Some(data) = &mut stores.data else {
        return Ok(None);
    };
    let at = Label::page_of(sectors).map_err(identity)?;
    if sb.geometry.sectors() > at * PAGE_SECTORS {
        return Err(identity(Core::BadField(
            Structure::Superblock(0),
            "managed size",
        )));
    }
    let mut page = [0; PAGE_SIZE];
    data.read_page(at, &mut page)?;
    let right = Label {
        data_uuid: sb.data_uuid,
        meta_uuid: sb.meta_uuid,
        data_sectors: sectors,
    };
    match Label::decode(&page) {
        Ok(label) if label == right => return Ok(None),
        Ok(label) => sb
            .verify_data(sectors, &label.data_uuid)
            .map_err(identity)?,
        Err(e @ Core::NewerVersion(..)) => return Err(identity(e)),
        // 16 bytes that are right by chance are not to be had: this is the device, and its label is damaged elsewhere.
        Err(_) if page.get(LABEL_UUID) == Some(&sb.data_uuid) => {}
        Err(Core::BadMagic(_)) => {
            return Err(Error::NoLabel {
                data: data.path().into(),
                metadata: meta_path,
            })
        }
        Err(_) => {
            return Err(irreparable(
                stores,
                "the label of the data device is damaged, so whether it is the right one cannot be told",
            ))
        }
    }
    let mut page = [0; PAGE_SIZE];
    right.encode(&mut page);
    steps.push(Step {
        structure: Structure::Label.to_string(),
        page: Some(at),
        what: "written anew; it still carries the data device's UUID".into(),
        exact: true,
    });
    Ok(Some((at, page)))
}

/// Where the data device's UUID lies in a label (see `pristine_shared::superblock`).
const LABEL_UUID: std::ops::Range<usize> = 16..32;

/// What is done beside the log and the planes.
fn other_steps(report: &Report, conflict: bool, steps: &mut Vec<Step>) {
    for finding in &report.findings {
        let what = match finding.structure.as_str() {
            name if name.starts_with("superblock copy") && conflict => {
                "written anew; as the copies contradict each other, all blocks become dirty"
            }
            name if name.starts_with("superblock copy") => "written anew from the other copy",
            "superblock" => "the mark that asks for a check is taken away",
            // Of the area that is not current; pages of the current one have steps of their own.
            name if name.starts_with("checkpoint area")
                && finding.severity == Severity::Warning =>
            {
                "written anew with the current state"
            }
            _ => continue,
        };
        if finding.severity < Severity::Warning {
            continue;
        }
        steps.push(Step {
            structure: finding.structure.clone(),
            page: finding.page,
            what: what.into(),
            exact: !conflict || !finding.structure.starts_with("superblock copy"),
        });
    }
}
