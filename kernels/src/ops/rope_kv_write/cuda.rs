use super::{Lens, RopeKvWrite};
use crate::cuda::{CudaBackend, Device, DevicePtr, Fault, KernelId};
use crate::{DType, KernelError};

/// A thread block has a token and a KV head: the queries of the group, the key, the value. A warp has one of these at a
/// time.
const THREADS: u32 = 128;

/// ```c
/// // Token blockIdx.x, KV head blockIdx.y. kv_layer is one layer of the cache: [num_blocks][num_kv_heads] of what KvLayout
/// // says of one head of a block. Weights are null where there is no norm. A slot of UINT32_MAX is none; any other that
/// // is not below num_slots is a fault. f32, bf16, i8, fp8 is the cache's type.
/// rope_kv_write_{f32,bf16,i8,fp8}(float* qkv, const float* cos_sin, const float* q_weight, const float* k_weight, float eps,
///                             const uint32_t* slot_mapping, uint32_t num_slots, void* kv_layer, uint32_t num_heads,
///                             uint32_t num_kv_heads, uint32_t head_dim, uint32_t block_size, uint32_t* fault_slot_mapping)
/// ```
pub(crate) fn rope_kv_write<D: Device>(
    backend: &mut CudaBackend<D>,
    args: RopeKvWrite<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = RopeKvWrite::<CudaBackend<D>>::OP;
    let layout = *args.kv.layout();
    args.check(
        Lens {
            qkv: args.qkv.len(),
            cos_sin: args.cos_sin.len(),
            slot_mapping: args.slot_mapping.len(),
            qk_norm: args.qk_norm.as_ref().map(|norm| [norm.q_weight.len(), norm.k_weight.len()]),
        },
        &layout,
    )?;
    let (q_weight, k_weight, eps) = match &args.qk_norm {
        Some(norm) => (norm.q_weight.f32(op, "q_weight")?, norm.k_weight.f32(op, "k_weight")?, norm.eps),
        None => (DevicePtr::NULL, DevicePtr::NULL, 0.0),
    };
    let params = [
        args.qkv.f32(op, "qkv")?.into(),
        args.cos_sin.f32(op, "cos_sin")?.into(),
        q_weight.into(),
        k_weight.into(),
        eps.into(),
        args.slot_mapping.u32(op, "slot_mapping")?.into(),
        (layout.num_slots() as u32).into(),
        args.kv.layer(args.layer).into(),
        (args.shape.num_heads as u32).into(),
        (args.shape.num_kv_heads as u32).into(),
        (args.shape.head_dim as u32).into(),
        (layout.block_size as u32).into(),
        backend.fault(Fault::RopeKvWriteSlotMapping),
    ];
    let function = match layout.dtype {
        DType::F32 => "rope_kv_write_f32",
        DType::I8 => "rope_kv_write_i8",
        DType::F8E4M3 => "rope_kv_write_fp8",
        _ => "rope_kv_write_bf16",
    };
    let kernel = KernelId { module: "rope_kv_write", function };
    let grid = [args.num_tokens, args.shape.num_kv_heads, 1];
    // SAFETY: `check` saw that all rows lie in their buffers and the layer in the cache; the kernel looks at each slot.
    unsafe { backend.launch(kernel, grid, [THREADS, 1, 1], 0, &params) }
}
