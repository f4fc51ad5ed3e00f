use std::sync::atomic::{AtomicI8, AtomicU16, AtomicU32, Ordering};

use super::{Lens, NO_SLOT, RopeKvWrite};
use crate::cpu::lanes::{Lanes, Vectorized, bf16_bits, vectorize};
use crate::cpu::thread_pool::SharedMut;
use crate::cpu::{CpuBackend, CpuKv};
use crate::kv_layout::{KvPlace, KvToken, MAX_HEAD_DIM, quantize};
use crate::ops::below;
use crate::ops::rms_norm::cpu::normalize;
use crate::{DType, KernelError};

/// Numbers that are worth waking another thread for.
const MIN_NUMBERS_PER_THREAD: usize = 8 * 1024;

pub(crate) fn rope_kv_write(backend: &mut CpuBackend, args: RopeKvWrite<'_, CpuBackend>) -> Result<(), KernelError> {
    const OP: &str = RopeKvWrite::<CpuBackend>::OP;
    let layout = *args.kv.layout();
    args.check(
        Lens {
            qkv: args.qkv.len(),
            cos_sin: args.cos_sin.len(),
            slot_mapping: args.slot_mapping.len(),
            qk_norm: args.qk_norm.as_ref().map(|norm| [norm.q_weight.len(), norm.k_weight.len()]),
        },
        &layout,
    )?;
    let RopeKvWrite { num_tokens, shape, layer, .. } = args;
    let (qkv_len, head_dim, group_len) = (shape.qkv_len(), shape.head_dim, shape.group_len());
    let cos_sin = args.cos_sin.f32(OP, "cos_sin")?;
    let slots = &args.slot_mapping.u32(OP, "slot_mapping")?[..num_tokens];
    for &slot in slots.iter().filter(|&&slot| slot != NO_SLOT) {
        below(OP, "slot_mapping", slot, layout.num_slots())?;
    }
    let norm = match &args.qk_norm {
        Some(norm) => {
            let q_weight = &norm.q_weight.f32(OP, "q_weight")?[..head_dim];
            let k_weight = &norm.k_weight.f32(OP, "k_weight")?[..head_dim];
            Some(Norm { q_weight, k_weight, eps: norm.eps })
        }
        None => None,
    };
    let qkv = SharedMut::new(&mut args.qkv.f32_mut(OP, "qkv")?[..num_tokens * qkv_len]);
    let cache = Cache::new(args.kv, OP)?;
    let isa = backend.isa;

    // One item is a KV head of a token and the queries of its group.
    let num_items = num_tokens * shape.num_kv_heads;
    let item_len = (group_len + 2) * head_dim;
    backend.pool.run_ranges(num_items, MIN_NUMBERS_PER_THREAD.div_ceil(item_len), &|_, items| {
        for item in items {
            let (token, kv_head) = (item / shape.num_kv_heads, item % shape.num_kv_heads);
            let row = token * qkv_len;
            let q_start = row + kv_head * group_len * head_dim;
            let k_start = row + shape.q_len() + kv_head * head_dim;
            let v_start = k_start + shape.num_kv_heads * head_dim;
            let at = (slots[token] != NO_SLOT).then(|| {
                let slot = slots[token] as usize;
                let (block, offset) = (slot / layout.block_size, slot % layout.block_size);
                layout.token(KvPlace { layer, block, kv_head, offset })
            });
            // SAFETY: an item is in one thread's range, and queries, keys and values of different items are different
            // parts of the rows.
            let (q, k, v) = unsafe {
                (
                    qkv.slice_mut(q_start..q_start + group_len * head_dim),
                    qkv.slice_mut(k_start..k_start + head_dim),
                    qkv.slice_mut(v_start..v_start + head_dim),
                )
            };
            let cos_sin = &cos_sin[token * head_dim..][..head_dim];
            vectorize(isa, Item { q, k, v, cos_sin, norm, cache: &cache, at });
        }
    });
    Ok(())
}

#[derive(Clone, Copy)]
struct Norm<'a> {
    q_weight: &'a [f32],
    k_weight: &'a [f32],
    eps: f32,
}

