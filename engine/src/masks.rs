//! Masks of the rows whose choices obey a grammar.
//!
//! A row's grammar is told a token as soon as it is known, which is when the next step is launched: that step's forward
//! pass needs only the token, which is on the device, and its sampling needs the mask. Rows without a grammar have no part
//! in any of this.
//!
//! Where the device is a card, threads of their own compute masks during its forward pass. Where it is this CPU they would take
//! cores from it and hold up whoever waits for the slowest: there the device's threads share the masks when they are done.
//!
//! ```text
//!  launch N+1:  tokens of step N ──> threads: advance, mask ─────────────┐
//!               forward pass of step N+1 (on the card)  ──> logits ──> sample
//!
//!               forward pass of step N+1 (on the CPU) ──> advance, mask ──> sample
//! ```

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use quire_scheduler::Request;

use crate::constraint::{Grammar, NotAllowed, TokenConstraint};
use crate::error::EngineError;

/// Stack of a thread that follows grammars: automata are built by recursion over expressions that callers wrote, whose size
/// is bounded before they come here. Only what is used of it is ever resident. Threads of a CPU's backend have as much.
pub(crate) const STACK_BYTES: usize = 64 << 20;
/// Most threads, where the number is not chosen: masks of a step are few and short.
const MAX_THREADS: usize = 4;

/// The rows' grammars, and the threads that follow them.
pub(crate) struct Masks {
    rows: Vec<Option<Row>>,
    /// How often a row was entered: what comes back for someone who left is dropped.
    entries: Vec<u64>,
    num_words: usize,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Row {
    /// `None` while a thread has it.
    work: Option<Box<Work>>,
}

/// One choice's place in its grammar and the mask that follows from it.
struct Work {
    grammar: Arc<dyn Grammar>,
    /// `None` until a thread has begun it.
    constraint: Option<Box<dyn TokenConstraint>>,
    /// Tokens that the grammar was not told yet.
    tokens: Vec<u32>,
    num_generated: u32,
    mask: Vec<u32>,
    result: Result<(), NotAllowed>,
    rules: Rules,
}

/// What the mask follows beside the grammar.
struct Rules {
    /// A bit for each token of `allowed_token_ids`.
    allowed: Option<Vec<u32>>,
    stop_token_ids: Vec<u32>,
    min_tokens: u32,
}

struct Job {
    row: usize,
    entry: u64,
    work: Box<Work>,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    has_work: Condvar,
    has_result: Condvar,
}

/// At most one job for each row, and one for each thread that works for a row that was left.
#[derive(Default)]
struct Queues {
    waiting: VecDeque<Job>,
    done: Vec<Job>,
    /// Someone waits for the next of `done`.
    is_awaited: bool,
    is_closing: bool,
}

/// State behind this lock is whole at every moment.
fn lock(queues: &Mutex<Queues>) -> MutexGuard<'_, Queues> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Masks {
    /// For `num_rows` rows of `vocab_size` tokens, with so many threads beside those that wait for masks.
    pub(crate) fn new(num_rows: usize, vocab_size: usize, num_threads: usize) -> Result<Self, EngineError> {
        let shared = Arc::new(Shared::default());
        let mut masks = Self {
            rows: (0..num_rows).map(|_| None).collect(),
            entries: vec![0; num_rows],
            num_words: vocab_size.div_ceil(32),
            shared,
            threads: Vec::with_capacity(num_threads),
        };
        for index in 0..num_threads {
            let shared = Arc::clone(&masks.shared);
            let builder = std::thread::Builder::new().name(format!("quire-mask-{index}")).stack_size(STACK_BYTES);
            let thread = builder.spawn(move || shared.work());
            masks.threads.push(thread.map_err(|error| EngineError::Config {
                field: "engine.mask_threads".to_owned(),
                why: format!("no thread could be started: {error}"),
            })?);
        }
        Ok(masks)
    }

