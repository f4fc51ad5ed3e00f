//! What a request would be served as, without serving it.

use std::sync::Arc;

use crate::error::ApiError;
use crate::metrics::{Endpoint, Outcome, RequestMetrics};
use crate::random::request_id;

use super::service::{GenerationService, now_seconds};
use super::text::TextWork;
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
    /// The tokens that `input` would be served as with `params`, which are checked as [`Self::generate`] checks them before
    /// the engine sees them. What makes a grammar is refused: forms of answers, and calls that must be made.
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
        if let Input::Chat(chat) = &input
            && chat.must_call()
        {
            let must = "cannot be rendered where it asks for a call: that is no part of the prompt";
            return Err(invalid("tool_choice", must));
        }
        let (mut checked, num_bytes) = self.check(&input, params)?;
        let bad_words = std::mem::take(&mut checked.bad_words);
        let vocab_size = model.info().vocab_size;
        let work = TextWork::new(model, limits, now_seconds(), None);
        let encode = move || {
            let token_ids = work.encode(input)?.ids;
            // They are answered as the words that they are: only a refusal of them matters.
            work.encode_bad_words(&bad_words, vocab_size)?;
            Ok(token_ids)
        };
        let token_ids = self.pool().run(&id, num_bytes, encode).await?;
        let token_ids = self.fitted(token_ids, checked.truncation)?;
        let max_tokens = validate::output_len(token_ids.len(), &checked, model.info())?;
        Ok(Rendered { token_ids, max_tokens })
    }
}
