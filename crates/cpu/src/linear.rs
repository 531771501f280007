//! Weights of linear layers and embeddings, in the storage of their file.
//!
//! Owns the choice of a kernel for a storage: f32, f16, bf16, q8_0 and q4_k are packed for the kernels of
//! [`simd`](crate::simd); the other GGUF formats keep their blocks and are multiplied by candle, whose result for a
//! row depends on that row and the weight alone. Storages with scales beside them are widened to the narrowest float
//! that holds their values: e2m1 with powers of two to bf16, the others to f32. A weight may be stacked from tensors of
//! several storages.
//!
//! Candle computes on threads of its own: `CpuOptions::threads` does not bound them (its `RAYON_NUM_THREADS` does).

use std::borrow::Cow;

use candle_core::CpuStorage;
use candle_core::quantized::{GgmlDType, QuantizedType};
use half::{bf16, f16};
use mirai_model::backend::{BackendError, HostTensor, Result, ScaleValues, Storage};
use mirai_model::quant::scaled;

use crate::pool::Pool;
use crate::simd::{Isa, PackedMatrix, Scratch};

/// Rows of a weight that are of one storage.
pub(crate) enum Part {
    Packed(PackedMatrix),
    Blocks { data: Box<dyn QuantizedType>, rows: usize },
}

/// A weight `[out, in]`.
pub struct CpuLinear {
    parts: Vec<Part>,
    rows: usize,
    columns: usize,
}

impl std::fmt::Debug for CpuLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuLinear[{}, {}; {} parts]", self.rows, self.columns, self.parts.len())
    }
}

/// Buffers of products.
#[derive(Default)]
pub(crate) struct LinearScratch {
    pub(crate) packed: Scratch,
    /// Product of one part of a weight that has several.
    pub(crate) part: Vec<f32>,
    /// Rows gathered for a product that wants them back to back.
    pub(crate) rows: Vec<f32>,
}

impl Part {
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Packed(matrix) => matrix.n(),
            Self::Blocks { rows, .. } => *rows,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Packed(matrix) => matrix.bytes(),
            Self::Blocks { data, .. } => data.storage_size_in_bytes(),
        }
    }

    fn row(&self, index: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Self::Packed(matrix) => matrix.row(index, out),
            Self::Blocks { data, rows } => {
                let id =
                    u32::try_from(index).map_err(|_| device("embed", format!("row {index} of {rows}")))?;
                match data.embedding(&[id], *rows, out.len()) {
                    Ok(CpuStorage::F32(values)) => out.copy_from_slice(&values),
                    Ok(_) => {
                        return Err(device("embed", "dequantised to something other than f32".to_owned()));
                    }
                    Err(error) => return Err(device("embed", error.to_string())),
                }
            }
        }
        Ok(())
    }

    pub(crate) fn matmul(
        &self,
        pool: &Pool,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        match self {
            Self::Packed(matrix) => {
                matrix.matmul(pool, x, m, out, scratch);
                Ok(())
            }
            Self::Blocks { data, rows } => data
                .matmul_t((m, x.len() / m, *rows), x, out)
                .map_err(|error| device("linear", error.to_string())),
        }
    }
}

impl CpuLinear {
    /// Packs tensors of equal width, stacked along the output dimension.
    pub(crate) fn load(parts: Vec<HostTensor<'_>>, isa: Isa) -> Result<Self> {
        let mut loaded = Self { parts: Vec::new(), rows: 0, columns: 0 };
        let mut group: Vec<HostTensor<'_>> = Vec::new();
        for tensor in parts {
            let columns = checked_width(&tensor)?;
            let tensor = widened(tensor)?;
            if loaded.columns != 0 && columns != loaded.columns {
                let why = format!("stacked with tensors of width {}", loaded.columns);
                return Err(unsupported(&tensor, why));
            }
            loaded.columns = columns;
            if group.first().is_some_and(|first| first.storage != tensor.storage) {
                loaded.push(std::mem::take(&mut group), isa)?;
            }
            group.push(tensor);
        }
        loaded.push(group, isa)?;
        if loaded.parts.is_empty() {
            return Err(device("load_linear", "a weight of no tensors".to_owned()));
        }
        Ok(loaded)
    }

