//! OpenAI's responses: made, kept, gone on with, streamed, in the background, with tools and thoughts.

use axum::http::StatusCode;
use futures::StreamExt;
use quire_engine::testing::{FakeExecutor, Gate};
use quire_router::dialect::{ReasoningParserChoice, ToolParserChoice};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::harness::{Answer, SAID, Server, VOCAB, named, post, saying, with};

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

/// The output of a streamed response, put together as clients do; it is what the response at the end says.
fn streamed_output(answer: &Answer) -> Vec<Value> {
    let events = named(answer);
    let (mut output, mut open): (Vec<Value>, bool) = (Vec::new(), false);
    let append = |place: &mut Value, data: &Value| {
        *place = json!(place.as_str().expect("text").to_owned() + data["delta"].as_str().expect("a piece"));
    };
    for (index, (name, data)) in events.iter().enumerate() {
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(index)));
        if let Some(place) = data.get("output_index") {
            let expected = output.len() - usize::from(name != "response.output_item.added");
            assert_eq!((place, open), (&json!(expected), name != "response.output_item.added"), "{data}");
        }
        match name.as_str() {
            "response.output_item.added" => {
                output.push(data["item"].clone());
                open = true;
            }
            "response.content_part.added" => {
                let item = output.last_mut().expect("an item");
                assert_eq!(data["item_id"], item["id"]);
                item["content"].as_array_mut().expect("a list").push(data["part"].clone());
            }
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                append(&mut output.last_mut().expect("an item")["content"][0]["text"], data);
            }
            "response.function_call_arguments.delta" => {
                append(&mut output.last_mut().expect("an item")["arguments"], data);
            }
            "response.output_text.done" | "response.reasoning_text.done" => {
                assert_eq!(data["text"], output.last().expect("an item")["content"][0]["text"]);
            }
            "response.function_call_arguments.done" => {
                let item = output.last().expect("an item");
                assert_eq!((&data["arguments"], &data["name"]), (&item["arguments"], &item["name"]));
            }
            "response.output_item.done" => {
                let item = output.last_mut().expect("an item");
                item["status"] = data["item"]["status"].clone();
                assert_eq!(item, &data["item"]);
                open = false;
            }
            _ => {}
        }
    }
    let (name, last) = events.last().expect("events");
    assert!(!open && name == "response.completed", "{name}");
    assert_eq!(json!(output), last["response"]["output"]);
    output
}

/// Items without their identities.
fn items(output: &[Value]) -> Vec<Value> {
    let item = |item: &Value| match item["type"].as_str().expect("a type") {
        "function_call" => {
            assert!(item["id"] != item["call_id"] && item["status"] == "completed", "{item}");
            let arguments: Value = serde_json::from_str(item["arguments"].as_str().expect("text")).expect("JSON");
            json!([item["name"], arguments])
        }
        kind => json!([kind, item["content"][0]["text"]]),
    };
    output.iter().map(item).collect()
}

fn tools() -> Value {
    json!([{"type": "function", "name": "weather", "strict": true, "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
        "additionalProperties": false,
    }}, {"type": "function", "name": "time", "description": "Tells it."}])
}

