//! What an operator chooses about the engine. Sizes of the model come from its files.

use serde::{Deserialize, Serialize};

/// Where a model computes. Written as `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The first card of CUDA where there is one that can be used, the CPU otherwise.
    #[default]
    Auto,
    Cpu,
    /// The card of this number, counted as the driver does; `cuda` is `cuda:0`.
    Cuda(u32),
}

impl TryFrom<String> for DeviceChoice {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => match other.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(ordinal)),
                _ => Err(format!("unknown device `{other}`, expected `auto`, `cpu`, `cuda` or `cuda:N`")),
            },
        }
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        match choice {
            DeviceChoice::Auto => "auto".to_owned(),
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(ordinal) => format!("cuda:{ordinal}"),
        }
    }
}

/// What weights are stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DTypeChoice {
    /// As the files have it: `f32` stays, `bf16` stays, `f16` becomes `bf16`.
    #[default]
    Auto,
    F32,
    Bf16,
}

/// Whether weights are rounded to fewer bits when they are loaded. Files that hold blocks of few bits stay what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizeChoice {
    /// Weights are stored as `dtype` says.
    #[default]
    None,
    /// Floats of 8 bits (e4m3), one scale for 128 weights, multiplied in bf16; the vocabulary's weights are those of `int8`,
    /// which are rounded less.
    Fp8,
    /// 8 bits, one scale for 128 weights: half the memory of bf16 and twice its pace.
    Int8,
    /// 4 bits with a scale and a minimum for 32 weights; the vocabulary's weights get 8.
    Int4,
}

/// What the KV cache is stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDTypeChoice {
    /// As the weights' numbers: `f32` or `bf16`.
    #[default]
    Auto,
    F32,
    Bf16,
    /// Whole numbers of 8 bits, one f32 scale per token and head for K and one for V.
    Int8,
    /// Floats of 8 bits (e4m3) with such scales.
    Fp8,
}

/// Where the weights' values come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The model's safetensors or GGUF files.
    #[default]
    Auto,
    /// Seeded random values of the shapes that `config.json` asks for: to measure speed without a download.
    Dummy,
}

/// Which waiting request is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyChoice {
    Fcfs,
    #[default]
    Priority,
}

/// The device and the model's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// `auto` takes the first CUDA card where one can be used, `cuda:N` a certain one.
    pub device: DeviceChoice,
    /// Of a card: how much of its memory may be taken, from 0 to 1, for weights, cache and all else. What weights and working
    /// memory leave of it is the KV cache's. Lower it where other programs use the card.
    pub memory_share: f64,
    /// Where device code is kept that the driver assembled for a card, so that only the first start waits for it. Empty is
    /// `~/.cache/quire/cuda`.
    pub module_cache: String,
    /// `auto` keeps what the files have; `bf16` halves memory and doubles the pace of f32.
    pub dtype: DTypeChoice,
    /// `int8` and `int4` shrink weights to a half and a third when they are loaded, at some cost in quality. `fp8` takes as much
    /// as `int8` and leaves activations in bf16.
    pub quantize: QuantizeChoice,
    /// `auto` stores the KV cache as `dtype` says; `int8` holds almost twice as many tokens as `bf16` in the same memory,
    /// and attention over long contexts is faster, for outputs that differ a little. `fp8` takes as much and loses more: its
    /// numbers have three bits of fraction.
    pub kv_dtype: KvDTypeChoice,
    /// `dummy` fills the shapes with seeded random weights.
    pub load_format: LoadFormat,
    /// Threads that compute; 0 is one per core. The engine's own thread is one of them.
    pub num_threads: usize,
    /// Bytes for the KV cache; 0 takes on a card what is left of `memory_share`, and on a CPU as much as the weights do, at least 64 MiB and one sequence of `max_model_len`,
    /// bounded by 60 % of the free memory and by what `max_num_seqs` sequences could use. All of it is resident before
    /// the model is ready: more serves more and longer requests at a time.
    pub kv_cache_memory: u64,
    /// 1 plans the next step while one is computing; 0 plans after it, on a CPU: a card is always planned ahead for.
    pub pipeline_depth: u32,
    /// Threads that compute which tokens a grammar allows, while the device computes the step. 0 is half of the cores, at most
    /// 4, beside a card; on a CPU it is none: the threads that compute the step do it between.
    pub mask_threads: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            memory_share: 0.9,
            module_cache: String::new(),
            dtype: DTypeChoice::Auto,
            quantize: QuantizeChoice::None,
            kv_dtype: KvDTypeChoice::Auto,
            load_format: LoadFormat::Auto,
            num_threads: 0,
            kv_cache_memory: 0,
            pipeline_depth: 0,
            mask_threads: 0,
        }
    }
}

/// Budgets of the step and of the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SchedulerSettings {
    /// Most sequences that run at once. More raise throughput until the device is busy, and each costs KV memory.
    pub max_num_seqs: u32,
    /// Most tokens in a step. Lower keeps running streams smoother while prompts are computed, higher computes prompts
    /// faster.
    pub max_num_batched_tokens: u32,
    /// Most tokens of prompt and output; 0 takes the model's own length, or what the KV cache has room for.
    pub max_model_len: u32,
    /// Tokens in a KV block: a multiple of 16.
    pub block_size: u32,
    /// Reuse the KV blocks of equal prefixes, within a tenant.
    pub prefix_cache: bool,
    /// Let gateways subscribe to what the prefix cache holds (`SubscribeKvEvents` over gRPC), so that they send requests where
    /// their prefixes are. Whoever may call can then read the tokens of everybody's prompts: only where all callers are
    /// gateways that see them anyway.
    pub kv_events: bool,
    /// Most prompt tokens that may wait; past it callers get 429. 0 is 16 times `max_model_len`.
    pub max_waiting_tokens: u64,
    /// Longest predicted wait in seconds; past it callers get 429. 0 is no bound.
    pub max_waiting_seconds: u32,
    /// `priority` runs a tenant's lower priority numbers first, `fcfs` ignores them. Tenants take turns either way.
    pub policy: PolicyChoice,
}

impl Default for SchedulerSettings {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_model_len: 0,
            block_size: 16,
            prefix_cache: true,
            kv_events: false,
            max_waiting_tokens: 0,
            max_waiting_seconds: 60,
            policy: PolicyChoice::Priority,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_written_as_they_are_read() {
        let read = |text: &str| DeviceChoice::try_from(text.to_owned());
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda:0", DeviceChoice::Cuda(0)),
            ("cuda:11", DeviceChoice::Cuda(11)),
        ] {
            assert_eq!(read(text), Ok(choice));
            assert_eq!(String::from(choice), text);
        }
        assert_eq!(read("cuda"), Ok(DeviceChoice::Cuda(0)));
        for text in ["tpu", "cuda:", "cuda:-1", "cuda:a", "CPU", "", "cuda:99999999999"] {
            let error = read(text).unwrap_err();
            assert!(error.contains("cuda:N") && error.contains(text), "{error}");
        }
    }
}
