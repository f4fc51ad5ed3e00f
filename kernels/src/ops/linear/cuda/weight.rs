//! Weights packed for a CUDA device: how they lie is said in `include/weight.cuh`.

use crate::cuda::{CudaBackend, Device, DevicePtr};
use crate::ops::linear::{WeightShape, quantize};
use crate::weight_format::{Codes, Grouping, LONG_GROUP_LEN};
use crate::{HostTensor, KernelError, TensorFormat, WeightFormat, WeightLayout, WeightSource};

/// Bytes that are packed at a time, before they go to the device.
const BATCH_BYTES: usize = 64 << 20;

/// Output features of a tile: the rows of a matrix instruction.
const TILE_FEATURES: usize = 16;

const IS_GATE_UP: u32 = 1;
const HAS_MIN: u32 = 2;
const HAS_TABLE: u32 = 4;
const KIND_SHIFT: u32 = 4;

/// A packed matrix, see [`crate::WeightSource`].
#[derive(Debug)]
pub struct CudaWeight {
    shape: WeightShape,
    ptr: DevicePtr,
}

impl CudaWeight {
    /// What the matrix is.
    pub fn shape(&self) -> &WeightShape {
        &self.shape
    }

    /// Where the first panel lies.
    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// What kernels need to know of it besides its sizes: `flags` of `include/weight.cuh`.
    pub(crate) fn flags(&self) -> u32 {
        let form = Form::of(self.shape.format);
        let is_gate_up = if self.shape.layout == WeightLayout::GateUp { IS_GATE_UP } else { 0 };
        let grouping = match self.shape.format {
            WeightFormat::Grouped(grouping) => {
                (if grouping.has_min { HAS_MIN } else { 0 })
                    | (if grouping.codes == Codes::Iq4Nl { HAS_TABLE } else { 0 })
            }
            _ => 0,
        };
        is_gate_up | grouping | (form.kind as u32) << KIND_SHIFT
    }
}

/// Which kernels multiply a weight; the numbers are those of `include/weight.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bf16 = 0,
    F32 = 1,
    Int8Long = 2,
    Int8Short = 3,
    Int4 = 4,
    Fp8 = 5,
}

/// Sizes of panels and stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    pub(super) kind: Kind,
    /// Output features.
    pub(super) panel_features: usize,
    /// Input features.
    pub(super) stage_features: usize,
    pub(super) stage_bytes: usize,
}

impl Form {
    pub(super) const fn of(format: WeightFormat) -> Self {
        let (kind, panel_features, stage_features, stage_bytes) = match format {
            WeightFormat::Bf16 => (Kind::Bf16, 128, 64, 16 << 10),
            WeightFormat::F32 => (Kind::F32, 64, 1, 256),
            WeightFormat::Fp8 => (Kind::Fp8, 128, 128, (16 << 10) + 128 * size_of::<f32>()),
            WeightFormat::Grouped(grouping) => {
                let (kind, code_bytes) = match grouping.codes {
                    Codes::Int8 if grouping.group_len == LONG_GROUP_LEN => (Kind::Int8Long, 16 << 10),
                    Codes::Int8 => (Kind::Int8Short, 16 << 10),
                    Codes::Int4 | Codes::Iq4Nl => (Kind::Int4, 8 << 10),
                };
                let num_scales = (128 / grouping.group_len) * if grouping.has_min { 2 } else { 1 };
                (kind, 128, 128, code_bytes + num_scales * 128 * size_of::<half::f16>())
            }
        };
        Self { kind, panel_features, stage_features, stage_bytes }
    }

    pub(super) fn num_panels(&self, shape: &WeightShape) -> usize {
        match shape.layout {
            WeightLayout::Stacked => shape.out_features.div_ceil(self.panel_features),
            WeightLayout::GateUp => (shape.out_features / 2).div_ceil(self.panel_features / 2),
        }
    }

    pub(super) fn num_stages(&self, in_features: usize) -> usize {
        in_features.div_ceil(self.stage_features)
    }

    fn panel_bytes(&self, in_features: usize) -> usize {
        self.num_stages(in_features).saturating_mul(self.stage_bytes)
    }

    /// The output feature at `place` of a panel; `None` where there is none.
    fn feature(&self, shape: &WeightShape, panel: usize, place: usize) -> Option<usize> {
        if shape.layout == WeightLayout::Stacked {
            return Some(panel * self.panel_features + place).filter(|&feature| feature < shape.out_features);
        }
        let num_outputs = shape.out_features / 2;
        let (part, output) = match self.kind {
            Kind::F32 => (place % 2, place / 2),
            _ => (place % TILE_FEATURES / 8, place / TILE_FEATURES * 8 + place % 8),
        };
        let output = panel * self.panel_features / 2 + output;
        (output < num_outputs).then_some(part * num_outputs + output)
    }
}

