//! HTTP and gRPC are two faces of one thing: the same request gives the same tokens through both, streamed or not.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::types::chat::{ChatCompletionRequestUserMessageArgs, CreateChatCompletionRequestArgs};
use async_openai::types::embeddings::{CreateEmbeddingRequestArgs, EmbeddingInput, EncodingFormat};
use futures::StreamExt;
use quire_proto::quire::v1::{
    ChatMessage, ChatRequest, EmbedRequest, GenerateRequest, SamplingParams, StoppingParams, Token, TokenIds,
};
use quire_proto::quire::v1::{generate_request::Prompt, stream_event::Event};
use quire_tests::{Server, sse_data};
use serde_json::{Value, json};

const QUESTION: &str = "Tell me a short story about a fox.";

fn question() -> Value {
    json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40, "temperature": 0.8, "seed": 11})
}

fn with(mut body: Value, key: &str, value: Value) -> Value {
    body[key] = value;
    body
}

fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

#[tokio::test]
async fn one_answer_through_every_face() {
    let server = Server::start(&[]).await;

    let whole = server.ask("/v1/chat/completions", &with(question(), "return_token_ids", json!(true))).await;
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().expect("text");
    let token_ids: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).expect("token ids");
    assert!(!text.is_empty() && !token_ids.is_empty(), "{whole}");
    assert_eq!(whole["usage"]["completion_tokens"], json!(token_ids.len()));

    // Streamed over HTTP.
    let mut streamed = with(question(), "stream", json!(true));
    streamed["stream_options"] = json!({"include_usage": true});
    let body = server.post("/v1/chat/completions", &streamed).await.text().await.expect("a body");
    let data = sse_data(&body);
    assert_eq!(data.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        data[..data.len() - 1].iter().map(|data| serde_json::from_str(data).expect("JSON")).collect();
    let pieces: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces, text);
    assert_eq!(chunks.last().expect("chunks")["usage"]["completion_tokens"], json!(token_ids.len()));

    // Through gRPC, whole and streamed.
    let sampling = SamplingParams { temperature: Some(0.8), seed: Some(11), ..Default::default() };
    let stopping = StoppingParams { max_tokens: Some(40), ..Default::default() };
    let message = ChatMessage { role: "user".to_owned(), content: QUESTION.to_owned(), ..Default::default() };
    let chat = ChatRequest {
        messages: vec![message],
        sampling: Some(sampling.clone()),
        stopping: Some(stopping.clone()),
        ..Default::default()
    };
    let mut grpc = server.quire().await;
    let answer = grpc.chat(chat.clone()).await.expect("an answer").into_inner();
    assert_eq!((answer.choices[0].text.as_str(), ids(&answer.choices[0].tokens)), (text, token_ids.clone()));
    let mut stream = grpc.chat_stream(chat).await.expect("a stream").into_inner();
    let (mut pieces, mut pieces_ids, mut num_done) = (String::new(), Vec::new(), 0);
    while let Some(event) = stream.message().await.expect("no error") {
        match event.event.expect("an event") {
            Event::Delta(delta) => {
                pieces.push_str(&delta.text);
                pieces_ids.extend(ids(&delta.tokens));
            }
            Event::Done(_) => num_done += 1,
            _ => {}
        }
    }
    assert_eq!((pieces.as_str(), &pieces_ids, num_done), (text, &token_ids, 1));

    // The same prompt as token ids through gRPC's Generate.
    let messages = json!({"messages": [{"role": "user", "content": QUESTION}]});
    let prompt: Vec<u32> =
        serde_json::from_value(server.ask("/tokenize", &messages).await["tokens"].clone()).expect("tokens");
    let generate = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: prompt })),
        sampling: Some(sampling),
        stopping: Some(stopping),
        ..Default::default()
    };
    let answer = grpc.generate(generate).await.expect("an answer").into_inner();
    assert_eq!(ids(&answer.choices[0].tokens), token_ids);
}

#[tokio::test]
async fn a_published_client_streams_a_chat() {
    let server = Server::start(&[]).await;
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.http)).with_api_key("none");
    let client = Client::with_config(config);
    let models = client.models().list().await.expect("a list");
    let model = models.data[0].id.clone();
    let message = ChatCompletionRequestUserMessageArgs::default().content("What is 2 + 3?").build().expect("a message");
    let request = CreateChatCompletionRequestArgs::default()
        .model(model)
        .messages([message.into()])
        .max_completion_tokens(20u32)
        .temperature(0.0)
        .build()
        .expect("a request");
    let whole = client.chat().create(request.clone()).await.expect("an answer");
    let text = whole.choices[0].message.content.clone().expect("text");
    let mut stream = client.chat().create_stream(request).await.expect("a stream");
    let mut pieces = String::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.expect("a chunk");
        pieces.extend(chunk.choices.first().and_then(|choice| choice.delta.content.clone()));
    }
    assert_eq!(pieces, text);
}

