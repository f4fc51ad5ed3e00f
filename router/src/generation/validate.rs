//! Ranges of every field, and the defaults of those that are absent.

use std::sync::Arc;

use quire_engine::ModelInfo;
use quire_scheduler::{SamplingParams, SubmitError as Refusal};

use crate::detokenizer::{SpecialTokenText, StopString};
use crate::error::ApiError;
use crate::served_model::GenerationDefaults;

use super::{GenerationParams, Keep, Limits, TruncateTo, Truncation};

/// Temperatures below this choose the most likely token: dividing logits by them would overflow.
const GREEDY_BELOW: f64 = 1e-5;
/// Most characters of a cache salt.
const MAX_CACHE_SALT_CHARS: usize = 1024;

/// Parameters that are in range, with every default in its place.
pub(super) struct Checked {
    /// All but `bad_words`, which are not tokens yet, and `seed`.
    pub(super) sampling: SamplingParams,
    pub(super) seed: Option<u64>,
    pub(super) max_tokens: Option<u32>,
    pub(super) min_tokens: u32,
    /// By another server, of the tokens that may be.
    pub(super) num_generated: usize,
    pub(super) bad_words: Vec<String>,
    pub(super) stops: Arc<[StopString]>,
    pub(super) include_stop: bool,
    /// Those of the request, then the model's own unless it ignores them.
    pub(super) stop_token_ids: Vec<u32>,
    pub(super) special_tokens: SpecialTokenText,
    /// Most tokens of the prompt.
    pub(super) truncation: Option<(usize, Keep)>,
}

/// A refusal that names the field and says what it must be.
pub(crate) fn invalid(param: &str, must: impl std::fmt::Display) -> ApiError {
    ApiError::InvalidRequest { param: Some(param.to_owned()), message: format!("`{param}` {must}") }
}

fn in_range(param: &str, value: Option<f64>, low: f64, high: f64, default: f64) -> Result<f32, ApiError> {
    let value = value.unwrap_or(default);
    // Not a number is in no range.
    if (low..=high).contains(&value) {
        Ok(value as f32)
    } else {
        Err(invalid(param, format_args!("must be between {low} and {high}")))
    }
}

/// Above 0 and at most 1: a share of probability.
fn share(param: &str, value: Option<f64>) -> Result<f32, ApiError> {
    let value = value.unwrap_or(1.0);
    if value > 0.0 && value <= 1.0 {
        Ok((value as f32).max(f32::MIN_POSITIVE))
    } else {
        Err(invalid(param, "must be above 0 and at most 1"))
    }
}

/// -1 and 0 keep all tokens.
fn top_k(value: Option<i64>, vocab_size: u32) -> Result<Option<u32>, ApiError> {
    match value {
        None | Some(-1 | 0) => Ok(None),
        Some(k) if k > 0 => Ok(Some(u32::try_from(k).map_or(vocab_size, |k| k.min(vocab_size)))),
        Some(_) => Err(invalid("top_k", "must be -1 or 0 (all tokens) or at least 1")),
    }
}

fn at_most(param: &str, value: u64, limit: u64) -> Result<u32, ApiError> {
    match u32::try_from(value) {
        Ok(small) if value <= limit => Ok(small),
        _ => Err(invalid(param, format_args!("must be at most {limit}"))),
    }
}

fn at_most_entries(param: &str, len: usize, limit: usize) -> Result<(), ApiError> {
    if len > limit {
        return Err(invalid(param, format_args!("must have at most {limit} entries")));
    }
    Ok(())
}

fn known_tokens(param: &str, ids: &[u32], vocab_size: u32) -> Result<(), ApiError> {
    if ids.iter().any(|id| *id >= vocab_size) {
        return Err(invalid(param, format_args!("must hold token ids below {vocab_size}")));
    }
    Ok(())
}

fn short_strings(param: &str, strings: &[String], limits: &Limits, max_entries: usize) -> Result<(), ApiError> {
    at_most_entries(param, strings.len(), max_entries)?;
    if strings.iter().any(String::is_empty) {
        return Err(invalid(param, "must not hold an empty string"));
    }
    if strings.iter().any(|string| string.len() > limits.max_stop_bytes) {
        return Err(invalid(param, format_args!("must hold strings of at most {} bytes", limits.max_stop_bytes)));
    }
    Ok(())
}