    /// Packs tensors of one storage and width.
    fn push(&mut self, group: Vec<HostTensor<'_>>, isa: Isa) -> Result<()> {
        let rows = group.iter().map(|tensor| tensor.shape[0]).sum();
        let mut tensors = group.into_iter();
        let Some(mut tensor) = tensors.next() else { return Ok(()) };
        for next in tensors {
            tensor.bytes.to_mut().extend_from_slice(&next.bytes);
        }
        let part = pack(&tensor, rows, self.columns, isa)?;
        self.rows += rows;
        self.parts.push(part);
        Ok(())
    }

    /// What it is stacked from.
    pub(crate) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of memory taken.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Part::bytes).sum()
    }

    /// Writes one row, dequantised.
    pub(crate) fn row(&self, index: usize, out: &mut [f32]) -> Result<()> {
        let mut index = index;
        for part in &self.parts {
            if index < part.rows() {
                return part.row(index, out);
            }
            index -= part.rows();
        }
        Err(device("embed", format!("row {} beyond a weight of {} rows", index + self.rows, self.rows)))
    }

    /// `out[m, rows] = x[m, columns] w^T`. A row's result does not depend on `m`.
    pub(crate) fn matmul(
        &self,
        pool: &Pool,
        x: &[f32],
        m: usize,
        out: &mut [f32],
        scratch: &mut LinearScratch,
    ) -> Result<()> {
        if m == 0 {
            return Ok(());
        }
        if let [part] = self.parts.as_slice() {
            return part.matmul(pool, x, m, out, &mut scratch.packed);
        }
        let mut first = 0;
        for part in &self.parts {
            let rows = part.rows();
            if m == 1 {
                part.matmul(pool, x, m, &mut out[first..first + rows], &mut scratch.packed)?;
            } else {
                scratch.part.resize(scratch.part.len().max(m * rows), 0.0);
                let product = &mut scratch.part[..m * rows];
                part.matmul(pool, x, m, product, &mut scratch.packed)?;
                for (to, from) in out.chunks_exact_mut(self.rows).zip(product.chunks_exact(rows)) {
                    to[first..first + rows].copy_from_slice(from);
                }
            }
            first += rows;
        }
        Ok(())
    }
}

/// Converts a vector of parameters; only plain floating-point storages are vectors.
pub(crate) fn load_vector(parts: &[HostTensor<'_>]) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    for tensor in parts {
        checked_bytes(tensor)?;
        if !tensor.storage.is_float() {
            return Err(unsupported(tensor, "vectors are f32, f16 or bf16".to_owned()));
        }
        values.extend(floats(tensor.storage, &tensor.bytes));
    }
    Ok(values)
}

