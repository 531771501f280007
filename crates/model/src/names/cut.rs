//! What of a stored tensor is wanted: rows, or a turned part.
//!
//! Rows move whole, so that blocks of numbers stay intact; scales beside them move too.

use std::borrow::Cow;

use crate::backend::HostTensor;
use crate::error::{ModelError, Result};
use crate::quant::widen;

/// `times` runs of `len` rows, the first at `first`, each `stride` after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First row.
    pub first: usize,
    /// Rows of a run.
    pub len: usize,
    /// Rows from a run's first to the next one's.
    pub stride: usize,
    /// Runs.
    pub times: usize,
}

impl Run {
    /// Rows beside each other.
    #[must_use]
    pub const fn span(first: usize, len: usize) -> Self {
        Self { first, len, stride: len, times: 1 }
    }

    fn rows(self) -> impl Iterator<Item = usize> {
        (0..self.times).flat_map(move |i| {
            let first = self.first + i * self.stride;
            first..first + self.len
        })
    }
}

/// What is taken of a stored tensor, which counts as a matrix: the last dimension is a row (of one number, where a
/// vector is wanted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All, as it is.
    Whole,
    /// These rows.
    Rows(Vec<Run>),
    /// Some rows, of which some columns, turned: a column becomes a row. Only of plain numbers; others are widened.
    Turned {
        /// Rows.
        rows: Run,
        /// Columns.
        columns: Run,
    },
}

impl Cut {
    /// Takes the part out of the stored tensor; `shape` is that of the part. Rows move whole, so blocks stay intact.
    ///
    /// # Errors
    /// The cut does not lie in the tensor, or its rows cannot be told apart.
    pub fn apply<'a>(&self, tensor: HostTensor<'a>, shape: &[usize]) -> Result<HostTensor<'a>> {
        match self {
            Self::Whole => Ok(HostTensor { shape: shape.to_vec(), ..tensor }),
            Self::Rows(runs) => rows(&tensor, runs, shape),
            Self::Turned { rows: run, columns } if tensor.storage.is_float() => {
                turned(tensor, *run, *columns, shape)
            }
            Self::Turned { rows: run, columns } => {
                // Only what is wanted is widened: a stored tensor has the parts of many heads.
                let part = [run.len * run.times, tensor.shape.last().copied().unwrap_or(1)];
                let part = widen(rows(&tensor, &[*run], &part)?)?;
                turned(part, Run::span(0, run.len * run.times), *columns, shape)
            }
        }
    }
}

fn impossible(tensor: &HostTensor<'_>, shape: &[usize]) -> ModelError {
    let why = format!("a part of shape {shape:?} cannot be cut out of shape {:?}", tensor.shape);
    ModelError::Convert { tensor: tensor.name.clone(), from: tensor.storage, to: tensor.storage, why }
}

fn rows<'a>(tensor: &HostTensor<'_>, runs: &[Run], shape: &[usize]) -> Result<HostTensor<'a>> {
    let width = if shape.len() == 1 { 1 } else { shape.last().copied().unwrap_or(1) };
    let row = tensor.storage.row_bytes(width).ok_or_else(|| impossible(tensor, shape))?;
    let mut bytes = Vec::with_capacity(shape.iter().take(shape.len().max(2) - 1).product::<usize>() * row);
    for run in runs {
        for i in 0..run.times {
            let first = (run.first + i * run.stride) * row;
            let part = tensor.bytes.get(first..first + run.len * row);
            bytes.extend_from_slice(part.ok_or_else(|| impossible(tensor, shape))?);
        }
    }
    if tensor.storage.tensor_bytes(shape) != Some(bytes.len()) {
        return Err(impossible(tensor, shape));
    }
    let scales = tensor.scales.as_ref().map(|scales| {
        let picked: Vec<usize> = runs.iter().flat_map(|run| run.rows()).collect();
        scales.pick(&picked, width)
    });
    let (name, shape, storage) = (tensor.name.clone(), shape.to_vec(), tensor.storage);
    Ok(HostTensor { name, shape, storage, bytes: Cow::Owned(bytes), scales })
}

