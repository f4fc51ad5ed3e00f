//! How every call that generates begins.

use std::time::Instant;

use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::error::ApiError;
use crate::generation::{Generation, GenerationRequest};
use crate::lifecycle::Lifecycle;
use crate::served_models::Task;

use super::convert;

/// Submits the request that `build` makes of the call's id and deadline. Also says the served model's name.
pub(super) async fn start(
    lifecycle: &Lifecycle,
    metadata: &MetadataMap,
    given_id: String,
    build: impl FnOnce(String, Option<Instant>) -> Result<GenerationRequest, ApiError>,
) -> Result<(Generation, String), Status> {
    let id = convert::request_id(given_id).map_err(|error| convert::status(&error, ""))?;
    let generation = async {
        let service = lifecycle.service()?;
        let deadline = convert::deadline(metadata, Instant::now())?;
        let request = build(id.clone(), deadline)?;
        let model = request.model.clone();
        let generation = service.generate(request).await?;
        let service = service.select(model.as_deref(), Task::Generate)?;
        Ok((generation, service.model().name().to_owned()))
    };
    generation.await.map_err(|error: ApiError| convert::status(&error, &id))
}