/// A tensor with scales as plain floats; any other as it is.
fn widened(tensor: HostTensor<'_>) -> Result<HostTensor<'_>> {
    if !matches!(tensor.storage, Storage::F8E4M3 | Storage::F4E2M1 | Storage::U4) {
        return Ok(tensor);
    }
    let values = scaled::to_f32(&tensor).map_err(|why| unsupported(&tensor, why))?;
    // Two bits of mantissa times a power of two.
    let powers = matches!(&tensor.scales, Some(scales) if matches!(scales.values, ScaleValues::E8M0(_)));
    let (storage, bytes) = if tensor.storage == Storage::F4E2M1 && powers {
        (Storage::Bf16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect())
    } else {
        (Storage::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    };
    Ok(HostTensor { name: tensor.name, shape: tensor.shape, storage, bytes: Cow::Owned(bytes), scales: None })
}

/// Little-endian numbers of a plain storage, widened.
fn floats(storage: Storage, bytes: &[u8]) -> Vec<f32> {
    match storage {
        Storage::F16 => words(bytes).map(|w| f16::from_bits(w).to_f32()).collect(),
        Storage::Bf16 => words(bytes).map(|w| bf16::from_bits(w).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u16> + '_ {
    bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b))
}

/// Makes the kernel form of a checked tensor with `rows` rows.
fn pack(tensor: &HostTensor<'_>, rows: usize, columns: usize, isa: Isa) -> Result<Part> {
    let bytes = &*tensor.bytes;
    let packed = match tensor.storage {
        Storage::F32 => PackedMatrix::from_f32(&floats(Storage::F32, bytes), rows, columns, isa),
        Storage::F16 => {
            let data: Vec<f16> = words(bytes).map(f16::from_bits).collect();
            PackedMatrix::from_f16(&data, rows, columns, isa)
        }
        Storage::Bf16 => {
            let data: Vec<bf16> = words(bytes).map(bf16::from_bits).collect();
            PackedMatrix::from_bf16(&data, rows, columns, isa)
        }
        Storage::Q8_0 => PackedMatrix::from_q8_0(bytes, rows, columns, isa),
        Storage::Q4K => PackedMatrix::from_q4_k(bytes, rows, columns, isa),
        Storage::Q4_0 => return Ok(blocks(GgmlDType::Q4_0, bytes, rows)),
        Storage::Q4_1 => return pairs_of_blocks(GgmlDType::Q4_1, bytes, rows, columns, isa),
        Storage::Q5_0 => return pairs_of_blocks(GgmlDType::Q5_0, bytes, rows, columns, isa),
        Storage::Q5_1 => return pairs_of_blocks(GgmlDType::Q5_1, bytes, rows, columns, isa),
        Storage::Q2K => return Ok(blocks(GgmlDType::Q2K, bytes, rows)),
        Storage::Q3K => return Ok(blocks(GgmlDType::Q3K, bytes, rows)),
        Storage::Q5K => return Ok(blocks(GgmlDType::Q5K, bytes, rows)),
        Storage::Q6K => return Ok(blocks(GgmlDType::Q6K, bytes, rows)),
        Storage::F8E4M3 | Storage::F4E2M1 | Storage::U4 => {
            return Err(unsupported(tensor, "was not widened".to_owned()));
        }
    };
    packed.map(Part::Packed).map_err(|error| unsupported(tensor, error.to_string()))
}

/// Formats that candle multiplies two blocks at a time: rows of an odd number of blocks are widened to f32.
fn pairs_of_blocks(dtype: GgmlDType, bytes: &[u8], rows: usize, columns: usize, isa: Isa) -> Result<Part> {
    let part = blocks(dtype, bytes, rows);
    if columns.is_multiple_of(2 * dtype.block_size()) {
        return Ok(part);
    }
    let mut wide = vec![0.0; rows * columns];
    for (index, row) in wide.chunks_exact_mut(columns).enumerate() {
        part.row(index, row)?;
    }
    let packed = PackedMatrix::from_f32(&wide, rows, columns, isa);
    packed.map(Part::Packed).map_err(|error| device("load_linear", error.to_string()))
}

/// Blocks as candle keeps them; it asks for even addresses.
fn blocks(dtype: GgmlDType, bytes: &[u8], rows: usize) -> Part {
    let data = if (bytes.as_ptr() as usize).is_multiple_of(2) {
        dtype.from_data(Cow::Borrowed(bytes))
    } else {
        let mut copy = vec![0; bytes.len() + 1];
        let start = copy.as_ptr() as usize % 2;
        copy[start..start + bytes.len()].copy_from_slice(bytes);
        dtype.from_data(Cow::Borrowed(&copy[start..start + bytes.len()]))
    };
    Part::Blocks { data, rows }
}

/// Width of a matrix whose bytes fit its shape.
fn checked_width(tensor: &HostTensor<'_>) -> Result<usize> {
    let &[rows, columns] = tensor.shape.as_slice() else {
        return Err(unsupported(tensor, "a weight has two dimensions".to_owned()));
    };
    if rows == 0 || columns == 0 {
        return Err(unsupported(tensor, "no elements".to_owned()));
    }
    checked_bytes(tensor)?;
    Ok(columns)
}

fn checked_bytes(tensor: &HostTensor<'_>) -> Result<()> {
    match tensor.storage.tensor_bytes(&tensor.shape) {
        Some(need) if need == tensor.bytes.len() => Ok(()),
        Some(need) => {
            Err(unsupported(tensor, format!("takes {need} bytes, {} are there", tensor.bytes.len())))
        }
        None => Err(unsupported(
            tensor,
            format!("the last dimension is no multiple of {}", tensor.storage.block_elements()),
        )),
    }
}

fn unsupported(tensor: &HostTensor<'_>, why: String) -> BackendError {
    BackendError::Unsupported {
        name: tensor.name.clone(),
        storage: tensor.storage,
        shape: tensor.shape.clone(),
        why,
    }
}

/// An operation that cannot be done.
pub(crate) fn device(operation: &'static str, message: String) -> BackendError {
    BackendError::Device { operation, message }
}
