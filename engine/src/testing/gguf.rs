//! GGUF files for tests: a writer, and models of Hugging Face's form in this one.

use std::path::Path;

pub use quire_kernels::TensorFormat;
use quire_kernels::testing::encode;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::gguf::{self, Rows};
use crate::models::config::ModelConfig;
use crate::source::{EmbeddedModel, ModelSource};

/// Writes a file: metadata in the order it was set, then tensors.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    version: u32,
    alignment: u32,
    num_keys: u64,
    keys: Vec<u8>,
    num_tensors: u64,
    table: Vec<u8>,
    data: Vec<u8>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self {
            version: 3,
            alignment: 32,
            num_keys: 0,
            keys: Vec::new(),
            num_tensors: 0,
            table: Vec::new(),
            data: Vec::new(),
        }
    }
}

impl GgufWriter {
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Before any tensor.
    #[must_use]
    pub fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = alignment;
        self.u32("general.alignment", alignment);
        self
    }

    /// A value of any type, its bytes given.
    pub fn raw(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        self.num_keys += 1;
        push_text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(bytes);
        self
    }

    pub fn u32(&mut self, key: &str, number: u32) -> &mut Self {
        self.raw(key, 4, &number.to_le_bytes())
    }

    pub fn f32(&mut self, key: &str, number: f32) -> &mut Self {
        self.raw(key, 6, &number.to_le_bytes())
    }

    pub fn flag(&mut self, key: &str, flag: bool) -> &mut Self {
        self.raw(key, 7, &[flag.into()])
    }

    pub fn text(&mut self, key: &str, text: &str) -> &mut Self {
        let mut bytes = Vec::new();
        push_text(&mut bytes, text);
        self.raw(key, 8, &bytes)
    }

    pub fn texts<T: AsRef<str>>(&mut self, key: &str, texts: &[T]) -> &mut Self {
        let mut bytes = array_head(8, texts.len());
        texts.iter().for_each(|text| push_text(&mut bytes, text.as_ref()));
        self.raw(key, 9, &bytes)
    }

    pub fn i32s(&mut self, key: &str, numbers: &[i32]) -> &mut Self {
        let mut bytes = array_head(5, numbers.len());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.raw(key, 9, &bytes)
    }

    pub fn f32s(&mut self, key: &str, numbers: &[f32]) -> &mut Self {
        let mut bytes = array_head(6, numbers.len());
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.raw(key, 9, &bytes)
    }

    /// The keys of a byte-level tokenizer, from its `tokenizer.json`; `pre` is how text is cut.
    pub fn byte_level_tokenizer(&mut self, json: &[u8], pre: &str) -> &mut Self {
        let json: Value = serde_json::from_slice(json).expect("JSON");
        let vocab = json["model"]["vocab"].as_object().expect("a vocabulary");
        let added = json["added_tokens"].as_array().expect("a list");
        let id = |value: &Value| value.as_u64().expect("an id") as usize;
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let len = vocab.values().map(id).chain(added.iter().map(|token| id(&token["id"]))).max().expect("tokens") + 1;
        let (mut tokens, mut types) = (vec![String::new(); len], vec![1; len]);
        for (token, at) in vocab {
            tokens[id(at)].clone_from(token);
        }
        for token in added {
            tokens[id(&token["id"])] = text(&token["content"]);
            types[id(&token["id"])] = if token["special"] == json!(true) { 3 } else { 4 };
        }
        let merges = json["model"]["merges"].as_array().expect("a list");
        let merges: Vec<String> = merges.iter().map(|pair| format!("{} {}", text(&pair[0]), text(&pair[1]))).collect();
        self.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre);
        self.texts("tokenizer.ggml.tokens", &tokens).i32s("tokenizer.ggml.token_type", &types);
        self.texts("tokenizer.ggml.merges", &merges)
    }

    /// A tensor, rows before columns, of the type that ggml numbers `kind`.
    pub fn raw_tensor(&mut self, name: &str, kind: u32, shape: &[u64], offset: u64, bytes: &[u8]) -> &mut Self {
        self.num_tensors += 1;
        push_text(&mut self.table, name);
        self.table.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|dim| self.table.extend(dim.to_le_bytes()));
        self.table.extend(kind.to_le_bytes());
        self.table.extend(offset.to_le_bytes());
        self.data.extend(bytes);
        self
    }

    /// A tensor behind those before it, rows before columns.
    pub fn tensor(&mut self, name: &str, format: TensorFormat, shape: &[usize], bytes: &[u8]) -> &mut Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment as usize), 0);
        let shape: Vec<u64> = shape.iter().map(|dim| *dim as u64).collect();
        self.raw_tensor(name, ggml_type(format), &shape, self.data.len() as u64, bytes)
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.num_tensors.to_le_bytes());
        file.extend(self.num_keys.to_le_bytes());
        file.extend(&self.keys);
        file.extend(&self.table);
        file.resize(file.len().next_multiple_of(self.alignment.max(1) as usize), 0);
        file.extend(&self.data);
        file
    }

    /// Writes the file and gives it as a model's source.
    pub fn write(&self, path: &Path) -> ModelSource {
        std::fs::write(path, self.bytes()).expect("the test's folder can be written");
        ModelSource::Gguf(path.to_owned())
    }
}

