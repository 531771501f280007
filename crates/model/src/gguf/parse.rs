//! The GGUF header: bytes to keys and tensor entries.
//!
//! Owns the format, and nothing of its meaning. Hardened: every count and length is held against the bytes that
//! are left before memory is taken for it, all arithmetic on them is checked, and tensors may not overlap.

use std::collections::BTreeMap;

use crate::backend::Storage;
use crate::error::{ModelError, Result};

/// Most keys.
const MAX_KEYS: u64 = 1 << 16;
/// Most tensors.
const MAX_TENSORS: u64 = 1 << 17;
/// Longest key or tensor name, in bytes.
const MAX_NAME: u64 = 1_024;
/// Longest text value: chat templates are the longest.
const MAX_TEXT: u64 = 8 << 20;
/// Most elements of all arrays together. Vocabularies and merges of published models have less than a million; an
/// empty text of 8 bytes takes three times as many in memory, so this is what bounds the memory for metadata.
const MAX_ELEMENTS: u64 = 1 << 22;
/// Alignment of tensors where the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value. Arrays that nothing here has a use for are passed over.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Single or double precision.
    Float(f64),
    /// Truth value.
    Flag(bool),
    /// UTF-8.
    Text(String),
    /// Array of texts.
    Texts(Vec<String>),
    /// Array of integers.
    Integers(Vec<i64>),
    /// Array of floats.
    Floats(Vec<f32>),
    /// Array of something else.
    Other,
}

/// An entry of the tensor table, checked against the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Outermost first: the file's order reversed.
    pub shape: Vec<usize>,
    /// Element type.
    pub storage: Storage,
    /// Range of its bytes in the file.
    start: usize,
    end: usize,
}

/// Everything before the tensors' bytes.
#[derive(Clone, Debug, Default)]
pub struct GgufHeader {
    /// Metadata.
    pub keys: BTreeMap<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
    /// Array elements that may still be read.
    elements: u64,
}

impl<'a> Reader<'a> {
    fn error(&self, item: impl Into<String>, why: impl Into<String>) -> ModelError {
        ModelError::corrupt(self.file, item, format!("{} (at byte {})", why.into(), self.at))
    }

    fn take(&mut self, n: u64, item: &str) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        let Some(n) = usize::try_from(n).ok().filter(|&n| n <= left) else {
            return Err(self.error(item, format!("needs {n} bytes, the file has {left} more")));
        };
        let out = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(out)
    }

    fn array<const N: usize>(&mut self, item: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, item)?);
        Ok(out)
    }

    fn u32(&mut self, item: &str) -> Result<u32> {
        self.array(item).map(u32::from_le_bytes)
    }

    fn u64(&mut self, item: &str) -> Result<u64> {
        self.array(item).map(u64::from_le_bytes)
    }

    fn text(&mut self, limit: u64, item: &str) -> Result<String> {
        let n = self.u64(item)?;
        if n > limit {
            return Err(self.error(item, format!("a text of {n} bytes, at most {limit} are read")));
        }
        let bytes = self.take(n, item)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|e| self.error(item, format!("not UTF-8: {e}")))
    }

    /// A number of the type with this code; texts and arrays are not numbers.
    fn scalar(&mut self, code: u32, item: &str) -> Result<Value> {
        Ok(match code {
            0 => Value::Unsigned(self.array::<1>(item)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(item)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(item)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(item)?).into()),
            4 => Value::Unsigned(self.u32(item)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(item)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(item)?).into()),
            7 => match self.array::<1>(item)?[0] {
                0 => Value::Flag(false),
                1 => Value::Flag(true),
                other => return Err(self.error(item, format!("truth value {other}, expected 0 or 1"))),
            },
            10 => Value::Unsigned(self.u64(item)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(item)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(item)?)),
            other => return Err(self.error(item, format!("value type {other} is unknown here"))),
        })
    }

    fn value(&mut self, item: &str) -> Result<Value> {
        match self.u32(item)? {
            8 => self.text(MAX_TEXT, item).map(Value::Text),
            9 => self.elements(item),
            code => self.scalar(code, item),
        }
    }

    fn elements(&mut self, item: &str) -> Result<Value> {
        let code = self.u32(item)?;
        let n = self.u64(item)?;
        let width: u64 = match code {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // A text takes 8 bytes for its length at least.
            8 => 8,
            9 => return Err(self.error(item, "arrays of arrays are not supported")),
            other => return Err(self.error(item, format!("array of unknown type {other}"))),
        };
        let left = (self.bytes.len() - self.at) as u64;
        if n > self.elements || n.saturating_mul(width) > left {
            let why =
                format!("array of {n} elements, at most {} are read and {left} bytes left", self.elements);
            return Err(self.error(item, why));
        }
        self.elements -= n;
        let mut each = |f: &mut dyn FnMut(&mut Self) -> Result<()>| (0..n).try_for_each(|_| f(self));
        match code {
            8 => {
                let mut out = Vec::new();
                each(&mut |r| r.text(MAX_TEXT, item).map(|t| out.push(t)))?;
                Ok(Value::Texts(out))
            }
            6 => {
                let mut out = Vec::new();
                each(&mut |r| r.array(item).map(|b| out.push(f32::from_le_bytes(b))))?;
                Ok(Value::Floats(out))
            }
            4 | 5 => {
                let mut out = Vec::new();
                each(&mut |r| {
                    match r.scalar(code, item)? {
                        Value::Unsigned(v) => out.push(i64::from(v as u32)),
                        Value::Signed(v) => out.push(v),
                        _ => {}
                    }
                    Ok(())
                })?;
                Ok(Value::Integers(out))
            }
            _ => self.take(n * width, item).map(|_| Value::Other),
        }
    }
}

