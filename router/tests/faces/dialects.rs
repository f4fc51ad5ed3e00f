//! Other dialects than OpenAI's chat: what their clients send, read, and are refused for.

use axum::http::StatusCode;
use futures::StreamExt;
use quire_engine::testing::{FakeExecutor, Gate};
use quire_router::generation::Limits;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::harness::{Answer, Server, VOCAB, post, saying, with};

const SAID: &str = "a fox and a crow";

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

/// Names and data of an event stream whose events have names.
fn named(answer: &Answer) -> Vec<(String, Value)> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    text.split("\n\n")
        .filter(|event| !event.is_empty())
        .map(|event| {
            let (name, data) = event.split_once('\n').expect("two lines");
            let name = name.strip_prefix("event: ").expect("a name").to_owned();
            let data = data.strip_prefix("data: ").expect("data");
            (name, serde_json::from_str(data).expect("JSON"))
        })
        .collect()
}

fn lines(answer: &Answer) -> Vec<Value> {
    let text = std::str::from_utf8(&answer.body).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn data(answer: &Answer) -> Vec<Value> {
    answer.events().iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
}

#[tokio::test]
async fn messages_answer_and_stream() {
    let server = Server::saying(SAID);
    let body = json!({"model": "demo", "max_tokens": 50, "system": "Be brief.", "messages": user("Hi"),
        "metadata": {"user_id": "me"}});
    let answer = server.post("/v1/messages", &body).await;
    let message = answer.json();
    assert_eq!((message["type"].as_str(), message["role"].as_str()), (Some("message"), Some("assistant")));
    assert_eq!(message["content"], json!([{"type": "text", "text": SAID}]));
    assert_eq!(message["stop_reason"], "end_turn");
    assert!(message["id"].as_str().expect("an id").starts_with("msg_"));
    assert_eq!(answer.header("x-quire-ignored-params"), "");
    let body_to_count = json!({"model": "demo", "system": "Be brief.", "messages": user("Hi")});
    let counted = server.post("/v1/messages/count_tokens", &body_to_count).await;
    let counted = counted.json()["input_tokens"].as_u64().expect("a number");
    let usage = |usage: &Value, name: &str| usage[name].as_u64().expect("a number");
    let input = usage(&message["usage"], "input_tokens") + usage(&message["usage"], "cache_read_input_tokens");
    assert_eq!(input, counted);

    let answer = server.post("/v1/messages", &with(body.clone(), json!({"stream": true}))).await;
    let events = named(&answer);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(&names[..3], ["message_start", "content_block_start", "content_block_delta"]);
    assert_eq!(&names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    assert_eq!(names.iter().filter(|name| **name == "message_stop").count(), 1);
    assert!(events.iter().all(|(name, data)| data["type"] == *name));
    let text: String = events.iter().filter_map(|(_, data)| data["delta"]["text"].as_str()).collect();
    assert_eq!(text, SAID);
    let (_, delta) = &events[events.len() - 2];
    assert_eq!(
        (&delta["delta"]["stop_reason"], usage(&delta["usage"], "output_tokens") > 3),
        (&json!("end_turn"), true)
    );

    let stopped = server.post("/v1/messages", &with(body.clone(), json!({"stop_sequences": ["and"]}))).await.json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!("and")));
    let short = server.post("/v1/messages", &with(body, json!({"max_tokens": 1}))).await.json();
    assert_eq!(short["stop_reason"], "max_tokens");
    server.idle().await;
}

