//! Tensors by the names that Hugging Face's files have for them.

/// What a tensor of a layer is called, without `blk.N.` and `.weight` or `.bias`.
const IN_LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Factors that divide the rotary frequencies; has no counterpart elsewhere and keeps its name.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Whose rows the tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// As they are multiplied.
    Plain,
    /// Queries' or keys', which some converters store with the halves of each head interleaved.
    Query,
    Key,
}

/// The other name of a tensor and whose rows it has; `None` for names that are not known.
pub(crate) fn hugging_face(name: &str) -> Option<(String, Rows)> {
    let (stem, suffix) = name.rsplit_once('.').filter(|(_, suffix)| matches!(*suffix, "weight" | "bias"))?;
    let Some(in_layers) = stem.strip_prefix("blk.") else {
        let (_, other) = OUTSIDE.iter().find(|(own, _)| *own == stem)?;
        return Some((format!("{other}.{suffix}"), Rows::Plain));
    };
    let (layer, part) = in_layers.split_once('.')?;
    // A number as it is written, so that no two names mean one tensor.
    let layer: u32 = layer.parse().ok().filter(|number: &u32| number.to_string() == layer)?;
    let (_, other) = IN_LAYER.iter().find(|(own, _)| *own == part)?;
    let rows = match part {
        "attn_q" => Rows::Query,
        "attn_k" => Rows::Key,
        _ => Rows::Plain,
    };
    Some((format!("model.layers.{layer}.{other}.{suffix}"), rows))
}

/// The name here of a tensor of Hugging Face's files.
#[cfg(feature = "testing")]
pub(crate) fn of_hugging_face(name: &str) -> Option<String> {
    let (stem, suffix) = name.rsplit_once('.')?;
    let own = |table: &[(&'static str, &str)], stem: &str| {
        table.iter().find(|(_, other)| *other == stem).map(|(own, _)| *own)
    };
    match stem.strip_prefix("model.layers.").and_then(|in_layers| in_layers.split_once('.')) {
        Some((layer, part)) => Some(format!("blk.{layer}.{}.{suffix}", own(&IN_LAYER, part)?)),
        None => Some(format!("{}.{suffix}", own(&OUTSIDE, stem)?)),
    }
}

/// The rows of whole heads with their halves one after the other, where `bytes` has them interleaved: row
/// `half * head_dim / 2 + i` of a head comes from its row `2 * i + half`. `None` where the rows are not whole heads of
/// an even size.
pub(crate) fn halves_apart(bytes: &[u8], num_rows: usize, num_heads: usize) -> Option<Vec<u8>> {
    if num_heads == 0 || !num_rows.is_multiple_of(2 * num_heads) || !bytes.len().is_multiple_of(num_rows) {
        return None;
    }
    let (row_bytes, head_dim) = (bytes.len() / num_rows, num_rows / num_heads);
    let mut apart = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(head_dim * row_bytes) {
        for half in 0..2 {
            for i in 0..head_dim / 2 {
                apart.extend_from_slice(&head[(2 * i + half) * row_bytes..][..row_bytes]);
            }
        }
    }
    Some(apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_or_not_known() {
        let name = |name| hugging_face(name).map(|(name, _)| name);
        assert_eq!(name("token_embd.weight").unwrap(), "model.embed_tokens.weight");
        assert_eq!(name("blk.12.ffn_up.bias").unwrap(), "model.layers.12.mlp.up_proj.bias");
        assert_eq!(hugging_face("blk.0.attn_k.bias").unwrap().1, Rows::Key);
        assert_eq!(hugging_face("blk.0.attn_k_norm.weight").unwrap().1, Rows::Plain);
        for unknown in [
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.1.attn_q",
            "blk.1.attn_qkv.weight",
            "output.scale",
            "",
        ] {
            assert_eq!(name(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn halves_of_each_head_come_apart() {
        // Two heads of four rows of two bytes.
        let bytes: Vec<u8> = (0..16).collect();
        let apart = halves_apart(&bytes, 8, 2).unwrap();
        assert_eq!(apart, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]);
        assert_eq!(halves_apart(&bytes, 8, 3), None);
        assert_eq!(halves_apart(&bytes, 8, 0), None);
        assert_eq!(halves_apart(&bytes, 8, 8), None);
    }
}