/// Codes of `ggml_type`.
fn storage(code: u32) -> Option<Storage> {
    Some(match code {
        0 => Storage::F32,
        1 => Storage::F16,
        2 => Storage::Q4_0,
        3 => Storage::Q4_1,
        6 => Storage::Q5_0,
        7 => Storage::Q5_1,
        8 => Storage::Q8_0,
        10 => Storage::Q2K,
        11 => Storage::Q3K,
        12 => Storage::Q4K,
        13 => Storage::Q5K,
        14 => Storage::Q6K,
        30 => Storage::Bf16,
        _ => return None,
    })
}

/// A tensor's entry before its offset is resolved.
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    storage: Storage,
    offset: u64,
    bytes: u64,
}

impl GgufHeader {
    /// Reads and checks everything but the tensors' values.
    ///
    /// # Errors
    /// Names the key or tensor and the byte where the file is broken.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let mut r = Reader { file, bytes, at: 0, elements: MAX_ELEMENTS };
        let magic: [u8; 4] = r.array("magic")?;
        if &magic != b"GGUF" {
            let found = magic.escape_ascii();
            return Err(ModelError::corrupt(file, "magic", format!("`{found}`, expected `GGUF`")));
        }
        let version = r.u32("version")?;
        if !matches!(version, 2 | 3) {
            return Err(r.error("version", format!("{version}, supported are 2 and 3, little-endian")));
        }
        let tensors = r.u64("tensor count")?;
        let keys = r.u64("key count")?;
        if tensors > MAX_TENSORS || keys > MAX_KEYS {
            let why =
                format!("{tensors} tensors and {keys} keys, at most {MAX_TENSORS} and {MAX_KEYS} are read");
            return Err(r.error("header", why));
        }
        let mut header = Self::default();
        for i in 0..keys {
            let name = r.text(MAX_NAME, &format!("key {i}"))?;
            let value = r.value(&format!("key `{}`", name.escape_default()))?;
            if header.keys.insert(name.clone(), value).is_some() {
                return Err(r.error(format!("key `{}`", name.escape_default()), "occurs twice"));
            }
        }
        let alignment = header.alignment(file)?;
        let raw = (0..tensors).map(|i| r.tensor(i)).collect::<Result<Vec<_>>>()?;
        let data = (r.at as u64).next_multiple_of(alignment);
        header.place(file, raw, data, alignment, bytes.len() as u64)?;
        Ok(header)
    }

    fn alignment(&self, file: &str) -> Result<u64> {
        let alignment = match self.keys.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Unsigned(n)) => *n,
            Some(_) => 0,
        };
        if alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment) {
            return Ok(alignment);
        }
        let why = format!("is {alignment}, expected a power of two from 8 to 1048576");
        Err(ModelError::field(file, "general.alignment", why))
    }

    /// Resolves offsets, and checks that tensors lie in the file, aligned and apart.
    fn place(
        &mut self,
        file: &str,
        mut raw: Vec<RawTensor>,
        data: u64,
        alignment: u64,
        len: u64,
    ) -> Result<()> {
        raw.sort_by_key(|t| t.offset);
        let mut free = 0;
        for t in raw {
            let item = format!("tensor `{}`", t.name.escape_default());
            let wrong = |why: String| Err(ModelError::corrupt(file, item.clone(), why));
            if !t.offset.is_multiple_of(alignment) {
                return wrong(format!("offset {} is not a multiple of the alignment {alignment}", t.offset));
            }
            if t.offset < free {
                return wrong(format!(
                    "offset {} lies inside another tensor, which ends at {free}",
                    t.offset
                ));
            }
            let start = data.checked_add(t.offset);
            let range = start.and_then(|s| s.checked_add(t.bytes).map(|e| (s, e)));
            let Some((start, end)) = range.filter(|(_, end)| *end <= len) else {
                return wrong(format!(
                    "needs {} bytes at offset {} of the data, which starts at {data}; the file has {len} bytes",
                    t.bytes, t.offset
                ));
            };
            free = t.offset + t.bytes;
            let (start, end) = (start as usize, end as usize);
            let info = TensorInfo { shape: t.shape, storage: t.storage, start, end };
            if self.tensors.insert(t.name, info).is_some() {
                return wrong("occurs twice".to_owned());
            }
        }
        Ok(())
    }

    /// A tensor's bytes in the file that this header was parsed from.
    #[must_use]
    pub fn data<'a>(&self, info: &TensorInfo, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[info.start..info.end]
    }

    /// A text, if the key is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn text(&self, file: &str, key: &str) -> Result<Option<&str>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Text(t)) => Ok(Some(t)),
            Some(other) => {
                Err(ModelError::field(file, key, format!("expected a text, got {}", other.show())))
            }
        }
    }

    /// An unsigned number, if the key is there. Writers use signed types too.
    ///
    /// # Errors
    /// It is something else, or negative.
    pub fn whole(&self, file: &str, key: &str) -> Result<Option<u64>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(n.cast_unsigned())),
            Some(other) => {
                Err(ModelError::field(file, key, format!("expected a whole number, got {}", other.show())))
            }
        }
    }

    /// A finite number, if the key is there.
    ///
    /// # Errors
    /// It is something else, or not finite.
    pub fn number(&self, file: &str, key: &str) -> Result<Option<f64>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Float(n)) if (*n as f32).is_finite() => Ok(Some(*n)),
            Some(Value::Unsigned(n)) => Ok(Some(*n as f64)),
            Some(other) => {
                Err(ModelError::field(file, key, format!("expected a finite number, got {}", other.show())))
            }
        }
    }

    /// A truth value, if the key is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&self, file: &str, key: &str) -> Result<Option<bool>> {
        match self.keys.get(key) {
            None => Ok(None),
            Some(Value::Flag(b)) => Ok(Some(*b)),
            Some(other) => {
                Err(ModelError::field(file, key, format!("expected true or false, got {}", other.show())))
            }
        }
    }
}

