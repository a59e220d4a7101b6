// SPDX-License-Identifier: GPL-2.0

//! A request, whatever version of HTTP it came in: what an answer depends on, and nothing else.

use http::{Method, StatusCode};

/// What the client asks for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// The path, percent-encoded as it came; names of a store need no encoding, so nothing is decoded.
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) if_range: Option<String>,
    /// All of them, comma-separated.
    pub(crate) if_none_match: Option<String>,
    pub(crate) authorization: Option<String>,
    /// The client wants no cached copy (`Cache-Control: no-cache`): what it got was wrong.
    pub(crate) reload: bool,
}

/// A request that is refused before anybody looks at what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused(pub(crate) StatusCode, pub(crate) &'static str);

impl Request {
    /// A request without header fields. `target` may be a path, or a whole URL as proxies are asked.
    pub(crate) fn new(method: Method, target: &str) -> Self {
        let path = match target.split_once("://") {
            Some(("http" | "https", rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
            _ => target,
        };
        // Nothing that is served depends on a query.
        let path = path.split_once('?').map_or(path, |(path, _)| path);
        Request {
            method,
            path: path.to_owned(),
            range: None,
            if_range: None,
            if_none_match: None,
            authorization: None,
            reload: false,
        }
    }

    /// Takes a header field.
    ///
    /// # Errors
    /// A field that can be there once is there twice, or is not text.
    pub(crate) fn field(&mut self, name: &str, value: &[u8]) -> Result<(), Refused> {
        let is = |known: &str| name.eq_ignore_ascii_case(known);
        let bad = Refused(StatusCode::BAD_REQUEST, "a header field is not text\n");
        let text = || std::str::from_utf8(value).map(str::trim).map_err(|_| bad);
        if is("range") {
            once(&mut self.range, text()?)?;
        } else if is("if-range") {
            once(&mut self.if_range, text()?)?;
        } else if is("authorization") {
            once(&mut self.authorization, text()?)?;
        } else if is("if-none-match") {
            let tags = self.if_none_match.get_or_insert_default();
            if !tags.is_empty() {
                tags.push(',');
            }
            tags.push_str(text()?);
        } else if is("cache-control") {
            let mut wishes = text()?.split(',').map(str::trim);
            self.reload |= wishes.any(|wish| wish.eq_ignore_ascii_case("no-cache"));
        }
        Ok(())
    }

    /// Whether only the header of the answer is wanted.
    pub(crate) fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }

    /// The bearer token, if one was sent; `Some("")` for credentials of another kind.
    pub(crate) fn token(&self) -> Option<&str> {
        let text = self.authorization.as_deref()?;
        let token = match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => "",
        };
        Some(token)
    }

    /// Whether the client has what carries this tag.
    pub(crate) fn has(&self, tag: &str) -> bool {
        let Some(tags) = &self.if_none_match else {
            return false;
        };
        let mut tags = tags.split(',').map(str::trim);
        tags.any(|known| known == "*" || known.strip_prefix("W/").unwrap_or(known) == tag)
    }
}

fn once(place: &mut Option<String>, text: &str) -> Result<(), Refused> {
    if place.replace(text.to_owned()).is_some() {
        return Err(Refused(
            StatusCode::BAD_REQUEST,
            "a header field is there twice\n",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let path = |target| Request::new(Method::GET, target).path;
        assert_eq!(path("/a/b"), "/a/b");
        assert_eq!(path("/a?b=c?d"), "/a");
        assert_eq!(path("http://host:80/a"), "/a");
        assert_eq!(path("https://host"), "/");
        assert_eq!(path("file://host/a"), "file://host/a");
        assert_eq!(path("*"), "*");
    }

    #[test]
    fn fields() {
        let mut request = Request::new(Method::GET, "/");
        assert_eq!(request.token(), None);
        request.field("AUTHORIZATION", b"bearer  abc ").unwrap();
        assert_eq!(request.token(), Some("abc"));
        assert!(request.field("Authorization", b"Bearer x").is_err());
        request.field("Range", b"bytes=0-1").unwrap();
        assert!(request.field("range", b"bytes=0-1").is_err());
        assert!(request.field("If-Range", b"\xff").is_err());
        request.field("If-None-Match", b"\"a\", W/\"b\"").unwrap();
        request.field("If-None-Match", b"\"c\"").unwrap();
        assert!(request.has("\"a\"") && request.has("\"b\"") && request.has("\"c\""));
        assert!(!request.has("\"d\""));
        assert!(!request.reload);
        request
            .field("cache-control", b"max-age=0, No-Cache")
            .unwrap();
        assert!(request.reload);
        let mut basic = Request::new(Method::GET, "/");
        basic.field("authorization", b"Basic eDp5").unwrap();
        assert_eq!(basic.token(), Some(""));
    }
}
