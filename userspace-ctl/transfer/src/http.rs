// SPDX-License-Identifier: GPL-2.0

//! A file behind a web server, read by range.
//!
//! The first answer tells how long the file is and which version of it (by ETag, else by time of change); every
//! later one must be of the same. A server that does not know ranges is told so by
//! [`HttpFile::has_ranges`]; then [`HttpFile::download`] is what is left.

use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pristine_image::ReadAt;
use pristine_store::{CancelToken, Error as StoreError, RetryPolicy};
use ureq::http::{header, Response, StatusCode};
use ureq::{Agent, Body};

use crate::error::{Error, Result};
use crate::spool::Spool;

/// For a connection, name resolution included.
const CONNECT: Duration = Duration::from_secs(10);
/// For each next piece of an answer.
const READ: Duration = Duration::from_secs(30);
/// Bytes asked for at first: what is needed to know the format.
const FIRST: u64 = 4096;

/// Asks web servers; clones share their connections.
#[derive(Clone, Debug)]
pub struct HttpClient {
    agent: Agent,
    retry: RetryPolicy,
    cancel: CancelToken,
}

impl HttpClient {
    /// A client; nobody is contacted yet.
    pub fn new(retry: RetryPolicy, cancel: &CancelToken) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("pristine/", env!("CARGO_PKG_VERSION")))
            .max_redirects(5)
            .timeout_connect(Some(CONNECT))
            .timeout_resolve(Some(CONNECT))
            .timeout_send_request(Some(READ))
            .timeout_recv_response(Some(READ))
            .timeout_per_read(Some(READ))
            .build();
        HttpClient {
            agent: config.new_agent(),
            retry,
            cancel: cancel.clone(),
        }
    }

    /// A whole file of at most `limit` bytes; `None` if it is not there.
    ///
    /// # Errors
    /// [`Error::Damaged`] if it is longer, [`Error::Store`] with what went wrong on the way.
    pub fn get(&self, url: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let place = Place { url };
        let bytes = self.retry.run(&self.cancel, StoreError::is_transient, || {
            let response = match self.request(&place, None) {
                Err(StoreError::NotFound { .. }) => return Ok(None),
                response => response?,
            };
            let expected = response.body().content_length();
            let mut bytes = Vec::new();
            let mut reader = response.into_body().into_reader().take(limit + 1);
            let read = reader.read_to_end(&mut bytes);
            let got = bytes.len() as u64;
            read.map_err(|error| place.cut(&error, expected.unwrap_or(limit), got))?;
            // The connection is used again once the end of the answer was seen.
            let _ = reader.into_inner().read(&mut [0]);
            Ok(Some(bytes))
        })?;
        match bytes {
            Some(bytes) if bytes.len() as u64 > limit => {
                let why = format!("it has more than the {limit} bytes that make sense");
                Err(Error::damaged(url, why))
            }
            bytes => Ok(bytes),
        }
    }

    /// A GET of `len` bytes from an offset, or of all.
    fn request(&self, place: &Place<'_>, range: Option<(u64, u64)>) -> StoreResult<Response<Body>> {
        let mut request = self
            .agent
            .get(place.url)
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some((at, len)) = range {
            request = request.header(header::RANGE, format!("bytes={at}-{}", at + len - 1));
        }
        let response = request.call().map_err(|error| place.transport(&error))?;
        let encoding = text(&response, header::CONTENT_ENCODING);
        if encoding.is_some_and(|encoding| encoding != "identity") {
            return Err(place.protocol("it encodes what it sends"));
        }
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                Ok(response)
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(StoreError::NotFound {
                location: place.url.to_owned(),
                object: "the file".to_owned(),
            }),
            status => Err(StoreError::Status {
                location: place.url.to_owned(),
                object: "the file".to_owned(),
                status: status.as_u16(),
            }),
        }
    }
}

/// A file behind a web server.
#[derive(Debug)]
pub struct HttpFile {
    client: HttpClient,
    url: String,
    len: u64,
    ranges: bool,
    /// ETag or Last-Modified of the first answer.
    version: Option<String>,
    head: Vec<u8>,
    bytes: AtomicU64,
    requests: AtomicU64,
}

type StoreResult<T> = std::result::Result<T, StoreError>;

impl HttpFile {
    /// Asks a server for the first bytes of a file.
    ///
    /// # Errors
    /// [`Error::Store`] with what went wrong on the way.
    pub fn open(url: &str, client: HttpClient) -> Result<Self> {
        if !is_url(url) {
            return Err(Error::Store(StoreError::BadLocation {
                location: url.to_owned(),
                why: "only http:// and https:// are known".to_owned(),
            }));
        }
        let mut file = HttpFile {
            client,
            url: url.to_owned(),
            len: 0,
            ranges: false,
            version: None,
            head: Vec::new(),
            bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        };
        let client = &file.client;
        let (len, ranges, version, head) =
            client
                .retry
                .run(&client.cancel, StoreError::is_transient, || {
                    let response = file.request(Some((0, FIRST)))?;
                    let version = version_of(&response);
                    let (ranges, len) = match response.status() {
                        StatusCode::PARTIAL_CONTENT => (true, file.total(&response, 0)?),
                        // An empty file has no first byte.
                        StatusCode::RANGE_NOT_SATISFIABLE => (true, 0),
                        _ => {
                            let len = response.body().content_length();
                            let why = "it does not say how long the file is";
                            (false, len.ok_or_else(|| file.place().protocol(why))?)
                        }
                    };
                    let mut head = Vec::new();
                    let read = response
                        .into_body()
                        .into_reader()
                        .take(FIRST.min(len))
                        .read_to_end(&mut head);
                    read.map_err(|error| {
                        file.place().cut(&error, FIRST.min(len), head.len() as u64)
                    })?;
                    if (head.len() as u64) < FIRST.min(len) {
                        return Err(file.place().cut_at(FIRST.min(len), head.len() as u64));
                    }
                    Ok((len, ranges, version, head))
                })?;
        file.len = len;
        file.ranges = ranges;
        file.version = version;
        file.head = head;
        Ok(file)
    }

