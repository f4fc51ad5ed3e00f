//! The demo model, compiled in: what is served when no model is named.

use quire_engine::EmbeddedModel;

/// A model of a few million parameters that was trained on sentences made for it. It shows that a server works; it is
/// no assistant.
pub static MODEL: EmbeddedModel = EmbeddedModel {
    name: "quire-demo",
    files: &[
        ("config.json", include_bytes!("../demo/config.json")),
        ("generation_config.json", include_bytes!("../demo/generation_config.json")),
        ("model.safetensors", include_bytes!("../demo/model.safetensors")),
        ("tokenizer.json", include_bytes!("../demo/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../demo/tokenizer_config.json")),
    ],
};
