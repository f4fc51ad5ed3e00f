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

use crate::constraint::NotAllowed;
use crate::error::EngineError;
use crate::places::{Place, RequestGrammar};

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
    grammar: Arc<RequestGrammar>,
    choice: u32,
    place: Place,
    /// Tokens that the grammar was not told yet.
    tokens: Vec<u32>,
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

    /// A choice of the request that obeys `grammar` enters a row, with the tokens that it has already. Where it was in a row
    /// before it goes on from there.
    pub(crate) fn enter(
        &mut self,
        row: usize,
        grammar: Arc<RequestGrammar>,
        choice: u32,
        request: &Request,
        generated: &[u32],
    ) {
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
        let place = grammar.take(choice, generated).unwrap_or_else(|| Place::new(self.num_words));
        let tokens = generated[place.told.len()..].to_vec();
        let work = Work { grammar, choice, place, tokens, rules };
        self.rows[row] = Some(Row { work: None });
        self.send(row, Box::new(work));
    }

    /// Whoever is in the row leaves it. Its place is kept with its request's grammar.
    pub(crate) fn leave(&mut self, row: usize) {
        let was_there = self.rows[row].take();
        let mut queues = lock(&self.shared.queues);
        let is_of_row = |job: &mut Job| job.row == row;
        // Whoever left the row before while a thread was at it, too.
        let mut leaving: Vec<Box<Work>> = queues.done.extract_if(.., is_of_row).map(|job| job.work).collect();
        if let Some(Row { work }) = was_there {
            self.entries[row] += 1;
            leaving.extend(work);
            // Nobody pays for what nobody wants: masks that wait are computed within a step.
            while let Some(index) = queues.waiting.iter().position(|job| job.row == row) {
                leaving.extend(queues.waiting.remove(index).map(|job| job.work));
            }
        }
        drop(queues);
        leaving.into_iter().for_each(|work| work.keep_place());
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
        let is_allowed =
            work.place.mask.get(token_id as usize / 32).is_some_and(|word| word >> (token_id % 32) & 1 == 1);
        assert!(is_allowed, "token {token_id} was chosen, which its row's mask does not allow");
        work.tokens.push(token_id);
        self.send(row, work);
    }

    /// The mask for the row's next token, as soon as it is known. At least one of its bits is set.
    pub(crate) fn wait(&mut self, row: usize) -> Result<&[u32], NotAllowed> {
        let work = self.take(row);
        let place = self.rows[row].as_mut().expect("the row obeys a grammar");
        let work = &*place.work.insert(work);
        work.place.result.map(|()| &*work.place.mask)
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
            let mut late = Vec::new();
            for Job { row, entry, work } in queues.done.drain(..) {
                if let Some(place) = &mut self.rows[row]
                    && self.entries[row] == entry
                {
                    place.work = Some(work);
                } else {
                    late.push(work);
                }
            }
            // Not under the lock: a place may be the last of its automaton.
            drop(queues);
            late.into_iter().for_each(|work| work.keep_place());
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
        job.work.place.result = result.unwrap_or(Err(NotAllowed));
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
        let Self { grammar, place, tokens, rules, .. } = self;
        let Place { constraint, told, mask, is_masked, result } = place;
        // Where it failed once there is no way on.
        (*result)?;
        // Came back to where it left.
        if tokens.is_empty() && *is_masked {
            return Ok(());
        }
        *is_masked = false;
        let constraint = constraint.get_or_insert_with(|| grammar.begin());
        for token_id in tokens.drain(..) {
            constraint.advance(token_id)?;
            told.push(token_id);
        }
        mask.fill(0);
        constraint.mask(mask)?;
        rules.apply(told.len() as u32, mask)?;
        *is_masked = true;
        Ok(())
    }

    /// The choice is in its row no more.
    fn keep_place(self) {
        let Self { grammar, choice, place, .. } = self;
        grammar.keep(choice, place);
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
mod tests;
