//! Weights packed for the micro-kernels.
//!
//! A panel holds `panel_width` output features, step after step (see [`super::tile`] and [`super::grouped`]), missing
//! features and a last step's missing inputs filled up with zeros. Stacked parts fill panels one feature after the
//! other; of gate and up each panel takes `panel_width / 2` of the same outputs, gates in its lower lanes.
//! Panel after panel is 64-byte aligned, in huge pages where the system has them.

use half::f16;

use super::compact::Beside;
use super::tile::Kernel;
use super::{fp8, grouped};
use crate::cpu::Isa;
use crate::cpu::buffer::AlignedBytes;
use crate::ops::linear::{WeightShape, quantize};
use crate::weight_format::{Grouping, LONG_GROUP_LEN};
use crate::{WeightFormat, WeightLayout};

/// A packed matrix, see [`crate::WeightSource`].
pub struct CpuWeight {
    pub(super) shape: WeightShape,
    pub(super) isa: Isa,
    pub(super) kernel: Kernel,
    pub(super) panels: AlignedBytes,
    /// For each panel where the kernel is compact; else empty.
    pub(super) beside: Vec<Beside>,
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

    /// All of it as it lies in memory.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.panels.view::<u8>()
    }

    pub(super) fn num_steps(&self) -> usize {
        self.kernel.num_steps(self.shape.in_features)
    }

    pub(super) fn panel_bytes(&self) -> usize {
        self.num_steps() * self.kernel.step_bytes
    }

    pub(super) fn num_panels(&self) -> usize {
        self.panels.len() / self.panel_bytes()
    }

    /// The first byte of a panel.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        self.panels.view::<u8>()[panel * self.panel_bytes()..].as_ptr()
    }

    /// What a panel needs beside its bytes, where the kernel is compact.
    pub(super) fn beside(&self, panel: usize) -> Option<&Beside> {
        self.beside.get(panel)
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
        match self.shape.format {
            WeightFormat::Bf16 if self.kernel.is_compact => {
                let beside = &self.beside[panel];
                let steps = self.panels.view::<u8>()[start..].chunks_exact(self.kernel.step_bytes);
                for (out, step) in out.chunks_mut(self.kernel.features_per_step).zip(steps) {
                    for (feature, out) in out.iter_mut().enumerate() {
                        *out = f32::from_bits(u32::from(beside.number(step, width, lane, feature)) << 16);
                    }
                }
                for exception in beside.exceptions.iter().filter(|exception| usize::from(exception.lane) == lane) {
                    out[exception.feature as usize] = f32::from_bits(u32::from(exception.bits) << 16);
                }
            }
            WeightFormat::Bf16 => {
                let pairs = &self.panels.view::<u32>()[start / size_of::<u32>()..];
                for (step, out) in out.chunks_mut(2).enumerate() {
                    let pair = pairs[step * width + lane];
                    out[0] = f32::from_bits(pair << 16);
                    if let Some(out) = out.get_mut(1) {
                        *out = f32::from_bits(pair & 0xffff_0000);
                    }
                }
            }
            WeightFormat::F32 => {
                let numbers = &self.panels.view::<f32>()[start / size_of::<f32>()..];
                for (step, out) in out.iter_mut().enumerate() {
                    *out = numbers[step * width + lane];
                }
            }
            WeightFormat::Fp8 => {
                let steps = self.panels.view::<u8>()[start..].chunks_exact(self.kernel.step_bytes);
                for (out, step) in out.chunks_mut(LONG_GROUP_LEN).zip(steps) {
                    fp8::read_group(width, step, lane, out);
                }
            }
            WeightFormat::Grouped(grouping) => {
                let steps = self.panels.view::<u8>()[start..].chunks_exact(self.kernel.step_bytes);
                for (out, step) in out.chunks_mut(grouping.group_len).zip(steps) {
                    self.read_group(grouping, step, lane, out);
                }
            }
        }
    }

    /// Writes a lane of one group to `out`.
    fn read_group(&self, grouping: Grouping, step: &[u8], lane: usize, out: &mut [f32]) {
        let width = self.kernel.panel_width;
        let (codes, scales) = step.split_at(grouped::code_bytes(self.isa, grouping));
        let (mins, size) = (width * grouped::scale_size(self.isa), grouped::scale_size(self.isa));
        let number = |bytes: &[u8]| match *bytes {
            [a, b] => f16::from_ne_bytes([a, b]).to_f32(),
            [a, b, c, d] => f32::from_ne_bytes([a, b, c, d]),
            _ => unreachable!("scales have two or four bytes"),
        };
        let scale = number(&scales[lane * size..][..size]);
        let min = if grouping.has_min { number(&scales[mins + lane * size..][..size]) } else { 0.0 };
        let per_byte = grouping.codes.per_byte();
        for (index, out) in out.iter_mut().enumerate() {
            let (quad, place) = (index / 4, index % 4);
            let byte = codes[(quad / per_byte * width + lane) * 4 + place];
            let code = if per_byte == 2 { byte >> (quad % 2 * 4) & 15 } else { byte };
            *out = scale * quantize::code_value(grouping.codes, code) + min;
        }
    }
}

/// See [`crate::Backend::weight_bytes`].
pub(crate) fn weight_bytes(isa: Isa, shape: &WeightShape) -> usize {
    panels_bytes(&Kernel::new(isa, shape.format), shape)
}

/// Bytes of all panels.
pub(super) fn panels_bytes(kernel: &Kernel, shape: &WeightShape) -> usize {
    let num_panels = match shape.layout {
        WeightLayout::Stacked => shape.out_features.div_ceil(kernel.panel_width),
        WeightLayout::GateUp => (shape.out_features / 2).div_ceil(kernel.panel_width / 2),
    };
    num_panels.saturating_mul(kernel.num_steps(shape.in_features)).saturating_mul(kernel.step_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_every_feature_once() {
        for layout in [WeightLayout::Stacked, WeightLayout::GateUp] {
            for out_features in [2, 16, 62, 64, 66, 128, 130] {
                let shape = WeightShape { out_features, in_features: 1, layout, format: WeightFormat::F32 };
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
}