    /// Threads beside a device of this kind, where their number is not chosen.
    pub(crate) fn default_threads(device_kind: &str) -> usize {
        match device_kind {
            "cpu" => 0,
            _ => std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2).min(MAX_THREADS),
        }
    }

    /// How many masks nobody will begin who does not call [`MaskWork::compute_next`], as often.
    pub(crate) fn num_waiting(&self) -> usize {
        if self.threads.is_empty() { lock(&self.shared.queues).waiting.len() } else { 0 }
    }

    /// For threads that have time.
    pub(crate) fn work(&self) -> MaskWork<'_> {
        MaskWork(&self.shared)
    }

    /// A choice that obeys `grammar` enters a row, with the tokens that it has already.
    pub(crate) fn enter(&mut self, row: usize, grammar: Arc<dyn Grammar>, request: &Request, generated: &[u32]) {
        self.leave(row);
        let rules = Rules {
            allowed: request.sampling.allowed_token_ids.as_ref().map(|ids| {
                let mut mask = vec![0; self.num_words];
                ids.iter().for_each(|id| mask[*id as usize / 32] |= 1 << (id % 32));
                mask
            }),
            stop_token_ids: request.stop_token_ids.clone(),
            min_tokens: request.min_tokens,
        };
        let work = Work {
            grammar,
            constraint: None,
            tokens: generated.to_vec(),
            num_generated: 0,
            mask: vec![0; self.num_words],
            result: Ok(()),
            rules,
        };
        self.rows[row] = Some(Row { work: None });
        self.send(row, Box::new(work));
    }

    /// Whoever is in the row leaves it.
    pub(crate) fn leave(&mut self, row: usize) {
        let was_there = self.rows[row].take();
        let mut queues = lock(&self.shared.queues);
        // Whoever left the row before while a thread was at it.
        queues.done.retain(|job| job.row != row);
        if was_there.is_some() {
            self.entries[row] += 1;
            // Nobody pays for what nobody wants: masks that wait are computed within a step.
            queues.waiting.retain(|job| job.row != row);
        }
    }

    /// Which choice is in the row, where it obeys a grammar: to be given back with its next token.
    pub(crate) fn entry(&self, row: usize) -> Option<u64> {
        self.rows[row].is_some().then(|| self.entries[row])
    }

    /// The next token of the choice that entered the row as `entry`, if it is still there. Its mask was waited for.
    ///
    /// # Panics
    /// Where the mask does not allow the token: a device that chooses such a token must not go on.
    pub(crate) fn advance(&mut self, row: usize, entry: u64, token_id: u32) {
        if self.entry(row) != Some(entry) {
            return;
        }
        let mut work = self.take(row);
        let is_allowed = work.mask.get(token_id as usize / 32).is_some_and(|word| word >> (token_id % 32) & 1 == 1);
        assert!(is_allowed, "token {token_id} was chosen, which its row's mask does not allow");
        work.tokens.push(token_id);
        self.send(row, work);
    }

    /// The mask for the row's next token, as soon as it is known. At least one of its bits is set.
    pub(crate) fn wait(&mut self, row: usize) -> Result<&[u32], NotAllowed> {
        let work = self.take(row);
        let place = self.rows[row].as_mut().expect("the row obeys a grammar");
        let work = &*place.work.insert(work);
        work.result.map(|()| &*work.mask)
    }

    /// Takes the row's work: waits for the thread that has it, or does what waits where there are no threads.
    fn take(&mut self, row: usize) -> Box<Work> {
        loop {
            let place = self.rows[row].as_mut().expect("the row obeys a grammar");
            if let Some(work) = place.work.take() {
                return work;
            }
            let mut queues = lock(&self.shared.queues);
            while queues.done.is_empty() {
                let own = if self.threads.is_empty() { queues.waiting.pop_front() } else { None };
                queues = match own {
                    Some(job) => self.shared.compute(queues, job),
                    None => {
                        queues.is_awaited = true;
                        self.shared.has_result.wait(queues).unwrap_or_else(PoisonError::into_inner)
                    }
                };
            }
            for Job { row, entry, work } in queues.done.drain(..) {
                if let Some(place) = &mut self.rows[row]
                    && self.entries[row] == entry
                {
                    place.work = Some(work);
                }
            }
        }
    }

    fn send(&mut self, row: usize, work: Box<Work>) {
        let job = Job { row, entry: self.entries[row], work };
        lock(&self.shared.queues).waiting.push_back(job);
        if !self.threads.is_empty() {
            self.shared.has_work.notify_one();
        }
    }
}

/// Masks that wait for someone to compute them.
#[derive(Clone, Copy)]
pub(crate) struct MaskWork<'m>(&'m Shared);

impl MaskWork<'_> {
    /// Computes the mask that waits longest, if there is one.
    pub(crate) fn compute_next(self) {
        let mut queues = lock(&self.0.queues);
        if let Some(job) = queues.waiting.pop_front() {
            drop(self.0.compute(queues, job));
        }
    }
}

