//! The life of the process: starting, serving, draining, stopping.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use hyper_util::rt::{TokioExecutor, TokioIo};
use quire_proto::quire::v1 as wire;
use quire_proto::quire::v1::quire_client::QuireClient;
use support::{LIMIT, Server, connect, poll, post_text, try_request};
use tonic::Code;
use tonic::transport::Channel;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn client(server: &Server) -> QuireClient<Channel> {
    QuireClient::connect(format!("http://{}", server.grpc)).await.unwrap()
}

type PatientService = tower::util::BoxCloneService<
    axum::http::Request<tonic::body::Body>,
    axum::http::Response<hyper::body::Incoming>,
    hyper::Error,
>;

/// A client that leaves deadlines to the server.
async fn patient_client(server: &Server) -> QuireClient<PatientService> {
    let stream = TokioIo::new(tokio::net::TcpStream::connect(server.grpc).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let service = tower::service_fn(move |request| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let origin = format!("http://{}", server.grpc).parse().unwrap();
    QuireClient::with_origin(tower::util::BoxCloneService::new(service), origin)
}

/// As many tokens as asked for, whatever the model would rather do.
fn story(max_tokens: u64) -> wire::GenerateRequest {
    wire::GenerateRequest {
        prompt: Some(wire::generate_request::Prompt::Text("Once upon a time".to_owned())),
        stopping: Some(wire::StoppingParams {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        sampling: Some(wire::SamplingParams { seed: Some(7), ..Default::default() }),
        ..Default::default()
    }
}

const STORY: &str = r#"{"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": true, "stream": true}"#;

/// Begins a long stream over HTTP and reads until its first piece of text is there.
fn begin_story(server: &Server) -> BufReader<std::net::TcpStream> {
    let mut stream = connect(server.http);
    stream.write_all(post_text("/v1/completions", STORY).as_bytes()).unwrap();
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        assert_ne!(reader.read_line(&mut line).unwrap(), 0, "the stream ended before its first event");
        if line.starts_with("data:") {
            return reader;
        }
    }
}

fn rest(mut reader: BufReader<std::net::TcpStream>) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn starts_serves_and_stops() {
    let mut server = Server::start(&[]);
    let until_ready = server.started.elapsed();
    for path in ["/health", "/health/ready", "/health/live", "/health/startup"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert!(server.log.iter().any(|line| line.contains("demo model") && line.contains("no assistant")));
    assert!(server.get("/v1/models").body.contains("quire-demo"));

    let answer = server.post("/v1/completions", r#"{"prompt": "Once upon a time", "max_tokens": 8}"#);
    assert_eq!(answer.status, 200, "{answer:?}");
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("text/plain; version=0.0.4"), "{}", metrics.head);
    for series in [
        "quire_requests_total{endpoint=\"completions\",outcome=\"finished\"} 1",
        "quire_requests_total{endpoint=\"chat\",outcome=\"finished\"} 0",
        "quire_time_to_first_token_seconds_count 1",
        "quire_ready 1",
        "vllm:num_requests_running{model_name=\"quire-demo\",engine=\"0\"} 0",
        "quire_step_duration_seconds_count{phase=\"plan\"}",
    ] {
        assert!(metrics.body.contains(series), "{series} is not in:\n{}", metrics.body);
    }
    assert_eq!(server.get("/nothing").status, 404);
    // A port for one protocol says nothing to the other, and nobody is harmed.
    let mut stranger = connect(server.grpc);
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(stranger.read(&mut [0; 16]).unwrap_or(0), 0);

    let resident = server.resident();
    server.signal("TERM");
    let (status, until_ended) = server.wait();
    assert_eq!(status.code(), Some(0), "{:?}", server.log);
    println!(
        "ready after {:.0} ms, {:.1} MiB resident, ended after {:.0} ms",
        until_ready.as_secs_f64() * 1e3,
        resident as f64 / f64::from(1 << 20),
        until_ended.as_secs_f64() * 1e3
    );
}

#[test]
fn speaks_grpc() {
    let server = Server::start(&[]);
    runtime().block_on(async {
        let mut client = client(&server).await;
        let whole = client.generate(story(24)).await.unwrap();
        let id = whole.metadata().get("quire-request-id").unwrap().to_str().unwrap().to_owned();
        let whole = whole.into_inner();
        assert_eq!((whole.request_id.as_str(), whole.model.as_str(), whole.seed), (id.as_str(), "quire-demo", Some(7)));
        let choice = &whole.choices[0];
        assert_eq!(choice.tokens.len(), 24);
        assert_eq!(choice.finish.as_ref().unwrap().reason(), wire::FinishReason::Length);
        assert_eq!(whole.usage.unwrap().completion_tokens, 24);

        // The same in pieces.
        let mut stream = client.generate_stream(story(24)).await.unwrap().into_inner();
        let (mut text, mut tokens, mut order) = (String::new(), Vec::new(), Vec::new());
        while let Some(event) = stream.message().await.unwrap() {
            use wire::stream_event::Event;
            match event.event.unwrap() {
                Event::Started(started) => order.push(format!("started {:?}", started.seed)),
                Event::Delta(delta) => {
                    text.push_str(&delta.text);
                    tokens.extend(delta.tokens);
                }
                Event::Finished(_) => order.push("finished".to_owned()),
                Event::Done(done) => order.push(format!("done {}", done.usage.unwrap().completion_tokens)),
                Event::PromptLogprobs(_) | Event::Reasoning(_) | Event::ToolCall(_) => panic!("nobody asked for these"),
            }
        }
        assert_eq!((&text, &tokens), (&choice.text, &choice.tokens));
        assert_eq!(order, ["started Some(7)", "finished", "done 24"]);

        let chat = wire::ChatRequest {
            messages: vec![wire::ChatMessage {
                role: "user".to_owned(),
                content: "Hello".to_owned(),
                ..Default::default()
            }],
            stopping: Some(wire::StoppingParams { max_tokens: Some(8), ..Default::default() }),
            output: Some(wire::OutputParams { logprobs: Some(2), ..Default::default() }),
            ..Default::default()
        };
        let chat = client.chat(chat).await.unwrap().into_inner();
        assert!(chat.choices[0].tokens.iter().all(|token| token.logprobs.as_ref().unwrap().top.len() == 2));

        let model = client.model_info(wire::ModelInfoRequest::default()).await.unwrap().into_inner();
        assert_eq!((model.name.as_str(), model.digest.len()), ("quire-demo", 64));
        let stats = client.stats(wire::StatsRequest::default()).await.unwrap().into_inner();
        assert_eq!(stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks, stats.num_blocks);
        let none = client.abort(wire::AbortRequest { request_id: "nobody".to_owned() }).await.unwrap();
        assert!(!none.into_inner().found);
    });
}

#[test]
fn grpc_errors_have_their_codes() {
    let server = Server::start(&["--server.grpc-max-message-bytes", "100000"]);
    runtime().block_on(async {
        let mut client = client(&server).await;
        let mut code = async |request: wire::GenerateRequest| client.generate(request).await.unwrap_err();
        let hot = wire::SamplingParams { temperature: Some(99.0), ..Default::default() };
        let error = code(wire::GenerateRequest { sampling: Some(hot), ..story(1) }).await;
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains("temperature"), "{error:?}");
        assert!(error.metadata().contains_key("quire-request-id"));
        assert_eq!(code(wire::GenerateRequest { prompt: None, ..story(1) }).await.code(), Code::InvalidArgument);
        let stranger = wire::GenerateRequest { model: "stranger".to_owned(), ..story(1) };
        assert_eq!(code(stranger).await.code(), Code::NotFound);
        let bad_id = wire::GenerateRequest { request_id: "a b".to_owned(), ..story(1) };
        assert_eq!(code(bad_id).await.code(), Code::InvalidArgument);
        assert_eq!(code(story(1_000_000)).await.code(), Code::InvalidArgument);
        // To go on, the seed must be known.
        let resume = wire::GenerateRequest { resume: Some(wire::Resume::default()), sampling: None, ..story(1) };
        assert_eq!(code(resume).await.code(), Code::InvalidArgument);
        let large = wire::generate_request::Prompt::Text("a".repeat(200_000));
        let large = wire::GenerateRequest { prompt: Some(large), ..story(1) };
        assert_eq!(code(large).await.code(), Code::ResourceExhausted);
    });
}

#[test]
fn grpc_requests_end_early_in_every_way() {
    let server = Server::start(&[]);
    let idle = async |client: &mut QuireClient<Channel>| {
        let deadline = Instant::now() + LIMIT;
        loop {
            let stats = client.stats(wire::StatsRequest::default()).await.unwrap().into_inner();
            if (stats.num_requests_in_flight, stats.num_running, stats.num_used_blocks) == (0, 0, 0) {
                return;
            }
            assert!(Instant::now() < deadline, "not idle: {stats:?}");
            tokio::task::yield_now().await;
        }
    };
    runtime().block_on(async {
        let mut client = client(&server).await;
        // Dropped by its caller.
        let mut stream = client.generate_stream(story(1900)).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        drop(stream);
        idle(&mut client).await;
        // Aborted by its id.
        let named = wire::GenerateRequest { request_id: "mine".to_owned(), ..story(1900) };
        let mut stream = client.generate_stream(named).await.unwrap().into_inner();
        stream.message().await.unwrap().unwrap();
        let abort = wire::AbortRequest { request_id: "mine".to_owned() };
        assert!(client.abort(abort).await.unwrap().into_inner().found);
        let ended = loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert_eq!(ended.unwrap_err().code(), Code::Cancelled);
        idle(&mut client).await;
        // Out of time. Asked by hand, because tonic's own client gives up by itself at the same moment.
        let mut late = tonic::Request::new(story(1900));
        late.metadata_mut().insert("grpc-timeout", "20m".parse().unwrap());
        let error = patient_client(&server).await.generate(late).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        idle(&mut client).await;
    });
}

#[test]
fn answers_health_and_reflection_over_grpc() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
    let server = Server::start(&[]);
    runtime().block_on(async {
        let channel = Channel::from_shared(format!("http://{}", server.grpc)).unwrap().connect().await.unwrap();
        for service in ["", "quire.v1.Quire"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let answer = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
            assert_eq!(answer.status, 1, "{service}");
        }
        let ask = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(ask))
            .await
            .unwrap()
            .into_inner();
        let answer: ServerReflectionResponse = answers.message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
        let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
        for name in ["quire.v1.Quire", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|other| other == name), "{name} is not in {names:?}");
        }
    });
}

