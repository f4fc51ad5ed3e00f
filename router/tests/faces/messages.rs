//! Anthropic's dialect: messages, whole and streamed, tools, thoughts, refusals.

use axum::http::StatusCode;
use quire_engine::testing::FakeExecutor;
use quire_router::dialect::{ReasoningParserChoice, ToolParserChoice};
use serde_json::{Value, json};

use crate::harness::{Answer, SAID, Server, VOCAB, named, saying, user, with};

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
        (json!({"tools": [{"name": secret}]}), 400, "invalid_request_error", "tools[0].input_schema"),
        (json!({"tools": [{"name": secret, "input_schema": {}}]}), 400, "invalid_request_error", "tools[0].name"),
        (
            json!({"tools": [{"name": "f", "input_schema": secret}]}),
            400,
            "invalid_request_error",
            "tools[0].input_schema",
        ),
        (json!({"tools": [{"type": "bash_1", "name": "bash"}]}), 400, "invalid_request_error", "tools[0].type"),
        (json!({"tool_choice": {"type": "any"}}), 400, "invalid_request_error", "tool_choice"),
        (json!({"tool_choice": {"type": secret}}), 400, "invalid_request_error", "tool_choice.type"),
        (
            json!({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool", "name": "g"}}),
            400,
            "invalid_request_error",
            "tool_choice",
        ),
        (json!({"thinking": {"type": secret}}), 400, "invalid_request_error", "thinking.type"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": secret}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].tool_use_id",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": secret}]}]}),
            400,
            "invalid_request_error",
            "messages[0].content[0].input",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]}),
            400,
            "invalid_request_error",
            "tool_result",
        ),
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

/// The content of a streamed message, put together as clients do: each block begins, comes in pieces, and ends before the next.
fn streamed_content(answer: &Answer) -> (Vec<Value>, Value) {
    let events = named(answer);
    let (mut blocks, mut input, mut open): (Vec<Value>, String, bool) = (Vec::new(), String::new(), false);
    let mut reason = Value::Null;
    for (name, data) in &events {
        match name.as_str() {
            "content_block_start" => {
                assert!(!open && data["index"] == json!(blocks.len()), "{data}");
                blocks.push(data["content_block"].clone());
                open = true;
            }
            "content_block_delta" => {
                assert!(open && data["index"] == json!(blocks.len() - 1), "{data}");
                let (block, delta) = (blocks.last_mut().expect("a block"), &data["delta"]);
                let (kind, field) = match block["type"].as_str().expect("a type") {
                    "text" => ("text_delta", "text"),
                    "thinking" => ("thinking_delta", "thinking"),
                    _ => ("input_json_delta", "partial_json"),
                };
                assert_eq!(delta["type"], kind);
                let piece = delta[field].as_str().expect("a piece");
                if kind == "input_json_delta" {
                    input.push_str(piece);
                } else {
                    block[field] = json!(block[field].as_str().expect("text").to_owned() + piece);
                }
            }
            "content_block_stop" => {
                assert!(std::mem::take(&mut open) && data["index"] == json!(blocks.len() - 1), "{data}");
                if !input.is_empty() {
                    blocks.last_mut().expect("a block")["input"] =
                        serde_json::from_str(&input).unwrap_or_else(|_| json!({"INVALID_JSON": input}));
                    input.clear();
                }
            }
            "message_delta" => reason = data["delta"]["stop_reason"].clone(),
            _ => {}
        }
    }
    assert!(!open && events.last().is_some_and(|(name, _)| name == "message_stop"));
    (blocks, reason)
}

/// Asks whole and streamed: both say the same. Identities of calls are new each time, and taken out.
async fn content(server: &Server, body: &Value) -> (Vec<Value>, Value) {
    let without_ids = |mut blocks: Vec<Value>| {
        for block in &mut blocks {
            if block["type"] == "tool_use" {
                assert!(!block["id"].as_str().expect("an id").is_empty());
                block["id"] = Value::Null;
            }
        }
        blocks
    };
    let answer = server.post("/v1/messages", body).await;
    assert_eq!(answer.status, 200, "{:?}", answer.body);
    let message = answer.json();
    let whole = without_ids(message["content"].as_array().expect("blocks").clone());
    let streamed = server.post("/v1/messages", &with(body.clone(), json!({"stream": true}))).await;
    let (blocks, reason) = streamed_content(&streamed);
    assert_eq!((without_ids(blocks), &reason), (whole.clone(), &message["stop_reason"]));
    (whole, reason)
}

fn tools() -> Value {
    json!([{"name": "weather", "description": "Says how it will be.", "input_schema": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
        "additionalProperties": false,
    }}, {"type": "custom", "name": "time", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}])
}

