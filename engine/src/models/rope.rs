//! Frequencies of the rotary embedding from a model's configuration: default, linear, dynamic, llama3 and YaRN, as
//! transformers computes them.

use quire_kernels::ops::rope_table::RopeFrequencies;

use super::config::Fields;
use crate::error::EngineError;

/// A model's rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Rope {
    pub frequencies: RopeFrequencies,
    /// Cosine and sine are multiplied by it: YaRN's attention factor, 1 otherwise.
    pub magnitude: f32,
    /// The longest context that the scaling is meant for.
    pub max_len: u32,
}

impl Rope {
    /// Divides each frequency by its own factor. Fails where the factors are not as many positive numbers, and where the
    /// frequencies depend on the position.
    pub(crate) fn divide_frequencies(&mut self, factors: &[f32]) -> Result<(), &'static str> {
        let RopeFrequencies::Fixed { inverse } = &mut self.frequencies else {
            return Err("cannot scale frequencies that follow the length of the context");
        };
        if factors.len() != inverse.len() || !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
            return Err("is not a positive number for each pair of a head's numbers");
        }
        for (inverse, factor) in inverse.iter_mut().zip(factors) {
            *inverse /= factor;
        }
        Ok(())
    }
}

/// Reads `rope_parameters`, or `rope_theta` and `rope_scaling` of the older form.
pub(crate) fn parse(fields: &Fields<'_>, head_dim: usize, max_position_embeddings: u32) -> Result<Rope, EngineError> {
    let parameters = match fields.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    for fields in [Some(fields), parameters.as_ref()].into_iter().flatten() {
        if fields.number("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(fields.error("partial_rotary_factor", "only whole heads are rotated here"));
        }
    }
    let mut theta = fields.number("rope_theta", 10000.0)?;
    if let Some(parameters) = &parameters {
        for kind in ["full_attention", "sliding_attention"] {
            if parameters.get(kind).is_some() {
                return Err(parameters.error(kind, "one rotary embedding for each kind of layer is not served"));
            }
        }
        theta = parameters.number("rope_theta", theta)?;
    }
    if !(theta > 1.0 && theta <= 1e15) {
        return Err(fields.error("rope_theta", format!("{theta} is not between 1 and 1e15")));
    }
    let plain = inverse_frequencies(theta, head_dim);
    let fixed = |inverse: Vec<f64>, magnitude: f64, max_len: u32| Rope {
        frequencies: RopeFrequencies::Fixed { inverse: inverse.into_iter().map(|value| value as f32).collect() },
        magnitude: magnitude as f32,
        max_len,
    };
    let Some(parameters) = parameters else { return Ok(fixed(plain, 1.0, max_position_embeddings)) };
    let kind = match parameters.string("rope_type")? {
        Some(kind) => kind,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    match kind {
        "default" => Ok(fixed(plain, 1.0, max_position_embeddings)),
        "linear" => {
            let factor = factor(&parameters)?;
            let inverse = plain.into_iter().map(|value| value / factor).collect();
            Ok(fixed(inverse, 1.0, scaled(max_position_embeddings, factor)))
        }
        "dynamic" => {
            let factor = factor(&parameters)?;
            if head_dim < 4 {
                return Err(parameters.error("rope_type", "dynamic scaling needs a head_dim of at least 4"));
            }
            let frequencies = RopeFrequencies::DynamicNtk {
                base: theta as f32,
                factor: factor as f32,
                original_len: max_position_embeddings,
                head_dim,
            };
            Ok(Rope { frequencies, magnitude: 1.0, max_len: scaled(max_position_embeddings, factor) })
        }
        "llama3" => {
            let inverse = llama3(&parameters, plain, max_position_embeddings)?;
            Ok(fixed(inverse, 1.0, max_position_embeddings))
        }
        "yarn" => {
            let (inverse, attention_factor, max_len) = yarn(&parameters, theta, &plain, max_position_embeddings)?;
            Ok(fixed(inverse, attention_factor, max_len))
        }
        _ => Err(parameters.error("rope_type", "is not served; default, linear, dynamic, llama3 and yarn are")),
    }
}

/// `theta^(-2i / head_dim)`.
fn inverse_frequencies(theta: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| theta.powf(-((2 * i) as f64) / head_dim as f64)).collect()
}

fn factor(parameters: &Fields<'_>) -> Result<f64, EngineError> {
    let factor = parameters.optional_number("factor")?.ok_or_else(|| parameters.error("factor", "is missing"))?;
    if !(1.0..=1024.0).contains(&factor) {
        return Err(parameters.error("factor", format!("{factor} is not between 1 and 1024")));
    }
    Ok(factor)
}

fn scaled(len: u32, factor: f64) -> u32 {
    // A float to integer cast saturates.
    (f64::from(len) * factor) as u32
}

/// `original_max_position_embeddings`: the length that the model was trained with.
fn original_len(parameters: &Fields<'_>, max_position_embeddings: u32) -> Result<f64, EngineError> {
    let given = parameters.optional_size("original_max_position_embeddings", 1..=1 << 24)?;
    Ok(given.map_or(f64::from(max_position_embeddings), |len| len as f64))
}

fn positive(parameters: &Fields<'_>, name: &str, default: f64) -> Result<f64, EngineError> {
    // Zero means "not given" to transformers.
    let value = parameters.optional_number(name)?.filter(|value| *value != 0.0).unwrap_or(default);
    if !(value > 0.0 && value <= 1e6) {
        return Err(parameters.error(name, format!("{value} is not a positive number")));
    }
    Ok(value)
}

