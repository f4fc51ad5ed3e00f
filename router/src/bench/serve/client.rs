//! One request of a load: sent, streamed, and timed event by event.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response, StatusCode, Uri, header};
use futures::StreamExt;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

/// Most bytes of one line of a stream, and of an answer that is no stream.
const MAX_BYTES: usize = 4 << 20;
/// Most connections that wait for their next request.
const MAX_IDLE: usize = 4096;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// `host:port`
    authority: String,
    /// What comes before `/v1/completions`, without a slash at its end.
    prefix: String,
}

impl Target {
    /// Reads `http://host[:port][/prefix]`; a `/v1` at its end is left out, since clients are often given it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let refuse = |why: &str| Err(format!("--url {url}: {why}"));
        let Ok(uri) = url.parse::<Uri>() else { return refuse("is not a URL") };
        match (uri.scheme_str(), uri.authority()) {
            (Some("http"), Some(authority)) if !authority.as_str().contains('@') => {
                let host = authority.host();
                let port = authority.port_u16().unwrap_or(80);
                let path = uri.path().trim_end_matches('/');
                let prefix = path.strip_suffix("/v1").unwrap_or(path).to_owned();
                Ok(Self { authority: format!("{host}:{port}"), prefix })
            }
            (Some("https"), _) => refuse("only http:// is spoken; measure behind what ends TLS"),
            _ => refuse("is not http://HOST:PORT"),
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    Completed(Timing),
    Failed(Failure),
}

impl Outcome {
    /// How long a server that refused wants to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Failed(Failure::Status { retry_after, .. }) => *retry_after,
            _ => None,
        }
    }
}

/// An answer, as its caller saw it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Timing {
    /// From sending to the first event with a choice, and to the last.
    pub first: Duration,
    pub last: Duration,
    /// Between each two events with a choice.
    pub gaps: Vec<Duration>,
    /// From `usage`, not counted.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The server said no.
    Status {
        code: u16,
        retry_after: Option<Duration>,
    },
    /// There was no connection, or it broke before an answer began.
    Connection,
    /// The stream ended without `[DONE]`, or held what is no event.
    BrokenStream,
    /// The stream held an error.
    ErrorEvent,
    /// The stream ended without `usage` or without any token.
    NoUsage,
    Timeout,
}

impl Failure {
    /// The name that it is counted under.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Status { code, .. } => code.to_string(),
            Self::Connection => "connection".to_owned(),
            Self::BrokenStream => "broken stream".to_owned(),
            Self::ErrorEvent => "error event".to_owned(),
            Self::NoUsage => "no usage".to_owned(),
            Self::Timeout => "timeout".to_owned(),
        }
    }
}

/// An event of a completions stream: what is looked at.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<serde::de::IgnoredAny>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<serde::de::IgnoredAny>,
}

#[derive(Clone, Copy, Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<ModelEntry>,
}

#[derive(Deserialize)]
struct ModelEntry {
    id: String,
}

/// Connections to one server, used again and again.
pub(super) struct Client {
    target: Target,
    idle: Mutex<Vec<SendRequest<Body>>>,
}

impl Client {
    pub(super) fn new(target: Target) -> Self {
        Self { target, idle: Mutex::default() }
    }

    /// The first of `/v1/models`.
    pub(super) async fn first_model(&self, timeout: Duration) -> Result<String, String> {
        let ask = async {
            let (response, _) = self.send("GET", "/v1/models", Body::empty()).await.map_err(|f| f.name())?;
            if response.status() != StatusCode::OK {
                return Err(format!("status {}", response.status()));
            }
            let body = axum::body::to_bytes(response.into_body(), MAX_BYTES).await.map_err(|e| e.to_string())?;
            let models: Models = serde_json::from_slice(&body).map_err(|error| error.to_string())?;
            models.data.into_iter().next().map(|model| model.id).ok_or_else(|| "it lists none".to_owned())
        };
        tokio::time::timeout(timeout, ask).await.unwrap_or_else(|_| Err("timeout".to_owned()))
    }

    /// Sends a body to `/v1/completions` and reads the stream to its end.
    pub(super) async fn complete(&self, body: String, timeout: Duration) -> Outcome {
        match tokio::time::timeout(timeout, self.stream(body)).await {
            Ok(Ok(timing)) => Outcome::Completed(timing),
            Ok(Err(failure)) => Outcome::Failed(failure),
            Err(_) => Outcome::Failed(Failure::Timeout),
        }
    }

    async fn stream(&self, body: String) -> Result<Timing, Failure> {
        let start = Instant::now();
        let (response, connection) = self.send("POST", "/v1/completions", Body::from(body)).await?;
        if response.status() != StatusCode::OK {
            let code = response.status().as_u16();
            let retry_after = retry_after(response.headers());
            // Read to its end, so that the connection can be used again.
            if axum::body::to_bytes(response.into_body(), MAX_BYTES).await.is_ok() {
                self.keep(connection);
            }
            return Err(Failure::Status { code, retry_after });
        }
        let mut reading = Reading::default();
        let mut chunks = response.into_body().into_data_stream();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|_| Failure::BrokenStream)?;
            reading.read(&chunk, start.elapsed())?;
        }
        self.keep(connection);
        reading.finish()
    }

    /// Sends on a connection that waits, or on a new one. The connection comes back with the answer.
    async fn send(&self, method: &str, path: &str, body: Body) -> Result<(Response<Body>, SendRequest<Body>), Failure> {
        let mut connection = self.connection().await?;
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.target.prefix))
            .header(header::HOST, &self.target.authority)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)
            .map_err(|_| Failure::Connection)?;
        let response = connection.send_request(request).await.map_err(|_| Failure::Connection)?;
        Ok((response.map(Body::new), connection))
    }

    async fn connection(&self) -> Result<SendRequest<Body>, Failure> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut idle) = idle else { break };
            // Fails where the server closed it in the meantime.
            if idle.ready().await.is_ok() {
                return Ok(idle);
            }
        }
        let stream = TcpStream::connect(&self.target.authority).await.map_err(|_| Failure::Connection)?;
        stream.set_nodelay(true).map_err(|_| Failure::Connection)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|_| Failure::Connection)?;
        // Its end is seen by who uses the sender.
        tokio::task::spawn_local(connection);
        Ok(sender)
    }

    fn keep(&self, connection: SendRequest<Body>) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }
}