#[tokio::test]
async fn a_published_client_embeds_texts() {
    const EMBEDDER: &str = concat!("embed=", env!("CARGO_MANIFEST_DIR"), "/fixtures/embedders/bert-mean");
    const TEXTS: [&str; 2] = ["seven pages", "a fox"];
    let server = Server::start(&["--model", EMBEDDER]).await;
    let embed = |dimensions| EmbedRequest { texts: TEXTS.map(str::to_owned).into(), dimensions, ..Default::default() };
    let mut quire = server.quire().await;
    let config = OpenAIConfig::new().with_api_base(format!("{}/v1", server.http)).with_api_key("none");
    let client = Client::with_config(config);
    let request = || {
        let mut request = CreateEmbeddingRequestArgs::default();
        request.model("embed").input(TEXTS);
        request
    };

    let expected = quire.embed(embed(None)).await.expect("vectors").into_inner();
    let answer = client.embeddings().create(request().build().expect("a request")).await.expect("vectors");
    assert_eq!(u64::from(answer.usage.prompt_tokens), expected.prompt_tokens);
    assert_eq!(answer.data.len(), TEXTS.len());
    for (found, expected) in answer.data.iter().zip(&expected.embeddings) {
        assert_eq!(found.embedding, expected.values, "the same bits through both faces");
    }

    let base64 = request().encoding_format(EncodingFormat::Base64).build().expect("a request");
    let answer = client.embeddings().create_base64(base64).await.expect("vectors");
    for (found, expected) in answer.data.into_iter().zip(&expected.embeddings) {
        assert_eq!(Vec::<f32>::from(found.embedding), expected.values);
    }

    let expected = quire.embed(embed(Some(8))).await.expect("vectors").into_inner();
    let short = request().dimensions(8_u32).build().expect("a request");
    let answer = client.embeddings().create(short).await.expect("vectors");
    assert_eq!(answer.data[1].embedding, expected.embeddings[1].values);
    assert_eq!(answer.data[1].embedding.len(), 8);

    let tokens = EmbeddingInput::ArrayOfIntegerArray(vec![vec![1, 2, 3]]);
    let answer = client.embeddings().create(request().input(tokens).build().expect("a request")).await;
    assert_eq!(answer.expect("a vector").data.len(), 1);
    let unknown = client.embeddings().create(request().model("nobody").build().expect("a request")).await;
    assert!(unknown.expect_err("no such model").to_string().contains("nobody"));
}

#[tokio::test]
async fn completions_take_every_form_of_prompt() {
    let server = Server::start(&[]).await;
    let text = "Once upon a time";
    let settings = json!({"max_tokens": 8, "temperature": 0, "logprobs": 2});
    let ask = async |prompt: Value| server.ask("/v1/completions", &with(settings.clone(), "prompt", prompt)).await;
    let of = |answer: &Value, index: usize| answer["choices"][index]["text"].as_str().expect("text").to_owned();

    let plain = ask(json!(text)).await;
    let ids = server.ask("/tokenize", &json!({"prompt": text})).await["tokens"].clone();
    assert_eq!(of(&ask(ids.clone()).await, 0), of(&plain, 0));
    let several = ask(json!([text, "The fox"])).await;
    assert_eq!(several["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(of(&several, 0), of(&plain, 0));
    assert_eq!(of(&ask(json!([ids, ids])).await, 1), of(&plain, 0));

    // Equal prompts of one request are draws of their own, and repeatable.
    let drawn = json!({"prompt": [text, text], "max_tokens": 24, "temperature": 1, "seed": -7});
    let first = server.ask("/v1/completions", &drawn).await;
    let second = server.ask("/v1/completions", &drawn).await;
    assert_ne!(of(&first, 0), of(&first, 1));
    assert_eq!([of(&first, 0), of(&first, 1)], [of(&second, 0), of(&second, 1)]);
    assert_eq!(first["seed"], json!(-7));

    let mut echoed = with(settings.clone(), "prompt", json!(text));
    echoed["echo"] = json!(true);
    let echoed = server.ask("/v1/completions", &echoed).await;
    assert_eq!(of(&echoed, 0), format!("{text}{}", of(&plain, 0)));
    let first = &plain["choices"][0]["logprobs"];
    assert_eq!(first["token_logprobs"].as_array().map(Vec::len), Some(8));
    assert_eq!(server.ask("/detokenize", &json!({"tokens": ids})).await["prompt"], json!(text));
}
