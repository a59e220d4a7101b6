// SPDX-License-Identifier: GPL-2.0

//! A store behind a web server: any that serves files, better one that knows ranges.
//!
//! Nothing here is trusted. A transfer that breaks off goes on where it stopped, if the server says that the object is
//! still the same (`If-Range`); other failures are for who is above to try again. From a server that ignores ranges
//! whole packs are taken, and kept for the next requests, as far as memory allows; one that sends another range than it was
//! asked for, or goes on for ever, is refused.

mod options;
mod plain;
mod transfer;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pristine_image::ImageId;
use ureq::http::{header, Uri};
use ureq::Agent;

pub use self::options::HttpOptions;
use self::plain::PlainPacks;
use self::transfer::{text, Part, Want};
use crate::dir::generations;
use crate::error::{Error, Result};
use crate::object::{ChannelName, ObjectName};
use crate::peers::{PeerList, MAX_LIST};
use crate::release::{SignedRelease, MAX_RELEASE_LEN};
use crate::store::{Put, Revision, Store, Traffic};

/// The content type of `pristine serve`'s listings: names, one a line.
pub const LISTING_TYPE: &str = "application/vnd.pristine.list";
/// The most bytes of a listing that are read.
const MAX_LISTING: u64 = 16 << 20;

/// A store behind a web server.
#[derive(Debug)]
pub struct HttpStore {
    agent: Agent,
    /// Without a slash at the end.
    base: String,
    options: HttpOptions,
    requests: AtomicU64,
    bytes: AtomicU64,
    /// Packs of a server that knows no ranges.
    plain: PlainPacks,
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
        let agent = options::agent(&host, &options)?;
        Ok(HttpStore {
            agent,
            base,
            options,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            plain: PlainPacks::default(),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
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

    fn range(&self, object: &ObjectName, range: &Range<u64>) -> Result<(Vec<u8>, Option<u64>)> {
        let (path, what) = (object.path(), object.to_string());
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok((Vec::new(), None));
        }
        if let ObjectName::Pack(id) = object {
            let whole = |limit| {
                let transferred = self.transfer(&path, &what, Want::All, limit)?;
                Ok(transferred.bytes)
            };
            if let Some((bytes, total)) = self.plain.range(id, range, whole)? {
                return Ok((bytes, Some(total)));
            }
        }
        let want = Want::Range(Part {
            start: range.start,
            end: Some(range.end),
        });
        // A server that sends all of a large object has its time for all of it: no. It is as good as too slow,
        // and the timeout is that of the range.
        let transferred = self.transfer(&path, &what, want, len)?;
        if transferred.range_ignored {
            self.plain.note();
        }
        Ok((transferred.bytes, transferred.total))
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
        Ok(self
            .transfer(&object.path(), &what, Want::All, limit)?
            .bytes)
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
        let transferred = self.transfer(&channel.path(), &what, Want::All, MAX_RELEASE_LEN);
        let bytes = match transferred {
            Err(Error::NotFound { .. }) => return Ok(None),
            transferred => transferred?.bytes,
        };
        let pointer = SignedRelease::parse(&bytes, channel, &self.base)?;
        Ok(Some((pointer, Revision::of(&bytes))))
    }

    fn swap_pointer(&self, _: Option<&Revision>, _: &SignedRelease) -> Result<Revision> {
        self.read_only()
    }

    fn peers(&self, image: &ImageId, port: Option<u16>) -> Result<PeerList> {
        let what = format!("the peers of image {image}");
        let unsupported =
            || self.unsupported("introduce peers (only `pristine serve --peers` can)".to_owned());
        self.requests.fetch_add(1, Ordering::Relaxed);
        let called = match port {
            None => self.agent.get(self.url(&format!("peers/{image}"))).call(),
            Some(port) => {
                let url = self.url(&format!("peers/{image}/{port}"));
                self.agent.put(url).send_empty()
            }
        };
        let response = called.map_err(|error| self.transport(&what, error))?;
        let status = response.status().as_u16();
        // What servers say to a path or method that they do not know.
        if matches!(status, 400 | 404 | 405 | 501) {
            return Err(unsupported());
        }
        let answer = self.answer(&what, &Want::All, response)?;
        let bytes = self.read_all(&what, answer, MAX_LIST)?;
        let list = std::str::from_utf8(&bytes).ok().and_then(PeerList::parse);
        list.ok_or_else(unsupported)
    }

    fn traffic(&self) -> Traffic {
        Traffic {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_urls_are_refused() {
        let open = |url| HttpStore::open(url, HttpOptions::default());
        assert!(open("http://host/store/").is_ok());
        for bad in ["ftp://host/", "http://", "http://host/?x", "http://ho st/"] {
            assert!(matches!(open(bad), Err(Error::BadLocation { .. })), "{bad}");
        }
    }
}
