// SPDX-License-Identifier: GPL-2.0

//! From requests to answers.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{header, Method, StatusCode};
use pristine_store::http::LISTING_TYPE;
use pristine_store::object::{MARKER_NAME, MARKER_TEXT};
use pristine_store::{ChannelName, ObjectName};

use crate::access::{Channels, Grant};
use crate::listing::List;
use crate::metrics::Refusal;
use crate::peers::{self, PeerPath};
use crate::range::{asked, Asked};
use crate::reply::{Body, Reply, TEXT};
use crate::request::Request;
use crate::shared::{Live, Shared};
use crate::source::Trouble;

/// For what never changes: a year, as long as caches keep anything.
const FOR_EVER: &str = "public, max-age=31536000, immutable";
/// The same, of what not everybody may read.
const FOR_EVER_PRIVATE: &str = "private, max-age=31536000, immutable";
const NOT_AT_ALL: &str = "no-cache";

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Object(ObjectName),
    Pointer(ChannelName),
    List(List),
    Marker,
    Peers(PeerPath),
}

impl Target {
    /// Names are compared as they are: nothing is decoded, so there is one spelling for each object and no way out of the
    /// store.
    fn from_path(path: &str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        match path {
            MARKER_NAME => return Some(Target::Marker),
            "images/" => return Some(Target::List(List::Images)),
            "channels/" => return Some(Target::List(List::Channels)),
            _ => (),
        }
        let history = path.strip_prefix("releases/");
        if let Some(channel) = history.and_then(|rest| rest.strip_suffix('/')) {
            let list = List::Releases(channel.parse().ok()?);
            return Some(Target::List(list));
        }
        if let Some(channel) = path.strip_prefix("channels/") {
            return channel.parse().ok().map(Target::Pointer);
        }
        if let Some(rest) = path.strip_prefix("peers/") {
            return PeerPath::parse(rest).map(Target::Peers);
        }
        ObjectName::from_path(path).map(Target::Object)
    }
}

/// Who asks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Asker {
    /// The names in the certificate that the client showed, and that is valid.
    pub(crate) names: Arc<[String]>,
    /// Where the connection comes from.
    pub(crate) address: Option<SocketAddr>,
}

/// Answers a request.
pub(crate) async fn answer(
    shared: &Shared,
    live: &Live,
    asker: &Asker,
    request: &Request,
) -> Reply {
    let grant = match &live.rules {
        None => None,
        Some(rules) => match rules.grant(request.token(), &asker.names) {
            Ok(grant) => Some(grant),
            Err(_) => {
                shared.metrics.refused(Refusal::Unauthorized);
                return Reply::plain(
                    StatusCode::UNAUTHORIZED,
                    "a token or a client certificate is needed\n",
                )
                .with(header::WWW_AUTHENTICATE, "Bearer realm=\"pristine\"");
            }
        },
    };
    // Of the paths that are of no store only those of peers know other methods, and only where there are any.
    let target = Target::from_path(&request.path)
        .filter(|target| !matches!(target, Target::Peers(_)) || live.settings.peers.is_some());
    let is_read = request.method == Method::GET || request.method == Method::HEAD;
    if !is_read && !matches!(target, Some(Target::Peers(_))) {
        return Reply::plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n")
            .with(header::ALLOW, "GET, HEAD");
    }
    let Some(target) = target else {
        return Reply::plain(StatusCode::NOT_FOUND, "not an object of a store\n");
    };
    match allowed(shared, grant.as_deref(), &target).await {
        Ok(true) => (),
        Ok(false) => {
            shared.metrics.refused(Refusal::Forbidden);
            return Reply::plain(
                StatusCode::FORBIDDEN,
                "these credentials are not good for this\n",
            );
        }
        Err(trouble) => return troubled(shared, &trouble),
    }
    let result = match target {
        Target::Marker => Ok(text(request, MARKER_TEXT.as_bytes().into(), TEXT)),
        Target::List(list) => {
            let listed = shared.source.list(list.clone()).await;
            listed.map(|names| {
                let names = visible(&list, grant.as_deref(), names);
                text(request, names.into(), LISTING_TYPE)
            })
        }
        Target::Pointer(channel) => {
            let bytes = shared.source.pointer(channel).await;
            bytes.map(|bytes| text(request, bytes.into(), TEXT))
        }
        Target::Object(name) => object(shared, request, name, grant.is_some()).await,
        Target::Peers(path) => match &live.settings.peers {
            Some(settings) => peers::answer(shared, settings, asker, request, &path).await,
            None => Err(Trouble::Missing),
        },
    };
    result.unwrap_or_else(|trouble| troubled(shared, &trouble))
}

fn troubled(shared: &Shared, trouble: &Trouble) -> Reply {
    if let Some(detail) = trouble.detail() {
        shared.note(detail);
    }
    Reply::from(trouble)
}

/// Whether who has this grant may read what a path names; everybody may who needs none.
async fn allowed(shared: &Shared, grant: Option<&Grant>, target: &Target) -> Result<bool, Trouble> {
    let some = match grant.map(|grant| &grant.channels) {
        None | Some(Channels::All) => return Ok(true),
        Some(Channels::Some(some)) => some,
    };
    match target {
        Target::Marker | Target::List(List::Channels) => Ok(true),
        Target::List(List::Images) => Ok(false),
        // Whether there is such a channel or not.
        Target::Pointer(channel) | Target::List(List::Releases(channel)) => {
            Ok(some.contains(channel))
        }
        Target::Object(ObjectName::Release(name)) => Ok(some
            .iter()
            .any(|channel| channel.as_str() == name.channel())),
        Target::Object(object) => in_scope(shared, some, object).await,
        // Who may read an image may know who has it.
        Target::Peers(path) => in_scope(shared, some, &ObjectName::Manifest(path.image)).await,
    }
}

