//! Callers of the front end that do as little as they can with what they get.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, header};
use hyper::body::Body as HttpBody;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use quire_proto::quire::v1 as wire;
use quire_proto::quire::v1::quire_client::QuireClient;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

/// What a request asks: no two the same, since who asks again is answered sooner.
fn prompt(number: u64) -> String {
    format!("Tell me short story number {number} about a fox that likes to read.")
}

/// A stream, as its caller saw it.
pub(super) struct Seen {
    pub(super) first: Duration,
    /// Pieces that it came in.
    pub(super) num_reads: u64,
}

pub(super) struct HttpCaller {
    send: SendRequest<Body>,
    num_tokens: u32,
}

impl HttpCaller {
    pub(super) async fn connect(address: SocketAddr, num_tokens: u32) -> Result<Self, String> {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (send, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        Ok(Self { send, num_tokens })
    }

    pub(super) async fn stream(&mut self, number: u64) -> Result<Seen, String> {
        let messages = serde_json::json!([{"role": "user", "content": prompt(number)}]);
        let body = serde_json::json!({"messages": messages, "max_tokens": self.num_tokens, "stream": true}).to_string();
        self.send.ready().await.map_err(|error| error.to_string())?;
        let begun = Instant::now();
        let request = Request::post("/v1/chat/completions")
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .map_err(|error| error.to_string())?;
        let response = self.send.send_request(request).await.map_err(|error| error.to_string())?;
        if response.status() != 200 {
            return Err(format!("status {}", response.status()));
        }
        let mut body = response.into_body();
        let (mut first, mut num_reads, mut tail) = (None, 0, Vec::new());
        while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
            let frame = frame.map_err(|error| error.to_string())?;
            let Some(data) = frame.data_ref() else { continue };
            first.get_or_insert_with(|| begun.elapsed());
            num_reads += 1;
            tail.clear();
            tail.extend_from_slice(&data[data.len().saturating_sub(16)..]);
        }
        match first {
            Some(first) if tail.ends_with(b"data: [DONE]\n\n") => Ok(Seen { first, num_reads }),
            _ => Err("a stream broke off".to_owned()),
        }
    }
}

pub(super) async fn channel(address: SocketAddr) -> Result<Channel, String> {
    let endpoint = Endpoint::try_from(format!("http://{address}")).map_err(|error| error.to_string())?;
    endpoint.connect().await.map_err(|error| error.to_string())
}

pub(super) async fn grpc_stream(channel: Channel, num_tokens: u32, number: u64) -> Result<Seen, String> {
    let content = prompt(number);
    let begun = Instant::now();
    let message = wire::ChatMessage { role: "user".to_owned(), content, ..Default::default() };
    let stopping = wire::StoppingParams { max_tokens: Some(num_tokens.into()), ..Default::default() };
    let request = wire::ChatRequest { messages: vec![message], stopping: Some(stopping), ..Default::default() };
    let stream = QuireClient::new(channel).chat_stream(request).await.map_err(|status| status.to_string())?;
    let mut stream = stream.into_inner();
    let (mut first, mut num_reads, mut num_seen) = (None, 0, 0);
    while let Some(message) = stream.message().await.map_err(|status| status.to_string())? {
        num_reads += 1;
        if let Some(wire::stream_event::Event::Delta(delta)) = message.event {
            first.get_or_insert_with(|| begun.elapsed());
            num_seen += delta.tokens.len();
        }
    }
    match first {
        Some(first) if num_seen == num_tokens as usize => Ok(Seen { first, num_reads }),
        _ => Err("a stream broke off".to_owned()),
    }
}
