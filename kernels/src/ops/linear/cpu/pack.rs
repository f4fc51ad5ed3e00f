//! From matrices as they lie in files to panels, at about the pace of memory.
//!
//! Sixteen features at a time are staged as rows of 32-bit words (a number, a pair of bf16, a quad of codes), quantized
//! on the way where the format asks for it, and turned: words of a step lie side by side in a panel.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::compact::{self, Beside, Window};
use super::tile::Kernel;
use super::weight::{CpuWeight, Segment, panels_bytes};
use super::{fp8, grouped};
use crate::cpu::lanes::{LANES, Lanes, Vectorized, bf16_bits, vectorize};
use crate::cpu::thread_pool::SharedMut;
use crate::cpu::{CpuBackend, Isa};
use crate::ops::linear::{WeightShape, quantize};
use crate::weight_format::{Codes, Grouping, LONG_GROUP_LEN};
use crate::{HostTensor, KernelError, TensorFormat, WeightFormat, WeightSource};

/// Input features staged at a time: a whole number of groups and, but for the longest, of a file's blocks.
const PACK_BLOCK: usize = 256;

/// Words of a staged row: numbers of f32 are the most.
const STAGE_WORDS: usize = PACK_BLOCK;

/// A row of the source; `None` is a lane that holds no feature.
type Row<'a> = Option<(&'a HostTensor<'a>, usize)>;

/// One of so many lanes of a panel has a say in its window of exponents.
const LANES_PER_SAMPLE: usize = 4;

/// See [`crate::Backend::pack_weight`]. Each thread fills, and so first touches, the panels that it will read. Nothing
/// but the packed matrix is allocated.
pub(crate) fn pack_weight(backend: &mut CpuBackend, source: &WeightSource<'_>) -> Result<CpuWeight, KernelError> {
    let shape = WeightShape::of(source)?;
    let isa = backend.isa;
    let kernel = Kernel::new(isa, shape.format);
    backend.linear_workspace.reserve(&kernel, shape.in_features)?;
    let is_compact = kernel.is_compact;
    match pack(backend, source, shape, kernel)? {
        Some(weight) => Ok(weight),
        // Numbers of many exponents.
        None => {
            debug_assert!(is_compact);
            let plain = pack(backend, source, shape, Kernel::plain(isa, shape.format))?;
            Ok(plain.expect("plain weights have no exceptions"))
        }
    }
}

/// Packs for `kernel`; `None` where that is compact and too many numbers would be exceptions.
fn pack(
    backend: &mut CpuBackend,
    source: &WeightSource<'_>,
    shape: WeightShape,
    kernel: Kernel,
) -> Result<Option<CpuWeight>, KernelError> {
    let isa = backend.isa;
    let panels = backend.weights.zeroed("weight", panels_bytes(&kernel, &shape))?;
    let mut weight = CpuWeight { shape, isa, kernel, panels, beside: Vec::new() };
    let num_panels = weight.num_panels();
    if weight.kernel.is_compact {
        weight.beside = (0..num_panels).map(|_| Beside::new(Window::default())).collect();
    }

    let panel_bytes = weight.panel_bytes();
    let max_exceptions = shape.out_features.saturating_mul(shape.in_features) / compact::NUMBERS_PER_EXCEPTION;
    let num_exceptions = AtomicUsize::new(0);
    let target = SharedMut::new(weight.panels.view_mut::<u8>());
    let beside = SharedMut::new(&mut weight.beside);
    backend.pool.run_ranges(num_panels, 1, &|_, panels| {
        for panel in panels {
            if num_exceptions.load(Ordering::Relaxed) > max_exceptions {
                return;
            }
            // SAFETY: each panel belongs to one range.
            let target = unsafe { target.slice_mut(panel * panel_bytes..(panel + 1) * panel_bytes) };
            // SAFETY: as above.
            let beside = unsafe { beside.slice_mut(if beside.is_empty() { 0..0 } else { panel..panel + 1 }) };
            let beside = beside.first_mut();
            let found =
                vectorize(isa, PackPanel { isa, source, shape: &shape, kernel: &kernel, panel, target, beside });
            let _ = num_exceptions
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |sum| Some(sum.saturating_add(found)));
        }
    });
    Ok((num_exceptions.into_inner() <= max_exceptions).then_some(weight))
}

