// SPDX-License-Identifier: GPL-2.0

//! What the server counts, in Prometheus' text format.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// More connections than the server takes.
    Connections,
    /// More connections than a client may have.
    ClientConnections,
    /// More requests than a client may make.
    Rate,
    /// No credentials, or wrong ones.
    Unauthorized,
    /// Credentials that are good for something else.
    Forbidden,
    /// No HTTP, or more of it than makes sense.
    Malformed,
    /// Too slow in asking or in taking the answer.
    Slow,
    /// The TLS handshake failed.
    Tls,
    /// An announcement of a peer that is not taken.
    Peer,
}

const REFUSALS: [(Refusal, &str); 9] = [
    (Refusal::Connections, "connections"),
    (Refusal::ClientConnections, "client_connections"),
    (Refusal::Rate, "rate"),
    (Refusal::Unauthorized, "unauthorized"),
    (Refusal::Forbidden, "forbidden"),
    (Refusal::Malformed, "malformed"),
    (Refusal::Slow, "slow"),
    (Refusal::Tls, "tls"),
    (Refusal::Peer, "peer"),
];

/// The version of HTTP of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

/// Upper bounds of the histogram, in microseconds.
const BOUNDS: [u64; 13] = [
    100,
    250,
    1_000,
    2_500,
    10_000,
    25_000,
    100_000,
    250_000,
    1_000_000,
    2_500_000,
    10_000_000,
    25_000_000,
    100_000_000,
];

/// All counters of a server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    connections: AtomicI64,
    accepted: AtomicU64,
    requests: [AtomicU64; 2],
    statuses: [AtomicU64; 6],
    in_flight: AtomicI64,
    waiting: AtomicI64,
    sent: AtomicU64,
    refused: [AtomicU64; REFUSALS.len()],
    hits: AtomicU64,
    misses: AtomicU64,
    upstream: AtomicU64,
    reloads: AtomicU64,
    announced: AtomicU64,
    peers: AtomicU64,
    /// Answers no slower than each bound; the last one is for all that are slower.
    times: [AtomicU64; BOUNDS.len() + 1],
    time: AtomicU64,
}

/// Something that is there until this is dropped.
pub(crate) struct Present<'a>(&'a AtomicI64);

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn present(gauge: &AtomicI64) -> Present<'_> {
    gauge.fetch_add(1, Relaxed);
    Present(gauge)
}

