//! What fewer bits cost: how far the next-token distributions of quantized weights lie from those of f32.
//!
//! Norm: the mean over all positions of the Kullback-Leibler divergence `KL(f32 || quantized)`, in nats, on text that the
//! model itself wrote. For comparison bf16, which every peer serves. Run with `--nocapture` for the table.

use std::path::Path;

use quire_engine::testing::gguf::gguf_twins;
use quire_engine::testing::{Recorder, prompt_logits, read_all, start_on_cpu, submission};
use quire_engine::{
    DTypeChoice, EngineConfig, ModelSource, OpenedModel, QuantizeChoice, SchedulerSettings, start_beside,
};
use quire_kernels::cpu::Isa;
use quire_kernels::{TensorFormat, e4m3};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

const NUM_TEXTS: usize = 6;
const TEXT_LEN: u32 = 140;

fn config(dtype: DTypeChoice, quantize: QuantizeChoice) -> EngineConfig {
    EngineConfig { dtype, quantize, num_threads: 2, kv_cache_memory: 32 << 20, ..EngineConfig::default() }
}

/// What the model says in f32 when it is left to itself, from single tokens on.
async fn own_texts(source: &ModelSource) -> Vec<Vec<u32>> {
    let settings = SchedulerSettings { max_num_seqs: 8, ..SchedulerSettings::default() };
    let engine = config(DTypeChoice::F32, QuantizeChoice::None);
    let handle = start_on_cpu(source, Isa::detect(), &engine, &settings, Box::new(Recorder::default())).unwrap();
    let mut texts = Vec::new();
    for index in 0..NUM_TEXTS {
        let start = 5 + index as u32;
        let mut request = submission(&[start], TEXT_LEN);
        request.sampling.temperature = 0.8;
        request.sampling.seed = index as u64;
        let mut text = vec![start];
        text.extend(&read_all(&mut handle.submit(request).await.unwrap()).await[0].tokens);
        texts.push(text);
    }
    texts
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().fold(f64::NEG_INFINITY, |largest, &x| largest.max(f64::from(x)));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    logits.iter().map(|&x| f64::from(x) - largest - sum.ln()).collect()
}

/// Mean divergence, and the share of positions whose most likely token is the same.
fn divergence(exact: &[Vec<f32>], found: &[Vec<f32>], vocab_size: usize) -> (f64, f64) {
    let argmax = |values: &[f64]| (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b]));
    let (mut sum, mut num_same, mut num) = (0.0, 0, 0);
    for (exact, found) in exact.iter().zip(found) {
        for (exact, found) in exact.chunks_exact(vocab_size).zip(found.chunks_exact(vocab_size)) {
            let (p, q) = (log_softmax(exact), log_softmax(found));
            sum += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
            num_same += usize::from(argmax(&p) == argmax(&q));
            num += 1;
        }
    }
    (sum / num as f64, num_same as f64 / num as f64)
}

async fn measure(name: &str, source: &ModelSource, formats: &[(&str, DTypeChoice, QuantizeChoice, f64)]) {
    let texts = own_texts(source).await;
    let num_tokens: usize = texts.iter().map(Vec::len).sum();
    assert!(num_tokens > 100, "the model stopped early: {num_tokens} tokens");
    let logits = |dtype, quantize| {
        let config = config(dtype, quantize);
        prompt_logits(source, Isa::detect(), &config, &texts, 256).unwrap()
    };
    let exact = logits(DTypeChoice::F32, QuantizeChoice::None);
    let vocab_size = exact[0].len() / texts[0].len();
    for &(format, dtype, quantize, most) in formats {
        let (divergence, same) = divergence(&exact, &logits(dtype, quantize), vocab_size);
        println!("{name:>24} {format:>6}: KL {divergence:.2e} nats, same first choice {:.1} %", 100.0 * same);
        assert!(divergence >= 0.0 && divergence < most, "{name} in {format}: {divergence:.2e} nats");
    }
}

fn folder(path: &str) -> ModelSource {
    ModelSource::Directory(Path::new(env!("CARGO_MANIFEST_DIR")).join(path))
}

