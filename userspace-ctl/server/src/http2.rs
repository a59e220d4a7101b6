// SPDX-License-Identifier: GPL-2.0

//! HTTP/2, by hyper: requests become ours, and answers become its.

use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{header, HeaderValue, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::answer::answer;
use crate::connection::{Client, Stop};
use crate::metrics::{Refusal, Version};
use crate::pace::{sleep, Pace, Patience};
use crate::reply::{Body, Reply};
use crate::request::{Refused, Request};
use crate::shared::Shared;
use crate::source::{Content, PIECE};

/// Requests at a time on one connection.
const STREAMS: u32 = 32;
/// What hyper may hold of an answer.
const SEND_BUFFER: usize = 64 << 10;
/// The longest header of a request.
const MAX_HEADER: u32 = 16 << 10;
/// A client that is silent is asked whether it is there.
const PING: Duration = Duration::from_secs(20);

/// What goes on on a connection.
#[derive(Debug, Default)]
struct Activity {
    open: AtomicUsize,
    requests: AtomicU64,
}

/// Serves a connection to its end.
pub(crate) async fn serve<T>(shared: &Arc<Shared>, io: T, client: Client, mut stop: Stop)
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let live = shared.live();
    let activity = Arc::new(Activity::default());
    let service = service_fn(|request| {
        let (shared, client) = (Arc::clone(shared), client.clone());
        let activity = Arc::clone(&activity);
        async move {
            activity.requests.fetch_add(1, Relaxed);
            Ok::<_, Infallible>(respond(&shared, client, request, activity).await)
        }
    });
    let connection = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(MAX_HEADER)
        .keep_alive_interval(PING)
        .keep_alive_timeout(live.settings.header_time)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let mut stopping = false;
    let mut seen = (0, Instant::now());
    loop {
        let look = live.settings.idle_time.min(Duration::from_secs(5));
        tokio::select! {
            // Errors are the client's affair: it has gone, or does not speak HTTP/2.
            done = connection.as_mut() => {
                if done.is_err_and(|error| error.is_parse()) {
                    shared.metrics.refused(Refusal::Malformed);
                }
                return;
            }
            () = stop.asked(), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep(look) => {
                let requests = activity.requests.load(Relaxed);
                if requests != seen.0 || activity.open.load(Relaxed) > 0 {
                    seen = (requests, Instant::now());
                } else if seen.1.elapsed() > live.settings.idle_time {
                    if stopping {
                        // It was told, and stays.
                        return;
                    }
                    stopping = true;
                    seen.1 = Instant::now();
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

fn convert(request: &hyper::Request<Incoming>) -> Result<Request, Refused> {
    let mut converted = Request::new(request.method().clone(), request.uri().path());
    for (name, value) in request.headers() {
        converted.field(name.as_str(), value.as_bytes())?;
    }
    Ok(converted)
}

async fn respond(
    shared: &Arc<Shared>,
    client: Client,
    request: hyper::Request<Incoming>,
    activity: Arc<Activity>,
) -> Response<Answer> {
    let begin = Instant::now();
    let live = shared.live();
    // A body, if there is one, is not read: dropping the request resets its stream.
    let (request, reply) = match convert(&request) {
        Ok(request) => {
            let reply = match client.counted.request(live.settings.client_requests) {
                Ok(wait) => {
                    sleep(wait).await;
                    answer(shared, &live, &client.asker, &request).await
                }
                Err(wait) => client.too_often(shared, wait),
            };
            (request, reply)
        }
        Err(refused) => {
            shared.metrics.refused(Refusal::Malformed);
            let request = Request::new(request.method().clone(), request.uri().path());
            (request, Reply::from(refused))
        }
    };
    let mut response = Response::new(Answer::Whole(None));
    *response.status_mut() = reply.status;
    response.headers_mut().extend(reply.headers.iter().cloned());
    if let Some(length) = reply.length() {
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    let head = request.is_head();
    *response.body_mut() = match &reply.body {
        Body::Bytes(bytes) if !head => Answer::Whole(Some(bytes.clone())),
        Body::Part(content, range) if !head && !range.is_empty() => {
            let (sender, receiver) = mpsc::channel(1);
            let pace = Pace::new(shared, &client.counted, &live.settings);
            let patience = Patience::new(live.settings.stall_time);
            let (content, range) = (content.clone(), range.clone());
            let left = range.end - range.start;
            let reply = Reply::new(reply.status, Body::Part(content.clone(), range.clone()));
            let shared = Arc::clone(shared);
            tokio::spawn(async move {
                activity.open.fetch_add(1, Relaxed);
                {
                    let _present = shared.metrics.request(Version::Two);
                    if let Err(error) = send(&content, range, &pace, patience, &sender).await {
                        if error.kind() == io::ErrorKind::TimedOut {
                            shared.metrics.refused(Refusal::Slow);
                        }
                        // Nobody may be there to hear it.
                        let _ = sender.try_send(Err(error));
                    }
                }
                activity.open.fetch_sub(1, Relaxed);
                client.record(&shared, &request, &reply, begin);
            });
            return response.map(|_| Answer::Parts { receiver, left });
        }
        _ => Answer::Whole(None),
    };
    drop(shared.metrics.request(Version::Two));
    client.record(shared, &request, &reply, begin);
    response
}

/// Reads a part of an object and passes it on as it is taken.
async fn send(
    content: &Content,
    range: Range<u64>,
    pace: &Pace,
    mut patience: Patience,
    sender: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PIECE.min(pace.most()));
        let turn = pace.turn(end - at).await;
        let piece = pace.shared().memory.read(content, at..end).await?;
        // Passing it on waits for the client, and that is not what a turn is for.
        drop(turn);
        let bytes = Bytes::from(piece);
        let len = bytes.len() as u64;
        let passed = async { sender.send(Ok(bytes)).await.map_err(gone) };
        patience.wait(passed).await?;
        patience.took(len);
        pace.sent(len);
        at += len;
    }
    Ok(())
}

/// The body of an answer.
enum Answer {
    Whole(Option<Bytes>),
    Parts {
        receiver: mpsc::Receiver<io::Result<Bytes>>,
        left: u64,
    },
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Answer::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Answer::Parts { left: 0, .. } => Poll::Ready(None),
            Answer::Parts { receiver, left } => {
                let Poll::Ready(next) = receiver.poll_recv(context) else {
                    return Poll::Pending;
                };
                // The sender ends early only with an error, which may not have got through.
                let next = next.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into()));
                Poll::Ready(Some(next.map(|bytes| {
                    *left = left.saturating_sub(bytes.len() as u64);
                    Frame::data(bytes)
                })))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Answer::Whole(bytes) => bytes.is_none(),
            Answer::Parts { left, .. } => *left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Answer::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64)
            }
            Answer::Parts { left, .. } => SizeHint::with_exact(*left),
        }
    }
}
