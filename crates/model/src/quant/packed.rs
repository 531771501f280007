//! Numbers of four bits that files pack into words of 32: every order becomes row-major, two a byte, low half first.
//!
//! Owns the packings; knows no names.

use half::{bf16, f16};
use safetensors::Dtype;

/// Bits of a packed number in a word, by AWQ's order of the eight columns.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

fn word(bytes: &[u8], index: usize) -> u32 {
    bytes.as_chunks::<4>().0.get(index).map_or(0, |b| u32::from_le_bytes(*b))
}

/// Which of a word's eight numbers a column is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The first in the lowest bits.
    Plain,
    /// AWQ's.
    Awq,
}

impl Order {
    fn place(self, column: usize) -> usize {
        match self {
            Self::Plain => column,
            Self::Awq => AWQ_ORDER.iter().position(|c| *c == column).unwrap_or(column),
        }
    }
}

/// The number at (`row`, `column`) of a matrix whose columns are packed by eights: `[rows, columns / 8]` words.
pub(super) fn across(bytes: &[u8], columns: usize, order: Order, row: usize, column: usize) -> u8 {
    let w = word(bytes, row * (columns / 8) + column / 8);
    (w >> (4 * order.place(column % 8)) & 0xf) as u8
}

/// The number at (`row`, `column`) of a matrix whose rows are packed by eights: `[rows / 8, columns]` words.
pub(super) fn down(bytes: &[u8], columns: usize, row: usize, column: usize) -> u8 {
    let w = word(bytes, row / 8 * columns + column);
    (w >> (4 * (row % 8)) & 0xf) as u8
}

/// Packs `rows` rows of `columns` numbers, two a byte, low half first. `columns` is even.
pub(super) fn pack(rows: usize, columns: usize, number: impl Fn(usize, usize) -> u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows * columns / 2);
    for row in 0..rows {
        out.extend((0..columns / 2).map(|i| number(row, 2 * i) | number(row, 2 * i + 1) << 4));
    }
    out
}

/// Plain numbers as f32; none where the type is not one of plain floats.
pub(super) fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}

/// `[rows, columns]` to `[columns, rows]`.
pub(super) fn transpose<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns.max(1);
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}
