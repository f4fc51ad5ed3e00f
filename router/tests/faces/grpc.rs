//! What only the gRPC face has.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::Request;
use futures::{Stream, StreamExt};
use quire_engine::SchedulerSettings;
use quire_engine::testing::FakeExecutor;
use quire_proto::quire::v1 as wire;
use quire_router::generation::Limits;
use serde_json::json;
use tonic::Code;
use tower::ServiceExt;

use crate::harness::{Server, VOCAB, chat, saying};

fn generate(text: &str) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text(text.to_owned())),
        stopping: Some(wire::StoppingParams { max_tokens: Some(4), ..Default::default() }),
        ..Default::default()
    }
}

/// A call whose body is `parts`.
fn call(parts: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Request<Body> {
    Request::post("/quire.v1.Quire/Generate")
        .header("content-type", "application/grpc")
        .body(Body::from_stream(parts))
        .expect("a request")
}

/// Most of a message of so many bytes.
fn most_of(message_len: u32) -> Bytes {
    let mut bytes = vec![0];
    bytes.extend(message_len.to_be_bytes());
    bytes.resize(message_len as usize, b' ');
    bytes.into()
}

#[tokio::test]
async fn bodies_of_both_faces_share_one_memory() {
    let limits = Limits { max_body_bytes: 4096, max_buffered_bytes: 8192, ..Limits::default() };
    let server = Server::with(saying("x"), limits, &SchedulerSettings::default());
    // Two calls send most of a message and then nothing.
    let held: Vec<_> = (0..2)
        .map(|_| {
            let parts = futures::stream::iter([Ok(most_of(4000))]).chain(futures::stream::pending());
            tokio::spawn(server.grpc.clone().oneshot(call(parts)))
        })
        .collect();
    // On a runtime of one thread both are polled, and hold what they hold, before this goes on.
    tokio::task::yield_now().await;
    let refused = server.quire().generate(generate(&"a".repeat(2000))).await.expect_err("there is no room");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.metadata().contains_key("retry-after"));
    assert_eq!(server.post("/v1/chat/completions", &chat(&"a".repeat(2000))).await.status, 429);
    for task in held {
        task.abort();
        let _ = task.await;
    }
    server.quire().generate(generate(&"a".repeat(2000))).await.expect("there is room again");
    let answer = server.post("/v1/chat/completions", &chat(&"a".repeat(2000))).await;
    assert_eq!(answer.status, 200);
}

/// A running call holds nothing of its body: that is tokens by then.
#[tokio::test]
async fn a_stream_gives_its_body_back_when_it_begins() {
    let limits = Limits { max_body_bytes: 4096, max_buffered_bytes: 4096, ..Limits::default() };
    let server =
        Server::with(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100), limits, &SchedulerSettings::default());
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(server.quire().generate_stream(generate(&"a".repeat(3000))).await.expect("there is room"));
    }
    let answer = server.post("/v1/completions", &json!({"prompt": "a".repeat(3000), "max_tokens": 1})).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_message_that_drips_runs_out_of_time() {
    let limits = Limits { body_timeout_seconds: 1, ..Limits::default() };
    let server = Server::with(saying("x"), limits, &SchedulerSettings::default());
    let drops = futures::stream::unfold(0, |count| async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let part = if count == 0 { most_of(5) } else { Bytes::from_static(b" ") };
        // Far more than fit into the time; without an end this test would have none where there is no limit.
        (count < 400).then_some((Ok(part), count + 1))
    });
    let mut whole = vec![0];
    whole.extend(1000u32.to_be_bytes());
    let parts = futures::stream::iter([Ok(Bytes::from(whole))]).chain(drops);
    let response = server.grpc.clone().oneshot(call(parts)).await.expect("answers");
    assert_eq!(response.headers()["grpc-status"], (Code::DeadlineExceeded as i32).to_string());
}
