// SPDX-License-Identifier: GPL-2.0

//! What fetching does on a device, for `status` and `watch`: the kernel's counters, and what the helper says.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use pristine_device::control::{Control, Id};
use pristine_metadata::shared::abi::FetchStatsArgs;
use serde::Serialize;
use serde_json::Value;

use crate::ui::{human_bytes, human_count, Style, Ui};

/// A helper writes its state once a second; one that did not for so long, in seconds, does not run.
const OLD: u64 = 10;

/// What the kernel counts.
#[derive(Serialize)]
pub struct Fetch {
    helper: bool,
    /// Reads that the device completed since it was made, and the share of them that needed no request, 0 to 1.
    reads: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    hit_rate: Option<f64>,
    requests: u64,
    fetched: u64,
    hydrated: u64,
    overwritten: u64,
    errors: u64,
    open: u64,
    oldest_us: u64,
    latency_mean_us: u64,
    latency_max_us: u64,
}

impl Fetch {
    fn new(s: &FetchStatsArgs, reads: u64) -> Self {
        Self {
            helper: s.attached != 0,
            reads,
            hit_rate: hit_rate(s.requests, reads),
            requests: s.requests,
            fetched: s.fetched,
            hydrated: s.hydrated,
            overwritten: s.overwritten,
            errors: s.errors,
            open: s.open,
            oldest_us: s.oldest_us,
            latency_mean_us: mean(s.latency_us, s.requests.saturating_sub(s.open)),
            latency_max_us: s.latency_max_us,
        }
    }
}

/// The share of reads that needed no request; `None` without reads. One read may need several.
pub fn hit_rate(requests: u64, reads: u64) -> Option<f64> {
    (reads > 0).then(|| 1.0 - requests.min(reads) as f64 / reads as f64)
}

/// Reads that a device completed since it was made; 0 if the kernel does not tell.
pub fn reads(id: Id) -> u64 {
    let path = format!("/sys/dev/block/{}:{}/stat", id.major, id.minor);
    let stat = std::fs::read_to_string(path).unwrap_or_default();
    let reads = stat.split_ascii_whitespace().next();
    reads.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// The counters, if there is anything to say: something is stale, was fetched, or there is a helper. An older module
/// has none.
pub fn fetch(control: &Control, id: Id) -> Option<Fetch> {
    let stats = control.fetch_stats(id).ok()?;
    let some = stats.stale > 0 || stats.attached != 0 || stats.requests > 0 || stats.hydrated > 0;
    some.then(|| Fetch::new(&stats, reads(id)))
}

/// What the device's helper wrote last.
pub fn helper_state(name: &str) -> Option<Value> {
    let path = PathBuf::from("/run/pristine").join(format!("helper-{name}.json"));
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn is_current(state: &Value) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let updated = state.get("updated").and_then(Value::as_u64);
    let age = now
        .ok()
        .zip(updated)
        .map(|(now, at)| now.as_secs().saturating_sub(at));
    age.is_some_and(|age| age < OLD)
}

/// Writes both for people.
pub fn write(
    out: &mut dyn Write,
    fetch: &Fetch,
    state: Option<&Value>,
    stale: u64,
    block_bytes: u64,
    ui: &Ui,
) -> io::Result<()> {
    let helper = match (fetch.helper, stale) {
        (true, _) => ui.paint(Style::Good, "attached"),
        (false, 0) => "none, and none is needed".to_owned(),
        (false, _) => ui.paint(Style::Bad, "NONE: reads of stale blocks wait or fail"),
    };
    writeln!(out, "  helper      {helper}")?;
    if let Some(state) = state.filter(|_| fetch.helper) {
        helper_lines(out, state, block_bytes, ui)?;
    }
    if let Some(share) = fetch.hit_rate {
        writeln!(
            out,
            "  reads       {}, of which {:.1} % needed no request",
            human_count(fetch.reads),
            share * 100.0
        )?;
    }
    writeln!(
        out,
        "  fetched     {} requests: {} blocks, {} failed, {} open (the oldest {})",
        human_count(fetch.requests),
        human_count(fetch.fetched),
        human_count(fetch.errors),
        human_count(fetch.open),
        human_micros(fetch.oldest_us),
    )?;
    writeln!(
        out,
        "              {} on average, {} at most",
        human_micros(fetch.latency_mean_us),
        human_micros(fetch.latency_max_us)
    )?;
    writeln!(
        out,
        "  hydrated    {} blocks; {} were overwritten before",
        human_count(fetch.hydrated),
        human_count(fetch.overwritten)
    )
}

fn helper_lines(out: &mut dyn Write, state: &Value, block_bytes: u64, ui: &Ui) -> io::Result<()> {
    let text = |key: &str| state.get(key).and_then(Value::as_str);
    let number = |key: &str| state.get(key).and_then(Value::as_u64);
    if !is_current(state) {
        let line = "it has not said what it does for a while";
        return writeln!(out, "              {}", ui.paint(Style::Warn, line));
    }
    let rate = number("blocks_per_second").unwrap_or(0);
    let rate = human_bytes(rate.saturating_mul(block_bytes));
    let eta = match number("eta") {
        Some(seconds) => format!(", {} left", human_seconds(seconds)),
        None => String::new(),
    };
    let phase = text("phase").unwrap_or("unknown");
    writeln!(out, "              {phase}, {rate}/s{eta}")?;
    if let Some(source) = text("source") {
        writeln!(out, "              from {source}")?;
    }
    if let Some(peers) = state.get("peers") {
        let of = |key: &str| human_count(peers.get(key).and_then(Value::as_u64).unwrap_or(0));
        writeln!(
            out,
            "              neighbours: {} known, {} left alone; {} blocks from them, {} to them; {} failures, {} wrong",
            of("known"),
            of("left_alone"),
            of("blocks"),
            of("given_blocks"),
            of("failed"),
            of("wrong"),
        )?;
    }
    match text("last_error") {
        Some(error) => writeln!(
            out,
            "              {}",
            ui.paint(Style::Warn, &format!("last warning: {error}"))
        ),
        None => Ok(()),
    }
}

/// A mean; 0 of nothing.
pub fn mean(sum: u64, count: u64) -> u64 {
    sum.checked_div(count).unwrap_or(0)
}

/// A time for people: `0`, `750 us`, `12 ms`, `3.4 s`.
pub fn human_micros(micros: u64) -> String {
    match micros {
        0 => "0".to_owned(),
        1..=999 => format!("{micros} us"),
        1_000..=999_999 => format!("{} ms", micros / 1_000),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// A time for people: `42 s`, `3 min 5 s`, `2 h 10 min`.
pub fn human_seconds(seconds: u64) -> String {
    match seconds {
        0..=59 => format!("{seconds} s"),
        60..=3599 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        let micros: Vec<String> = [0, 999, 1000, 999_999, 3_400_000]
            .into_iter()
            .map(human_micros)
            .collect();
        assert_eq!(micros, ["0", "999 us", "1 ms", "999 ms", "3.4 s"]);
        let seconds: Vec<String> = [0, 59, 185, 7800].into_iter().map(human_seconds).collect();
        assert_eq!(seconds, ["0 s", "59 s", "3 min 5 s", "2 h 10 min"]);
    }

    #[test]
    fn a_state_goes_out_of_date() {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(is_current(&serde_json::json!({ "updated": now })));
        assert!(!is_current(&serde_json::json!({ "updated": now - 60 })));
        assert!(!is_current(&serde_json::json!({})));
    }
}