impl GenerationDefaults {
    /// The same ranges as for requests. Fails with the first value that is out of them.
    pub(crate) fn check(&self) -> Result<(), String> {
        let sampling = || -> Result<(), ApiError> {
            in_range("temperature", self.temperature, 0.0, 2.0, 1.0)?;
            share("top_p", self.top_p)?;
            share("typical_p", self.typical_p)?;
            in_range("min_p", self.min_p, 0.0, 1.0, 0.0)?;
            in_range("repetition_penalty", self.repetition_penalty, 0.01, 2.0, 1.0)?;
            top_k(self.top_k, u32::MAX)?;
            Ok(())
        };
        sampling().map_err(|error| error.to_string())
    }
}

/// Checks every field that can be checked before the prompt's tokens are known. Costs nothing that depends on a value.
pub(super) fn check(
    params: GenerationParams,
    defaults: &GenerationDefaults,
    limits: &Limits,
    model: &ModelInfo,
) -> Result<Checked, ApiError> {
    let vocab_size = model.vocab_size;
    let num_choices = params.n.unwrap_or(1);
    if num_choices == 0 {
        return Err(invalid("n", "must be at least 1"));
    }
    let num_choices = at_most("n", num_choices, limits.max_choices)?;
    if let Some(resume) = &params.resume {
        if num_choices != 1 {
            return Err(invalid("n", "must be 1 for a request that goes on with one choice"));
        }
        if params.seed.is_none_or(|seed| seed == -1) {
            return Err(invalid("seed", "is needed to go on: the one that the first answer named"));
        }
        at_most("choice_offset", u64::from(resume.choice_offset), limits.max_choices - 1)?;
        known_tokens("generated_token_ids", &resume.generated, vocab_size)?;
    }
    let max_tokens = match params.max_tokens {
        None => None,
        Some(0) => return Err(invalid("max_tokens", "must be at least 1")),
        Some(count) if count >= u64::from(model.max_model_len) => {
            return Err(ApiError::ContextTooLong {
                message: format!(
                    "`max_tokens` leaves no room for a prompt: the model's length is {} tokens",
                    model.max_model_len
                ),
            });
        }
        // Below `max_model_len`, which is a u32.
        Some(count) => Some(count as u32),
    };
    let min_tokens =
        at_most("min_tokens", params.min_tokens.unwrap_or(0), u64::from(max_tokens.unwrap_or(model.max_model_len)))?;

    let temperature = in_range("temperature", params.temperature.or(defaults.temperature), 0.0, 2.0, 1.0)?;
    let temperature = if f64::from(temperature) < GREEDY_BELOW { 0.0 } else { temperature };
    at_most_entries("logit_bias", params.logit_bias.len(), limits.max_logit_bias)?;
    if params.logit_bias.keys().any(|id| *id >= vocab_size) {
        return Err(invalid("logit_bias", format_args!("must name token ids below {vocab_size}")));
    }
    if !params.logit_bias.values().all(|bias| (-100.0..=100.0).contains(bias)) {
        return Err(invalid("logit_bias", "must hold values between -100 and 100"));
    }
    let allowed_token_ids = match params.allowed_token_ids {
        Some(ids) if ids.is_empty() => return Err(invalid("allowed_token_ids", "must not be empty")),
        Some(mut ids) => {
            known_tokens("allowed_token_ids", &ids, vocab_size)?;
            ids.sort_unstable();
            ids.dedup();
            Some(ids)
        }
        None => None,
    };
    short_strings("bad_words", &params.bad_words, limits, limits.max_bad_words)?;
    short_strings("stop", &params.stop, limits, limits.max_stop)?;
    at_most_entries("stop_token_ids", params.stop_token_ids.len(), limits.max_stop_token_ids)?;
    known_tokens("stop_token_ids", &params.stop_token_ids, vocab_size)?;
    let mut stop_token_ids = params.stop_token_ids;
    if !params.ignore_eos {
        stop_token_ids.extend(&model.eos_token_ids);
    }
    stop_token_ids.sort_unstable();
    stop_token_ids.dedup();
    if let Some(salt) = &params.cache_salt
        && !(1..=MAX_CACHE_SALT_CHARS).contains(&salt.chars().count())
    {
        return Err(invalid("cache_salt", format_args!("must have 1 to {MAX_CACHE_SALT_CHARS} characters")));
    }
    let truncation = match params.truncation {
        None => None,
        Some(Truncation { to, keep }) => {
            let len = match to {
                TruncateTo::Tokens(0) => return Err(invalid("truncate_prompt_tokens", "must be at least 1")),
                TruncateTo::Tokens(count) => at_most("truncate_prompt_tokens", count, u64::from(model.max_model_len))?,
                // `max_tokens` is below the model's length.
                TruncateTo::Fit => model.max_model_len - max_tokens.unwrap_or(1),
            };
            Some((len as usize, keep))
        }
    };
    let logprobs = |param, count: Option<u64>| {
        count.map(|count| at_most(param, count, limits.max_top_logprobs.min(u64::from(vocab_size)))).transpose()
    };

    let sampling = SamplingParams {
        temperature,
        top_k: top_k(params.top_k.or(defaults.top_k), vocab_size)?,
        top_p: share("top_p", params.top_p.or(defaults.top_p))?,
        min_p: in_range("min_p", params.min_p.or(defaults.min_p), 0.0, 1.0, 0.0)?,
        typical_p: share("typical_p", params.typical_p.or(defaults.typical_p))?,
        // Smaller penalties than 0.01 would turn logits into infinities.
        repetition_penalty: in_range(
            "repetition_penalty",
            params.repetition_penalty.or(defaults.repetition_penalty),
            0.01,
            2.0,
            1.0,
        )?,
        presence_penalty: in_range("presence_penalty", params.presence_penalty, -2.0, 2.0, 0.0)?,
        frequency_penalty: in_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0, 0.0)?,
        logit_bias: params.logit_bias.into_iter().map(|(id, bias)| (id, bias as f32)).collect(),
        allowed_token_ids,
        bad_words: Vec::new(),
        seed: 0,
        num_choices,
        logprobs: logprobs("logprobs", params.logprobs)?,
        prompt_logprobs: logprobs("prompt_logprobs", params.prompt_logprobs)?,
    };
    Ok(Checked {
        sampling,
        // -1 is how some clients say "none"; other negative seeds are seeds.
        seed: params.seed.filter(|seed| *seed != -1).map(|seed| seed as u64),
        max_tokens,
        min_tokens,
        num_generated: params.resume.map_or(0, |resume| resume.generated.len()),
        bad_words: params.bad_words,
        stops: params.stop.into_iter().map(StopString::new).collect(),
        include_stop: params.include_stop_str_in_output,
        stop_token_ids,
        special_tokens: match params.skip_special_tokens {
            Some(false) => SpecialTokenText::Written,
            Some(true) | None => SpecialTokenText::Skipped,
        },
        truncation,
    })
}

