//! What a request would be served as, without serving it.

use std::sync::Arc;

use crate::error::ApiError;
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::random::request_id;

use super::service::{GenerationService, now_seconds};
use super::text::{TextWork, check_input};
use super::validate::{self, invalid};
use super::{GenerationParams, Input};

/// A prompt as the model would read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    pub token_ids: Arc<[u32]>,
    /// Most tokens of an answer.
    pub max_tokens: u32,
}

impl GenerationService {
    /// The tokens that `input` would be served as with `params`, which are checked as [`Self::generate`] checks them.
    pub async fn render(&self, input: Input, params: GenerationParams) -> Result<Rendered, ApiError> {
        let metrics = RequestMetrics::start(Endpoint::Render);
        let rendered = self.render_as(input, params).await;
        metrics.finish(rendered.as_ref().map_or_else(Outcome::from, |_| Outcome::Finished));
        rendered
    }

    async fn render_as(&self, input: Input, params: GenerationParams) -> Result<Rendered, ApiError> {
        let (model, limits) = (self.model(), self.limits());
        let id = request_id();
        let _entered = self.inflight().enter(&id)?;
        if let Some(format) = &params.format {
            return Err(invalid(format.param, "cannot be rendered: it is no part of the prompt"));
        }
        let checked = validate::check(params, model.defaults(), limits, model.info())?;
        let num_bytes = check_input(&input, model, limits)?;
        let work = TextWork::new(model, limits, now_seconds(), None);
        let token_ids = self.pool().run(&id, num_bytes, move || Ok(work.encode(input)?.ids)).await?;
        let token_ids = self.fitted(token_ids, checked.truncation)?;
        let max_tokens = validate::output_len(token_ids.len(), &checked, model.info())?;
        Ok(Rendered { token_ids, max_tokens })
    }
}