#[tokio::test]
async fn calls_and_thoughts_are_items_and_are_gone_on_from() {
    let text = "<think>\nIt may rain.\n</think>\n\nLet me look. <tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}</tool_call>\
        <tool_call>{\"name\": \"time\"}</tool_call>";
    let server = Server::speaking(saying(text), ToolParserChoice::Auto, ReasoningParserChoice::Think);
    let body = json!({"input": "How is Rome?", "tools": tools(), "max_output_tokens": 200});
    let expected = [
        json!(["reasoning", "It may rain."]),
        json!(["message", "Let me look."]),
        json!(["weather", {"city": "Rome"}]),
        json!(["time", {}]),
    ];
    let first = server.post("/v1/responses", &body).await;
    assert_eq!((first.status, first.header("x-quire-ignored-params")), (StatusCode::OK, ""));
    let first = first.json();
    assert_eq!((&first["tools"], &first["tool_choice"]), (&tools(), &json!("auto")));
    assert!(first["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64().is_some_and(|count| count > 3));
    let output = first["output"].as_array().expect("items").clone();
    assert_eq!(items(&output), expected);
    let streamed = server.post("/v1/responses", &with(body.clone(), json!({"stream": true}))).await;
    assert_eq!(items(&streamed_output(&streamed)), expected);

    // Gone on from by its identity, or by all that was said.
    let results: Vec<Value> = output[2..]
        .iter()
        .map(|call| json!({"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}))
        .collect();
    let tokens = async |body: Value| {
        let answer = server.post("/v1/responses", &body).await;
        assert_eq!(answer.status, 200, "{:?}", answer.body);
        answer.json()["usage"]["input_tokens"].as_u64().expect("a number")
    };
    let by_id = tokens(json!({"previous_response_id": first["id"], "input": results, "tools": tools()})).await;
    let mut all = vec![json!({"role": "user", "content": "How is Rome?"})];
    all.extend(output.clone());
    all.extend(results.clone());
    assert_eq!(tokens(json!({"input": all, "tools": tools()})).await, by_id);
    let calls: Vec<Value> = output[2..]
        .iter()
        .map(|call| {
            let function = json!({"name": call["name"], "arguments": call["arguments"]});
            json!({"id": call["call_id"], "type": "function", "function": function})
        })
        .collect();
    let mut same = vec![
        json!({"role": "user", "content": "How is Rome?"}),
        json!({"role": "assistant", "content": "Let me look.", "reasoning": "It may rain.", "tool_calls": calls}),
    ];
    same.extend(
        output[2..].iter().map(|call| json!({"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"})),
    );
    let functions: Vec<Value> = tools()
        .as_array()
        .expect("tools")
        .iter()
        .map(|tool| {
            let mut function = tool.clone();
            for field in ["type", "strict"] {
                function.as_object_mut().expect("an object").remove(field);
            }
            json!({"type": "function", "function": function})
        })
        .collect();
    let counted = server.post("/tokenize", &json!({"messages": same, "tools": functions})).await.json();
    assert_eq!(counted["count"], json!(by_id));

    let one = with(body.clone(), json!({"parallel_tool_calls": false}));
    assert_eq!(items(server.post("/v1/responses", &one).await.json()["output"].as_array().expect("items")).len(), 3);
    // What is not done is named.
    let summary =
        json!({"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]});
    let answer = server.post("/v1/responses", &with(body, summary)).await;
    assert_eq!(
        answer.header("x-quire-ignored-params"),
        "reasoning.summary,include.reasoning.encrypted_content,reasoning.effort"
    );
}

#[tokio::test]
async fn a_response_calls_what_must_be_called() {
    let server = Server::speaking(FakeExecutor::new(VOCAB), ToolParserChoice::Hermes, ReasoningParserChoice::None);
    let mut num_calls = 0;
    for seed in 0..3 {
        let body = json!({"input": "Hi", "tools": tools(), "seed": seed, "max_output_tokens": 500,
            "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": false});
        let response = server.post("/v1/responses", &body).await.json();
        if response["status"] == "incomplete" {
            continue;
        }
        num_calls += 1;
        let output = items(response["output"].as_array().expect("items"));
        assert_eq!((output.len(), &output[0][0]), (1, &json!("weather")));
        assert!(output[0][1]["city"].as_str().is_some_and(|city| city.chars().count() <= 8), "{output:?}");
    }
    assert!(num_calls > 0, "no call was ever whole");
}

#[tokio::test]
async fn only_allowed_tools_are_called() {
    let server = Server::speaking(FakeExecutor::new(VOCAB), ToolParserChoice::Hermes, ReasoningParserChoice::None);
    for seed in 0..4 {
        let allowed =
            json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]});
        let body = json!({"input": "Hi", "tools": tools(), "seed": seed, "max_output_tokens": 200,
            "tool_choice": allowed, "parallel_tool_calls": false});
        let response = server.post("/v1/responses", &body).await.json();
        assert_eq!((&response["tools"], &response["tool_choice"]), (&tools(), &allowed));
        let names = response["output"].as_array().expect("items").iter().filter(|item| item["type"] == "function_call");
        assert!(names.into_iter().all(|item| item["name"] == "time"), "{response}");
    }
}

#[tokio::test]
async fn responses_are_refused_by_the_name_of_the_place() {
    let server = Server::saying(SAID);
    let secret = "a very private sentence";
    for (extra, named) in [
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "name": secret}]}), "tools[0].name"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": secret}]}), "tools[0].parameters"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": secret}), "tool_choice"),
        (json!({"tools": tools(), "tool_choice": {"type": "function", "name": "x"}}), "tool_choice"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
            "tool_choice.tools",
        ),
        (
            json!({"tools": tools(), "tool_choice": {"type": "allowed_tools", "mode": "auto",
                "tools": [{"type": "function", "name": "private"}]}}),
            "tool_choice.tools[0].name",
        ),
        (json!({"tools": tools(), "tool_choice": {"type": "allowed_tools", "tools": []}}), "tool_choice.mode"),
        (json!({"input": [{"type": "item_reference", "id": secret}]}), "input[0].type"),
        (json!({"input": [{"type": "function_call", "name": "f"}]}), "input[0].call_id"),
        (json!({"input": [{"type": "function_call", "name": secret, "call_id": "1"}]}), "input[0].name"),
        (json!({"input": [{"type": "function_call_output", "call_id": "1"}]}), "input[0].output"),
        (json!({"input": [{"type": "reasoning", "encrypted_content": secret}]}), "input[0].encrypted_content"),
        (json!({"input": [{"type": "reasoning", "content": [{"type": secret}]}]}), "input[0].content[0].type"),
    ] {
        let answer = server.post("/v1/responses", &with(json!({"input": "Hi"}), extra.clone())).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status.as_u16(), error["param"].as_str()), (400, Some(named)), "{extra}: {error}");
        assert!(!error["message"].as_str().expect("words").contains("private"), "{error}");
    }
}
