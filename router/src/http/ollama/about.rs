//! What Ollama's clients are told of the model.

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::generation::GenerationService;
use crate::http::answer::json as to_json;
use crate::http::ask::json_response;
use crate::http::failure::Failure;
use crate::http::fields::Ignored;
use crate::http::receive::{Parsed, receive};
use crate::metrics::Endpoint;
use crate::served_model::ServedModel;
use crate::served_models::Runner;
use crate::telemetry::format_time;

use super::body::ShowBody;

fn details(model: &ServedModel) -> Value {
    let info = model.info();
    let family = info.architecture.split("For").next().unwrap_or_default().to_ascii_lowercase();
    json!({
        "parent_model": "",
        "format": "quire",
        "family": family,
        "families": [family],
        "parameter_size": format!("{:.1}M", info.num_parameters as f64 / 1e6),
        "quantization_level": info.weight_format,
    })
}

fn entry(model: &ServedModel) -> Value {
    let info = model.info();
    json!({
        "name": model.name(),
        "model": model.name(),
        "modified_at": format_time(model.created(), 0),
        "size": info.weight_bytes,
        "digest": info.digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        "details": details(model),
    })
}

/// `GET /api/tags`
pub(in crate::http) async fn tags(State(service): State<GenerationService>) -> Response {
    let models: Vec<Value> = service.models().iter().map(|served| entry(&served.model)).collect();
    json_response(to_json(&json!({"models": models})), &Ignored::default())
}

/// `GET /api/ps`
pub(in crate::http) async fn running(State(service): State<GenerationService>) -> Response {
    let running = |model: &ServedModel| {
        let mut running = entry(model);
        // It is never unloaded.
        running["expires_at"] = json!("9999-12-31T23:59:59Z");
        running["size_vram"] = json!(0);
        running["context_length"] = json!(model.info().max_model_len);
        running
    };
    let models: Vec<Value> = service.models().iter().map(|served| running(&served.model)).collect();
    json_response(to_json(&json!({"models": models})), &Ignored::default())
}

/// `POST /api/show`
pub(in crate::http) async fn show(
    State(service): State<GenerationService>,
    request: Request,
) -> Result<Response, Failure> {
    let Parsed { service, body, .. } = receive::<ShowBody>(&service, Endpoint::OllamaGenerate, request).await?;
    let model = service.model();
    let mut capabilities = match service.runner() {
        Runner::Generates(_) => vec!["completion"],
        Runner::Pools(_) => vec!["embedding"],
    };
    if model.chat_template().is_some() {
        capabilities.push("tools");
    }
    if model.dialects().reasoning.is_some() {
        capabilities.push("thinking");
    }
    if model.fim().is_some() {
        capabilities.push("insert");
    }
    let defaults = serde_json::to_value(model.defaults()).unwrap_or_default();
    let parameters: Vec<String> = defaults
        .as_object()
        .map(|defaults| defaults.iter().map(|(name, value)| format!("{name} {value}")).collect())
        .unwrap_or_default();
    let info = model.info();
    let answer = json!({
        "modelfile": "",
        "parameters": parameters.join("\n"),
        "template": "",
        "details": details(model),
        "model_info": {
            "general.architecture": info.architecture,
            "general.parameter_count": info.num_parameters,
            "quire.context_length": info.max_model_len,
            "quire.vocab_size": info.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": format_time(model.created(), 0),
    });
    Ok(json_response(to_json(&answer), &body.ignored))
}

/// `GET /api/version`
pub(in crate::http) async fn version() -> Response {
    json_response(to_json(&json!({"version": env!("CARGO_PKG_VERSION")})), &Ignored::default())
}
