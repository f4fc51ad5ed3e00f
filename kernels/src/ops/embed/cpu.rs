//! The served CPU version of [`super::Embed`].

use super::{Embed, check};
use crate::KernelError;
use crate::cpu::CpuBackend;
use crate::cpu::thread_pool::SharedMut;

/// Tokens that one thread looks up alone: a row is a few microseconds of cache misses, about what waking another takes.
const TOKENS_ALONE: usize = 4;

pub(crate) fn embed(backend: &mut CpuBackend, args: Embed<'_, CpuBackend>) -> Result<(), KernelError> {
    let Embed { table, token_table, token_indices, num_tokens, out } = args;
    let shape = table.shape();
    let token_table = token_table.u32("embed", "token_table")?;
    let token_indices = token_indices.u32("embed", "token_indices")?;
    let out = out.f32_mut("embed", "out")?;
    check(shape.in_features, num_tokens, token_indices.len(), out.len())?;
    let token_indices = &token_indices[..num_tokens];
    // All of them before the first write: a refused call leaves `out` as it was.
    for &index in token_indices {
        let range = |argument, value, limit| {
            Err(KernelError::Range { op: "embed", argument, value: u64::from(value), limit: limit as u64 })
        };
        match token_table.get(index as usize) {
            None => return range("token_indices", index, token_table.len()),
            Some(&token) if token as usize >= shape.out_features => {
                return range("token_table", token, shape.out_features);
            }
            Some(_) => {}
        }
    }
    let hidden_size = shape.in_features;
    let out = SharedMut::new(&mut out[..num_tokens * hidden_size]);
    backend.pool.run_ranges(num_tokens, TOKENS_ALONE, &|_, tokens| {
        for token in tokens {
            // SAFETY: each token belongs to one range, and its row of `out` to it.
            let out = unsafe { out.slice_mut(token * hidden_size..(token + 1) * hidden_size) };
            table.read_row(token_table[token_indices[token] as usize] as usize, out);
        }
    });
    Ok(())
}
