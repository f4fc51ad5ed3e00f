//! Connections: accepting them, how many, and how long a silent one may stay.
//!
//! A client is given as little as it needs to be served and nothing to hold on to: a header comes within its time and
//! size, an answer is read, a silent HTTP/2 connection answers pings, or the connection ends.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tower::util::MapResponse;

use crate::config::ServerConfig;
use crate::metrics::{self, Listener as Kind, OpenConnection};
use crate::shutdown::Shutdown;
use crate::stall;

/// HTTP/2 flow control: what a client may send before it is read, for a stream and for the whole connection.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Bytes of an answer that wait for a client, for a stream.
const SEND_BUFFER: usize = 64 << 10;
/// Streams that a client opened and reset before they were served; past it the connection ends (CVE-2023-44487).
const MAX_PENDING_RESETS: usize = 64;
/// What an HTTP/2 connection begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often a connection that has sent a part of the preface is looked at again.
const SNIFF: Duration = Duration::from_millis(20);
/// Wait after a failed accept: out of file descriptors, as a rule, and trying at once would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Files that connections never take.
const RESERVED_FILES: usize = 128;

/// A bound address.
pub struct Listener {
    kind: Kind,
    socket: TcpListener,
    limits: Limits,
    open: Arc<Semaphore>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    header_timeout: Duration,
    max_header_bytes: u32,
    max_headers: usize,
    write_stall: Duration,
    max_concurrent_streams: u32,
    keepalive: Duration,
}

impl Listener {
    /// Binds; connections wait until [`Listener::serve`].
    pub async fn bind(kind: Kind, address: SocketAddr, config: &ServerConfig) -> io::Result<Self> {
        let limits = Limits {
            header_timeout: Duration::from_secs(config.header_timeout_seconds),
            max_header_bytes: config.max_header_bytes,
            max_headers: config.max_headers,
            write_stall: Duration::from_secs(config.write_stall_seconds),
            max_concurrent_streams: config.max_concurrent_streams,
            keepalive: Duration::from_secs(config.keepalive_seconds),
        };
        let socket = TcpListener::bind(address).await?;
        let max_connections = config.max_connections.min(connections_within_files());
        if max_connections < config.max_connections {
            tracing::warn!(
                max_connections,
                listener = kind.label(),
                "fewer connections: the limit on open files is low"
            );
        }
        Ok(Self { kind, socket, limits, open: Arc::new(Semaphore::new(max_connections)) })
    }

    /// The address, with the port that was taken for port 0.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Accepts until the process stops.
    pub async fn serve(self, app: Router, shutdown: Shutdown) {
        let Self { kind, socket, limits, open } = self;
        let mut failing = false;
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = shutdown.stopping.cancelled() => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => {
                    failing = false;
                    stream
                }
                Err(error) => {
                    // The reason passes, as a rule; it must not end the listener, nor fill the log.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, listener = kind.label(), "cannot accept connections");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&open).try_acquire_owned() else {
                metrics::count_refused_connection(kind);
                continue;
            };
            // Tokens are small and go out one by one: waiting to fill a packet would show.
            let _ = stream.set_nodelay(true);
            let connection = Connection { kind, limits, app: app.clone(), shutdown: shutdown.clone() };
            tokio::spawn(connection.serve(stream, permit));
        }
    }
}

/// Connections of one listener that leave files for the other and for everything else the process opens.
fn connections_within_files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let files =
        limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next()?.parse().ok());
    files.map_or(usize::MAX, |files: usize| (files.saturating_sub(RESERVED_FILES) / 2).max(1))
}

struct Connection {
    kind: Kind,
    limits: Limits,
    app: Router,
    shutdown: Shutdown,
}

impl Connection {
    async fn serve(self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let Self { kind, limits, app, shutdown } = self;
        let _counted = (OpenConnection::new(kind), permit);
        let version = tokio::select! {
            version = tokio::time::timeout(limits.header_timeout, version_of(&stream)) => version,
            () = shutdown.stopping.cancelled() => return,
        };
        let Ok(Ok(version)) = version else { return };
        // From here on a drain waits for it: whoever says nothing holds up nothing.
        let _busy = shutdown.tasks.token();
        let io = TokioIo::new(StallGuard { stream, limit: limits.write_stall, timer: None });
        // Errors of a connection are its client's business: it left, or did not speak HTTP.
        let ended = match version {
            Version::Http2 => {
                // Flow control is each stream's own there: a full socket is not the only way to stall.
                let stalled = CancellationToken::new();
                let watched = {
                    let stalled = stalled.clone();
                    move |response| stall::watch(response, limits.write_stall, &stalled)
                };
                let service = TowerToHyperService::new(MapResponse::new(app, watched));
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .timer(TokioTimer::new())
                    .max_concurrent_streams(limits.max_concurrent_streams)
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_send_buf_size(SEND_BUFFER)
                    .max_header_list_size(limits.max_header_bytes)
                    .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
                    .keep_alive_interval(limits.keepalive)
                    .keep_alive_timeout(limits.keepalive);
                let mut connection = std::pin::pin!(builder.serve_connection(io, service));
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = shutdown.draining.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            ended = connection => ended,
                            () = shutdown.stopping.cancelled() => Ok(()),
                            // A stream that nobody reads would keep the connection, and the drain, to the limit.
                            () = stalled.cancelled() => Ok(()),
                        }
                    }
                }
            }
            Version::Http1 if kind == Kind::Grpc => Ok(()),
            Version::Http1 => {
                let service = TowerToHyperService::new(app);
                let mut builder = http1::Builder::new();
                builder
                    .timer(TokioTimer::new())
                    .header_read_timeout(limits.header_timeout)
                    .max_headers(limits.max_headers)
                    .max_buf_size(limits.max_header_bytes as usize);
                // Whoever comes while the server drains (a probe, say) gets one answer: a connection that is shut down
                // before its first request is closed without any.
                let is_draining = shutdown.draining.is_cancelled();
                builder.keep_alive(!is_draining);
                let mut connection = std::pin::pin!(builder.serve_connection(io, service));
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = shutdown.stopping.cancelled(), if is_draining => Ok(()),
                    () = shutdown.draining.cancelled(), if !is_draining => {
                        connection.as_mut().graceful_shutdown();
                        tokio::select! {
                            ended = connection => ended,
                            () = shutdown.stopping.cancelled() => Ok(()),
                        }
                    }
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, listener = kind.label(), "connection ended");
        }
    }
}

enum Version {
    Http1,
    Http2,
}

/// Looks at what a connection begins with and leaves it where it is.
async fn version_of(stream: &TcpStream) -> io::Result<Version> {
    let mut start = [0; PREFACE.len()];
    loop {
        let len = stream.peek(&mut start).await?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if start[..len] != PREFACE[..len] {
            return Ok(Version::Http1);
        }
        if len == PREFACE.len() {
            return Ok(Version::Http2);
        }
        // A peek is ready at once while a part is there; a whole preface comes in one packet from any real client.
        tokio::time::sleep(SNIFF).await;
    }
}

/// A stream whose writes fail once its reader has taken nothing for too long.
struct StallGuard {
    stream: TcpStream,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl StallGuard {
    fn watch<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.timer = None;
            return poll;
        }
        let limit = self.limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_flush(cx);
        self.watch(cx, poll)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let poll = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, poll)
    }
}