/// How many tokens a request may generate, now that its prompt's length is known.
pub(super) fn output_len(num_prompt_tokens: usize, checked: &Checked, model: &ModelInfo) -> Result<u32, ApiError> {
    if num_prompt_tokens == 0 {
        return Err(invalid("prompt", "must not be empty"));
    }
    let max_model_len = model.max_model_len;
    let room = u32::try_from(num_prompt_tokens).ok().and_then(|len| max_model_len.checked_sub(len)).unwrap_or(0);
    let max_tokens = checked.max_tokens.unwrap_or(room);
    if room == 0 || max_tokens > room {
        let message = match checked.max_tokens {
            Some(max_tokens) => format!(
                "the model's length is {max_model_len} tokens; the prompt has {num_prompt_tokens} and `max_tokens` is \
                 {max_tokens}"
            ),
            None => {
                format!("the model's length is {max_model_len} tokens and the prompt alone has {num_prompt_tokens}")
            }
        };
        return Err(ApiError::ContextTooLong { message });
    }
    if checked.num_generated > max_tokens as usize {
        return Err(invalid(
            "generated_token_ids",
            format_args!("must be at most the {max_tokens} tokens that can be generated"),
        ));
    }
    if checked.min_tokens > max_tokens {
        return Err(invalid(
            "min_tokens",
            format_args!("must be at most the {max_tokens} tokens that can be generated"),
        ));
    }
    Ok(max_tokens)
}

/// At least one: what Retry-After is counted in.
pub(super) fn whole_seconds(micros: u64) -> u64 {
    micros.div_ceil(1_000_000).max(1)
}

/// An engine's refusal, as clients see it.
pub(super) fn refusal(error: Refusal) -> ApiError {
    match error {
        Refusal::EmptyPrompt => invalid("prompt", "must not be empty"),
        Refusal::TooLong { num_tokens, max_model_len } => ApiError::ContextTooLong {
            message: format!("{num_tokens} tokens of prompt and output exceed the model's length of {max_model_len}"),
        },
        Refusal::QueueFull { retry_after_micros, .. } | Refusal::WaitTooLong { retry_after_micros, .. } => {
            ApiError::Overloaded { retry_after_seconds: whole_seconds(retry_after_micros) }
        }
        Refusal::Invalid { field, why } => invalid(field, why),
    }
}
