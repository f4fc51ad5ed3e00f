//! Cancelling, overload, draining: what becomes of requests that do not simply end.

use std::time::Duration;

use futures::StreamExt;
use quire_proto::quire::v1::{AbortRequest, GenerateRequest, StoppingParams, generate_request::Prompt};
use quire_tests::Server;
use serde_json::{Value, json};
use tonic::Code;

/// A request that runs for as long as the model's length allows.
fn endless() -> Value {
    json!({"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": true, "stream": true})
}

fn endless_grpc(request_id: &str) -> GenerateRequest {
    GenerateRequest {
        request_id: request_id.to_owned(),
        prompt: Some(Prompt::Text("Once upon a time".to_owned())),
        stopping: Some(StoppingParams { max_tokens: Some(1500), ignore_eos: Some(true), ..Default::default() }),
        ..Default::default()
    }
}

#[tokio::test]
async fn whoever_leaves_frees_blocks() {
    let server = Server::start(&[]).await;

    // An HTTP client that closes its connection in the middle of the stream.
    let mut body = server.post("/v1/completions", &endless()).await.bytes_stream();
    body.next().await.expect("a first event").expect("bytes");
    assert!(!server.holds_nothing().await, "the request runs");
    drop(body);
    server.until("HTTP disconnect", Server::holds_nothing).await;

    // A gRPC client that drops its stream.
    let mut grpc = server.quire().await;
    let mut stream = grpc.generate_stream(endless_grpc("dropped")).await.expect("a stream").into_inner();
    stream.message().await.expect("an event");
    drop(stream);
    server.until("gRPC cancellation", Server::holds_nothing).await;

    // A deadline.
    let mut late = tonic::Request::new(endless_grpc("late"));
    late.set_timeout(Duration::from_millis(300));
    let status = grpc.generate(late).await.expect_err("the deadline passes");
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    server.until("gRPC deadline", Server::holds_nothing).await;

    // Abort by name, from another connection.
    let mut stream = grpc.generate_stream(endless_grpc("by-name")).await.expect("a stream").into_inner();
    stream.message().await.expect("an event");
    let request = AbortRequest { request_id: "by-name".to_owned() };
    server.quire().await.abort(request).await.expect("it is known");
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => continue,
            Ok(None) => panic!("an aborted stream ends with a status that says so"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Cancelled);
    server.until("abort", Server::holds_nothing).await;
    assert!(server.metric("quire_cancel_to_free_seconds_count", &[]).await >= 3.0);
}

#[tokio::test]
async fn overload_is_refused_with_a_time_to_come_back() {
    let flags = ["--max-num-seqs", "2", "--max-model-len", "128", "--scheduler.max-waiting-tokens", "128"];
    let server = Server::start(&flags).await;
    let ask = json!({"prompt": "Once upon a time there was a fox", "max_tokens": 64, "ignore_eos": true});
    let answers = futures::future::join_all((0..60).map(|_| server.post("/v1/completions", &ask))).await;
    let (mut num_served, mut num_refused) = (0, 0);
    for answer in answers {
        match answer.status().as_u16() {
            200 => num_served += 1,
            429 => {
                let seconds = answer.headers().get("retry-after").expect("Retry-After").to_str().expect("text");
                assert!(seconds.parse::<u64>().is_ok_and(|seconds| seconds >= 1), "Retry-After: {seconds}");
                let error: Value = answer.json().await.expect("JSON");
                assert!(error["error"]["message"].is_string(), "{error}");
                num_refused += 1;
            }
            status => panic!("status {status}"),
        }
    }
    assert!(num_served >= 2 && num_refused >= 1, "{num_served} served, {num_refused} refused");
    server.until("idle", Server::holds_nothing).await;
    server.ask("/v1/completions", &ask).await;
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_ends_the_rest_with_an_error() {
    let server = Server::start(&["--server.drain-timeout-seconds", "4"]).await;
    let mut short = endless();
    short["max_tokens"] = json!(60);
    let mut short = server.post("/v1/completions", &short).await.bytes_stream();
    short.next().await.expect("a first event").expect("bytes");
    // So many at once that they cannot all be done within the limit.
    let endless = endless();
    let long = futures::future::join_all((0..24).map(|_| server.post("/v1/completions", &endless))).await;
    server.terminate();
    server.until("draining", async |server| server.log().contains("draining")).await;
    // Probes on new connections are answered while streams run, and say no.
    let ready = format!("{}/health/ready", server.http);
    for _ in 0..8 {
        let response = reqwest::Client::new().get(&ready).send().await.expect("probes are answered during a drain");
        assert_eq!(response.status(), 503);
    }

    let ends: Vec<String> = futures::future::join_all(long.into_iter().map(async |stream| {
        assert_eq!(stream.status(), 200);
        stream.text().await.expect("the stream ends as HTTP says")
    }))
    .await;
    for end in &ends {
        let num_done = end.matches("data: [DONE]").count();
        let num_errors = end.matches("\"error\"").count();
        assert_eq!(num_done + num_errors, 1, "a stream ends once: {}", &end[end.len().saturating_sub(300)..]);
    }
    let mut rest = Vec::new();
    while let Some(bytes) = short.next().await {
        rest.extend_from_slice(&bytes.expect("bytes"));
    }
    let rest = String::from_utf8(rest).expect("UTF-8");
    assert!(rest.contains("[DONE]") || rest.contains("\"error\""), "{rest}");
    assert!(server.exit_status().await.success(), "a drain is no failure");
}
