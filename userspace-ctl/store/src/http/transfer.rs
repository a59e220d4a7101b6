// SPDX-License-Identifier: GPL-2.0

//! The transfer of one object or a part of it, in one request if all goes well.

use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pristine_image::MAX_PACK_LEN;
use ureq::http::{header, Response, StatusCode};
use ureq::Body;

use super::HttpStore;
use crate::error::{Error, Result};

/// No server is waited for that is slower than this, in bytes per second.
const MIN_RATE: u64 = 64 << 10;
/// Room that is made at a time for what is read. It is copied from here, as the compiler makes a loop over bytes of
/// `Vec::resize` where it is to save space.
static ROOM: [u8; 16 << 10] = [0; 16 << 10];
/// How often a transfer that broke off goes on, as long as each attempt brings something.
const RESUMES: u32 = 8;

/// A range of bytes, the end may be that of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) end: Option<u64>,
}

/// Which bytes of an object to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    All,
    Range(Part),
}

impl Want {
    fn part(self) -> Part {
        match self {
            Want::All => Part {
                start: 0,
                end: None,
            },
            Want::Range(part) => part,
        }
    }
}

/// An answer, ready to be read.
pub(super) struct Answer {
    body: Body,
    /// The first byte of the object that the body holds.
    start: u64,
    /// The object's whole length, if the server says.
    total: Option<u64>,
    /// The body's length, if the server says.
    body_len: Option<u64>,
    /// What tells this content from any other that the object may have.
    tag: Option<String>,
    /// It is the whole object, whatever was asked for.
    whole: bool,
}

/// What a transfer brought.
pub(super) struct Transferred {
    pub(super) bytes: Vec<u8>,
    /// The object's whole length, if the server says.
    pub(super) total: Option<u64>,
    /// A range was asked for, and the whole object came.
    pub(super) range_ignored: bool,
}

impl HttpStore {
    pub(super) fn protocol(&self, what: &str, why: impl Into<String>) -> Error {
        Error::Protocol {
            location: self.base.clone(),
            object: what.to_owned(),
            why: why.into(),
        }
    }

