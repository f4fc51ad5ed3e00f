//! Weights packed for the micro-kernels.
//!
//! A panel holds `panel_width` output features: `[in_features / features_per_step][panel_width][features_per_step]`,
//! missing features and an odd last input filled up with zeros. Stacked parts fill panels one feature after the
//! other; of gate and up each panel takes `panel_width / 2` of the same outputs, gates in its lower lanes.
//! Panel after panel is 64-byte aligned, in huge pages where the system has them.

use super::tile::Kernel;
use crate::cpu::buffer::AlignedBytes;
use crate::cpu::lanes::bf16_bits;
use crate::cpu::thread_pool::SharedMut;
use crate::cpu::{CpuBackend, Isa};
use crate::ops::linear::WeightShape;
use crate::{DType, HostTensor, KernelError, TensorFormat, WeightLayout, WeightSource};

/// Input features packed at a time: one panel's part of them (16 KiB in bf16) stays in the level-1 cache while the rows
/// of the source pass. A multiple of 16.
const PACK_BLOCK: usize = 128;

/// A packed matrix, see [`crate::WeightSource`].
pub struct CpuWeight {
    pub(super) shape: WeightShape,
    pub(super) isa: Isa,
    pub(super) kernel: Kernel,
    panels: AlignedBytes,
}

/// Lanes of a panel that hold consecutive output features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) lane: usize,
    pub(super) feature: usize,
    pub(super) len: usize,
}

impl Segment {
    /// What the panel holds; a stacked panel's second segment is empty.
    pub(super) fn of_panel(shape: &WeightShape, panel_width: usize, panel: usize) -> [Self; 2] {
        match shape.layout {
            WeightLayout::Stacked => {
                let feature = panel * panel_width;
                let len = panel_width.min(shape.out_features - feature);
                [Self { lane: 0, feature, len }, Self { lane: len, feature: feature + len, len: 0 }]
            }
            WeightLayout::GateUp => {
                let (half, num_outputs) = (panel_width / 2, shape.out_features / 2);
                let feature = panel * half;
                let len = half.min(num_outputs - feature);
                [Self { lane: 0, feature, len }, Self { lane: half, feature: num_outputs + feature, len }]
            }
        }
    }
}

impl CpuWeight {
    /// What the matrix is.
    pub fn shape(&self) -> &WeightShape {
        &self.shape
    }

    pub(super) fn num_steps(&self) -> usize {
        self.shape.in_features.div_ceil(self.kernel.features_per_step)
    }

    fn panel_bytes(&self) -> usize {
        self.num_steps() * self.kernel.step_bytes()
    }

    pub(super) fn num_panels(&self) -> usize {
        self.panels.len() / self.panel_bytes()
    }

    /// The first byte of a panel.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        self.panels.view::<u8>()[panel * self.panel_bytes()..].as_ptr()
    }

    /// Writes row `feature` of the matrix to `out`, `[in_features]`, in f32.
    pub(crate) fn read_row(&self, feature: usize, out: &mut [f32]) {
        let width = self.kernel.panel_width;
        let (panel, lane) = match self.shape.layout {
            WeightLayout::Stacked => (feature / width, feature % width),
            WeightLayout::GateUp => {
                let (half, num_outputs) = (width / 2, self.shape.out_features / 2);
                let (part, output) = (feature / num_outputs, feature % num_outputs);
                (output / half, part * half + output % half)
            }
        };
        let start = panel * self.panel_bytes();
        match self.shape.dtype {
            DType::Bf16 => {
                let pairs = &self.panels.view::<u32>()[start / size_of::<u32>()..];
                for (step, out) in out.chunks_mut(2).enumerate() {
                    let pair = pairs[step * width + lane];
                    out[0] = f32::from_bits(pair << 16);
                    if let Some(out) = out.get_mut(1) {
                        *out = f32::from_bits(pair & 0xffff_0000);
                    }
                }
            }
            _ => {
                let numbers = &self.panels.view::<f32>()[start / size_of::<f32>()..];
                for (step, out) in out.iter_mut().enumerate() {
                    *out = numbers[step * width + lane];
                }
            }
        }
    }
}

/// See [`crate::Backend::weight_bytes`].
pub(crate) fn weight_bytes(isa: Isa, out_features: usize, in_features: usize, dtype: DType) -> usize {
    let kernel = Kernel::new(isa, dtype);
    out_features
        .div_ceil(kernel.panel_width)
        .saturating_mul(in_features.div_ceil(kernel.features_per_step))
        .saturating_mul(kernel.step_bytes())
}

