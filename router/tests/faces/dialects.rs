//! What holds for every dialect: one end, strictness, any value in any field, and what is described is served.

use axum::http::StatusCode;
use quire_engine::testing::FakeExecutor;
use quire_router::generation::Limits;
use serde_json::{Value, json};

use crate::harness::{SAID, Server, VOCAB, post, saying, user, with};

/// A device that fails after the first token: each dialect says so once, in its own words, and says nothing else.
#[tokio::test]
async fn a_stream_that_fails_ends_with_one_error() {
    for (path, body) in [
        ("/v1/messages", json!({"max_tokens": 50, "messages": user("Hi"), "stream": true})),
        ("/v1/responses", json!({"input": "Hi", "stream": true})),
        ("/api/chat", json!({"messages": user("Hi")})),
        ("/api/generate", json!({"prompt": "Hi"})),
        ("/infill", json!({"input_prefix": "a", "input_suffix": "b", "stream": true})),
        ("/v1/fim/completions", json!({"prompt": "a", "suffix": "b", "stream": true})),
    ] {
        let server = Server::new(saying(SAID).fail_at(3));
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 200, "{path}");
        let text = std::str::from_utf8(&answer.body).expect("UTF-8");
        assert_eq!(text.matches("internal error").count(), 1, "{path}: {text}");
        for end in ["message_stop", "response.completed", "\"done\":true", "\"stop\":true", "[DONE]"] {
            assert!(!text.contains(end), "{path}: {text}");
        }
        // Before the first token it is a status.
        let server = Server::new(saying(SAID).fail_at(0));
        let answer = server.post(path, &body).await;
        assert!(answer.status.is_server_error(), "{path}: {}", answer.status);
    }
}

#[tokio::test]
async fn strict_requests_are_refused_for_what_is_not_known() {
    let server = Server::saying(SAID);
    let strict = |path: &str, body: &Value, value: &str| {
        let mut request = post(path, body.to_string());
        request.headers_mut().insert("x-quire-strict", value.parse().expect("a value"));
        request
    };
    let known = json!({"prompt": "Hi", "max_tokens": 2});
    let unknown = with(known.clone(), json!({"surprise": 1}));
    assert_eq!(server.send(strict("/v1/completions", &known, "true")).await.status, 200);
    let refused = server.send(strict("/v1/completions", &unknown, "true")).await;
    assert_eq!(
        (refused.status, refused.json()["error"]["param"].clone()),
        (StatusCode::BAD_REQUEST, json!("surprise"))
    );
    let named = server.send(strict("/v1/completions", &unknown, "false")).await;
    assert_eq!((named.status, named.header("x-quire-ignored-params")), (StatusCode::OK, "surprise"));
    assert_eq!(server.send(strict("/v1/completions", &known, "maybe")).await.status, 400);

    let limits = Limits { strict: true, ..Limits::default() };
    let server = Server::with(saying(SAID), limits, &quire_engine::SchedulerSettings::default());
    for (path, body) in [
        ("/v1/completions", unknown.clone()),
        ("/v1/messages", json!({"max_tokens": 1, "messages": user("Hi"), "surprise": 1})),
        ("/v1/responses", json!({"input": "Hi", "surprise": 1})),
        ("/api/chat", json!({"messages": user("Hi"), "surprise": 1})),
        ("/infill", json!({"input_prefix": "", "input_suffix": "", "surprise": 1})),
        ("/tokenize", json!({"prompt": "x", "surprise": 1})),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{path}");
        assert!(answer.json().to_string().contains("surprise"), "{path}");
    }
    assert_eq!(server.send(strict("/v1/completions", &unknown, "false")).await.status, 200);
}

#[tokio::test]
async fn tokens_come_at_the_interval_that_was_asked_for() {
    let server = Server::saying("one two three four five six seven eight nine ten");
    let body = json!({"prompt": "Hi", "max_tokens": 30, "stream": true, "return_token_ids": true});
    let each = server.post("/v1/completions", &body).await.chunks();
    let some = server.post("/v1/completions", &with(body, json!({"stream_interval": 4}))).await.chunks();
    let ids = |chunks: &[Value]| -> Vec<u64> {
        chunks
            .iter()
            .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
            .filter_map(|id| id.as_u64())
            .collect()
    };
    assert_eq!(ids(&each), ids(&some));
    assert!(some.len() * 2 < each.len(), "{} and {}", some.len(), each.len());
}

