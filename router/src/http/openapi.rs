//! What the face serves, described: `/openapi.json` for programs, `/docs` for people. The page is made here from the document
//! and asks nobody for anything: no script, no font, no address but its own.

use std::fmt::Write as _;
use std::sync::LazyLock;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::answer::json as to_json;

/// A field of a body: its name, its JSON type (several behind `|`), and what it means.
type Field = (&'static str, &'static str, &'static str);

struct Operation {
    method: &'static str,
    path: &'static str,
    tag: &'static str,
    about: &'static str,
    /// Those of a body that must be there come first.
    num_required: usize,
    fields: &'static [&'static [Field]],
    /// Content types of what comes back.
    answers: &'static [&'static str],
}

const JSON: &str = "application/json";
const SSE: &str = "text/event-stream";

/// Sampling, as OpenAI's and vLLM's clients name it.
const SAMPLING: &[Field] = &[
    ("temperature", "number", "0 chooses the most likely token; at most 2"),
    ("top_p", "number", "Share of probability that is drawn from: above 0 and at most 1"),
    ("top_k", "integer", "Tokens that are drawn from; -1 and 0 are all"),
    ("min_p", "number", "Least probability, relative to the most likely token's"),
    ("typical_p", "number", "Share of probability of typical tokens"),
    ("repetition_penalty", "number", "1 is none; 0.01 to 2"),
    ("presence_penalty", "number", "-2 to 2"),
    ("frequency_penalty", "number", "-2 to 2"),
    ("seed", "integer", "The same request with the same seed gives the same answer"),
    ("stop", "string|array", "Texts that end the answer"),
    ("stop_token_ids", "array", "Tokens that end it"),
    ("include_stop_str_in_output", "boolean", "Whether the text that ended it is part of it"),
    ("ignore_eos", "boolean", "Goes on behind the model's end of sequence"),
    ("min_tokens", "integer", "Nothing ends the answer before so many tokens"),
    ("logit_bias", "object", "Token ids to what is added to their logits, -100 to 100"),
    ("allowed_token_ids", "array", "Tokens that may be chosen"),
    ("bad_words", "array", "Texts that are never said"),
    ("skip_special_tokens", "boolean", "Whether special tokens are left out of the text"),
    ("priority", "integer", "Lower is earlier, among a tenant's own"),
    ("service_tier", "string", "auto, default, flex or priority: a priority, where none is given"),
    ("cache_salt", "string", "Blocks are shared only with requests of the same salt"),
    ("truncate_prompt_tokens", "integer", "Most tokens of the prompt; -1 is what fits"),
    ("truncation_side", "string", "left (the default) or right: which end is cut off"),
    ("n", "integer", "Choices"),
    ("prompt_logprobs", "integer", "Log probabilities of the prompt's tokens, and so many likeliest beside each"),
];

/// What chat and completions have beside it.
const COMMON: &[Field] = &[
    ("model", "string", "The served model's name"),
    ("stream", "boolean", "Answers as tokens come"),
    ("stream_options", "object", "include_usage, continuous_usage_stats"),
    ("stream_interval", "integer", "Tokens between two chunks"),
    ("response_format", "object", "text, json_object, json_schema or structural_tag"),
    ("structured_outputs", "object", "json, regex, choice, grammar, json_object or structural_tag"),
    ("request_id", "string", "[A-Za-z0-9._-]{1,128}; also the header x-request-id"),
    ("return_token_ids", "boolean", "Tokens beside the text"),
    ("return_tokens_as_token_ids", "boolean", "Names tokens of log probabilities by their ids"),
    ("user", "string", "A label"),
    ("metadata", "object", "Labels"),
];

