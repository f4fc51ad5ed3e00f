//! OpenAI's responses: made, streamed, made in the background, read again, gone on with, cancelled, deleted.

mod body;
mod events;
mod store;
mod wire;

use axum::extract::{FromRef, Path, Request, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::generation::{ChatInput, ChatMessage, Generation, GenerationService, Input, invalid};
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::random::request_id;

use super::answer::{Generations, json as to_json};
use super::ask::{Ask, json_response, name_ignored, whole};
use super::failure::Failure;
use super::fields::Ignored;
use super::receive::{Parsed, receive};
use super::stream::{SSE, streamed};

use body::ResponsesBody;
use events::ResponseStream;
use store::Store;
use wire::{Head, Slot, Status};

/// What the handlers of responses share beside the service.
#[derive(Clone)]
pub(super) struct Responses {
    service: GenerationService,
    store: Store,
}

impl Responses {
    pub(super) fn new(service: GenerationService) -> Self {
        let store = Store::new(service.limits());
        Self { service, store }
    }
}

impl FromRef<Responses> for GenerationService {
    fn from_ref(responses: &Responses) -> Self {
        responses.service.clone()
    }
}

/// `POST /v1/responses`
pub(super) async fn create(State(responses): State<Responses>, request: Request) -> Result<Response, Failure> {
    let Responses { service, store } = responses;
    let Parsed { service, body, share, .. } = receive::<ResponsesBody>(&service, Endpoint::Responses, request).await?;
    let ResponsesBody { background, stream, .. } = body;
    // Ids of clients are not always unique, and a response is found by its own.
    let id = format!("resp_{}", request_id());
    let keeps = body.store;
    let conversation = match conversation(&store, &body) {
        Ok(conversation) => conversation,
        Err(error) => {
            RequestMetrics::start(Endpoint::Responses).finish(Outcome::from(&error));
            return Err(error.into());
        }
    };
    let mut input = ChatInput { messages: conversation.clone(), ..body.input };
    if let Some(instructions) = &body.instructions {
        let content = instructions.clone();
        input.messages.insert(0, ChatMessage { role: "system".to_owned(), content, ..ChatMessage::default() });
    }
    let defaults = service.model().defaults();
    let mut head = Head {
        id: id.clone(),
        created: 0,
        model: service.model().name().to_owned(),
        seed: 0,
        background,
        store: keeps,
        instructions: body.instructions,
        max_output_tokens: body.max_output_tokens,
        metadata: body.metadata,
        said: body.said,
        previous: body.previous,
        temperature: body.params.temperature.or(defaults.temperature).unwrap_or(1.0),
        top_p: body.params.top_p.or(defaults.top_p).unwrap_or(1.0),
        top_logprobs: body.top_logprobs,
        wants_logprobs: body.params.logprobs.is_some(),
    };
    let ask = Ask {
        endpoint: Endpoint::Responses,
        request_id: id.clone(),
        model: body.model,
        input: Input::Chat(input),
        params: body.params,
    };
    let generation = ask.start(&service).await?;
    drop(share);
    head.created = generation.created;
    head.seed = generation.seed as i64;
    let slot = keeps.then(|| {
        let state = if background { Status::Queued } else { Status::InProgress };
        store.begin(&id, head.begun(state));
        let cancelled = head.failed(&ApiError::Cancelled);
        Slot { store, id, conversation, cancelled, is_finished: false }
    });
    if background {
        let begun = head.begun(Status::Queued);
        // Ends with its generation, which drains, deadlines and cancelling end too.
        tokio::spawn(finish(head, slot, generation));
        return Ok(json_response(to_json(&begun), &body.ignored));
    }
    if stream {
        let framing = ResponseStream::new(head, slot);
        let mut response = streamed(&service, Generations::new(vec![generation]), framing, SSE, 1).await?;
        name_ignored(&mut response, &body.ignored);
        return Ok(response);
    }
    let response = finish(head, slot, generation).await?;
    Ok(json_response(to_json(&response), &body.ignored))
}

/// What went before, and the input.
fn conversation(store: &Store, body: &ResponsesBody) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages = match &body.previous {
        None => Vec::new(),
        Some(id) => match store.get(id) {
            None => return Err(invalid("previous_response_id", "names no response that is kept")),
            Some(kept) => match kept.conversation {
                None => return Err(invalid("previous_response_id", "names a response that has not ended well")),
                Some(messages) => messages.to_vec(),
            },
        },
    };
    messages.extend_from_slice(&body.input.messages);
    Ok(messages)
}

/// Waits for a response's end and keeps it.
async fn finish(head: Head, mut slot: Option<Slot>, generation: Generation) -> Result<Value, ApiError> {
    match whole(generation).await {
        Ok(whole) => {
            let response = head.ended(&whole.items, &whole.cause, whole.usage);
            if let Some(slot) = &mut slot {
                slot.finish(&response, Some(&whole.items));
            }
            Ok(response)
        }
        Err(error) => {
            if let Some(slot) = &mut slot {
                slot.finish(&head.failed(&error), None);
            }
            Err(error)
        }
    }
}

fn kept(store: &Store, id: &str) -> Result<store::Kept, ApiError> {
    store.get(id).ok_or(ApiError::NotFound { what: "response" })
}

/// `GET /v1/responses/{id}`
pub(super) async fn get(State(responses): State<Responses>, Path(id): Path<String>) -> Result<Response, Failure> {
    let kept = kept(&responses.store, &id)?;
    Ok(json_response(to_json(&*kept.response), &Ignored::default()))
}

/// `DELETE /v1/responses/{id}`
pub(super) async fn delete(State(responses): State<Responses>, Path(id): Path<String>) -> Result<Response, Failure> {
    if !responses.store.delete(&id) {
        return Err(ApiError::NotFound { what: "response" }.into());
    }
    // Nobody could read what it would say.
    responses.service.abort(&id);
    let deleted = json!({"id": id, "object": "response", "deleted": true});
    Ok(json_response(to_json(&deleted), &Ignored::default()))
}

/// `POST /v1/responses/{id}/cancel`: ends a response that is still being made; one that has ended stays as it is.
pub(super) async fn cancel(State(responses): State<Responses>, Path(id): Path<String>) -> Result<Response, Failure> {
    let kept = kept(&responses.store, &id)?;
    let mut response = Value::clone(&kept.response);
    if responses.service.abort(&id) {
        response["status"] = json!("cancelled");
        responses.store.finish(&id, response.clone(), None);
    }
    Ok(json_response(to_json(&response), &Ignored::default()))
}