/// Fills one panel, which is zero so far. Returns how many of its numbers are exceptions.
struct PackPanel<'a> {
    isa: Isa,
    source: &'a WeightSource<'a>,
    shape: &'a WeightShape,
    kernel: &'a Kernel,
    panel: usize,
    target: &'a mut [u8],
    /// Where the kernel is compact.
    beside: Option<&'a mut Beside>,
}

impl Vectorized for PackPanel<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Lanes>(self, _: S) -> usize {
        let Self { isa, source, shape, kernel, panel, target, mut beside } = self;
        let width = kernel.panel_width;
        let segments = Segment::of_panel(shape, width, panel);
        let code_bytes = match shape.format {
            WeightFormat::Fp8 => fp8::code_bytes(isa),
            WeightFormat::Grouped(grouping) => grouped::code_bytes(isa, grouping),
            _ => kernel.step_bytes,
        };
        #[cfg(target_arch = "x86_64")]
        let for_tiles = kernel.tiled.is_some();
        #[cfg(not(target_arch = "x86_64"))]
        let for_tiles = false;
        // Words of a lane in a step, and of a block.
        let step_words = if kernel.is_compact { kernel.features_per_step / 2 } else { code_bytes / (width * 4) };
        let block_words = PACK_BLOCK / kernel.features_per_step * step_words;
        let mut stage = Stage { words: [[0; STAGE_WORDS]; LANES], numbers: [0.0; PACK_BLOCK] };
        let window = beside.as_deref_mut().map(|beside| {
            let window = stage.window(source, shape, segments, width);
            *beside = Beside::new(window);
            window
        });
        for first_lane in (0..width).step_by(LANES) {
            let rows = rows_of_lanes(source, segments, first_lane);
            for first in (0..shape.in_features).step_by(PACK_BLOCK) {
                let len = PACK_BLOCK.min(shape.in_features - first);
                let first_word = first / PACK_BLOCK * block_words;
                for (lane, row) in rows.into_iter().enumerate() {
                    let Some((part, row)) = row else {
                        stage.words[lane].fill(0);
                        continue;
                    };
                    let row_bytes = part.bytes.len() / part.rows;
                    let row = &part.bytes[row * row_bytes..][..row_bytes];
                    match shape.format {
                        WeightFormat::F32 => stage.f32(part.format, row, first, len, lane),
                        WeightFormat::Bf16 => stage.bf16(part.format, row, first, len, lane),
                        WeightFormat::Fp8 | WeightFormat::Grouped(_) => {
                            let step = first / kernel.features_per_step;
                            let mut place = ScalePlace {
                                target: &mut target[step * kernel.step_bytes..],
                                step_bytes: kernel.step_bytes,
                                first: code_bytes,
                                width,
                                size: size_of::<f32>(),
                                lane: first_lane + lane,
                            };
                            if let WeightFormat::Grouped(grouping) = shape.format {
                                place.size = grouped::scale_size(isa);
                                stage.codes(grouping, part.format, row, first, len, lane, place);
                            } else {
                                stage.fp8(part.format, row, first, len, lane, place);
                            }
                        }
                    }
                }
                let num_words = (len.div_ceil(kernel.features_per_step) * step_words).min(block_words);
                for word in 0..num_words.div_ceil(LANES) {
                    let mut turned = [[0_u32; LANES]; LANES];
                    turn(&stage.words, word * LANES, &mut turned);
                    let rest = num_words - word * LANES;
                    for (word, turned) in (first_word + word * LANES..).zip(turned.iter().take(rest)) {
                        let (step, word) = (word / step_words, word % step_words);
                        if let (Some(window), Some(beside)) = (window, beside.as_deref_mut()) {
                            let target = &mut target[step * kernel.step_bytes..][..kernel.step_bytes];
                            let features = (kernel.features_per_step, 2 * (step * step_words + word));
                            let exceptions = &mut beside.exceptions;
                            window.put(turned, target, (width, first_lane), features, for_tiles, exceptions);
                            continue;
                        }
                        let at = step * kernel.step_bytes + (word * width + first_lane) * 4;
                        for (target, word) in target[at..][..LANES * 4].as_chunks_mut::<4>().0.iter_mut().zip(turned) {
                            *target = word.to_ne_bytes();
                        }
                    }
                }
            }
        }
        beside.map_or(0, |beside| {
            #[cfg(target_arch = "x86_64")]
            if for_tiles {
                // Where tiles cannot take one, more than any matrix may have.
                return beside.settle(width * shape.in_features).unwrap_or(usize::MAX);
            }
            beside.exceptions.len()
        })
    }
}

