// SPDX-License-Identifier: GPL-2.0

//! The table line and the status line.

use arbitrary::Arbitrary;
use pristine_shared::state::Mode;
use pristine_shared::status::Status;
use pristine_shared::table::{Features, Hex, Table};

use crate::lines;

#[derive(Arbitrary, Debug)]
enum TableInput<'a> {
    Line(&'a str),
    Words(Vec<Word<'a>>),
    Features {
        hot_extents: u16,
        checkpoint_ms: u32,
        meta_uuid: Option<[u8; 16]>,
        image: Option<[u8; 32]>,
        generation: Option<u64>,
        fetch_timeout_ms: u32,
    },
}

#[derive(Arbitrary, Debug)]
enum Word<'a> {
    HotExtents,
    CheckpointMs,
    MetaUuid,
    Image,
    Generation,
    FetchTimeoutMs,
    Dash,
    Number(u64),
    Signed(i32),
    Hex(Vec<u8>),
    Uuid([u8; 16]),
    Digest([u8; 32]),
    Text(&'a str),
}

impl Word<'_> {
    fn text(&self) -> String {
        let hex = |bytes: &[u8]| Hex(bytes).to_string();
        match self {
            Self::HotExtents => "hot_extents".into(),
            Self::CheckpointMs => "checkpoint_ms".into(),
            Self::MetaUuid => "meta_uuid".into(),
            Self::Image => "image".into(),
            Self::Generation => "generation".into(),
            Self::FetchTimeoutMs => "fetch_timeout_ms".into(),
            Self::Dash => "-".into(),
            Self::Number(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Hex(bytes) => hex(bytes),
            Self::Uuid(bytes) => hex(bytes),
            Self::Digest(bytes) => hex(bytes),
            Self::Text(text) => (*text).to_owned(),
        }
    }
}

/// What is parsed and printed is parsed to the same again, and printed to the same.
fn table(line: &str) {
    let Ok(table) = Table::parse(line.split_whitespace()) else {
        return;
    };
    assert!((16..=65536).contains(&table.features.hot_extents));
    assert!(table.features.checkpoint_ms <= 3_600_000);
    assert!(table.features.fetch_timeout_ms <= 3_600_000);
    let printed = table.to_string();
    assert_eq!(Table::parse(printed.split_whitespace()), Ok(table));
    assert_eq!(
        Table::parse(printed.split_whitespace())
            .unwrap()
            .to_string(),
        printed
    );
}

pub(super) fn run_table(data: &[u8]) {
    match super::read(data) {
        None => {}
        Some(TableInput::Line(line)) => table(line),
        Some(TableInput::Words(words)) => {
            let words: Vec<_> = words.iter().map(Word::text).collect();
            table(&words.join(" "));
            // The same behind two devices and the right count.
            table(&format!("254:0 - {} {}", words.len(), words.join(" ")));
        }
        Some(TableInput::Features {
            hot_extents,
            checkpoint_ms,
            meta_uuid,
            image,
            generation,
            fetch_timeout_ms,
        }) => {
            let wanted = Table {
                data: "254:0",
                metadata: None,
                features: Features {
                    hot_extents: u32::from(hot_extents).max(16),
                    checkpoint_ms: checkpoint_ms % 3_600_001,
                    meta_uuid,
                    image,
                    generation,
                    fetch_timeout_ms: fetch_timeout_ms % 3_600_001,
                    grow: hot_extents % 2 == 1,
                },
            };
            let printed = wanted.to_string();
            assert_eq!(Table::parse(printed.split_whitespace()), Ok(wanted));
        }
    }
}

#[derive(Arbitrary, Debug)]
enum StatusInput<'a> {
    Line(&'a str),
    Words(Vec<StatusWord<'a>>),
    Fields([u64; 11], u8, [u8; 32], [u8; 16], Option<(u8, [u64; 3])>),
}

#[derive(Arbitrary, Debug)]
enum StatusWord<'a> {
    Mode(u8),
    Number(u64),
    Pair(u64, u64),
    Dash,
    Digest([u8; 32]),
    Uuid([u8; 16]),
    Text(&'a str),
}

impl StatusWord<'_> {
    fn text(&self) -> String {
        match self {
            Self::Mode(n) => Mode::from_code((n % 3).into()).to_string(),
            Self::Number(n) => n.to_string(),
            Self::Pair(a, b) => format!("{a}/{b}"),
            Self::Dash => "-".into(),
            Self::Digest(bytes) => Word::Digest(*bytes).text(),
            Self::Uuid(bytes) => Word::Uuid(*bytes).text(),
            Self::Text(text) => (*text).to_owned(),
        }
    }
}

fn status(line: &str) {
    if let Ok(status) = line.parse::<Status>() {
        assert_eq!(status.to_string().parse(), Ok(status));
    }
}

pub(super) fn run_status(data: &[u8]) {
    match super::read(data) {
        None => {}
        Some(StatusInput::Line(line)) => status(line),
        Some(StatusInput::Words(words)) => {
            let words: Vec<_> = words.iter().map(StatusWord::text).collect();
            status(&words.join(" "));
        }
        Some(StatusInput::Fields(n, mode, image, meta_uuid, undo)) => {
            let wanted = lines::status(mode, n, image, meta_uuid, undo);
            assert_eq!(wanted.to_string().parse(), Ok(wanted));
        }
    }
}