fn array_head(kind: u32, len: usize) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend((len as u64).to_le_bytes());
    bytes
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn ggml_type(format: TensorFormat) -> u32 {
    match format {
        TensorFormat::F32 => 0,
        TensorFormat::F16 => 1,
        TensorFormat::Q4_0 => 2,
        TensorFormat::Q4_1 => 3,
        TensorFormat::Q5_0 => 6,
        TensorFormat::Q5_1 => 7,
        TensorFormat::Q8_0 => 8,
        TensorFormat::Q4K => 12,
        TensorFormat::Q5K => 13,
        TensorFormat::Q6K => 14,
        TensorFormat::Iq4Nl => 20,
        TensorFormat::Bf16 => 30,
        TensorFormat::F8E4M3 => panic!("ggml has none"),
    }
}

/// One model twice: in a GGUF file, and in Hugging Face's form with exactly the values that the file's blocks decode to.
pub struct GgufTwins {
    pub file: GgufWriter,
    /// Kept until the process ends.
    pub dense: ModelSource,
}

/// Writes a model of Hugging Face's form (one safetensors file or shards) as GGUF, each tensor in the format that
/// `format_of` names by the tensor's name and shape there. Vectors are always `F32`. Without a tokenizer.
///
/// Panics where the model or a shape has no counterpart.
pub fn gguf_twins(source: &ModelSource, format_of: impl Fn(&str, &[usize]) -> TensorFormat) -> GgufTwins {
    let read = |name: &str| source.read(name).expect("readable");
    let config_json = read("config.json").expect("a configuration");
    let config = ModelConfig::parse(&config_json).expect("a model that is served");
    let json: Value = serde_json::from_slice(&config_json).expect("JSON");
    let mut file = GgufWriter::default();
    write_metadata(&mut file, &config, &json);

    let shards: Vec<String> = match read("model.safetensors.index.json") {
        None => vec!["model.safetensors".to_owned()],
        Some(index) => {
            let index: Value = serde_json::from_slice(&index).expect("JSON");
            let files = index["weight_map"].as_object().expect("a map").values();
            let files: std::collections::BTreeSet<_> = files.map(|file| file.as_str().expect("a name")).collect();
            files.into_iter().map(str::to_owned).collect()
        }
    };
    let mut decoded: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for shard in shards {
        let bytes = read(&shard).expect("the shard");
        let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
        for (name, tensor) in tensors.iter() {
            let shape = tensor.shape().to_vec();
            let stored = match tensor.dtype() {
                safetensors::Dtype::F32 => TensorFormat::F32,
                safetensors::Dtype::BF16 => TensorFormat::Bf16,
                safetensors::Dtype::F16 => TensorFormat::F16,
                other => panic!("{name} is stored as {other:?}"),
            };
            let mut values = vec![0.0; shape.iter().product()];
            stored.decode(tensor.data(), &mut values);
            let format = if shape.len() == 1 { TensorFormat::F32 } else { format_of(name, &shape) };
            let blocks = encode(format, &values);
            format.decode(&blocks, &mut values);
            decoded.push((name.to_owned(), shape.clone(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));

            let own = gguf::of_hugging_face(name).unwrap_or_else(|| panic!("{name} has no name in GGUF"));
            let num_heads = match gguf::hugging_face(&own).expect("a name of ours").1 {
                Rows::Query => config.num_heads,
                Rows::Key => config.facts.num_kv_heads,
                Rows::Plain => 0,
            };
            let blocks = match num_heads {
                0 => blocks,
                _ if json["architectures"][0].as_str().is_some_and(|name| name.starts_with("Qwen")) => blocks,
                _ => halves_together(&blocks, shape[0], num_heads),
            };
            file.tensor(&own, format, &shape, &blocks);
        }
    }
    let views = decoded.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).expect("bytes fit the shape"))
    });
    let weights = safetensors::serialize(views, None).expect("a header of this size is fine");
    let files = vec![("config.json", &*config_json.into_owned().leak()), ("model.safetensors", &*weights.leak())];
    let dense = EmbeddedModel { name: "dense", files: files.leak() };
    GgufTwins { file, dense: ModelSource::Embedded(Box::leak(Box::new(dense))) }
}

