//! Sampling without sorting a vocabulary: passes of vectors find thresholds, and only what may be chosen is looked at one
//! by one.
//!
//! A row is computed by one thread, from its own logits and tokens alone. Probabilities are f32 relative to the largest.
//! Without filters their sum is f32 within [`SUM_BLOCK_LEN`] tokens and f64 over such blocks; with filters it is f64, token
//! by token in ascending order. Ties and sums of the filters are those of the f32 probabilities.

use std::f32::consts::{LN_2, LOG2_E};

use super::{Lens, NON_FINITE, Sample, SampleAt, SamplerRow, SamplerShape, philox};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::{SUM_BLOCK_LEN, exp2_block, max_and_nan};
use crate::cpu::thread_pool::SharedMut;
use crate::ops::at_least;

/// Tokens whose maximum stands for them when the k-th largest logit is bounded from below.
const GROUP_LEN: usize = 2 * LANES;

/// Parameters of all rows, their masks, and working memory for each thread.
pub struct CpuSampler {
    shape: SamplerShape,
    rows: Vec<Row>,
    /// `[max_num_seqs, num_mask_words]`
    masks: Vec<u32>,
    works: Vec<Work>,
}

/// What [`SamplerRow`] says, owned. Lists keep their memory when a row is set again.
struct Row {
    prompt_len: u32,
    seed: u64,
    choice_index: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    has_mask: bool,
    bias: Vec<(u32, f32)>,
    stop_token_ids: Vec<u32>,
    min_tokens: u32,
    /// One after the other, and where each ends.
    bad_words: Vec<u32>,
    bad_word_ends: Vec<usize>,
}

/// Working memory of a thread. All lists have the length of the vocabulary.
struct Work {
    /// Logits after bans, bias and penalties.
    logits: Vec<f32>,
    weights: Vec<f32>,
    /// Sums of blocks of `weights`.
    block_sums: Vec<f32>,
    /// Tokens that may still be chosen, ascending, and their weights.
    ids: Vec<u32>,
    kept: Vec<f32>,
    /// What a filter orders them by: smaller is kept first.
    keys: Vec<u32>,
    /// Those at the edge of a filter: key, then id or place in `ids`.
    edge: Vec<u64>,
    group_max: Vec<f32>,
    /// Sums of weights by upper bits of the key.
    bins: Vec<f64>,
    /// Times that a token was generated, valid where the stamp is `epoch`.
    counts: Vec<u32>,
    stamps: Vec<u32>,
    epoch: u32,
}

pub(crate) fn alloc_sampler(backend: &mut CpuBackend, shape: &SamplerShape) -> Result<CpuSampler, KernelError> {
    shape.check()?;
    let row = || Row {
        prompt_len: 0,
        seed: 0,
        choice_index: 0,
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        has_mask: false,
        bias: Vec::new(),
        stop_token_ids: Vec::new(),
        min_tokens: 0,
        bad_words: Vec::new(),
        bad_word_ends: Vec::new(),
    };
    let len = shape.vocab_size;
    let work = || Work {
        logits: vec![0.0; len],
        weights: vec![0.0; len],
        block_sums: Vec::with_capacity(len.div_ceil(SUM_BLOCK_LEN)),
        ids: Vec::with_capacity(len),
        kept: Vec::with_capacity(len),
        keys: Vec::with_capacity(len),
        edge: Vec::with_capacity(len),
        group_max: Vec::with_capacity(len.div_ceil(GROUP_LEN)),
        bins: vec![0.0; NUM_BINS],
        counts: vec![0; len],
        stamps: vec![0; len],
        epoch: 0,
    };
    let num_words = shape.max_num_seqs.checked_mul(shape.num_mask_words());
    let num_words = num_words.ok_or(KernelError::OutOfMemory { what: "sampler", bytes: u64::MAX })?;
    Ok(CpuSampler {
        shape: *shape,
        rows: (0..shape.max_num_seqs).map(|_| row()).collect(),
        masks: vec![0; num_words],
        works: (0..backend.pool.num_threads()).map(|_| work()).collect(),
    })
}