fn turned<'a>(tensor: HostTensor<'_>, rows: Run, columns: Run, shape: &[usize]) -> Result<HostTensor<'a>> {
    let width = tensor.shape.last().copied().unwrap_or(1);
    let element = tensor.storage.row_bytes(1).filter(|_| tensor.storage.is_float());
    let element = element.ok_or_else(|| impossible(&tensor, shape))?;
    let mut bytes = Vec::with_capacity(shape.iter().product::<usize>() * element);
    for column in columns.rows() {
        for row in rows.rows() {
            let at = (row * width + column) * element;
            let number = tensor.bytes.get(at..at + element).ok_or_else(|| impossible(&tensor, shape))?;
            bytes.extend_from_slice(number);
        }
    }
    if tensor.storage.tensor_bytes(shape) != Some(bytes.len()) {
        return Err(impossible(&tensor, shape));
    }
    let (name, shape, storage) = (tensor.name, shape.to_vec(), tensor.storage);
    Ok(HostTensor { name, shape, storage, bytes: Cow::Owned(bytes), scales: None })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::backend::{ScaleValues, Scales, Storage};

    fn matrix(shape: &[usize]) -> HostTensor<'static> {
        let n: usize = shape.iter().product();
        let bytes = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
        HostTensor {
            name: "t".into(),
            shape: shape.to_vec(),
            storage: Storage::F32,
            bytes: Cow::Owned(bytes),
            scales: None,
        }
    }

    fn cut(cut: &Cut, of: &[usize], shape: &[usize]) -> Vec<f32> {
        let part = cut.apply(matrix(of), shape).unwrap();
        assert_eq!(part.shape, shape);
        part.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    #[test]
    fn rows_alternate_lie_in_spans_and_stand_alone() {
        let span = Cut::Rows(vec![Run::span(1, 2)]);
        assert_eq!(cut(&span, &[4, 2], &[2, 2]), [2.0, 3.0, 4.0, 5.0]);
        let second = Cut::Rows(vec![Run { first: 1, len: 1, stride: 2, times: 2 }]);
        assert_eq!(cut(&second, &[4, 2], &[2, 2]), [2.0, 3.0, 6.0, 7.0]);
        assert_eq!(cut(&second, &[2, 2], &[2]), [1.0, 3.0], "a vector's rows are numbers");
        let grouped = Cut::Rows(vec![Run { first: 0, len: 2, stride: 3, times: 2 }, Run::span(2, 1)]);
        assert_eq!(cut(&grouped, &[6, 1], &[5, 1]), [0.0, 1.0, 3.0, 4.0, 2.0]);
    }

    #[test]
    fn turned_matrices_of_a_stack() {
        // Two matrices of 3 x 4; of the second, every other column.
        let turned =
            Cut::Turned { rows: Run::span(3, 3), columns: Run { first: 1, len: 1, stride: 2, times: 2 } };
        assert_eq!(cut(&turned, &[2, 3, 4], &[2, 3]), [13.0, 17.0, 21.0, 15.0, 19.0, 23.0]);
    }

    #[test]
    fn what_is_turned_of_scaled_numbers_is_widened() {
        let scales = Scales { block: (1, 2), values: ScaleValues::F32(vec![1.0, 2.0, 4.0]), zeros: None };
        let tensor = HostTensor {
            name: "t".into(),
            shape: vec![3, 2],
            storage: Storage::F8E4M3,
            bytes: Cow::Owned(vec![0x38; 6]),
            scales: Some(scales),
        };
        let part =
            Cut::Turned { rows: Run::span(1, 2), columns: Run::span(0, 2) }.apply(tensor, &[2, 2]).unwrap();
        let numbers: Vec<_> = part.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!((part.storage, numbers), (Storage::F32, vec![2.0, 4.0, 2.0, 4.0]));
    }

    #[test]
    fn cuts_beyond_the_tensor_are_errors() {
        let beyond = Cut::Rows(vec![Run::span(3, 2)]);
        let e = beyond.apply(matrix(&[4, 2]), &[2, 2]).unwrap_err();
        assert!(e.to_string().contains("[2, 2] cannot be cut out of shape [4, 2]"), "{e}");
        assert!(Cut::Rows(vec![Run::span(0, 1)]).apply(matrix(&[4, 2]), &[2, 2]).is_err(), "too few rows");
        let turned = Cut::Turned { rows: Run::span(4, 1), columns: Run::span(0, 2) };
        assert!(turned.apply(matrix(&[4, 2]), &[2, 1]).is_err());
        let mut blocks = matrix(&[4, 2]);
        blocks.storage = Storage::Q8_0;
        assert!(Cut::Rows(vec![Run::span(0, 1)]).apply(blocks, &[1, 2]).is_err(), "half a block");
    }
}
