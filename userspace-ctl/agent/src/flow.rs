// SPDX-License-Identifier: GPL-2.0

//! What to do with a machine's disk: the decisions, and the steps up to a disk that is right.
//!
//! | the disk | the image | what happens |
//! | --- | --- | --- |
//! | no metadata | | format with all blocks stale and the provisioning mark, restore, take the mark away |
//! | stale blocks | | restore them: an earlier run was cut |
//! | dirty blocks | | call them stale, then restore them; with `revert=off` they stay |
//! | anything | changed | blocks that differ between the images become stale, then as above |
//! | all clean | same | nothing |
//!
//! Dirty blocks are called stale, durably, before the first of them is overwritten: from then on the disk is neither
//! the machine's nor the master's, and must not be booted before all of them are right. Stale blocks say so,
//! whoever reads the metadata next.

use pristine_metadata::{
    format_on, BlockState, Changes, FormatOptions, Image, Initial, Metadata, Planes, Run, Select,
    Storage, Stores, Superblock,
};
use pristine_shared::SECTOR_SIZE;

use crate::config::{Damaged, ImageSpec, Offline, Provision, Revert};
use crate::failure::{Failure, Kind};
use crate::master::Master;
use crate::restore::{restore, Disk, Done, Options, Pace};

/// The part of the configuration that decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which image.
    pub image: ImageSpec,
    /// When changes are taken back.
    pub revert: Revert,
    /// Whether the disk may be filled.
    pub provision: Provision,
    /// Without the store.
    pub offline: Offline,
    /// With metadata that cannot be used.
    pub damaged: Damaged,
}

/// What is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Local {
    /// No metadata: not a managed disk yet.
    Nothing,
    /// Metadata that cannot be used, and why.
    Unusable(Failure),
    /// A managed disk.
    Managed(Facts),
}

/// What the metadata says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The image's id.
    pub image: [u8; 32],
    /// Whether the disk was being filled.
    pub provisioning: bool,
    /// Dirty blocks.
    pub dirty: u64,
    /// Stale blocks.
    pub stale: u64,
    /// All blocks.
    pub blocks: u64,
}

impl Facts {
    /// From the superblock and the planes.
    pub fn new(superblock: &Superblock, planes: &Planes) -> Self {
        Self {
            image: superblock.image_id,
            provisioning: superblock.provisioning,
            dirty: planes.count(Select::Dirty),
            stale: planes.count(Select::Stale),
            blocks: planes.blocks(),
        }
    }
}

/// How much the store is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Not at all.
    Nothing,
    /// The disk is what it should be; the channel may have moved on.
    Update,
    /// There are changes to take back; the system on the disk is whole, though.
    Revert,
    /// There is nothing on the disk that could be booted.
    Fill,
}

/// How much the store is needed for what is on the disk.
///
/// # Errors
///
/// The policy forbids to go on.
pub fn need(local: &Local, policy: &Policy) -> Result<Need, Failure> {
    match local {
        Local::Nothing if policy.provision == Provision::Never => Err(Failure::new(
            Kind::Metadata,
            "the data device has no metadata, and pristine.provision=never forbids to fill it",
        )
        .advise("is pristine.metadata right? without pristine.provision=never the disk is filled")),
        Local::Nothing => Ok(Need::Fill),
        _ if policy.provision == Provision::Force => Ok(Need::Fill),
        Local::Unusable(failure) => match policy.damaged {
            // A device that is in use or fails says nothing about its metadata.
            Damaged::Reprovision if failure.kind == Kind::Metadata => Ok(Need::Fill),
            _ => Err(failure.clone()),
        },
        Local::Managed(facts) => Ok(if facts.stale > 0 || facts.provisioning {
            Need::Fill
        } else if facts.dirty > 0 && policy.revert == Revert::Eager {
            Need::Revert
        } else if policy.image == ImageSpec::Id(facts.image) {
            Need::Nothing
        } else {
            Need::Update
        }),
    }
}

/// What follows when the store does not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Without {
    /// Boot what is on the disk.
    Boot,
    /// Try again, for as long as it takes.
    Wait,
    /// It is a failure.
    Fail,
}

/// What follows when the store does not serve.
pub fn without_store(need: Need, policy: Offline) -> Without {
    match (need, policy) {
        (Need::Nothing, _) => Without::Boot,
        (_, Offline::Refuse) => Without::Fail,
        // It is the image already, if perhaps not the newest.
        (Need::Update, _) => Without::Boot,
        (Need::Revert, Offline::BootAsIs) => Without::Boot,
        (Need::Fill, Offline::BootAsIs) => Without::Fail,
        (_, Offline::Wait) => Without::Wait,
    }
}

