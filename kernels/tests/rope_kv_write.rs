//! Rotated queries and the written cache on every instruction set, in the emulator and on a card, against their meaning.

use half::bf16;
use quire_kernels::cpu::{CpuBackend, CpuKv};
use quire_kernels::cuda::{CudaBackend, CudaKv, Device};
use quire_kernels::kv_layout::KvPlace;
use quire_kernels::ops::rope_kv_write::{AttentionShape, NO_SLOT, QkNorm, RopeKvWrite, reference};
use quire_kernels::testing::{Rng, Tolerance, assert_close, cpu_backends, read_kv};
use quire_kernels::{Backend, DType, KernelError, KvLayout, device_tests};

/// Two products and a sum, each rounded to 24 bits; with the norm before them, its 2e-6 too. Relative to the
/// larger of two numbers that may cancel, which is why there is an absolute part.
const TOLERANCE: Tolerance = Tolerance { abs: 4e-6, rel: 4e-6 };

/// And the rounding to 8 bits.
const TOLERANCE_BF16: Tolerance = Tolerance { abs: 4e-6, rel: 1.0 / 256.0 };

struct Case {
    shape: AttentionShape,
    dtype: DType,
    has_norm: bool,
    num_tokens: usize,
}

struct Inputs {
    layout: KvLayout,
    qkv: Vec<f32>,
    cos_sin: Vec<f32>,
    q_weight: Vec<f32>,
    k_weight: Vec<f32>,
    slots: Vec<u32>,
}

const LAYER: usize = 1;

impl Case {
    fn inputs(&self, rng: &mut Rng) -> Inputs {
        let AttentionShape { num_kv_heads, head_dim, .. } = self.shape;
        let block_size = 16;
        let num_blocks = 2 + self.num_tokens.div_ceil(block_size);
        let layout = KvLayout { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype: self.dtype };
        let cos_sin = (0..self.num_tokens * head_dim / 2).flat_map(|i| [(i as f32).cos(), (i as f32).sin()]).collect();
        Inputs {
            layout,
            qkv: rng.normals(self.num_tokens * self.shape.qkv_len()),
            cos_sin,
            q_weight: rng.normals(head_dim),
            k_weight: rng.normals(head_dim),
            slots: rng.permutation(layout.num_slots())[..self.num_tokens].to_vec(),
        }
    }

    /// The changed `qkv`, and the cache.
    fn run<B: ReadCache>(&self, backend: &mut B, inputs: &Inputs) -> (Vec<f32>, Vec<f32>) {
        let mut upload = |data: &[f32]| {
            let mut buffer = backend.alloc(DType::F32, data.len()).expect("room");
            backend.write_f32(&mut buffer, 0, data).expect("it fits");
            buffer
        };
        let mut qkv = upload(&inputs.qkv);
        let cos_sin = upload(&inputs.cos_sin);
        let (q_weight, k_weight) = (upload(&inputs.q_weight), upload(&inputs.k_weight));
        let mut slot_mapping = backend.alloc(DType::U32, self.num_tokens).expect("room");
        backend.write_u32(&mut slot_mapping, 0, &inputs.slots).expect("it fits");
        let mut kv = backend.alloc_kv(&inputs.layout).expect("room");
        let qk_norm = self.has_norm.then_some(QkNorm { q_weight: &q_weight, k_weight: &k_weight, eps: 1e-6 });
        let args = RopeKvWrite {
            qkv: &mut qkv,
            num_tokens: self.num_tokens,
            shape: self.shape,
            cos_sin: &cos_sin,
            qk_norm,
            slot_mapping: &slot_mapping,
            kv: &mut kv,
            layer: LAYER,
        };
        backend.rope_kv_write(args).expect("shapes fit");
        let mut result = vec![0.0; inputs.qkv.len()];
        backend.read_f32(&qkv, 0, &mut result).expect("it fits");
        (result, read_cache(&backend.host_cache(&kv)))
    }
}

/// A device whose cache can be looked at.
trait ReadCache: Backend {
    /// The cache in the memory of the host.
    fn host_cache(&mut self, kv: &Self::Kv) -> CpuKv;
}

