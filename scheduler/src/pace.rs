//! How fast the waiting queue drains, from the times at which steps were applied.

use crate::Time;

/// After so many measured microseconds old measurements start to count less.
const MEMORY_MICROS: u64 = 8_000_000;
/// Fewer measured microseconds say nothing yet.
const TRUST_MICROS: u64 = 50_000;
/// What a refused caller is told when nothing was measured, in microseconds.
const UNKNOWN_RETRY_MICROS: u64 = 1_000_000;
/// Longest and shortest time that a refused caller is told, in microseconds.
const RETRY_MICROS: std::ops::RangeInclusive<u64> = 1_000..=600_000_000;

/// Tokens that left the queue while something waited, and in how much time. Time with an empty queue is no evidence:
/// a queue that nobody fills drains slowly.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    measured: QueuePace,
    /// Left the queue since the last step was applied.
    drained: u64,
    /// When the last step was applied, if something waited then.
    busy_since: Option<Time>,
}

/// What was measured: so many tokens left the queue in so many microseconds in which somebody waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePace {
    tokens: u64,
    micros: u64,
}

impl QueuePace {
    /// Microseconds until so many waiting tokens have left the queue; `None` before there is evidence: enough time, and
    /// something that left. Sequences that run for long say nothing of the pace at which rows become free.
    #[must_use]
    pub fn predict(&self, num_tokens: u64) -> Option<u64> {
        if self.micros < TRUST_MICROS || self.tokens == 0 {
            return None;
        }
        let micros = u128::from(num_tokens) * u128::from(self.micros) / u128::from(self.tokens);
        Some(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// When a caller should come back for whom so many tokens must leave the queue first, in microseconds: neither a busy
    /// loop nor an eternity.
    #[must_use]
    pub fn retry_after_micros(&self, num_tokens: u64) -> u64 {
        Pace::clamp_retry(self.predict(num_tokens).unwrap_or(UNKNOWN_RETRY_MICROS))
    }
}

impl Pace {
    pub(crate) fn measured(&self) -> QueuePace {
        self.measured
    }

    /// A sequence left the queue for a row.
    pub(crate) fn drain(&mut self, num_tokens: u64) {
        self.drained += num_tokens;
    }

    /// A step was applied.
    pub(crate) fn step(&mut self, now: Time, waiting_tokens: u64) {
        if let Some(since) = self.busy_since {
            let measured = &mut self.measured;
            measured.tokens += self.drained;
            measured.micros += now.0.saturating_sub(since.0);
            if measured.micros > MEMORY_MICROS {
                measured.tokens /= 2;
                measured.micros /= 2;
            }
        }
        self.drained = 0;
        self.busy_since = (waiting_tokens > 0).then_some(now);
    }

    /// As [`QueuePace::predict`].
    pub(crate) fn predict(&self, num_tokens: u64) -> Option<u64> {
        self.measured.predict(num_tokens)
    }

    /// As [`QueuePace::retry_after_micros`].
    pub(crate) fn retry_after_micros(&self, num_tokens: u64) -> u64 {
        self.measured.retry_after_micros(num_tokens)
    }

    /// A time to tell a refused caller: neither a busy loop nor an eternity.
    pub(crate) fn clamp_retry(micros: u64) -> u64 {
        micros.clamp(*RETRY_MICROS.start(), *RETRY_MICROS.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_with_a_backlog_counts() {
        let mut pace = Pace::default();
        for step in 0..100 {
            pace.drain(10);
            pace.step(Time(step * 1_000), 500);
        }
        // 99 intervals of 1 ms with 10 tokens each.
        assert_eq!(pace.predict(1_000), Some(100_000));
        pace.step(Time(100_000), 0);
        let before = pace.predict(1_000);
        pace.step(Time(900_000_000), 0);
        assert_eq!(pace.predict(1_000), before);
    }

    #[test]
    fn nothing_is_claimed_before_there_is_evidence() {
        let mut pace = Pace::default();
        pace.step(Time(0), 1);
        pace.step(Time(TRUST_MICROS - 1), 1);
        assert_eq!(pace.predict(1), None);
        assert_eq!(pace.retry_after_micros(1), UNKNOWN_RETRY_MICROS);
        // Time alone is none: whoever runs may be about to end.
        pace.step(Time(TRUST_MICROS), 1);
        assert_eq!(pace.predict(1), None);
        pace.drain(2);
        pace.step(Time(2 * TRUST_MICROS), 1);
        assert_eq!(pace.predict(1), Some(TRUST_MICROS));
        assert_eq!(pace.retry_after_micros(u64::MAX), *RETRY_MICROS.end());
    }

    #[test]
    fn the_recent_past_counts_more() {
        let mut pace = Pace::default();
        let mut now = 0;
        for (tokens, steps) in [(100, 20_000), (10, 40_000)] {
            for _ in 0..steps {
                pace.drain(tokens);
                pace.step(Time(now), 1);
                now += 1_000;
            }
        }
        let micros_per_token = pace.predict(1_000).unwrap() / 1_000;
        assert!((90..=100).contains(&micros_per_token), "{micros_per_token}");
    }
}
