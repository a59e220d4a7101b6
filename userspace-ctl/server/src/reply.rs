// SPDX-License-Identifier: GPL-2.0

//! An answer, before it takes the form of a version of HTTP.

use std::ops::Range;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::StatusCode;

use crate::request::Refused;
use crate::source::Content;

/// The content of an answer.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// None at all, as in 304.
    Empty,
    /// A text.
    Bytes(Bytes),
    /// A part of an object.
    Part(Content, Range<u64>),
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    /// All but those that belong to the connection and the body's length; each name once.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) body: Body,
}

impl Reply {
    pub(crate) fn new(status: StatusCode, body: Body) -> Self {
        Reply {
            status,
            headers: Vec::with_capacity(6),
            body,
        }
    }

    /// A text for people.
    pub(crate) fn plain(status: StatusCode, text: &'static str) -> Self {
        let body = Body::Bytes(Bytes::from_static(text.as_bytes()));
        Reply::new(status, body)
            .with(header::CONTENT_TYPE, TEXT)
            .with(header::CACHE_CONTROL, "no-store")
    }

    pub(crate) fn with(mut self, name: HeaderName, value: &'static str) -> Self {
        self.headers.push((name, HeaderValue::from_static(value)));
        self
    }

    pub(crate) fn with_text(mut self, name: HeaderName, value: &str) -> Self {
        // Values are numbers and names of objects, which are always valid.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }

    /// The body's length in bytes; `None` where an answer has none by its nature.
    pub(crate) fn length(&self) -> Option<u64> {
        match &self.body {
            Body::Empty => None,
            Body::Bytes(bytes) => Some(bytes.len() as u64),
            Body::Part(_, range) => Some(range.end - range.start),
        }
    }
}

impl From<Refused> for Reply {
    fn from(Refused(status, text): Refused) -> Self {
        Reply::plain(status, text)
    }
}

/// The type of what people can read.
pub(crate) const TEXT: &str = "text/plain; charset=utf-8";
