//! Uploads of one step, gathered to a single one. What it means is said at [`crate::Backend::stage_u32`].

pub(crate) mod cuda;
