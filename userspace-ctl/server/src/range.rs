// SPDX-License-Identifier: GPL-2.0

//! The Range header field: one range of bytes at a time.

use std::ops::Range;

/// What a Range field asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Everything: there is no such field, or it is about another unit.
    All,
    /// These bytes, not empty and within the object.
    Part(Range<u64>),
    /// Nothing that can be given: beyond the end, reversed, garbage, or several ranges. Clients of a store need one, and
    /// several would let one request cost many.
    Nothing,
}

/// What `field` asks of an object of `len` bytes.
pub(crate) fn asked(field: Option<&str>, len: u64) -> Asked {
    let Some((unit, set)) = field.and_then(|field| field.split_once('=')) else {
        return match field {
            None => Asked::All,
            Some(_) => Asked::Nothing,
        };
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return Asked::All;
    }
    let part = match set.trim().split_once('-') {
        Some(("", last)) => number(last).map(|count| len.saturating_sub(count)..len),
        Some((first, "")) => number(first).map(|first| first..len),
        Some((first, last)) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => {
                Some(first..last.saturating_add(1).min(len))
            }
            _ => None,
        },
        None => None,
    };
    match part {
        Some(part) if part.start < part.end => Asked::Part(part),
        _ => Asked::Nothing,
    }
}

/// Digits alone; what is beyond all objects is as good as the largest number.
fn number(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (field, wanted) in [
            ("bytes=0-0", 0..1),
            ("bytes=0-99", 0..100),
            ("bytes=5-", 5..100),
            ("bytes=-5", 95..100),
            ("bytes=-500", 0..100),
            ("bytes=90-500", 90..100),
            ("Bytes = 1-2", 1..3),
            ("bytes=1-18446744073709551615", 1..100),
            ("bytes=1-99999999999999999999999999", 1..100),
            ("bytes=-99999999999999999999999999", 0..100),
        ] {
            assert_eq!(asked(Some(field), 100), Asked::Part(wanted), "{field}");
        }
        for field in [
            "bytes=100-",
            "bytes=100-200",
            "bytes=5-4",
            "bytes=-0",
            "bytes=-",
            "bytes=",
            "bytes",
            "",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=0x1-2",
            "bytes=1-2,4-5",
            "bytes=--1",
            "bytes=1--1",
            "bytes=99999999999999999999999999-",
        ] {
            assert_eq!(asked(Some(field), 100), Asked::Nothing, "{field}");
        }
        assert_eq!(asked(None, 100), Asked::All);
        assert_eq!(asked(Some("lines=1-2"), 100), Asked::All);
        assert_eq!(asked(Some("bytes=0-"), 0), Asked::Nothing);
        assert_eq!(asked(Some("bytes=-5"), 0), Asked::Nothing);
    }
}
