// SPDX-License-Identifier: GPL-2.0

//! `revert=undo`: changes are taken back from what the disk keeps, and the store is only for what it does not.

use std::time::Instant;

use pristine_metadata::{Metadata, Originals, Planes, Select};

use crate::config::Revert;
use crate::console::{say, warn};
use crate::failure::Failure;
use crate::flow::Policy;
use crate::report::Report;
use crate::worker::millis;

/// Whether changes are taken back from the undo area on this disk.
fn undoes(policy: &Policy, metadata: &Metadata) -> bool {
    let sb = metadata.superblock();
    policy.revert == Revert::Undo && !sb.provisioning && sb.layout.undo_pages != 0
}

/// With `revert=undo`: puts all changed blocks back, if the disk has the originals of all of them, and those that were about to
/// be put back when it was cut. Whether there were any.
///
/// # Errors
///
/// Those of the devices.
pub(crate) fn all(
    policy: &Policy,
    metadata: &mut Metadata,
    planes: &mut Planes,
    report: &mut Report,
) -> Result<bool, Failure> {
    let dirty = planes.count(Select::Dirty);
    if policy.revert == Revert::Undo && dirty > 0 && metadata.superblock().layout.undo_pages == 0 {
        warn(
            "pristine.revert=undo, but this disk has no undo area: its changes are taken back from the store. It gets one \
             when it is filled with pristine.undo=SIZE",
        );
    }
    if !undoes(policy, metadata) || planes.count(Select::NotClean) == 0 {
        return Ok(false);
    }
    let begin = Instant::now();
    let originals = Originals::read(metadata, &mut |_, _| {});
    let missing = originals.missing(planes, Select::Dirty);
    if missing > 0 {
        let (used, pages) = originals.used();
        warn(format_args!(
            "{missing} of {dirty} dirty blocks have no original in the undo area ({used} of {pages} pages used, {} damaged): \
             these come from the store",
            originals.damaged()
        ));
        return Ok(false);
    }
    put_back(&originals, metadata, planes, report, begin)
}

/// Puts back what there are originals of; whether there were any.
fn put_back(
    originals: &Originals,
    metadata: &mut Metadata,
    planes: &mut Planes,
    report: &mut Report,
    begin: Instant,
) -> Result<bool, Failure> {
    let done = originals.restore(metadata, planes, &mut |_, _| {})?;
    if done.blocks == 0 {
        return Ok(false);
    }
    report.undid(done.blocks, originals.damaged(), millis(begin));
    say(format_args!(
        "{} blocks put back from the undo area, without the store",
        done.blocks
    ));
    Ok(true)
}

/// With `revert=undo`, once the store serves what else is needed: puts back what there are originals of.
pub(crate) fn some(
    policy: &Policy,
    metadata: &mut Metadata,
    planes: &mut Planes,
    report: &mut Report,
) -> Result<(), Failure> {
    if undoes(policy, metadata) {
        let begin = Instant::now();
        let originals = Originals::read(metadata, &mut |_, _| {});
        put_back(&originals, metadata, planes, report, begin)?;
    }
    Ok(())
}
