// SPDX-License-Identifier: GPL-2.0

//! What a device is to Pristine, from its first and last pages alone.

use pristine_shared::error::Error as Core;
use pristine_shared::layout::Placement;
use pristine_shared::superblock::{Label, Superblock, Uuid};
use pristine_shared::PAGE_SIZE;

use crate::open::read_copy;
use crate::storage::Storage;

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A data device whose metadata is on another one.
    Data,
    /// A metadata device.
    Metadata,
    /// A data device with its metadata in its tail.
    Tail,
}

impl Role {
    /// Its name in properties of udev: `data` or `metadata`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Data | Self::Tail => "data",
            Self::Metadata => "metadata",
        }
    }
}

/// What [`probe`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// What the device is.
    pub role: Role,
    /// The UUID of the metadata, unless it is of a version that is not known here.
    pub meta_uuid: Option<Uuid>,
    /// The UUID of the data device, likewise.
    pub data_uuid: Option<Uuid>,
}

/// What the device is; `None` if it is none of a managed device's. Reads four pages at most. What cannot be read or is
/// damaged in both places is not taken for anything.
pub fn probe<S: Storage>(device: &mut S) -> Option<Found> {
    let mut page = [0; PAGE_SIZE];
    if let Ok(at) = Label::page_of(device.sectors()) {
        if device.read(at, &mut page).is_ok() {
            match Label::decode(&page) {
                // Of another size it is what an earlier use left behind.
                Ok(label) if label.data_sectors == device.sectors() => {
                    return Some(Found {
                        role: Role::Data,
                        meta_uuid: Some(label.meta_uuid),
                        data_uuid: Some(label.data_uuid),
                    })
                }
                Err(Core::NewerVersion(..)) => return Some(unknown(Role::Data)),
                _ => {}
            }
        }
    }
    [
        (Placement::Separate, Role::Metadata),
        (Placement::Tail, Role::Tail),
    ]
    .into_iter()
    .find_map(|(placement, role)| {
        [0, 1]
            .into_iter()
            .find_map(|copy| match read_copy(device, placement, copy, &mut page) {
                Ok(sb) => of_superblock(&sb, placement, role, device.sectors()),
                Err(Core::NewerVersion(..) | Core::UnknownFeatures(_)) => Some(unknown(role)),
                Err(_) => None,
            })
    })
}

fn of_superblock(sb: &Superblock, placement: Placement, role: Role, sectors: u64) -> Option<Found> {
    let belongs = sb.layout.placement == placement
        && (placement == Placement::Separate || sb.data_sectors == sectors);
    belongs.then_some(Found {
        role,
        meta_uuid: Some(sb.meta_uuid),
        data_uuid: Some(sb.data_uuid),
    })
}

fn unknown(role: Role) -> Found {
    Found {
        role,
        meta_uuid: None,
        data_uuid: None,
    }
}
