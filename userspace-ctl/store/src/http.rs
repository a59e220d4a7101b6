// SPDX-License-Identifier: GPL-2.0

//! A store behind a web server: any that serves files, better one that knows ranges.
//!
//! Nothing here retries; nothing here is trusted. A server that ignores a range and sends the whole object is
//! served from that; one that sends another range, or goes on for ever, is refused.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pristine_image::{ImageId, MAX_PACK_LEN};
use ureq::config::Config;
use ureq::http::{header, Response, StatusCode, Uri};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body};

use crate::dir::generations;
use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName};
use crate::release::{SignedRelease, MAX_RELEASE_LEN};
use crate::retry::CancelToken;
use crate::store::{Put, Revision, Store, Traffic};

/// The content type of `pristine serve`'s listings: names, one a line.
pub const LISTING_TYPE: &str = "application/vnd.pristine.list";
/// The most bytes of a listing that are read.
const MAX_LISTING: u64 = 16 << 20;
/// No server is waited for that is slower than this, in bytes per second.
const MIN_RATE: u64 = 64 << 10;

/// Bytes read between two looks at whether to stop.
const PIECE: u64 = 16 << 10;

/// How long to wait for a server.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// For a connection, name resolution included. Default 10 s.
    pub connect_timeout: Duration,
    /// For each next piece of an answer. Default 15 s. A whole answer may take this long plus its length at
    /// 64 KiB/s; whoever fetches asks a slow server for less at once.
    pub read_timeout: Duration,
    /// Connections kept open between requests. Default 16.
    pub connections: usize,
    /// The addresses of the URL's host, at most 16, which is never looked up then: for who must not depend on a
    /// resolver and its files later. Empty, the default: it is looked up for each connection.
    pub addresses: Vec<SocketAddr>,
    /// A file with the certificates (PEM) of the authorities to trust instead of the system's, for `https` and S3.
    pub ca_file: Option<PathBuf>,
    /// Ends an answer in the middle, which a slow server may otherwise draw out up to the timeouts.
    pub cancel: CancelToken,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(15),
            connections: 16,
            addresses: Vec::new(),
            ca_file: None,
            cancel: CancelToken::new(),
        }
    }
}