impl ReadCache for CpuBackend {
    fn host_cache(&mut self, kv: &CpuKv) -> CpuKv {
        let mut copy = self.alloc_kv(kv.layout()).expect("room");
        match kv.layout().dtype {
            DType::F32 => copy.f32_mut("copy").expect("f32").copy_from_slice(kv.f32("copy").expect("f32")),
            DType::I8 | DType::F8E4M3 => {
                copy.i8_mut("copy").expect("int8").copy_from_slice(kv.i8("copy").expect("int8"))
            }
            _ => copy.bf16_mut("copy").expect("bf16").copy_from_slice(kv.bf16("copy").expect("bf16")),
        }
        copy
    }
}

impl<D: Device> ReadCache for CudaBackend<D> {
    fn host_cache(&mut self, kv: &CudaKv) -> CpuKv {
        let mut bytes = vec![0; kv.layout().total_bytes()];
        self.device().download(kv.ptr(), &mut bytes).expect("the cache is there");
        let mut copy = cpu_backends(&[1])[0].alloc_kv(kv.layout()).expect("room");
        match kv.layout().dtype {
            DType::F32 => {
                let numbers = bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x));
                copy.f32_mut("copy").expect("f32").iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
            }
            DType::I8 | DType::F8E4M3 => {
                let numbers = bytes.iter().map(|&x| x as i8);
                copy.i8_mut("copy").expect("int8").iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
            }
            _ => {
                let numbers = bytes.as_chunks::<2>().0.iter().map(|x| u16::from_le_bytes(*x));
                copy.bf16_mut("copy").expect("bf16").iter_mut().zip(numbers).for_each(|(to, x)| *to = x);
            }
        }
        copy
    }
}

/// Every number of K and V, `[layer, block, head, offset, dim, 2]`.
fn read_cache(kv: &CpuKv) -> Vec<f32> {
    let layout = *kv.layout();
    places(&layout)
        .flat_map(|place| (0..layout.head_dim).flat_map(move |dim| read_kv(kv, place, dim).map(|x| x as f32)))
        .collect()
}

fn places(layout: &KvLayout) -> impl Iterator<Item = KvPlace> + use<> {
    let KvLayout { num_layers, num_blocks, num_kv_heads, block_size, .. } = *layout;
    (0..num_layers * num_blocks * num_kv_heads * block_size).map(move |index| KvPlace {
        layer: index / block_size / num_kv_heads / num_blocks,
        block: index / block_size / num_kv_heads % num_blocks,
        kv_head: index / block_size % num_kv_heads,
        offset: index % block_size,
    })
}

/// Where [`read_cache`] has the first number of a place.
fn cache_index(layout: &KvLayout, place: KvPlace) -> usize {
    let head = (place.layer * layout.num_blocks + place.block) * layout.num_kv_heads + place.kv_head;
    (head * layout.block_size + place.offset) * layout.head_dim * 2
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (num_heads, num_kv_heads, head_dim) in [(1, 1, 2), (4, 1, 8), (6, 2, 24), (7, 1, 64), (8, 2, 128)] {
        for dtype in [DType::F32, DType::Bf16, DType::I8, DType::F8E4M3] {
            for (has_norm, num_tokens) in [(false, 1), (true, 17), (false, 70)] {
                let shape = AttentionShape { num_heads, num_kv_heads, head_dim };
                cases.push(Case { shape, dtype, has_norm, num_tokens });
            }
        }
    }
    cases
}

device_tests! {
    close_to_the_reference_and_nothing_else_is_touched: |open| check_all_cases(open(None).into_iter().collect());
    values_are_rounded_to_nearest_even_and_a_nan_stays_one: |open| check_rounding(open(None).into_iter().collect());
    a_quantized_token_has_its_own_scales: |open| check_scales(open(None).into_iter().collect());
    a_token_has_the_same_bits_in_any_batch: |open| open(None).into_iter().for_each(|backend| {
        check_same_bits(&mut [backend]);
    });
    a_token_without_a_slot_leaves_the_cache_alone: |open| check_no_slot(open(None).into_iter().collect());
    a_slot_past_the_cache_is_told_when_it_is_read: |open| {
        open(None).into_iter().for_each(tells_of_a_slot_past_the_cache);
    };
}

