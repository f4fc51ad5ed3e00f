//! Models in GGUF files against the same models in Hugging Face's form, and against what transformers answers.

use std::path::{Path, PathBuf};

use quire_engine::testing::gguf::{GgufWriter, gguf_twins};
use quire_engine::testing::{TinyModel, prompt_logits, tiny_model};
use quire_engine::{DTypeChoice, EngineConfig, EngineError, ModelSource};
use quire_kernels::TensorFormat;
use quire_kernels::cpu::Isa;
use quire_kernels::testing::assert_same_bits;
use safetensors::SafeTensors;

/// Of logits, over the largest: factors of frequencies are rounded to f32 in the file.
const TOLERANCE: f32 = 1e-4;

fn logits(source: &ModelSource, dtype: DTypeChoice, prompts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, EngineError> {
    let config = EngineConfig { dtype, num_threads: 2, kv_cache_memory: 8 << 20, ..EngineConfig::default() };
    prompt_logits(source, *Isa::available().first().expect("one at least"), &config, prompts, 64)
}

/// Every fixture that the format can express.
fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity");
    let folders =
        std::fs::read_dir(&root).expect("the fixtures are there").map(|entry| entry.expect("an entry").path());
    // Frequencies that follow the context, and YaRN with a ramp between fractions of dimensions.
    let inexpressible =
        |folder: &PathBuf| ["llama-dynamic-rope", "llama-yarn-mscale"].iter().any(|name| folder.ends_with(name));
    let mut folders: Vec<PathBuf> =
        folders.filter(|folder| folder.join("expected.safetensors").exists() && !inexpressible(folder)).collect();
    folders.sort();
    assert!(folders.len() >= 15, "{} cases", folders.len());
    folders
}

#[test]
fn files_answer_as_transformers_does() {
    let temp = tempfile::tempdir().expect("a folder");
    for folder in fixtures() {
        let bytes = std::fs::read(folder.join("expected.safetensors")).expect("readable");
        let expected = SafeTensors::deserialize(&bytes).expect("safetensors");
        let words = |name: &str| -> Vec<u32> {
            let data = expected.tensor(name).expect("a tensor").data().chunks_exact(4);
            data.map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect()
        };
        let prompts = vec![words("prompt_1.tokens")];
        let expected: Vec<f32> = words("prompt_1.logits").into_iter().map(f32::from_bits).collect();

        let twins = gguf_twins(&ModelSource::Directory(folder.clone()), |_, _| TensorFormat::F32);
        let source = twins.file.write(&temp.path().join("model.gguf"));
        let found = logits(&source, DTypeChoice::F32, &prompts).expect("it loads");
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert_eq!(found[0].len(), expected.len());
        let worst = found[0].iter().zip(&expected).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst / largest < TOLERANCE, "{}: {}", folder.display(), worst / largest);
    }
}

#[test]
fn dense_files_have_the_bits_of_their_twins() {
    let temp = tempfile::tempdir().expect("a folder");
    let prompts = vec![(3..90).collect::<Vec<u32>>()];
    for (family, seed) in [(TinyModel::Llama, 1), (TinyModel::MistralWindow, 2)] {
        for format in [TensorFormat::F32, TensorFormat::Bf16, TensorFormat::F16] {
            let twins = gguf_twins(&tiny_model(seed, family), |_, _| format);
            let source = twins.file.write(&temp.path().join("model.gguf"));
            for dtype in [DTypeChoice::F32, DTypeChoice::Bf16] {
                let found = logits(&source, dtype, &prompts).expect("it loads");
                assert_same_bits(&found[0], &logits(&twins.dense, dtype, &prompts).expect("it loads")[0]);
            }
        }
    }
}

fn write_split(file: &GgufWriter, index: u16, count: u16, num_tensors: i32) -> GgufWriter {
    let mut file = file.clone();
    file.raw("split.no", 2, &index.to_le_bytes());
    file.raw("split.count", 2, &count.to_le_bytes());
    file.raw("split.tensors.count", 5, &num_tensors.to_le_bytes());
    file
}

