//! Weights as the kernels take them: bf16, or e4m3 with scales, padded.
//!
//! Owns the choice of a storage, the padding, and the widening of every other storage to bf16. A matrix has its columns
//! padded with zeros to a multiple of 8, and zero rows behind its last to a multiple of 8. Parts stacked in one matrix are
//! not padded one by one. Never: device memory.

use std::borrow::Cow;

use half::bf16;
use mirai_model::backend::{BackendError, HostTensor, Result, Storage};
use mirai_model::convert::to_f32;

/// Columns that share a scale in block-scaled e4m3.
const SCALE_COLUMNS: usize = 128;
/// e4m3 without its sign: not a number.
const NAN_CODE: u8 = 0x7f;

/// Elements from a row to the next, of rows of `width`.
pub(crate) const fn padded(width: usize) -> usize {
    width.next_multiple_of(8)
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// bf16.
    Bf16,
    /// Codes with scales.
    E4m3 {
        /// Rows that share one.
        scale_rows: usize,
        /// Whether each 128 columns have their own.
        blocks: bool,
    },
}

/// Size of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Rows that mean something.
    pub(crate) rows: usize,
    /// Columns that mean something.
    pub(crate) columns: usize,
    /// How it is stored.
    pub(crate) kind: Kind,
}

impl Shape {
    /// Rows with padding.
    pub(crate) const fn out(&self) -> usize {
        padded(self.rows)
    }

    /// Columns with padding.
    pub(crate) const fn inner(&self) -> usize {
        match self.kind {
            Kind::Bf16 => padded(self.columns),
            Kind::E4m3 { .. } => self.columns.next_multiple_of(16),
        }
    }

    /// Bytes of all elements.
    pub(crate) const fn bytes(&self) -> usize {
        let element = match self.kind {
            Kind::Bf16 => 2,
            Kind::E4m3 { .. } => 1,
        };
        self.out() * self.inner() * element
    }

    /// Scales of all elements.
    pub(crate) const fn scales(&self) -> usize {
        match self.kind {
            Kind::Bf16 => 0,
            Kind::E4m3 { scale_rows, blocks } => {
                let across = if blocks { self.inner().div_ceil(SCALE_COLUMNS) } else { 1 };
                self.out().div_ceil(scale_rows) * across
            }
        }
    }
}

/// A matrix ready to be copied.
#[derive(Debug)]
pub(crate) struct Matrix<'a> {
    /// Its size.
    pub(crate) shape: Shape,
    /// Its bytes, back to back.
    pub(crate) chunks: Vec<Cow<'a, [u8]>>,
    /// Its scales.
    pub(crate) scales: Vec<f32>,
    /// Storages that were widened to bf16.
    pub(crate) widened: Vec<Storage>,
}

fn refuse(tensor: &HostTensor<'_>, why: impl Into<String>) -> BackendError {
    BackendError::Unsupported {
        name: tensor.name.clone(),
        storage: tensor.storage,
        shape: tensor.shape.clone(),
        why: why.into(),
    }
}

/// Rows and columns of a tensor that must be a matrix whose bytes fit.
fn size(tensor: &HostTensor<'_>) -> Result<(usize, usize)> {
    match tensor.shape[..] {
        [rows, columns] if tensor.storage.tensor_bytes(&tensor.shape) == Some(tensor.bytes.len()) => {
            Ok((rows, columns))
        }
        [_, _] => Err(refuse(tensor, format!("it has {} bytes", tensor.bytes.len()))),
        _ => Err(refuse(tensor, "a matrix is needed")),
    }
}

fn values(tensor: &HostTensor<'_>) -> Result<Vec<f32>> {
    to_f32(tensor).map_err(|e| refuse(tensor, e.to_string()))
}

