//! Arithmetic on a device: one trait, one folder per operation, CPU and CUDA behind it.

pub mod backend;
pub mod cpu;
pub mod cuda;
pub mod e4m3;
pub mod error;
pub mod kv_layout;
pub mod ops;
pub mod tensor_format;
#[cfg(feature = "testing")]
pub mod testing;
pub mod weight_format;

pub use backend::{Backend, DType, DeviceInfo, DeviceMemory, HostTensor, StepLimits, WeightLayout, WeightSource};
pub use error::KernelError;
pub use kv_layout::KvLayout;
pub use tensor_format::{GroupScale, TensorFormat};
pub use weight_format::WeightFormat;
