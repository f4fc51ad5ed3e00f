//! Ollama's dialect: chat and generate, in lines or whole, tools, thoughts.

use quire_router::dialect::{ReasoningParserChoice, ToolParserChoice};
use serde_json::{Value, json};

use crate::harness::{SAID, Server, lines, saying, user, with};

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
    assert_eq!(shown["capabilities"], json!(["completion", "tools", "insert"]));
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

/// What a chat said, whole or line by line: text, thought, and calls by name and arguments.
fn said(messages: &[Value]) -> (String, String, Vec<Value>) {
    let all = |field: &str| messages.iter().filter_map(|message| message[field].as_str()).collect::<String>();
    let calls = messages.iter().filter_map(|message| message["tool_calls"].as_array()).flatten();
    let calls = calls.zip(0..).map(|(call, index)| {
        assert_eq!(call["function"]["index"], json!(index));
        assert!(!call["id"].as_str().expect("an id").is_empty());
        json!([call["function"]["name"], call["function"]["arguments"]])
    });
    (all("content"), all("thinking"), calls.collect())
}

#[tokio::test]
async fn ollama_calls_and_thinks() {
    let text = "<think>\nIt may rain.\n</think>\n\nLet me look. <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}</tool_call>\
        <tool_call>{\"name\": \"time\"}</tool_call>";
    let server = Server::speaking(saying(text), ToolParserChoice::Auto, ReasoningParserChoice::Think);
    let tools = json!([
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
        {"type": "function", "function": {"name": "time"}},
    ]);
    let body = json!({"messages": user("Hi"), "tools": tools});
    let expected = (
        "Let me look.".to_owned(),
        "It may rain.".to_owned(),
        vec![json!(["weather", {"city": "Rome"}]), json!(["time", {}])],
    );
    let whole = server.post("/api/chat", &with(body.clone(), json!({"stream": false}))).await.json();
    assert_eq!(said(&[whole["message"].clone()]), expected);
    assert_eq!(whole["done_reason"], "stop");
    let streamed: Vec<Value> =
        lines(&server.post("/api/chat", &body).await).iter().map(|line| line["message"].clone()).collect();
    assert_eq!(said(&streamed), expected);
    let generated = server.post("/api/generate", &json!({"prompt": "Hi", "stream": false})).await.json();
    assert_eq!(generated["thinking"], "It may rain.");
    let shown = server.post("/api/show", &json!({"model": "demo"})).await.json();
    let capabilities = shown["capabilities"].as_array().expect("a list");
    assert!(["tools", "thinking"].iter().all(|able| capabilities.contains(&json!(able))), "{shown}");

    // The template reads nothing of it, which is said.
    for think in [json!(true), json!(false), json!("high")] {
        let answer = server.post("/api/chat", &with(body.clone(), json!({"think": think}))).await;
        assert_eq!(answer.header("x-quire-ignored-params"), "think");
    }
    for (extra, named) in [
        (json!({"think": "much"}), "think"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}),
            "messages[0].tool_calls[0].function.name",
        ),
        (json!({"messages": [{"role": "user", "images": ["x"]}]}), "messages[0].images"),
    ] {
        let refused = server.post("/api/chat", &with(body.clone(), extra)).await;
        assert_eq!(refused.status, 400);
        let error = refused.json();
        assert!(error["error"].as_str().is_some_and(|message| message.contains(named)), "{error}");
    }
}

/// Calls and results without identities become the messages that OpenAI's dialect would have had.
#[tokio::test]
async fn ollama_conversations_with_calls_are_read() {
    let server = Server::saying("x");
    let messages = json!([
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
        ]},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]);
    let same = json!([
        {"role": "user", "content": "How is Rome?"},
        {"role": "assistant", "content": "", "reasoning": "Hm.", "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}
        ]},
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"},
    ]);
    let answer = server.post("/api/chat", &json!({"messages": messages, "stream": false})).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-quire-ignored-params")), (200, ""));
    let counted = server.post("/tokenize", &json!({"messages": same})).await.json();
    assert_eq!(answer.json()["prompt_eval_count"], counted["count"]);
}