/// The cache as numbers that several threads may write: tokens of different threads lie side by side in it, and whether
/// slots differ is the caller's promise, which memory safety must not rest on. A relaxed store is a plain one.
enum Cache<'a> {
    F32(&'a [AtomicU32]),
    Bf16(&'a [AtomicU16]),
    /// All of the cache as codes of a type, and all of it as scales; each token has its own of both.
    Quantized(DType, &'a [AtomicI8], &'a [AtomicU32]),
}

impl<'a> Cache<'a> {
    fn new(kv: &'a mut CpuKv, op: &'static str) -> Result<Self, KernelError> {
        match kv.layout().dtype {
            DType::F32 => {
                let numbers = std::ptr::from_mut(kv.f32_mut(op)?);
                // SAFETY: an atomic has the size, alignment and bits of its number, and the borrow is exclusive.
                Ok(Self::F32(unsafe { &*(numbers as *const [AtomicU32]) }))
            }
            dtype if dtype.is_quantized() => {
                let codes = std::ptr::from_mut(kv.i8_mut(op)?);
                let scales = std::ptr::slice_from_raw_parts(codes.cast::<AtomicU32>(), codes.len() / size_of::<f32>());
                // SAFETY: as above, and the cache is aligned to 64 bytes; the layout gives no byte to both a code
                // and a scale, so none is accessed as both.
                Ok(Self::Quantized(dtype, unsafe { &*(codes as *const [AtomicI8]) }, unsafe { &*scales }))
            }
            _ => {
                let numbers = std::ptr::from_mut(kv.bf16_mut(op)?);
                // SAFETY: as above.
                Ok(Self::Bf16(unsafe { &*(numbers as *const [AtomicU16]) }))
            }
        }
    }

    /// Writes K and V of one token and head.
    #[inline(always)]
    fn write(&self, at: KvToken, k: &[f32], v: &[f32]) {
        match self {
            Self::F32(numbers) => write(numbers, at, k, v, |number, x| number.store(x.to_bits(), Ordering::Relaxed)),
            Self::Bf16(numbers) => write(numbers, at, k, v, |number, x| number.store(bf16_bits(x), Ordering::Relaxed)),
            Self::Quantized(dtype, codes, scales) => {
                let mut quantized = [[0; MAX_HEAD_DIM]; 2];
                let at_scales = at.scales.expect("quantized numbers have scales");
                for ((x, quantized), at) in [k, v].into_iter().zip(&mut quantized).zip(at_scales) {
                    let scale = quantize(*dtype, x, &mut quantized[..x.len()]);
                    scales[at].store(scale.to_bits(), Ordering::Relaxed);
                }
                let [k, v] = [&quantized[0][..k.len()], &quantized[1][..v.len()]];
                write(codes, at, k, v, |number, x| number.store(x, Ordering::Relaxed));
            }
        }
    }
}

#[inline(always)]
fn write<T, X: Copy>(numbers: &[T], at: KvToken, k: &[X], v: &[X], store: impl Fn(&T, X)) {
    for (out, k) in numbers[at.k_start..].chunks(at.k_stride).zip(k.chunks_exact(at.k_run)) {
        for (out, &k) in out.iter().zip(k) {
            store(out, k);
        }
    }
    for (out, &v) in numbers[at.v_start..].iter().step_by(at.v_stride).zip(v) {
        store(out, v);
    }
}

struct Item<'a> {
    q: &'a mut [f32],
    k: &'a [f32],
    v: &'a [f32],
    cos_sin: &'a [f32],
    norm: Option<Norm<'a>>,
    cache: &'a Cache<'a>,
    /// `None` of a token that has no slot.
    at: Option<KvToken>,
}

impl Vectorized for Item<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let head_dim = self.k.len();
        for q in self.q.chunks_exact_mut(head_dim) {
            if let Some(norm) = self.norm {
                normalize(simd, q, norm.q_weight, norm.eps);
            }
            rotate(q, self.cos_sin);
        }
        let Some(at) = self.at else { return };
        let mut k = [0.0; MAX_HEAD_DIM];
        let k = &mut k[..head_dim];
        k.copy_from_slice(self.k);
        if let Some(norm) = self.norm {
            normalize(simd, k, norm.k_weight, norm.eps);
        }
        rotate(k, self.cos_sin);
        self.cache.write(at, k, self.v);
    }
}

/// Turns dimension i with i + head_dim / 2.
#[inline(always)]
fn rotate(x: &mut [f32], cos_sin: &[f32]) {
    let (first, second) = x.split_at_mut(x.len() / 2);
    for ((a, b), &[cos, sin]) in first.iter_mut().zip(second).zip(cos_sin.as_chunks::<2>().0) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