/// What was done, or found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing had to be done.
    Clean,
    /// The disk was filled from the image (again, or further).
    Provision,
    /// Changes were taken back, or an interrupted taking back was ended.
    Revert,
    /// The disk went over to another image.
    Update,
    /// Changes stayed, as configured or for want of the store.
    AsIs,
}

impl Mode {
    /// Its word in the report.
    pub const fn word(self) -> &'static str {
        match self {
            Mode::Clean => "clean",
            Mode::Provision => "provision",
            Mode::Revert => "revert",
            Mode::Update => "update",
            Mode::AsIs => "as-is",
        }
    }

    /// What it does, for messages about progress.
    pub const fn doing(self) -> &'static str {
        match self {
            Mode::Clean | Mode::AsIs => "checking",
            Mode::Provision => "provisioning",
            Mode::Revert => "reverting",
            Mode::Update => "updating",
        }
    }
}

/// Where a disk stands before [`restore()`], with its metadata open.
pub struct Prepared<S> {
    /// The metadata.
    pub metadata: Metadata<S>,
    /// The state of the blocks; what must be restored is stale.
    pub planes: Planes,
    /// What is being done.
    pub mode: Mode,
    /// What the metadata said before.
    pub before: Facts,
    /// Whether the disk may hold right blocks already.
    pub compare: bool,
}

fn image_of(master: &impl Master) -> Image {
    Image {
        id: master.id(),
        generation: master.generation(),
        bytes: master.bytes(),
    }
}

/// Formats a disk to be filled. `compare` if it may hold blocks of the image already.
///
/// # Errors
///
/// The disk is too small or fails; or it holds what must not be lost, without `force`.
pub fn begin<S: Storage>(
    stores: Stores<S>,
    master: &impl Master,
    force: bool,
    compare: bool,
) -> Result<Prepared<S>, Failure> {
    let options = FormatOptions {
        image: Some(image_of(master)),
        initial: Initial::Stale,
        provisioning: true,
        force,
        ..FormatOptions::default()
    };
    let mut metadata = format_on(stores, &options)?;
    let (planes, _) = metadata.load()?;
    let before = Facts::new(metadata.superblock(), &planes);
    Ok(Prepared {
        metadata,
        planes,
        mode: Mode::Provision,
        before,
        compare,
    })
}

/// Makes stale what has to be restored on a managed disk, durably.
///
/// # Errors
///
/// The image does not fit, or the metadata cannot be read or written.
pub fn prepare<S: Storage>(
    mut metadata: Metadata<S>,
    mut planes: Planes,
    master: &mut impl Master,
    revert: Revert,
) -> Result<Prepared<S>, Failure> {
    let sb = *metadata.superblock();
    let before = Facts::new(&sb, &planes);
    let managed = sb.geometry.sectors().saturating_mul(SECTOR_SIZE);
    if master.bytes() > managed {
        let what = format!(
            "the image has {} bytes, but the managed device only {managed}",
            master.bytes()
        );
        return Err(Failure::new(Kind::TooSmall, what).advise(
            "if the disk is large enough, start once with pristine.provision=force; all of it is fetched then",
        ));
    }
    let mut changes = Changes::default();
    let mut change = false;
    let mut mode = if sb.provisioning {
        Mode::Provision
    } else {
        Mode::Revert
    };
    let mut compare = !sb.provisioning;

    let moved = sb.image_id != master.id();
    if moved {
        let per_block = sb.geometry.block_size() / crate::restore::BLOCK;
        let stale = master.differing_from(&sb.image_id)?;
        let all = vec![Run {
            start: 0,
            end: sb.geometry.blocks(),
        }];
        // Where the old image is not known any more, each block is compared by its digest.
        for run in stale.map_or(all, |runs| blocks_of(&runs, per_block)) {
            planes.set(run, BlockState::Stale);
        }
        changes.image = Some(image_of(master));
        change = true;
        compare = true;
        if !sb.provisioning {
            mode = Mode::Update;
        }
    } else if sb.generation != master.generation() && master.generation() != 0 {
        // The same content under another number.
        changes.image = Some(image_of(master));
        change = true;
    }
    // What changed here has to go if it is to be another image: half of one and half of the other is neither.
    if revert == Revert::Eager || moved {
        let dirty: Vec<Run> = planes.runs(Select::Dirty).collect();
        change |= !dirty.is_empty();
        for run in dirty {
            planes.set(run, BlockState::Stale);
        }
    }
    if planes.count(Select::Stale) == 0 && mode == Mode::Revert {
        mode = match planes.count(Select::Dirty) {
            0 => Mode::Clean,
            _ => Mode::AsIs,
        };
    }
    if change {
        metadata.commit(&planes, &changes)?;
    }
    Ok(Prepared {
        metadata,
        planes,
        mode,
        before,
        compare,
    })
}

