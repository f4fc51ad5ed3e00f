//! What the numbers of a classifier are of, and how logits become them: as the pipelines of transformers make them, and for one
//! label as sentence-transformers does.

use super::config::{Fields, unsupported};
use crate::error::EngineError;

/// More are no classifier's.
const MAX_LABELS: usize = 1 << 16;

/// The labels of a model with a classification head.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Labels {
    /// In order of their index; at least one.
    pub names: Vec<String>,
    pub activation: Activation,
}

/// How logits become what is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// As they are.
    None,
    /// Each between 0 and 1.
    Sigmoid,
    /// All of them 1 together.
    Softmax,
}

impl Labels {
    /// Reads them from `config.json`. Where it names none there are two, as in the makers' own code.
    pub(crate) fn read(fields: &Fields<'_>) -> Result<Self, EngineError> {
        let names = match fields.object("id2label")? {
            None => vec!["LABEL_0".to_owned(), "LABEL_1".to_owned()],
            Some(named) => {
                let count = named.object.len();
                if !(1..=MAX_LABELS).contains(&count) {
                    return Err(unsupported("id2label", format!("has {count} labels, 1 to {MAX_LABELS} are served")));
                }
                let name = |index: usize| {
                    let name = named.object.get(&index.to_string()).and_then(serde_json::Value::as_str);
                    name.map(str::to_owned).ok_or_else(|| unsupported("id2label", format!("has no label {index}")))
                };
                (0..count).map(name).collect::<Result<_, _>>()?
            }
        };
        let activation = match (names.len(), fields.string("problem_type")?) {
            (1, _) if has_sigmoid(fields)? => Activation::Sigmoid,
            (1, _) | (_, Some("regression")) => Activation::None,
            (_, None | Some("single_label_classification")) => Activation::Softmax,
            (_, Some("multi_label_classification")) => Activation::Sigmoid,
            (_, Some(other)) => {
                let why = format!(
                    "{other} is not served; single_label_classification, multi_label_classification and regression are"
                );
                return Err(unsupported("problem_type", why));
            }
        };
        Ok(Self { names, activation })
    }
}

impl Activation {
    /// Of one text's logits.
    pub(crate) fn apply(self, logits: &mut [f32]) {
        match self {
            Self::None => {}
            Self::Sigmoid => {
                logits.iter_mut().for_each(|logit| *logit = (1.0 / (1.0 + (-f64::from(*logit)).exp())) as f32);
            }
            Self::Softmax => {
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let share = |logit: f32| (f64::from(logit) - f64::from(most)).exp();
                let sum: f64 = logits.iter().map(|logit| share(*logit)).sum();
                logits.iter_mut().for_each(|logit| *logit = (share(*logit) / sum) as f32);
            }
        }
    }
}

/// What sentence-transformers puts behind a score: a sigmoid, unless the file names the identity.
fn has_sigmoid(fields: &Fields<'_>) -> Result<bool, EngineError> {
    let newer = match fields.object("sentence_transformers")? {
        Some(own) => own.string("activation_fn")?,
        None => None,
    };
    let name = match newer {
        Some(name) => Some(name),
        None => fields.string("sbert_ce_default_activation_function")?,
    };
    match name.map(|name| name.rsplit('.').next().unwrap_or(name)) {
        None | Some("Sigmoid") => Ok(true),
        Some("Identity") => Ok(false),
        Some(other) => Err(unsupported("activation_fn", format!("{other} is not served; Sigmoid and Identity are"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: serde_json::Value) -> Result<Labels, String> {
        let fields = Fields { object: config.as_object().unwrap(), prefix: "" };
        Labels::read(&fields).map_err(|error| error.to_string())
    }

    #[test]
    fn files_say_the_labels_and_what_is_computed_of_logits() {
        let one = json!({"0": "LABEL_0"});
        let three = json!({"2": "c", "0": "a", "1": "b"});
        for (config, count, activation) in [
            (json!({}), 2, Activation::Softmax),
            (json!({"id2label": one}), 1, Activation::Sigmoid),
            (json!({"id2label": one, "problem_type": "regression"}), 1, Activation::Sigmoid),
            (
                json!({"id2label": one, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}}),
                1,
                Activation::None,
            ),
            (json!({"id2label": three}), 3, Activation::Softmax),
            // What sentence-transformers trains with says nothing of how sure a model is.
            (
                json!({"id2label": three, "sentence_transformers": {"activation_fn": "torch.nn.Identity"}}),
                3,
                Activation::Softmax,
            ),
            (json!({"id2label": three, "problem_type": "single_label_classification"}), 3, Activation::Softmax),
            (json!({"id2label": three, "problem_type": "multi_label_classification"}), 3, Activation::Sigmoid),
            (json!({"id2label": three, "problem_type": "regression"}), 3, Activation::None),
        ] {
            let labels = read(config.clone()).unwrap();
            assert_eq!((labels.names.len(), labels.activation), (count, activation), "{config}");
        }
        assert_eq!(read(json!({"id2label": three})).unwrap().names, ["a", "b", "c"]);
        for config in [
            json!({"id2label": {}}),
            json!({"id2label": {"1": "a"}}),
            json!({"id2label": {"0": 7}}),
            json!({"id2label": ["a"]}),
            json!({"id2label": three, "problem_type": "ranking"}),
            json!({"id2label": one, "sentence_transformers": {"activation_fn": "evil.Code"}}),
        ] {
            assert!(read(config.clone()).is_err(), "{config}");
        }
    }

    #[test]
    fn shares_add_up_whatever_the_logits() {
        let mut logits = [1000.0, 1000.0, -1000.0];
        Activation::Softmax.apply(&mut logits);
        assert_eq!(logits, [0.5, 0.5, 0.0]);
        let mut logits = [0.0, -1000.0, 1000.0];
        Activation::Sigmoid.apply(&mut logits);
        assert_eq!(logits, [0.5, 0.0, 1.0]);
    }
}