/// A store behind a web server.
#[derive(Debug)]
pub struct HttpStore {
    agent: Agent,
    /// Without a slash at the end.
    base: String,
    options: HttpOptions,
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// Knows the addresses of one host; others (a proxy, a redirect) it looks up.
#[derive(Debug)]
struct Known {
    host: String,
    addresses: Vec<SocketAddr>,
    other: DefaultResolver,
}

impl Resolver for Known {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> std::result::Result<ResolvedSocketAddrs, ureq::Error> {
        if uri.host() != Some(self.host.as_str()) {
            return self.other.resolve(uri, config, timeout);
        }
        let mut found = self.empty();
        for address in self.addresses.iter().take(16) {
            found.push(*address);
        }
        Ok(found)
    }
}

/// Which bytes of an object to ask for.
enum Want {
    All,
    Range(Range<u64>),
}

/// An answer, ready to be read.
struct Answer {
    body: Body,
    /// The first byte of the object that the body holds.
    start: u64,
    /// The object's whole length, if the server says.
    total: Option<u64>,
    /// The body's length, if the server says.
    body_len: Option<u64>,
}

impl HttpStore {
    /// Opens the store at a URL; the server is not contacted yet.
    ///
    /// # Errors
    /// [`Error::BadLocation`].
    pub fn open(url: &str, options: HttpOptions) -> Result<Self> {
        let bad = |why: &str| Error::BadLocation {
            location: url.to_owned(),
            why: why.to_owned(),
        };
        let https = match url.split_once("://") {
            Some(("http", _)) => false,
            Some(("https", _)) => true,
            _ => return Err(bad("only http://, https:// and directories are known")),
        };
        if https && !cfg!(feature = "tls") {
            return Err(bad(
                "this program was built without TLS; use http://, blocks are verified anyway",
            ));
        }
        if url.contains(['?', '#', ' ']) {
            return Err(bad("a store's URL has no query, fragment or space"));
        }
        let base = url.trim_end_matches('/').to_owned();
        let parsed: std::result::Result<Uri, _> = url.parse();
        let host = parsed.ok().and_then(|uri| uri.host().map(str::to_owned));
        let Some(host) = host.filter(|host| !host.is_empty()) else {
            return Err(bad("it has no host"));
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("pristine/", env!("CARGO_PKG_VERSION")))
            .max_redirects(3)
            .timeout_connect(Some(options.connect_timeout))
            .timeout_resolve(Some(options.connect_timeout))
            .timeout_send_request(Some(options.read_timeout))
            .timeout_recv_response(Some(options.read_timeout))
            .timeout_per_read(Some(options.read_timeout))
            .max_idle_connections(options.connections)
            .max_idle_connections_per_host(options.connections)
            .build();
        let agent = if options.addresses.is_empty() {
            config.new_agent()
        } else {
            let known = Known {
                host,
                addresses: options.addresses.clone(),
                other: DefaultResolver::default(),
            };
            Agent::with_parts(config, DefaultConnector::default(), known)
        };
        Ok(HttpStore {
            agent,
            base,
            options,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    fn protocol(&self, what: &str, why: impl Into<String>) -> Error {
        Error::Protocol {
            location: self.base.clone(),
            object: what.to_owned(),
            why: why.into(),
        }
    }

    fn transport(&self, what: &str, error: ureq::Error) -> Error {
        let location = self.base.clone();
        match error {
            ureq::Error::Timeout(step @ (ureq::Timeout::Connect | ureq::Timeout::Resolve)) => {
                Error::Unreachable {
                    location,
                    why: format!("timeout ({step})"),
                }
            }
            ureq::Error::Timeout(step) => Error::Timeout {
                location,
                why: format!("timeout ({step}) for {what}"),
            },
            ureq::Error::BadUri(why) => Error::BadLocation { location, why },
            error @ (ureq::Error::Protocol(_)
            | ureq::Error::TooManyRedirects
            | ureq::Error::RedirectFailed
            | ureq::Error::LargeResponseHeader(..)) => self.protocol(what, error.to_string()),
            error => Error::Unreachable {
                location,
                why: error.to_string(),
            },
        }
    }

    fn request(&self, path: &str, what: &str, want: &Want, limit: u64) -> Result<Answer> {
        let body_time = self.options.read_timeout + Duration::from_secs(limit / MIN_RATE);
        let mut request = self
            .agent
            .get(self.url(path))
            .header(header::ACCEPT_ENCODING, "identity")
            .config()
            .timeout_recv_body(Some(body_time))
            .build();
        if let Want::Range(range) = want {
            let value = format!("bytes={}-{}", range.start, range.end - 1);
            request = request.header(header::RANGE, value);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let response = request
            .call()
            .map_err(|error| self.transport(what, error))?;
        self.answer(what, want, response)
    }

    fn answer(&self, what: &str, want: &Want, response: Response<Body>) -> Result<Answer> {
        if let Some(encoding) = text(&response, header::CONTENT_ENCODING) {
            if encoding != "identity" {
                return Err(self.protocol(what, format!("it is encoded ({encoding})")));
            }
        }
        match (response.status(), want) {
            (StatusCode::OK, _) => {
                let body = response.into_body();
                Ok(Answer {
                    start: 0,
                    total: body.content_length(),
                    body_len: body.content_length(),
                    body,
                })
            }
            (StatusCode::PARTIAL_CONTENT, Want::Range(range)) => {
                let content_range = text(&response, header::CONTENT_RANGE)
                    .ok_or_else(|| self.protocol(what, "a part without Content-Range"))?;
                let (start, total) = parse_content_range(content_range)
                    .filter(|(start, _)| *start == range.start)
                    .ok_or_else(|| {
                        let why = format!(
                            "asked for the bytes from {}, got {content_range:?}",
                            range.start
                        );
                        self.protocol(what, why)
                    })?;
                let body = response.into_body();
                Ok(Answer {
                    start,
                    total,
                    body_len: body.content_length(),
                    body,
                })
            }
            (StatusCode::RANGE_NOT_SATISFIABLE, Want::Range(range)) => {
                let len = text(&response, header::CONTENT_RANGE)
                    .and_then(|value| value.strip_prefix("bytes */")?.parse().ok())
                    .unwrap_or(0);
                Err(Error::Truncated {
                    location: self.base.clone(),
                    object: what.to_owned(),
                    len,
                    needed: range.end,
                })
            }
            (StatusCode::NOT_FOUND | StatusCode::GONE, _) => Err(Error::NotFound {
                location: self.base.clone(),
                object: what.to_owned(),
            }),
            (status, _) => Err(Error::Status {
                location: self.base.clone(),
                object: what.to_owned(),
                status: status.as_u16(),
            }),
        }
    }

    /// Reads the whole body, at most `limit` bytes of it.
    fn read_all(&self, what: &str, answer: Answer, limit: u64) -> Result<Vec<u8>> {
        let too_large = || Error::TooLarge {
            location: self.base.clone(),
            object: what.to_owned(),
            limit,
        };
        if answer.total.is_some_and(|total| total > limit) {
            return Err(too_large());
        }
        let expected = answer.total;
        let bytes = self.read_body(what, answer, limit + 1, expected)?;
        if bytes.len() as u64 > limit {
            return Err(too_large());
        }
        Ok(bytes)
    }

    /// Reads up to `limit` bytes of the body; fewer than `expected` of them are an error.
    fn read_body(
        &self,
        what: &str,
        answer: Answer,
        limit: u64,
        expected: Option<u64>,
    ) -> Result<Vec<u8>> {
        // Memory follows what arrives, not what is promised.
        let capacity = expected.unwrap_or(0).min(limit).min(4 << 20);
        let mut bytes = Vec::with_capacity(capacity as usize);
        let body_len = answer.body_len;
        let mut reader = answer.body.into_reader().take(limit);
        let result = loop {
            self.options.cancel.check()?;
            match (&mut reader).take(PIECE).read_to_end(&mut bytes) {
                Ok(0) => break Ok(()),
                Ok(_) => (),
                Err(error) => break Err(error),
            }
        };
        let got = bytes.len() as u64;
        if body_len == Some(got) {
            // All of it is read; a reader that sees so gives the connection back for the next request.
            let _ = reader.into_inner().read(&mut [0]);
        }
        self.bytes.fetch_add(got, Ordering::Relaxed);
        let cut = |expected| Error::Cut {
            location: self.base.clone(),
            object: what.to_owned(),
            expected,
            got,
        };
        match (result, expected) {
            (Err(error), _) if is_timeout(&error) => Err(Error::Timeout {
                location: self.base.clone(),
                why: format!("{error}, after {got} bytes of {what}"),
            }),
            (Err(_), expected) => Err(cut(expected.unwrap_or(limit))),
            (Ok(_), Some(expected)) if got < expected.min(limit) => Err(cut(expected)),
            (Ok(_), _) => Ok(bytes),
        }
    }

    /// Reads the part of an object that was wanted, whatever part the server chose to send.
    /// The result is shorter than wanted only if the object ends.
    fn read_range(&self, what: &str, answer: Answer, range: &Range<u64>) -> Result<Vec<u8>> {
        let skip = range.start - answer.start;
        let total = answer.total;
        let end = total.map_or(range.end, |total| range.end.min(total));
        let mut answer = answer;
        if skip > 0 {
            let mut reader = answer.body.as_reader().take(skip);
            let skipped = io::copy(&mut reader, &mut io::sink());
            let done = skipped.as_ref().copied().unwrap_or(0);
            self.bytes.fetch_add(done, Ordering::Relaxed);
            if skipped.is_err() || done < skip.min(total.unwrap_or(skip)) {
                return Err(Error::Cut {
                    location: self.base.clone(),
                    object: what.to_owned(),
                    expected: range.end,
                    got: done,
                });
            }
        }
        let len = end.saturating_sub(range.start);
        let expected = total.map(|_| len);
        self.read_body(what, answer, len, expected)
    }

    fn range(&self, object: &ObjectName, range: &Range<u64>) -> Result<(Vec<u8>, Option<u64>)> {
        let what = object.to_string();
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok((Vec::new(), None));
        }
        let answer = self.request(&object.path(), &what, &Want::Range(range.clone()), len)?;
        // A server that sends all of a large object has its time for all of it: no. It is as good as too slow,
        // and the timeout is that of the range.
        let total = answer.total;
        Ok((self.read_range(&what, answer, range)?, total))
    }

    fn listing(&self, directory: &str) -> Result<Vec<String>> {
        let unsupported = || Error::Unsupported {
            location: self.base.clone(),
            what: "list what it holds (only directories and `pristine serve` can)".to_owned(),
        };
        let what = format!("the list of {directory}");
        let path = format!("{directory}/");
        let request = self
            .agent
            .get(self.url(&path))
            .header(header::ACCEPT, LISTING_TYPE);
        self.requests.fetch_add(1, Ordering::Relaxed);
        let response = request
            .call()
            .map_err(|error| self.transport(&what, error))?;
        if text(&response, header::CONTENT_TYPE) != Some(LISTING_TYPE) {
            if response.status().is_server_error() {
                self.answer(&what, &Want::All, response)?;
            }
            return Err(unsupported());
        }
        let answer = self.answer(&what, &Want::All, response)?;
        let bytes = self.read_all(&what, answer, MAX_LISTING)?;
        let text = String::from_utf8(bytes).map_err(|_| self.protocol(&what, "it is not text"))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    fn read_only<T>(&self) -> Result<T> {
        Err(Error::ReadOnly {
            location: self.base.clone(),
            why: "publish to the directory that the server serves".to_owned(),
        })
    }
}

impl Store for HttpStore {
    fn location(&self) -> &str {
        &self.base
    }

    fn get(&self, object: &ObjectName, limit: u64) -> Result<Vec<u8>> {
        let what = object.to_string();
        let expected = limit.min(MAX_PACK_LEN);
        let answer = self.request(&object.path(), &what, &Want::All, expected)?;
        self.read_all(&what, answer, limit)
    }

    fn get_range(&self, object: &ObjectName, range: Range<u64>) -> Result<Vec<u8>> {
        let (bytes, total) = self.range(object, &range)?;
        let needed = range.end.saturating_sub(range.start);
        if (bytes.len() as u64) < needed {
            return Err(match total {
                Some(total) if total < range.end => Error::Truncated {
                    location: self.base.clone(),
                    object: object.to_string(),
                    len: total,
                    needed: range.end,
                },
                _ => Error::Cut {
                    location: self.base.clone(),
                    object: object.to_string(),
                    expected: needed,
                    got: bytes.len() as u64,
                },
            });
        }
        Ok(bytes)
    }

    fn get_start(&self, object: &ObjectName, len: u64) -> Result<Vec<u8>> {
        Ok(self.range(object, &(0..len))?.0)
    }

    fn size(&self, object: &ObjectName) -> Result<Option<u64>> {
        let what = object.to_string();
        self.requests.fetch_add(1, Ordering::Relaxed);
        let call = self.agent.head(self.url(&object.path())).call();
        let response = call.map_err(|error| self.transport(&what, error))?;
        // ureq knows that no body follows, and so has no length for it.
        let length = text(&response, header::CONTENT_LENGTH).and_then(|len| len.parse().ok());
        match self.answer(&what, &Want::All, response) {
            Ok(_) => match length {
                Some(length) => Ok(Some(length)),
                None => Err(self.protocol(&what, "it does not say how long it is")),
            },
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn put(&self, _: &ObjectName, _: &[u8]) -> Result<Put> {
        self.read_only()
    }

    fn images(&self) -> Result<Vec<ImageId>> {
        let names = self.listing("images")?;
        let ids = names
            .iter()
            .filter_map(|name| name.strip_suffix(".manifest"));
        Ok(ids.filter_map(|id| id.parse().ok()).collect())
    }

    fn channels(&self) -> Result<Vec<ChannelName>> {
        let names = self.listing("channels")?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn releases(&self, channel: &ChannelName) -> Result<Vec<u64>> {
        Ok(generations(&self.listing(&channel.history_path())?))
    }

    fn read_pointer(&self, channel: &ChannelName) -> Result<Option<(SignedRelease, Revision)>> {
        let what = format!("the pointer of channel {channel}");
        let answer = match self.request(&channel.path(), &what, &Want::All, MAX_RELEASE_LEN) {
            Err(Error::NotFound { .. }) => return Ok(None),
            answer => answer?,
        };
        let bytes = self.read_all(&what, answer, MAX_RELEASE_LEN)?;
        let pointer = SignedRelease::parse(&bytes, channel, &self.base)?;
        Ok(Some((pointer, Revision::of(&bytes))))
    }

    fn swap_pointer(&self, _: Option<&Revision>, _: &SignedRelease) -> Result<Revision> {
        self.read_only()
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

fn text(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}

/// `bytes 0-4095/123456` or `bytes 0-4095/*`: the first byte, and the object's length.
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    let sane = start <= end && total.is_none_or(|total| end < total);
    sane.then_some((start, total))
}

fn is_timeout(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(inner, Some(ureq::Error::Timeout(_)))
        || matches!(
            error.kind(),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, Some(100))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes */100",
            "bytes 9-5/100",
            "bytes 0-100/100",
            "items 0-9/100",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn bad_urls_are_refused() {
        let open = |url| HttpStore::open(url, HttpOptions::default());
        assert!(open("http://host/store/").is_ok());
        for bad in ["ftp://host/", "http://", "http://host/?x", "http://ho st/"] {
            assert!(matches!(open(bad), Err(Error::BadLocation { .. })), "{bad}");
        }
    }
}