/// See [`crate::Backend::weight_bytes`].
pub(crate) fn weight_bytes(shape: &WeightShape) -> usize {
    let form = Form::of(shape.format);
    form.num_panels(shape).saturating_mul(form.panel_bytes(shape.in_features))
}

/// See [`crate::Backend::pack_weight`]. Panels are packed by all cores, some at a time, and go to the device.
pub(crate) fn pack_weight<D: Device>(
    backend: &mut CudaBackend<D>,
    source: &WeightSource<'_>,
) -> Result<CudaWeight, KernelError> {
    let shape = WeightShape::of(source)?;
    let form = Form::of(shape.format);
    let ptr = backend.device.alloc("weight", weight_bytes(&shape))?;
    let panel_bytes = form.panel_bytes(shape.in_features);
    let num_panels = form.num_panels(&shape);
    let batch_len = (BATCH_BYTES / panel_bytes).clamp(1, num_panels);
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from).min(batch_len);
    let mut batch = vec![0; batch_len * panel_bytes];
    for first in (0..num_panels).step_by(batch_len) {
        let len = batch_len.min(num_panels - first);
        let bytes = &mut batch[..len * panel_bytes];
        bytes.fill(0);
        let share = len.div_ceil(num_threads);
        std::thread::scope(|scope| {
            for (index, share_bytes) in bytes.chunks_mut(share * panel_bytes).enumerate() {
                let shape = &shape;
                scope.spawn(move || {
                    let mut packer = Packer { source, shape, form, numbers: Vec::new() };
                    for (panel, target) in share_bytes.chunks_exact_mut(panel_bytes).enumerate() {
                        packer.pack(first + index * share + panel, target);
                    }
                });
            }
        });
        backend.device.upload(ptr.offset(first * panel_bytes), bytes)?;
    }
    backend.linear_workspace.expect(&shape);
    Ok(CudaWeight { ptr, shape })
}

struct Packer<'a> {
    source: &'a WeightSource<'a>,
    shape: &'a WeightShape,
    form: Form,
    /// A row, spread out.
    numbers: Vec<f32>,
}

impl Packer<'_> {
    /// Fills one panel, which is zero so far.
    fn pack(&mut self, panel: usize, target: &mut [u8]) {
        for place in 0..self.form.panel_features {
            let Some(feature) = self.form.feature(self.shape, panel, place) else { continue };
            let (part, row) = self.source.row(feature).expect("a feature of the shape");
            let row_bytes = part.bytes.len() / part.rows;
            let row = &part.bytes[row * row_bytes..][..row_bytes];
            match self.shape.format {
                WeightFormat::Bf16 if part.format == TensorFormat::Bf16 => {
                    let bits = row.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
                    bf16_row(place, bits, target);
                }
                WeightFormat::Bf16 => {
                    self.read(part, row);
                    let bits = self.numbers.iter().map(|&number| half::bf16::from_f32(number).to_bits());
                    bf16_row(place, bits, target);
                }
                WeightFormat::F32 => {
                    self.read(part, row);
                    let lanes = target[place * 4..].chunks_mut(self.form.stage_bytes);
                    for (lane, number) in lanes.zip(&self.numbers) {
                        lane[..4].copy_from_slice(&number.to_le_bytes());
                    }
                }
                WeightFormat::Fp8 => self.fp8_row(part, row, place, target),
                WeightFormat::Grouped(grouping) => self.grouped_row(grouping, part, row, place, target),
            }
        }
    }

    fn read(&mut self, part: &HostTensor<'_>, row: &[u8]) {
        self.numbers.clear();
        self.numbers.resize(part.cols, 0.0);
        part.format.decode(row, &mut self.numbers);
    }

    fn fp8_row(&mut self, part: &HostTensor<'_>, row: &[u8], place: usize, target: &mut [u8]) {
        let keeps = part.format == TensorFormat::F8E4M3;
        if !keeps {
            self.read(part, row);
            self.numbers.resize(part.cols.next_multiple_of(LONG_GROUP_LEN), 0.0);
        }
        let mut codes = [0; LONG_GROUP_LEN];
        for (group, stage) in target.chunks_exact_mut(self.form.stage_bytes).enumerate() {
            let scale = if keeps {
                quantize::fp8_block(row, group, &mut codes)
            } else {
                quantize::quantize_fp8(&self.numbers[group * LONG_GROUP_LEN..][..LONG_GROUP_LEN], &mut codes)
            };
            for (input, &code) in codes.iter().enumerate() {
                let word = word_at(input / 32, place, input % 8 / 2, input % 16 / 8);
                stage[word + input % 2 * 2 + 1 - input % 32 / 16] = code;
            }
            let (tile, place) = (place / TILE_FEATURES, place % TILE_FEATURES);
            let at = stage.len() - 128 * size_of::<f32>() + ((tile * 8 + place % 8) * 2 + place / 8) * size_of::<f32>();
            stage[at..at + 4].copy_from_slice(&scale.to_le_bytes());
        }
    }

    fn grouped_row(&mut self, grouping: Grouping, part: &HostTensor<'_>, row: &[u8], place: usize, target: &mut [u8]) {
        let keeps = grouping.keeps(part.format);
        if !keeps {
            self.read(part, row);
            self.numbers.resize(part.cols.next_multiple_of(grouping.group_len), 0.0);
        }
        let mut codes = [0; LONG_GROUP_LEN];
        let codes = &mut codes[..grouping.group_len];
        let groups_of_stage = self.form.stage_features / grouping.group_len;
        let steps_of_group = grouping.group_len / 32;
        for group in 0..part.cols.div_ceil(grouping.group_len) {
            let scale = if keeps {
                let codes: &mut [u8; 32] = (&mut *codes).try_into().expect("kept codes have groups of 32");
                quantize::requantize_block(grouping, part.format, row, group, codes)
            } else {
                quantize::quantize_weights(grouping, &self.numbers[group * grouping.group_len..][..codes.len()], codes)
            };
            let stage = &mut target[group / groups_of_stage * self.form.stage_bytes..][..self.form.stage_bytes];
            let group = group % groups_of_stage;
            for (index, codes) in codes.chunks_exact(32).enumerate() {
                pack_step(grouping.codes, group * steps_of_group + index, place, codes, stage);
            }
            let scales = self.form.stage_bytes - groups_of_stage * 256 * if grouping.has_min { 2 } else { 1 };
            let (tile, place) = (place / TILE_FEATURES, place % TILE_FEATURES);
            let at = scales + ((group * 8 + tile) * 8 + place % 8) * 4 + place / 8 * 2;
            stage[at..at + 2].copy_from_slice(&half::f16::from_f32(scale.scale).to_le_bytes());
            if grouping.has_min {
                let at = at + groups_of_stage * 256;
                stage[at..at + 2].copy_from_slice(&half::f16::from_f32(scale.min).to_le_bytes());
            }
        }
    }
}

