//! From the tensors of a quantized weight to one tensor with scales.
//!
//! Owns the tensors' names, types and shapes in each format, and their checks.

use std::borrow::Cow;

use safetensors::Dtype;

use super::packed::{Order, across, down, floats, pack, transpose};
use super::{Quantized, scaled};
use crate::backend::{HostTensor, ScaleValues, Scales, Storage};
use crate::error::{ModelError, Result};

/// A tensor as a file stores it.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a> {
    /// The file.
    pub file: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Outermost first.
    pub shape: &'a [usize],
    /// Exactly as many as shape and type need.
    pub bytes: &'a [u8],
}

/// Tensors by name.
pub trait RawTensors {
    /// The tensor of this name.
    fn raw(&self, name: &str) -> Option<RawTensor<'_>>;
}

/// Names under which the parts of a quantized weight may be stored, `weight` being the name of the plain one: for the
/// list of tensors that mean something.
#[must_use]
pub fn names_of(weight: &str) -> Vec<String> {
    const PARTS: [&str; 13] = [
        "weight",
        "weight_scale_inv",
        "weight_scale",
        "weight_packed",
        "weight_shape",
        "weight_zero_point",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        // Scales of activations: known, and of no use.
        "input_scale",
        "activation_scale",
        "input_global_scale",
    ];
    match weight.strip_suffix(".weight") {
        Some(base) => PARTS.iter().map(|part| format!("{base}.{part}")).collect(),
        None => vec![weight.to_owned(), format!("{weight}_blocks"), format!("{weight}_scales")],
    }
}

/// How much of a weight is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// All.
    Data,
    /// Types and shapes: packed numbers are not unpacked, so the tensor's bytes may be missing.
    Headers,
}

/// One weight of a checkpoint, for errors and lookups.
struct Weight<'a, 'n> {
    tensors: &'a dyn RawTensors,
    name: &'n str,
    shape: &'n [usize],
    depth: Depth,
}

/// Makes one tensor of the parts of a quantized weight of this shape (`[out, in]`, or `[n, out, in]` for experts). None
/// where the weight is stored plainly, or not at all.
///
/// # Errors
/// A part is missing, or its type or shape contradicts the weight's; by file and name.
pub fn assemble<'a>(
    quantized: Quantized,
    tensors: &'a dyn RawTensors,
    name: &str,
    shape: &[usize],
    depth: Depth,
) -> Result<Option<HostTensor<'a>>> {
    let weight = Weight { tensors, name, shape, depth };
    match quantized {
        Quantized::Fp8 { block } => weight.fp8(block),
        Quantized::Mxfp4 => weight.mxfp4(),
        Quantized::Packed { group } => weight.packed(group),
        Quantized::Gptq { group, zeros_less_one } => weight.gptq(group, zeros_less_one),
        Quantized::Awq { group } => weight.awq(group),
    }
}

