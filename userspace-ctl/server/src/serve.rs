// SPDX-License-Identifier: GPL-2.0

//! From requests to answers.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::header::{self, HeaderValue};
use axum::http::{Method, Request, Response, StatusCode};
use axum::Router;
use pristine_store::http::LISTING_TYPE;
use pristine_store::object::{MARKER_NAME, MARKER_TEXT};
use pristine_store::{ChannelName, DirStore, ObjectName};
use tower_http::services::ServeFile;

use crate::listing::List;

/// For what never changes: a year, as long as caches keep anything.
const FOR_EVER: &str = "public, max-age=31536000, immutable";
const NOT_AT_ALL: &str = "no-cache";

/// A request and its answer, for the access log.
#[derive(Clone, Debug)]
pub struct Access {
    /// Who asked.
    pub peer: SocketAddr,
    /// The request's method.
    pub method: String,
    /// The request's path, percent-encoded as it came.
    pub path: String,
    /// The bytes asked for, as in the Range header.
    pub range: Option<String>,
    /// The answer's status.
    pub status: u16,
    /// The answer's length in bytes, if it is known before it is sent.
    pub length: Option<u64>,
    /// From the request to the beginning of the answer.
    pub time: Duration,
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Object(ObjectName),
    Pointer(ChannelName),
    List(List),
    Marker,
}

impl Target {
    fn from_path(path: &str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        match path {
            MARKER_NAME => return Some(Target::Marker),
            "images/" => return Some(Target::List(List::Images)),
            "channels/" => return Some(Target::List(List::Channels)),
            _ => (),
        }
        if let Some(channel) = path
            .strip_prefix("releases/")
            .and_then(|p| p.strip_suffix('/'))
        {
            let list = List::Releases(channel.parse().ok()?);
            return Some(Target::List(list));
        }
        if let Some(channel) = path.strip_prefix("channels/") {
            return channel.parse().ok().map(Target::Pointer);
        }
        ObjectName::from_path(path).map(Target::Object)
    }
}

struct Shared {
    store: DirStore,
    log: Option<fn(&Access)>,
}

pub(crate) fn router(store: DirStore, log: Option<fn(&Access)>) -> Router {
    Router::new()
        .fallback(handle)
        .with_state(Arc::new(Shared { store, log }))
}

async fn handle(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request<Body>,
) -> Response<Body> {
    let Some(log) = shared.log else {
        return answer(shared, request).await;
    };
    let begin = Instant::now();
    let mut access = Access {
        peer,
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        range: header_text(&request, header::RANGE),
        status: 0,
        length: None,
        time: Duration::ZERO,
    };
    let response = answer(shared, request).await;
    access.status = response.status().as_u16();
    let length = response.headers().get(header::CONTENT_LENGTH);
    access.length = length.and_then(|value| value.to_str().ok()?.parse().ok());
    access.time = begin.elapsed();
    log(&access);
    response
}

fn header_text(request: &Request<Body>, name: header::HeaderName) -> Option<String> {
    let value = request.headers().get(name)?;
    value.to_str().ok().map(str::to_owned)
}

async fn answer(shared: Arc<Shared>, request: Request<Body>) -> Response<Body> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        set(&mut response, header::ALLOW, "GET, HEAD");
        return response;
    }
    match Target::from_path(request.uri().path()) {
        None => plain(StatusCode::NOT_FOUND, "not an object of a store\n"),
        Some(Target::Marker) => content(&request, MARKER_TEXT.into(), "text/plain; charset=utf-8"),
        Some(Target::List(list)) => {
            let listed = tokio::task::spawn_blocking(move || list.read(&shared.store)).await;
            match listed {
                Ok(Ok(text)) => content(&request, text.into_bytes(), LISTING_TYPE),
                _ => plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot list\n"),
            }
        }
        Some(Target::Pointer(channel)) => {
            match tokio::fs::read(shared.store.root().join(channel.path())).await {
                Ok(bytes) => content(&request, bytes, "text/plain; charset=utf-8"),
                Err(error) => file_error(&error),
            }
        }
        Some(Target::Object(object)) => {
            let path = shared.store.root().join(object.path());
            serve_object(&object, path, request).await
        }
    }
}