impl Metrics {
    /// A connection was accepted.
    pub(crate) fn connection(&self) -> Present<'_> {
        self.accepted.fetch_add(1, Relaxed);
        present(&self.connections)
    }

    /// A request arrived, and is answered until the result is dropped.
    pub(crate) fn request(&self, version: Version) -> Present<'_> {
        self.requests[version as usize].fetch_add(1, Relaxed);
        present(&self.in_flight)
    }

    /// An answer waits for its turn.
    pub(crate) fn waits(&self) -> Present<'_> {
        present(&self.waiting)
    }

    /// An answer is sent, or failed.
    pub(crate) fn answered(&self, status: u16, time: Duration) {
        if let Some(count) = self.statuses.get(usize::from(status / 100)) {
            count.fetch_add(1, Relaxed);
        }
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS.partition_point(|bound| *bound < micros);
        self.times[at].fetch_add(1, Relaxed);
        self.time.fetch_add(micros, Relaxed);
    }

    /// Bytes of objects went out.
    pub(crate) fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn refused(&self, why: Refusal) {
        self.refused[why as usize].fetch_add(1, Relaxed);
    }

    /// Something was, or was not, in a cache.
    pub(crate) fn cache(&self, hit: bool) {
        let count = if hit { &self.hits } else { &self.misses };
        count.fetch_add(1, Relaxed);
    }

    /// Bytes came from the store behind.
    pub(crate) fn upstream(&self, bytes: u64) {
        self.upstream.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn reloaded(&self) {
        self.reloads.fetch_add(1, Relaxed);
    }

    /// A peer said, for the first time or again, that it serves an image.
    pub(crate) fn announced(&self) {
        self.announced.fetch_add(1, Relaxed);
    }

    /// So many peers are known.
    pub(crate) fn peers(&self, count: usize) {
        self.peers.store(count as u64, Relaxed);
    }

    /// All of it, in Prometheus' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::with_capacity(4096);
        let mut family = |name: &str, kind: &str, help: &str, lines: &[(String, String)]| {
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "# HELP pristine_{name} {help}\n# TYPE pristine_{name} {kind}"
            );
            for (labels, value) in lines {
                let _ = writeln!(text, "pristine_{name}{labels} {value}");
            }
        };
        let one = |value: String| [(String::new(), value)];
        let count = |counter: &AtomicU64| counter.load(Relaxed).to_string();
        let gauge = |gauge: &AtomicI64| gauge.load(Relaxed).to_string();
        family(
            "connections",
            "gauge",
            "Open connections.",
            &one(gauge(&self.connections)),
        );
        family(
            "connections_total",
            "counter",
            "Connections accepted.",
            &one(count(&self.accepted)),
        );
        let versions = [("1", Version::One), ("2", Version::Two)];
        let lines = versions.map(|(name, version)| {
            let label = format!("{{version=\"{name}\"}}");
            (label, count(&self.requests[version as usize]))
        });
        family(
            "requests_total",
            "counter",
            "Requests, by version of HTTP.",
            &lines,
        );
        let lines: Vec<_> = (1..self.statuses.len())
            .map(|class| {
                (
                    format!("{{status=\"{class}xx\"}}"),
                    count(&self.statuses[class]),
                )
            })
            .collect();
        family(
            "responses_total",
            "counter",
            "Answers, by class of status.",
            &lines,
        );
        family(
            "requests_in_flight",
            "gauge",
            "Requests that are being answered.",
            &one(gauge(&self.in_flight)),
        );
        family(
            "answers_waiting",
            "gauge",
            "Answers that wait for their client's turn.",
            &one(gauge(&self.waiting)),
        );
        family(
            "sent_bytes_total",
            "counter",
            "Bytes of objects sent.",
            &one(count(&self.sent)),
        );
        let lines = REFUSALS.map(|(why, name)| {
            let label = format!("{{reason=\"{name}\"}}");
            (label, count(&self.refused[why as usize]))
        });
        family(
            "refused_total",
            "counter",
            "What was refused, and why.",
            &lines,
        );
        family(
            "cache_hits_total",
            "counter",
            "Objects or chunks found in the cache.",
            &one(count(&self.hits)),
        );
        family(
            "cache_misses_total",
            "counter",
            "Objects opened, or chunks fetched from the store behind.",
            &one(count(&self.misses)),
        );
        family(
            "upstream_bytes_total",
            "counter",
            "Bytes fetched from the store behind.",
            &one(count(&self.upstream)),
        );
        family(
            "reloads_total",
            "counter",
            "Reloads of the configuration.",
            &one(count(&self.reloads)),
        );
        family(
            "peers",
            "gauge",
            "Announcements of peers, of all images.",
            &one(count(&self.peers)),
        );
        family(
            "peer_announcements_total",
            "counter",
            "Announcements of peers taken, repeated ones included.",
            &one(count(&self.announced)),
        );
        let mut sum = 0;
        let mut lines: Vec<_> = BOUNDS
            .iter()
            .zip(&self.times)
            .map(|(bound, times)| {
                sum += times.load(Relaxed);
                let label = format!("_bucket{{le=\"{}\"}}", *bound as f64 / 1e6);
                (label, sum.to_string())
            })
            .collect();
        sum += self.times[BOUNDS.len()].load(Relaxed);
        lines.push(("_bucket{le=\"+Inf\"}".to_owned(), sum.to_string()));
        let seconds = self.time.load(Relaxed) as f64 / 1e6;
        lines.push(("_sum".to_owned(), seconds.to_string()));
        lines.push(("_count".to_owned(), sum.to_string()));
        family(
            "request_seconds",
            "histogram",
            "From a request to the end of its answer.",
            &lines,
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_where_they_are_counted() {
        for (at, (why, _)) in REFUSALS.iter().enumerate() {
            assert_eq!(*why as usize, at);
        }
    }

    #[test]
    fn a_histogram_is_cumulative() {
        let metrics = Metrics::default();
        metrics.answered(200, Duration::from_micros(100));
        metrics.answered(206, Duration::from_micros(101));
        metrics.answered(404, Duration::from_secs(1000));
        let text = metrics.text();
        for line in [
            "pristine_request_seconds_bucket{le=\"0.0001\"} 1\n",
            "pristine_request_seconds_bucket{le=\"0.00025\"} 2\n",
            "pristine_request_seconds_bucket{le=\"100\"} 2\n",
            "pristine_request_seconds_bucket{le=\"+Inf\"} 3\n",
            "pristine_request_seconds_count 3\n",
            "pristine_request_seconds_sum 1000.000201\n",
            "pristine_responses_total{status=\"2xx\"} 2\n",
            "pristine_responses_total{status=\"4xx\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
        {
            let _one = metrics.connection();
            assert!(metrics.text().contains("pristine_connections 1\n"));
        }
        assert!(metrics.text().contains("pristine_connections 0\n"));
    }
}