impl<'a> Weight<'a, '_> {
    /// Name of a part beside the weight.
    fn part_name(&self, part: &str) -> String {
        match self.name.strip_suffix(".weight") {
            Some(base) => format!("{base}.{part}"),
            None => format!("{}_{part}", self.name),
        }
    }

    fn find(&self, part: &str) -> Option<RawTensor<'a>> {
        self.tensors.raw(&self.part_name(part))
    }

    fn need(&self, part: &str, beside: RawTensor<'_>) -> Result<RawTensor<'a>> {
        let missing =
            || ModelError::MissingTensor { file: beside.file.to_owned(), tensor: self.part_name(part) };
        self.find(part).ok_or_else(missing)
    }

    /// A part of this type and shape.
    fn check(&self, part: &str, raw: RawTensor<'_>, dtype: Dtype, shape: &[usize]) -> Result<()> {
        let (file, tensor) = (raw.file.to_owned(), self.part_name(part));
        if raw.dtype != dtype {
            let expected = match dtype {
                Dtype::U8 => "U8",
                Dtype::I32 => "I32",
                _ => "F8_E4M3",
            };
            return Err(ModelError::WrongType { file, tensor, expected, got: raw.dtype.to_string() });
        }
        if raw.shape != shape {
            return Err(ModelError::WrongShape {
                file,
                tensor,
                expected: shape.to_vec(),
                got: raw.shape.to_vec(),
            });
        }
        Ok(())
    }

    /// A part that holds plain numbers, as f32.
    fn floats(&self, part: &str, raw: RawTensor<'_>, shape: Option<&[usize]>) -> Result<Vec<f32>> {
        if let Some(shape) = shape
            && raw.shape != shape
        {
            let (file, tensor) = (raw.file.to_owned(), self.part_name(part));
            return Err(ModelError::WrongShape {
                file,
                tensor,
                expected: shape.to_vec(),
                got: raw.shape.to_vec(),
            });
        }
        floats(raw.dtype, raw.bytes).ok_or_else(|| ModelError::WrongType {
            file: raw.file.to_owned(),
            tensor: self.part_name(part),
            expected: "F32, F16 or BF16",
            got: raw.dtype.to_string(),
        })
    }

    /// Rows and columns; packings know only matrices.
    fn matrix(&self, raw: RawTensor<'_>) -> Result<(usize, usize)> {
        match *self.shape {
            [rows, columns] => Ok((rows, columns)),
            _ => {
                let why = format!("shape {:?}: only matrices are stored in this format", self.shape);
                Err(ModelError::corrupt(raw.file, format!("tensor `{}`", self.name), why))
            }
        }
    }

    /// Rows are whole groups, columns whole words.
    fn divides(&self, raw: RawTensor<'_>, what: &str, size: usize, by: usize) -> Result<()> {
        if by > 0 && size.is_multiple_of(by) {
            return Ok(());
        }
        let why = format!("{size} {what} are not whole groups of {by}");
        Err(ModelError::corrupt(raw.file, format!("tensor `{}`", self.name), why))
    }

    fn tensor(&self, storage: Storage, bytes: Cow<'a, [u8]>, scales: Scales<'a>) -> HostTensor<'a> {
        HostTensor {
            name: self.name.to_owned(),
            shape: self.shape.to_vec(),
            storage,
            bytes,
            scales: Some(scales),
        }
    }

    /// Numbers of a matrix in our order.
    fn unpacked(&self, rows: usize, columns: usize, number: impl Fn(usize, usize) -> u8) -> Vec<u8> {
        if self.depth == Depth::Data { pack(rows, columns, number) } else { Vec::new() }
    }

    fn fp8(&self, block: Option<(usize, usize)>) -> Result<Option<HostTensor<'a>>> {
        let Some(raw) = self.tensors.raw(self.name) else { return Ok(None) };
        if raw.dtype != Dtype::F8_E4M3 {
            return Ok(None);
        }
        if raw.shape != self.shape {
            let (file, tensor) = (raw.file.to_owned(), self.name.to_owned());
            let (expected, got) = (self.shape.to_vec(), raw.shape.to_vec());
            return Err(ModelError::WrongShape { file, tensor, expected, got });
        }
        let (rows, columns) = self.matrix(raw)?;
        let (part, scale) = match self.find("weight_scale_inv") {
            Some(scale) => ("weight_scale_inv", scale),
            None => ("weight_scale", self.need("weight_scale", raw)?),
        };
        let blocks = block.map(|(r, c)| ((r, c), [rows.div_ceil(r), columns.div_ceil(c)]));
        let block = match (scale.shape, blocks) {
            (shape, Some((block, expected))) if shape == expected => block,
            ([] | [1] | [1, 1], _) => (rows, columns),
            (&[n] | &[n, 1], _) if n == rows => (1, columns),
            (shape, blocks) => {
                let expected = blocks.map_or_else(|| vec![rows, 1], |(_, expected)| expected.to_vec());
                let (file, tensor) = (scale.file.to_owned(), self.part_name(part));
                return Err(ModelError::WrongShape { file, tensor, expected, got: shape.to_vec() });
            }
        };
        let values = match scale.dtype {
            Dtype::F8_E8M0 => ScaleValues::E8M0(Cow::Borrowed(scale.bytes)),
            _ => ScaleValues::F32(self.floats(part, scale, None)?),
        };
        let scales = Scales { block, values, zeros: None };
        Ok(Some(self.tensor(Storage::F8E4M3, Cow::Borrowed(raw.bytes), scales)))
    }

    fn mxfp4(&self) -> Result<Option<HostTensor<'a>>> {
        let Some(raw) = self.find("blocks") else { return Ok(None) };
        let Some((&columns, outer)) = self.shape.split_last() else { return Ok(None) };
        self.divides(raw, "columns", columns, 32)?;
        self.check("blocks", raw, Dtype::U8, &[outer, &[columns / 32, 16]].concat())?;
        let scales = self.need("scales", raw)?;
        self.check("scales", scales, Dtype::U8, &[outer, &[columns / 32]].concat())?;
        let values = ScaleValues::E8M0(Cow::Borrowed(scales.bytes));
        let scales = Scales { block: (1, 32), values, zeros: None };
        Ok(Some(self.tensor(Storage::F4E2M1, Cow::Borrowed(raw.bytes), scales)))
    }

    fn packed(&self, group: Option<usize>) -> Result<Option<HostTensor<'a>>> {
        let Some(raw) = self.find("weight_packed") else { return Ok(None) };
        let (rows, columns) = self.matrix(raw)?;
        let group = group.unwrap_or(columns);
        self.divides(raw, "columns", columns, group)?;
        self.divides(raw, "columns", columns, 8)?;
        self.check("weight_packed", raw, Dtype::I32, &[rows, columns / 8])?;
        if self.find("weight_g_idx").is_some() {
            let why = "columns in an order of their own are not supported in this format";
            return Err(ModelError::corrupt(
                raw.file,
                format!("tensor `{}`", self.part_name("weight_g_idx")),
                why,
            ));
        }
        let groups = columns / group;
        let scale = self.need("weight_scale", raw)?;
        let values = ScaleValues::F32(self.floats("weight_scale", scale, Some(&[rows, groups]))?);
        // Numbers are stored 8 higher than they are, so that they have no sign; zero points too, packed by rows.
        let zeros = match self.find("weight_zero_point") {
            None => vec![8; rows * groups],
            Some(zeros) => {
                self.check("weight_zero_point", zeros, Dtype::I32, &[rows.div_ceil(8), groups])?;
                let zero = |i: usize| down(zeros.bytes, groups, i / groups, i % groups);
                (0..rows * groups).map(zero).collect()
            }
        };
        let scales = Scales { block: (1, group), values, zeros: Some(zeros) };
        // Words of eight numbers, lowest bits first, little-endian: already two a byte, low half first.
        Ok(Some(self.tensor(Storage::U4, Cow::Borrowed(raw.bytes), scales)))
    }

    fn gptq(&self, group: Option<usize>, zeros_less_one: bool) -> Result<Option<HostTensor<'a>>> {
        let Some(raw) = self.find("qweight") else { return Ok(None) };
        let (rows, columns) = self.matrix(raw)?;
        let group = group.unwrap_or(columns);
        let groups = columns.div_ceil(group);
        self.divides(raw, "columns", columns, 8)?;
        self.divides(raw, "rows", rows, 8)?;
        self.check("qweight", raw, Dtype::I32, &[columns / 8, rows])?;
        let zeros = self.need("qzeros", raw)?;
        self.check("qzeros", zeros, Dtype::I32, &[groups, rows / 8])?;
        let scale = self.need("scales", raw)?;
        let scale = transpose(&self.floats("scales", scale, Some(&[groups, rows]))?, rows);
        let bytes = self.unpacked(rows, columns, |row, column| down(raw.bytes, rows, column, row));
        let less = u8::from(zeros_less_one);
        let zero = |i: usize| across(zeros.bytes, rows, Order::Plain, i % groups, i / groups) + less;
        let zeros = (0..rows * groups).map(zero).collect();
        let scales = Scales { block: (1, group), values: ScaleValues::F32(scale), zeros: Some(zeros) };
        let tensor = self.tensor(Storage::U4, Cow::Owned(bytes), scales);
        match self.find("g_idx") {
            Some(order) => {
                self.check("g_idx", order, Dtype::I32, &[columns])?;
                if self.depth == Depth::Data {
                    self.reordered(tensor, order, group).map(Some)
                } else {
                    Ok(Some(tensor))
                }
            }
            None => Ok(Some(tensor)),
        }
    }

    /// Columns whose group is not that of their place were quantized in another order (`desc_act`). Their scales do not
    /// lie in blocks, so such a weight is widened.
    fn reordered(
        &self,
        tensor: HostTensor<'a>,
        order: RawTensor<'_>,
        group: usize,
    ) -> Result<HostTensor<'a>> {
        let groups: Vec<usize> =
            order.bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b) as usize).collect();
        if groups.iter().enumerate().all(|(column, g)| *g == column / group) {
            return Ok(tensor);
        }
        let (rows, columns) = self.matrix(order)?;
        let per_row = columns.div_ceil(group);
        let broken = |why: &str| {
            ModelError::corrupt(order.file, format!("tensor `{}`", self.part_name("g_idx")), why.to_owned())
        };
        if groups.iter().any(|g| *g >= per_row) {
            return Err(broken("names a group beyond the last"));
        }
        let Some(Scales { values, zeros: Some(zeros), .. }) = &tensor.scales else {
            return Err(broken("has no scales beside it"));
        };
        let mut wide = Vec::with_capacity(rows * columns * 4);
        for row in 0..rows {
            for (column, g) in groups.iter().enumerate() {
                let number = tensor.bytes[(row * columns + column) / 2] >> (4 * (column % 2)) & 0xf;
                let at = row * per_row + g;
                let value = (f32::from(number) - f32::from(zeros[at])) * values.get(at);
                wide.extend_from_slice(&value.to_le_bytes());
            }
        }
        Ok(HostTensor { storage: Storage::F32, bytes: Cow::Owned(wide), scales: None, ..tensor })
    }

    fn awq(&self, group: Option<usize>) -> Result<Option<HostTensor<'a>>> {
        let Some(raw) = self.find("qweight") else { return Ok(None) };
        let (rows, columns) = self.matrix(raw)?;
        let group = group.unwrap_or(columns);
        self.divides(raw, "columns", columns, group)?;
        self.divides(raw, "columns", columns, 2)?;
        self.divides(raw, "rows", rows, 8)?;
        let groups = columns / group;
        self.check("qweight", raw, Dtype::I32, &[columns, rows / 8])?;
        let zeros = self.need("qzeros", raw)?;
        self.check("qzeros", zeros, Dtype::I32, &[groups, rows / 8])?;
        let scale = self.need("scales", raw)?;
        let scale = transpose(&self.floats("scales", scale, Some(&[groups, rows]))?, rows);
        let bytes =
            self.unpacked(rows, columns, |row, column| across(raw.bytes, rows, Order::Awq, column, row));
        let zero = |i: usize| across(zeros.bytes, rows, Order::Awq, i % groups, i / groups);
        let zeros = (0..rows * groups).map(zero).collect();
        let scales = Scales { block: (1, group), values: ScaleValues::F32(scale), zeros: Some(zeros) };
        Ok(Some(self.tensor(Storage::U4, Cow::Owned(bytes), scales)))
    }
}

/// Widens a tensor with scales to plain f32; others stay as they are.
///
/// # Errors
/// Bytes or scales do not fit the shape.
pub fn widen(tensor: HostTensor<'_>) -> Result<HostTensor<'_>> {
    if !tensor.storage.is_scaled() {
        return Ok(tensor);
    }
    let values = scaled::to_f32(&tensor).map_err(|why| ModelError::Convert {
        tensor: tensor.name.clone(),
        from: tensor.storage,
        to: Storage::F32,
        why,
    })?;
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Ok(HostTensor { storage: Storage::F32, bytes: Cow::Owned(bytes), scales: None, ..tensor })
}
