// SPDX-License-Identifier: GPL-2.0

//! HTTP/1.1, as much of it as a store needs: requests without a body, one after the other.
//!
//! What is read is read strictly. A request that two programs could understand differently (two lengths, a transfer coding,
//! a line that ends with a bare line feed, white space before a colon) is refused and ends the connection; so nothing can be
//! smuggled through a proxy in front.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode};
use memchr::{memchr_iter, memmem};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::answer::answer;
use crate::connection::{Client, Stop};
use crate::link::Link;
use crate::metrics::{Refusal, Version};
use crate::pace::{sleep, Pace, Patience};
use crate::reply::{Body, Reply};
use crate::request::{Refused, Request};
use crate::shared::{Live, Shared};

/// The longest header of a request.
const MAX_HEADER: usize = 16 << 10;
/// The most fields that it may have.
const MAX_FIELDS: usize = 64;
/// How a client of HTTP/2 begins that knows without asking.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\n";

/// How a connection goes on.
pub(crate) enum Next {
    /// Not at all.
    Done,
    /// With HTTP/2; what was read of it already comes first.
    Http2(Bytes, TcpStream),
}

/// What the next bytes of a connection are.
enum Head {
    Request(Request, bool),
    Http2,
    Refused(Refused),
    /// The client has gone, or has nothing more to ask.
    Closed,
    /// It began to ask, and did not go on.
    Slow,
}

/// Serves a connection.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    mut link: Link,
    client: &Client,
    mut stop: Stop,
) -> Next {
    let mut buffer = BytesMut::with_capacity(2048);
    loop {
        let live = shared.live();
        let (reply, begin) = match read_head(&mut link, &mut buffer, &live, &mut stop).await {
            Head::Request(request, keep) => {
                let keep = keep && !stop.is_asked();
                // The request may have come long after the wait for it began.
                let live = shared.live();
                match respond(shared, &mut link, client, &live, &request, keep).await {
                    Ok(()) if keep => continue,
                    Ok(()) => link.close().await,
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                        shared.metrics.refused(Refusal::Slow);
                    }
                    Err(_) => (),
                }
                return Next::Done;
            }
            Head::Http2 => {
                return match link {
                    Link::Plain(stream) => Next::Http2(buffer.freeze(), stream),
                    // In TLS it is agreed on before.
                    Link::Tls(_) => Next::Done,
                };
            }
            Head::Closed => return Next::Done,
            Head::Slow => {
                shared.metrics.refused(Refusal::Slow);
                let text = "the request did not come\n";
                (
                    Reply::plain(StatusCode::REQUEST_TIMEOUT, text),
                    Instant::now(),
                )
            }
            Head::Refused(refused) => {
                shared.metrics.refused(Refusal::Malformed);
                (Reply::from(refused), Instant::now())
            }
        };
        let status = reply.status.as_u16();
        let mut patience = Patience::new(live.settings.header_time);
        if let Body::Bytes(body) = &reply.body {
            let header = header(&reply, false);
            let _ = link.write(&header, body, &mut patience).await;
        }
        shared.metrics.answered(status, begin.elapsed());
        link.close().await;
        return Next::Done;
    }
}

/// Serves one request for a text that has nothing to do with the store.
pub(crate) async fn serve_text(
    shared: &Shared,
    stream: TcpStream,
    mut stop: Stop,
    text: impl Fn(&str) -> Option<String>,
) {
    let live = shared.live();
    let (mut link, mut buffer) = (Link::Plain(stream), BytesMut::new());
    let reply = match read_head(&mut link, &mut buffer, &live, &mut stop).await {
        Head::Request(request, _) if request.method == Method::GET => match text(&request.path) {
            Some(text) => Reply::new(StatusCode::OK, Body::Bytes(text.into()))
                .with(http::header::CONTENT_TYPE, "text/plain; version=0.0.4"),
            None => Reply::plain(StatusCode::NOT_FOUND, "/metrics is here\n"),
        },
        Head::Request(..) => Reply::plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
        Head::Refused(refused) => Reply::from(refused),
        Head::Http2 | Head::Closed | Head::Slow => return,
    };
    let mut patience = Patience::new(live.settings.header_time);
    if let Body::Bytes(body) = &reply.body {
        let _ = link
            .write(&header(&reply, false), body, &mut patience)
            .await;
    }
    link.close().await;
}

