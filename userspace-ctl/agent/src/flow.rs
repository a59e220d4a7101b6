// SPDX-License-Identifier: GPL-2.0

//! What to do with a machine's disk: the decisions, and the steps up to a disk that may be booted.
//!
//! | the disk | the image | eager | instant |
//! | --- | --- | --- | --- |
//! | no metadata | | format with all blocks stale and the provisioning mark, restore, take the mark away | with `provision=instant`: format with all blocks stale, boot |
//! | stale blocks | | restore them: an earlier run was cut | boot on: the helper goes on with them |
//! | dirty blocks | | call them stale, then restore them; with `revert=off` they stay | call them stale, boot |
//! | anything | changed | blocks that differ between the images become stale, then as above | likewise, in the same commit |
//! | all clean | same | nothing | nothing |
//!
//! Dirty blocks are called stale, durably, before the first of them is overwritten: from then on the disk is neither
//! the machine's nor the master's, and must not be read before all of them are right. Stale blocks say so,
//! whoever reads the metadata next. With `instant` that is all that happens before the boot: the kernel sends reads of
//! stale blocks to the helper, which the agent starts before the root is mounted (see [`crate::helper`]), so that the
//! managed device shows the master at once. `revert` says what happens to a disk that is managed already; `provision`
//! to one that is not, or whose filling was cut.
//!
//! With `revert=undo` all changed blocks whose originals the disk's undo area keeps are put back first ([`pristine_metadata::undo`]).
//! If that is each of them, no store is asked; else the store is asked for before anything is changed, so that `offline`
//! decides what becomes of a disk that cannot be put back as a whole, and the others go the way of `eager` then.
//!
//! When the store does not serve, `offline` decides:
//!
//! | needed for | wait | boot-as-is | refuse |
//! | --- | --- | --- | --- |
//! | nothing (a pinned image, no block dirty or stale) | boot | boot | boot |
//! | news of the channel | boot | boot | fail |
//! | stale blocks while the system runs (instant) | boot; without any network, wait | boot | fail |
//! | taking changes back, eager or instant | wait | boot with the changes | fail |
//! | a disk that cannot be booted without it (eager) | wait | fail | fail |
//!
//! Making blocks stale needs no network, but booting from them does: so an instant revert first asks whether the store
//! is there, and changes nothing until it is. Once blocks are stale, a boot without the server goes as far as what is
//! local takes it; then it waits in a read, as long as the helper tries again, which is for ever. It would wait for a network
//! too, but nobody would bring that up: hence the difference.
//!
//! A release that no trusted key signed, or that has expired, is like a store that does not serve (see [`crate::trust`]).
//!
//! A channel that names an older generation than the disk has is not followed, unless `allow-older` says so: the
//! machine stays with its own image.

use pristine_metadata::{
    format_on, Changes, FormatOptions, Image, Initial, Metadata, Planes, Select, Storage, Stores,
    Superblock,
};
use pristine_shared::SECTOR_SIZE;
use pristine_store::TrustPolicy;

use crate::config::{Damaged, ImageSpec, Offline, Provision, Revert};
use crate::failure::{Failure, Kind};
use crate::master::Master;
use crate::restore::{restore, Disk, Done, Options, Pace};
use crate::update::UpdateDisk;

/// The part of the configuration that decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which image.
    pub image: ImageSpec,
    /// Whose word for it counts, if it is a channel's.
    pub trust: TrustPolicy,
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

/// When stale blocks are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// Before the system starts, by the agent.
    Before,
    /// While the system runs, by the helper.
    While,
}

