//! Conversions of weights at load: to another float type, or to GGUF blocks.
//!
//! Owns the rule of which tensors are converted to what. Block formats are those of GGUF: `q8_0` is made here
//! (round half away from zero, scale = largest magnitude / 127), K-quants by candle.
//!
//! The rule of quantization at load: linear layers and the head become blocks; norms, biases, and an embedding
//! table that is not also the head keep their storage. A row that is not whole super-blocks of 256 falls from
//! `q4_k` to `q8_0`; a row that is not whole blocks of 32 keeps its storage. The head is `q8_0` either way: it
//! decides every token, and its error is the only one that nothing after it can average out. For the same reason it
//! keeps its storage where linear weights become 8-bit floats, which have a scale for each row.

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use crate::backend::{HostTensor, ScaleValues, Scales, Storage};
use crate::error::{ModelError, Result};
use crate::quant::scaled;
use crate::weights::TensorId;

/// What linear weights become at load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// Blocks of 32, 8 bits: 8.5 bits a weight.
    Q8_0,
    /// Super-blocks of 256, 4 bits: 4.5 bits a weight.
    Q4K,
    /// 8-bit floats (e4m3) with a scale for each row; for devices that multiply them.
    F8E4M3,
}

/// Conversions that the options ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    /// Float type of every float tensor; as stored if none. Blocks are left alone.
    pub dtype: Option<Storage>,
    /// Blocks for linear weights.
    pub quantization: Option<Quantization>,
}

impl Conversion {
    /// Converts one tensor. `is_head` is true of the weight that makes the logits.
    ///
    /// # Errors
    /// A storage that cannot be converted.
    pub fn apply<'a>(&self, id: TensorId, is_head: bool, tensor: HostTensor<'a>) -> Result<HostTensor<'a>> {
        if !tensor.storage.is_float() {
            return Ok(tensor);
        }
        if let Some(quantization) = self.quantization
            && (id.is_linear() || is_head)
            && let Some(to) = blocks_for(quantization, is_head, &tensor.shape)
        {
            return if to == Storage::F8E4M3 { scaled_rows(&tensor) } else { quantize(&tensor, to) };
        }
        match self.dtype {
            Some(to) if to != tensor.storage => cast(&tensor, to),
            _ => Ok(tensor),
        }
    }
}

fn blocks_for(quantization: Quantization, is_head: bool, shape: &[usize]) -> Option<Storage> {
    let row = *shape.last()?;
    if quantization == Quantization::F8E4M3 {
        return (!is_head && shape.len() == 2).then_some(Storage::F8E4M3);
    }
    if quantization == Quantization::Q4K && !is_head && row.is_multiple_of(256) {
        return Some(Storage::Q4K);
    }
    row.is_multiple_of(32).then_some(Storage::Q8_0)
}

/// The values of a tensor, as f32. Exact for every storage but the blocks, which are what they decode to.
///
/// # Errors
/// The bytes do not fit the shape.
pub fn to_f32(tensor: &HostTensor<'_>) -> Result<Vec<f32>> {
    let fail = |why: String| ModelError::Convert {
        tensor: tensor.name.clone(),
        from: tensor.storage,
        to: Storage::F32,
        why,
    };
    if tensor.storage.tensor_bytes(&tensor.shape) != Some(tensor.bytes.len()) {
        return Err(fail(format!("{} bytes do not fit shape {:?}", tensor.bytes.len(), tensor.shape)));
    }
    Ok(match tensor.storage {
        Storage::F32 => floats(&tensor.bytes, f32::from_le_bytes),
        Storage::F16 => floats(&tensor.bytes, |b| f16::from_le_bytes(b).to_f32()),
        Storage::Bf16 => floats(&tensor.bytes, |b| bf16::from_le_bytes(b).to_f32()),
        Storage::F8E4M3 | Storage::F4E2M1 | Storage::U4 => scaled::to_f32(tensor).map_err(fail)?,
        blocks => dequantize(tensor, ggml(blocks)).map_err(|e| fail(e.to_string()))?,
    })
}

fn floats<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|&b| f(b)).collect()
}

fn dequantize(tensor: &HostTensor<'_>, dtype: GgmlDType) -> candle_core::Result<Vec<f32>> {
    let storage = QStorage::from_data(Cow::Borrowed(&tensor.bytes), &Device::Cpu, dtype)?;
    QTensor::new(storage, tensor.shape.clone())?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
}

