//! How many bytes numbers take: the sizes of the storages that files use.
//!
//! Owns block sizes and checked shape arithmetic; never converts a value.

use crate::backend::Storage;

impl Storage {
    /// Elements of one block; 1 where elements stand alone.
    #[must_use]
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4M3 => 1,
            Self::F4E2M1 | Self::U4 => 2,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 | Self::F4E2M1 | Self::U4 => 1,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Whether elements are plain floating-point numbers.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Whether elements mean something only with [`Scales`](crate::backend::Scales) beside them.
    #[must_use]
    pub const fn is_scaled(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F4E2M1 | Self::U4)
    }

    /// Bytes of a row of `elements`; `None` where it does not consist of whole blocks, or overflows.
    #[must_use]
    pub const fn row_bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor whose last dimension is blocked; `None` as in [`Storage::row_bytes`], or for a scalar.
    #[must_use]
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (row, rows) = shape.split_last()?;
        rows.iter().try_fold(self.row_bytes(*row)?, |bytes, &d| bytes.checked_mul(d))
    }

    /// Name as users write and read it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::F8E4M3 => "f8_e4m3",
            Self::F4E2M1 => "f4_e2m1",
            Self::U4 => "u4",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_formats() {
        assert_eq!(Storage::Bf16.tensor_bytes(&[3, 5]), Some(30));
        assert_eq!(Storage::Q4K.tensor_bytes(&[2, 512]), Some(2 * 2 * 144));
        assert_eq!(Storage::Q8_0.tensor_bytes(&[2, 33]), None, "not whole blocks");
        assert_eq!(Storage::F32.tensor_bytes(&[]), None, "a scalar has no row");
        assert_eq!(Storage::F32.tensor_bytes(&[usize::MAX, 2]), None, "overflow");
        assert!(Storage::F16.is_float() && !Storage::Q6K.is_float() && !Storage::F8E4M3.is_float());
        assert_eq!(Storage::U4.tensor_bytes(&[3, 8]), Some(12));
        assert_eq!(Storage::F4E2M1.tensor_bytes(&[3, 7]), None, "half a byte");
    }
}
