//! Requests by the seed.

use std::ops::RangeInclusive;

use super::Rng;
use crate::{AdapterId, CacheSalt, Request, RequestId, SamplingParams, TenantId, Time};

/// A request with nothing special: one choice, tenant 0, no stop token.
#[must_use]
pub fn request(id: u64, prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        id: RequestId(id),
        tenant: TenantId::default(),
        adapter: None,
        priority: 0,
        cache_salt: CacheSalt::default(),
        prompt: prompt.into(),
        generated: Vec::new(),
        choice_offset: 0,
        sampling: SamplingParams { seed: id, ..SamplingParams::default() },
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        deadline: None,
    }
}

/// What requests look like. Lengths are in tokens.
#[derive(Clone, Debug)]
pub struct RequestMix {
    /// Behind the shared prefix, if any.
    pub prompt_len: RangeInclusive<u32>,
    /// `max_tokens`.
    pub max_tokens: RangeInclusive<u32>,
    /// Prompts begin with one of so many prefixes, or with none when it is 0.
    pub num_prefixes: u32,
    /// Of the shared prefixes.
    pub prefix_len: RangeInclusive<u32>,
    /// Tokens are below this.
    pub vocab_size: u32,
    /// Token ids below this are stop tokens.
    pub num_stop_tokens: u32,
    /// Most choices; half of the requests have one.
    pub max_choices: u32,
    /// Priorities are 0 to this.
    pub max_priority: u32,
    /// Tenants are 0 to this.
    pub max_tenant: u32,
    /// Requests in a thousand that have a deadline.
    pub deadline_per_mille: u32,
    /// How long after their arrival, in microseconds.
    pub deadline_micros: RangeInclusive<u32>,
    /// Requests in a thousand that continue what another replica began.
    pub resumed_per_mille: u32,
    /// Requests in a thousand that ask for the prompt's log probabilities.
    pub prompt_logprobs_per_mille: u32,
}

impl Default for RequestMix {
    /// Short prompts with much in common, so that every path is taken often.
    fn default() -> Self {
        Self {
            prompt_len: 1..=40,
            max_tokens: 1..=40,
            num_prefixes: 4,
            prefix_len: 4..=60,
            vocab_size: 64,
            num_stop_tokens: 1,
            max_choices: 4,
            max_priority: 2,
            max_tenant: 3,
            deadline_per_mille: 50,
            deadline_micros: 0..=200_000,
            resumed_per_mille: 50,
            prompt_logprobs_per_mille: 50,
        }
    }
}

/// Makes requests, the same for the same seed.
#[derive(Debug)]
pub struct Workload {
    mix: RequestMix,
    rng: Rng,
    prefixes: Vec<Vec<u32>>,
    next_id: u64,
}

impl Workload {
    /// Requests as `mix` says.
    #[must_use]
    pub fn new(mix: RequestMix, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let prefixes = (0..mix.num_prefixes).map(|_| {
            let len = rng.within(&mix.prefix_len);
            (0..len).map(|_| rng.below(mix.vocab_size)).collect()
        });
        let prefixes = prefixes.collect();
        Self { mix, rng, prefixes, next_id: 0 }
    }

    /// The next request. Its prompt and output fit into `max_model_len` tokens, at least 2.
    pub fn next_request(&mut self, now: Time, max_model_len: u32) -> Request {
        let (mix, rng) = (&self.mix, &mut self.rng);
        let mut prompt = match self.prefixes.len() {
            0 => Vec::new(),
            len => self.prefixes[rng.below(len as u32) as usize].clone(),
        };
        let prompt_len = rng.within(&mix.prompt_len).max(1);
        prompt.extend((0..prompt_len).map(|_| rng.below(mix.vocab_size)));
        prompt.truncate(max_model_len as usize - 1);
        let max_tokens = rng.within(&mix.max_tokens).clamp(1, max_model_len - prompt.len() as u32);
        let mut request = request(self.next_id, &prompt, max_tokens);
        self.next_id += 1;
        request.tenant = TenantId(rng.below(mix.max_tenant + 1));
        request.priority = rng.below(mix.max_priority + 1) as i32;
        request.adapter = rng.chance(100).then_some(AdapterId(0));
        request.cache_salt = CacheSalt([rng.chance(100) as u8; 32]);
        request.stop_token_ids = (0..mix.num_stop_tokens).collect();
        request.min_tokens = if rng.chance(100) { rng.below(max_tokens + 1) } else { 0 };
        if rng.chance(500) {
            request.sampling.num_choices = 1 + rng.below(mix.max_choices);
        }
        if rng.chance(mix.deadline_per_mille) {
            request.deadline = Some(Time(now.0 + u64::from(rng.within(&mix.deadline_micros))));
        }
        if rng.chance(mix.prompt_logprobs_per_mille) {
            request.sampling.prompt_logprobs = Some(0);
        }
        if rng.chance(mix.resumed_per_mille) && max_tokens > 1 {
            request.sampling.num_choices = 1;
            request.choice_offset = rng.below(3);
            let len = 1 + rng.below(max_tokens - 1);
            request.generated = (0..len).map(|_| rng.below(mix.vocab_size)).collect();
        }
        request
    }
}
