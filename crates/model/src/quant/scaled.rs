//! Numbers of few bits and the scales beside them: what they mean, and how rows of them are picked.
//!
//! Owns the values of the formats. e4m3 and e2m1 are those of the OCP formats (OFP8 1.0, MX 1.0).

use std::borrow::Cow;

use crate::backend::{HostTensor, ScaleValues, Scales, Storage};

/// Value of an e4m3 byte: 4 bits of exponent with bias 7, no infinities, NaN where all bits but the sign are set.
#[must_use]
pub fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    sign * match (exponent, byte & 7) {
        (0xf, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// Largest number of [`e4m3`].
pub const E4M3_MAX: f32 = 448.0;

/// The code of the number of [`e4m3`] that is nearest, the even one of two; beyond the largest, that.
#[must_use]
pub fn to_e4m3(value: f32) -> u8 {
    let magnitude = value.abs();
    let sign = u8::from(value.is_sign_negative()) << 7;
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    // Numbers rise with their codes.
    let (mut low, mut high) = (0u8, 0x7e);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if e4m3(middle) <= magnitude { low = middle } else { high = middle }
    }
    let (below, above) = (magnitude - e4m3(low), e4m3(high) - magnitude);
    let up = below > above || (below == above && high.is_multiple_of(2));
    sign | if up { high } else { low }
}

/// Values of the 16 numbers of e2m1.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Value of a scale of 8 bits of exponent.
#[must_use]
pub fn e8m0(byte: u8) -> f32 {
    match byte {
        255 => f32::NAN,
        // Below the smallest normal number: one bit of the mantissa.
        0 => f32::from_bits(1 << 22),
        n => f32::from_bits(u32::from(n) << 23),
    }
}

impl ScaleValues<'_> {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::E8M0(bytes) => bytes.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them.
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(values) => values[index],
            Self::E8M0(bytes) => e8m0(bytes[index]),
        }
    }

    fn pick(&self, indices: impl Iterator<Item = usize>) -> ScaleValues<'static> {
        match self {
            Self::F32(values) => ScaleValues::F32(indices.map(|i| values[i]).collect()),
            Self::E8M0(bytes) => ScaleValues::E8M0(Cow::Owned(indices.map(|i| bytes[i]).collect())),
        }
    }
}

impl Scales<'_> {
    /// Scales of a row of `columns`.
    #[must_use]
    pub const fn per_row(&self, columns: usize) -> usize {
        columns.div_ceil(self.block.1)
    }

    /// Whether there are as many as a matrix of this shape needs.
    #[must_use]
    pub fn fit(&self, rows: usize, columns: usize) -> bool {
        let (down, across) = self.block;
        if down == 0 || across == 0 {
            return false;
        }
        let need = rows.div_ceil(down).checked_mul(self.per_row(columns));
        need == Some(self.values.len()) && self.zeros.as_ref().is_none_or(|z| Some(z.len()) == need)
    }

    /// Scales of the rows `picked`, in this order, of a matrix with `columns`. Blocks stay blocks where whole ones were
    /// picked; else every row gets its own scales.
    #[must_use]
    pub fn pick(&self, picked: &[usize], columns: usize) -> Scales<'static> {
        let (down, across) = self.block;
        let per_row = self.per_row(columns);
        let whole = picked.chunks(down).all(|run| {
            let first = run[0];
            first.is_multiple_of(down) && run.iter().zip(first..).all(|(row, expected)| *row == expected)
        });
        let step = if whole { down } else { 1 };
        let indices = || {
            let rows = picked.iter().step_by(step).map(|row| row / down);
            rows.flat_map(move |row| row * per_row..(row + 1) * per_row)
        };
        Scales {
            block: (step, across),
            values: self.values.pick(indices()),
            zeros: self.zeros.as_ref().map(|zeros| indices().map(|i| zeros[i]).collect()),
        }
    }
}