/// See [`crate::Backend::pack_weight`]. Each thread fills, and so first touches, the panels that it will read. Nothing
/// but the packed matrix is allocated.
pub(crate) fn pack_weight(backend: &mut CpuBackend, source: &WeightSource<'_>) -> Result<CpuWeight, KernelError> {
    let shape = WeightShape::of(source)?;
    if let Some(part) = source.parts.iter().find(|part| !part.format.is_dense()) {
        let op = "pack_weight";
        return Err(KernelError::Type { op, argument: "parts.format", found: part.format.name() });
    }
    let kernel = Kernel::new(backend.isa, shape.dtype);
    let num_bytes = weight_bytes(backend.isa, shape.out_features, shape.in_features, shape.dtype);
    backend.linear_workspace.reserve(&kernel, shape.in_features)?;
    let panels = backend.weights.zeroed("weight", num_bytes)?;
    let mut weight = CpuWeight { shape, isa: backend.isa, kernel, panels };

    let panel_bytes = weight.panel_bytes();
    let num_panels = weight.num_panels();
    let target = SharedMut::new(weight.panels.view_mut::<u8>());
    backend.pool.run_ranges(num_panels, 1, &|_, panels| {
        for panel in panels {
            // SAFETY: each panel belongs to one range.
            let target = unsafe { target.slice_mut(panel * panel_bytes..(panel + 1) * panel_bytes) };
            pack_panel(source, &shape, kernel.panel_width, panel, target);
        }
    });
    Ok(weight)
}

/// Fills one panel, which is zero so far.
fn pack_panel(source: &WeightSource<'_>, shape: &WeightShape, width: usize, panel: usize, target: &mut [u8]) {
    let mut bits = [0_u16; PACK_BLOCK];
    let mut numbers = [0.0_f32; PACK_BLOCK];
    for first in (0..shape.in_features).step_by(PACK_BLOCK) {
        let len = PACK_BLOCK.min(shape.in_features - first);
        for segment in Segment::of_panel(shape, width, panel) {
            let rows = source.rows(segment.feature).take(segment.len);
            for (lane, (part, row)) in (segment.lane..).zip(rows) {
                let number_bytes = part.format.block_bytes();
                let bytes = &part.bytes[(row * part.cols + first) * number_bytes..][..len * number_bytes];
                if shape.dtype == DType::Bf16 {
                    // An odd last feature has a zero for its neighbour.
                    bits[len..].fill(0);
                    read_bf16(part.format, bytes, &mut bits[..len]);
                    let target = &mut target[first / 2 * width * 4..];
                    for (step, pair) in bits[..len.next_multiple_of(2)].chunks_exact(2).enumerate() {
                        let pair = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                        target[(step * width + lane) * 4..][..4].copy_from_slice(&pair.to_ne_bytes());
                    }
                } else {
                    part.format.decode(bytes, &mut numbers[..len]);
                    let target = &mut target[first * width * 4..];
                    for (step, number) in numbers[..len].iter().enumerate() {
                        target[(step * width + lane) * 4..][..4].copy_from_slice(&number.to_ne_bytes());
                    }
                }
            }
        }
    }
}

/// Numbers of a file as bf16 bits, rounded half to even.
fn read_bf16(format: TensorFormat, bytes: &[u8], out: &mut [u16]) {
    if format == TensorFormat::Bf16 {
        for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *out = u16::from_le_bytes([bytes[0], bytes[1]]);
        }
    } else {
        let mut numbers = [0.0; PACK_BLOCK];
        let numbers = &mut numbers[..out.len()];
        format.decode(bytes, numbers);
        for (out, &number) in out.iter_mut().zip(&*numbers) {
            *out = bf16_bits(number);
        }
    }
}

impl<'a> WeightSource<'a> {
    /// Rows of all parts in order, from `first` on: each part with its row.
    fn rows(&self, first: usize) -> impl Iterator<Item = (&HostTensor<'a>, usize)> {
        let mut skip = first;
        let mut parts = self.parts.iter().peekable();
        while let Some(part) = parts.next_if(|part| part.rows <= skip) {
            skip -= part.rows;
        }
        let mut row = skip;
        std::iter::from_fn(move || {
            parts.next_if(|part| part.rows <= row).inspect(|_| row = 0);
            let part = parts.peek()?;
            row += 1;
            Some((*part, row - 1))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_every_feature_once() {
        for layout in [WeightLayout::Stacked, WeightLayout::GateUp] {
            for out_features in [2, 16, 62, 64, 66, 128, 130] {
                let shape = WeightShape { out_features, in_features: 1, layout, dtype: DType::F32 };
                for width in [16, 64] {
                    let mut seen = vec![0; out_features];
                    for panel in 0..out_features.div_ceil(width) {
                        let [first, second] = Segment::of_panel(&shape, width, panel);
                        assert!(first.lane + first.len <= second.lane && second.lane + second.len <= width);
                        for segment in [first, second] {
                            seen[segment.feature..segment.feature + segment.len].iter_mut().for_each(|seen| *seen += 1);
                        }
                    }
                    assert!(seen.iter().all(|&seen| seen == 1), "{layout:?} {out_features} {width}: {seen:?}");
                }
            }
        }
    }

    #[test]
    fn rows_go_through_parts_in_order() {
        let part = |rows| HostTensor { format: TensorFormat::F32, rows, cols: 1, bytes: &[] };
        let parts = vec![part(2), part(1), part(3)];
        let source = WeightSource { parts, layout: WeightLayout::Stacked, dtype: DType::F32 };
        let all = [(2, 0), (2, 1), (1, 0), (3, 0), (3, 1), (3, 2)];
        for first in 0..=6 {
            let rows: Vec<_> = source.rows(first).map(|(part, row)| (part.rows, row)).collect();
            assert_eq!(rows, all[first..]);
        }
    }
}
