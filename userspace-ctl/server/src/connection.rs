// SPDX-License-Identifier: GPL-2.0

//! One connection, from when it is accepted to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{header, StatusCode};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::answer::Asker;
use crate::clients::{ClientKey, Counted};
use crate::http1::{self, Next};
use crate::http2;
use crate::link::Link;
use crate::metrics::Refusal;
use crate::reply::Reply;
use crate::request::Request;
use crate::shared::{Access, Shared};
use crate::tls;

/// Tells connections that the server is about to stop.
#[derive(Clone, Debug)]
pub(crate) struct Stop(pub(crate) watch::Receiver<bool>);

impl Stop {
    pub(crate) fn is_asked(&self) -> bool {
        *self.0.borrow()
    }

    /// Done when the server should stop.
    pub(crate) async fn asked(&mut self) {
        // A server that is gone has stopped too.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// Who is at the other end.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) peer: SocketAddr,
    pub(crate) counted: Arc<Counted>,
    pub(crate) asker: Asker,
}

impl Client {
    /// The answer to one request too many.
    pub(crate) fn too_often(&self, shared: &Shared, wait: Duration) -> Reply {
        shared.metrics.refused(Refusal::Rate);
        let seconds = wait.as_secs().max(1).to_string();
        Reply::plain(StatusCode::TOO_MANY_REQUESTS, "too many requests\n")
            .with_text(header::RETRY_AFTER, &seconds)
    }

    /// Counts an answer that has been sent, and logs it.
    pub(crate) fn record(&self, shared: &Shared, request: &Request, reply: &Reply, begin: Instant) {
        let (status, time) = (reply.status.as_u16(), begin.elapsed());
        shared.metrics.answered(status, time);
        if let Some(log) = shared.logs.access {
            log(&Access {
                peer: self.peer,
                method: request.method.to_string(),
                path: request.path.clone(),
                range: request.range.clone(),
                status,
                length: reply.length(),
                time,
            });
        }
    }
}

/// Serves a connection to its end.
pub(crate) async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr, stop: Stop) {
    let live = shared.live();
    let _present = shared.metrics.connection();
    let key = ClientKey::of(peer.ip());
    let Some(counted) = shared
        .clients
        .connect(key, live.settings.client_connections)
    else {
        shared.metrics.refused(Refusal::ClientConnections);
        refuse(&stream, live.tls.is_some());
        return;
    };
    // Answers are written whole; waiting to fill packets only adds latency.
    let _ = stream.set_nodelay(true);
    let mut client = Client {
        peer,
        counted: Arc::new(counted),
        asker: Asker {
            address: Some(peer),
            ..Asker::default()
        },
    };
    let Some(config) = &live.tls else {
        match http1::serve(&shared, Link::Plain(stream), &client, stop.clone()).await {
            Next::Done => (),
            Next::Http2(first, stream) => {
                let (read, write) = stream.into_split();
                let read = tokio::io::AsyncReadExt::chain(std::io::Cursor::new(first), read);
                http2::serve(&shared, tokio::io::join(read, write), client, stop).await;
            }
        }
        return;
    };
    let acceptor = TlsAcceptor::from(Arc::clone(config));
    let Ok(Ok(stream)) = timeout(live.settings.header_time, acceptor.accept(stream)).await else {
        shared.metrics.refused(Refusal::Tls);
        return;
    };
    let (_, session) = stream.get_ref();
    client.asker.names = tls::client_names(session).into();
    if tls::is_h2(session) {
        http2::serve(&shared, stream, client, stop).await;
    } else {
        http1::serve(&shared, Link::Tls(Box::new(stream)), &client, stop).await;
    }
}

/// Says why, if there is a way to, and closes.
pub(crate) fn refuse(stream: &TcpStream, tls: bool) {
    const BUSY: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 21\r\nretry-after: 1\r\n\
        connection: close\r\n\r\ntoo many connections\n";
    if !tls {
        // A new connection has room for it; if not, the client sees that it is closed.
        let _ = stream.try_write(BUSY);
    }
}