impl Drop for Masks {
    fn drop(&mut self) {
        lock(&self.shared.queues).is_closing = true;
        self.shared.has_work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread ends what it is doing; its grammar's budget bounds that.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn work(&self) {
        let mut queues = lock(&self.queues);
        while !queues.is_closing {
            queues = match queues.waiting.pop_front() {
                Some(job) => self.compute(queues, job),
                None => self.has_work.wait(queues).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Does a job with the lock let go.
    fn compute<'q>(&'q self, queues: MutexGuard<'q, Queues>, mut job: Job) -> MutexGuard<'q, Queues> {
        drop(queues);
        // A bug in following one grammar ends the choices that obey it, and nobody else.
        let result = catch_unwind(AssertUnwindSafe(|| job.work.follow()));
        job.work.result = result.unwrap_or(Err(NotAllowed));
        let mut queues = lock(&self.queues);
        queues.done.push(job);
        if std::mem::take(&mut queues.is_awaited) {
            self.has_result.notify_one();
        }
        queues
    }
}

impl Work {
    /// Tells the grammar what it does not know yet, and computes the mask.
    fn follow(&mut self) -> Result<(), NotAllowed> {
        // Where it failed once there is no way on.
        self.result?;
        let constraint = self.constraint.get_or_insert_with(|| self.grammar.begin());
        self.num_generated += self.tokens.len() as u32;
        for token_id in self.tokens.drain(..) {
            constraint.advance(token_id)?;
        }
        self.mask.fill(0);
        constraint.mask(&mut self.mask)?;
        self.rules.apply(self.num_generated, &mut self.mask)
    }
}

impl Rules {
    fn apply(&self, num_generated: u32, mask: &mut [u32]) -> Result<(), NotAllowed> {
        let is_empty = |mask: &[u32]| mask.iter().all(|word| *word == 0);
        if let Some(allowed) = &self.allowed {
            mask.iter_mut().zip(allowed).for_each(|(word, allowed)| *word &= allowed);
        }
        if num_generated < self.min_tokens {
            let bit = |id: u32| (id as usize / 32, 1 << (id % 32));
            let stops = self.stop_token_ids.iter().map(|id| bit(*id)).filter(|(word, _)| *word < mask.len());
            let cleared: Vec<(usize, u32)> = stops.filter(|(word, bit)| mask[*word] & bit != 0).collect();
            cleared.iter().for_each(|(word, bit)| mask[*word] &= !bit);
            // A complete output ends: the grammar decides, not `min_tokens`.
            if is_empty(mask) {
                cleared.iter().for_each(|(word, bit)| mask[*word] |= bit);
            }
        }
        if is_empty(mask) { Err(NotAllowed) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use quire_scheduler::{CacheSalt, RequestId, SamplingParams, TenantId};

    use super::*;

    /// Allows the tokens that follow the last one by 1 or 2, from 0 on; panics at 13, ends with 63.
    #[derive(Debug)]
    struct Upwards;

    struct UpwardsState(u32);

    impl Grammar for Upwards {
        fn begin(&self) -> Box<dyn TokenConstraint> {
            Box::new(UpwardsState(0))
        }
    }

    impl TokenConstraint for UpwardsState {
        fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
            assert_ne!(token_id, 13);
            if token_id != self.0 + 1 && token_id != self.0 + 2 {
                return Err(NotAllowed);
            }
            self.0 = token_id;
            Ok(())
        }

        fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
            for id in if self.0 >= 20 { [63, 63] } else { [self.0 + 1, self.0 + 2] } {
                mask[id as usize / 32] |= 1 << (id % 32);
            }
            Ok(())
        }
    }

    fn request(allowed: Option<Vec<u32>>, min_tokens: u32) -> Request {
        Request {
            id: RequestId(0),
            tenant: TenantId(0),
            adapter: None,
            priority: 0,
            cache_salt: CacheSalt::default(),
            prompt: [1].as_slice().into(),
            generated: Vec::new(),
            choice_offset: 0,
            sampling: SamplingParams { allowed_token_ids: allowed, ..SamplingParams::default() },
            max_tokens: 8,
            min_tokens,
            stop_token_ids: vec![63, 1000],
            deadline: None,
        }
    }

    #[test]
    fn each_row_follows_its_own_tokens() {
        (0..3).for_each(rows_follow_their_tokens);
    }

    fn rows_follow_their_tokens(num_threads: usize) {
        let mut masks = Masks::new(3, 64, num_threads).unwrap();
        assert_eq!(masks.entry(0), None);
        masks.enter(0, Arc::new(Upwards), &request(None, 0), &[]);
        masks.enter(2, Arc::new(Upwards), &request(None, 0), &[2, 3]);
        assert_eq!(masks.wait(2), Ok(&[0b11 << 4, 0][..]));
        assert_eq!(masks.wait(0), Ok(&[0b110, 0][..]));
        let (first, last) = (masks.entry(0).unwrap(), masks.entry(2).unwrap());
        masks.advance(0, first, 2);
        masks.advance(2, last, 5);
        assert_eq!(masks.wait(0), Ok(&[0b11 << 3, 0][..]));
        assert_eq!(masks.wait(0), Ok(&[0b11 << 3, 0][..]));
        assert_eq!(masks.wait(2), Ok(&[0b11 << 6, 0][..]));
        // Someone else is in the row when the token arrives.
        masks.enter(0, Arc::new(Upwards), &request(None, 0), &[]);
        masks.advance(0, first, 3);
        assert_eq!(masks.wait(0), Ok(&[0b110, 0][..]));
        masks.leave(0);
        assert_eq!(masks.entry(0), None);
    }

    #[test]
    fn whoever_has_time_computes_masks() {
        let mut masks = Masks::new(8, 64, 0).unwrap();
        (0..8).for_each(|row| masks.enter(row, Arc::new(Upwards), &request(None, 0), &[row as u32 + 1]));
        assert_eq!(masks.num_waiting(), 8);
        masks.leave(3);
        assert_eq!(masks.num_waiting(), 7);
        let work = masks.work();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..5).for_each(|_| work.compute_next()));
            }
        });
        assert_eq!(masks.num_waiting(), 0);
        for row in (0..8).filter(|row| *row != 3) {
            let expected = if row < 2 { Ok(()) } else { Err(NotAllowed) };
            assert_eq!(masks.wait(row).map(|_| ()), expected, "{row}");
        }
    }

    #[test]
    fn rows_that_come_and_go_leave_nothing_behind() {
        let mut masks = Masks::new(2, 64, 0).unwrap();
        for round in 0..100 {
            masks.enter(0, Arc::new(Upwards), &request(None, 0), &[]);
            // Some leave before their mask was computed, some behind it.
            if round % 2 == 0 {
                masks.work().compute_next();
            }
            masks.leave(0);
        }
        let queues = lock(&masks.shared.queues);
        assert_eq!((queues.waiting.len(), queues.done.len()), (0, 0));
    }

    #[test]
    fn a_row_without_a_way_on_fails_alone_and_for_good() {
        let mut masks = Masks::new(3, 64, 1).unwrap();
        masks.enter(0, Arc::new(Upwards), &request(None, 0), &[9]);
        masks.enter(1, Arc::new(Upwards), &request(Some(vec![7, 40]), 0), &[]);
        let up_to_13: Vec<u32> = (1..=13).collect();
        masks.enter(2, Arc::new(Upwards), &request(None, 0), &up_to_13);
        for row in 0..3 {
            assert_eq!(masks.wait(row), Err(NotAllowed), "{row}");
        }
        assert_eq!(masks.wait(0), Err(NotAllowed));
        masks.enter(2, Arc::new(Upwards), &request(None, 0), &[]);
        assert!(masks.wait(2).is_ok());
    }

    #[test]
    #[should_panic(expected = "token 3 was chosen")]
    fn a_token_outside_its_mask_is_a_bug() {
        let mut masks = Masks::new(1, 64, 1).unwrap();
        masks.enter(0, Arc::new(Upwards), &request(None, 0), &[]);
        assert!(masks.wait(0).is_ok());
        let entry = masks.entry(0).unwrap();
        masks.advance(0, entry, 3);
    }

    #[test]
    fn a_complete_output_ends_before_min_tokens() {
        let mut masks = Masks::new(1, 64, 1).unwrap();
        let complete: Vec<u32> = (1..=10).map(|i| 2 * i).collect();
        masks.enter(0, Arc::new(Upwards), &request(None, 100), &complete);
        assert_eq!(masks.wait(0), Ok(&[0, 1 << 31][..]));
    }
}