/// Offset of the word for input features `first..` (of a tile's step of 16 inputs of bf16 or 32 of int8) of a feature.
fn word_at(step: usize, place: usize, word_of_half: usize, half: usize) -> usize {
    let (tile, place) = (place / TILE_FEATURES, place % TILE_FEATURES);
    let lane = place % 8 * 4 + word_of_half;
    ((step * 8 + tile) * 32 + lane) * 16 + half * 8 + place / 8 * 4
}

fn bf16_row(place: usize, bits: impl Iterator<Item = u16>, target: &mut [u8]) {
    for (input, bits) in bits.enumerate() {
        let at = word_at(input / 16, place, input % 8 / 2, input % 16 / 8) + input % 2 * 2;
        target[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    }
}

/// The codes of 32 input features, as whole numbers around zero where they have 8 bits.
fn pack_step(codes: Codes, step: usize, place: usize, values: &[u8], stage: &mut [u8]) {
    for (index, quad) in values.chunks_exact(4).enumerate() {
        let (word, half) = (index % 4, index / 4);
        if codes == Codes::Int8 {
            let at = word_at(step, place, word, half);
            for (target, code) in stage[at..at + 4].iter_mut().zip(quad) {
                *target = code.wrapping_sub(128);
            }
        } else {
            let at = word_at(step / 2, place, word, half);
            for (target, code) in stage[at..at + 4].iter_mut().zip(quad) {
                *target |= code << (step % 2 * 4);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_every_feature_once() {
        for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::int4()] {
            for layout in [WeightLayout::Stacked, WeightLayout::GateUp] {
                for out_features in [2, 16, 62, 64, 66, 128, 130, 258] {
                    let shape = WeightShape { out_features, in_features: 1, layout, format };
                    let form = Form::of(format);
                    let mut seen = vec![0; out_features];
                    for panel in 0..form.num_panels(&shape) {
                        let places = 0..form.panel_features;
                        for feature in places.filter_map(|place| form.feature(&shape, panel, place)) {
                            seen[feature] += 1;
                        }
                    }
                    assert!(seen.iter().all(|&seen| seen == 1), "{format:?} {layout:?} {out_features}: {seen:?}");
                }
            }
        }
    }

    #[test]
    fn words_of_a_step_lie_side_by_side() {
        let mut seen = vec![false; 2 * 4096];
        for step in 0..2 {
            for place in 0..128 {
                for (word, half) in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1)] {
                    let at = word_at(step, place, word, half);
                    assert!(seen[at..at + 4].iter_mut().all(|seen| !std::mem::replace(seen, true)));
                }
            }
        }
        assert!(seen.into_iter().all(|seen| seen));
    }
}