    /// Its URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether parts of it can be asked for.
    pub fn has_ranges(&self) -> bool {
        self.ranges
    }

    /// What identifies this version of it, if the server says: an ETag or a time of change.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Bytes of content received.
    pub fn received(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Requests made.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Fetches the whole file with one request, for a server without ranges.
    pub(crate) fn download(
        &self,
        mut spool: Spool,
        limit: u64,
        watch: &crate::open::Watch<'_>,
    ) -> Result<Spool> {
        let response = self.request(None)?;
        if version_of(&response) != self.version {
            return Err(self.changed().into());
        }
        let mut reader = response.into_body().into_reader();
        spool.fill(&mut reader, &self.url, limit, Some(self.len), watch)?;
        if spool.len() != self.len {
            return Err(self.place().cut_at(self.len, spool.len()).into());
        }
        Ok(spool)
    }

    fn place(&self) -> Place<'_> {
        Place { url: &self.url }
    }

    fn request(&self, range: Option<(u64, u64)>) -> StoreResult<Response<Body>> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.client.request(&self.place(), range)
    }

    /// The file's length in an answer that has the bytes from `at` on.
    fn total(&self, response: &Response<Body>, at: u64) -> StoreResult<u64> {
        text(response, header::CONTENT_RANGE)
            .and_then(|value| {
                let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
                let (start, _) = range.split_once('-')?;
                (start.parse() == Ok(at)).then_some(())?;
                total.parse().ok()
            })
            .ok_or_else(|| {
                self.place()
                    .protocol("it answered with another range than asked for")
            })
    }

    fn read_once(&self, offset: u64, buffer: &mut [u8]) -> StoreResult<()> {
        let expected = buffer.len() as u64;
        let response = self.request(Some((offset, expected)))?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.changed());
        }
        if version_of(&response) != self.version || self.total(&response, offset)? != self.len {
            return Err(self.changed());
        }
        let mut reader = response.into_body().into_reader();
        let mut done = 0;
        while done < buffer.len() {
            self.client.cancel.check()?;
            let end = buffer.len().min(done + (64 << 10));
            match reader.read(&mut buffer[done..end]) {
                Ok(0) => return Err(self.place().cut_at(expected, done as u64)),
                Ok(len) => done += len,
                Err(error) => return Err(self.place().cut(&error, expected, done as u64)),
            }
        }
        self.bytes.fetch_add(expected, Ordering::Relaxed);
        // The connection is used again once the end of the answer was seen.
        let _ = reader.read(&mut [0]);
        Ok(())
    }

    fn changed(&self) -> StoreError {
        // Not one that is worth another attempt.
        StoreError::Unsupported {
            location: self.url.clone(),
            what: "be read: the file was changed there meanwhile; try again".to_owned(),
        }
    }
}

/// Which file an error is about.
struct Place<'a> {
    url: &'a str,
}

impl Place<'_> {
    fn protocol(&self, why: &str) -> StoreError {
        StoreError::Protocol {
            location: self.url.to_owned(),
            object: "the file".to_owned(),
            why: why.to_owned(),
        }
    }

    fn cut_at(&self, expected: u64, got: u64) -> StoreError {
        StoreError::Cut {
            location: self.url.to_owned(),
            object: "the file".to_owned(),
            expected,
            got,
        }
    }

    fn cut(&self, error: &io::Error, expected: u64, got: u64) -> StoreError {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner {
            Some(ureq::Error::Timeout(step)) => StoreError::Timeout {
                location: self.url.to_owned(),
                why: format!("timeout ({step}) after {got} bytes"),
            },
            _ => self.cut_at(expected, got),
        }
    }

    fn transport(&self, error: &ureq::Error) -> StoreError {
        let location = self.url.to_owned();
        match error {
            ureq::Error::BadUri(why) => StoreError::BadLocation {
                location,
                why: why.clone(),
            },
            ureq::Error::Timeout(step) => StoreError::Timeout {
                location,
                why: format!("timeout ({step})"),
            },
            error => StoreError::Unreachable {
                location,
                why: error.to_string(),
            },
        }
    }
}

impl ReadAt for HttpFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer.is_empty() {
            return Ok(());
        }
        if let Some(head) = self
            .head
            .get(offset as usize..)
            .filter(|h| h.len() >= buffer.len())
        {
            buffer.copy_from_slice(&head[..buffer.len()]);
            return Ok(());
        }
        let read = || self.read_once(offset, &mut *buffer);
        let result = self
            .client
            .retry
            .run(&self.client.cancel, StoreError::is_transient, read);
        result.map_err(|error| Error::from(error).into())
    }
}

/// Whether text is the URL of a file behind a web server.
pub(crate) fn is_url(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    lower.starts_with("http://") || lower.starts_with("https://")
}

fn version_of(response: &Response<Body>) -> Option<String> {
    // A weak ETag does not say that the bytes are the same.
    let etag = text(response, header::ETAG).filter(|etag| !etag.starts_with("W/"));
    let version = etag.or_else(|| text(response, header::LAST_MODIFIED));
    version.map(str::to_owned)
}

fn text(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
    response.headers().get(name)?.to_str().ok()
}
