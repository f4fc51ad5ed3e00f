//! The one table of routes. It is a list as well as a router, so that what is served and what is described can be compared.

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodRouter, delete, get, post};

use super::responses::Responses;
use super::{cohere, embeddings, infill, messages, ollama, openai, openapi, pooling, render, rerank, responses};

/// Routes with their methods, in the order of the table.
pub(super) struct Routes {
    router: Router<Responses>,
    listed: Vec<(&'static str, &'static str)>,
}

impl Routes {
    fn add(mut self, method: &'static str, path: &'static str, route: MethodRouter<Responses>) -> Self {
        self.listed.push((method, path));
        Self { router: self.router.route(path, route), listed: self.listed }
    }

    fn get<T: 'static>(self, path: &'static str, handler: impl Handler<T, Responses>) -> Self {
        self.add("get", path, get(handler))
    }

    fn post<T: 'static>(self, path: &'static str, handler: impl Handler<T, Responses>) -> Self {
        self.add("post", path, post(handler))
    }

    fn delete<T: 'static>(self, path: &'static str, handler: impl Handler<T, Responses>) -> Self {
        self.add("delete", path, delete(handler))
    }

    pub(super) fn into_router(self) -> Router<Responses> {
        self.router
    }
}

/// Every route of the face but those of [`super::health`].
pub(super) fn all() -> Routes {
    Routes { router: Router::new(), listed: Vec::new() }
        .post("/v1/chat/completions", openai::chat)
        .post("/v1/completions", openai::completions)
        .post("/v1/chat/completions/render", render::chat)
        .post("/v1/completions/render", render::completions)
        .post("/v1/embeddings", embeddings::create)
        .post("/v1/rerank", rerank::rerank)
        .post("/v2/rerank", rerank::rerank)
        .post("/rerank", rerank::rerank)
        .post("/v1/score", rerank::score)
        .post("/score", rerank::score)
        .post("/v2/embed", cohere::embed)
        .post("/pooling", pooling::pooling)
        .post("/classify", pooling::classify)
        .post("/v1/responses", responses::create)
        .get("/v1/responses/{id}", responses::get)
        .delete("/v1/responses/{id}", responses::delete)
        .post("/v1/responses/{id}/cancel", responses::cancel)
        .get("/v1/models", openai::models)
        .get("/v1/models/{*id}", openai::model)
        .post("/v1/messages", messages::create)
        .post("/v1/messages/count_tokens", messages::count_tokens)
        .post("/v1/fim/completions", openai::fim)
        .post("/infill", infill::infill)
        .post("/api/chat", ollama::chat)
        .post("/api/generate", ollama::generate)
        .post("/api/embed", ollama::embed)
        .get("/api/tags", ollama::tags)
        .post("/api/show", ollama::show)
        .get("/api/ps", ollama::running)
        .get("/api/version", ollama::version)
        .post("/tokenize", openai::tokenize)
        .post("/detokenize", openai::detokenize)
        .get("/tokenizer_info", openai::tokenizer_info)
        .get("/load", openai::load)
        .get("/version", openai::version)
        .get("/openapi.json", openapi::described)
        .get("/docs", openapi::docs)
}

/// Methods, in lower case, and paths of all routes, those of probes and metrics included.
pub fn listed() -> Vec<(&'static str, &'static str)> {
    let mut listed = all().listed;
    listed.extend(super::health::ROUTES);
    listed
}