#[test]
fn close_to_the_reference_on_the_cpu() {
    check_all_cases(cpu_backends(&[1, 2]));
}

fn check_all_cases<B: ReadCache>(mut backends: Vec<B>) {
    let mut rng = Rng::new(1);
    for case in cases() {
        let inputs = case.inputs(&mut rng);
        let (shape, layout) = (case.shape, inputs.layout);
        let norm = case.has_norm.then_some((&inputs.q_weight[..], &inputs.k_weight[..], 1e-6));
        let (q, k, v) = reference::rope_kv_write(&inputs.qkv, shape, &inputs.cos_sin, norm);
        let mut expected_cache = vec![0.0; places(&layout).count() * layout.head_dim * 2];
        let mut largest = 0.0_f64;
        for (token, &slot) in inputs.slots.iter().enumerate() {
            let (block, offset) = (slot as usize / layout.block_size, slot as usize % layout.block_size);
            for kv_head in 0..shape.num_kv_heads {
                let place = KvPlace { layer: LAYER, block, kv_head, offset };
                for dim in 0..shape.head_dim {
                    let index = (token * shape.num_kv_heads + kv_head) * shape.head_dim + dim;
                    let at = cache_index(&layout, place) + 2 * dim;
                    expected_cache[at..at + 2].copy_from_slice(&[k[index], v[index]]);
                    largest = largest.max(k[index].abs()).max(v[index].abs());
                }
            }
        }
        for backend in &mut backends {
            let (qkv, cache) = case.run(backend, &inputs);
            let tolerance = match case.dtype {
                DType::F32 => TOLERANCE,
                // Half a step of a token's scale, which is the largest magnitude over 127.
                DType::I8 => Tolerance { abs: 4e-6 + 0.501 * largest / 127.0, rel: 0.0 },
                // Half a step of a number's own, or of the smallest ones of a scale.
                DType::F8E4M3 => Tolerance { abs: 4e-6 + 0.501 * largest / 448.0 / 512.0, rel: 1.0 / 16.0 + 1e-5 },
                _ => TOLERANCE_BF16,
            };
            assert_close(&cache, &expected_cache, tolerance);
            let rows = qkv.chunks(shape.qkv_len()).zip(inputs.qkv.chunks(shape.qkv_len()));
            for ((row, before), q) in rows.zip(q.chunks(shape.q_len())) {
                assert_close(&row[..shape.q_len()], q, TOLERANCE);
                assert_eq!(row[shape.q_len()..], before[shape.q_len()..]);
            }
        }
    }
}

#[test]
fn values_are_rounded_to_nearest_even_by_the_cpu_and_a_nan_stays_one() {
    check_rounding(cpu_backends(&[1]));
}

fn check_rounding<B: ReadCache>(backends: Vec<B>) {
    let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 8 };
    let case = Case { shape, dtype: DType::Bf16, has_norm: false, num_tokens: 1 };
    let mut inputs = case.inputs(&mut Rng::new(1));
    let half_unit = 1.0 / 256.0;
    let values = [1.0 + half_unit, 1.0 + 3.0 * half_unit, -1.0 - half_unit, 1e-40, f32::MAX, f32::NAN, -0.0, 3.0];
    inputs.qkv[16..].copy_from_slice(&values);
    for mut backend in backends {
        let (_, cache) = case.run(&mut backend, &inputs);
        let slot = inputs.slots[0] as usize;
        let place = KvPlace { layer: LAYER, block: slot / 16, kv_head: 0, offset: slot % 16 };
        for (dim, value) in values.into_iter().enumerate() {
            let actual = cache[cache_index(&inputs.layout, place) + 2 * dim + 1];
            let expected = bf16::from_f32(value).to_f32();
            assert!(actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan()), "{value}");
        }
    }
}

#[test]
fn a_quantized_token_has_its_own_scales_and_shows_what_is_no_number() {
    check_scales(cpu_backends(&[1, 2]));
}

fn check_scales<B: ReadCache>(mut backends: Vec<B>) {
    for dtype in [DType::I8, DType::F8E4M3] {
        check_scales_of(dtype, &mut backends);
    }
}