/// Reads up to the end of a request's header.
async fn read_head(link: &mut Link, buffer: &mut BytesMut, live: &Live, stop: &mut Stop) -> Head {
    // Between requests there is time; once a request began it must come.
    if buffer.is_empty() {
        let read = timeout(live.settings.idle_time, link.read(buffer));
        let first = tokio::select! {
            first = read => first,
            () = stop.asked() => return Head::Closed,
        };
        if !matches!(first, Ok(Ok(1..))) {
            return Head::Closed;
        }
    }
    let rest = async {
        let mut searched = 0;
        loop {
            let from = usize::saturating_sub(searched, 3);
            let unseen = buffer.get(from..).unwrap_or_default();
            if let Some(at) = memmem::find(unseen, b"\r\n\r\n") {
                return Ok(Some(from + at + 4));
            }
            searched = buffer.len();
            if searched >= MAX_HEADER {
                return Ok(None);
            }
            if link.read(buffer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
    };
    let end = match timeout(live.settings.header_time, rest).await {
        Ok(Ok(Some(end))) if end <= MAX_HEADER => end,
        Ok(Ok(_)) => {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Head::Refused(Refused(status, "the header is too long\n"));
        }
        Ok(Err(_)) => return Head::Closed,
        Err(_) => return Head::Slow,
    };
    if buffer.starts_with(PREFACE) {
        return Head::Http2;
    }
    let head = buffer.split_to(end);
    match parse(&head) {
        Ok((request, keep)) => Head::Request(request, keep),
        Err(refused) => Head::Refused(refused),
    }
}

/// Understands a header; also whether the connection is good for another request.
fn parse(head: &[u8]) -> Result<(Request, bool), Refused> {
    let bad = |why| Refused(StatusCode::BAD_REQUEST, why);
    let before = |at: usize| at.checked_sub(1).and_then(|at| head.get(at));
    if memchr_iter(b'\n', head).any(|at| before(at) != Some(&b'\r')) {
        return Err(bad("a line ends without a carriage return\n"));
    }
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut fields);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(len)) if len == head.len() => (),
        Err(httparse::Error::TooManyHeaders) => {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Err(Refused(status, "too many header fields\n"));
        }
        Err(httparse::Error::Version) => {
            let status = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
            return Err(Refused(status, "HTTP/1.1 or HTTP/2, please\n"));
        }
        _ => return Err(bad("this is not HTTP\n")),
    }
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(bad("this is not HTTP\n"));
    };
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| bad("no such method\n"))?;
    let mut request = Request::new(method, target);
    let mut keep = version == 1;
    let mut hosts = 0;
    let mut lengths = 0;
    for field in parsed.headers.iter() {
        let is = |known: &str| field.name.eq_ignore_ascii_case(known);
        if is("host") {
            hosts += 1;
        } else if is("transfer-encoding") {
            return Err(bad("a request of a store has no body\n"));
        } else if is("content-length") {
            lengths += 1;
            if field.value != b"0" {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                return Err(Refused(status, "a request of a store has no body\n"));
            }
        } else if is("connection") {
            let mut wishes = field.value.split(|byte| *byte == b',');
            keep &= !wishes.any(|wish| wish.trim_ascii().eq_ignore_ascii_case(b"close"));
        } else {
            request.field(field.name, field.value)?;
        }
    }
    if lengths > 1 {
        return Err(bad("two lengths\n"));
    }
    if hosts != 1 && (version == 1 || hosts > 1) {
        return Err(bad("one Host, please\n"));
    }
    Ok((request, keep))
}

