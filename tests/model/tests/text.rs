// SPDX-License-Identifier: GPL-2.0

//! What is written in a line is read back from it, and what the kernel could not mean is refused.

mod common;

use pristine_model::lines;
use pristine_shared::status::{BadStatus, Status};
use pristine_shared::table::{Features, Table};
use proptest::option;
use proptest::prelude::*;

prop_compose! {
    fn features()(
        hot_extents in 16..=65536u32,
        checkpoint_ms in 0..=3_600_000u32,
        meta_uuid in option::of(any::<[u8; 16]>()),
        image in option::of(any::<[u8; 32]>()),
        generation in option::of(any::<u64>()),
        fetch_timeout_ms in 0..=3_600_000u32,
        grow in any::<bool>(),
        defaults in any::<[bool; 3]>(),
    ) -> Features {
        let all = Features {
            hot_extents, checkpoint_ms, meta_uuid, image, generation, fetch_timeout_ms, grow,
        };
        let default = Features::default();
        Features {
            hot_extents: if defaults[0] { default.hot_extents } else { hot_extents },
            checkpoint_ms: if defaults[1] { default.checkpoint_ms } else { checkpoint_ms },
            fetch_timeout_ms: if defaults[2] { default.fetch_timeout_ms } else { fetch_timeout_ms },
            ..all
        }
    }
}

prop_compose! {
    fn status()(
        mode in any::<u8>(),
        n in any::<[u64; 11]>(),
        image in prop_oneof![Just([0; 32]), any::<[u8; 32]>()],
        meta_uuid in any::<[u8; 16]>(),
        undo in option::of(any::<(u8, [u64; 3])>()),
    ) -> Status {
        lines::status(mode, n, image, meta_uuid, undo)
    }
}

proptest! {
    #![proptest_config(common::cases(400))]

    #[test]
    fn tables_round_trip(
        data in "[!-~]{1,20}",
        metadata in option::of("[!-,.-~][!-~]{0,20}"),
        features in features(),
    ) {
        let table = Table { data: &data, metadata: metadata.as_deref(), features };
        let line = table.to_string();
        prop_assert_eq!(Table::parse(line.split_whitespace()), Ok(table));
        // A word more or less is noticed.
        let words: Vec<_> = line.split_whitespace().collect();
        prop_assert!(words.len() < 4 || Table::parse(words[..words.len() - 1].iter().copied()).is_err());
        prop_assert!(Table::parse(words.iter().copied().chain(["more"])).is_err());
    }

    #[test]
    fn the_order_of_features_does_not_matter(features in features(), by in 0..5usize) {
        let line = features.to_string();
        let mut words: Vec<_> = line.split_whitespace().collect();
        if let Some((_, pairs)) = words.split_first_mut() {
            let by = by * 2 % pairs.len();
            pairs.rotate_left(by);
        }
        let table = Table::parse(["a", "b"].into_iter().chain(words));
        prop_assert_eq!(table.map(|t| t.features), Ok(features));
    }

    #[test]
    fn status_lines_round_trip(status in status(), cut in 0..11usize) {
        let line = status.to_string();
        prop_assert_eq!(line.parse(), Ok(status));
        // Words that a later version adds are left alone; a missing one is named.
        prop_assert_eq!(format!("{line} later 7").parse(), Ok(status));
        let words: Vec<_> = line.split(' ').collect();
        let short = words[..cut].join(" ");
        prop_assert_eq!(short.parse::<Status>(), Err(BadStatus(cut as u32 + 1)));
    }
}
