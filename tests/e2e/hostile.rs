//! Whatever a body holds, the answer is 200 or says what is wrong with it, and the server goes on.

use quire_tests::Server;
use serde_json::{Value, json};

/// Every field that a request of any endpoint has, and one that none has.
const FIELDS: &str = include_str!("../fixtures/request_fields.txt");

fn values() -> Vec<Value> {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    vec![
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(2147483648u64),
        json!(9223372036854775807i64),
        json!(18446744073709551615u64),
        json!(1e308),
        json!(-1e308),
        json!(0.5),
        json!(1e-320),
        json!(""),
        json!("1"),
        json!("<|im_end|>"),
        json!("\u{0}\u{1b}[31m\u{feff}\u{10ffff}"),
        json!("a".repeat(10_000)),
        json!([]),
        json!([null]),
        json!([[]]),
        json!([-1]),
        json!([4294967295u32]),
        json!(["", ""]),
        json!({}),
        json!({"1": 1}),
        json!({"x": "y"}),
        json!({"99999999": 100}),
        json!([{"role": "user"}]),
        json!([{"role": 5, "content": {}}]),
        json!([{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
        deep,
    ]
}

#[tokio::test]
async fn any_value_in_any_field() {
    let server = Server::start(&[]).await;
    let chat = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2});
    let completion = json!({"prompt": "Hello", "max_tokens": 2});
    let mut num_asked = 0;
    for (path, base) in [("/v1/chat/completions", chat), ("/v1/completions", completion)] {
        for field in FIELDS.lines() {
            for value in values() {
                let mut body = base.clone();
                body[field] = value;
                let response = server.post(path, &body).await;
                let status = response.status().as_u16();
                assert!(status == 200 || (400..500).contains(&status), "{path} {field}: {status}");
                let text = response.text().await.expect("the answer ends");
                if status != 200 {
                    let error: Value = serde_json::from_str(&text).expect("errors are JSON");
                    assert!(error["error"]["message"].is_string(), "{path} {field}: {error}");
                }
                num_asked += 1;
            }
        }
    }
    assert!(num_asked > 3000, "{num_asked}");
    server.ask("/v1/completions", &json!({"prompt": "Hello", "max_tokens": 2})).await;
    server.until("idle", Server::holds_nothing).await;
}

#[tokio::test]
async fn bodies_that_are_no_request() {
    let server = Server::start(&[]).await;
    let url = format!("{}/v1/chat/completions", server.http);
    let post = async |body: Vec<u8>, content_type: &str| {
        let request = server.client.post(&url).header("content-type", content_type).body(body);
        request.send().await.expect("an answer").status().as_u16()
    };
    for body in ["", "{", "null", "[]", "1", "\"x\"", "{\"messages\": }", "\u{feff}{}"] {
        assert_eq!(post(body.into(), "application/json").await, 400, "{body:?}");
    }
    assert_eq!(post(vec![0xff, 0xfe, 0x00], "application/json").await, 400);
    assert_eq!(post("[".repeat(100_000).into(), "application/json").await, 400);
    assert_eq!(post(vec![b' '; 9 << 20], "application/json").await, 413);
    assert_eq!(post("messages=1".into(), "application/x-www-form-urlencoded").await, 415);
    let status = server.client.get(&url).send().await.expect("an answer").status();
    assert_eq!(status, 405);
    // Lists far longer than they can mean anything.
    let many = vec![0; 1_000_000];
    let prompts = json!({"prompt": vec!["a"; 128], "max_tokens": 1, "allowed_token_ids": many});
    assert_eq!(server.post("/v1/completions", &prompts).await.status(), 400);
    assert_eq!(server.post("/detokenize", &json!({"tokens": many})).await.status(), 400);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": many, "echo": true})).await.status(), 400);
    server.ask("/v1/completions", &json!({"prompt": "Hello", "max_tokens": 1})).await;
}