    pub(super) fn transport(&self, what: &str, error: ureq::Error) -> Error {
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

    /// Transfers what is wanted, at most `limit` bytes of it. The result is shorter than wanted only if the object ends.
    ///
    /// A transfer that broke off goes on where it stopped, if what the server has now is told to be the same.
    pub(super) fn transfer(
        &self,
        path: &str,
        what: &str,
        want: Want,
        limit: u64,
    ) -> Result<Transferred> {
        let mut bytes = Vec::new();
        let mut tag = None;
        let mut resumes = 0;
        loop {
            let before = bytes.len();
            let error = match self.attempt(path, what, want, limit, &mut bytes, &mut tag) {
                Ok((total, range_ignored)) => {
                    return Ok(Transferred {
                        bytes,
                        total,
                        range_ignored,
                    });
                }
                Err(error) => error,
            };
            let gone_on = bytes.len() > before && resumes < RESUMES;
            if !(matches!(error, Error::Cut { .. }) && tag.is_some() && gone_on) {
                return Err(error);
            }
            resumes += 1;
        }
    }

    /// One request for what is still missing after `bytes`. Gives the object's length, and whether a range was ignored.
    fn attempt(
        &self,
        path: &str,
        what: &str,
        want: Want,
        limit: u64,
        bytes: &mut Vec<u8>,
        tag: &mut Option<String>,
    ) -> Result<(Option<u64>, bool)> {
        let part = want.part();
        let goes_on = !bytes.is_empty();
        let ask = match goes_on {
            true => Want::Range(Part {
                start: part.start + bytes.len() as u64,
                end: part.end,
            }),
            false => want,
        };
        let if_range = tag.as_deref().filter(|_| goes_on);
        let answer = self.request(path, what, ask, limit, if_range)?;
        if goes_on && answer.tag != *tag {
            if !answer.whole {
                return Err(self.protocol(what, "it changed while it was read"));
            }
            // It is another object now: from the beginning.
            bytes.clear();
        }
        tag.clone_from(&answer.tag);
        let total = answer.total;
        let range_ignored = answer.whole && matches!(want, Want::Range(_)) && !goes_on;
        let at = part.start + bytes.len() as u64;
        self.skip(what, answer, at, part, limit, bytes)?;
        Ok((total, range_ignored))
    }

    fn request(
        &self,
        path: &str,
        what: &str,
        want: Want,
        limit: u64,
        if_range: Option<&str>,
    ) -> Result<Answer> {
        let body_time =
            self.options.read_timeout + Duration::from_secs(limit.min(MAX_PACK_LEN) / MIN_RATE);
        let mut request = self
            .agent
            .get(self.url(path))
            .header(header::ACCEPT_ENCODING, "identity")
            .config()
            .timeout_recv_body(Some(body_time))
            .build();
        if let Want::Range(part) = want {
            let last = part.end.map(|end| (end - 1).to_string());
            let value = format!("bytes={}-{}", part.start, last.unwrap_or_default());
            request = request.header(header::RANGE, value);
        }
        if let Some(tag) = if_range {
            request = request.header(header::IF_RANGE, tag);
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        let response = request
            .call()
            .map_err(|error| self.transport(what, error))?;
        self.answer(what, &want, response)
    }

    pub(super) fn answer(
        &self,
        what: &str,
        want: &Want,
        response: Response<Body>,
    ) -> Result<Answer> {
        if let Some(encoding) = text(&response, header::CONTENT_ENCODING) {
            if encoding != "identity" {
                return Err(self.protocol(what, format!("it is encoded ({encoding})")));
            }
        }
        // A weak tag does not promise the same bytes.
        let tag = text(&response, header::ETAG).filter(|tag| tag.starts_with('"'));
        let tag = tag.map(str::to_owned);
        match (response.status(), want) {
            (StatusCode::OK, _) => {
                let body = response.into_body();
                Ok(Answer {
                    start: 0,
                    total: body.content_length(),
                    body_len: body.content_length(),
                    tag,
                    whole: true,
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
                    tag,
                    whole: false,
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
                    needed: range.end.unwrap_or(range.start + 1),
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

    /// Reads the whole body of an answer, at most `limit` bytes.
    pub(super) fn read_all(&self, what: &str, answer: Answer, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.skip(what, answer, 0, Want::All.part(), limit, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads a body from byte `at` of the object on, whatever part the server chose to send.
    fn skip(
        &self,
        what: &str,
        mut answer: Answer,
        at: u64,
        part: Part,
        limit: u64,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let too_large = || Error::TooLarge {
            location: self.base.clone(),
            object: what.to_owned(),
            limit,
        };
        if part.end.is_none() && answer.total.is_some_and(|total| total > part.start + limit) {
            return Err(too_large());
        }
        let skip = at.saturating_sub(answer.start);
        if skip > 0 {
            let mut reader = answer.body.as_reader().take(skip);
            let skipped = io::copy(&mut reader, &mut io::sink());
            let done = skipped.as_ref().copied().unwrap_or(0);
            self.bytes.fetch_add(done, Ordering::Relaxed);
            if skipped.is_err() || done < skip.min(answer.total.unwrap_or(skip)) {
                return Err(Error::Cut {
                    location: self.base.clone(),
                    object: what.to_owned(),
                    expected: part.end.unwrap_or(at),
                    got: done,
                });
            }
        }
        let total = answer.total;
        let end = match (part.end, total) {
            (Some(end), Some(total)) => Some(end.min(total)),
            (end, total) => end.or(total),
        };
        // Of an object of unknown length one byte too many shows that it is too large.
        let most = end.map_or(limit + 1, |end| end.saturating_sub(at));
        let expected = total.and(end).map(|end| end.saturating_sub(at));
        self.read_body(what, answer, skip, most, expected, bytes)?;
        if part.end.is_none() && bytes.len() as u64 > limit {
            return Err(too_large());
        }
        Ok(())
    }

    /// Reads up to `most` bytes of the body; fewer than `expected` of them are an error.
    fn read_body(
        &self,
        what: &str,
        answer: Answer,
        skipped: u64,
        most: u64,
        expected: Option<u64>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        // Memory follows what arrives, not what is promised.
        let capacity = expected.unwrap_or(0).min(most).min(4 << 20);
        bytes.reserve(capacity as usize);
        let before = bytes.len();
        let body_len = answer.body_len;
        let mut reader = answer.body.into_reader().take(most);
        let begin = Instant::now();
        let mut filled = before;
        let result = loop {
            self.options.cancel.check()?;
            // It is read straight to where it belongs.
            if filled == bytes.len() {
                let left = most.saturating_sub((filled - before) as u64);
                let room = usize::try_from(left).unwrap_or(usize::MAX).min(ROOM.len());
                bytes.extend_from_slice(ROOM.get(..room).unwrap_or_default());
            }
            match reader.read(bytes.get_mut(filled..).unwrap_or_default()) {
                Ok(0) => break Ok(()),
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => break Err(error),
            }
            // A server that trickles is told early: another one may be better.
            let came = (filled - before) as u64;
            let allowed = Duration::from_millis(came.saturating_mul(1000) / MIN_RATE);
            if begin.elapsed() > self.options.read_timeout + allowed {
                let why = format!("slower than {} KiB/s", MIN_RATE >> 10);
                break Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
        };
        bytes.truncate(filled);
        let got = (filled - before) as u64;
        if body_len == Some(skipped + got) {
            // All of it is read; a reader that sees so gives the connection back for the next request.
            let _ = reader.into_inner().read(&mut [0]);
        }
        self.bytes.fetch_add(got, Ordering::Relaxed);
        let whole = bytes.len() as u64;
        let cut = |expected: u64| Error::Cut {
            location: self.base.clone(),
            object: what.to_owned(),
            expected: before as u64 + expected,
            got: whole,
        };
        match (result, expected) {
            (Err(error), _) if is_timeout(&error) => Err(Error::Timeout {
                location: self.base.clone(),
                why: format!("{error}, after {whole} bytes of {what}"),
            }),
            (Err(_), expected) => Err(cut(expected.unwrap_or(most))),
            (Ok(()), Some(expected)) if got < expected.min(most) => Err(cut(expected)),
            (Ok(()), _) => Ok(()),
        }
    }
}

pub(super) fn text(response: &Response<Body>, name: header::HeaderName) -> Option<&str> {
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
}