pub(crate) fn set_sampler_row(
    _backend: &mut CpuBackend,
    sampler: &mut CpuSampler,
    row: u32,
    params: &SamplerRow<'_>,
) -> Result<(), KernelError> {
    params.check(row, &sampler.shape)?;
    let num_words = sampler.shape.num_mask_words();
    if let Some(mask) = params.mask {
        sampler.masks[row as usize * num_words..][..num_words].copy_from_slice(mask);
    }
    let row = &mut sampler.rows[row as usize];
    row.prompt_len = params.prompt_len;
    row.seed = params.seed;
    row.choice_index = params.choice_index;
    row.temperature = params.temperature;
    row.top_k = params.top_k;
    row.top_p = params.top_p;
    row.min_p = params.min_p;
    row.typical_p = params.typical_p;
    row.repetition_penalty = params.repetition_penalty;
    row.presence_penalty = params.presence_penalty;
    row.frequency_penalty = params.frequency_penalty;
    row.has_mask = params.mask.is_some();
    row.bias.clear();
    row.bias.extend_from_slice(params.bias);
    row.stop_token_ids.clear();
    row.stop_token_ids.extend_from_slice(params.stop_token_ids);
    row.min_tokens = params.min_tokens;
    row.bad_words.clear();
    row.bad_word_ends.clear();
    for word in params.bad_words {
        row.bad_words.extend_from_slice(word);
        row.bad_word_ends.push(row.bad_words.len());
    }
    Ok(())
}

pub(crate) fn set_sampler_mask(sampler: &mut CpuSampler, row: u32, mask: &[u32]) -> Result<(), KernelError> {
    sampler.shape.check_row_mask(row, mask)?;
    let num_words = sampler.shape.num_mask_words();
    sampler.masks[row as usize * num_words..][..num_words].copy_from_slice(mask);
    sampler.rows[row as usize].has_mask = true;
    Ok(())
}

pub(crate) fn sample(backend: &mut CpuBackend, args: Sample<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = Sample::<CpuBackend>::OP;
    let shape = args.sampler.shape;
    args.check(
        Lens {
            logits: args.logits.len(),
            rows: args.rows.len(),
            token_table: args.token_table.len(),
            out: args.out.len(),
        },
        &shape,
    )?;
    let Sample { rows_offset, num_rows, out_offset, .. } = args;
    let places = &args.rows.u32(OP, "rows")?.as_chunks::<2>().0[rows_offset..rows_offset + num_rows];
    for &words in places {
        Sample::<CpuBackend>::check_row(SampleAt::of_words(words), &shape)?;
    }
    let CpuSampler { rows, masks, works, .. } = args.sampler;
    // A sampler of a backend with fewer threads has too little working memory.
    at_least(OP, "sampler", backend.pool.num_threads(), works.len())?;
    let logits = args.logits.f32(OP, "logits")?;
    let token_table = args.token_table.u32_mut(OP, "token_table")?;
    let out = &mut args.out.u32_mut(OP, "out")?[out_offset..out_offset + places.len()];

    let row_of = |index: usize| {
        let SampleAt { row, num_tokens } = SampleAt::of_words(places[index]);
        let row = row as usize;
        (&rows[row], &token_table[row * shape.max_model_len..][..num_tokens as usize], row)
    };
    let shared_out = SharedMut::new(out);
    let works = SharedMut::new(works);
    let isa = backend.isa;
    let num_words = shape.num_mask_words();
    backend.pool.run_units(places.len(), &|worker, index| {
        if SampleAt::of_words(places[index]) == SampleAt::NOBODY {
            return;
        }
        // SAFETY: each worker has its own.
        let work = &mut unsafe { works.slice_mut(worker..worker + 1) }[0];
        let (params, tokens, row) = row_of(index);
        let choice = Choice {
            params,
            mask: params.has_mask.then(|| &masks[row * num_words..][..num_words]),
            logits: &logits[index * shape.vocab_size..][..shape.vocab_size],
            tokens,
            work,
        };
        let token = vectorize(isa, choice);
        // SAFETY: a unit is done once.
        let out = unsafe { shared_out.slice_mut(index..index + 1) };
        out[0] = token;
    });

    for (at, &token) in places.iter().map(|&words| SampleAt::of_words(words)).zip(&*out) {
        if at != SampleAt::NOBODY && (at.num_tokens as usize) < shape.max_model_len {
            let stored = if token == NON_FINITE { 0 } else { token };
            token_table[at.row as usize * shape.max_model_len + at.num_tokens as usize] = stored;
        }
    }
    Ok(())
}

