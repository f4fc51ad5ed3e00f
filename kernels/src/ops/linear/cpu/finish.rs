//! From sums to outputs: bias, residual, SwiGLU.

use std::ops::Range;

use super::weight::Segment;
use crate::cpu::Isa;
use crate::cpu::lanes::{LANES, Lanes, Vectorized, vectorize};
use crate::cpu::math;
use crate::cpu::thread_pool::SharedMut;
use crate::ops::linear::{Epilogue, WeightShape};

/// What to do with the finished sums of a panel.
pub(super) struct Finish<'a> {
    pub(super) shape: &'a WeightShape,
    pub(super) panel_width: usize,
    pub(super) isa: Isa,
    /// `[out_features]`
    pub(super) bias: Option<&'a [f32]>,
    pub(super) epilogue: Epilogue,
}

impl Finish<'_> {
    /// Writes the outputs of `panel` for `rows` from `sums`, `[rows][panel_width]`, times `sum_scale`.
    ///
    /// # Safety
    /// No other thread uses these columns of these rows of `out`.
    pub(super) unsafe fn run(
        &self,
        panel: usize,
        rows: Range<usize>,
        sum_scale: f32,
        sums: &[f32],
        out: &SharedMut<'_, f32>,
    ) {
        let segments = Segment::of_panel(self.shape, self.panel_width, panel);
        vectorize(self.isa, FinishTile { finish: self, segments, rows, sum_scale, sums, out });
    }
}

/// One call of [`Finish::run`]; its promise about `out` is the caller's.
struct FinishTile<'a> {
    finish: &'a Finish<'a>,
    segments: [Segment; 2],
    rows: Range<usize>,
    sum_scale: f32,
    sums: &'a [f32],
    out: &'a SharedMut<'a, f32>,
}

impl Vectorized for FinishTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Finish { shape, panel_width, bias, epilogue, .. } = *self.finish;
        let out_cols = shape.out_cols(epilogue);
        for (row, sums) in self.rows.zip(self.sums.chunks_exact(panel_width)) {
            if epilogue == Epilogue::SwiGlu {
                let [gate, up] = self.segments;
                let start = row * out_cols + gate.feature;
                // SAFETY: the caller of `Finish::run` has these columns of this row to itself.
                let out = unsafe { self.out.slice_mut(start..start + gate.len) };
                for (i, out) in out.chunks_mut(LANES).enumerate() {
                    let gate = biased(simd, sums, self.sum_scale, bias, gate, i * LANES);
                    let up = biased(simd, sums, self.sum_scale, bias, up, i * LANES);
                    let exp = math::exp(simd, simd.sub(simd.splat(0.0), gate));
                    let silu = simd.div(gate, simd.add(simd.splat(1.0), exp));
                    simd.store_slice(out, simd.mul(silu, up));
                }
                continue;
            }
            for segment in self.segments {
                let start = row * out_cols + segment.feature;
                // SAFETY: as above.
                let out = unsafe { self.out.slice_mut(start..start + segment.len) };
                for (i, out) in out.chunks_mut(LANES).enumerate() {
                    let mut y = biased(simd, sums, self.sum_scale, bias, segment, i * LANES);
                    if epilogue == Epilogue::Add {
                        y = simd.add(simd.load_slice(out, 0.0), y);
                    }
                    simd.store_slice(out, y);
                }
            }
        }
    }
}

/// The sums of a segment from its number `first` on, scaled, bias added.
#[inline(always)]
fn biased<S: Lanes>(
    simd: S,
    sums: &[f32],
    sum_scale: f32,
    bias: Option<&[f32]>,
    segment: Segment,
    first: usize,
) -> S::F {
    let y = simd.load_slice(&sums[segment.lane + first..segment.lane + segment.len], 0.0);
    let y = simd.mul(y, simd.splat(sum_scale));
    match bias {
        Some(bias) => simd.add(y, simd.load_slice(&bias[segment.feature + first..segment.feature + segment.len], 0.0)),
        None => y,
    }
}
