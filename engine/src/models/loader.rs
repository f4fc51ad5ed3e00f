//! What all models load alike: tensors read, packed one weight at a time, and counted.

use quire_kernels::ops::linear::{Epilogue, Linear, WeightShape};
use quire_kernels::{Backend, DType, KernelError, WeightFormat, WeightLayout, WeightSource};

use crate::config::QuantizeChoice;
use crate::error::EngineError;
use crate::weights::{Tensor, Weights};

/// What a model takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModelSize {
    pub num_parameters: u64,
    pub weight_bytes: u64,
    /// What most of its parameters are stored as.
    pub format: &'static str,
}

/// What weights become when they are packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightChoice {
    /// Of dense weights that are not quantized.
    pub dtype: DType,
    pub quantize: QuantizeChoice,
}

impl WeightChoice {
    /// What weights become that are numbers in their files.
    pub(crate) const fn format_of_numbers(self, role: Role, in_features: usize) -> WeightFormat {
        match (self.quantize, role) {
            (QuantizeChoice::None, _) => WeightFormat::dense(self.dtype),
            (QuantizeChoice::Int4, Role::Projection) => WeightFormat::int4(),
            (QuantizeChoice::Fp8, Role::Projection) => WeightFormat::Fp8,
            (QuantizeChoice::Int4 | QuantizeChoice::Fp8, Role::Vocabulary) | (QuantizeChoice::Int8, _) => {
                WeightFormat::int8(in_features)
            }
        }
    }
}

/// Modules `(name, out_features)` that are fused to one weight.
pub(crate) struct Fused {
    pub modules: Vec<(String, usize)>,
    pub in_features: usize,
    pub layout: WeightLayout,
    pub has_bias: bool,
}

/// Bytes on the device of a weight of these tensors, `(name, rows)`, once it is packed as `choice` says.
pub(crate) fn expected_bytes<B: Backend>(
    backend: &B,
    weights: &Weights,
    choice: WeightChoice,
    role: Role,
    tensors: &[(String, usize)],
    (in_features, layout): (usize, WeightLayout),
) -> u64 {
    let formats: Option<Vec<_>> = tensors.iter().map(|(name, _)| weights.format_of(name, in_features)).collect();
    let format = formats
        .and_then(|formats| WeightFormat::of_formats(formats.into_iter()))
        .unwrap_or_else(|| choice.format_of_numbers(role, in_features));
    let out_features = tensors.iter().map(|(_, rows)| rows).sum();
    backend.weight_bytes(&WeightShape { out_features, in_features, layout, format }) as u64
}

/// What a weight is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Of a layer.
    Projection,
    /// Embedding or output layer, where rounding costs most.
    Vocabulary,
}

/// A product's weight, with its bias.
pub(crate) struct Projection<B: Backend> {
    pub weight: B::Weight,
    pub bias: Option<B::Buffer>,
}

impl<B: Backend> Projection<B> {
    pub(crate) fn apply(
        &self,
        backend: &mut B,
        x: &B::Buffer,
        num_rows: usize,
        epilogue: Epilogue,
        out: &mut B::Buffer,
    ) -> Result<(), KernelError> {
        backend.linear(Linear { x, num_rows, weight: &self.weight, bias: self.bias.as_ref(), epilogue, out })
    }
}

/// Reads tensors and packs them, one weight at a time.
pub(crate) struct Loader<'a, B: Backend> {
    pub backend: &'a mut B,
    pub weights: &'a Weights,
    choice: WeightChoice,
    size: ModelSize,
    /// Parameters of each format.
    formats: Vec<(&'static str, u64)>,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub(crate) fn new(backend: &'a mut B, weights: &'a Weights, choice: WeightChoice) -> Self {
        Self { backend, weights, choice, size: ModelSize::default(), formats: Vec::new() }
    }

    /// One weight of several modules, with their biases one after the other.
    pub(crate) fn fused(&mut self, fused: &Fused) -> Result<Projection<B>, EngineError> {
        self.projection(&fused.modules, fused.in_features, fused.layout, fused.has_bias)
    }

    /// Modules `(name, out_features)` fused to one weight, with their biases one after the other.
    pub(crate) fn projection(
        &mut self,
        modules: &[(String, usize)],
        in_features: usize,
        layout: WeightLayout,
        has_bias: bool,
    ) -> Result<Projection<B>, EngineError> {
        let named = |suffix: &str| -> Vec<(String, usize)> {
            modules.iter().map(|(name, len)| (format!("{name}.{suffix}"), *len)).collect()
        };
        let weight = self.weight(&named("weight"), in_features, layout, Role::Projection)?;
        let bias = if has_bias { Some(self.vectors(&named("bias"))?) } else { None };
        Ok(Projection { weight, bias })
    }

    pub(crate) fn vocabulary(
        &mut self,
        parts: &[(String, usize)],
        in_features: usize,
    ) -> Result<B::Weight, EngineError> {
        self.weight(parts, in_features, WeightLayout::Stacked, Role::Vocabulary)
    }

    fn weight(
        &mut self,
        parts: &[(String, usize)],
        in_features: usize,
        layout: WeightLayout,
        role: Role,
    ) -> Result<B::Weight, EngineError> {
        let tensors: Vec<Tensor<'_>> = parts
            .iter()
            .map(|(name, out_features)| self.weights.matrix(name, *out_features, in_features))
            .collect::<Result<_, _>>()?;
        let parts: Vec<_> = tensors.iter().map(Tensor::host).collect();
        let format =
            WeightFormat::of_blocks(&parts).unwrap_or_else(|| self.choice.format_of_numbers(role, in_features));
        let source = WeightSource { parts, layout, format };
        let shape = WeightShape::of(&source)?;
        let num_parameters = (shape.out_features * in_features) as u64;
        self.size.num_parameters += num_parameters;
        match self.formats.iter_mut().find(|(name, _)| *name == format.name()) {
            Some((_, num)) => *num += num_parameters,
            None => self.formats.push((format.name(), num_parameters)),
        }
        let weight = self.backend.pack_weight(&source)?;
        self.size.weight_bytes += self.backend.packed_bytes(&weight) as u64;
        Ok(weight)
    }

    pub(crate) fn finish(&self) -> ModelSize {
        let most = self.formats.iter().max_by_key(|(_, num_parameters)| *num_parameters);
        ModelSize { format: most.map_or("", |(name, _)| name), ..self.size }
    }

    /// Vectors one after the other in one buffer.
    pub(crate) fn vectors(&mut self, parts: &[(String, usize)]) -> Result<B::Buffer, EngineError> {
        let len: usize = parts.iter().map(|(_, len)| len).sum();
        let mut buffer = self.backend.alloc(DType::F32, len)?;
        let mut offset = 0;
        for (name, len) in parts {
            self.backend.write_f32(&mut buffer, offset, &self.weights.vector(name, *len)?.to_f32())?;
            offset += len;
        }
        self.size.num_parameters += len as u64;
        self.size.weight_bytes += (len * DType::F32.size()) as u64;
        Ok(buffer)
    }

    /// A matrix whose rows are read as they are, `[rows, cols]` in f32.
    pub(crate) fn table(&mut self, name: &str, rows: usize, cols: usize) -> Result<B::Buffer, EngineError> {
        let mut buffer = self.backend.alloc(DType::F32, rows * cols)?;
        self.backend.write_f32(&mut buffer, 0, &self.weights.matrix(name, rows, cols)?.to_f32())?;
        self.size.num_parameters += (rows * cols) as u64;
        self.size.weight_bytes += (rows * cols * DType::F32.size()) as u64;
        Ok(buffer)
    }
}
