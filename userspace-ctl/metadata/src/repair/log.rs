// SPDX-License-Identifier: GPL-2.0

//! What a damaged log still says.

use pristine_shared::error::Structure;
use pristine_shared::geometry::Run;
use pristine_shared::log::{self, Entry, RecordKind, Remains};
use pristine_shared::superblock::Superblock;
use pristine_shared::{Page, PAGE_SIZE};

use super::Step;
use crate::storage::Storage;

/// What is known of the log ring.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Blocks that may have changed since the checkpoint, as far as the records say.
    pub(super) dirty: Vec<Run>,
    /// Blocks that are not stale any more, as far as the records say.
    pub(super) valid: Vec<Run>,
    /// Whether a record that may have announced more is lost.
    pub(super) lost: bool,
    /// Above every number that a record in the ring may carry.
    pub(super) next_seq: u64,
    /// Pages of the ring that are damaged.
    pub(super) bad_pages: Vec<u64>,
}

/// A page of the ring.
#[derive(Clone, Copy)]
struct Kind {
    /// `None` if it cannot be read.
    kind: Option<RecordKind>,
    /// The newest sequence of a good sector.
    newest: u64,
}

fn read<S: Storage>(meta: &mut S, sb: &Superblock, page: u64, into: &mut Page) -> Kind {
    if meta.read(page, into).is_err() {
        return Kind {
            kind: None,
            newest: 0,
        };
    }
    Kind {
        kind: Some(log::classify(&sb.meta_uuid, into)),
        newest: log::salvage(&sb.meta_uuid, into, 0).1,
    }
}

/// The blocks that the good sectors of a record announce or tell of as dirty, and those that it calls valid; `false` if
/// one of its entries makes no sense. What it settles counts for nothing here: a lost record may have announced it
/// again.
fn announced(sb: &Superblock, page: &Page, into: &mut Vec<Run>, valid: &mut Vec<Run>) -> bool {
    let mut sensible = true;
    let cut = |run: Run| Run {
        start: run.start.min(sb.geometry.blocks()),
        end: run.end.min(sb.geometry.blocks()),
    };
    let known = log::entries(&sb.meta_uuid, page, |entry| {
        sensible &= entry.fits(&sb.geometry);
        match entry {
            Entry::Intent(run) => into.push(sb.geometry.blocks_in(run)),
            Entry::Dirty(run) => into.push(cut(run)),
            Entry::Valid(run) => valid.push(cut(run)),
            Entry::Settled(_) => {}
        }
        Ok(())
    });
    sensible && known.is_ok()
}