impl Row {
    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    fn changes_logits(&self, num_generated: usize) -> bool {
        self.has_mask
            || !self.bad_word_ends.is_empty()
            || (num_generated < self.min_tokens as usize && !self.stop_token_ids.is_empty())
            || !self.bias.is_empty()
            || self.has_penalties()
    }
}

/// One token to choose.
struct Choice<'a> {
    params: &'a Row,
    mask: Option<&'a [u32]>,
    logits: &'a [f32],
    /// Those that the row holds.
    tokens: &'a [u32],
    work: &'a mut Work,
}

impl Vectorized for Choice<'_> {
    type Output = u32;
    #[inline(always)]
    fn run<S: Lanes>(mut self, simd: S) -> u32 {
        let is_finite = |(max, has_nan): (f32, bool)| !has_nan && max.is_finite();
        let mut max_of_all = max_and_nan(simd, self.logits);
        if !is_finite(max_of_all) {
            return NON_FINITE;
        }
        // Taken out and put back, so that it can be read beside the other lists.
        let mut changed = std::mem::take(&mut self.work.logits);
        let mut logits = self.logits;
        let num_generated = self.tokens.len().saturating_sub(self.params.prompt_len as usize);
        if self.params.changes_logits(num_generated) {
            self.change(simd, &mut changed);
            max_of_all = max_and_nan(simd, &changed);
            logits = &changed;
        }
        let token = if !is_finite(max_of_all) {
            NON_FINITE
        } else if self.params.temperature == 0.0 {
            find(simd, logits, max_of_all.0)
        } else {
            self.draw(simd, logits, max_of_all.0)
        };
        self.work.logits = changed;
        token
    }
}