/// Stacks tensors of equal width. As e4m3 where all are and `allow_e4m3`; else as bf16.
pub(crate) fn stack<'a>(parts: &'a [HostTensor<'_>], allow_e4m3: bool) -> Result<Matrix<'a>> {
    let Some(first) = parts.first() else {
        return Err(crate::error::device("load_linear", "a weight of no tensors"));
    };
    let sizes = parts.iter().map(size).collect::<Result<Vec<_>>>()?;
    let columns = sizes[0].1;
    if let Some(other) = sizes.iter().position(|size| size.1 != columns) {
        return Err(refuse(&parts[other], format!("it is stacked on `{}` of {columns} columns", first.name)));
    }
    let rows = sizes.iter().map(|size| size.0).sum();
    if allow_e4m3 && let Some(blocks) = common_blocks(parts, columns) {
        return e4m3(parts, rows, columns, blocks);
    }
    let shape = Shape { rows, columns, kind: Kind::Bf16 };
    let mut chunks = parts.iter().map(|part| bf16_rows(part, columns)).collect::<Result<Vec<_>>>()?;
    chunks.push(Cow::Owned(vec![0; (shape.out() - rows) * shape.inner() * 2]));
    let mut widened: Vec<Storage> =
        parts.iter().map(|part| part.storage).filter(|storage| *storage != Storage::Bf16).collect();
    widened.dedup();
    Ok(Matrix { shape, chunks, scales: Vec::new(), widened })
}

/// A tensor's rows as bf16, columns padded.
fn bf16_rows<'a>(part: &'a HostTensor<'_>, columns: usize) -> Result<Cow<'a, [u8]>> {
    let inner = padded(columns);
    if part.storage == Storage::Bf16 && inner == columns {
        return Ok(Cow::Borrowed(&part.bytes));
    }
    let mut out = vec![0; part.shape[0] * inner * 2];
    if part.storage == Storage::Bf16 {
        for (to, from) in out.chunks_exact_mut(inner * 2).zip(part.bytes.chunks_exact(columns * 2)) {
            to[..from.len()].copy_from_slice(from);
        }
    } else {
        let values = values(part)?;
        for (to, from) in out.chunks_exact_mut(inner * 2).zip(values.chunks_exact(columns)) {
            write_bf16(to, from);
        }
    }
    Ok(Cow::Owned(out))
}

fn write_bf16(out: &mut [u8], values: &[f32]) {
    for (to, &value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *to = bf16::from_f32(value).to_le_bytes();
    }
}

/// Whether each 128 columns have a scale, if all parts are e4m3 with scales that the kernels know.
fn common_blocks(parts: &[HostTensor<'_>], columns: usize) -> Option<bool> {
    let blocks = |part: &HostTensor<'_>| {
        let scales = part.scales.as_ref().filter(|scales| scales.zeros.is_none())?;
        let whole = scales.block.1 >= columns;
        let known = part.storage == Storage::F8E4M3
            && scales.block.0 > 0
            && (whole || scales.block.1 == SCALE_COLUMNS)
            && scales.fit(part.shape[0], columns)
            && !part.bytes.iter().any(|code| code & NAN_CODE == NAN_CODE);
        known.then_some(!whole)
    };
    let first = blocks(parts.first()?)?;
    parts.iter().all(|part| blocks(part) == Some(first)).then_some(first)
}

fn e4m3<'a>(parts: &'a [HostTensor<'_>], rows: usize, columns: usize, blocks: bool) -> Result<Matrix<'a>> {
    // Scales stay shared where every part begins with a new one.
    let down = parts.first().and_then(|p| p.scales.as_ref()).map_or(1, |s| s.block.0);
    let shared = parts.iter().rev().skip(1).all(|p| p.shape[0].is_multiple_of(down))
        && parts.iter().all(|p| p.scales.as_ref().is_some_and(|s| s.block.0 == down))
        && down > 1
        && (parts.len() == 1 || down <= rows);
    let scale_rows = if shared { down } else { 1 };
    let shape = Shape { rows, columns, kind: Kind::E4m3 { scale_rows, blocks } };
    let (inner, mut chunks, mut scales) = (shape.inner(), Vec::new(), Vec::new());
    for part in parts {
        let Some(of_part) = &part.scales else { return Err(refuse(part, "it has no scales")) };
        let across = of_part.per_row(columns);
        for row in (0..part.shape[0]).step_by(scale_rows) {
            let first = row / of_part.block.0 * across;
            scales.extend((first..first + across).map(|index| of_part.values.get(index)));
        }
        if inner == columns {
            chunks.push(Cow::Borrowed(&*part.bytes));
        } else {
            let mut codes = vec![0; part.shape[0] * inner];
            for (to, from) in codes.chunks_exact_mut(inner).zip(part.bytes.chunks_exact(columns)) {
                to[..columns].copy_from_slice(from);
            }
            chunks.push(Cow::Owned(codes));
        }
    }
    chunks.push(Cow::Owned(vec![0; (shape.out() - rows) * inner]));
    scales.resize(shape.scales(), 1.0);
    Ok(Matrix { shape, chunks, scales, widened: Vec::new() })
}

/// All values of some tensors, one behind the other.
pub(crate) fn vector(parts: &[HostTensor<'_>]) -> Result<Vec<f32>> {
    let parts = parts.iter().map(values).collect::<Result<Vec<_>>>()?;
    Ok(parts.concat())
}

/// Values as bf16, padded with zeros to a multiple of 8.
pub(crate) fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; padded(values.len()) * 2];
    write_bf16(&mut out, values);
    out
}

/// Values as singles.
pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mirai_model::backend::{ScaleValues, Scales};

    use super::*;

    fn tensor(storage: Storage, shape: [usize; 2], bytes: Vec<u8>) -> HostTensor<'static> {
        let bytes = Cow::Owned(bytes);
        HostTensor { name: "t".into(), shape: shape.to_vec(), storage, bytes, scales: None }
    }

    fn f32s(shape: [usize; 2]) -> HostTensor<'static> {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
        tensor(Storage::F32, shape, f32_bytes(&values))
    }

    fn codes(shape: [usize; 2], block: (usize, usize), first_scale: f32) -> HostTensor<'static> {
        let count = shape[0].div_ceil(block.0) * shape[1].div_ceil(block.1);
        let values = ScaleValues::F32((0..count).map(|i| first_scale + i as f32).collect());
        let scales = Some(Scales { block, values, zeros: None });
        HostTensor { scales, ..tensor(Storage::F8E4M3, shape, vec![0x38; shape[0] * shape[1]]) }
    }

    fn bytes(matrix: &Matrix<'_>) -> Vec<u8> {
        matrix.chunks.concat()
    }

    fn read_bf16(bytes: &[u8]) -> Vec<f32> {
        bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
    }

    #[test]
    fn rows_and_columns_are_padded_with_zeros() {
        let parts = [f32s([2, 3]), f32s([1, 3])];
        let matrix = stack(&parts, true).unwrap();
        assert_eq!(matrix.shape, Shape { rows: 3, columns: 3, kind: Kind::Bf16 });
        assert_eq!((matrix.shape.out(), matrix.shape.inner()), (8, 8));
        assert_eq!(matrix.widened, [Storage::F32]);
        let mut want = vec![0.0; 64];
        want[..3].copy_from_slice(&[0.0, 1.0, 2.0]);
        want[8..11].copy_from_slice(&[3.0, 4.0, 5.0]);
        want[16..19].copy_from_slice(&[0.0, 1.0, 2.0]);
        assert_eq!(read_bf16(&bytes(&matrix)), want);
        assert_eq!(bytes(&matrix).len(), matrix.shape.bytes());
    }

    #[test]
    fn bf16_is_taken_as_it_is() {
        let whole = tensor(Storage::Bf16, [8, 16], (0..256usize).map(|i| i as u8).collect());
        let parts = [whole.clone()];
        let matrix = stack(&parts, true).unwrap();
        assert!(matches!(matrix.chunks[0], Cow::Borrowed(_)));
        assert_eq!(bytes(&matrix), &*whole.bytes);
        assert_eq!(matrix.widened, []);
        let odd = [tensor(Storage::Bf16, [2, 3], (0..12).collect())];
        let bytes = bytes(&stack(&odd, true).unwrap());
        assert_eq!(
            (&bytes[..6], &bytes[6..16], &bytes[16..22]),
            (&[0, 1, 2, 3, 4, 5][..], &[0; 10][..], &[6, 7, 8, 9, 10, 11][..])
        );
    }

    #[test]
    fn e4m3_keeps_its_blocks_where_parts_begin_with_new_ones() {
        let parts = [codes([256, 256], (128, 128), 1.0), codes([8, 256], (128, 128), 10.0)];
        let matrix = stack(&parts, true).unwrap();
        assert_eq!(matrix.shape.kind, Kind::E4m3 { scale_rows: 128, blocks: true });
        assert_eq!(matrix.scales, [1.0, 2.0, 3.0, 4.0, 10.0, 11.0]);
        assert_eq!(bytes(&matrix).len(), 264 * 256);
        let uneven = [codes([100, 256], (128, 128), 1.0), codes([8, 256], (128, 128), 10.0)];
        let matrix = stack(&uneven, true).unwrap();
        assert_eq!(matrix.shape.kind, Kind::E4m3 { scale_rows: 1, blocks: true });
        assert_eq!(matrix.scales.len(), 2 * 112);
        assert_eq!((matrix.scales[199], matrix.scales[200], matrix.scales[216]), (2.0, 10.0, 1.0));
    }

    #[test]
    fn e4m3_with_a_scale_for_each_tensor_gets_one_for_each_row() {
        let parts = [codes([3, 24], (3, 24), 1.0), codes([2, 24], (2, 24), 10.0)];
        let matrix = stack(&parts, true).unwrap();
        assert_eq!(matrix.shape.kind, Kind::E4m3 { scale_rows: 1, blocks: false });
        assert_eq!(matrix.scales, [1.0, 1.0, 1.0, 10.0, 10.0, 1.0, 1.0, 1.0]);
        assert_eq!((matrix.shape.inner(), bytes(&matrix).len()), (32, 8 * 32));
        let one = [codes([8, 16], (8, 16), 5.0)];
        let matrix = stack(&one, true).unwrap();
        assert_eq!(
            (matrix.shape.kind, &matrix.scales[..]),
            (Kind::E4m3 { scale_rows: 8, blocks: false }, &[5.0][..])
        );
    }

    #[test]
    fn what_kernels_do_not_know_is_widened() {
        let mut nan = codes([8, 16], (8, 16), 1.0);
        nan.bytes.to_mut()[5] = 0xff;
        let odd_blocks = codes([8, 64], (8, 32), 1.0);
        for part in [nan, odd_blocks] {
            let parts = [part];
            let matrix = stack(&parts, true).unwrap();
            assert_eq!((matrix.shape.kind, &matrix.widened[..]), (Kind::Bf16, &[Storage::F8E4M3][..]));
        }
        let parts = [codes([8, 16], (8, 16), 2.0)];
        let widened = stack(&parts, false).unwrap();
        assert_eq!(read_bf16(&bytes(&widened)), [2.0; 128]);
        let mixed = [codes([8, 16], (8, 16), 2.0), f32s([1, 16])];
        assert_eq!(stack(&mixed, true).unwrap().shape.kind, Kind::Bf16);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_by_name() {
        let table = [
            (vec![f32s([2, 3]), f32s([2, 4])], "stacked on `t` of 3 columns"),
            (vec![tensor(Storage::F32, [2, 3], vec![0; 20])], "it has 20 bytes"),
            (vec![HostTensor { shape: vec![6], ..f32s([2, 3]) }], "a matrix is needed"),
            (vec![], "no tensors"),
        ];
        for (parts, words) in table {
            let error = stack(&parts, true).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn vectors_are_concatenated() {
        let mut one = f32s([1, 3]);
        one.shape = vec![3];
        let all = vector(&[one.clone(), one]).unwrap();
        assert_eq!(all, [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
        assert_eq!(read_bf16(&bf16_bytes(&all)), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    }
}