#[test]
fn split_files_are_followed() {
    let temp = tempfile::tempdir().expect("a folder");
    let twins = gguf_twins(&tiny_model(1, TinyModel::Llama), |_, _| TensorFormat::F32);
    let path = |index: usize| temp.path().join(format!("tiny-{index:05}-of-00002.gguf"));
    let extra: Vec<u8> = [1.0f32; 8].iter().flat_map(|number| number.to_le_bytes()).collect();
    // All but the factors of the frequencies (which are 1) are in the first file.
    let mut second = GgufWriter::default();
    second.tensor("rope_freqs.weight", TensorFormat::F32, &[8], &extra);
    let num_tensors = 22;
    let source = write_split(&twins.file, 0, 2, num_tensors).write(&path(1));
    let prompts = vec![vec![5, 6, 7]];
    let why = |source: &ModelSource| logits(source, DTypeChoice::F32, &prompts).unwrap_err().to_string();
    assert!(why(&source).starts_with("tiny-00002-of-00002.gguf: "), "{}", why(&source));

    write_split(&second, 1, 2, num_tensors).write(&path(2));
    let found = logits(&source, DTypeChoice::F32, &prompts).expect("both are there");
    assert_same_bits(&found[0], &logits(&twins.dense, DTypeChoice::F32, &prompts).expect("it loads")[0]);

    assert!(why(&ModelSource::Gguf(path(2))).contains("the first is what is served"));
    write_split(&second, 0, 2, num_tensors).write(&path(2));
    assert!(why(&source).contains("says that it is number 1 of 2"));
    let mut twice = second.clone();
    twice.tensor("output_norm.weight", TensorFormat::F32, &[8], &extra);
    write_split(&twice, 1, 2, num_tensors).write(&path(2));
    assert!(why(&source).contains("there twice"), "{}", why(&source));
    write_split(&GgufWriter::default(), 1, 2, num_tensors).write(&path(2));
    assert!(why(&source).contains("22 tensors"), "{}", why(&source));
    let moved = temp.path().join("moved.gguf");
    std::fs::copy(path(1), &moved).expect("copied");
    assert!(why(&ModelSource::Gguf(moved)).contains("not named as the first"));
}

#[test]
fn what_nobody_reads_or_nothing_serves_is_named() {
    let temp = tempfile::tempdir().expect("a folder");
    let twins = gguf_twins(&tiny_model(1, TinyModel::Llama), |_, _| TensorFormat::F32);
    let why = |change: &dyn Fn(&mut GgufWriter)| {
        let mut file = twins.file.clone();
        change(&mut file);
        let source = file.write(&temp.path().join("model.gguf"));
        logits(&source, DTypeChoice::F32, &[vec![1, 2]]).err().map(|error| error.to_string()).unwrap_or_default()
    };
    assert_eq!(why(&|_| {}), "");
    let four = [0; 16];
    type Change<'a> = &'a dyn Fn(&mut GgufWriter);
    let cases: [(Change<'_>, &str); 7] = [
        (&|file| _ = file.tensor("blk.0.attn_sinks.weight", TensorFormat::F32, &[4], &four), "blk.0.attn_sinks.weight"),
        (&|file| _ = file.tensor("blk.0.attn_q.bias", TensorFormat::F32, &[4], &four), "q_proj.bias"),
        (&|file| _ = file.tensor("model.norm.weight", TensorFormat::F32, &[4], &four), "another name"),
        (&|file| _ = file.tensor("rope_freqs.weight", TensorFormat::F32, &[4], &four), "rope_freqs.weight"),
        (&|file| _ = file.u32("llama.expert_count", 8), "mixtures of experts"),
        (&|file| _ = file.text("llama.rope.scaling.type", "longrope"), "rope_scaling.rope_type"),
        (&|file| _ = file.raw_tensor("x", 10, &[1, 256], 0, &[0; 84]), "is stored as Q2_K"),
    ];
    for (change, expected) in cases {
        let why = why(change);
        assert!(why.contains(expected), "{expected}: {why}");
    }
    let error = logits(&ModelSource::Gguf("/nowhere/model.gguf".into()), DTypeChoice::F32, &[vec![1]]).unwrap_err();
    assert!(matches!(error, EngineError::ModelFile { file, .. } if file == "model.gguf"));
}