/// The bounds are some three times what was found when the formats were made: rounding again, or to fewer bits than
/// meant, shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_model_keeps_its_distributions() {
    use {DTypeChoice::Bf16, QuantizeChoice as Q};
    let formats = [
        ("bf16", Bf16, Q::None, 5e-5),
        ("fp8", Bf16, Q::Fp8, 5e-3),
        ("int8", Bf16, Q::Int8, 1e-3),
        ("int4", Bf16, Q::Int4, 5e-2),
    ];
    measure("demo", &folder("../router/demo"), &formats).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_random_models_keep_their_distributions() {
    use {DTypeChoice::Bf16, QuantizeChoice as Q};
    let formats = [("bf16", Bf16, Q::None, 5e-4), ("int8", Bf16, Q::Int8, 6e-3), ("int4", Bf16, Q::Int4, 0.4)];
    let mut folders: Vec<_> = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    folders.sort();
    for path in folders {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        measure(&name, &ModelSource::Directory(path), &formats).await;
    }
}

/// Files as the tests' own encoder writes them, which rounds to nearest: makers of files that look for better scales lose
/// less. Rows that are no whole number of 256 weights stay at 8 bits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_files_keep_the_demo_models_distributions() {
    let source = folder("../router/demo");
    let texts = own_texts(&source).await;
    let logits = |source: &ModelSource, dtype| {
        prompt_logits(source, Isa::detect(), &config(dtype, QuantizeChoice::None), &texts, 256).unwrap()
    };
    let exact = logits(&source, DTypeChoice::F32);
    let vocab_size = exact[0].len() / texts[0].len();
    let temp = tempfile::tempdir().unwrap();
    for (format, most) in [
        (TensorFormat::Q8_0, 1e-3),
        (TensorFormat::Q6K, 5e-3),
        (TensorFormat::Q5K, 2e-2),
        (TensorFormat::Q5_0, 2e-2),
        (TensorFormat::Q5_1, 2e-2),
        (TensorFormat::Q4K, 1e-1),
        (TensorFormat::Q4_0, 1e-1),
        (TensorFormat::Q4_1, 1e-1),
        (TensorFormat::Iq4Nl, 1e-1),
    ] {
        let of_shape = |_: &str, shape: &[usize]| {
            let is_whole = shape.last().is_some_and(|cols| cols.is_multiple_of(format.block_len()));
            if is_whole { format } else { TensorFormat::Q8_0 }
        };
        let file = gguf_twins(&source, of_shape).file.write(&temp.path().join("model.gguf"));
        let (divergence, same) = divergence(&exact, &logits(&file, DTypeChoice::Bf16), vocab_size);
        println!(
            "{:>24} {:>6}: KL {divergence:.2e} nats, same first choice {:.1} %",
            "demo",
            format.name(),
            100.0 * same
        );
        assert!(divergence >= 0.0 && divergence < most, "{}: {divergence:.2e} nats", format.name());
    }
}

/// A tensor of a file: its name, type, shape and bytes.
type Written = (String, Dtype, Vec<usize>, Vec<u8>);