/// Columns `first..first + 16` of the rows become rows. Written so that compilers make it shuffles.
#[inline(always)]
fn turn(words: &[[u32; STAGE_WORDS]; LANES], first: usize, turned: &mut [[u32; LANES]; LANES]) {
    for (lane, words) in words.iter().enumerate() {
        for (word, turned) in words[first..first + LANES].iter().zip(turned.iter_mut()) {
            turned[lane] = *word;
        }
    }
}

/// The rows behind 16 lanes of a panel.
fn rows_of_lanes<'a>(source: &'a WeightSource<'a>, segments: [Segment; 2], first_lane: usize) -> [Row<'a>; LANES] {
    std::array::from_fn(|lane| {
        let lane = first_lane + lane;
        let segment =
            segments.into_iter().find(|segment| (segment.lane..segment.lane + segment.len).contains(&lane))?;
        source.row(segment.feature + lane - segment.lane)
    })
}

/// Sixteen rows on their way into a panel.
struct Stage {
    words: [[u32; STAGE_WORDS]; LANES],
    numbers: [f32; PACK_BLOCK],
}

/// Where a lane's scales go.
struct ScalePlace<'a> {
    /// The panel from the block's first step on.
    target: &'a mut [u8],
    step_bytes: usize,
    /// Offset of the scales in a step.
    first: usize,
    width: usize,
    size: usize,
    lane: usize,
}

impl ScalePlace<'_> {
    /// A scale of the block's step `step`, or its minimum `at` numbers behind it.
    #[inline(always)]
    fn store(&mut self, step: usize, at: usize, number: f32) {
        let place = step * self.step_bytes + self.first + (at + self.lane) * self.size;
        let target = &mut self.target[place..][..self.size];
        match self.size {
            2 => target.copy_from_slice(&half::f16::from_f32(number).to_ne_bytes()),
            _ => target.copy_from_slice(&number.to_ne_bytes()),
        }
    }
}

