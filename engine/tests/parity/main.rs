//! The served forward pass against what transformers answers, on the CPU, in the emulator and on a card.
//!
//! Norm: the largest absolute error of a prompt's logits over the largest absolute logit of the reference.

mod cases;
mod cpu;
mod cuda;

/// f32 sums of some hundred terms in another order.
const F32_TOLERANCE: f64 = 1e-4;
/// Weights, activations before each product and the cache are rounded to 8 bits; what rounding does to a tiny model is
/// measured by transformers itself, whose own bf16 deviates as much.
const BF16_TOLERANCE: f64 = 0.05;