const CHAT: &[Field] = &[
    ("messages", "array", "The conversation: role and content"),
    ("max_completion_tokens", "integer", "Most tokens of a choice"),
    ("max_tokens", "integer", "The same, by its older name"),
    ("logprobs", "boolean", "Log probabilities of the answer's tokens"),
    ("top_logprobs", "integer", "So many likeliest beside each"),
    ("add_generation_prompt", "boolean", "Whether the prompt ends where an answer begins"),
    ("continue_final_message", "boolean", "Goes on with the last message"),
    ("add_special_tokens", "boolean", "Whether the tokenizer adds its own"),
    ("chat_template_kwargs", "object", "enable_thinking"),
    ("tools", "array", "Functions that the model may call: type and function"),
    ("tool_choice", "string|object", "none, auto, required, or the function that is called"),
    ("parallel_tool_calls", "boolean", "Whether an answer may have more than one call"),
    ("reasoning_effort", "string", "How much the model thinks, where its template reads it; none is not at all"),
    ("include_reasoning", "boolean", "Whether an answer has the reasoning beside the content; true by default"),
    ("documents", "array", "Objects that templates for retrieval write into the prompt"),
];

const COMPLETIONS: &[Field] = &[
    ("prompt", "string|array", "A text, token ids, or a list of either"),
    ("suffix", "string", "What comes behind the gap that is filled"),
    ("max_tokens", "integer", "Most tokens of a choice; 16 by default"),
    ("echo", "boolean", "The prompt is part of the text"),
    ("best_of", "integer", "Must equal n"),
    ("logprobs", "integer", "Log probabilities, and so many likeliest beside each"),
    ("add_special_tokens", "boolean", "Whether the tokenizer adds its own"),
];

const RESPONSES: &[Field] = &[
    ("input", "string|array", "A text, or items: message, reasoning, function_call, function_call_output"),
    ("model", "string", "The served model's name"),
    ("instructions", "string", "A system message; not handed on"),
    ("previous_response_id", "string", "Goes on from a kept response"),
    ("max_output_tokens", "integer", "Most tokens of the answer"),
    ("top_logprobs", "integer", "Likeliest tokens beside each"),
    ("include", "array", "message.output_text.logprobs"),
    ("text", "object", "format: text, json_object or json_schema"),
    ("tools", "array", "Functions that the model may call: type, name and parameters"),
    ("tool_choice", "string|object", "none, auto, required, or the function that is called"),
    ("parallel_tool_calls", "boolean", "Whether an answer may have more than one call"),
    ("reasoning", "object", "effort: how much the model thinks, where its template reads it"),
    ("metadata", "object", "Labels that come back"),
    ("store", "boolean", "Whether the response is kept; true by default"),
    ("background", "boolean", "Answers at once, and is read later"),
    ("stream", "boolean", "Answers in events"),
    ("stream_options", "object", "include_obfuscation: without an effect"),
    ("truncation", "string", "disabled"),
    ("user", "string", "A label"),
];

const MESSAGES: &[Field] = &[
    ("messages", "array", "The conversation: user and assistant; a last message of assistant is gone on with"),
    ("model", "string", "The served model's name"),
    ("system", "string|array", "What goes before the conversation"),
    ("tools", "array", "What the model may call: name and input_schema"),
    ("tool_choice", "object", "type: none, auto, any or tool; disable_parallel_tool_use"),
    ("thinking", "object", "type: enabled, disabled or adaptive; display"),
    ("output_config", "object", "format: json_schema; effort"),
];

const MESSAGES_SAMPLING: &[Field] = &[
    ("temperature", "number", "0 chooses the most likely token"),
    ("top_p", "number", "Above 0 and at most 1"),
    ("top_k", "integer", "Tokens that are drawn from"),
    ("stop_sequences", "array", "Texts that end the answer"),
    ("stream", "boolean", "Answers in events"),
    ("metadata", "object", "user_id: a label"),
    ("service_tier", "string", "auto or standard_only"),
];

const MAX_TOKENS: &[Field] = &[("max_tokens", "integer", "Most tokens of the answer")];

const FIM: &[Field] = &[
    ("prompt", "string", "What comes before the gap"),
    ("suffix", "string", "What comes behind it"),
    ("random_seed", "integer", "Mistral's name of seed"),
];

