//! Overload, leaving, draining, failing: how requests end that do not simply finish.

use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use futures::StreamExt;
use quire_engine::SchedulerSettings;
use quire_engine::scheduler::TenantId;
use quire_engine::testing::{FakeExecutor, Gate};
use quire_router::error::ApiError;
use quire_router::generation::{GenerationEvent, GenerationParams, GenerationRequest, Input, Limits};
use quire_router::metrics::Endpoint;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::harness::{Server, VOCAB, chat, demo_ids, post, saying, with};

#[tokio::test]
async fn overload_is_a_status_of_its_own_even_for_streams() {
    let gate = Gate::closed();
    let settings = SchedulerSettings { max_num_seqs: 1, max_waiting_tokens: 4096, ..SchedulerSettings::default() };
    let server = Server::with(saying("x").gated(&gate), Limits::default(), &settings);
    let body = json!({"prompt": vec![16; 2000], "stream": true}).to_string();
    let tasks: Vec<_> =
        (0..6).map(|_| tokio::spawn(server.router.clone().oneshot(post("/v1/completions", body.clone())))).collect();
    // One is held in its first step; the others come at the next boundary, more of them than may wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    gate.open();
    let mut num_refused = 0;
    for task in tasks {
        let response = task.await.expect("no panic").expect("answers");
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body");
        if parts.status == StatusCode::TOO_MANY_REQUESTS {
            num_refused += 1;
            assert!(parts.headers["retry-after"].to_str().expect("ASCII").parse::<u64>().expect("seconds") >= 1);
            let error: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(error["error"]["code"], "overloaded");
        } else {
            assert_eq!(parts.status, 200);
        }
    }
    assert!((1..6).contains(&num_refused), "{num_refused} of 6 were refused");
    server.idle().await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_work() {
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    }));
    let body = with(chat("Hi"), json!({"stream": true, "ignore_eos": true, "n": 2}));
    let response =
        server.router.clone().oneshot(post("/v1/chat/completions", body.to_string())).await.expect("answers");
    let mut stream = response.into_body().into_data_stream();
    assert!(stream.next().await.is_some());
    assert_eq!(server.service.num_inflight(), 1);
    drop(stream);
    server.idle().await;

    // The same for a client that does not stream: its connection's task is dropped while it waits.
    let body = with(chat("Hi"), json!({"ignore_eos": true}));
    let waiting = server.router.clone().oneshot(post("/v1/chat/completions", body.to_string()));
    assert!(tokio::time::timeout(Duration::from_millis(100), waiting).await.is_err());
    server.idle().await;
}

#[tokio::test]
async fn draining_refuses_new_requests_and_ends_old_ones_in_time() {
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    }));
    let body = with(chat("Hi"), json!({"stream": true, "ignore_eos": true}));
    let response =
        server.router.clone().oneshot(post("/v1/chat/completions", body.to_string())).await.expect("answers");
    let reading = tokio::spawn(async move { axum::body::to_bytes(response.into_body(), usize::MAX).await });
    server.service.begin_drain();
    let refused = server.post("/v1/chat/completions", &body).await;
    assert_eq!(refused.status, 503);
    assert_ne!(refused.header("retry-after"), "");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!reading.is_finished());
    server.service.fail_all("the server is stopping");
    let body = reading.await.expect("no panic").expect("a body");
    let text = std::str::from_utf8(&body).expect("UTF-8");
    let last = text.trim_end().rsplit("data: ").next().expect("an event");
    let error: Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(error["error"]["code"], "unavailable");
    assert!(!text.contains("[DONE]"));
    server.idle().await;
}

#[tokio::test]
async fn requests_are_cancelled_by_id() {
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    }));
    let body = with(chat("Hi"), json!({"ignore_eos": true, "request_id": "mine"}));
    let router = server.router.clone();
    let running = tokio::spawn(router.oneshot(post("/v1/chat/completions", body.to_string())));
    while server.service.num_inflight() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(!server.service.abort("other"));
    assert!(server.service.abort("mine"));
    assert_eq!(running.await.expect("no panic").expect("answers").status(), 499);
    assert!(!server.service.abort("mine"));
    server.idle().await;
}

#[tokio::test]
async fn a_failed_device_is_an_error_with_an_id_and_no_cause() {
    let server = Server::new(saying("some words that go on").fail_at(2));
    let answer = server.post("/v1/chat/completions", &chat("Hi")).await;
    assert_eq!(answer.status, 500);
    let message = answer.json()["error"]["message"].as_str().expect("text").to_owned();
    assert!(message.contains(answer.header("x-request-id")) && !message.contains("scripted"), "{message}");
    let answer = server.post("/v1/chat/completions", &chat("Hi")).await;
    assert_eq!(answer.status, 503);

    let server = Server::new(saying("some words that go on").non_finite(|_, position| position > 12));
    let answer = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let last: Value = serde_json::from_str(answer.events().last().expect("an event")).expect("JSON");
    assert_eq!(last["error"]["type"], "server_error");
    server.idle().await;
}

