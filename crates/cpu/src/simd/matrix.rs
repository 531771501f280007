//! [`PackedMatrix`]: a weight `[n, k]` in the layout that the kernels read, in the storage of the file.
//!
//! Owns: the packed layouts, conversion from files into them, and reading one row back.
//! Never: arithmetic over activations (that is `matmul`).
//!
//! Every layout is made of panels of 32 columns (32 rows of the weight). Inside a panel the weight runs along k, so
//! that a product walks memory once, in order, and every output owns one lane: its sum over k has one order, whatever
//! the number of rows. The layouts do not depend on the instruction set.

use super::Isa;
use super::lanes::LANES;
use super::quant::{Q4K_BLOCK, Q4K_BYTES, Q4k, Q8, Q8_BLOCK, Q8_BYTES, half_value};
use half::{bf16, f16};

/// Columns of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// Why a weight cannot be packed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The data do not fill the shape.
    #[error("a {storage:?} weight of {n} x {k} takes {expected} {unit}, the data have {found}")]
    Length {
        /// Storage asked for.
        storage: Storage,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// What the shape takes.
        expected: usize,
        /// What was given.
        found: usize,
        /// Elements or bytes.
        unit: &'static str,
    },
    /// Block formats take whole blocks along k.
    #[error("{storage:?} has blocks of {block} weights, and k = {k} is no multiple of it")]
    Blocks {
        /// Storage asked for.
        storage: Storage,
        /// Weights of a block.
        block: usize,
        /// Input features.
        k: usize,
    },
    /// No weight is empty.
    #[error("a weight of {n} x {k} has no elements")]
    Empty {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
    },
}

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Storage {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF Q8_0: 32 signed bytes and an f16 scale.
    Q8_0,
    /// GGUF Q4_K: 256 nibbles, 8 six-bit scales and minima, two f16.
    Q4K,
}

/// One k of a panel: 32 floats.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct F32Unit(pub(crate) [[f32; LANES]; 2]);
/// One k of a panel: 32 half floats (bits).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct F16Unit(pub(crate) [[u16; LANES]; 2]);
/// Two k of a panel: 32 pairs of bfloat16, the even k in the low half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Bf16Unit(pub(crate) [[u32; LANES]; 2]);
/// Thirty-two k of a panel. A word holds four k of a column, each plus 128.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q8Unit {
    /// f16 bits.
    pub(crate) scales: [[u16; LANES]; 2],
    pub(crate) quants: [[[u32; LANES]; 2]; 8],
}
/// 256 k of a panel. Of sub-block j, word line g holds k = 4g.. in the low nibbles and 16 + 4g.. in the high ones.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q4kUnit {
    /// f16 bits.
    pub(crate) d: [[u16; LANES]; 2],
    /// f16 bits.
    pub(crate) dmin: [[u16; LANES]; 2],
    pub(crate) scales: [[[u8; LANES]; 2]; 8],
    pub(crate) mins: [[[u8; LANES]; 2]; 8],
    pub(crate) quants: [[[[u32; LANES]; 2]; 4]; 8],
}

/// The panels, one after the other, each `units` long.
pub(crate) enum Panels {
    F32(Vec<F32Unit>),
    F16(Vec<F16Unit>),
    Bf16(Vec<Bf16Unit>),
    Q8_0(Vec<Q8Unit>),
    Q4K(Vec<Q4kUnit>),
}

/// A weight `[n, k]` (n outputs, k inputs) ready for [`PackedMatrix::matmul`].
pub struct PackedMatrix {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) isa: Isa,
    pub(crate) panels: Panels,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({} x {}, {:?}, {:?})", self.n, self.k, self.storage(), self.isa)
    }
}

/// Weight row and lane position of column `c` of panel `p`.
fn column(p: usize, c: usize) -> (usize, usize, usize) {
    (p * PANEL + c, c / LANES, c % LANES)
}

/// Fills all panels unit by unit: `fill(panel, unit index, unit)` over zeroed units.
fn pack<U: Copy>(n: usize, units: usize, zero: U, mut fill: impl FnMut(usize, usize, &mut U)) -> Vec<U> {
    let count = n.div_ceil(PANEL) * units;
    let mut panels = super::memory::large_vec(count);
    for p in 0..n.div_ceil(PANEL) {
        for u in 0..units {
            let mut unit = zero;
            fill(p, u, &mut unit);
            panels.push(unit);
        }
    }
    panels
}

impl PackedMatrix {
    fn new(n: usize, k: usize, isa: Isa, panels: Panels) -> Self {
        Self { n, k, isa: isa.available(), panels }
    }