/// Seconds; a date is not understood and counts as none.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// A stream of server-sent events on its way in.
#[derive(Default)]
struct Reading {
    /// The start of a line whose end has not come.
    rest: Vec<u8>,
    first: Option<Duration>,
    last: Duration,
    gaps: Vec<Duration>,
    usage: Option<Usage>,
    is_done: bool,
}

impl Reading {
    fn read(&mut self, mut chunk: &[u8], now: Duration) -> Result<(), Failure> {
        while let Some(end) = chunk.iter().position(|&byte| byte == b'\n') {
            let (line, behind) = (&chunk[..end], &chunk[end + 1..]);
            if self.rest.is_empty() {
                self.line(line, now)?;
            } else {
                let mut whole = std::mem::take(&mut self.rest);
                whole.extend_from_slice(line);
                self.line(&whole, now)?;
            }
            chunk = behind;
        }
        if self.rest.len() + chunk.len() > MAX_BYTES {
            return Err(Failure::BrokenStream);
        }
        self.rest.extend_from_slice(chunk);
        Ok(())
    }

    fn line(&mut self, line: &[u8], now: Duration) -> Result<(), Failure> {
        let Some(data) = line.strip_prefix(b"data:") else {
            // Comments, other fields of events, and empty lines between them.
            return Ok(());
        };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.is_done = true;
            return Ok(());
        }
        let event: Event = serde_json::from_slice(data).map_err(|_| Failure::BrokenStream)?;
        if event.error.is_some() {
            return Err(Failure::ErrorEvent);
        }
        if !event.choices.is_empty() {
            match self.first {
                None => self.first = Some(now),
                Some(_) => self.gaps.push(now.saturating_sub(self.last)),
            }
            self.last = now;
        }
        self.usage = event.usage.or(self.usage);
        Ok(())
    }

    fn finish(self) -> Result<Timing, Failure> {
        match (self.is_done, self.first, self.usage) {
            (false, _, _) => Err(Failure::BrokenStream),
            (true, Some(first), Some(usage)) if usage.completion_tokens > 0 => Ok(Timing {
                first,
                last: self.last,
                gaps: self.gaps,
                prompt_tokens: usage.prompt_tokens,
                completion_tokens: usage.completion_tokens,
            }),
            _ => Err(Failure::NoUsage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: &str = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n: a comment\n\
        data: {\"choices\":[{\"text\":\"bc\"}],\"usage\":null}\r\n\r\n\
        data: {\"choices\":[{\"text\":\"\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n";

    #[test]
    fn tokens_come_from_usage_and_times_from_events_however_a_stream_is_cut() {
        for size in [1, 7, 1000] {
            let mut reading = Reading::default();
            for (i, chunk) in EVENTS.as_bytes().chunks(size).enumerate() {
                reading.read(chunk, Duration::from_millis(i as u64)).unwrap();
            }
            let timing = reading.finish().unwrap();
            assert_eq!((timing.prompt_tokens, timing.completion_tokens, timing.gaps.len()), (7, 4, 2));
            assert_eq!(timing.gaps.iter().sum::<Duration>(), timing.last - timing.first);
        }
    }

    #[test]
    fn streams_that_do_not_end_well_are_failures() {
        let end_of = |text: &str| {
            let mut reading = Reading::default();
            reading.read(text.as_bytes(), Duration::ZERO)?;
            reading.finish().map(|_| ())
        };
        let whole = EVENTS.replace("\r", "");
        assert_eq!(end_of(&whole), Ok(()));
        assert_eq!(end_of(whole.split("data: [DONE]").next().unwrap()), Err(Failure::BrokenStream));
        assert_eq!(end_of("data: {\"choices\":\n\n"), Err(Failure::BrokenStream));
        assert_eq!(end_of("data: {\"error\":{\"message\":\"no\"}}\n\ndata: [DONE]\n"), Err(Failure::ErrorEvent));
        assert_eq!(end_of("data: {\"choices\":[{}]}\n\ndata: [DONE]\n"), Err(Failure::NoUsage));
        assert_eq!(end_of(""), Err(Failure::BrokenStream));
    }

    #[test]
    fn urls_are_read_with_and_without_port_and_prefix() {
        let parsed = |url: &str| Target::parse(url).map(|target| (target.authority, target.prefix));
        let target = |authority: &str, prefix: &str| Ok((authority.to_owned(), prefix.to_owned()));
        assert_eq!(parsed("http://127.0.0.1:8000"), target("127.0.0.1:8000", ""));
        assert_eq!(parsed("http://localhost/v1/"), target("localhost:80", ""));
        assert_eq!(parsed("http://[::1]:9/llm/v1"), target("[::1]:9", "/llm"));
        for url in ["127.0.0.1:8000", "https://a", "ftp://a", "http://a@b", ""] {
            assert!(parsed(url).is_err(), "{url}");
        }
    }
}
