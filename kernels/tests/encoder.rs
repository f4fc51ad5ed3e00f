//! What encoders need beside the operations of decoders, on every instruction set, against its meaning.

use quire_kernels::cpu::CpuBackend;
use quire_kernels::ops::activation::{self, Activation, ActivationKind};
use quire_kernels::ops::add_rows::{self, AddRows};
use quire_kernels::ops::encoder_attention::{self, EncoderAttention};
use quire_kernels::ops::layer_norm::{self, LayerNorm};
use quire_kernels::testing::{POISON, Rng, Tolerance, assert_close, assert_same_bits, cpu_backends, emulated_backends};
use quire_kernels::{Backend, DType, KernelError};

const EPS: f32 = 1e-12;

fn upload<B: Backend>(backend: &mut B, data: &[f32]) -> B::Buffer {
    let mut buffer = backend.alloc(DType::F32, data.len()).expect("room");
    backend.write_f32(&mut buffer, 0, data).expect("it fits");
    buffer
}

fn upload_ids<B: Backend>(backend: &mut B, data: &[u32]) -> B::Buffer {
    let mut buffer = backend.alloc(DType::U32, data.len()).expect("room");
    backend.write_u32(&mut buffer, 0, data).expect("it fits");
    buffer
}

fn download<B: Backend>(backend: &mut B, buffer: &B::Buffer, len: usize) -> Vec<f32> {
    let mut data = vec![0.0; len];
    backend.read_f32(buffer, 0, &mut data).expect("it fits");
    data
}

fn norm(backend: &mut CpuBackend, x: &[f32], weight: &[f32], bias: &[f32]) -> Vec<f32> {
    let dim = weight.len();
    let (x_buffer, weight, bias) = (upload(backend, x), upload(backend, weight), upload(backend, bias));
    let mut out = upload(backend, &vec![POISON; x.len()]);
    let num_rows = x.len() / dim;
    let args = LayerNorm { x: &x_buffer, weight: &weight, bias: &bias, eps: EPS, num_rows, dim, out: &mut out };
    backend.layer_norm(args).expect("shapes fit");
    download(backend, &out, x.len())
}

#[test]
fn layer_norm_is_close_to_its_meaning_and_the_same_in_any_batch() {
    let mut rng = Rng::new(1);
    for dim in [2, 8, 15, 16, 17, 63, 64, 65, 384, 1000] {
        let (weight, bias) = (rng.normals(dim), rng.normals(dim));
        let off_centre: Vec<f32> = rng.normals(70 * dim).iter().map(|x| x + 3.0).collect();
        for x in [rng.normals(3 * dim), off_centre] {
            let expected = layer_norm::reference::layer_norm(&x, &weight, &bias, EPS);
            for backends in cpu_backends(&[1, 3]).chunks_mut(2) {
                let alone: Vec<f32> =
                    x.chunks(dim).flat_map(|row| norm(&mut backends[0], row, &weight, &bias)).collect();
                // Centred numbers lose what the mean is larger than they are.
                assert_close(&alone, &expected, Tolerance { abs: 4e-5, rel: 4e-5 });
                for backend in backends {
                    assert_same_bits(&norm(backend, &x, &weight, &bias), &alone);
                }
            }
        }
    }
}

#[test]
fn activations_are_within_a_millionth() {
    let mut x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 5e-3 + 1e-4).collect();
    x.extend([0.0, -0.0, 30.0, -30.0, 200.0, -200.0, f32::NAN, 1e-30]);
    for kind in [ActivationKind::Gelu, ActivationKind::GeluTanh, ActivationKind::Relu, ActivationKind::Tanh] {
        let expected: Vec<f64> = x.iter().map(|&x| activation::reference::activation(kind, x)).collect();
        for backend in &mut cpu_backends(&[1, 2]) {
            let mut buffer = upload(backend, &x);
            backend.activation(Activation { kind, len: x.len(), x: &mut buffer }).expect("it fits");
            let actual = download(backend, &buffer, x.len());
            assert_close(&actual, &expected, Tolerance { abs: 1e-6, rel: 1e-6 });
            // What is behind `len` is left alone.
            let mut buffer = upload(backend, &[1.0, POISON]);
            backend.activation(Activation { kind, len: 1, x: &mut buffer }).expect("it fits");
            assert!(download(backend, &buffer, 2)[1].is_nan());
        }
    }
}

#[test]
fn rows_are_added_exactly() {
    let mut rng = Rng::new(3);
    for dim in [1, 16, 33] {
        let (table, out) = (rng.normals(5 * dim), rng.normals(7 * dim));
        let indices: Vec<u32> = (0..7).map(|_| rng.below(5) as u32).collect();
        let expected = add_rows::reference::add_rows(&table, dim, &indices, &out);
        for backend in &mut cpu_backends(&[1, 2]) {
            let (table, indices) = (upload(backend, &table), upload_ids(backend, &indices));
            let mut buffer = upload(backend, &out);
            let args = AddRows { table: &table, dim, indices: &indices, num_rows: 7, out: &mut buffer };
            backend.add_rows(args).expect("shapes fit");
            assert_same_bits(&download(backend, &buffer, out.len()), &expected);
        }
    }
}

struct Heads {
    num_heads: usize,
    head_dim: usize,
}