impl Survey {
    /// Reads the ring and follows the log as recovery does, but past damage where what is left proves enough.
    pub(super) fn read<S: Storage>(meta: &mut S, sb: &Superblock, steps: &mut Vec<Step>) -> Self {
        let ring = sb.layout.log_pages;
        let first = sb.root.log_seq;
        let mut buffer = [0; PAGE_SIZE];
        let mut survey = Self::default();
        let mut newest = 0;
        for page in sb.layout.log_start..sb.layout.log_start + ring {
            let kind = read(meta, sb, page, &mut buffer);
            newest = kind.newest.max(newest);
            if matches!(kind.kind, None | Some(RecordKind::Damaged)) {
                survey.bad_pages.push(page);
            }
        }

        let mut end = first;
        let mut add = |seq: u64, page: u64, what: &str, exact| {
            steps.push(Step {
                structure: Structure::Log(seq).to_string(),
                page: Some(page),
                what: what.into(),
                exact,
            });
        };
        let mut at_end = None;
        while end < first.saturating_add(ring) {
            let page = sb.layout.log_page(end);
            let kind = read(meta, sb, page, &mut buffer).kind;
            let (remains, _) = match kind {
                None => (Remains::Lost, 0),
                Some(_) => log::salvage(&sb.meta_uuid, &buffer, end),
            };
            match (kind, remains) {
                (Some(RecordKind::Whole(seq)), _) if seq == end => {
                    if !announced(sb, &buffer, &mut survey.dirty, &mut survey.valid) {
                        add(
                            end,
                            page,
                            "is not understood: all blocks become dirty",
                            false,
                        );
                        survey.lost = true;
                    }
                }
                (Some(RecordKind::Damaged), Remains::Entries) => {
                    if announced(sb, &buffer, &mut survey.dirty, &mut survey.valid) {
                        add(
                            end,
                            page,
                            "what is damaged of it held nothing; the rest is used",
                            true,
                        );
                    } else {
                        add(
                            end,
                            page,
                            "is not understood: all blocks become dirty",
                            false,
                        );
                        survey.lost = true;
                    }
                }
                (Some(RecordKind::Damaged) | None, Remains::Lost) if sb.clean && newest < first => {
                    let what =
                        "is not needed: the device was stopped in order after the last checkpoint";
                    add(end, page, what, true);
                    at_end = Some(page);
                    break;
                }
                (Some(RecordKind::Damaged) | None, Remains::Lost) => {
                    add(end, page, "is lost: all blocks become dirty", false);
                    survey.lost = true;
                }
                (Some(RecordKind::Damaged), Remains::Unfinished) => {
                    let what = "is cut off: good sectors show that it was never finished, so nothing that it announced had begun";
                    add(end, page, what, true);
                    at_end = Some(page);
                    break;
                }
                // Newer than it should be: the record was overwritten, or never reached the disk.
                (Some(RecordKind::Whole(seq) | RecordKind::Torn(seq)), _) if seq > end => {
                    add(end, page, "was overwritten: all blocks become dirty", false);
                    survey.lost = true;
                }
                // Blank, older or torn: the end, unless later ones are there.
                _ => break,
            }
            if survey.lost {
                break;
            }
            end += 1;
        }
        if !survey.lost && newest > end {
            let page = sb.layout.log_page(end);
            add(
                end,
                page,
                "is missing, though later ones are there: all blocks become dirty",
                false,
            );
            survey.lost = true;
        }
        let lost_page = sb.layout.log_page(end);
        for page in &survey.bad_pages {
            if *page != lost_page && at_end != Some(*page) {
                steps.push(Step {
                    structure: "log ring".into(),
                    page: Some(*page),
                    what: "blanked; its record is not needed any more".into(),
                    exact: true,
                });
            }
        }
        survey.next_seq = newest.max(end).saturating_add(1);
        if !survey.bad_pages.is_empty() {
            // Which number a damaged record carries is not known, but a ring holds no more than that.
            survey.next_seq = survey.next_seq.saturating_add(ring);
        }
        survey
    }
}

/// The blocks that the records from `from` up to, not including, `to` announce, if all of these can still be read.
pub(super) fn between<S: Storage>(
    meta: &mut S,
    sb: &Superblock,
    from: u64,
    to: u64,
) -> Option<Vec<Run>> {
    if from == 0 || from > to || to - from > sb.layout.log_pages {
        return None;
    }
    let mut dirty = Vec::new();
    // Where stale blocks became valid, there is no such record to go back to.
    let mut valid = Vec::new();
    let mut buffer = [0; PAGE_SIZE];
    for seq in from..to {
        let kind = read(meta, sb, sb.layout.log_page(seq), &mut buffer).kind?;
        let remains = log::salvage(&sb.meta_uuid, &buffer, seq).0;
        match (kind, remains) {
            // The number of a record that a power cut tore or kept from the disk is never used again.
            (_, Remains::Unfinished) if seq + 1 == to => {}
            (RecordKind::Whole(found), _) if found == seq => {
                announced(sb, &buffer, &mut dirty, &mut valid).then_some(())?;
            }
            (RecordKind::Damaged, Remains::Entries) => {
                announced(sb, &buffer, &mut dirty, &mut valid).then_some(())?;
            }
            _ => return None,
        }
    }
    Some(dirty)
}