/// Whether an object belongs to any of these channels.
async fn in_scope(
    shared: &Shared,
    some: &BTreeSet<ChannelName>,
    object: &ObjectName,
) -> Result<bool, Trouble> {
    let mut trouble = None;
    for channel in some {
        // A channel that cannot be read must not hide what another one allows.
        match shared.scopes.allows(&shared.source, channel, object).await {
            Ok(true) => return Ok(true),
            Ok(false) | Err(Trouble::Missing) => (),
            Err(error) => trouble = Some(error),
        }
    }
    trouble.map_or(Ok(false), Err)
}

/// The lines of a list that this grant may see.
fn visible(list: &List, grant: Option<&Grant>, names: String) -> String {
    let Some(grant) = grant.filter(|_| *list == List::Channels) else {
        return names;
    };
    let lines = names.lines().filter(|name| {
        let channel = name.parse();
        channel.is_ok_and(|channel| grant.channels.contains(&channel))
    });
    lines.flat_map(|name| [name, "\n"]).collect()
}

/// A small answer that may change: sent whole, with an ETag of its content.
fn text(request: &Request, bytes: Bytes, kind: &'static str) -> Reply {
    let mut tag = blake3::hash(&bytes).to_hex().to_string();
    tag.truncate(32);
    let tag = format!("\"{tag}\"");
    let reply = if request.has(&tag) {
        Reply::new(StatusCode::NOT_MODIFIED, Body::Empty)
    } else {
        Reply::new(StatusCode::OK, Body::Bytes(bytes)).with(header::CONTENT_TYPE, kind)
    };
    reply
        .with(header::CACHE_CONTROL, NOT_AT_ALL)
        .with_text(header::ETAG, &tag)
}

/// An object: any part of it, for its name says what it is, for ever.
async fn object(
    shared: &Shared,
    request: &Request,
    name: ObjectName,
    private: bool,
) -> Result<Reply, Trouble> {
    let path = name.path();
    let kind = match name {
        ObjectName::Pack(_) => "application/zstd",
        ObjectName::Release(_) | ObjectName::Reference(_) | ObjectName::Trace(_) => TEXT,
        _ => "application/octet-stream",
    };
    // A tag is compared with those of the same path alone, and what that names never changes: any constant would do.
    let stem = Path::new(&path).file_stem().and_then(|stem| stem.to_str());
    let tag = format!("\"{}\"", stem.unwrap_or_default());
    let age = if private { FOR_EVER_PRIVATE } else { FOR_EVER };
    let metrics = &shared.metrics;
    let content = shared.source.object(name, request.reload, metrics).await?;
    if request.has(&tag) {
        return Ok(Reply::new(StatusCode::NOT_MODIFIED, Body::Empty)
            .with(header::CACHE_CONTROL, age)
            .with_text(header::ETAG, &tag));
    }
    let len = content.len();
    // With this object's tag the condition always holds; with any other the client has something else.
    let conditional = request.if_range.as_ref().is_none_or(|known| *known == tag);
    let field = request.range.as_deref().filter(|_| conditional);
    let reply = match asked(field, len) {
        Asked::All => Reply::new(StatusCode::OK, Body::Part(content, 0..len)),
        Asked::Part(range) => {
            let value = format!("bytes {}-{}/{len}", range.start, range.end - 1);
            Reply::new(StatusCode::PARTIAL_CONTENT, Body::Part(content, range))
                .with_text(header::CONTENT_RANGE, &value)
        }
        Asked::Nothing => {
            let text = "one range of bytes that the object has, please\n";
            return Ok(Reply::plain(StatusCode::RANGE_NOT_SATISFIABLE, text)
                .with_text(header::CONTENT_RANGE, &format!("bytes */{len}")));
        }
    };
    Ok(reply
        .with(header::ACCEPT_RANGES, "bytes")
        .with(header::CONTENT_TYPE, kind)
        .with(header::CACHE_CONTROL, age)
        .with_text(header::ETAG, &tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_store_paths_are_targets() {
        let hex = "0123456789abcdef".repeat(4);
        assert!(Target::from_path(&format!("/images/{hex}.manifest")).is_some());
        assert!(Target::from_path(&format!("/packs/01/{hex}.zst")).is_some());
        assert!(Target::from_path("/channels/stable").is_some());
        assert!(Target::from_path("/releases/stable/1").is_some());
        assert!(Target::from_path("/releases/stable/").is_some());
        assert!(Target::from_path("/pristine-store").is_some());
        for path in [
            "/",
            "/.lock",
            "/.tmp/1",
            "/channels/../.lock",
            "/channels/%2e%2e",
            "/channels/.hidden",
            "/channels/a%2f..%2f..",
            "/channels/a\\b",
            "//etc/passwd",
            "/images",
            "/packs/",
            "/etc/passwd",
            "/releases/",
            "/releases/../",
            "/releases/stable/01",
            "/releases/stable/1/",
            "/pins/a",
            "/leases/a",
            "*",
            "",
        ] {
            assert_eq!(Target::from_path(path), None, "{path}");
        }
    }
}
