//! What a card can do at most, measured by kernels that do one thing: the figures that speed is stated beside.

pub mod cuda;
