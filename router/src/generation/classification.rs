//! Labels of texts: what models with a classification head answer, for every face.

use std::sync::Arc;

use tracing::Instrument;

use crate::error::ApiError;
use crate::metrics::{Outcome, RequestMetrics};
use crate::served_models::Task;

use super::pooling::{PoolingRequest, PoolingText, Running, counted, num_tokens};
use super::service::GenerationService;

/// Texts whose labels are wanted.
#[derive(Clone, Debug)]
pub struct ClassifyRequest {
    pub request: PoolingRequest,
    pub inputs: Vec<PoolingText>,
    /// Named where something is wrong with one.
    pub param: &'static str,
    /// Whether the tokenizer adds its own to texts.
    pub add_special_tokens: bool,
}

/// How likely each label is, in the order of the texts.
#[derive(Clone, Debug, PartialEq)]
pub struct Classified {
    pub model: String,
    pub labels: Arc<[String]>,
    /// `[texts][labels]`
    pub probs: Vec<Vec<f32>>,
    pub num_tokens: u64,
}

impl Classified {
    /// The label of the largest of `probs`, of equal ones the first.
    pub fn label(&self, probs: &[f32]) -> Option<&str> {
        let best = probs.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b))?.0;
        self.labels.get(best).map(String::as_str)
    }
}

impl GenerationService {
    /// How likely each label of the model is for each text. Dropping the future cancels the request.
    pub async fn classify(&self, request: ClassifyRequest) -> Result<Classified, ApiError> {
        let metrics = RequestMetrics::start(request.request.endpoint);
        let span = tracing::debug_span!("request", request_id = request.request.request_id);
        let (classified, metrics) = self.classify_as(request, metrics).instrument(span).await?;
        metrics.finish(Outcome::Finished);
        Ok(classified)
    }

    async fn classify_as(
        &self,
        request: ClassifyRequest,
        metrics: RequestMetrics,
    ) -> Result<(Classified, RequestMetrics), ApiError> {
        let ClassifyRequest { request, inputs, param, add_special_tokens } = request;
        let done = async {
            let running = Running::begin(self, &request, Task::Classify)?;
            self.check_count(param, inputs.len())?;
            let encoder = running.encoder(&request, param)?;
            let encode = move || {
                let encode = |text| encoder.text(text, None, add_special_tokens);
                inputs.into_iter().map(encode).collect::<Result<Vec<_>, _>>()
            };
            let inputs = running.encode(&request.request_id, encode).await?;
            let num_tokens = num_tokens(&inputs);
            let probs = running.compute(inputs, &request.request_id, param).await?;
            let labels = Arc::clone(&running.engine.pooling().labels);
            Ok(Classified { model: running.service.model().name().to_owned(), labels, probs, num_tokens })
        };
        counted(done.await, metrics, |classified| classified.num_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_most_likely_labels_is_named() {
        let labels: Arc<[String]> = ["a", "b", "c"].map(str::to_owned).into();
        let classified = Classified { model: String::new(), labels, probs: Vec::new(), num_tokens: 0 };
        assert_eq!(classified.label(&[0.2, 0.4, 0.4]), Some("b"));
        assert_eq!(classified.label(&[0.9, 0.0, 0.1]), Some("a"));
        assert_eq!(classified.label(&[]), None);
    }
}
