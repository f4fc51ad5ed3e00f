//! Forms and tools with the demo model, which knows nothing of either.

use quire_tests::Server;
use serde_json::{Value, json};

fn ask(content: &str, seed: u64, extra: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": content}], "max_tokens": 200, "temperature": 0.8, "seed": seed
    });
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    body
}

#[tokio::test]
async fn outputs_of_a_schema_validate_and_are_the_same_in_any_company() {
    let server = Server::start(&["--scheduler.max-num-seqs", "4"]).await;
    let schemas = [
        json!({
            "type": "object", "required": ["name", "age"], "additionalProperties": false,
            "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 1, "maximum": 99}}
        }),
        json!({"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10}]}),
        json!({"$defs": {"tree": {"type": "object", "required": ["v"], "additionalProperties": false, "properties": {
            "v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"$ref": "#/$defs/tree"}}}}, "$ref": "#/$defs/tree"}),
    ];
    let bodies: Vec<(&Value, Value)> = schemas
        .iter()
        .flat_map(|schema| {
            let form = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, "logprobs": true});
            (0..3).map(move |seed| (schema, ask("Give me an example as JSON.", seed, form.clone())))
        })
        .collect();
    let mut alone = Vec::new();
    let mut num_whole = 0;
    for (schema, body) in &bodies {
        let choice = server.ask("/v1/chat/completions", body).await["choices"][0].clone();
        if choice["finish_reason"] == "stop" {
            num_whole += 1;
            let text = choice["message"]["content"].as_str().expect("text");
            let instance: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(jsonschema::is_valid(schema, &instance), "{schema}: {text}");
        }
        alone.push(choice);
    }
    assert!(num_whole >= bodies.len() / 2, "only {num_whole} of {} were whole", bodies.len());
    // All at once, beside requests without a form, on half as many rows.
    let free = ask("Tell me a short story about a fox.", 1, json!({}));
    let story = server.ask("/v1/chat/completions", &free).await["choices"][0].clone();
    let together = bodies.iter().map(|(_, body)| server.ask("/v1/chat/completions", body));
    let stories = (0..4).map(|_| server.ask("/v1/chat/completions", &free));
    let (together, stories) = futures::join!(futures::future::join_all(together), futures::future::join_all(stories));
    for (answer, alone) in together.iter().zip(&alone) {
        assert_eq!(&answer["choices"][0], alone);
    }
    assert!(stories.iter().all(|answer| answer["choices"][0] == story));
}

#[tokio::test]
async fn a_call_that_must_be_made_is_made() {
    let server = Server::start(&[]).await;
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {
        "type": "object", "required": ["a", "b"], "additionalProperties": false,
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "integer", "minimum": 0, "maximum": 99}}
    }}}]);
    let extra = json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false});
    let answer = server.ask("/v1/chat/completions", &ask("What is 7 + 5?", 3, extra)).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "add");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().expect("text")).expect("JSON");
    assert!(["a", "b"].into_iter().all(|name| arguments[name].as_u64().is_some_and(|n| n <= 99)), "{arguments}");
    // The result goes back, and the model answers.
    let history = json!([
        {"role": "user", "content": "What is 7 + 5?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "12"}
    ]);
    let answer = server.ask("/v1/chat/completions", &ask("", 4, json!({"messages": history, "tools": tools}))).await;
    assert!(!answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().is_empty(), "{answer}");
}