#[tokio::test]
async fn calls_and_thoughts_are_blocks_in_order() {
    let text = "<think>\nIt may rain.\n</think>\n\nLet me look. <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}</tool_call>\
        <tool_call>{\"name\": \"time\"}</tool_call>";
    let server = Server::speaking(saying(text), ToolParserChoice::Auto, ReasoningParserChoice::Think);
    let base = json!({"max_tokens": 200, "messages": user("Hi"), "tools": tools()});
    let thinking = json!({"type": "thinking", "thinking": "It may rain.", "signature": ""});
    let said = json!({"type": "text", "text": "Let me look."});
    let call = |name: &str, input: Value| json!({"type": "tool_use", "id": null, "name": name, "input": input});
    let calls = [call("weather", json!({"city": "Rome"})), call("time", json!({}))];
    let (blocks, reason) = content(&server, &base).await;
    assert_eq!((&blocks[..2], &blocks[2..]), (&[thinking.clone(), said.clone()][..], &calls[..]));
    assert_eq!(reason, "tool_use");
    let usage = server.post("/v1/messages", &base).await.json()["usage"].clone();
    assert!(usage["output_tokens_details"]["thinking_tokens"].as_u64().is_some_and(|count| count > 3), "{usage}");

    let one = json!({"tool_choice": {"type": "auto", "disable_parallel_tool_use": true}});
    assert_eq!(content(&server, &with(base.clone(), one)).await.0, [thinking.clone(), said.clone(), calls[0].clone()]);
    let omitted = json!({"thinking": {"type": "adaptive", "display": "omitted"}});
    assert_eq!(content(&server, &with(base.clone(), omitted)).await.0[0], said);
    // Where none may be called, all but the thought is text.
    let none = json!({"tool_choice": {"type": "none"}});
    let (blocks, reason) = content(&server, &with(base.clone(), none)).await;
    assert_eq!((blocks.len(), &blocks[0], &reason), (2, &thinking, &json!("end_turn")));
    // What is not enforced is named, and what the template does not read.
    let budget = json!({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"}});
    let answer = server.post("/v1/messages", &with(base, budget)).await;
    assert_eq!(answer.header("x-quire-ignored-params"), "thinking.budget_tokens,output_config.effort,thinking");
    server.idle().await;
}

#[tokio::test]
async fn a_call_that_must_be_made_is_made() {
    let server = Server::speaking(FakeExecutor::new(VOCAB), ToolParserChoice::Hermes, ReasoningParserChoice::None);
    let mut num_calls = 0;
    for seed in 0..3 {
        let choice = json!({"type": if seed == 0 { "any" } else { "tool" }, "name": "weather", "disable_parallel_tool_use": true});
        let body =
            json!({"max_tokens": 500, "messages": user("Hi"), "tools": tools(), "seed": seed, "tool_choice": choice});
        let (blocks, reason) = content(&server, &body).await;
        if reason == "max_tokens" {
            continue;
        }
        num_calls += 1;
        assert_eq!((blocks.len(), &blocks[0]["type"], &reason), (1, &json!("tool_use"), &json!("tool_use")));
        if seed > 0 {
            assert!(blocks[0]["input"]["city"].as_str().is_some_and(|city| city.chars().count() <= 8), "{blocks:?}");
        }
    }
    assert!(num_calls > 0, "no call was ever whole");
}

/// Blocks become the messages that OpenAI's dialect would have had.
#[tokio::test]
async fn calls_and_results_are_read_as_openai_has_them() {
    let server = Server::saying("x");
    let messages = json!([
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}},
            {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
            {"type": "tool_result", "tool_use_id": "toolu_2"},
            {"type": "text", "text": "So?"},
        ]},
    ]);
    let same = json!([
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": "Let me look.", "reasoning_content": "Hm.", "tool_calls": [
            {"id": "toolu_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}},
            {"id": "toolu_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": ""},
        {"role": "user", "content": "So?"},
    ]);
    let functions: Vec<Value> = tools()
        .as_array()
        .expect("tools")
        .iter()
        .map(|tool| {
            let mut function = json!({"name": tool["name"], "parameters": tool["input_schema"]});
            if tool["description"].is_string() {
                function["description"] = tool["description"].clone();
            }
            json!({"type": "function", "function": function})
        })
        .collect();
    let count = async |path: &str, field: &str, body: Value| server.post(path, &body).await.json()[field].clone();
    let counted =
        count("/v1/messages/count_tokens", "input_tokens", json!({"messages": messages, "tools": tools()})).await;
    assert_eq!(counted, count("/tokenize", "count", json!({"messages": same, "tools": functions})).await);
    let without = count("/v1/messages/count_tokens", "input_tokens", json!({"messages": messages})).await;
    assert!(without.as_u64() < counted.as_u64(), "{without} and {counted}");

    let failed = json!([{"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "1", "is_error": true, "content": "no"}, {"type": "text", "text": "?"}]}]);
    let answer = server.post("/v1/messages", &json!({"max_tokens": 2, "messages": failed})).await;
    assert_eq!((answer.status, answer.header("x-quire-ignored-params")), (StatusCode::OK, "content[].is_error"));
}
