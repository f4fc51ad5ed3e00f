//! Single operations at the shapes of models, timed beside what the device can do at most.
//!
//! An operation is run over several sets of data in turn, together larger than any cache. Where the device records launches,
//! a recording of many runs is replayed, so that gaps between launches are those of a decode step; else the runs follow each
//! other. The figure is the median.

use std::time::Instant;

use half::bf16;
use quire_kernels::ops::linear::{Epilogue, Linear, WeightShape};
use quire_kernels::ops::paged_attention::PagedAttention;
use quire_kernels::ops::rope_kv_write::{AttentionShape, RopeKvWrite};
use quire_kernels::{
    Backend, DType, DeviceInfo, HostTensor, KernelError, KvLayout, TensorFormat, WeightFormat, WeightLayout,
    WeightSource,
};

use super::Peaks;
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::weights::nearly_normal;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpCase {
    /// A product: `rows` times a packed weight.
    Linear { out_features: usize, in_features: usize, layout: WeightLayout, format: WeightFormat, rows: usize },
    /// Attention of the last `new_tokens` tokens of `num_seqs` sequences with `context_len` tokens each.
    Attention {
        shape: AttentionShape,
        block_size: usize,
        dtype: DType,
        num_seqs: usize,
        new_tokens: usize,
        context_len: usize,
    },
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpFigure {
    /// Of one run.
    pub seconds: f64,
    /// Weights, or K and V of all that is seen, once.
    pub bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
    /// Runs that the median is of, a recording of several being one.
    pub num_times: usize,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpEffort {
    /// Data that runs take turns with; several times the largest cache.
    pub data_bytes: usize,
    /// Of each case.
    pub milliseconds: u32,
}

/// Most runs in a recording.
const MAX_RUNS: usize = 64;

/// Measures the device that `config` asks for, then each case; `answer` gets each figure at once. A case that the device
/// has no memory for is passed over, with `None`.
pub fn ops(
    config: &EngineConfig,
    cases: &[OpCase],
    effort: OpEffort,
    answer: impl FnMut(&Peaks, &DeviceInfo, &OpCase, Option<OpFigure>),
) -> Result<(), EngineError> {
    super::with_device(config, Run { cases, effort, answer })
}

struct Run<'a, F> {
    cases: &'a [OpCase],
    effort: OpEffort,
    answer: F,
}

impl<F: FnMut(&Peaks, &DeviceInfo, &OpCase, Option<OpFigure>)> super::OnDevice for Run<'_, F> {
    type Output = ();

    fn run<B: Backend>(mut self, mut backend: B, peaks: Peaks, _note: Option<String>) -> Result<(), EngineError> {
        let info = backend.info();
        let mut held = Held::default();
        for case in self.cases {
            let figure = match held.measure(&mut backend, case, self.effort) {
                Ok(figure) => Some(figure),
                Err(KernelError::OutOfMemory { .. }) => None,
                Err(error) => return Err(error.into()),
            };
            (self.answer)(&peaks, &info, case, figure);
        }
        Ok(())
    }
}

/// What the case before took, for the next one of the same data: memory of a device is given back with the device alone.
struct Held<B: Backend> {
    weights: Option<(WeightShape, Vec<B::Weight>)>,
    cache: Option<(KvLayout, B::Kv)>,
}

impl<B: Backend> Default for Held<B> {
    fn default() -> Self {
        Self { weights: None, cache: None }
    }
}

impl<B: Backend> Held<B> {
    fn measure(&mut self, backend: &mut B, case: &OpCase, effort: OpEffort) -> Result<OpFigure, KernelError> {
        match *case {
            OpCase::Linear { out_features, in_features, layout, format, rows } => {
                self.linear(backend, WeightShape { out_features, in_features, layout, format }, rows, effort)
            }
            OpCase::Attention { shape, block_size, dtype, num_seqs, new_tokens, context_len } => {
                let layout = KvLayout {
                    num_layers: 1,
                    num_blocks: num_seqs * context_len.div_ceil(block_size),
                    block_size,
                    num_kv_heads: shape.num_kv_heads,
                    head_dim: shape.head_dim,
                    dtype,
                };
                self.attention(backend, shape, layout, [num_seqs, new_tokens, context_len], effort)
            }
        }
    }

    fn linear(
        &mut self,
        backend: &mut B,
        shape: WeightShape,
        rows: usize,
        effort: OpEffort,
    ) -> Result<OpFigure, KernelError> {
        let WeightShape { out_features, in_features, layout, .. } = shape;
        if self.weights.as_ref().is_none_or(|(held, _)| *held != shape) {
            self.weights = None;
            let weights = pack_weights(backend, shape, effort.data_bytes)?;
            self.weights = Some((shape, weights));
        }
        let (_, weights) = self.weights.as_ref().expect("just packed");
        let epilogue = if layout == WeightLayout::GateUp { Epilogue::SwiGlu } else { Epilogue::Store };
        let out_cols = if epilogue == Epilogue::SwiGlu { out_features / 2 } else { out_features };
        let x = random_buffer(backend, rows * in_features)?;
        let mut out = backend.alloc(DType::F32, rows * out_cols)?;
        let bytes = backend.weight_bytes(&shape) as u64;
        let (seconds, num_times) = time(backend, weights.len(), effort, &mut |backend, turn| {
            backend.linear(Linear {
                x: &x,
                num_rows: rows,
                weight: &weights[turn],
                bias: None,
                epilogue,
                out: &mut out,
            })
        })?;
        Ok(OpFigure { seconds, bytes, flops: 2 * (rows * out_features * in_features) as u64, num_times })
    }