const fn ggml(storage: Storage) -> GgmlDType {
    match storage {
        // Storages with scales are widened before anything asks candle.
        Storage::F32 | Storage::F8E4M3 | Storage::F4E2M1 | Storage::U4 => GgmlDType::F32,
        Storage::F16 => GgmlDType::F16,
        Storage::Bf16 => GgmlDType::BF16,
        Storage::Q4_0 => GgmlDType::Q4_0,
        Storage::Q4_1 => GgmlDType::Q4_1,
        Storage::Q5_0 => GgmlDType::Q5_0,
        Storage::Q5_1 => GgmlDType::Q5_1,
        Storage::Q8_0 => GgmlDType::Q8_0,
        Storage::Q2K => GgmlDType::Q2K,
        Storage::Q3K => GgmlDType::Q3K,
        Storage::Q4K => GgmlDType::Q4K,
        Storage::Q5K => GgmlDType::Q5K,
        Storage::Q6K => GgmlDType::Q6K,
    }
}

/// Bytes of values in a float storage; rounds to nearest, ties to even.
#[must_use]
pub fn float_bytes(values: &[f32], to: Storage) -> Vec<u8> {
    match to {
        Storage::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Storage::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
    }
}

fn cast(tensor: &HostTensor<'_>, to: Storage) -> Result<HostTensor<'static>> {
    if !to.is_float() {
        return Err(ModelError::Convert {
            tensor: tensor.name.clone(),
            from: tensor.storage,
            to,
            why: "the data type of a model is f32, f16 or bf16".into(),
        });
    }
    let bytes = Cow::Owned(float_bytes(&to_f32(tensor)?, to));
    Ok(HostTensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        storage: to,
        bytes,
        scales: None,
    })
}

fn quantize(tensor: &HostTensor<'_>, to: Storage) -> Result<HostTensor<'static>> {
    let values = to_f32(tensor)?;
    let row = tensor.shape.last().copied().unwrap_or_default();
    let bytes = in_parallel(&values, row, |rows| match to {
        Storage::Q8_0 => Ok(q8_0(rows)),
        _ => k_quant(rows, ggml(to)),
    });
    let bytes = bytes.map_err(|why| ModelError::Convert {
        tensor: tensor.name.clone(),
        from: tensor.storage,
        to,
        why,
    })?;
    Ok(HostTensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        storage: to,
        bytes: Cow::Owned(bytes),
        scales: None,
    })
}

/// A matrix in e4m3, each row divided by a scale that takes its largest magnitude to the largest number there is.
fn scaled_rows(tensor: &HostTensor<'_>) -> Result<HostTensor<'static>> {
    let values = to_f32(tensor)?;
    let row = tensor.shape.last().copied().unwrap_or_default().max(1);
    let scale = |row: &[f32]| {
        let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        if largest > 0.0 { largest / scaled::E4M3_MAX } else { 1.0 }
    };
    let codes = |rows: &[f32]| {
        let row_codes = |values: &[f32]| {
            let scale = scale(values);
            values.iter().map(|value| scaled::to_e4m3(value / scale)).collect::<Vec<_>>()
        };
        Ok(rows.chunks(row).flat_map(row_codes).collect())
    };
    let bytes = in_parallel(&values, row, codes).map_err(|why| ModelError::Convert {
        tensor: tensor.name.clone(),
        from: tensor.storage,
        to: Storage::F8E4M3,
        why,
    })?;
    let scales = ScaleValues::F32(values.chunks(row).map(scale).collect());
    Ok(HostTensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        storage: Storage::F8E4M3,
        bytes: Cow::Owned(bytes),
        scales: Some(Scales { block: (1, row), values: scales, zeros: None }),
    })
}

/// Applies `f` to runs of whole rows on all cores and joins what it gives, in order.
fn in_parallel(
    values: &[f32],
    row: usize,
    f: impl Fn(&[f32]) -> std::result::Result<Vec<u8>, String> + Sync,
) -> std::result::Result<Vec<u8>, String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let rows = values.len() / row.max(1);
    let run = rows.div_ceil(cores).max(1) * row.max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = values.chunks(run).map(|chunk| scope.spawn(|| f(chunk))).collect();
        let mut out = Vec::new();
        for worker in workers {
            out.extend(worker.join().map_err(|_| "the conversion panicked".to_owned())??);
        }
        Ok(out)
    })
}

/// GGUF's `q8_0`: blocks of 32, an f16 scale and 32 signed bytes.
#[must_use]
pub fn q8_0(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() / 32 * 34);
    for block in values.as_chunks::<32>().0 {
        let largest = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend_from_slice(&f16::from_f32(scale).to_le_bytes());
        out.extend(block.iter().map(|v| ((v * inverse).round() as i8).cast_unsigned()));
    }
    out
}