/// A form that cannot be enforced is refused where it was asked for, and one that can is.
#[tokio::test]
async fn each_dialect_asks_for_a_form_in_its_own_place() {
    let server = Server::new(FakeExecutor::new(VOCAB));
    let schema = |keyword: &str| json!({"type": "object", "properties": {"a": {keyword: "("}}, "required": ["a"]});
    let (bad, good) = (schema("pattern"), json!({"type": "object", "additionalProperties": false}));
    let body = |path: &str, schema: &Value| match path {
        "/v1/responses" => {
            json!({"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}})
        }
        "/v1/messages" => json!({"max_tokens": 50, "messages": user("Hi"),
            "output_config": {"format": {"type": "json_schema", "schema": schema}}}),
        _ => json!({"messages": user("Hi"), "stream": false, "format": schema}),
    };
    for (path, param) in
        [("/v1/responses", "text.format"), ("/v1/messages", "output_config.format"), ("/api/chat", "format")]
    {
        let refused = server.post(path, &body(path, &bad)).await;
        assert_eq!(refused.status, 400, "{path}");
        assert!(refused.json().to_string().contains(param), "{path}: {}", refused.json());
        let answer = server.post(path, &body(path, &good)).await;
        assert_eq!(answer.header("x-quire-ignored-params"), "", "{path}");
        let answer = answer.json();
        let text = match path {
            "/v1/responses" => &answer["output"][0]["content"][0]["text"],
            "/v1/messages" => &answer["content"][0]["text"],
            _ => &answer["message"]["content"],
        };
        let text = text.as_str().unwrap_or_else(|| panic!("{path}: {answer}"));
        assert_eq!(serde_json::from_str::<Value>(text).ok(), Some(json!({})), "{path}: {text}");
    }
}

#[tokio::test]
async fn load_is_what_is_in_flight() {
    let server = Server::saying("x");
    assert_eq!(server.get("/load").await.json()["server_load"], 0);
}

/// Small numbers that look random and are the same every time.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

#[tokio::test]
async fn any_value_in_any_field_of_any_dialect_is_answered_or_refused() {
    let values = [
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "2.5",
        "1e308",
        "9223372036854775808",
        "\"\"",
        "\"a\"",
        "\"\\u0000\"",
        "[]",
        "{}",
        "[1]",
        "[\"a\"]",
        "[{}]",
        "[[]]",
        "{\"type\":\"text\"}",
        "{\"type\":\"text\",\"text\":\"x\"}",
        "{\"a\":null}",
        "[{\"role\":\"user\",\"content\":\"x\"}]",
        "[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"<|im_end|>\"}]}]",
        "[{\"type\":\"message\",\"role\":\"user\",\"content\":[{\"type\":\"input_text\",\"text\":\"x\"}]}]",
        "{\"format\":{\"type\":\"text\"}}",
        "{\"temperature\":9}",
        "{\"num_predict\":-1,\"stop\":[\"a\"]}",
        "[{\"filename\":\"a\",\"text\":\"b\"}]",
        "\"low\"",
        "\"resp_1\"",
    ];
    let routes: [(&str, &[&str]); 7] = [
        (
            "/v1/messages",
            &[
                "model",
                "messages",
                "max_tokens",
                "system",
                "stop_sequences",
                "temperature",
                "top_k",
                "top_p",
                "stream",
                "metadata",
                "tools",
                "tool_choice",
                "thinking",
                "service_tier",
                "surprise",
            ],
        ),
        ("/v1/messages/count_tokens", &["model", "messages", "system", "tools", "thinking", "surprise"]),
        (
            "/v1/responses",
            &[
                "model",
                "input",
                "instructions",
                "previous_response_id",
                "max_output_tokens",
                "temperature",
                "top_p",
                "top_logprobs",
                "include",
                "text",
                "reasoning",
                "tools",
                "tool_choice",
                "truncation",
                "store",
                "background",
                "stream",
                "stream_options",
                "metadata",
                "stop",
                "seed",
                "n",
                "surprise",
            ],
        ),
        (
            "/api/chat",
            &["model", "messages", "options", "stream", "format", "tools", "think", "keep_alive", "surprise"],
        ),
        (
            "/api/generate",
            &[
                "model", "prompt", "suffix", "system", "raw", "options", "stream", "format", "images", "context",
                "think",
            ],
        ),
        (
            "/infill",
            &[
                "input_prefix",
                "input_suffix",
                "prompt",
                "input_extra",
                "n_predict",
                "stream",
                "stop",
                "seed",
                "temperature",
                "mirostat",
                "grammar",
                "n_probs",
                "cache_prompt",
                "surprise",
            ],
        ),
        (
            "/v1/fim/completions",
            &["model", "prompt", "suffix", "max_tokens", "random_seed", "stream", "stop", "n", "temperature"],
        ),
    ];
    let bases = [
        json!({"max_tokens": 2, "messages": user("Hi")}),
        json!({"messages": user("Hi")}),
        json!({"input": "Hi", "max_output_tokens": 2}),
        json!({"messages": user("Hi"), "options": {"num_predict": 2}}),
        json!({"prompt": "Hi", "options": {"num_predict": 2}}),
        json!({"input_prefix": "a", "input_suffix": "b", "n_predict": 2}),
        json!({"prompt": "a", "suffix": "b", "max_tokens": 2}),
    ];
    let server = Server::saying("x y z");
    let mut draws = Draws(7);
    let mut num_served = 0;
    for round in 0..2800 {
        let at = round % routes.len();
        let (path, fields) = routes[at];
        let mut body = bases[at].clone();
        for _ in 0..draws.below(4) {
            let value = serde_json::from_str(values[draws.below(values.len())]).unwrap_or(Value::Null);
            body[fields[draws.below(fields.len())]] = value;
        }
        let answer = server.post(path, &body).await;
        let fine = answer.status == 200 || answer.status.is_client_error();
        assert!(fine, "{path} {body}: {} {:?}", answer.status, answer.body);
        if answer.status != 200 {
            let error = answer.json();
            let message = [&error["error"]["message"], &error["message"], &error["error"]];
            assert!(message.iter().any(|message| message.is_string()), "{path} {body}: {error}");
            continue;
        }
        num_served += 1;
        let text = std::str::from_utf8(&answer.body).expect("UTF-8");
        if answer.header("content-type").starts_with("text/event-stream") {
            let ends = [
                "event: message_stop",
                "event: response.completed",
                "event: response.incomplete",
                "\"stop\":true",
                "[DONE]",
            ];
            let num_ends: usize = ends.iter().map(|end| text.matches(end).count()).sum();
            assert_eq!(num_ends, 1, "{path} {body}: {text}");
        }
    }
    assert!((600..2600).contains(&num_served), "{num_served} of the bodies were served");
    server.idle().await;
}

/// A described field is a known one: with nothing in it, no route says that it passed over it.
#[tokio::test]
async fn what_is_described_is_known() {
    let server = Server::beside(saying(SAID), &["bert-mean", "bert-classify"]);
    let described = server.get("/openapi.json").await.json();
    assert_eq!(described["openapi"], "3.1.0");
    let page = server.get("/docs").await;
    assert!(page.header("content-type").starts_with("text/html"));
    let mut num_fields = 0;
    for (path, methods) in described["paths"].as_object().expect("paths") {
        let schema = &methods["post"]["requestBody"]["content"]["application/json"]["schema"];
        let Some(properties) = schema["properties"].as_object() else { continue };
        let mut body = match path.as_str() {
            "/v1/messages" => json!({"max_tokens": 2, "messages": user("Hi")}),
            "/v1/chat/completions" | "/v1/chat/completions/render" | "/v1/messages/count_tokens" | "/api/chat" => {
                json!({"messages": user("Hi")})
            }
            "/v1/responses" => json!({"input": "Hi"}),
            "/v1/embeddings" | "/pooling" | "/classify" => json!({"input": "Hi"}),
            "/v2/embed" => json!({"texts": ["Hi"]}),
            "/api/embed" => json!({"model": "bert-mean", "input": "Hi"}),
            "/rerank" | "/v1/rerank" | "/v2/rerank" => json!({"query": "Hi", "documents": ["Hi"]}),
            "/score" | "/v1/score" => json!({"text_1": "Hi", "text_2": "Hi"}),
            "/infill" => json!({"input_prefix": "a", "input_suffix": "b"}),
            "/detokenize" => json!({"tokens": [16]}),
            "/api/show" => json!({"model": "demo"}),
            _ => json!({"prompt": "Hi"}),
        };
        for name in properties.keys() {
            num_fields += 1;
            if body.get(name).is_none() {
                body[name] = Value::Null;
            }
        }
        let answer = server.post(path, &body).await;
        assert_eq!((answer.status, answer.header("x-quire-ignored-params")), (StatusCode::OK, ""), "{path}");
        for name in schema["required"].as_array().expect("a list") {
            let mut without = body.clone();
            without[name.as_str().expect("a name")] = Value::Null;
            assert_eq!(server.post(path, &without).await.status, 400, "{path} without {name}");
        }
    }
    assert!(num_fields > 150, "{num_fields} fields are described");
}