#[tokio::test]
async fn messages_are_refused_in_their_own_shape() {
    let server = Server::saying(SAID);
    let base = json!({"max_tokens": 5, "messages": user("Hi")});
    let secret = "a very private sentence";
    for (extra, status, kind, named) in [
        (json!({"max_tokens": null}), 400, "invalid_request_error", "max_tokens"),
        (json!({"model": "claude"}), 404, "not_found_error", "claude"),
        (json!({"tools": [{"name": secret}]}), 400, "invalid_request_error", "tools"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 1}}), 400, "invalid_request_error", "thinking"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "source": secret}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
        (json!({"messages": [{"role": secret, "content": "x"}]}), 400, "invalid_request_error", "messages[0].role"),
        (json!({"temperature": 3}), 400, "invalid_request_error", "temperature"),
        (json!({"system": 5}), 400, "invalid_request_error", "system"),
    ] {
        let answer = server.post("/v1/messages", &with(base.clone(), extra.clone())).await;
        assert_eq!(answer.status, status, "{extra}");
        let error = answer.json();
        assert_eq!((error["type"].as_str(), error["error"]["type"].as_str()), (Some("error"), Some(kind)), "{error}");
        let message = error["error"]["message"].as_str().expect("text");
        assert!(message.contains(named) && !message.contains("private"), "{message}");
        assert_eq!(error["request_id"], answer.header("x-request-id"));
    }
    let answer = server.get("/v1/messages").await;
    assert_eq!((answer.status, answer.json()["type"].clone()), (StatusCode::METHOD_NOT_ALLOWED, json!("error")));
    // An answer that was begun is gone on with, and what is not known is named.
    let begun = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]);
    let answer = server.post("/v1/messages", &with(base, json!({"messages": begun, "surprise": 1}))).await;
    assert_eq!((answer.status, answer.header("x-quire-ignored-params")), (StatusCode::OK, "surprise"));
}

#[tokio::test]
async fn ollama_answers_in_lines() {
    let server = Server::saying(SAID);
    let chat = json!({"model": "demo:latest", "messages": user("Hi"), "options": {"temperature": 0, "num_thread": 4},
        "keep_alive": "5m"});
    let answer = server.post("/api/chat", &chat).await;
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    assert_eq!(answer.header("x-quire-ignored-params"), "");
    let parts = lines(&answer);
    let text: String = parts.iter().filter_map(|part| part["message"]["content"].as_str()).collect();
    assert_eq!(text, SAID);
    assert_eq!(parts.iter().filter(|part| part["done"] == true).count(), 1);
    let last = parts.last().expect("lines");
    assert_eq!((&last["done"], &last["done_reason"]), (&json!(true), &json!("stop")));
    assert!(last["eval_count"].as_u64() > Some(3) && last["prompt_eval_count"].as_u64() > Some(0));

    let whole = server.post("/api/chat", &with(chat, json!({"stream": false}))).await.json();
    assert_eq!((&whole["message"]["content"], &whole["done"]), (&json!(SAID), &json!(true)));
    let generate = json!({"model": "demo", "prompt": "Hi", "stream": false, "options": {"num_predict": 1}});
    let whole = server.post("/api/generate", &generate).await.json();
    assert_eq!((whole["response"].as_str(), whole["done_reason"].as_str()), (Some("a"), Some("length")));
    let raw = server.post("/api/generate", &with(generate.clone(), json!({"raw": true}))).await.json();
    assert!(raw["prompt_eval_count"].as_u64() < whole["prompt_eval_count"].as_u64());
    let gap = server.post("/api/generate", &with(generate, json!({"suffix": "end"}))).await;
    assert_eq!(gap.status, 200);
    let loaded = server.post("/api/generate", &json!({"model": "demo"})).await.json();
    assert_eq!((&loaded["done"], &loaded["done_reason"]), (&json!(true), &json!("load")));

    assert_eq!(server.get("/api/tags").await.json()["models"][0]["name"], "demo");
    assert_eq!(server.get("/api/ps").await.json()["models"][0]["name"], "demo");
    let shown = server.post("/api/show", &json!({"model": "demo"})).await.json();
    assert_eq!(shown["capabilities"], json!(["completion", "insert"]));
    assert!(server.get("/api/version").await.json()["version"].is_string());

    for (path, body, named) in [
        ("/api/chat", json!({"model": "demo", "messages": user("Hi"), "format": 5}), "format"),
        ("/api/chat", json!({"model": "demo", "messages": user("Hi"), "tools": [{}]}), "tools"),
        (
            "/api/chat",
            json!({"model": "demo", "messages": user("Hi"), "options": {"num_ctx": 1_000_000_000_000u64}}),
            "num_ctx",
        ),
        ("/api/chat", json!({"model": "demo", "messages": user("Hi"), "options": {"mirostat": 1}}), "mirostat"),
        ("/api/generate", json!({"model": "demo", "prompt": "x", "context": [1]}), "context"),
        ("/api/show", json!({}), "model"),
    ] {
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, 400, "{body}");
        assert!(answer.json()["error"].as_str().expect("text").contains(named), "{body}");
    }
    assert_eq!(server.post("/api/chat", &json!({"model": "other", "messages": user("Hi")})).await.status, 404);
}