impl Value {
    /// For error messages.
    pub(crate) fn show(&self) -> String {
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Float(n) => n.to_string(),
            Self::Flag(b) => b.to_string(),
            Self::Text(t) => format!("a text of {} bytes", t.len()),
            Self::Texts(v) => format!("an array of {} texts", v.len()),
            Self::Integers(v) => format!("an array of {} integers", v.len()),
            Self::Floats(v) => format!("an array of {} floats", v.len()),
            Self::Other => "an array".to_owned(),
        }
    }
}

impl Reader<'_> {
    fn tensor(&mut self, number: u64) -> Result<RawTensor> {
        let name = self.text(MAX_NAME, &format!("tensor {number}"))?;
        let item = format!("tensor `{}`", name.escape_default());
        let dims = self.u32(&item)?;
        if !(1..=4).contains(&dims) {
            return Err(self.error(item, format!("has {dims} dimensions, expected 1 to 4")));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..dims {
            let dim = self.u64(&item)?;
            let fits = usize::try_from(dim).ok().filter(|&d| d > 0);
            shape.push(fits.ok_or_else(|| self.error(item.clone(), format!("a dimension is {dim}")))?);
        }
        shape.reverse();
        let code = self.u32(&item)?;
        let storage = storage(code).ok_or_else(|| ModelError::WrongType {
            file: self.file.to_owned(),
            tensor: name.escape_default().to_string(),
            expected: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or Q2_K to Q6_K",
            got: format!("code {code}"),
        })?;
        let offset = self.u64(&item)?;
        let bytes = storage.tensor_bytes(&shape).ok_or_else(|| {
            let why = format!("shape {shape:?} overflows, or is not whole blocks of {}", storage.name());
            self.error(item, why)
        })?;
        Ok(RawTensor { name, shape, storage, offset, bytes: bytes as u64 })
    }
}