fn k_quant(values: &[f32], dtype: GgmlDType) -> std::result::Result<Vec<u8>, String> {
    let quantized = Tensor::from_slice(values, values.len(), &Device::Cpu)
        .and_then(|t| QTensor::quantize(&t, dtype))
        .and_then(|q| q.data().map(Cow::into_owned));
    quantized.map_err(|e| e.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::weights::Part;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    fn tensor(shape: &[usize], storage: Storage) -> HostTensor<'static> {
        let bytes = Cow::Owned(float_bytes(&wave(shape.iter().product()), storage));
        HostTensor { name: "t".into(), shape: shape.to_vec(), storage, bytes, scales: None }
    }

    const LINEAR: TensorId = TensorId::Layer(0, Part::Q);

    #[test]
    fn q8_0_is_candles_to_the_byte() {
        let values = wave(32 * 7);
        assert_eq!(q8_0(&values), k_quant(&values, GgmlDType::Q8_0).unwrap());
        assert_eq!(q8_0(&[0.0; 32]), [0; 34]);
    }

    #[test]
    fn quantized_values_stay_near() {
        let t = tensor(&[5, 512], Storage::F32);
        for (q, storage, bound) in
            [(Quantization::Q8_0, Storage::Q8_0, 0.005), (Quantization::Q4K, Storage::Q4K, 0.12)]
        {
            let c = Conversion { dtype: None, quantization: Some(q) };
            let out = c.apply(LINEAR, false, t.clone()).unwrap();
            assert_eq!(out.storage, storage);
            assert_eq!(out.storage.tensor_bytes(&out.shape), Some(out.bytes.len()));
            let worst = to_f32(&out)
                .unwrap()
                .iter()
                .zip(wave(5 * 512))
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst > 0.0 && worst < bound, "{q:?}: {worst}");
        }
    }

    #[test]
    fn the_rule_of_what_becomes_blocks() {
        let c = Conversion { dtype: None, quantization: Some(Quantization::Q4K) };
        let storage =
            |id, head, shape: &[usize]| c.apply(id, head, tensor(shape, Storage::Bf16)).unwrap().storage;
        assert_eq!(storage(LINEAR, false, &[2, 256]), Storage::Q4K);
        assert_eq!(storage(LINEAR, false, &[2, 288]), Storage::Q8_0, "not whole super-blocks");
        assert_eq!(storage(LINEAR, false, &[2, 40]), Storage::Bf16, "not whole blocks");
        assert_eq!(storage(TensorId::Embedding, false, &[2, 256]), Storage::Bf16);
        assert_eq!(storage(TensorId::Embedding, true, &[2, 256]), Storage::Q8_0, "tied");
        assert_eq!(storage(TensorId::Layer(0, Part::AttentionNorm), false, &[256]), Storage::Bf16);
    }

    #[test]
    fn rows_of_8_bit_floats_have_scales_of_their_own() {
        let mut t = tensor(&[5, 48], Storage::F32);
        t.bytes.to_mut()[..48 * 4].fill(0);
        let c = Conversion { dtype: None, quantization: Some(Quantization::F8E4M3) };
        let out = c.apply(LINEAR, false, t.clone()).unwrap();
        assert_eq!((out.storage, out.bytes.len()), (Storage::F8E4M3, 240));
        assert_eq!(out.scales.as_ref().unwrap().values.len(), 5);
        for (got, want) in to_f32(&out).unwrap().iter().zip(to_f32(&t).unwrap()) {
            // Three bits behind the first, and the step of numbers near 0.
            assert!((got - want).abs() <= want.abs() / 16.0 + 1e-5, "{got}, {want}");
        }
        let storage =
            |id, head, shape: &[usize]| c.apply(id, head, tensor(shape, Storage::Bf16)).unwrap().storage;
        assert_eq!(storage(TensorId::Head, true, &[2, 48]), Storage::Bf16);
        assert_eq!(storage(TensorId::Embedding, false, &[2, 48]), Storage::Bf16);
    }

    #[test]
    fn casts_between_floats_only() {
        let c = Conversion { dtype: Some(Storage::F32), quantization: None };
        let out = c.apply(LINEAR, false, tensor(&[3, 5], Storage::Bf16)).unwrap();
        assert_eq!((out.storage, out.bytes.len()), (Storage::F32, 60));
        let c = Conversion { dtype: Some(Storage::F16), quantization: None };
        assert_eq!(c.apply(LINEAR, false, out).unwrap().storage, Storage::F16);
        let c = Conversion { dtype: Some(Storage::Q8_0), quantization: None };
        assert!(c.apply(LINEAR, false, tensor(&[1, 32], Storage::F32)).is_err());
        let mut broken = tensor(&[3, 5], Storage::F32);
        broken.shape = vec![4, 5];
        assert!(to_f32(&broken).unwrap_err().to_string().contains("60 bytes do not fit"));
    }
}