#[tokio::test]
async fn editors_fill_gaps() {
    let server = Server::saying(SAID);
    let infill = json!({"input_prefix": "Once ", "input_suffix": " end.", "prompt": "there", "n_predict": 20,
        "input_extra": [{"filename": "a.txt", "text": "A story."}], "cache_prompt": true});
    let whole = server.post("/infill", &infill).await;
    assert_eq!(whole.header("x-quire-ignored-params"), "");
    let whole = whole.json();
    assert_eq!((&whole["content"], &whole["stop"], &whole["stop_type"]), (&json!(SAID), &json!(true), &json!("eos")));
    let parts = data(&server.post("/infill", &with(infill.clone(), json!({"stream": true}))).await);
    let text: String = parts.iter().filter_map(|part| part["content"].as_str()).collect();
    assert_eq!(text, SAID);
    assert_eq!(parts.iter().filter(|part| part["stop"] == true).count(), 1);
    assert_eq!(parts.last().expect("parts")["stop"], true);
    let refused = server.post("/infill", &with(infill.clone(), json!({"input_suffix": null}))).await;
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (StatusCode::BAD_REQUEST, json!(400)));
    assert_eq!(server.post("/infill", &with(infill, json!({"mirostat": 2}))).await.status, 400);

    let fim = json!({"model": "demo", "prompt": "Once ", "suffix": " end.", "max_tokens": 20, "random_seed": 5});
    let answer = server.post("/v1/fim/completions", &fim).await.json();
    assert_eq!((&answer["choices"][0]["message"]["content"], &answer["seed"]), (&json!(SAID), &json!(5)));
    assert_eq!(server.post("/v1/fim/completions", &json!({})).await.json()["object"], "error");

    // The suffix comes before the gap: the prompt has both texts, and the tokens between them.
    let completion = json!({"prompt": "Once ", "suffix": " end.", "return_token_ids": true});
    let answer = server.post("/v1/completions", &completion).await.json();
    let ids: Vec<u32> = serde_json::from_value(answer["choices"][0]["prompt_token_ids"].clone()).expect("ids");
    assert_eq!((ids[0], *ids.last().expect("tokens")), (3, 5));
    assert!(ids.contains(&4));
    // Nobody writes those tokens in words.
    for text in ["<|fim_middle|>", "<|fim_suffix|>"] {
        let answer = server.post("/v1/completions", &with(completion.clone(), json!({"prompt": text}))).await;
        let ids: Vec<u32> = match answer.status.as_u16() {
            400 => continue,
            _ => serde_json::from_value(answer.json()["choices"][0]["prompt_token_ids"].clone()).expect("ids"),
        };
        assert_eq!(ids.iter().filter(|id| (3..6).contains(*id)).count(), 3);
    }
}

#[tokio::test]
async fn responses_are_made_kept_and_gone_on_with() {
    let server = Server::saying(SAID);
    let body = json!({"model": "demo", "input": "Hi", "instructions": "Be brief.", "metadata": {"a": "b"}});
    let first = server.post("/v1/responses", &body).await;
    assert_eq!(first.header("x-quire-ignored-params"), "");
    let first = first.json();
    assert_eq!((&first["object"], &first["status"]), (&json!("response"), &json!("completed")));
    assert_eq!(first["output"][0]["content"][0]["text"], SAID);
    assert_eq!(first["metadata"]["a"], "b");
    let id = first["id"].as_str().expect("an id");
    assert_eq!(server.get(&format!("/v1/responses/{id}")).await.json(), first);

    let next = json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": "And?"}]}],
        "previous_response_id": id});
    let second = server.post("/v1/responses", &next).await.json();
    assert_eq!(second["previous_response_id"], id);
    let tokens = |response: &Value| response["usage"]["input_tokens"].as_u64().expect("a number");
    let alone = server.post("/v1/responses", &json!({"input": "And?"})).await.json();
    assert!(tokens(&second) > tokens(&alone) + 10, "{second}");
    // Instructions are not handed on.
    let with_instructions =
        server.post("/v1/responses", &with(next.clone(), json!({"instructions": "Be brief."}))).await;
    assert!(tokens(&with_instructions.json()) > tokens(&second));

    let deleted =
        server.send(axum::http::Request::delete(format!("/v1/responses/{id}")).body("".into()).unwrap()).await;
    assert_eq!((deleted.status, deleted.json()["deleted"].clone()), (StatusCode::OK, json!(true)));
    assert_eq!(server.get(&format!("/v1/responses/{id}")).await.status, 404);
    assert_eq!(server.post("/v1/responses", &next).await.json()["error"]["param"], "previous_response_id");
    let unkept = server.post("/v1/responses", &with(body, json!({"store": false}))).await.json();
    assert_eq!(server.get(&format!("/v1/responses/{}", unkept["id"].as_str().expect("an id"))).await.status, 404);
}