impl Stage {
    /// Numbers `first..first + len` of a row, in `self.numbers`, zeros behind them.
    #[inline(always)]
    fn read(&mut self, format: TensorFormat, row: &[u8], first: usize, len: usize) {
        // Blocks are at most as long as `PACK_BLOCK`, which `first` is a multiple of.
        let (block_len, block_bytes) = (format.block_len(), format.block_bytes());
        let bytes = &row[first / block_len * block_bytes..(first + len) / block_len * block_bytes];
        let (numbers, padding) = self.numbers.split_at_mut(len);
        if format == TensorFormat::Bf16 {
            for (number, bytes) in numbers.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *number = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            }
        } else {
            format.decode(bytes, numbers);
        }
        padding.fill(0.0);
    }

    /// The window for the numbers of a panel: chosen by some lanes, each by another stretch of its features.
    #[inline(always)]
    fn window(
        &mut self,
        source: &WeightSource<'_>,
        shape: &WeightShape,
        segments: [Segment; 2],
        width: usize,
    ) -> Window {
        let num_blocks = shape.in_features.div_ceil(PACK_BLOCK);
        let mut counts = [0; 256];
        for first_lane in (0..width).step_by(LANES) {
            let rows = rows_of_lanes(source, segments, first_lane);
            for (lane, row) in rows.into_iter().enumerate().step_by(LANES_PER_SAMPLE) {
                let Some((part, row)) = row else { continue };
                let row_bytes = part.bytes.len() / part.rows;
                let first = (first_lane + lane) / LANES_PER_SAMPLE % num_blocks * PACK_BLOCK;
                let len = PACK_BLOCK.min(shape.in_features - first);
                self.bf16(part.format, &part.bytes[row * row_bytes..][..row_bytes], first, len, lane);
                compact::count_exponents(&self.words[lane][..len.div_ceil(2)], &mut counts);
            }
        }
        Window::of(&counts)
    }

    #[inline(always)]
    fn f32(&mut self, format: TensorFormat, row: &[u8], first: usize, len: usize, lane: usize) {
        self.read(format, row, first, len);
        for (word, number) in self.words[lane].iter_mut().zip(&self.numbers) {
            *word = number.to_bits();
        }
    }

    #[inline(always)]
    fn bf16(&mut self, format: TensorFormat, row: &[u8], first: usize, len: usize, lane: usize) {
        if format == TensorFormat::Bf16 {
            let (pairs, last) = row[first * 2..(first + len) * 2].as_chunks::<4>();
            for (word, pair) in self.words[lane].iter_mut().zip(pairs) {
                *word = u32::from_le_bytes(*pair);
            }
            if let [a, b] = *last {
                // An odd last feature has a zero for its neighbour.
                self.words[lane][len / 2] = u32::from(u16::from_le_bytes([a, b]));
            }
            return;
        }
        self.read(format, row, first, len);
        for (word, pair) in self.words[lane].iter_mut().zip(self.numbers.as_chunks::<2>().0) {
            *word = u32::from(bf16_bits(pair[0])) | u32::from(bf16_bits(pair[1])) << 16;
        }
    }

    /// Numbers of e4m3 to the row's words, scales to their place.
    #[inline(always)]
    fn fp8(
        &mut self,
        format: TensorFormat,
        row: &[u8],
        first: usize,
        len: usize,
        lane: usize,
        mut place: ScalePlace<'_>,
    ) {
        let kept = format == TensorFormat::F8E4M3;
        if !kept {
            self.read(format, row, first, len);
        }
        let mut codes = [0_u8; PACK_BLOCK];
        for (group, codes) in codes.chunks_exact_mut(LONG_GROUP_LEN).take(len.div_ceil(LONG_GROUP_LEN)).enumerate() {
            let scale = if kept {
                quantize::fp8_block(row, first / LONG_GROUP_LEN + group, codes)
            } else {
                quantize::quantize_fp8(&self.numbers[group * LONG_GROUP_LEN..][..LONG_GROUP_LEN], codes)
            };
            place.store(group, 0, scale);
        }
        for (word, quad) in self.words[lane].iter_mut().zip(codes.as_chunks::<4>().0) {
            *word = fp8::word(*quad);
        }
    }

    /// Codes of the row to its words, scales to their place.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn codes(
        &mut self,
        grouping: Grouping,
        format: TensorFormat,
        row: &[u8],
        first: usize,
        len: usize,
        lane: usize,
        mut place: ScalePlace<'_>,
    ) {
        let kept = grouping.keeps(format);
        if !kept {
            self.read(format, row, first, len);
        }
        let mut codes = [0_u8; PACK_BLOCK];
        let num_groups = len.div_ceil(grouping.group_len);
        for group in 0..num_groups {
            let start = group * grouping.group_len;
            let target = &mut codes[start..start + grouping.group_len];
            let scale = if kept {
                let target: &mut [u8; 32] = target.try_into().expect("kept codes have groups of 32");
                quantize::requantize_block(grouping, format, row, first / grouping.group_len + group, target)
            } else {
                quantize::quantize_weights(grouping, &self.numbers[start..start + grouping.group_len], target)
            };
            place.store(group, 0, scale.scale);
            if grouping.has_min {
                place.store(group, place.width, scale.min);
            }
        }
        let codes = &codes[..num_groups * grouping.group_len];
        if grouping.codes == Codes::Int8 {
            for (word, quad) in self.words[lane].iter_mut().zip(codes.as_chunks::<4>().0) {
                *word = u32::from_ne_bytes(*quad);
            }
        } else {
            for (word, [low, high]) in self.words[lane].iter_mut().zip(codes.as_chunks::<4>().0.as_chunks::<2>().0) {
                *word = u32::from_ne_bytes(*low) | u32::from_ne_bytes(*high) << 4;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WeightLayout;

    #[test]
    fn rows_go_through_parts_in_order() {
        let part = |rows| HostTensor { format: TensorFormat::F32, rows, cols: 1, bytes: &[] };
        let parts = vec![part(2), part(1), part(3)];
        let source = WeightSource { parts, layout: WeightLayout::Stacked, format: WeightFormat::F32 };
        let all = [(2, 0), (2, 1), (1, 0), (3, 0), (3, 1), (3, 2)];
        let rows: Vec<_> = (0..7).map_while(|row| source.row(row).map(|(part, row)| (part.rows, row))).collect();
        assert_eq!(rows, all);
    }
}
