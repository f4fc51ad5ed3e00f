//! The operations. Each folder holds one: its contract (`mod.rs`), its meaning (`reference.rs`), its code per device.

pub mod embed;
pub mod gather_rows;
pub mod linear;
pub mod logprobs;
pub mod paged_attention;
pub mod rms_norm;
pub mod rope_kv_write;
pub mod rope_table;
pub mod sample;