#[tokio::test]
async fn a_streamed_response_has_its_events_in_order_and_one_end() {
    let server = Server::saying(SAID);
    let body = json!({"input": "Hi", "stream": true, "include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let events = named(&server.post("/v1/responses", &body).await);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let start =
        ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"];
    assert_eq!(names[..4], start);
    let end =
        ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"];
    assert_eq!(names[names.len() - 4..], end);
    for (index, (name, data)) in events.iter().enumerate() {
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(index)));
    }
    let text: String = events.iter().filter_map(|(_, data)| data["delta"].as_str()).collect();
    assert_eq!(text, SAID);
    let response = &events.last().expect("events").1["response"];
    assert_eq!(response["output"][0]["content"][0]["text"], SAID);
    assert!(response["output"][0]["content"][0]["logprobs"][0]["top_logprobs"][0]["logprob"].is_number());
    // Kept as it ended.
    let id = response["id"].as_str().expect("an id");
    assert_eq!(&server.get(&format!("/v1/responses/{id}")).await.json(), response);

    let short = named(&server.post("/v1/responses", &with(body, json!({"max_output_tokens": 1}))).await);
    let (name, last) = short.last().expect("events");
    assert_eq!((name.as_str(), &last["response"]["status"]), ("response.incomplete", &json!("incomplete")));
}

#[tokio::test]
async fn responses_in_the_background_are_cancelled_and_those_whose_client_left_too() {
    let gate = Gate::closed();
    let server = Server::new(FakeExecutor::new(VOCAB).next_token(|_, _, _| 100).gated(&gate));
    let body = json!({"input": "Hi", "ignore_eos": true, "background": true});
    let queued = server.post("/v1/responses", &body).await.json();
    assert_eq!(queued["status"], "queued");
    let id = queued["id"].as_str().expect("an id");
    let next = server.post("/v1/responses", &json!({"input": "x", "previous_response_id": id})).await;
    assert_eq!(next.json()["error"]["param"], "previous_response_id");
    let cancel = server.post(&format!("/v1/responses/{id}/cancel"), &json!({})).await.json();
    assert_eq!(cancel["status"], "cancelled");
    gate.open();
    server.idle().await;
    assert_eq!(server.get(&format!("/v1/responses/{id}")).await.json()["status"], "cancelled");
    assert_eq!(server.post("/v1/responses/resp_x/cancel", &json!({})).await.status, 404);

    let streamed = json!({"input": "Hi", "ignore_eos": true, "stream": true}).to_string();
    let answer = server.router.clone().oneshot(post("/v1/responses", streamed)).await.expect("answers");
    let mut stream = answer.into_body().into_data_stream();
    let begin = String::from_utf8(stream.next().await.expect("begins").expect("a body").to_vec()).expect("UTF-8");
    let id = begin.split("\"id\":\"resp_").nth(1).and_then(|rest| rest.split('"').next()).expect("an id");
    drop(stream);
    server.idle().await;
    assert_eq!(server.get(&format!("/v1/responses/resp_{id}")).await.json()["status"], "cancelled");

    let done = Server::saying(SAID);
    let queued = done.post("/v1/responses", &json!({"input": "Hi", "background": true})).await.json();
    let path = format!("/v1/responses/{}", queued["id"].as_str().expect("an id"));
    done.idle().await;
    for _ in 0..1000 {
        if done.get(&path).await.json()["status"] == "completed" {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(done.get(&path).await.json()["output"][0]["content"][0]["text"], SAID);
}

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
    let server = Server::saying(SAID);
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
            "/v1/chat/completions" | "/v1/messages/count_tokens" | "/api/chat" => json!({"messages": user("Hi")}),
            "/v1/responses" => json!({"input": "Hi"}),
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