const INFILL: &[Field] = &[
    ("input_prefix", "string", "What comes before the gap"),
    ("input_suffix", "string", "What comes behind it"),
    ("prompt", "string", "What the gap begins with"),
    ("input_extra", "array", "Other files: filename and text"),
    ("n_predict", "integer", "Most tokens; -1 is until the end"),
    ("repeat_penalty", "number", "llama.cpp's name of repetition_penalty"),
    ("grammar", "string", "What fills the gap, in GBNF"),
    ("json_schema", "object", "Or a schema of it"),
    ("stream", "boolean", "Answers in pieces"),
    ("model", "string", "The served model's name"),
];

const OLLAMA: &[Field] = &[
    ("model", "string", "The served model's name"),
    ("stream", "boolean", "One JSON object a line; true by default"),
    ("format", "string|object", "json, or a schema"),
    (
        "options",
        "object",
        "num_predict, temperature, top_k, top_p, min_p, typical_p, repeat_penalty, stop, seed, num_ctx",
    ),
    ("keep_alive", "string|number", "Without an effect: the model stays"),
    ("think", "boolean|string", "Whether the model thinks first, or how much: low, medium or high"),
];

const OLLAMA_CHAT: &[Field] = &[
    ("messages", "array", "The conversation: role, content, thinking, tool_calls, tool_name"),
    ("tools", "array", "Functions that the model may call: type and function"),
];
const OLLAMA_GENERATE: &[Field] = &[
    ("prompt", "string", "What the user says, or where raw what is continued"),
    ("system", "string", "What goes before it"),
    ("suffix", "string", "What comes behind the gap that is filled"),
    ("raw", "boolean", "Without the chat template"),
];

const TOKENIZE: &[Field] = &[
    ("prompt", "string", "A text; or"),
    ("messages", "array", "a conversation"),
    ("model", "string", "The served model's name"),
    ("add_special_tokens", "boolean", "Whether the tokenizer adds its own"),
    ("return_token_strs", "boolean", "Texts of the tokens"),
];

const DETOKENIZE: &[Field] = &[("tokens", "array", "Token ids"), ("model", "string", "The served model's name")];

/// What all requests for vectors and scores have.
const POOLING: &[Field] = &[
    ("model", "string", "The served model's name"),
    ("truncate_prompt_tokens", "integer", "Most tokens of a text, whose end is cut off; -1 is the model's length"),
    ("request_id", "string", "[A-Za-z0-9._-]{1,128}; also the header x-request-id"),
    ("user", "string", "A label"),
];

const EMBEDDINGS: &[Field] = &[
    ("input", "string|array", "A text, token ids, or a list of either"),
    ("encoding_format", "string", "float (the default) or base64: little-endian f32"),
    ("dimensions", "integer", "The first so many numbers of each vector"),
    ("add_special_tokens", "boolean", "Whether the tokenizer adds its own"),
    ("prompt_name", "string", "Which of the model's prompts stands before each text"),
    ("normalize", "boolean", "Must be what the model does"),
];

const RERANK: &[Field] = &[
    ("query", "string", "The question"),
    ("documents", "array", "Texts, or objects with a text"),
    ("top_n", "integer", "So many of the best; 0 is all"),
    ("return_documents", "boolean", "Whether texts come back; true by default"),
];

const SCORE: &[Field] = &[
    ("text_1", "string|array", "One text, or as many as text_2; also queries"),
    ("text_2", "string|array", "Texts; also documents"),
];

const POOLING_TASK: &[Field] =
    &[("task", "string", "embed or classify; must be what the model does, which it is by default")];

const CLASSIFY: &[Field] = &[
    ("input", "string|array", "A text, token ids, or a list of either"),
    ("add_special_tokens", "boolean", "Whether the tokenizer adds its own"),
];

