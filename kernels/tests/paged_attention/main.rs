//! Attention on every backend against its meaning, and bit by bit against itself in other batches.

mod card;
mod cpu;
mod cuda;
mod support;
