// SPDX-License-Identifier: GPL-2.0

//! Rule 5 of the contract: metadata of another device, or of a format that is not known, is refused by name.

#![allow(clippy::unwrap_used)]

mod common;

use common::{disks_of, open, stores, Content, Machine};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::shared::{crc, Error as Core, Page};
use pristine_metadata::{format_on, Class, Error, FormatOptions};

const PAGES: u64 = 2001;

fn formatted(placement: Placement) -> Vec<Content> {
    let disks = match placement {
        Placement::Separate => vec![Content::new(PAGES, 1), Content::new(60, 1)],
        Placement::Tail => vec![Content::new(PAGES, 1)],
    };
    let machine = Machine::new(disks);
    let mut metadata = format_on(stores(&machine, placement), &FormatOptions::default()).unwrap();
    disks_of(&mut metadata)
}

fn refused(disks: Vec<Content>, placement: Placement) -> Error {
    open(disks, placement).unwrap_err()
}

#[test]
fn identity_of_another_data_device_is_refused() {
    let one = formatted(Placement::Separate);
    let other = formatted(Placement::Separate);
    let error = refused(vec![other[0].clone(), one[1].clone()], Placement::Separate);
    assert_eq!(error.as_core(), Some(Core::DataUuid));
    assert_eq!(error.class(), Class::Identity);
}

#[test]
fn identity_of_a_device_without_label_is_refused() {
    let one = formatted(Placement::Separate);
    let error = refused(
        vec![Content::new(PAGES, 1), one[1].clone()],
        Placement::Separate,
    );
    assert!(matches!(error, Error::NoLabel { .. }), "{error}");
    assert_eq!(error.class(), Class::Identity);
}

#[test]
fn identity_of_a_resized_data_device_is_refused() {
    let one = formatted(Placement::Separate);
    let error = refused(
        vec![Content::new(PAGES + 7, 1), one[1].clone()],
        Placement::Separate,
    );
    assert_eq!(
        error.as_core(),
        Some(Core::DataSize((PAGES + 7) * 8, PAGES * 8))
    );
    assert_eq!(error.class(), Class::Identity);
}

#[test]
fn identity_of_a_tail_is_found_at_the_end_only() {
    let one = formatted(Placement::Tail);
    assert!(open(one, Placement::Tail).is_ok());
    let separate = formatted(Placement::Separate);
    let error = refused(vec![separate[0].clone()], Placement::Tail);
    assert!(
        matches!(error, Error::NeedsMetadataDevice { .. }),
        "{error}"
    );
    let error = refused(vec![Content::new(PAGES, 7)], Placement::Tail);
    assert_eq!(error.class(), Class::NotFormatted);
}

/// Changes both superblock copies and makes their checksums fit again.
fn patched(patch: impl Fn(&mut Page)) -> Error {
    let mut disks = formatted(Placement::Separate);
    for copy in [0, 15] {
        let page = disks[1].page_mut(copy).unwrap();
        patch(page);
        let sum = crc::crc32c(0, &page[12..]);
        page[8..12].copy_from_slice(&sum.to_le_bytes());
    }
    refused(disks, Placement::Separate)
}

#[test]
fn identity_of_a_newer_format_is_refused() {
    let error = patched(|page| page[12] = 2);
    assert_eq!(error.as_core(), Some(Core::NewerVersion(2, 1)));
    assert_eq!(error.class(), Class::Unsupported);
    let error = patched(|page| page[16] = 4);
    assert_eq!(error.as_core(), Some(Core::UnknownFeatures(4)));
    assert_eq!(error.class(), Class::Unsupported);
}

/// A newer copy beside an older one is no reason to use the older one.
#[test]
fn identity_of_a_newer_format_in_one_copy_is_refused() {
    let mut disks = formatted(Placement::Separate);
    let page = disks[1].page_mut(15).unwrap();
    page[12] = 9;
    let sum = crc::crc32c(0, &page[12..]);
    page[8..12].copy_from_slice(&sum.to_le_bytes());
    let error = refused(disks, Placement::Separate);
    assert_eq!(error.as_core(), Some(Core::NewerVersion(9, 1)));
}