impl Choice<'_> {
    /// Bans, bias and penalties: `logits` to `x`.
    #[inline(always)]
    fn change<S: Lanes>(&mut self, simd: S, x: &mut [f32]) {
        let Row { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self.params;
        let prompt_len = (self.params.prompt_len as usize).min(self.tokens.len());
        let generated = &self.tokens[prompt_len..];
        match self.mask {
            None => x.copy_from_slice(self.logits),
            Some(mask) => {
                let banned = simd.splat(f32::NEG_INFINITY);
                for (index, (x, logits)) in x.chunks_mut(LANES).zip(self.logits.chunks(LANES)).enumerate() {
                    let bits = (mask[index / 2] >> (index % 2 * LANES)) as u16;
                    let allowed = simd.mask_from_bits(bits);
                    simd.store_slice(x, simd.select(allowed, simd.load_slice(logits, 0.0), banned));
                }
            }
        }
        let mut start = 0;
        for &end in &self.params.bad_word_ends {
            let (&last, before) = self.params.bad_words[start..end].split_last().expect("no bad word is empty");
            if generated.ends_with(before) {
                x[last as usize] = f32::NEG_INFINITY;
            }
            start = end;
        }
        if generated.len() < self.params.min_tokens as usize {
            for &id in &self.params.stop_token_ids {
                x[id as usize] = f32::NEG_INFINITY;
            }
        }
        for &(id, bias) in &self.params.bias {
            x[id as usize] += bias;
        }
        if !self.params.has_penalties() {
            return;
        }
        let Work { counts, stamps, epoch, .. } = &mut *self.work;
        if *epoch == u32::MAX {
            stamps.fill(0);
            *epoch = 0;
        }
        *epoch += 1;
        // Tokens that are no entry of the vocabulary (of an image, say) have no logit.
        for (index, &token) in self.tokens.iter().enumerate() {
            let token = token as usize;
            let Some(stamp) = stamps.get_mut(token) else { continue };
            if *stamp != *epoch {
                *stamp = *epoch;
                counts[token] = 0;
                x[token] = if x[token] > 0.0 { x[token] / repetition_penalty } else { x[token] * repetition_penalty };
            }
            counts[token] += u32::from(index >= prompt_len);
        }
        for &token in generated {
            let Some(count) = counts.get_mut(token as usize) else { continue };
            if *count > 0 {
                x[token as usize] -= frequency_penalty * *count as f32 + presence_penalty;
                *count = 0;
            }
        }
    }

    /// One token by its probability.
    #[inline(always)]
    fn draw<S: Lanes>(&mut self, simd: S, logits: &[f32], max: f32) -> u32 {
        let Row { seed, choice_index, temperature, top_k, top_p, min_p, typical_p, .. } = *self.params;
        let u = philox::uniform(seed, choice_index, self.tokens.len() as u32);
        // A temperature near zero must not make zero times infinity.
        let factor = (LOG2_E / temperature).min(f32::MAX);
        let work = &mut *self.work;
        let has_top_k = top_k > 0 && (top_k as usize) < logits.len();

        if has_top_k {
            work.keep_largest(simd, logits, top_k as usize);
            // Into `kept`, which holds logits: one vector after the other.
            for block in work.kept.chunks_mut(SUM_BLOCK_LEN) {
                let mut copy = [0.0; SUM_BLOCK_LEN];
                copy[..block.len()].copy_from_slice(block);
                exp2_block(simd, &copy[..block.len()], max, factor, block);
            }
        } else {
            let mut total = 0.0_f64;
            work.block_sums.clear();
            for (logits, weights) in logits.chunks(SUM_BLOCK_LEN).zip(work.weights.chunks_mut(SUM_BLOCK_LEN)) {
                let sum = exp2_block(simd, logits, max, factor, weights);
                work.block_sums.push(sum);
                total += f64::from(sum);
            }
            if min_p <= 0.0 && typical_p >= 1.0 && top_p >= 1.0 {
                return work.pick_of_all(u * total);
            }
            // What no filter can leave need not be looked at: with only top-p at work, tokens below this together have
            // less than what top-p may cut away. One part in 1024 covers the rounding of `total`.
            let mut limit = f32::MIN_POSITIVE;
            if min_p > 0.0 {
                limit = limit.max(min_p);
            } else if typical_p >= 1.0 {
                let cut_away = (1.0 - f64::from(top_p)).max(0.0) * total * (1023.0 / 1024.0);
                limit = limit.max((cut_away / logits.len() as f64) as f32 * (1023.0 / 1024.0)).min(1.0);
            }
            if min_p <= 0.0 && typical_p >= 1.0 {
                work.keep_at_least(simd, limit);
                work.keep_likely(f64::from(top_p) * total);
                return work.pick_of_kept(u);
            }
            work.keep_at_least(simd, limit);
        }
        if has_top_k && min_p > 0.0 {
            work.retain(|_, weight, _| weight >= min_p);
        }
        if typical_p < 1.0 {
            // The exponent of the weight, without its rounding: weights near zero have few bits.
            work.keep_typical(f64::from(typical_p), |id| f64::from((logits[id] - max) * factor) * f64::from(LN_2));
        }
        if top_p < 1.0 {
            let total: f64 = work.kept.iter().map(|&weight| f64::from(weight)).sum();
            work.keep_likely(f64::from(top_p) * total);
        }
        work.pick_of_kept(u)
    }
}

/// The first token whose logit is `x`.
#[inline(always)]
fn find<S: Lanes>(simd: S, logits: &[f32], x: f32) -> u32 {
    let limit = simd.splat(x);
    for (index, logits) in logits.chunks(LANES).enumerate() {
        let found = simd.mask_bits(simd.eq(simd.load_slice(logits, f32::NAN), limit));
        if found != 0 {
            return index as u32 * LANES as u32 + found.trailing_zeros();
        }
    }
    unreachable!("the maximum is one of the logits")
}