const COHERE_EMBED: &[Field] = &[
    ("texts", "array", "Texts"),
    ("model", "string", "The served model's name"),
    (
        "input_type",
        "string",
        "search_query, search_document, classification or clustering, where the model has a prompt for it",
    ),
    ("embedding_types", "array", "float (the default), binary, ubinary, base64"),
    ("output_dimension", "integer", "The first so many numbers of each vector"),
    ("truncate", "string", "END (the default) cuts longer texts, NONE refuses them"),
    ("max_tokens", "integer", "Most tokens of a text"),
];

const OLLAMA_EMBED: &[Field] = &[
    ("model", "string", "The served model's name"),
    ("input", "string|array", "A text, or a list of texts"),
    ("truncate", "boolean", "Whether longer texts are cut; true by default"),
    ("dimensions", "integer", "The first so many numbers of each vector"),
    ("keep_alive", "string|number", "Without an effect: the model stays"),
];

const fn get(
    tag: &'static str,
    path: &'static str,
    about: &'static str,
    answers: &'static [&'static str],
) -> Operation {
    Operation { method: "get", path, tag, about, num_required: 0, fields: &[], answers }
}

const fn post(
    tag: &'static str,
    path: &'static str,
    about: &'static str,
    num_required: usize,
    fields: &'static [&'static [Field]],
    answers: &'static [&'static str],
) -> Operation {
    Operation { method: "post", path, tag, about, num_required, fields, answers }
}

