// SPDX-License-Identifier: GPL-2.0

//! What a device is to Pristine is told from its first and last pages, and nothing else is taken for it.

#![allow(clippy::unwrap_used)]

mod common;

use common::{disks_of, stores, Content, Disk, Machine};
use pristine_metadata::probe::{probe, Role};
use pristine_metadata::shared::layout::Placement;
use pristine_metadata::{format_on, FormatOptions};

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

fn role(content: &Content) -> Option<Role> {
    probe(&mut Disk::plain(content.clone())).map(|found| found.role)
}

#[test]
fn each_device_is_told_from_the_others() {
    let separate = formatted(Placement::Separate);
    assert_eq!(role(&separate[0]), Some(Role::Data));
    assert_eq!(role(&separate[1]), Some(Role::Metadata));
    assert_eq!(role(&formatted(Placement::Tail)[0]), Some(Role::Tail));
    assert_eq!(role(&Content::new(PAGES, 1)), None);
    assert_eq!(role(&Content::new(1, 0)), None);
    let [data, meta] = [0, 1].map(|n| probe(&mut Disk::plain(separate[n].clone())).unwrap());
    assert_eq!(data.meta_uuid, meta.meta_uuid);
    assert_eq!(data.data_uuid, meta.data_uuid);
}

#[test]
fn one_damaged_copy_does_not_hide_metadata() {
    let mut meta = formatted(Placement::Separate).remove(1);
    meta.page_mut(0).unwrap()[100] ^= 1;
    assert_eq!(role(&meta), Some(Role::Metadata));
    meta.page_mut(15).unwrap()[100] ^= 1;
    assert_eq!(role(&meta), None);
}

#[test]
fn a_label_of_another_size_is_a_leftover() {
    let data = formatted(Placement::Separate).remove(0);
    let mut larger = Content::new(PAGES + 5, 1);
    let label = data.page(PAGES - 1).unwrap();
    *larger.page_mut(PAGES + 4).unwrap() = label;
    assert_eq!(role(&larger), None);
}