/// The values of a tensor with scales: `(number - zero) * scale`, in single precision.
///
/// # Errors
/// Bytes or scales do not fit the shape; the text says which.
pub fn to_f32(tensor: &HostTensor<'_>) -> Result<Vec<f32>, String> {
    let Some((&columns, outer)) = tensor.shape.split_last() else { return Err("a scalar".into()) };
    let rows = outer.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or("a shape that is too large")?;
    let Some(scales) = &tensor.scales else { return Err("there are no scales beside it".into()) };
    if tensor.storage.tensor_bytes(&tensor.shape) != Some(tensor.bytes.len()) {
        return Err(format!("{} bytes do not fit shape {:?}", tensor.bytes.len(), tensor.shape));
    }
    if !scales.fit(rows, columns) {
        let (n, block) = (scales.values.len(), scales.block);
        return Err(format!("{n} scales of blocks {block:?} do not fit shape {:?}", tensor.shape));
    }
    let bytes = &*tensor.bytes;
    let nibble = |i: usize| bytes[i / 2] >> (4 * (i % 2)) & 0xf;
    let number = |i: usize| match tensor.storage {
        Storage::F4E2M1 => E2M1[usize::from(nibble(i))],
        Storage::U4 => f32::from(nibble(i)),
        _ => e4m3(bytes[i]),
    };
    let per_row = scales.per_row(columns);
    let mut out = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for column in 0..columns {
            let at = row / scales.block.0 * per_row + column / scales.block.1;
            let zero = scales.zeros.as_ref().map_or(0.0, |z| f32::from(z[at]));
            out.push((number(row * columns + column) - zero) * scales.values.get(at));
        }
    }
    Ok(out)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn small_formats_have_the_values_of_their_standards() {
        assert_eq!((e4m3(0), e4m3(0x38), e4m3(0x7e), e4m3(0xfe)), (0.0, 1.0, 448.0, -448.0));
        assert_eq!((e4m3(1), e4m3(0x08)), (2f32.powi(-9), 2f32.powi(-6)));
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!((e8m0(127), e8m0(128), e8m0(0), e8m0(1)), (1.0, 2.0, 2f32.powi(-127), 2f32.powi(-126)));
        assert!(e8m0(255).is_nan());
        // All finite e4m3 values are distinct but for the two zeros, and rise with the byte.
        let positive: Vec<f32> = (0..0x7f).map(e4m3).collect();
        assert!(positive.windows(2).all(|w| w[0] < w[1]));
    }

    #[test]
    fn numbers_become_the_nearest_code() {
        for code in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!(to_e4m3(e4m3(code)), code);
        }
        for code in 0..0x7e {
            let (a, b) = (e4m3(code), e4m3(code + 1));
            assert_eq!(to_e4m3(a.midpoint(b)) % 2, 0, "halves go to the even code");
            assert_eq!((to_e4m3(a + (b - a) * 0.49), to_e4m3(a + (b - a) * 0.51)), (code, code + 1));
        }
        assert_eq!((to_e4m3(1e9), to_e4m3(-1e9), to_e4m3(f32::NAN) & 0x7f), (0x7e, 0xfe, 0x7f));
    }

    fn tensor(
        storage: Storage,
        shape: &[usize],
        bytes: Vec<u8>,
        scales: Scales<'static>,
    ) -> HostTensor<'static> {
        let bytes = Cow::Owned(bytes);
        HostTensor { name: "t".into(), shape: shape.to_vec(), storage, bytes, scales: Some(scales) }
    }

    #[test]
    fn blocks_are_multiplied_with_their_own_scale() {
        let values = ScaleValues::F32(vec![1.0, 10.0, 100.0, 1000.0]);
        let scales = Scales { block: (2, 3), values, zeros: None };
        // Three rows of four: blocks of (2, 3) leave rests on both sides.
        let one = tensor(Storage::F8E4M3, &[3, 4], vec![0x38; 12], scales.clone());
        let expected = [1.0, 1.0, 1.0, 10.0, 1.0, 1.0, 1.0, 10.0, 100.0, 100.0, 100.0, 1000.0];
        assert_eq!(to_f32(&one).unwrap(), expected);
        let mut wrong = one;
        wrong.shape = vec![5, 4];
        assert!(to_f32(&wrong).unwrap_err().contains("12 bytes"));
        wrong.bytes = Cow::Owned(vec![0; 20]);
        assert!(to_f32(&wrong).unwrap_err().contains("4 scales"));
        wrong.scales = None;
        assert!(to_f32(&wrong).unwrap_err().contains("no scales"));
    }

    #[test]
    fn halves_of_bytes_low_first() {
        let scales =
            Scales { block: (1, 2), values: ScaleValues::F32(vec![0.5, 2.0]), zeros: Some(vec![8, 1]) };
        let t = tensor(Storage::U4, &[1, 4], vec![0xf0, 0x21], scales);
        assert_eq!(to_f32(&t).unwrap(), [-4.0, 3.5, 0.0, 2.0]);
        let values = ScaleValues::E8M0(Cow::Owned(vec![128]));
        let t =
            tensor(Storage::F4E2M1, &[1, 4], vec![0x71, 0x9f], Scales { block: (1, 4), values, zeros: None });
        assert_eq!(to_f32(&t).unwrap(), [1.0, 12.0, -12.0, -1.0]);
    }

    #[test]
    fn picked_rows_keep_their_scales() {
        let values = ScaleValues::F32((0..6).map(|i| i as f32).collect());
        let scales = Scales { block: (2, 4), values, zeros: Some(vec![0, 1, 2, 3, 4, 5]) };
        // 6 rows of 8: three blocks down, two across.
        let whole = scales.pick(&[4, 5, 0, 1], 8);
        assert_eq!((whole.block, &whole.values), ((2, 4), &ScaleValues::F32(vec![4.0, 5.0, 0.0, 1.0])));
        let odd = scales.pick(&[1, 2, 5], 8);
        assert_eq!(odd.block, (1, 4));
        assert_eq!(odd.values, ScaleValues::F32(vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        assert_eq!(odd.zeros.as_deref(), Some(&[0, 1, 2, 3, 4, 5][..]));
        assert!(odd.fit(3, 8) && !odd.fit(4, 8));
    }
}