/// Long wavelengths are stretched by the factor, short ones are kept, those between are mixed (Llama 3.1).
fn llama3(parameters: &Fields<'_>, plain: Vec<f64>, max_position_embeddings: u32) -> Result<Vec<f64>, EngineError> {
    let factor = factor(parameters)?;
    let low = positive(parameters, "low_freq_factor", 1.0)?;
    let high = positive(parameters, "high_freq_factor", 4.0)?;
    if high <= low {
        return Err(parameters.error("high_freq_factor", format!("{high} is not above low_freq_factor {low}")));
    }
    let original = original_len(parameters, max_position_embeddings)?;
    let scale = |inverse: f64| {
        let wavelength = 2.0 * std::f64::consts::PI / inverse;
        if wavelength < original / high {
            inverse
        } else if wavelength > original / low {
            inverse / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * inverse / factor + smooth * inverse
        }
    };
    Ok(plain.into_iter().map(scale).collect())
}

/// Peng et al. 2023: frequencies, attention factor, and the length that is meant.
fn yarn(
    parameters: &Fields<'_>,
    theta: f64,
    plain: &[f64],
    max_position_embeddings: u32,
) -> Result<(Vec<f64>, f64, u32), EngineError> {
    let original = original_len(parameters, max_position_embeddings)?;
    let factor = match parameters.get("factor") {
        Some(_) => factor(parameters)?,
        None => (f64::from(max_position_embeddings) / original).max(1.0),
    };
    let attention_factor = match parameters.optional_number("attention_factor")? {
        Some(value) if value > 0.0 && value <= 1e6 => value,
        Some(value) => return Err(parameters.error("attention_factor", format!("{value} is not a positive number"))),
        None => {
            let mscale = parameters.number("mscale", 0.0)?;
            let mscale_all_dim = parameters.number("mscale_all_dim", 0.0)?;
            if mscale != 0.0 && mscale_all_dim != 0.0 {
                magnitude_scale(factor, mscale) / magnitude_scale(factor, mscale_all_dim)
            } else {
                magnitude_scale(factor, 1.0)
            }
        }
    };
    if !(attention_factor.is_finite() && attention_factor > 0.0) {
        return Err(parameters.error("mscale", "makes an attention factor that is not a positive number"));
    }
    let beta_fast = positive(parameters, "beta_fast", 32.0)?;
    let beta_slow = positive(parameters, "beta_slow", 1.0)?;

    let dim = (plain.len() * 2) as f64;
    let correction_dim =
        |num_rotations: f64| dim * (original / (num_rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (correction_dim(beta_fast), correction_dim(beta_slow));
    if parameters.flag("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let mix = |(i, inverse): (usize, &f64)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        inverse / factor * ramp + inverse * (1.0 - ramp)
    };
    let inverse = plain.iter().enumerate().map(mix).collect();
    let max_len = max_position_embeddings.max((original * factor) as u32);
    Ok((inverse, attention_factor, max_len))
}

fn magnitude_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::models::config::ModelConfig;

    fn rope(extra: Value) -> Rope {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 160, "max_position_embeddings": 160,
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::parse(config.to_string().as_bytes()).unwrap().rope
    }

    fn inverse(rope: &Rope) -> &[f32] {
        match &rope.frequencies {
            RopeFrequencies::Fixed { inverse } => inverse,
            RopeFrequencies::DynamicNtk { .. } => panic!("not fixed"),
        }
    }

    #[test]
    fn both_forms_mean_the_same() {
        let old = rope(json!({"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4}}));
        let new = rope(json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000}}));
        assert_eq!(old, new);
        assert_eq!(inverse(&new)[0], 0.25);
        assert_eq!(new.max_len, 640);
        assert_eq!(rope(json!({"rope_scaling": null})), rope(json!({"rope_parameters": {"rope_type": "default"}})));
    }

    #[test]
    fn yarn_factors() {
        let yarn = |extra: Value| {
            let mut parameters = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40});
            for (key, value) in extra.as_object().unwrap() {
                parameters[key] = value.clone();
            }
            rope(json!({"rope_parameters": parameters}))
        };
        let close = |rope: Rope, expected: f64| assert!((f64::from(rope.magnitude) - expected).abs() < 1e-6);
        close(yarn(json!({})), 0.1 * 4f64.ln() + 1.0);
        close(yarn(json!({"attention_factor": 1.3})), 1.3);
        close(yarn(json!({"mscale": 0.5, "mscale_all_dim": 1.5})), (0.05 * 4f64.ln() + 1.0) / (0.15 * 4f64.ln() + 1.0));
        // The fastest dimension keeps its frequency, the slowest is stretched by the whole factor.
        let rope = yarn(json!({}));
        assert_eq!(inverse(&rope)[0], 1.0);
        let slowest = 10000f64.powf(-30.0 / 32.0) / 4.0;
        assert!((f64::from(inverse(&rope)[15]) / slowest - 1.0).abs() < 1e-6);
        assert_eq!(rope.max_len, 160);
    }

    #[test]
    fn dynamic_keeps_its_parameters_for_the_device() {
        let rope = rope(json!({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}));
        let expected = RopeFrequencies::DynamicNtk { base: 10000.0, factor: 4.0, original_len: 160, head_dim: 32 };
        assert_eq!(rope.frequencies, expected);
        assert_eq!(rope.max_len, 640);
    }
}