    /// Packs f32 weights, row-major `[n, k]`; products are true f32.
    ///
    /// # Errors
    /// When `data` does not have `n * k` elements, or none.
    pub fn from_f32(data: &[f32], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        check(Storage::F32, n, k, 1, n * k, data.len(), "elements")?;
        let panels = pack(n, k, F32Unit([[0.0; LANES]; 2]), |p, u, unit| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let (row, h, l) = column(p, c);
                unit.0[h][l] = data[row * k + u];
            }
        });
        Ok(Self::new(n, k, isa, Panels::F32(panels)))
    }

    /// Packs half floats, row-major `[n, k]`; products are f32.
    ///
    /// # Errors
    /// When `data` does not have `n * k` elements, or none.
    pub fn from_f16(data: &[f16], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        check(Storage::F16, n, k, 1, n * k, data.len(), "elements")?;
        let panels = pack(n, k, F16Unit([[0; LANES]; 2]), |p, u, unit| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let (row, h, l) = column(p, c);
                unit.0[h][l] = data[row * k + u].to_bits();
            }
        });
        Ok(Self::new(n, k, isa, Panels::F16(panels)))
    }

    /// Packs bfloat16, row-major `[n, k]`; products are f32.
    ///
    /// # Errors
    /// When `data` does not have `n * k` elements, or none.
    pub fn from_bf16(data: &[bf16], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        check(Storage::Bf16, n, k, 1, n * k, data.len(), "elements")?;
        let panels = pack(n, k.div_ceil(2), Bf16Unit([[0; LANES]; 2]), |p, u, unit| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let (row, h, l) = column(p, c);
                let row = &data[row * k..(row + 1) * k];
                let high = row.get(2 * u + 1).map_or(0, |v| u32::from(v.to_bits()));
                unit.0[h][l] = u32::from(row[2 * u].to_bits()) | (high << 16);
            }
        });
        Ok(Self::new(n, k, isa, Panels::Bf16(panels)))
    }

    /// Packs GGUF Q8_0 blocks, row after row.
    ///
    /// # Errors
    /// When k is no multiple of 32 or `bytes` does not have 34 bytes a block.
    pub fn from_q8_0(bytes: &[u8], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        let expected = n * (k / Q8_BLOCK) * Q8_BYTES;
        check(Storage::Q8_0, n, k, Q8_BLOCK, expected, bytes.len(), "bytes")?;
        let (blocks, _) = bytes.as_chunks::<Q8_BYTES>();
        Ok(Self::pack_q8(n, k, isa, |row, b| Q8::read(&blocks[row * (k / Q8_BLOCK) + b])))
    }

    /// Quantizes f32 weights, row-major `[n, k]`, to Q8_0.
    ///
    /// # Errors
    /// When k is no multiple of 32 or `data` does not have `n * k` elements.
    pub fn quantize_q8_0(data: &[f32], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        check(Storage::Q8_0, n, k, Q8_BLOCK, n * k, data.len(), "elements")?;
        let (blocks, _) = data.as_chunks::<Q8_BLOCK>();
        Ok(Self::pack_q8(n, k, isa, |row, b| Q8::quantize(&blocks[row * (k / Q8_BLOCK) + b])))
    }

    /// Packs GGUF Q4_K super-blocks, row after row.
    ///
    /// # Errors
    /// When k is no multiple of 256 or `bytes` does not have 144 bytes a super-block.
    pub fn from_q4_k(bytes: &[u8], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        let expected = n * (k / Q4K_BLOCK) * Q4K_BYTES;
        check(Storage::Q4K, n, k, Q4K_BLOCK, expected, bytes.len(), "bytes")?;
        let (blocks, _) = bytes.as_chunks::<Q4K_BYTES>();
        Ok(Self::pack_q4k(n, k, isa, |row, b| Q4k::read(&blocks[row * (k / Q4K_BLOCK) + b])))
    }

    /// Quantizes f32 weights, row-major `[n, k]`, to Q4_K.
    ///
    /// # Errors
    /// When k is no multiple of 256 or `data` does not have `n * k` elements.
    pub fn quantize_q4_k(data: &[f32], n: usize, k: usize, isa: Isa) -> Result<Self, MatrixError> {
        check(Storage::Q4K, n, k, Q4K_BLOCK, n * k, data.len(), "elements")?;
        let (blocks, _) = data.as_chunks::<Q4K_BLOCK>();
        Ok(Self::pack_q4k(n, k, isa, |row, b| Q4k::quantize(&blocks[row * (k / Q4K_BLOCK) + b])))
    }

    fn pack_q8(n: usize, k: usize, isa: Isa, block: impl Fn(usize, usize) -> Q8) -> Self {
        let zero = Q8Unit { scales: [[0; LANES]; 2], quants: [[[0x8080_8080; LANES]; 2]; 8] };
        let panels = pack(n, k / Q8_BLOCK, zero, |p, u, unit| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let (row, h, l) = column(p, c);
                let source = block(row, u);
                unit.scales[h][l] = source.scale;
                for (line, four) in unit.quants.iter_mut().zip(source.quants.as_chunks::<4>().0) {
                    line[h][l] = u32::from_le_bytes(four.map(|q| q.cast_unsigned() ^ 0x80));
                }
            }
        });
        Self::new(n, k, isa, Panels::Q8_0(panels))
    }

    fn pack_q4k(n: usize, k: usize, isa: Isa, block: impl Fn(usize, usize) -> Q4k) -> Self {
        let zero = Q4kUnit {
            d: [[0; LANES]; 2],
            dmin: [[0; LANES]; 2],
            scales: [[[0; LANES]; 2]; 8],
            mins: [[[0; LANES]; 2]; 8],
            quants: [[[[0; LANES]; 2]; 4]; 8],
        };
        let panels = pack(n, k / Q4K_BLOCK, zero, |p, u, unit| {
            for c in 0..PANEL.min(n - p * PANEL) {
                let (row, h, l) = column(p, c);
                let source = block(row, u);
                unit.d[h][l] = source.d;
                unit.dmin[h][l] = source.dmin;
                for j in 0..8 {
                    unit.scales[j][h][l] = source.scales[j];
                    unit.mins[j][h][l] = source.mins[j];
                    for g in 0..4 {
                        let at = 32 * j + 4 * g;
                        let nibbles = |i: usize| source.quants[at + i] | (source.quants[at + 16 + i] << 4);
                        unit.quants[j][g][h][l] = u32::from_le_bytes(std::array::from_fn(nibbles));
                    }
                }
            }
        });
        Self::new(n, k, isa, Panels::Q4K(panels))
    }

    /// Output features (rows of the weight).
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features (columns of the weight).
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Instruction set that its products use.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Storage of the weights.
    #[must_use]
    pub fn storage(&self) -> Storage {
        match self.panels {
            Panels::F32(_) => Storage::F32,
            Panels::F16(_) => Storage::F16,
            Panels::Bf16(_) => Storage::Bf16,
            Panels::Q8_0(_) => Storage::Q8_0,
            Panels::Q4K(_) => Storage::Q4K,
        }
    }

    /// Bytes of memory that the weights take, padding of the last panel included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(p) => size_of_val(p.as_slice()),
            Panels::F16(p) => size_of_val(p.as_slice()),
            Panels::Bf16(p) => size_of_val(p.as_slice()),
            Panels::Q8_0(p) => size_of_val(p.as_slice()),
            Panels::Q4K(p) => size_of_val(p.as_slice()),
        }
    }

    /// Writes row `i` of the weight, dequantised, to `out` (k values): the embedding of token `i` under tied weights.
    ///
    /// # Panics
    /// When `i >= n` or `out` does not have k values.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of a weight with {} rows", self.n);
        assert!(out.len() == self.k, "a row of {} values for a buffer of {}", self.k, out.len());
        let (p, h, l) = (i / PANEL, i % PANEL / LANES, i % LANES);
        match &self.panels {
            Panels::F32(units) => {
                for (o, unit) in out.iter_mut().zip(&units[p * self.k..]) {
                    *o = unit.0[h][l];
                }
            }
            Panels::F16(units) => {
                for (o, unit) in out.iter_mut().zip(&units[p * self.k..]) {
                    *o = half_value(unit.0[h][l]);
                }
            }
            Panels::Bf16(units) => {
                for (o, unit) in out.chunks_mut(2).zip(&units[p * self.k.div_ceil(2)..]) {
                    let word = unit.0[h][l];
                    o[0] = f32::from_bits(word << 16);
                    if let Some(high) = o.get_mut(1) {
                        *high = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
            Panels::Q8_0(units) => {
                for (o, unit) in out.chunks_mut(Q8_BLOCK).zip(&units[p * (self.k / Q8_BLOCK)..]) {
                    let scale = half_value(unit.scales[h][l]);
                    for (i, o) in o.iter_mut().enumerate() {
                        let byte = unit.quants[i / 4][h][l].to_le_bytes()[i % 4] ^ 0x80;
                        *o = scale * f32::from(byte.cast_signed());
                    }
                }
            }
            Panels::Q4K(units) => {
                for (o, unit) in out.chunks_mut(Q4K_BLOCK).zip(&units[p * (self.k / Q4K_BLOCK)..]) {
                    let block = unpack_q4k(unit, h, l);
                    for (i, o) in o.iter_mut().enumerate() {
                        *o = block.value(i);
                    }
                }
            }
        }
    }
}

/// The super-block of one column of a panel.
fn unpack_q4k(unit: &Q4kUnit, h: usize, l: usize) -> Q4k {
    Q4k {
        d: unit.d[h][l],
        dmin: unit.dmin[h][l],
        scales: std::array::from_fn(|j| unit.scales[j][h][l]),
        mins: std::array::from_fn(|j| unit.mins[j][h][l]),
        quants: std::array::from_fn(|i| {
            let byte = unit.quants[i / 32][i % 16 / 4][h][l].to_le_bytes()[i % 4];
            if i % 32 < 16 { byte & 15 } else { byte >> 4 }
        }),
    }
}

/// Shape, blocks and length of the data of a weight.
fn check(
    storage: Storage,
    n: usize,
    k: usize,
    block: usize,
    expected: usize,
    found: usize,
    unit: &'static str,
) -> Result<(), MatrixError> {
    if n == 0 || k == 0 {
        return Err(MatrixError::Empty { n, k });
    }
    if !k.is_multiple_of(block) {
        return Err(MatrixError::Blocks { storage, block, k });
    }
    if expected != found {
        return Err(MatrixError::Length { storage, n, k, expected, found, unit });
    }
    Ok(())
}
