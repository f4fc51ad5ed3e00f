//! What is refused, and how that is said.

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, StatusCode};
use futures::StreamExt;
use quire_engine::SchedulerSettings;
use quire_router::generation::Limits;
use serde_json::{Value, json};

use crate::harness::{Server, VOCAB, chat, demo_ids, saying, with};

#[tokio::test]
async fn refusals_name_the_field_and_not_the_value() {
    let server = Server::saying("x");
    let secret = "a very private sentence";
    let chat_cases = [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.5}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"typical_p": 0}), "typical_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"presence_penalty": 2.1}), "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty"),
        (json!({"n": 0}), "n"),
        (json!({"n": 9}), "n"),
        (json!({"n": -1}), "n"),
        (json!({"n": 1.5}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 9223372036854775808u64}), ""),
        (json!({"min_tokens": 5000}), "min_tokens"),
        (json!({"max_tokens": 4, "min_tokens": 5}), "min_tokens"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "logprobs"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": [secret, 1]}), "stop"),
        (json!({"stop": secret.repeat(100)}), "stop"),
        (json!({"stop_token_ids": [VOCAB]}), "stop_token_ids"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"allowed_token_ids": [VOCAB]}), "allowed_token_ids"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias"),
        (json!({"logit_bias": {secret: 1}}), "logit_bias"),
        (json!({"logit_bias": {"-5": 1}}), "logit_bias"),
        (json!({"bad_words": [""]}), "bad_words"),
        (json!({"seed": secret}), "seed"),
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"priority": 3000000000u64}), "priority"),
        (json!({"request_id": "a b"}), "request_id"),
        (json!({"stream": secret}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (json!({"tools": [{"type": secret}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "function": {"name": secret}}]}), "tools[0].function.name"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}),
            "tools[0].function.parameters",
        ),
        (json!({"tools": vec![json!({"type": "function", "function": {"name": "f"}}); 2]}), "tools[1].function.name"),
        (json!({"tools": vec![json!({"type": "function", "function": {"name": "f"}}); 129]}), "tools"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice",
        ),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": secret}), "tool_choice"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"functions": [{"name": secret}]}), "functions"),
        (json!({"reasoning_effort": secret.repeat(9)}), "reasoning_effort"),
        (json!({"service_tier": secret}), "service_tier"),
        (json!({"documents": [1], "tools": secret}), "tools"),
        (json!({"response_format": {"type": secret}}), "response_format.type"),
        (json!({"structured_outputs": {"regex": format!("({secret}")}}), "structured_outputs"),
        (json!({"guided_json": {"a": 1}}), "guided_json"),
        (json!({"chat_template": secret}), "chat_template"),
        (json!({"chat_template_kwargs": {"tokenize": true}}), "chat_template_kwargs"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": secret}), "messages"),
        (json!({"messages": [secret]}), "messages[0]"),
        (json!({"messages": [{"role": secret, "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].tool_call_id"),
        (
            json!({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
            "messages[0].tool_calls",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": secret}}]}]}),
            "messages[0].tool_calls[0].function.name",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": secret}}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"add_generation_prompt": true, "continue_final_message": true}), "continue_final_message"),
    ];
    let completion_cases = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": {"a": secret}}), "prompt"),
        (json!({"prompt": [secret, 1]}), "prompt"),
        (json!({"prompt": [1, secret]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [VOCAB]}), "prompt"),
        (json!({"prompt": [4294967296u64]}), "prompt"),
        (json!({"prompt": [[1], "x"]}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": vec!["x"; 129]}), "prompt"),
        (json!({"suffix": 5}), "suffix"),
        (json!({"prompt": [1], "suffix": secret}), "suffix"),
        (json!({"echo": true, "suffix": secret}), "echo"),
        (json!({"truncate_prompt_tokens": 5, "suffix": secret}), "truncate_prompt_tokens"),
        (json!({"truncation_side": "up"}), "truncation_side"),
        (json!({"service_tier": secret}), "service_tier"),
        (json!({"stream_interval": 0}), "stream_interval"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
    ];
    let chat_cases =
        chat_cases.into_iter().map(|(extra, param)| ("/v1/chat/completions", with(chat(secret), extra), param));
    let completion_cases = completion_cases
        .into_iter()
        .map(|(extra, param)| ("/v1/completions", with(json!({"prompt": secret}), extra), param));
    for (path, body, param) in chat_cases.chain(completion_cases) {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{body}");
        let error = &answer.json()["error"];
        assert_eq!(error["type"], "invalid_request_error", "{body}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{body}: {error}");
        assert!(!error.to_string().contains("private"), "{error}");
    }
    assert_eq!(server.service.num_inflight(), 0);
}

#[tokio::test]
async fn lengths_are_refused_as_context_too_long() {
    let server = Server::saying("x");
    for body in [
        json!({"prompt": "word ".repeat(5000), "max_tokens": 1}),
        json!({"prompt": "a".repeat(8 * 4096 + 1), "max_tokens": 1}),
        json!({"prompt": vec![16; 4096], "max_tokens": 1}),
        json!({"prompt": vec![16; 4000], "max_tokens": 97}),
        json!({"prompt": "x", "max_tokens": 4096}),
        json!({"prompt": "x", "max_tokens": u64::MAX}),
    ] {
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, 400);
        assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    }
    let fits = json!({"prompt": vec![16; 4000], "max_tokens": 96});
    assert_eq!(server.post("/v1/completions", &fits).await.status, 200);
    let cut = json!({"prompt": vec![16; 5000], "truncate_prompt_tokens": 100, "max_tokens": 4});
    let answer = server.post("/v1/completions", &cut).await;
    assert_eq!(answer.json()["usage"]["prompt_tokens"], 100);
}

#[tokio::test]
async fn unknown_fields_are_named_and_known_ones_served() {
    let server = Server::saying("fine");
    let body = json!({
        "model": "demo", "max_completion_tokens": 20, "user": "someone", "metadata": {"a": "b"}, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {"5": -100}, "stop": null, "n": 1,
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you", "x": 1}], "mood": 1}
        ],
        "store": true, "foo\nbar": 1, "zzz": {"deep": [1, 2]}, "bad_words": ["rude"], "top_k": 5, "min_p": 0.1, "typical_p": 0.9,
        "chat_template_kwargs": {"enable_thinking": false}, "allowed_token_ids": demo_ids("fine")
    });
    let answer = server.post("/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    let ignored = answer.header("x-quire-ignored-params");
    let mut ignored: Vec<&str> = ignored.split(',').collect();
    ignored.sort_unstable();
    assert_eq!(
        ignored,
        [
            "chat_template_kwargs.enable_thinking",
            "foo?bar",
            "messages[].content[].x",
            "messages[].mood",
            "store",
            "zzz"
        ]
    );
    let many: Value = (0..100)
        .map(|index| (format!("{}{index}", "x".repeat(200)), json!(1)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let answer = server.post("/v1/chat/completions", &with(chat("Hi"), many)).await;
    assert!(answer.header("x-quire-ignored-params").len() < 4096);
}

#[tokio::test]
async fn every_error_has_openais_shape() {
    let server =
        Server::with(saying("x"), Limits { max_body_bytes: 1000, ..Limits::default() }, &SchedulerSettings::default());
    let request = |method: Method, path: &str, kind: Option<&str>, body: Body| {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(kind) = kind {
            request = request.header("content-type", kind);
        }
        request.body(body).expect("a request")
    };
    let json_type = Some("application/json");
    let path = "/v1/chat/completions";
    let cases = [
        (request(Method::GET, "/nowhere", None, Body::empty()), 404),
        (request(Method::GET, path, None, Body::empty()), 405),
        (request(Method::POST, "/v1/models", json_type, Body::from("{}")), 405),
        (request(Method::POST, path, None, Body::from("{}")), 415),
        (request(Method::POST, path, Some("text/plain"), Body::from("{}")), 415),
        (request(Method::POST, path, json_type, Body::from("a".repeat(1001))), 413),
        (
            request(
                Method::POST,
                path,
                json_type,
                Body::from_stream(
                    futures::stream::repeat(Ok::<_, std::convert::Infallible>(Bytes::from_static(&[b' '; 100])))
                        .take(11),
                ),
            ),
            413,
        ),
        (request(Method::POST, path, json_type, Body::from("a".repeat(1000))), 400),
        (request(Method::POST, path, json_type, Body::from("{\"messages\":1}x")), 400),
        (request(Method::POST, path, json_type, Body::from("[]")), 400),
        (request(Method::POST, path, json_type, Body::from(&b"{\"a\":\"\xff\"}"[..])), 400),
        (request(Method::POST, path, json_type, Body::from("{\"a\":1,\"a\":2}")), 400),
        (request(Method::POST, path, json_type, Body::from(format!("{{\"a\":{}", "[".repeat(900)))), 400),
        (request(Method::GET, "/v1/models/other", None, Body::empty()), 404),
    ];
    for (request, status) in cases {
        let what = format!("{} {}", request.method(), request.uri());
        let answer = server.send(request).await;
        assert_eq!(answer.status, status, "{what} {:?}", answer.body);
        let body = answer.json();
        for field in ["message", "type", "param", "code"] {
            assert!(body["error"].get(field).is_some(), "{what}: {body}");
        }
    }
    let compressed = Request::post(path)
        .header("content-type", "application/json")
        .header("content-encoding", "gzip")
        .body(Body::from("{}"))
        .expect("a request");
    assert_eq!(server.send(compressed).await.status, 415);
    let other = with(chat("Hi"), json!({"model": "gpt-\u{1b}[31m"}));
    let answer = server.post(path, &other).await;
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].clone()),
        (StatusCode::NOT_FOUND, json!("model_not_found"))
    );
    assert!(!answer.json()["error"]["message"].as_str().expect("text").contains('\u{1b}'));
}

#[tokio::test]
async fn request_ids_are_kept_or_replaced() {
    let server = Server::saying("x");
    let ask = async |id: &str| {
        let request = Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .header("x-request-id", id)
            .body(Body::from(chat("Hi").to_string()))
            .expect("a request");
        let answer = server.send(request).await;
        (answer.header("x-request-id").to_owned(), answer.json()["id"].as_str().expect("an id").to_owned())
    };
    assert_eq!(ask("My_id-1.2").await, ("My_id-1.2".to_owned(), "chatcmpl-My_id-1.2".to_owned()));
    for bad in ["a b", "", "x\u{7f}", &"x".repeat(129)] {
        let Ok(_) = axum::http::HeaderValue::from_str(bad) else { continue };
        let (id, _) = ask(bad).await;
        assert_eq!(id.len(), 32, "{bad:?}");
    }
}
