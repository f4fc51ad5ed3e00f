use super::{Lens, RopeFrequencies, RopeTable};
use crate::KernelError;
use crate::cuda::{CudaBackend, Device, DevicePtr, KernelId};
use crate::kv_layout::MAX_HEAD_DIM;

/// A thread has an angle.
const THREADS: usize = 256;

/// Sets of frequencies that are kept on the device: models have one.
const MAX_KEPT: usize = 8;

/// Fixed frequencies on the device.
pub(crate) struct Kept {
    sets: Vec<(Vec<f32>, DevicePtr)>,
    room: DevicePtr,
}

impl Kept {
    pub(crate) fn new<D: Device>(device: &mut D) -> Result<Self, KernelError> {
        let room = device.alloc("rotary frequencies", MAX_KEPT * SET_BYTES)?;
        Ok(Self { sets: Vec::with_capacity(MAX_KEPT), room })
    }

    /// Where `inverse` lies, which is copied there unless it is there already. Of too many, the first makes room.
    fn find<D: Device>(&mut self, device: &mut D, inverse: &[f32]) -> Result<DevicePtr, KernelError> {
        if let Some((_, ptr)) = self.sets.iter().find(|(kept, _)| kept == inverse) {
            return Ok(*ptr);
        }
        let ptr = match self.sets.len() {
            MAX_KEPT => self.sets.remove(0).1,
            index => self.room.offset(index * SET_BYTES),
        };
        let bytes: Vec<u8> = inverse.iter().flat_map(|x| x.to_le_bytes()).collect();
        device.upload(ptr, &bytes)?;
        self.sets.push((inverse.to_vec(), ptr));
        Ok(ptr)
    }
}

const SET_BYTES: usize = MAX_HEAD_DIM / 2 * size_of::<f32>();

/// ```c
/// // out[i][0..2] = {cos, sin}(positions[i / len] * inverse[i % len]) * magnitude; i = blockIdx.x * blockDim.x + threadIdx.x.
/// // The angle is an f32; cosine and sine are computed in f64 and rounded once.
/// rope_table_fixed(const uint32_t* positions, uint32_t num_tokens, const float* inverse, uint32_t len, float magnitude,
///                  float* out)
/// // The same with the frequencies of RopeFrequencies::inverse, computed in f64.
/// rope_table_dynamic_ntk(const uint32_t* positions, uint32_t num_tokens, uint32_t head_dim, float base, float factor,
///                        uint32_t original_len, float magnitude, float* out)
/// ```
pub(crate) fn rope_table<D: Device>(
    backend: &mut CudaBackend<D>,
    args: RopeTable<'_, CudaBackend<D>>,
) -> Result<(), KernelError> {
    let op = RopeTable::<CudaBackend<D>>::OP;
    args.check(Lens { positions: args.positions.len(), out: args.out.len() })?;
    let (positions, out) = (args.positions.u32(op, "positions")?, args.out.f32(op, "out")?);
    let num_tokens = (args.num_tokens as u32).into();
    let len = args.frequencies.len();
    let grid = [(args.num_tokens * len).div_ceil(THREADS), 1, 1];
    let block = [THREADS as u32, 1, 1];
    match *args.frequencies {
        RopeFrequencies::Fixed { ref inverse } => {
            let inverse = backend.rope_frequencies.find(&mut backend.device, inverse)?;
            let magnitude = args.magnitude.into();
            let params = [positions.into(), num_tokens, inverse.into(), (len as u32).into(), magnitude, out.into()];
            let kernel = KernelId { module: "rope_table", function: "rope_table_fixed" };
            // SAFETY: `check` saw that positions and results lie in their buffers; there are `len` frequencies.
            unsafe { backend.launch(kernel, grid, block, 0, &params) }
        }
        RopeFrequencies::DynamicNtk { base, factor, original_len, head_dim } => {
            let params = [
                positions.into(),
                num_tokens,
                (head_dim as u32).into(),
                base.into(),
                factor.into(),
                original_len.into(),
                args.magnitude.into(),
                out.into(),
            ];
            let kernel = KernelId { module: "rope_table", function: "rope_table_dynamic_ntk" };
            // SAFETY: as above.
            unsafe { backend.launch(kernel, grid, block, 0, &params) }
        }
    }
}