fn attend(backend: &mut CpuBackend, qkv: &[f32], cu_seqlens: &[u32], heads: &Heads) -> Vec<f32> {
    let (qkv_buffer, lens) = (upload(backend, qkv), upload_ids(backend, cu_seqlens));
    let mut out = upload(backend, &vec![POISON; qkv.len() / 3]);
    let args = EncoderAttention {
        qkv: &qkv_buffer,
        num_tokens: cu_seqlens[cu_seqlens.len() - 1] as usize,
        num_seqs: cu_seqlens.len() - 1,
        num_heads: heads.num_heads,
        head_dim: heads.head_dim,
        scale: 1.0 / (heads.head_dim as f32).sqrt(),
        cu_seqlens: &lens,
        out: &mut out,
    };
    backend.encoder_attention(args).expect("shapes fit");
    download(backend, &out, qkv.len() / 3)
}

#[test]
fn attention_is_close_to_its_meaning_and_the_same_in_any_batch() {
    let mut rng = Rng::new(4);
    let lens = [1, 5, 31, 32, 33, 63, 64, 65, 130, 0, 2];
    let mut cu_seqlens = vec![0_u32];
    for len in lens {
        cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + len);
    }
    let num_tokens = cu_seqlens[lens.len()] as usize;
    for heads in [
        Heads { num_heads: 3, head_dim: 8 },
        Heads { num_heads: 2, head_dim: 32 },
        Heads { num_heads: 1, head_dim: 72 },
    ] {
        let width = 3 * heads.num_heads * heads.head_dim;
        let qkv: Vec<f32> = rng.normals(num_tokens * width).iter().map(|x| 2.0 * x).collect();
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let expected =
            encoder_attention::reference::encoder_attention(&qkv, &cu_seqlens, heads.num_heads, heads.head_dim, scale);
        for backends in cpu_backends(&[1, 3]).chunks_mut(2) {
            let alone: Vec<f32> = cu_seqlens
                .windows(2)
                .flat_map(|bounds| {
                    let part = &qkv[bounds[0] as usize * width..bounds[1] as usize * width];
                    attend(&mut backends[0], part, &[0, bounds[1] - bounds[0]], &heads)
                })
                .collect();
            assert_close(&alone, &expected, Tolerance { abs: 1e-5, rel: 1e-5 });
            for backend in backends {
                assert_same_bits(&attend(backend, &qkv, &cu_seqlens, &heads), &alone);
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_sequence() {
    let mut rng = Rng::new(5);
    let heads = Heads { num_heads: 2, head_dim: 16 };
    let mut qkv = rng.normals(40 * 96);
    let clean = attend(&mut cpu_backends(&[1])[0], &qkv, &[0, 10, 40], &heads);
    qkv[5 * 96..6 * 96].fill(f32::NAN);
    for backend in &mut cpu_backends(&[1]) {
        let out = attend(backend, &qkv, &[0, 10, 40], &heads);
        assert!(out[..32].iter().any(|x| x.is_nan()));
        assert!(out[10 * 32..].iter().all(|x| x.is_finite()));
    }
    assert!(clean.iter().all(|x| x.is_finite()));
}

#[test]
fn wrong_shapes_are_named_and_a_device_without_the_code_says_so() {
    let mut backend = cpu_backends(&[1]).remove(0);
    let (x, short) = (upload(&mut backend, &[0.0; 12]), upload(&mut backend, &[0.0; 2]));
    let mut out = upload(&mut backend, &[0.0; 12]);
    let mut layer_norm = |weight, bias, num_rows| {
        let args = LayerNorm { x: &x, weight, bias, eps: EPS, num_rows, dim: 3, out: &mut out };
        backend.layer_norm(args).expect_err("refused")
    };
    let shape = |op, argument, expected, found| KernelError::Shape { op, argument, expected, found };
    assert_eq!(layer_norm(&x, &x, 5), shape("layer_norm", "x", 15, 12));
    assert_eq!(layer_norm(&short, &x, 4), shape("layer_norm", "weight", 3, 2));
    assert_eq!(layer_norm(&x, &short, 4), shape("layer_norm", "bias", 3, 2));

    let indices = upload_ids(&mut backend, &[0, 4]);
    let args = AddRows { table: &x, dim: 3, indices: &indices, num_rows: 2, out: &mut out };
    let range = KernelError::Range { op: "add_rows", argument: "indices", value: 4, limit: 4 };
    assert_eq!(backend.add_rows(args), Err(range));

    let mut attend = |lens: &[u32], num_tokens| {
        let cu_seqlens = upload_ids(&mut backend, lens);
        let num_seqs = lens.len() - 1;
        let mut out = upload(&mut backend, &[0.0; 4]);
        backend.encoder_attention(EncoderAttention {
            qkv: &x,
            num_tokens,
            num_seqs,
            num_heads: 1,
            head_dim: 1,
            scale: 1.0,
            cu_seqlens: &cu_seqlens,
            out: &mut out,
        })
    };
    let op = "encoder_attention";
    assert_eq!(attend(&[0, 4], 5), Err(shape(op, "qkv", 15, 12)));
    assert_eq!(attend(&[0, 3], 4), Err(shape(op, "cu_seqlens", 4, 3)));
    assert_eq!(attend(&[0, 3, 2], 2), Err(shape(op, "cu_seqlens", 3, 2)));
    assert_eq!(attend(&[1, 4], 4), Err(shape(op, "cu_seqlens", 0, 1)));
    assert_eq!(attend(&[0, 4], 4), Ok(()));

    for mut device in emulated_backends() {
        let mut x = device.alloc(DType::F32, 1).expect("room");
        let refused = device.activation(Activation { kind: ActivationKind::Tanh, len: 1, x: &mut x });
        let Err(KernelError::Device { cause, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(cause, "activation has no code for this device");
    }
}