/// Row `2 * i + half` of a head is its row `half * head_dim / 2 + i`.
fn halves_together(bytes: &[u8], num_rows: usize, num_heads: usize) -> Vec<u8> {
    let (row_bytes, head_dim) = (bytes.len() / num_rows, num_rows / num_heads);
    let row = |row: usize| {
        let (head, in_head) = (row / head_dim, row % head_dim);
        let from = head * head_dim + in_head % 2 * (head_dim / 2) + in_head / 2;
        &bytes[from * row_bytes..][..row_bytes]
    };
    (0..num_rows).flat_map(row).copied().collect()
}

fn write_metadata(file: &mut GgufWriter, config: &ModelConfig, json: &Value) {
    let architecture = match config.architecture {
        "LlamaForCausalLM" | "MistralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        other => panic!("{other} has no name in GGUF"),
    };
    let key = |name: &str| format!("{architecture}.{name}");
    let head_dim = config.facts.head_dim as u32;
    file.text("general.architecture", architecture);
    file.u32("general.quantization_version", 2);
    file.u32(&key("context_length"), json["max_position_embeddings"].as_u64().expect("a length") as u32);
    file.u32(&key("embedding_length"), config.hidden_size as u32);
    file.u32(&key("block_count"), config.num_layers as u32);
    file.u32(&key("feed_forward_length"), config.intermediate_size as u32);
    file.u32(&key("attention.head_count"), config.num_heads as u32);
    file.u32(&key("attention.head_count_kv"), config.facts.num_kv_heads as u32);
    file.u32(&key("attention.key_length"), head_dim);
    file.u32(&key("attention.value_length"), head_dim);
    file.u32(&key("rope.dimension_count"), head_dim);
    file.f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    file.u32(&key("vocab_size"), config.vocab_size as u32);
    match config.kv_groups()[..] {
        [None] => {}
        [Some(window)] => {
            file.u32(&key("attention.sliding_window"), window);
        }
        _ => panic!("windows that differ between layers have no counterpart"),
    }
    if let Some(id) = config.eos_token_ids.first() {
        file.u32("tokenizer.ggml.eos_token_id", *id);
    }

    let nothing = json!({});
    let scaling = [&json["rope_parameters"], &json["rope_scaling"]].into_iter().find(|value| value.is_object());
    let scaling = scaling.unwrap_or(&nothing);
    let theta = scaling["rope_theta"].as_f64().or(json["rope_theta"].as_f64()).unwrap_or(10000.0);
    file.f32(&key("rope.freq_base"), theta as f32);
    let number = |name: &str| scaling[name].as_f64().map(|number| number as f32);
    match scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default") {
        "default" => {}
        "linear" => {
            file.text(&key("rope.scaling.type"), "linear");
            file.f32(&key("rope.scaling.factor"), number("factor").expect("a factor"));
        }
        "yarn" => {
            assert_ne!(scaling["truncate"], json!(false), "a ramp between fractions has no counterpart");
            let factor = number("factor").expect("a factor");
            file.text(&key("rope.scaling.type"), "yarn");
            file.f32(&key("rope.scaling.factor"), factor);
            file.f32(&key("rope.scaling.attn_factor"), config.rope.magnitude / (1.0 + 0.1 * factor.ln()));
            if let Some(len) = scaling["original_max_position_embeddings"].as_u64() {
                file.u32(&key("rope.scaling.original_context_length"), len as u32);
            }
            for (own, other) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                if let Some(beta) = number(other) {
                    file.f32(&key(&format!("rope.scaling.{own}")), beta);
                }
            }
        }
        "llama3" => {
            // What the frequencies would be, over what they are.
            let frequencies = &config.rope.frequencies;
            let quire_kernels::ops::rope_table::RopeFrequencies::Fixed { inverse } = frequencies else {
                panic!("llama3 has fixed frequencies")
            };
            let plain = |i: usize| theta.powf(-((2 * i) as f64) / f64::from(head_dim));
            let factors = inverse.iter().enumerate().map(|(i, inverse)| (plain(i) / f64::from(*inverse)) as f32);
            let bytes: Vec<u8> = factors.flat_map(f32::to_le_bytes).collect();
            file.tensor(gguf::ROPE_FACTORS, TensorFormat::F32, &[inverse.len()], &bytes);
        }
        other => panic!("{other} has no counterpart"),
    }
}