#[tokio::test]
async fn bodies_share_a_bounded_memory() {
    let limits = Limits { max_body_bytes: 4096, max_buffered_bytes: 8192, ..Limits::default() };
    let server = Server::with(saying("x"), limits, &SchedulerSettings::default());
    // Two clients send most of a body and then nothing.
    let slow = || {
        let start = futures::stream::iter([Ok::<_, std::convert::Infallible>(Bytes::from(vec![b' '; 4000]))]);
        let request = post("/v1/chat/completions", Body::from_stream(start.chain(futures::stream::pending())));
        let router = server.router.clone();
        tokio::spawn(async move { router.oneshot(request).await })
    };
    let held = [slow(), slow()];
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(held.iter().all(|task| !task.is_finished()));
    let mut status = StatusCode::OK;
    for _ in 0..200 {
        let answer = server.post("/v1/chat/completions", &chat(&"a".repeat(2000))).await;
        status = answer.status;
        if status == StatusCode::TOO_MANY_REQUESTS {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    for task in held {
        task.abort();
        let _ = task.await;
    }
    let answer = server.post("/v1/chat/completions", &chat(&"a".repeat(2000))).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn deadlines_end_requests_before_and_while_they_run() {
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(Duration::from_millis(2));
        Ok(())
    }));
    let request = |deadline| GenerationRequest {
        request_id: "r".to_owned(),
        endpoint: Endpoint::Chat,
        tenant: TenantId(0),
        model: None,
        input: Input::Text { text: "Hi".to_owned(), add_special_tokens: true },
        params: GenerationParams { n: Some(2), ignore_eos: true, ..GenerationParams::default() },
        deadline: Some(deadline),
    };
    let late = server.service.generate(request(Instant::now())).await;
    assert_eq!(late.err(), Some(ApiError::DeadlineExceeded));
    let running = server.service.generate(request(Instant::now() + Duration::from_millis(200))).await;
    let mut running = running.expect("starts in time");
    let mut events = Vec::new();
    while let Some(event) = running.next().await {
        events.push(event);
    }
    let is_end = |event: &&GenerationEvent| matches!(event, GenerationEvent::Done { .. } | GenerationEvent::Error(_));
    assert_eq!(events.iter().filter(is_end).count(), 1);
    assert_eq!(events.last(), Some(&GenerationEvent::Error(ApiError::DeadlineExceeded)));
    server.idle().await;
}

/// The engine knows no stop strings: it is told at once, and not when all choices have ended.
#[tokio::test]
async fn a_choice_that_met_its_stop_string_ends_alone() {
    let stop = demo_ids(" the")[0];
    let gate = Gate::closed();
    let executor = FakeExecutor::new(VOCAB)
        .gated(&gate)
        .next_token(move |_, choice_index, _| if choice_index == 0 { stop } else { 100 });
    let server = Server::new(executor);
    let text = String::from_utf8(server.service.model().table().bytes(stop).to_vec()).expect("a word");
    let request = GenerationRequest {
        request_id: "r".to_owned(),
        endpoint: Endpoint::Chat,
        tenant: TenantId(0),
        model: None,
        input: Input::TokenIds(vec![16; 40]),
        params: GenerationParams {
            n: Some(2),
            stop: vec![text],
            ignore_eos: true,
            max_tokens: Some(500),
            ..GenerationParams::default()
        },
        deadline: None,
    };
    gate.let_through(8);
    let mut running = server.service.generate(request).await.expect("starts");
    loop {
        match running.next().await {
            Some(GenerationEvent::ChoiceFinished { choice_index: 0, .. }) => break,
            Some(GenerationEvent::Delta { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    gate.let_through(2);
    gate.wait_until_held();
    assert_eq!(server.engine.stats().num_running, 1);
    gate.open();
    let mut num_tokens = 0;
    let usage = loop {
        match running.next().await {
            Some(GenerationEvent::Delta { choice_index: 1, tokens, .. }) => num_tokens += tokens.len(),
            Some(GenerationEvent::ChoiceFinished { choice_index: 1, .. }) => {}
            Some(GenerationEvent::Done { usage }) => break usage,
            other => panic!("{other:?}"),
        }
    };
    assert!(num_tokens > 400 && usage.completion_tokens == 501, "{num_tokens} tokens, {usage:?}");
    server.idle().await;
}

#[tokio::test]
async fn a_stream_says_that_it_lives_while_its_prompt_is_computed() {
    let gate = Gate::closed();
    let limits = Limits { sse_keepalive_seconds: 1, ..Limits::default() };
    let server = Server::with(saying("Hello").gated(&gate), limits, &SchedulerSettings::default());
    let body = with(chat("Hi"), json!({"stream": true})).to_string();
    let answer = server.router.clone().oneshot(post("/v1/chat/completions", body));
    let answer =
        tokio::time::timeout(Duration::from_secs(60), answer).await.expect("an answer begins").expect("answers");
    assert_eq!(answer.status(), 200);
    let mut data = answer.into_body().into_data_stream();
    for _ in 0..2 {
        let comment = tokio::time::timeout(Duration::from_secs(60), data.next()).await.expect("a sign of life");
        assert_eq!(comment.expect("the stream goes on").expect("a body"), ": waiting\n\n");
    }
    gate.open();
    let mut text = Vec::new();
    while let Some(part) = data.next().await {
        text.extend_from_slice(&part.expect("a body"));
    }
    let text = String::from_utf8(text).expect("UTF-8");
    assert!(text.starts_with("data: ") && text.ends_with("data: [DONE]\n\n"), "{text}");
    server.idle().await;
}

#[tokio::test]
async fn no_request_outlasts_the_servers_own_limit() {
    let limits = Limits { request_timeout_seconds: 1, ..Limits::default() };
    let executor = FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).on_step(|_| {
        std::thread::sleep(Duration::from_millis(5));
        Ok(())
    });
    let server = Server::with(executor, limits, &SchedulerSettings::default());
    let answer = server.post("/v1/chat/completions", &with(chat("Hi"), json!({"ignore_eos": true}))).await;
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].clone()),
        (StatusCode::GATEWAY_TIMEOUT, json!("deadline_exceeded"))
    );
    server.idle().await;
}
