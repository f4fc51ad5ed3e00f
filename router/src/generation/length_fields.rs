//! What faces call the fields of how long texts and vectors are: refusals name what the client can write.

use crate::error::ApiError;
use crate::metrics::Endpoint;

use super::validate::invalid;

/// The names of one face.
#[derive(Clone, Copy)]
pub(super) struct LengthFields {
    pub(super) dimensions: &'static str,
    /// Most tokens of a text.
    tokens: &'static str,
    /// What stands for the model's length there.
    fit: Option<&'static str>,
    /// What lets longer texts be cut, where something does.
    cutting: Option<&'static str>,
}

impl LengthFields {
    pub(super) fn of(endpoint: Endpoint) -> Self {
        let most = Self {
            dimensions: "dimensions",
            tokens: "truncate_prompt_tokens",
            fit: Some("-1"),
            cutting: Some("`truncate_prompt_tokens`"),
        };
        match endpoint {
            Endpoint::CohereEmbed => Self {
                dimensions: "output_dimension",
                tokens: "max_tokens",
                fit: None,
                cutting: Some("`truncate`: END"),
            },
            Endpoint::OllamaEmbed => Self { cutting: Some("`truncate`: true"), ..most },
            Endpoint::GrpcEmbed | Endpoint::GrpcRerank | Endpoint::GrpcClassify => Self {
                tokens: "truncation.tokens",
                fit: Some("`truncation.fit` in its place"),
                cutting: Some("`truncation`"),
                ..most
            },
            Endpoint::GrpcVllmEmbed | Endpoint::GrpcModelInfer => Self { cutting: None, ..most },
            _ => most,
        }
    }

    /// The refusal of a number of tokens.
    pub(super) fn refused_tokens(&self, max_len: usize) -> ApiError {
        match self.fit {
            Some(fit) => invalid(self.tokens, format_args!("must be from 1 to {max_len}, or {fit}")),
            None => invalid(self.tokens, format_args!("must be from 1 to {max_len}")),
        }
    }

    /// What is said of a text of `len` tokens.
    pub(super) fn too_long(&self, len: usize, max_len: usize) -> String {
        let what = format!("an input has {len} tokens, the model's length is {max_len}");
        self.cutting.map_or(what.clone(), |cutting| format!("{what}; {cutting} cuts inputs"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_face_is_told_of_fields_that_it_has() {
        let said = |endpoint| {
            let fields = LengthFields::of(endpoint);
            (fields.refused_tokens(9).to_string(), fields.too_long(12, 9))
        };
        let (refused, too_long) = said(Endpoint::Embeddings);
        assert!(refused.contains("truncate_prompt_tokens") && refused.ends_with("or -1"), "{refused}");
        assert!(too_long.ends_with("; `truncate_prompt_tokens` cuts inputs"), "{too_long}");
        for (endpoint, tokens, cutting) in [
            (Endpoint::CohereEmbed, "max_tokens", "`truncate`: END"),
            (Endpoint::GrpcRerank, "truncation.tokens", "`truncation`"),
        ] {
            let (refused, too_long) = said(endpoint);
            assert!(refused.contains(tokens) && !refused.contains("-1"), "{refused}");
            assert!(too_long.contains(cutting) && !too_long.contains("truncate_prompt_tokens"), "{too_long}");
        }
        assert!(said(Endpoint::GrpcModelInfer).1.ends_with("length is 9"));
    }
}