/// Answers a request; an error ends the connection.
async fn respond(
    shared: &Arc<Shared>,
    link: &mut Link,
    client: &Client,
    live: &Live,
    request: &Request,
    keep: bool,
) -> io::Result<()> {
    let begin = Instant::now();
    let _present = shared.metrics.request(Version::One);
    let reply = match client.counted.request(live.settings.client_requests) {
        Ok(wait) => {
            sleep(wait).await;
            answer(shared, live, &client.asker, request).await
        }
        Err(wait) => client.too_often(shared, wait),
    };
    let header = header(&reply, keep);
    let mut patience = Patience::new(live.settings.stall_time);
    let sent = match &reply.body {
        Body::Part(content, range) if !request.is_head() => {
            let pace = Pace::new(shared, &client.counted, &live.settings);
            let range = range.clone();
            // An object without a byte still has a header.
            match range.is_empty() {
                true => link.write(&header, &[], &mut patience).await,
                false => {
                    link.send(&header, content, range, &pace, &mut patience)
                        .await
                }
            }
        }
        Body::Bytes(bytes) if !request.is_head() => link.write(&header, bytes, &mut patience).await,
        _ => link.write(&header, &[], &mut patience).await,
    };
    client.record(shared, request, &reply, begin);
    sent
}

thread_local! {
    /// The second that was last written as a date, and the text.
    static DATE: RefCell<(u64, String)> = const { RefCell::new((0, String::new())) };
}

/// Adds the date; its text is made once a second.
fn push_date(text: &mut String) {
    let now = SystemTime::now();
    let second = now.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    DATE.with_borrow_mut(|(last, date)| {
        if *last != second || date.is_empty() {
            *last = second;
            *date = httpdate::HttpDate::from(now).to_string();
        }
        text.push_str(date);
    });
}

/// The header of an answer.
fn header(reply: &Reply, keep: bool) -> Vec<u8> {
    let mut text = String::with_capacity(512);
    let status = reply.status;
    text.push_str("HTTP/1.1 ");
    text.push_str(status.as_str());
    text.push(' ');
    text.push_str(status.canonical_reason().unwrap_or("Unknown"));
    text.push_str("\r\ndate: ");
    push_date(&mut text);
    text.push_str("\r\n");
    if let Some(length) = reply.length() {
        // Writing to a String cannot fail.
        let _ = write!(text, "content-length: {length}\r\n");
    }
    for (name, value) in &reply.headers {
        if let Ok(value) = value.to_str() {
            for part in [name.as_str(), ": ", value, "\r\n"] {
                text.push_str(part);
            }
        }
    }
    text.push_str(if keep {
        "\r\n"
    } else {
        "connection: close\r\n\r\n"
    });
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(head: &str) -> u16 {
        match parse(head.as_bytes()) {
            Ok(_) => 200,
            Err(Refused(status, _)) => status.as_u16(),
        }
    }

    #[test]
    fn requests_are_read_strictly() {
        for (head, wanted) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 200),
            ("GET / HTTP/1.0\r\n\r\n", 200),
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            ("GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", 400),
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
            ("GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
            ("GET /\r\nHost: a\r\n\r\n", 400),
            ("GET /\r\n\r\n", 400),
            ("\r\n\r\n", 400),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
                200,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
                413,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                413,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 5\r\n\r\n",
                413,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n",
                413,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
                400,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
                400,
            ),
            (
                "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n",
                400,
            ),
            ("G\u{e4}T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ] {
            assert_eq!(status(head), wanted, "{head:?}");
        }
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(64));
        assert_eq!(status(&many), 431);
    }

    #[test]
    fn connections_are_kept_as_the_client_wishes() {
        let keep = |head: &str| parse(head.as_bytes()).unwrap().1;
        assert!(keep("GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert!(!keep("GET / HTTP/1.0\r\n\r\n"));
        assert!(!keep(
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n"
        ));
    }
}