/// A client that opens streams and never lets them send a byte.
async fn unread(address: std::net::SocketAddr, request: axum::http::Request<axum::body::Body>) -> impl Sized {
    let stream = TokioIo::new(tokio::net::TcpStream::connect(address).await.unwrap());
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut sender, connection) = builder.initial_stream_window_size(0).handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), 200);
    (sender, response)
}

#[test]
fn streams_that_are_not_read_end_and_hold_up_no_drain() {
    let mut server = Server::start(&["--server.write-stall-seconds", "1", "--server.drain-timeout-seconds", "600"]);
    runtime().block_on(async {
        let over_http = axum::http::Request::post(format!("http://{}/v1/completions", server.http))
            .header("content-type", "application/json")
            .body(axum::body::Body::from(STORY))
            .unwrap();
        let message = prost::Message::encode_to_vec(&story(1900));
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        framed.extend(message);
        let over_grpc = axum::http::Request::post(format!("http://{}/quire.v1.Quire/GenerateStream", server.grpc))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(axum::body::Body::from(framed))
            .unwrap();
        let _http = unread(server.http, over_http).await;
        let _grpc = unread(server.grpc, over_grpc).await;
        let deadline = Instant::now() + LIMIT;
        let mut client = client(&server).await;
        loop {
            let stats = client.stats(wire::StatsRequest::default()).await.unwrap().into_inner();
            if (stats.num_requests_in_flight, stats.num_running, stats.num_used_blocks) == (0, 0, 0) {
                break;
            }
            assert!(Instant::now() < deadline, "a stream that nobody reads is kept: {stats:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(client);
        // Both connections are still open, with a stream each that waits to be read.
        server.signal("TERM");
        let ended = tokio::task::spawn_blocking(move || server.wait().0.code()).await.unwrap();
        assert_eq!(ended, Some(0));
    });
}

#[test]
fn sigterm_lets_streams_finish() {
    let mut server = Server::start(&[]);
    let story = begin_story(&server);
    server.signal("TERM");
    server.wait_for("draining");
    // Probes are still answered, and say no; so does everything else, and when to come back.
    // Unless the story is told already and the process gone.
    if let Some(ready) = server.try_get("/health/ready") {
        assert_eq!(ready.status, 503);
    }
    let request = post_text("/v1/completions", r#"{"prompt": "a", "max_tokens": 1}"#);
    if let Some(refused) = try_request(server.http, &request).ok().filter(|answer| answer.status != 0) {
        assert_eq!(refused.status, 503, "{refused:?}");
    }
    let rest = rest(story);
    assert!(rest.contains("\"finish_reason\":\"length\""), "{}", &rest[rest.len().saturating_sub(600)..]);
    assert!(rest.contains("data: [DONE]"));
    let (status, _) = server.wait();
    assert_eq!(status.code(), Some(0), "{:?}", server.log);
}

#[test]
fn a_drain_has_an_end() {
    let mut server = Server::start(&["--server.drain-timeout-seconds", "0"]);
    let story = begin_story(&server);
    server.signal("TERM");
    let rest = rest(story);
    assert!(!rest.contains("\"finish_reason\":\"length\""), "it was to be cut");
    assert!(rest.contains("shutting down"), "{}", &rest[rest.len().saturating_sub(600)..]);
    let (status, elapsed) = server.wait();
    assert_eq!(status.code(), Some(0), "{:?}", server.log);
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
}

#[test]
fn a_second_signal_ends_the_wait() {
    let mut server = Server::start(&[]);
    let story = begin_story(&server);
    server.signal("TERM");
    server.wait_for("draining");
    server.signal("INT");
    let rest = rest(story);
    let (status, elapsed) = server.wait();
    assert_eq!(status.code(), Some(0), "{:?}", server.log);
    // On a fast machine the story can be over first.
    assert!(rest.contains("shutting down") || rest.contains("[DONE]"));
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
}

#[test]
fn answers_probes_while_the_model_is_loaded() {
    // A hub that takes connections and says nothing: the model is being loaded for as long as the test wants.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let home = tempfile::tempdir().unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    let environment = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", home.path().to_str().unwrap())];
    let mut server = Server::start_loading(&["owner/name"], &environment);
    hub.accept().unwrap();
    assert_eq!(server.get("/health/live").status, 200);
    for path in ["/health/startup", "/health/ready", "/health", "/v1/models"] {
        let answer = server.get(path);
        assert_eq!(answer.status, 503, "{path}");
        assert!(answer.head.contains("retry-after: "), "{path}: {}", answer.head);
    }
    assert!(server.get("/metrics").body.contains("quire_ready 0"));
    runtime().block_on(async {
        let error = client(&server).await.generate(story(1)).await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.metadata().contains_key("retry-after"));
    });
    server.signal("TERM");
    let (status, elapsed) = server.wait();
    assert_eq!(status.code(), Some(0), "{:?}", server.log);
    assert!(elapsed < Duration::from_secs(5), "{elapsed:?}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = support::quire().args(["serve", "--http", &address, "--grpc", "127.0.0.1:0"]).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains(&address) && message.contains("server.http"), "{message}");
}

#[test]
fn connections_are_bounded_and_silent_ones_end() {
    let limits = ["--server.max-connections", "4", "--server.header-timeout-seconds", "1"];
    let server = Server::start(&limits);
    let open: Vec<_> = (0..4).map(|_| connect(server.http)).collect();
    // The listener takes connections in order: once a fifth is refused, the four are held.
    poll("a refusal", || {
        let mut fifth = connect(server.http);
        let _ = fifth.write_all(b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n");
        (fifth.read(&mut [0; 1]).unwrap_or(0) == 0).then_some(())
    });
    for mut silent in open {
        assert_eq!(silent.read(&mut [0; 1]).unwrap_or(0), 0, "a silent connection stays open");
    }
    let answer = poll("room", || server.try_get("/metrics").filter(|answer| answer.status == 200));
    assert!(answer.body.contains("quire_connections_refused_total{listener=\"http\"}"));
    // Half a header is as good as none.
    let mut half = connect(server.http);
    half.write_all(b"GET /health HTTP/1.1\r\nhost: ").unwrap();
    let mut text = String::new();
    half.read_to_string(&mut text).unwrap();
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 408"), "{text}");
    let huge = format!("GET /health HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(200_000));
    // What it says can be lost: it closes while there is more to read.
    if let Ok(answer) = try_request(server.http, &huge) {
        assert!([0, 431].contains(&answer.status), "{answer:?}");
    }
}

const EMBEDDER: &str = concat!("embed=", env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/embedders/bert-mean");

#[test]
fn one_process_serves_several_models() {
    let mut server = Server::start(&["--model", "chat=demo", "--model", EMBEDDER]);
    assert_eq!(server.get("/health/ready").status, 200);
    let models = server.get("/v1/models").body;
    assert!(models.contains(r#""id":"chat""#) && models.contains(r#""id":"embed""#), "{models}");
    let answer = server.post("/v1/embeddings", r#"{"model": "embed", "input": "seven pages"}"#);
    assert!(answer.status == 200 && answer.body.contains(r#""embedding":["#), "{}", answer.body);
    let answer = server.post("/v1/completions", r#"{"model": "chat", "prompt": "Once", "max_tokens": 4}"#);
    assert!(answer.status == 200 && answer.body.contains(r#""model":"chat""#), "{}", answer.body);
    assert_eq!(server.post("/v1/completions", r#"{"model": "quire-demo", "prompt": "Once"}"#).status, 404);
    let metrics = server.get("/metrics").body;
    for series in [
        r#"vllm:num_requests_running{model_name="chat",engine="0"} 0"#,
        r#"vllm:num_requests_running{model_name="embed",engine="1"} 0"#,
        r#"quire_requests_total{endpoint="embeddings",outcome="finished"} 1"#,
        "quire_requests_running 0",
    ] {
        assert!(metrics.contains(series), "{series} is not in: {metrics}");
    }
    server.signal("TERM");
    assert!(server.wait().0.success());
}