const OPERATIONS: [Operation; 44] = [
    post("OpenAI", "/v1/chat/completions", "Answers a conversation", 1, &[CHAT, COMMON, SAMPLING], &[JSON, SSE]),
    post(
        "OpenAI",
        "/v1/completions",
        "Continues prompts, or fills a gap",
        1,
        &[COMPLETIONS, COMMON, SAMPLING],
        &[JSON, SSE],
    ),
    post("OpenAI", "/v1/responses", "Answers, and keeps the response", 1, &[RESPONSES, SAMPLING], &[JSON, SSE]),
    get("OpenAI", "/v1/responses/{id}", "A kept response", &[JSON]),
    Operation { method: "delete", ..get("OpenAI", "/v1/responses/{id}", "Forgets a response, and ends it", &[JSON]) },
    post("OpenAI", "/v1/responses/{id}/cancel", "Ends a response that is still being made", 0, &[], &[JSON]),
    post("OpenAI", "/v1/embeddings", "Vectors of texts", 1, &[EMBEDDINGS, POOLING], &[JSON]),
    post("Texts", "/v1/rerank", "Which documents answer a question", 2, &[RERANK, POOLING], &[JSON]),
    post("Texts", "/v2/rerank", "The same as /v1/rerank", 2, &[RERANK, POOLING], &[JSON]),
    post("Texts", "/rerank", "The same as /v1/rerank", 2, &[RERANK, POOLING], &[JSON]),
    post("Texts", "/v1/score", "How near pairs of texts are", 0, &[SCORE, POOLING], &[JSON]),
    post("Texts", "/score", "The same as /v1/score", 0, &[SCORE, POOLING], &[JSON]),
    post("Texts", "/v2/embed", "Cohere's: vectors of texts in several forms", 1, &[COHERE_EMBED], &[JSON]),
    post(
        "Texts",
        "/pooling",
        "Vectors of texts, or how likely labels are",
        1,
        &[EMBEDDINGS, POOLING_TASK, POOLING],
        &[JSON],
    ),
    post("Texts", "/classify", "Labels of texts", 1, &[CLASSIFY, POOLING], &[JSON]),
    get("OpenAI", "/v1/models", "What is served", &[JSON]),
    get("OpenAI", "/v1/models/{*id}", "One model", &[JSON]),
    post(
        "Anthropic",
        "/v1/messages",
        "Answers a conversation",
        1,
        &[MAX_TOKENS, MESSAGES, MESSAGES_SAMPLING],
        &[JSON, SSE],
    ),
    post("Anthropic", "/v1/messages/count_tokens", "Tokens of a conversation", 1, &[MESSAGES], &[JSON]),
    post(
        "Code",
        "/v1/fim/completions",
        "Mistral's: fills a gap",
        1,
        &[FIM, MAX_TOKENS, COMMON, SAMPLING],
        &[JSON, SSE],
    ),
    post("Code", "/infill", "llama.cpp's: fills a gap", 2, &[INFILL, MAX_TOKENS, SAMPLING], &[JSON, SSE]),
    post("Ollama", "/api/chat", "Answers a conversation", 0, &[OLLAMA_CHAT, OLLAMA], &["application/x-ndjson", JSON]),
    post("Ollama", "/api/generate", "Answers a prompt", 0, &[OLLAMA_GENERATE, OLLAMA], &["application/x-ndjson", JSON]),
    post("Ollama", "/api/embed", "Vectors of texts", 2, &[OLLAMA_EMBED], &[JSON]),
    get("Ollama", "/api/tags", "What is served", &[JSON]),
    post("Ollama", "/api/show", "One model", 1, &[&[("model", "string", "Its name")]], &[JSON]),
    get("Ollama", "/api/ps", "What is loaded", &[JSON]),
    get("Ollama", "/api/version", "The server's version", &[JSON]),
    post("Tokens", "/tokenize", "Tokens of a text or a conversation", 0, &[TOKENIZE], &[JSON]),
    post(
        "Tokens",
        "/v1/chat/completions/render",
        "What a conversation would be served as, in tokens",
        1,
        &[CHAT, COMMON, SAMPLING],
        &[JSON],
    ),
    post(
        "Tokens",
        "/v1/completions/render",
        "What prompts would be served as, in tokens",
        1,
        &[COMPLETIONS, COMMON, SAMPLING],
        &[JSON],
    ),
    post("Tokens", "/detokenize", "The text of tokens", 1, &[DETOKENIZE], &[JSON]),
    get("Tokens", "/tokenizer_info", "The tokenizer's configuration and the chat template", &[JSON]),
    get("Operations", "/load", "Requests in flight", &[JSON]),
    get("Operations", "/version", "The server's version", &[JSON]),
    get("Operations", "/openapi.json", "This description", &[JSON]),
    get("Operations", "/docs", "This description, to be read", &["text/html"]),
    get("Operations", "/health", "Whether a request sent now would be served", &[JSON]),
    get("Operations", "/health/live", "Whether the process does its work", &[JSON]),
    get("Operations", "/health/ready", "Whether a request sent now would be served", &[JSON]),
    get("Operations", "/health/startup", "Whether the model is loaded", &[JSON]),
    get("Operations", "/ping", "The same as /health", &[JSON]),
    post("Operations", "/ping", "The same as /health", 0, &[], &[JSON]),
    get("Operations", "/metrics", "Metrics for Prometheus", &["text/plain"]),
];

/// The document, made once.
static DOCUMENT: LazyLock<Value> = LazyLock::new(document);
static DOCUMENT_JSON: LazyLock<Bytes> = LazyLock::new(|| to_json(&*DOCUMENT).into());
static PAGE: LazyLock<Bytes> = LazyLock::new(|| page(&DOCUMENT).into());