/// Bins of keys by their bits from `BIN_SHIFT` on; keys are bits of numbers that are not negative.
const BIN_SHIFT: u32 = 17;
const NUM_BINS: usize = 1 << (31 - BIN_SHIFT);

/// Up to so many keys are sorted at once, without bins.
const MAX_SORTED: usize = 1024;

/// Bits of a number in ascending order of numbers.
#[inline(always)]
fn ordered(x: f32) -> u32 {
    let bits = x.to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

impl Work {
    /// Fills `ids` and `kept` with the tokens whose number in `x` is at least `limit`, in ascending order.
    #[inline(always)]
    fn compact<S: Lanes>(simd: S, x: &[f32], limit: f32, ids: &mut Vec<u32>, kept: &mut Vec<f32>) {
        ids.clear();
        kept.clear();
        let limit = simd.splat(limit);
        for (index, x) in x.chunks(LANES).enumerate() {
            let mut bits = simd.mask_bits(simd.ge(simd.load_slice(x, f32::NAN), limit));
            while bits != 0 {
                let lane = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                ids.push((index * LANES + lane) as u32);
                kept.push(x[lane]);
            }
        }
    }

    /// Keeps the `k` largest logits, lower id first among equals; `kept` holds logits then.
    #[inline(always)]
    fn keep_largest<S: Lanes>(&mut self, simd: S, logits: &[f32], k: usize) {
        // Each of the k groups with the largest maxima has a number that is at least the least of these maxima.
        let mut limit = f32::NEG_INFINITY;
        if k <= logits.len().div_ceil(GROUP_LEN) {
            self.group_max.clear();
            for group in logits.chunks(GROUP_LEN) {
                self.group_max.push(max_and_nan(simd, group).0);
            }
            let (_, least, _) = self.group_max.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
            limit = *least;
        }
        Self::compact(simd, logits, limit, &mut self.ids, &mut self.kept);
        if self.ids.len() <= k {
            return;
        }
        self.edge.clear();
        // Adding zero makes the two zeros equal.
        let key = |id: u32, logit: f32| u64::from(!ordered(logit + 0.0)) << 32 | u64::from(id);
        self.edge.extend(self.ids.iter().zip(&self.kept).map(|(&id, &logit)| key(id, logit)));
        let (_, &mut last, _) = self.edge.select_nth_unstable(k - 1);
        self.retain(|id, logit, _| key(id, logit) <= last);
    }

    /// Keeps the tokens of at least this weight.
    #[inline(always)]
    fn keep_at_least<S: Lanes>(&mut self, simd: S, limit: f32) {
        Self::compact(simd, &self.weights, limit, &mut self.ids, &mut self.kept);
    }

    /// Drops what `keep(id, weight, key)` says no to; keys beyond the list are zero.
    #[inline(always)]
    fn retain(&mut self, keep: impl Fn(u32, f32, u32) -> bool) {
        let mut len = 0;
        for index in 0..self.ids.len() {
            let (id, weight) = (self.ids[index], self.kept[index]);
            if keep(id, weight, self.keys.get(index).copied().unwrap_or(0)) {
                (self.ids[len], self.kept[len]) = (id, weight);
                len += 1;
            }
        }
        self.ids.truncate(len);
        self.kept.truncate(len);
    }

    /// Keeps the most likely tokens that together reach `mass`.
    #[inline(always)]
    fn keep_likely(&mut self, mass: f64) {
        self.keys.clear();
        let one = 1.0_f32.to_bits();
        self.keys.extend(self.kept.iter().map(|weight| one - weight.to_bits().min(one)));
        self.keep_first(mass);
    }

    /// Keeps the tokens whose surprise is nearest to the mean and that together reach `mass` of what is there. `log_weight`
    /// gives the logarithm of a token's weight.
    #[inline(always)]
    fn keep_typical(&mut self, mass: f64, log_weight: impl Fn(usize) -> f64) {
        let (mut total, mut weighted) = (0.0, 0.0);
        for (&id, &weight) in self.ids.iter().zip(&self.kept) {
            // A weight that was rounded to zero has no part in the mean, however surprising it is.
            if weight > 0.0 {
                total += f64::from(weight);
                weighted += f64::from(weight) * log_weight(id as usize);
            }
        }
        // Surprise is log(total) - log(weight), so its distance from the mean is that of log(weight) from its mean.
        let mean = weighted / total;
        self.keys.clear();
        self.keys.extend(self.ids.iter().map(|&id| ((log_weight(id as usize) - mean).abs() as f32).to_bits()));
        self.keep_first(mass * total);
    }

    /// Keeps the tokens with the smallest keys, lower id first among equals, that together reach `mass`.
    #[inline(always)]
    fn keep_first(&mut self, mass: f64) {
        self.edge.clear();
        let mut sum = 0.0;
        if self.keys.len() <= MAX_SORTED {
            self.edge.extend(self.keys.iter().zip(0..).map(|(&key, place)| u64::from(key) << 32 | place));
        } else {
            self.bins.fill(0.0);
            for (&key, &weight) in self.keys.iter().zip(&self.kept) {
                self.bins[(key >> BIN_SHIFT) as usize] += f64::from(weight);
            }
            // The bin in which the mass is reached; before it, `sum`.
            let edge_bin = self.bins.iter().position(|&of_bin| {
                let is_reached = of_bin > 0.0 && sum + of_bin >= mass;
                sum += if is_reached { 0.0 } else { of_bin };
                is_reached
            });
            let Some(edge_bin) = edge_bin else { return };
            for (&key, place) in self.keys.iter().zip(0..) {
                if (key >> BIN_SHIFT) as usize == edge_bin {
                    self.edge.push(u64::from(key) << 32 | place);
                }
            }
        }
        // Places in the list stand for ids, which have the same order.
        self.edge.sort_unstable();
        let mut last = self.edge.len() - 1;
        for (position, &entry) in self.edge.iter().enumerate() {
            sum += f64::from(self.kept[entry as u32 as usize]);
            if sum >= mass {
                last = position;
                break;
            }
        }
        let entry = self.edge[last];
        let (last_key, last_id) = ((entry >> 32) as u32, self.ids[entry as u32 as usize]);
        self.retain(|id, _, key| key < last_key || (key == last_key && id <= last_id));
    }

    /// The first token whose running sum of `kept` is above `u` of the whole.
    #[inline(always)]
    fn pick_of_kept(&self, u: f64) -> u32 {
        let total: f64 = self.kept.iter().map(|&weight| f64::from(weight)).sum();
        let target = u * total;
        let mut sum = 0.0;
        let mut last = NON_FINITE;
        for (&id, &weight) in self.ids.iter().zip(&self.kept) {
            sum += f64::from(weight);
            if weight > 0.0 {
                last = id;
            }
            if sum > target {
                return id;
            }
        }
        last
    }

    /// The first token whose running sum of `weights` is above `target`.
    #[inline(always)]
    fn pick_of_all(&self, target: f64) -> u32 {
        // What is before `block`, and the last block with a weight that was seen.
        let (mut sum, mut block, mut before) = (0.0, 0, 0.0);
        for (index, &of_block) in self.block_sums.iter().enumerate() {
            if of_block > 0.0 {
                (block, before) = (index, sum);
                sum += f64::from(of_block);
                if sum > target {
                    break;
                }
            }
        }
        // A block's sum is rounded; where its tokens do not reach the target one by one, the last of them has it.
        let start = block * SUM_BLOCK_LEN;
        let (mut sum, mut last) = (before, start);
        for (index, &weight) in self.weights[start..].iter().take(SUM_BLOCK_LEN).enumerate() {
            sum += f64::from(weight);
            if weight > 0.0 {
                last = start + index;
            }
            if sum > target {
                break;
            }
        }
        last as u32
    }
}
