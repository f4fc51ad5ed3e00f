use std::f32::consts::LOG2_E;

use super::{Lens, Logprobs};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math::{SUM_BLOCK_LEN, exp2_block, max_and_nan};
use crate::cpu::thread_pool::SharedMut;

pub(crate) fn logprobs(backend: &mut CpuBackend, args: Logprobs<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = Logprobs::<CpuBackend>::OP;
    let (out_values, out_ids) = (args.out_values.len(), args.out_ids.len());
    args.check(Lens { rows: args.rows.len(), out_values, out_ids })?;
    let Logprobs { vocab_size, rows_offset, num_rows, num_top, out_offset, .. } = args;
    let logits = args.logits.f32(OP, "logits")?;
    let rows = &args.rows.u32(OP, "rows")?.as_chunks::<2>().0[rows_offset..rows_offset + num_rows];
    let tokens = args.tokens.u32(OP, "tokens")?;
    let check = |words| Logprobs::<CpuBackend>::check_row(words, logits.len() / vocab_size, tokens, vocab_size);
    for &words in rows {
        check(words)?;
    }
    let out_len = 1 + num_top;
    let out = out_offset * out_len..(out_offset + num_rows) * out_len;
    let out_values = SharedMut::new(&mut args.out_values.f32_mut(OP, "out_values")?[out.clone()]);
    let out_ids = SharedMut::new(&mut args.out_ids.u32_mut(OP, "out_ids")?[out]);
    let isa = backend.isa;
    backend.pool.run_units(num_rows, &|_, index| {
        let words = rows[index];
        let token_id = check(words).expect("all rows were looked at");
        let logits = &logits[words[0] as usize * vocab_size..][..vocab_size];
        // SAFETY: a unit is done once, and has its own part of the results.
        let (values, ids) = unsafe {
            let range = index * out_len..(index + 1) * out_len;
            (out_values.slice_mut(range.clone()), out_ids.slice_mut(range))
        };
        vectorize(isa, Row { logits, token_id: token_id.map(|id| id as usize), values, ids });
    });
    Ok(())
}

struct Row<'a> {
    logits: &'a [f32],
    token_id: Option<usize>,
    /// `[1 + num_top]`
    values: &'a mut [f32],
    ids: &'a mut [u32],
}

impl Vectorized for Row<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Row { logits, token_id, values, ids } = self;
        let (max, _) = max_and_nan(simd, logits);
        let mut total = 0.0_f64;
        for block in logits.chunks(SUM_BLOCK_LEN) {
            total += f64::from(exp2_block(simd, block, max, LOG2_E, &mut []));
        }
        let log_total = total.ln();
        let log_softmax = |x: f32| ((f64::from(x) - f64::from(max)) - log_total) as f32;

        (values[0], ids[0]) = match token_id {
            Some(token_id) => {
                let chosen = logits[token_id];
                (log_softmax(chosen), 1 + count_before(simd, logits, token_id, chosen))
            }
            None => (f32::NAN, 0),
        };

        let (top_values, top_ids) = (&mut values[1..], &mut ids[1..]);
        if !top_ids.is_empty() {
            top(simd, logits, top_values, top_ids);
            for value in top_values {
                *value = log_softmax(*value);
            }
        }
    }
}

/// Tokens that are more likely, or as likely with a lower id.
#[inline(always)]
fn count_before<S: Lanes>(simd: S, logits: &[f32], token_id: usize, chosen: f32) -> u32 {
    let limit = simd.splat(chosen);
    let mut count = 0;
    for (index, x) in logits.chunks(LANES).enumerate() {
        // The tokens behind the last one are NaN, which is neither larger nor equal.
        let x = simd.load_slice(x, f32::NAN);
        count += simd.mask_bits(simd.gt(x, limit)).count_ones();
        if index * LANES < token_id {
            let lower = (1_u32 << (token_id - index * LANES).min(LANES)) - 1;
            count += (u32::from(simd.mask_bits(simd.eq(x, limit))) & lower).count_ones();
        }
    }
    count
}

/// The largest numbers and their ids, largest first, lower id first among equals, NaN last.
///
/// A heap in the room for the result, its worst entry on top; only vectors with a number above that are looked into.
/// Ids come in ascending order, so an equal number never replaces one.
#[inline(always)]
fn top<S: Lanes>(simd: S, logits: &[f32], values: &mut [f32], ids: &mut [u32]) {
    let len = values.len();
    // NaN becomes less than everything, so that order is total.
    let comparable = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    for (id, (value, slot)) in values.iter_mut().zip(&mut *ids).enumerate() {
        (*value, *slot) = (comparable(logits[id]), id as u32);
    }
    for root in (0..len / 2).rev() {
        sift_down(values, ids, root, len);
    }
    for (index, x) in logits.chunks(LANES).enumerate().skip(len / LANES) {
        let v = simd.load_slice(x, f32::NEG_INFINITY);
        let mut above = simd.mask_bits(simd.gt(v, simd.splat(values[0])));
        while above != 0 {
            let lane = above.trailing_zeros() as usize;
            above &= above - 1;
            let id = index * LANES + lane;
            if id >= len && x[lane] > values[0] {
                (values[0], ids[0]) = (x[lane], id as u32);
                sift_down(values, ids, 0, len);
            }
        }
    }
    // The worst goes behind the others, again and again.
    for end in (1..len).rev() {
        values.swap(0, end);
        ids.swap(0, end);
        sift_down(values, ids, 0, end);
    }
}

/// Restores the heap below `root` in the first `len` entries.
#[inline(always)]
fn sift_down(values: &mut [f32], ids: &mut [u32], mut root: usize, len: usize) {
    let is_worse = |values: &[f32], ids: &[u32], a: usize, b: usize| {
        values[a] < values[b] || (values[a] == values[b] && ids[a] > ids[b])
    };
    loop {
        let mut worst = root;
        for child in [2 * root + 1, 2 * root + 2] {
            if child < len && is_worse(values, ids, child, worst) {
                worst = child;
            }
        }
        if worst == root {
            return;
        }
        values.swap(root, worst);
        ids.swap(root, worst);
        root = worst;
    }
}