fn check_scales_of<B: ReadCache>(dtype: DType, backends: &mut [B]) {
    let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim: 8 };
    let case = Case { shape, dtype, has_norm: false, num_tokens: 3 };
    let mut inputs = case.inputs(&mut Rng::new(1));
    // A large token, a small one, one with an infinity among its values.
    for (token, factor) in [100.0, 0.01, 1.0].into_iter().enumerate() {
        inputs.qkv[token * 24..][..24].iter_mut().for_each(|x| *x *= factor);
    }
    inputs.qkv[2 * 24 + 20] = f32::INFINITY;
    for backend in backends {
        let (_, cache) = case.run(backend, &inputs);
        for (token, &slot) in inputs.slots.iter().enumerate() {
            let (block, offset) = (slot as usize / 16, slot as usize % 16);
            let at = cache_index(&inputs.layout, KvPlace { layer: LAYER, block, kv_head: 0, offset });
            let v = &inputs.qkv[token * 24 + 16..][..8];
            let largest = v.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (dim, &v) in v.iter().enumerate() {
                let [k, actual] = [cache[at + 2 * dim], cache[at + 2 * dim + 1]];
                assert!(k.is_finite());
                let step =
                    if dtype == DType::I8 { largest / 127.0 } else { (v.abs() / 8.0).max(largest / 448.0 / 512.0) };
                assert!(if token == 2 { actual.is_nan() } else { (actual - v).abs() <= 0.501 * step });
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_in_any_batch_and_on_any_number_of_threads() {
    cpu_backends(&[1, 2, 3]).chunks_mut(3).for_each(check_same_bits);
}

fn check_same_bits<B: ReadCache>(backends: &mut [B]) {
    let mut rng = Rng::new(3);
    for case in cases() {
        let inputs = case.inputs(&mut rng);
        let all = case.run(&mut backends[0], &inputs);
        for backend in &mut backends[1..] {
            assert_eq!(case.run(backend, &inputs), all);
        }
        let token = case.num_tokens - 1;
        let alone = Case { num_tokens: 1, ..case };
        let part = |data: &[f32], len: usize| data[token * len..][..len].to_vec();
        let own = Inputs {
            qkv: part(&inputs.qkv, case.shape.qkv_len()),
            cos_sin: part(&inputs.cos_sin, case.shape.head_dim),
            slots: vec![inputs.slots[token]],
            q_weight: inputs.q_weight.clone(),
            k_weight: inputs.k_weight.clone(),
            ..inputs
        };
        let (qkv, cache) = alone.run(&mut backends[0], &own);
        assert_eq!(qkv, part(&all.0, case.shape.qkv_len()));
        // Zero is what nobody wrote.
        assert!(cache.iter().zip(&all.1).all(|(alone, all)| *alone == 0.0 || alone == all));
    }
}

#[test]
fn a_token_without_a_slot_turns_its_queries_and_leaves_the_cache_alone() {
    check_no_slot(cpu_backends(&[2]));
}

fn check_no_slot<B: ReadCache>(mut backends: Vec<B>) {
    let mut rng = Rng::new(4);
    for case in cases() {
        let inputs = case.inputs(&mut rng);
        for backend in &mut backends {
            let (qkv, cache) = case.run(backend, &inputs);
            assert!(cache.iter().any(|&x| x != 0.0));
            let nowhere = Inputs {
                layout: inputs.layout,
                qkv: inputs.qkv.clone(),
                cos_sin: inputs.cos_sin.clone(),
                slots: vec![NO_SLOT; case.num_tokens],
                q_weight: inputs.q_weight.clone(),
                k_weight: inputs.k_weight.clone(),
            };
            let (same_qkv, cache) = case.run(backend, &nowhere);
            assert_eq!(same_qkv, qkv);
            assert!(cache.iter().all(|&x| x == 0.0));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let mut backend = cpu_backends(&[2]).remove(0);
    let shape = AttentionShape { num_heads: 2, num_kv_heads: 1, head_dim: 4 };
    let layout =
        KvLayout { num_layers: 1, num_blocks: 2, block_size: 16, num_kv_heads: 1, head_dim: 4, dtype: DType::F32 };
    let mut kv = backend.alloc_kv(&layout).expect("room");
    let mut qkv = backend.alloc(DType::F32, 2 * shape.qkv_len()).expect("room");
    backend.write_f32(&mut qkv, 0, &[1.0; 32]).expect("it fits");
    let cos_sin = backend.alloc(DType::F32, 2 * 4).expect("room");
    let mut slots = backend.alloc(DType::U32, 2).expect("room");
    backend.write_u32(&mut slots, 0, &[0, 32]).expect("it fits");
    let mut run = |shape, num_tokens, layer| {
        let args = RopeKvWrite {
            qkv: &mut qkv,
            num_tokens,
            shape,
            cos_sin: &cos_sin,
            qk_norm: None,
            slot_mapping: &slots,
            kv: &mut kv,
            layer,
        };
        backend.rope_kv_write(args).expect_err("refused")
    };
    let op = "rope_kv_write";
    assert_eq!(run(shape, 2, 0), KernelError::Range { op, argument: "slot_mapping", value: 32, limit: 32 });
    assert_eq!(run(shape, 2, 1), KernelError::Range { op, argument: "layer", value: 1, limit: 1 });
    let refused = |argument, expected, found| KernelError::Shape { op, argument, expected, found };
    assert_eq!(run(shape, 3, 0), refused("qkv", 48, 32));
    assert_eq!(run(AttentionShape { num_heads: 3, num_kv_heads: 2, ..shape }, 1, 0), refused("num_heads", 4, 3));
    assert_eq!(run(AttentionShape { head_dim: 3, ..shape }, 1, 0), refused("head_dim", 4, 3));
    assert_eq!(run(AttentionShape { head_dim: 2, ..shape }, 1, 0), refused("kv", 2, 4));
    let mut result = [0.0; 32];
    backend.read_f32(&qkv, 0, &mut result).expect("it fits");
    assert_eq!(result, [1.0; 32]);
    assert!(kv.f32("test").expect("f32").iter().all(|&x| x == 0.0));
}

fn tells_of_a_slot_past_the_cache<D: Device>(mut backend: CudaBackend<D>) {
    let shape = AttentionShape { num_heads: 2, num_kv_heads: 2, head_dim: 8 };
    let case = Case { shape, dtype: DType::Bf16, has_norm: false, num_tokens: 2 };
    let inputs = case.inputs(&mut Rng::new(5));
    let mut qkv = backend.alloc(DType::F32, inputs.qkv.len()).expect("room");
    backend.write_f32(&mut qkv, 0, &inputs.qkv).expect("it fits");
    let mut cos_sin = backend.alloc(DType::F32, inputs.cos_sin.len()).expect("room");
    backend.write_f32(&mut cos_sin, 0, &inputs.cos_sin).expect("it fits");
    let mut slot_mapping = backend.alloc(DType::U32, 2).expect("room");
    let num_slots = inputs.layout.num_slots();
    backend.write_u32(&mut slot_mapping, 0, &[num_slots as u32, 1]).expect("it fits");
    let mut kv = backend.alloc_kv(&inputs.layout).expect("room");
    let args = RopeKvWrite {
        qkv: &mut qkv,
        num_tokens: 2,
        shape,
        cos_sin: &cos_sin,
        qk_norm: None,
        slot_mapping: &slot_mapping,
        kv: &mut kv,
        layer: LAYER,
    };
    backend.rope_kv_write(args).expect("sizes fit");
    let mut after = vec![0.0; inputs.qkv.len()];
    let (value, limit) = (num_slots as u64, num_slots as u64);
    let expected = KernelError::Range { op: "rope_kv_write", argument: "slot_mapping", value, limit };
    assert_eq!(backend.read_f32(&qkv, 0, &mut after), Err(expected));
    backend.read_f32(&qkv, 0, &mut after).expect("it fits");
    let len = shape.qkv_len();
    assert_eq!(after[..len], inputs.qkv[..len], "the token with the bad slot is left alone");
    assert_ne!(after[len..], inputs.qkv[len..], "the other one is not");
}
