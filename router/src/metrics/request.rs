//! The clock of one request.

use std::time::{Duration, Instant};

use super::{Endpoint, HANDLES, Outcome};

/// When the tokens of one choice came. Choices of one request come in the same steps: the gap between tokens of two of
/// them says nothing.
#[derive(Clone, Copy, Debug, Default)]
struct TokenClock {
    first_and_last: Option<(Instant, Instant)>,
    num_tokens: u64,
}

impl TokenClock {
    /// A token came; the time since the one before.
    fn token(&mut self, now: Instant) -> Option<Duration> {
        self.num_tokens += 1;
        let (first, last) = self.first_and_last.unwrap_or((now, now));
        self.first_and_last = Some((first, now));
        (self.num_tokens > 1).then(|| now - last)
    }

    /// Between the first token and the last, for each one after the first.
    fn seconds_per_token(&self) -> Option<f64> {
        let (first, last) = self.first_and_last.filter(|_| self.num_tokens > 1)?;
        Some((last - first).as_secs_f64() / (self.num_tokens - 1) as f64)
    }
}

/// The clock of one request. Dropped without [`RequestMetrics::finish`] it counts as cancelled: the client left.
#[derive(Debug)]
pub struct RequestMetrics {
    endpoint: Endpoint,
    start: Instant,
    has_token: bool,
    /// By choice.
    clocks: Vec<TokenClock>,
    queued: bool,
    ended: bool,
}

impl RequestMetrics {
    /// Starts the clock.
    pub fn start(endpoint: Endpoint) -> Self {
        if let Some(handles) = HANDLES.get() {
            handles.in_flight.increment(1.0);
        }
        let start = Instant::now();
        Self { endpoint, start, has_token: false, clocks: Vec::new(), queued: true, ended: false }
    }

    /// A choice runs for the first time. The first call ends the request's time in the queue, later ones change nothing.
    pub fn scheduled(&mut self) {
        if std::mem::take(&mut self.queued)
            && let Some(handles) = HANDLES.get()
        {
            handles.queue.record(self.start.elapsed());
        }
    }

    /// Tokens of the prompt, and those of them that the prefix cache had. Once per request.
    pub fn prompt_tokens(&mut self, num_tokens: u32, num_cached_tokens: u32) {
        debug_assert!(num_cached_tokens <= num_tokens);
        if let Some(handles) = HANDLES.get() {
            handles.prompt_tokens.increment(u64::from(num_tokens));
            handles.cached_prompt_tokens.increment(u64::from(num_cached_tokens));
        }
    }

    /// A token was generated, of the choice in this place among the request's.
    pub fn token(&mut self, place: usize) {
        let now = Instant::now();
        if place >= self.clocks.len() {
            self.clocks.resize(place + 1, TokenClock::default());
        }
        let gap = self.clocks[place].token(now);
        let is_first = !std::mem::replace(&mut self.has_token, true);
        if let Some(handles) = HANDLES.get() {
            handles.generation_tokens.increment(1);
            if is_first {
                handles.ttft.record(now - self.start);
            }
            if let Some(gap) = gap {
                handles.itl.record(gap);
            }
        }
    }

    /// The request ended.
    pub fn finish(mut self, outcome: Outcome) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let Some(handles) = HANDLES.get() else { return };
        handles.in_flight.decrement(1.0);
        handles.requests[self.endpoint as usize][outcome as usize].increment(1);
        handles.duration.record(self.start.elapsed());
        for seconds in self.clocks.iter().filter_map(TokenClock::seconds_per_token) {
            handles.tpot.record(seconds);
        }
    }
}

impl Drop for RequestMetrics {
    fn drop(&mut self) {
        self.end(Outcome::Cancelled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_clocks_of_their_own() {
        let mut request = RequestMetrics::start(Endpoint::Chat);
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        request.clocks = vec![TokenClock::default(); 2];
        for step in 1..=5 {
            // Both choices get a token in each step.
            let gap = (step > 1).then_some(Duration::from_millis(10));
            assert_eq!(request.clocks[0].token(at(10 * step)), gap);
            assert_eq!(request.clocks[1].token(at(10 * step + 1)), gap);
        }
        for clock in &request.clocks {
            assert!((clock.seconds_per_token().unwrap() - 0.01).abs() < 1e-9);
        }
        request.token(2);
        assert_eq!(request.clocks[2].seconds_per_token(), None, "one token has no pace");
        request.finish(Outcome::Finished);
    }
}