/// Image blocks as tracking blocks.
fn blocks_of(runs: &[Run], per_block: u64) -> Vec<Run> {
    runs.iter()
        .map(|r| Run {
            start: r.start / per_block,
            end: r.end.div_ceil(per_block),
        })
        .collect()
}

impl<S: Storage> Prepared<S> {
    /// Restores what is stale, and takes the provisioning mark away.
    ///
    /// # Errors
    ///
    /// Those of [`restore()`].
    pub fn finish(
        &mut self,
        disk: &mut impl Disk,
        master: &mut impl Master,
        batch_blocks: u64,
        pace: &mut Pace<'_>,
    ) -> Result<Done, Failure> {
        let options = Options {
            batch_blocks,
            compare: self.compare,
        };
        let mut done = restore(
            &mut self.metadata,
            &mut self.planes,
            disk,
            master,
            &options,
            pace,
        )?;
        if self.metadata.superblock().provisioning {
            let changes = Changes {
                provisioning: Some(false),
                ..Changes::default()
            };
            self.metadata.commit(&self.planes, &changes)?;
            done.commits += 1;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            image: ImageSpec::Channel("stable".into()),
            revert: Revert::Eager,
            provision: Provision::Auto,
            offline: Offline::Wait,
            damaged: Damaged::Refuse,
        }
    }

    fn managed(dirty: u64, stale: u64, provisioning: bool) -> Local {
        Local::Managed(Facts {
            image: [7; 32],
            provisioning,
            dirty,
            stale,
            blocks: 100,
        })
    }

    #[test]
    fn figure_2() {
        let p = policy();
        assert_eq!(need(&Local::Nothing, &p), Ok(Need::Fill));
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
        assert_eq!(need(&managed(3, 0, false), &p), Ok(Need::Revert));
        assert_eq!(need(&managed(3, 1, false), &p), Ok(Need::Fill));
        assert_eq!(need(&managed(0, 0, true), &p), Ok(Need::Fill));
    }

    #[test]
    fn a_clean_disk_with_a_pinned_image_needs_no_store() {
        let mut p = policy();
        p.image = ImageSpec::Id([7; 32]);
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Nothing));
        assert_eq!(need(&managed(1, 0, false), &p), Ok(Need::Revert));
        p.revert = Revert::Off;
        assert_eq!(need(&managed(1, 0, false), &p), Ok(Need::Nothing));
        p.image = ImageSpec::Id([8; 32]);
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
    }

    #[test]
    fn identity_and_damage_are_refused_unless_told_otherwise() {
        let mut p = policy();
        let local = Local::Unusable(Failure::new(Kind::Metadata, "damaged"));
        assert_eq!(need(&local, &p).unwrap_err().kind, Kind::Metadata);
        p.damaged = Damaged::Reprovision;
        assert_eq!(need(&local, &p), Ok(Need::Fill));
        // A disk that fails or is in use is not a damaged one.
        let local = Local::Unusable(Failure::new(Kind::Device, "in use"));
        assert!(need(&local, &p).is_err());
        p.provision = Provision::Force;
        assert_eq!(need(&local, &p), Ok(Need::Fill));
    }

    #[test]
    fn a_disk_is_not_filled_when_that_is_forbidden() {
        let mut p = policy();
        p.provision = Provision::Never;
        assert!(need(&Local::Nothing, &p).is_err());
        assert_eq!(need(&managed(0, 0, false), &p), Ok(Need::Update));
    }

    #[test]
    fn what_is_half_restored_is_never_booted() {
        for policy in [Offline::Wait, Offline::BootAsIs, Offline::Refuse] {
            assert_ne!(without_store(Need::Fill, policy), Without::Boot, "{policy}");
        }
        assert_eq!(without_store(Need::Fill, Offline::Wait), Without::Wait);
        assert_eq!(without_store(Need::Revert, Offline::Wait), Without::Wait);
        assert_eq!(
            without_store(Need::Revert, Offline::BootAsIs),
            Without::Boot
        );
        assert_eq!(without_store(Need::Revert, Offline::Refuse), Without::Fail);
        // Machines start when the server is down, if their disk is whole.
        assert_eq!(without_store(Need::Update, Offline::Wait), Without::Boot);
        assert_eq!(without_store(Need::Update, Offline::Refuse), Without::Fail);
    }
}