impl Policy {
    /// When stale blocks of a disk are fetched.
    pub fn fetch(&self, local: &Local) -> Fetch {
        let instant = match local {
            // Filling, whether for the first time, once more, or further.
            Local::Managed(facts) if !facts.provisioning && self.provision != Provision::Force => {
                match self.revert {
                    Revert::Instant => true,
                    // Nothing is taken back over the network, but the blocks of an instant filling may still be on their
                    // way.
                    Revert::Off | Revert::Undo => self.provision == Provision::Instant,
                    Revert::Eager => false,
                }
            }
            _ => self.provision == Provision::Instant,
        };
        if instant {
            Fetch::While
        } else {
            Fetch::Before
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
    /// Blocks are stale, and fetched while the system runs.
    Serve,
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
        Local::Managed(facts) => {
            let incomplete = facts.stale > 0 || facts.provisioning;
            Ok(if incomplete && policy.fetch(local) == Fetch::Before {
                Need::Fill
            } else if facts.dirty > 0 && policy.revert != Revert::Off {
                Need::Revert
            } else if incomplete {
                Need::Serve
            } else if policy.image == ImageSpec::Id(facts.image) {
                Need::Nothing
            } else {
                Need::Update
            })
        }
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

/// What follows when the store does not serve, because of `why`.
pub fn without_store(need: Need, policy: Offline, why: Kind) -> Without {
    match (need, policy) {
        (Need::Nothing, _) => Without::Boot,
        (_, Offline::Refuse) => Without::Fail,
        // It is the image already, if perhaps not the newest.
        (Need::Update, _) => Without::Boot,
        // The helper tries the store again for ever, but nobody the network.
        (Need::Serve, Offline::Wait) if why == Kind::Network => Without::Wait,
        (Need::Serve, _) => Without::Boot,
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
    /// Nothing had to be changed; blocks that are stale since before are fetched while the system runs.
    Serve,
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
            Mode::Serve => "serve",
            Mode::AsIs => "as-is",
        }
    }

    /// What it does, for messages about progress.
    pub const fn doing(self) -> &'static str {
        match self {
            Mode::Clean | Mode::Serve | Mode::AsIs => "checking",
            Mode::Provision => "provisioning",
            Mode::Revert => "reverting",
            Mode::Update => "updating",
        }
    }
}

/// What a disk is like on which nothing was changed.
pub fn as_found(facts: &Facts) -> Mode {
    match (facts.dirty, facts.stale) {
        (0, 0) => Mode::Clean,
        (0, _) => Mode::Serve,
        _ => Mode::AsIs,
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
    /// Commits that it took to come here.
    pub commits: u64,
}

fn image_of(master: &impl Master) -> Image {
    Image {
        id: master.id(),
        generation: master.generation(),
        bytes: master.bytes(),
    }
}

/// Formats a disk to be filled. `compare` if it may hold blocks of the image already; `undo_bytes` for the undo area, 0 for
/// none.
///
/// The provisioning mark says that the disk must not be booted yet, so a disk that is filled while it runs has none.
///
/// # Errors
///
/// The disk is too small or fails; or it holds what must not be lost, without `force`.
pub fn begin<S: Storage>(
    stores: Stores<S>,
    master: &impl Master,
    force: bool,
    compare: bool,
    fetch: Fetch,
    undo_bytes: u64,
) -> Result<Prepared<S>, Failure> {
    let options = FormatOptions {
        undo_bytes,
        image: Some(image_of(master)),
        initial: Initial::Stale,
        provisioning: fetch == Fetch::Before,
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
        commits: 0,
    })
}

/// Makes dirty blocks stale, durably, on a disk whose image stays: one commit, whatever their number, and nothing of the
/// image is needed for it. With `revert=off` they stay dirty.
///
/// # Errors
///
/// The metadata cannot be written.
pub fn revert_instantly<S: Storage>(
    mut metadata: Metadata<S>,
    mut planes: Planes,
    revert: Revert,
) -> Result<Prepared<S>, Failure> {
    let before = Facts::new(metadata.superblock(), &planes);
    let mut mode = as_found(&before);
    if revert != Revert::Off && planes.make_stale() > 0 {
        mode = Mode::Revert;
    }
    // What was to be filled before the boot is filled while the system runs now.
    if before.provisioning {
        mode = Mode::Provision;
    }
    let change = mode == Mode::Revert || mode == Mode::Provision;
    if change {
        metadata.commit(&planes, &without_mark())?;
    }
    Ok(Prepared {
        metadata,
        planes,
        mode,
        before,
        compare: false,
        commits: u64::from(change),
    })
}

/// Takes the provisioning mark away.
fn without_mark() -> Changes {
    Changes {
        provisioning: Some(false),
        ..Changes::default()
    }
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
    fetch: Fetch,
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
        // Before the boot, blocks that are right after all cost no more than to be looked at.
        let stale = match fetch {
            Fetch::Before => master.plan_update(&sb.image_id)?,
            Fetch::While => master.differing_from(&sb.image_id)?,
        };
        // Where the old image is not known any more, each block is compared by its digest.
        planes.outdate(stale.as_deref(), crate::restore::BLOCK);
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
    let mut taken_back = 0;
    if revert != Revert::Off || moved {
        taken_back = planes.make_stale();
        change |= taken_back > 0;
    }
    if sb.provisioning && fetch == Fetch::While {
        changes.provisioning = Some(false);
        change = true;
    }
    let restored = before.stale > 0 && fetch == Fetch::Before;
    if mode == Mode::Revert && taken_back == 0 && !restored {
        mode = as_found(&before);
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
        commits: u64::from(change),
    })
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
        let mut update = UpdateDisk::new(
            &mut self.metadata,
            &mut self.planes,
            disk,
            batch_blocks,
            pace,
        );
        let went = master.update(&mut update);
        // If the disk failed, the store only saw it stop.
        let updated = update.finish()?;
        went?;
        let mut done = restore(
            &mut self.metadata,
            &mut self.planes,
            disk,
            master,
            &options,
            pace,
        )?;
        done.blocks += updated.blocks;
        done.updated += updated.updated;
        done.zeroed += updated.zeroed;
        done.commits += updated.commits;
        if self.metadata.superblock().provisioning {
            self.metadata.commit(&self.planes, &without_mark())?;
            done.commits += 1;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests;