fn document() -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for operation in &OPERATIONS {
        let content = |kinds: &[&str], schema: Value| -> Value {
            kinds.iter().map(|kind| ((*kind).to_owned(), json!({"schema": schema}))).collect::<Map<_, _>>().into()
        };
        let mut described = json!({
            "operationId": format!("{} {}", operation.method, operation.path),
            "tags": [operation.tag],
            "summary": operation.about,
            "responses": {
                "200": {"description": "The answer", "content": content(operation.answers, json!({}))},
                "default": {"description": "Why there is none, in the shape of the dialect: 400 names the field, 404 an \
                    unknown model, 413 and 415 the body, 429 and 503 when to try again", "content": content(&[JSON], json!({"type": "object"}))},
            },
        });
        // The path's own names, without the mark of one that takes the rest.
        let names = operation.path.split('{').skip(1).filter_map(|part| part.split('}').next());
        let parameters: Vec<Value> = names
            .map(|name| json!({"name": name.trim_start_matches('*'), "in": "path", "required": true, "schema": {"type": "string"}}))
            .collect();
        if !parameters.is_empty() {
            described["parameters"] = parameters.into();
        }
        if !operation.fields.is_empty() {
            let fields = || operation.fields.iter().flat_map(|fields| fields.iter());
            let properties: Map<String, Value> = fields()
                .map(|(name, kind, about)| {
                    let kinds: Vec<&str> = kind.split('|').chain(["null"]).collect();
                    ((*name).to_owned(), json!({"type": kinds, "description": about}))
                })
                .collect();
            let required: Vec<&str> = fields().take(operation.num_required).map(|(name, _, _)| *name).collect();
            let schema = json!({"type": "object", "properties": properties, "required": required});
            described["requestBody"] = json!({"required": true, "content": content(&[JSON], schema)});
        }
        let path = operation.path.replace("{*", "{");
        paths.entry(path).or_insert_with(|| json!({}))[operation.method] = described;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Quire",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Fields that are not known are named in the header x-quire-ignored-params, or refused where \
                `limits.strict` or the header x-quire-strict says so; fields that are known and not served are refused by name.",
        },
        "paths": paths,
    })
}

/// The document as a page.
fn page(document: &Value) -> String {
    let text = |value: &Value| escaped(value.as_str().unwrap_or_default());
    let mut html = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Quire</title><style>body{font:16px/1.5 sans-serif;\
         max-width:60rem;margin:2rem auto;padding:0 1rem}code{font:14px monospace}td{padding:0 1rem 0 0;vertical-align:top}\
         summary{cursor:pointer}</style>",
    );
    let info = &document["info"];
    // Writing to a string cannot fail.
    let _ = write!(
        html,
        "<h1>{} {}</h1><p>{}</p>",
        text(&info["title"]),
        text(&info["version"]),
        text(&info["description"])
    );
    for (path, methods) in document["paths"].as_object().into_iter().flatten() {
        for (method, described) in methods.as_object().into_iter().flatten() {
            let tag = text(&described["tags"][0]);
            let _ = write!(
                html,
                "<details><summary><code>{} {}</code> {} ({tag})</summary>",
                method.to_uppercase(),
                escaped(path),
                text(&described["summary"])
            );
            let schema = &described["requestBody"]["content"][JSON]["schema"];
            let required: Vec<&str> =
                schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            html.push_str("<table>");
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                let needed = if required.contains(&name.as_str()) { " (needed)" } else { "" };
                let kinds: Vec<&str> = field["type"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .filter(|kind| *kind != "null")
                    .collect();
                let (name, about) = (escaped(name), text(&field["description"]));
                let _ = write!(html, "<tr><td><code>{name}</code>{needed}<td>{}<td>{about}", kinds.join(" or "));
            }
            html.push_str("</table></details>");
        }
    }
    html
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn response(content_type: &'static str, body: &Bytes) -> Response {
    let mut response = Response::new(Body::from(body.clone()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    );
    response
}

/// `GET /openapi.json`
pub(super) async fn described() -> Response {
    response(JSON, &DOCUMENT_JSON)
}

/// `GET /docs`
pub(super) async fn docs() -> Response {
    response("text/html; charset=utf-8", &PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_and_nothing_else() {
        let mut served = crate::http::listed();
        let mut described: Vec<_> = OPERATIONS.iter().map(|operation| (operation.method, operation.path)).collect();
        served.sort_unstable();
        described.sort_unstable();
        assert_eq!(served, described);
    }

    #[test]
    fn the_page_asks_nobody_for_anything() {
        let page = page(&document());
        assert!(page.contains("/v1/chat/completions") && page.contains("prompt_logprobs"));
        for outside in ["http:", "https:", "src=", "href=", "<script", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}
