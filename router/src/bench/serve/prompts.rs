//! What is sent: random prompts that have nothing in common, or the lines of a file.

use serde_json::{Map, Value, json};

use super::Options;

/// Most bytes of a prompt file.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Common short words; most tokenizers have a token for each.
const WORDS: [&str; 32] = [
    "time", "water", "light", "house", "river", "music", "paper", "green", "stone", "world", "bread", "night", "horse",
    "table", "garden", "winter", "summer", "window", "letter", "people", "number", "family", "market", "story",
    "morning", "mountain", "evening", "village", "picture", "question", "answer", "silver",
];

/// Where prompts come from.
pub(super) enum Prompts {
    Tokens { len: u32, vocab_size: u32, seed: u64 },
    Words { len: u32, seed: u64 },
    Lines(Vec<String>),
}

impl Prompts {
    pub(super) fn new(options: &Options) -> Result<Self, String> {
        let (len, seed) = (options.input_tokens, options.seed);
        let Some(path) = &options.prompt_file else {
            let vocab_size = options.vocab_size;
            return Ok(if options.text { Self::Words { len, seed } } else { Self::Tokens { len, vocab_size, seed } });
        };
        let refuse = |why: String| format!("--prompt-file {}: {why}", path.display());
        let size = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?.len();
        if size > MAX_FILE_BYTES {
            return Err(refuse(format!("has {size} bytes, at most {MAX_FILE_BYTES} are read")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
        if lines.is_empty() { Err(refuse("has no lines".to_owned())) } else { Ok(Self::Lines(lines)) }
    }

    /// The body of a request; the same number gives the same prompt. What `extra` names is as it says.
    pub(super) fn body(&self, number: u64, model: &str, output_tokens: u32, extra: &Map<String, Value>) -> String {
        let prompt = match self {
            Self::Tokens { len, vocab_size, seed } => {
                let mut rng = Rng::of_request(*seed, number);
                (0..*len).map(|_| rng.below(u64::from(*vocab_size))).collect::<Vec<_>>().into()
            }
            Self::Words { len, seed } => {
                let mut rng = Rng::of_request(*seed, number);
                let words: Vec<&str> = (0..*len).map(|_| WORDS[rng.below(WORDS.len() as u64) as usize]).collect();
                Value::from(words.join(" "))
            }
            Self::Lines(lines) => lines[(number % lines.len() as u64) as usize].as_str().into(),
        };
        let mut body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        for (name, value) in extra {
            body[name] = value.clone();
        }
        body.to_string()
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
pub(in crate::bench) struct Rng(u64);

impl Rng {
    pub(in crate::bench) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn of_request(seed: u64, number: u64) -> Self {
        Self(Self(seed).next() ^ Self(!number).next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// 0 to `end - 1`.
    fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// At least 0, below 1.
    pub(in crate::bench) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(prompts: &Prompts, number: u64) -> Vec<u64> {
        let body: serde_json::Value = serde_json::from_str(&prompts.body(number, "m", 5, &Map::new())).unwrap();
        assert_eq!((&body["model"], &body["max_tokens"]), (&json!("m"), &json!(5)));
        body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    }

    #[test]
    fn prompts_are_within_the_vocabulary_and_differ_but_for_their_number() {
        let prompts = Prompts::Tokens { len: 300, vocab_size: 7, seed: 1 };
        let first = tokens(&prompts, 0);
        assert_eq!(first.len(), 300);
        assert_eq!((first.iter().min(), first.iter().max()), (Some(&0), Some(&6)));
        assert_eq!(first, tokens(&prompts, 0));
        assert_ne!(first, tokens(&prompts, 1));
        assert_ne!(first, tokens(&Prompts::Tokens { len: 300, vocab_size: 7, seed: 2 }, 0));
    }

    #[test]
    fn extra_fields_come_beside_the_others_or_in_their_place() {
        let extra = json!({"temperature": 0.5, "n": 2});
        let prompts = Prompts::Words { len: 2, seed: 0 };
        let body: Value = serde_json::from_str(&prompts.body(0, "m", 5, extra.as_object().unwrap())).unwrap();
        assert_eq!((&body["temperature"], &body["n"], &body["max_tokens"]), (&json!(0.5), &json!(2), &json!(5)));
    }

    #[test]
    fn arrivals_have_the_rate_that_was_asked_for() {
        let mut rng = Rng::new(3);
        let mean = (0..20_000).map(|_| -(1.0 - rng.unit()).ln()).sum::<f64>() / 20_000.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
    }
}
