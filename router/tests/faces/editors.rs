//! What editors ask: gaps to be filled, in llama.cpp's, Mistral's and OpenAI's dialects.

use axum::http::StatusCode;
use serde_json::json;

use crate::harness::{SAID, Server, data, with};

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
    for (form, filled) in [
        (json!({"grammar": "root ::= \"[\" [0-9]{2} \"]\"", "json_schema": {}}), 4),
        (json!({"json_schema": {"type": "array", "maxItems": 0}, "grammar": ""}), 2),
    ] {
        let formed = server.post("/infill", &with(infill.clone(), form.clone())).await.json();
        let content = formed["content"].as_str().expect("text");
        assert!(content.starts_with('[') && content.ends_with(']') && content.len() == filled, "{form}: {content}");
    }
    for (form, named) in [
        (json!({"grammar": "root ::= \"[\" [0-9"}), "`grammar`: cannot be read at line 1, column 14"),
        (json!({"grammar": "root ::= \"x\"", "json_schema": {"type": "null"}}), "json_schema"),
        (json!({"json_schema": 5}), "json_schema"),
    ] {
        let refused = server.post("/infill", &with(infill.clone(), form)).await;
        let error = refused.json();
        assert!(refused.status == 400 && error["error"]["message"].as_str().expect("words").contains(named), "{error}");
    }
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