    fn attention(
        &mut self,
        backend: &mut B,
        shape: AttentionShape,
        layout: KvLayout,
        [num_seqs, new_tokens, context_len]: [usize; 3],
        effort: OpEffort,
    ) -> Result<OpFigure, KernelError> {
        if self.cache.as_ref().is_none_or(|(held, _)| *held != layout) {
            self.cache = None;
            self.cache = Some((layout, fill_cache(backend, shape, &layout)?));
        }
        let (_, kv) = self.cache.as_ref().expect("just filled");
        let max_num_blocks = context_len.div_ceil(layout.block_size);
        let num_tokens = num_seqs * new_tokens;
        let qkv = random_buffer(backend, num_tokens * shape.qkv_len())?;
        let mut out = backend.alloc(DType::F32, num_tokens * shape.q_len())?;
        let mut words = |words: Vec<u32>| -> Result<B::Buffer, KernelError> {
            let mut buffer = backend.alloc(DType::U32, words.len())?;
            backend.write_u32(&mut buffer, 0, &words)?;
            Ok(buffer)
        };
        let cu_seqlens_q = words((0..=num_seqs).map(|seq| (seq * new_tokens) as u32).collect())?;
        let context_lens = words(vec![context_len as u32; num_seqs])?;
        // Blocks lie anywhere: a step through them that has no factor in common with their number.
        let step = (layout.num_blocks / 2 + 1..).find(|step| gcd(*step, layout.num_blocks) == 1).unwrap_or(1);
        let block_tables =
            words((0..layout.num_blocks).map(|index| (index * step % layout.num_blocks) as u32).collect())?;
        let rows = words((0..num_seqs as u32).collect())?;
        let (seconds, num_times) = time(backend, 1, effort, &mut |backend, _| {
            backend.paged_attention(PagedAttention {
                qkv: &qkv,
                num_tokens,
                num_seqs,
                shape,
                scale: (shape.head_dim as f32).sqrt().recip(),
                window: None,
                cu_seqlens_q: &cu_seqlens_q,
                context_lens: &context_lens,
                block_tables: &block_tables,
                max_num_blocks,
                rows: &rows,
                kv,
                layer: 0,
                out: &mut out,
            })
        })?;
        let per_token = (layout.block_bytes() / layout.block_size) as u64;
        let num_pairs: usize = (0..new_tokens).map(|token| context_len - token).sum();
        Ok(OpFigure {
            seconds,
            bytes: (num_seqs * context_len) as u64 * per_token,
            flops: (4 * num_seqs * num_pairs * shape.q_len()) as u64,
            num_times,
        })
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn random_buffer<B: Backend>(backend: &mut B, len: usize) -> Result<B::Buffer, KernelError> {
    let numbers: Vec<f32> = (0..len as u64).map(nearly_normal).collect();
    let mut buffer = backend.alloc(DType::F32, len)?;
    backend.write_f32(&mut buffer, 0, &numbers)?;
    Ok(buffer)
}

/// So many copies of a weight that they are larger than any cache.
fn pack_weights<B: Backend>(
    backend: &mut B,
    shape: WeightShape,
    data_bytes: usize,
) -> Result<Vec<B::Weight>, KernelError> {
    let WeightShape { out_features, in_features, layout, format } = shape;
    // Pace does not depend on the numbers as long as they are not zeros: some random rows, repeated.
    let num_parts = if layout == WeightLayout::GateUp { 2 } else { 1 };
    let rows = out_features / num_parts;
    let few: Vec<u8> = (0..(16.min(rows) * in_features) as u64)
        .flat_map(|index| bf16::from_f32(0.02 * nearly_normal(index)).to_le_bytes())
        .collect();
    let bytes: Vec<u8> = few.iter().copied().cycle().take(rows * in_features * 2).collect();
    let part = HostTensor { format: TensorFormat::Bf16, rows, cols: in_features, bytes: &bytes };
    let source = WeightSource { parts: vec![part; num_parts], layout, format };
    let num_copies = data_bytes.div_ceil(backend.weight_bytes(&shape)).clamp(1, MAX_RUNS);
    (0..num_copies).map(|_| backend.pack_weight(&source)).collect()
}

/// Tokens whose K and V are written at a time.
const FILL_TOKENS: usize = 4096;

/// A cache with random numbers in every slot.
fn fill_cache<B: Backend>(backend: &mut B, shape: AttentionShape, layout: &KvLayout) -> Result<B::Kv, KernelError> {
    let mut kv = backend.alloc_kv(layout)?;
    let num_slots = layout.num_slots();
    let num_tokens = FILL_TOKENS.min(num_slots);
    let mut qkv = random_buffer(backend, num_tokens * shape.qkv_len())?;
    let cos_sin: Vec<f32> = (0..num_tokens * shape.head_dim / 2).flat_map(|_| [1.0, 0.0]).collect();
    let mut cos_sin_buffer = backend.alloc(DType::F32, cos_sin.len())?;
    backend.write_f32(&mut cos_sin_buffer, 0, &cos_sin)?;
    let mut slot_mapping = backend.alloc(DType::U32, num_tokens)?;
    for first in (0..num_slots).step_by(num_tokens) {
        let slots: Vec<u32> = (first..num_slots.min(first + num_tokens)).map(|slot| slot as u32).collect();
        backend.write_u32(&mut slot_mapping, 0, &slots)?;
        backend.rope_kv_write(RopeKvWrite {
            qkv: &mut qkv,
            num_tokens: slots.len(),
            shape,
            cos_sin: &cos_sin_buffer,
            qk_norm: None,
            slot_mapping: &slot_mapping,
            kv: &mut kv,
            layer: 0,
        })?;
    }
    Ok(kv)
}

/// Median seconds of one run, and of how many times. `run` gets the turn, below `num_sets`.
fn time<B: Backend>(
    backend: &mut B,
    num_sets: usize,
    effort: OpEffort,
    run: &mut dyn FnMut(&mut B, usize) -> Result<(), KernelError>,
) -> Result<(f64, usize), KernelError> {
    // Reading it waits for all that was queued.
    let probe = backend.alloc(DType::F32, 1)?;
    let wait = |backend: &mut B| backend.read_f32(&probe, 0, &mut [0.0]);
    // The first makes kernels and working memory ready, the second says how long one takes.
    run(backend, 0)?;
    wait(backend)?;
    let start = Instant::now();
    run(backend, 1 % num_sets)?;
    wait(backend)?;
    let budget = f64::from(effort.milliseconds.max(1)) / 1e3;
    let estimate = start.elapsed().as_secs_f64().max(1e-6);
    let num_runs = ((budget / 8.0 / estimate) as usize).clamp(1, MAX_RUNS).next_multiple_of(num_sets.min(MAX_RUNS));
    let graph = match backend.can_capture() {
        true => backend.capture(|backend| (0..num_runs).try_for_each(|turn| run(backend, turn % num_sets)))?,
        false => None,
    };
    let (began, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || (began.elapsed().as_secs_f64() < budget && times.len() < 1000) {
        wait(backend)?;
        let start = Instant::now();
        match &graph {
            Some(graph) => backend.replay(graph)?,
            None => (0..num_runs).try_for_each(|turn| run(backend, turn % num_sets))?,
        }
        wait(backend)?;
        times.push(start.elapsed().as_secs_f64() / num_runs as f64);
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok((times[times.len() / 2], times.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DeviceChoice;

    #[test]
    fn every_case_has_a_figure_that_is_possible() {
        let config = EngineConfig { device: DeviceChoice::Cpu, num_threads: 1, ..EngineConfig::default() };
        let shape = AttentionShape { num_heads: 4, num_kv_heads: 2, head_dim: 16 };
        let attention = |new_tokens| OpCase::Attention {
            shape,
            block_size: 16,
            dtype: DType::Bf16,
            num_seqs: 3,
            new_tokens,
            context_len: 40,
        };
        let linear = |layout, rows| OpCase::Linear {
            out_features: 128,
            in_features: 64,
            layout,
            format: WeightFormat::Bf16,
            rows,
        };
        let cases = [linear(WeightLayout::Stacked, 1), linear(WeightLayout::GateUp, 9), attention(1), attention(40)];
        let effort = OpEffort { data_bytes: 1 << 16, milliseconds: 2 };
        let mut figures = Vec::new();
        ops(&config, &cases, effort, |_, _, case, figure| figures.push((*case, figure.expect("little memory"))))
            .unwrap();
        let flops = [2 * 128 * 64, 2 * 9 * 128 * 64, 4 * 3 * 40 * 64, 4 * 3 * (40 * 41 / 2) * 64];
        assert_eq!(figures.iter().map(|(_, figure)| figure.flops).collect::<Vec<_>>(), flops);
        let kv_bytes = 3 * 40 * 2 * 2 * 16 * 2;
        assert_eq!(figures.iter().map(|(_, figure)| figure.bytes).collect::<Vec<_>>()[2..], [kv_bytes; 2]);
        for ((case, figure), expected) in figures.iter().zip(&cases) {
            assert_eq!(case, expected);
            assert!(figure.seconds > 0.0 && figure.num_times >= 3, "{figure:?}");
            // No machine of today does more.
            assert!(figure.flops as f64 / figure.seconds < 1e15 && figure.bytes as f64 / figure.seconds < 1e13);
        }
    }
}