/// A small answer that may change: sent whole, with an ETag of its content.
fn content(request: &Request<Body>, bytes: Vec<u8>, kind: &'static str) -> Response<Body> {
    let mut tag = blake3::hash(&bytes).to_hex().to_string();
    tag.truncate(32);
    let tag = format!("\"{tag}\"");
    let mut response = if has_tag(request, &tag) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        let mut response = Response::new(Body::from(bytes));
        set(&mut response, header::CONTENT_TYPE, kind);
        response
    };
    set(&mut response, header::CACHE_CONTROL, NOT_AT_ALL);
    set(&mut response, header::ETAG, &tag);
    response
}

/// An object: any part of it, for its name says what it is, for ever.
async fn serve_object(
    object: &ObjectName,
    path: PathBuf,
    mut request: Request<Body>,
) -> Response<Body> {
    let tag = match object {
        ObjectName::Manifest(id) => format!("\"{id}\""),
        ObjectName::Pack(id) => format!("\"{id}\""),
        ObjectName::Release(name) => format!("\"{name}\""),
        ObjectName::Delta { new, old } => format!("\"{new}-{old}\""),
    };
    if has_tag(&request, &tag) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        set(&mut response, header::ETAG, &tag);
        return response;
    }
    // If-Range with this object's tag always holds; with any other the client has something else.
    if let Some(condition) = header_text(&request, header::IF_RANGE) {
        if condition != tag {
            request.headers_mut().remove(header::RANGE);
        }
    }
    let kind = match object {
        ObjectName::Manifest(_) | ObjectName::Delta { .. } => "application/octet-stream",
        ObjectName::Pack(_) => "application/zstd",
        ObjectName::Release(_) => "text/plain; charset=utf-8",
    };
    let mut response = match ServeFile::new(path).try_call(request).await {
        Ok(response) => response.map(Body::new),
        Err(error) => return file_error(&error),
    };
    if response.status().is_success() {
        set(&mut response, header::CACHE_CONTROL, FOR_EVER);
        set(&mut response, header::ETAG, &tag);
        set(&mut response, header::CONTENT_TYPE, kind);
    }
    response
}

fn has_tag(request: &Request<Body>, tag: &str) -> bool {
    let Some(tags) = header_text(request, header::IF_NONE_MATCH) else {
        return false;
    };
    let mut tags = tags.split(',').map(str::trim);
    tags.any(|known| known == "*" || known.trim_start_matches("W/") == tag)
}

fn file_error(error: &std::io::Error) -> Response<Body> {
    match error.kind() {
        std::io::ErrorKind::NotFound => plain(StatusCode::NOT_FOUND, "not in this store\n"),
        std::io::ErrorKind::PermissionDenied => plain(StatusCode::FORBIDDEN, "not readable\n"),
        _ => plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot read it\n"),
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    set(
        &mut response,
        header::CONTENT_TYPE,
        "text/plain; charset=utf-8",
    );
    response
}

fn set(response: &mut Response<Body>, name: header::HeaderName, value: &str) {
    // Values are constants and hexadecimal digits, which are always valid.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
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
        assert!(Target::from_path("/releases/stable/").is_some());
        assert!(Target::from_path("/releases/stable/3").is_some());
        assert!(Target::from_path("/pristine-store").is_some());
        for path in [
            "/",
            "/.lock",
            "/.tmp/1",
            "/channels/../.lock",
            "/channels/%2e%2e",
            "/channels/.hidden",
            "/releases/",
            "/releases/stable",
            "/releases/../",
            "/releases/.hidden/",
            "/releases/stable/x",
            "//etc/passwd",
            "/images",
            "/packs/",
            "/etc/passwd",
            "*",
        ] {
            assert_eq!(Target::from_path(path), None, "{path}");
        }
    }
}