/// The demo model with `<name>_scale_inv` or `<name>_scale` beside weights of 8-bit floats, as makers of such files write them,
/// and one that holds in f32 what these weights are. Rows of 704 numbers, no whole number of 128, are among them.
fn fp8_twins(folder: &Path, has_blocks: bool) -> [ModelSource; 2] {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../router/demo");
    let file = std::fs::read(demo.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let mut written: [Vec<Written>; 2] = Default::default();
    let f32_bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    for (name, view) in tensors.iter() {
        let (shape, bytes) = (view.shape().to_vec(), view.data());
        if !name.ends_with("_proj.weight") {
            written
                .iter_mut()
                .for_each(|list| list.push((name.to_owned(), view.dtype(), shape.clone(), bytes.to_vec())));
            continue;
        }
        let (rows, cols) = (shape[0], shape[1]);
        let mut values = vec![0.0; rows * cols];
        TensorFormat::Bf16.decode(bytes, &mut values);
        let (down, across) = if has_blocks { (128, 128) } else { (1, cols) };
        let num_across = cols.div_ceil(across);
        let mut scales = vec![0.0_f32; rows.div_ceil(down) * num_across];
        let place = |index: usize| index / cols / down * num_across + index % cols / across;
        for (index, value) in values.iter().enumerate() {
            let scale = &mut scales[place(index)];
            *scale = scale.max(value.abs() / e4m3::MAX);
        }
        let codes: Vec<u8> =
            values.iter().enumerate().map(|(index, value)| e4m3::from_f32(value / scales[place(index)])).collect();
        let exact: Vec<f32> =
            codes.iter().enumerate().map(|(index, &code)| e4m3::to_f32(code) * scales[place(index)]).collect();
        let (suffix, scale_shape) =
            if has_blocks { ("_scale_inv", vec![rows.div_ceil(128), num_across]) } else { ("_scale", vec![rows, 1]) };
        written[0].push((name.to_owned(), Dtype::F8_E4M3, shape.clone(), codes));
        written[0].push((format!("{name}{suffix}"), Dtype::F32, scale_shape, f32_bytes(&scales)));
        written[1].push((name.to_owned(), Dtype::F32, shape, f32_bytes(&exact)));
    }
    let mut index = 0;
    written.map(|list| {
        let folder = folder.join(format!("{has_blocks}-{index}"));
        std::fs::create_dir(&folder).unwrap();
        let views = list
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(demo.join("config.json")).unwrap()).unwrap();
        if index == 0 {
            config["quantization_config"] = serde_json::json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        }
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        index += 1;
        ModelSource::Directory(folder)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_of_8_bit_floats_are_served_as_they_are() {
    let texts = own_texts(&folder("../router/demo")).await;
    let temp = tempfile::tempdir().unwrap();
    for has_blocks in [true, false] {
        let [native, exact] = fp8_twins(temp.path(), has_blocks);
        let logits = |source: &ModelSource, dtype| {
            prompt_logits(source, Isa::detect(), &config(dtype, QuantizeChoice::None), &texts, 256).unwrap()
        };
        let exact = logits(&exact, DTypeChoice::F32);
        let (divergence, same) =
            divergence(&exact, &logits(&native, DTypeChoice::Bf16), exact[0].len() / texts[0].len());
        println!("blocks {has_blocks}: KL {divergence:.2e} nats, same first choice {:.1} %", 100.0 * same);
        // No more than bf16 loses.
        assert!(divergence < 5e-5, "{divergence:.2e} nats");
    }
}

/// What is planned for is what is taken, whatever the files hold, and files are opened once for both.
#[test]
fn memory_is_planned_by_what_the_files_hold() {
    let temp = tempfile::tempdir().unwrap();
    let settings = SchedulerSettings { max_num_seqs: 2, max_num_batched_tokens: 64, ..SchedulerSettings::default() };
    let [by_blocks, _] = fp8_twins(temp.path(), true);
    let [by_rows, _] = fp8_twins(temp.path(), false);
    let of_blocks = gguf_twins(&folder("../router/demo"), |_, _| TensorFormat::Q8_0);
    let gguf = of_blocks.file.write(&temp.path().join("model.gguf"));
    let mut as_bf16 = None;
    for (name, source) in
        [("bf16", &folder("../router/demo")), ("blocks", &by_blocks), ("rows", &by_rows), ("gguf", &gguf)]
    {
        let engine = config(DTypeChoice::Bf16, QuantizeChoice::None);
        let opened = OpenedModel::open(source, &engine).unwrap();
        let need = opened.memory_need(&engine, &settings).unwrap();
        // Nobody looks for them again.
        match source {
            ModelSource::Directory(path) if path.starts_with(temp.path()) => std::fs::remove_dir_all(path).unwrap(),
            ModelSource::Gguf(path) => std::fs::remove_file(path).unwrap(),
            _ => {}
        }
        let OpenedModel::Generates(files) = opened else { panic!("{name} generates") };
        let handle = start_beside(files, &engine, &settings, Box::new(Recorder::default()), 0).unwrap();
        let taken = handle.model().weight_bytes;
        let is_near = need.weight_bytes <= taken + taken / 10 && need.weight_bytes >= taken - taken / 10;
        assert!(is_near, "{name}: {} bytes for {taken}", need.weight_bytes);
        let as_bf16 = *as_bf16.get_or_insert(need.weight_bytes);
        assert!(name == "bf16" || need.weight_bytes < as_bf16 * 9 / 10, "{name}: {} of {as_bf16}", need.weight_bytes);
    }
}
