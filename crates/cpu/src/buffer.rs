//! Activations and parameter vectors in host memory.
//!
//! Owns the growth of buffers: an operation that writes one makes it as long as the step needs, so that memory
//! follows the largest step that was really run.

use std::sync::OnceLock;

use mirai_model::backend::{Result, Rows};

use crate::linear::device;
use crate::memory;

/// Activations, `[rows, width]`, rows back to back.
#[derive(Debug)]
pub struct CpuBuffer {
    /// What a row stands for.
    rows: Rows,
    /// Widest row that was asked for.
    capacity: usize,
    /// Width of the rows that were last written.
    width: usize,
    data: Vec<f32>,
}

/// Parameters of a norm, a bias, or any other small tensor.
#[derive(Clone, Debug)]
pub struct CpuVector {
    values: Vec<f32>,
    /// The same as a matrix transposed, made when it is first asked for.
    transposed: OnceLock<Vec<f32>>,
}

/// Rotary tables.
#[derive(Clone, Debug)]
pub struct CpuRope(pub(crate) mirai_model::backend::RopeTable);

/// One expert of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Choice {
    /// Which.
    pub expert: u32,
    /// What its output is multiplied with.
    pub weight: f32,
}

/// The experts of each token of a step.
#[derive(Debug)]
pub struct CpuRouting {
    /// Experts of a token.
    pub(crate) top_k: usize,
    /// `[tokens][top_k]`, in the order of the choice.
    pub(crate) choices: Vec<Choice>,
}

impl CpuRouting {
    pub(crate) fn new(top_k: usize) -> Self {
        Self { top_k, choices: Vec::new() }
    }

    /// The choices of the first `tokens` tokens, if so many were made. For tests and tools.
    #[must_use]
    pub fn choices(&self, tokens: usize) -> Option<&[Choice]> {
        self.choices.get(..tokens * self.top_k)
    }
}

impl CpuVector {
    pub(crate) fn new(values: Vec<f32>) -> Self {
        Self { values, transposed: OnceLock::new() }
    }

    pub(crate) fn values(&self) -> &[f32] {
        &self.values
    }

    /// The vector as a matrix with lines of `width`, transposed. Always asked for with one width.
    pub(crate) fn transposed(&self, width: usize) -> &[f32] {
        self.transposed.get_or_init(|| {
            let lines = self.values.len() / width.max(1);
            (0..lines * width).map(|i| self.values[i % lines * width + i / lines]).collect()
        })
    }
}

impl CpuBuffer {
    pub(crate) fn new(rows: Rows, width: usize) -> Self {
        Self { rows, capacity: width, width, data: Vec::new() }
    }

    pub(crate) fn kind(&self) -> Rows {
        self.rows
    }

    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The first `rows` rows as the last operation wrote them; none if it wrote fewer. For tests and tools.
    #[must_use]
    pub fn values(&self, rows: usize) -> Option<&[f32]> {
        self.data.get(..rows * self.width)
    }

    /// `rows` rows as the last operation wrote them.
    pub(crate) fn read(&self, operation: &'static str, rows: usize) -> Result<&[f32]> {
        let len = rows * self.width;
        self.data.get(..len).ok_or_else(|| self.too_short(operation, rows))
    }

    /// The same, to change in place.
    pub(crate) fn update(&mut self, operation: &'static str, rows: usize) -> Result<&mut [f32]> {
        let len = rows * self.width;
        if self.data.len() < len {
            return Err(self.too_short(operation, rows));
        }
        Ok(&mut self.data[..len])
    }

    /// Room for `rows` rows of `width`, whose old values mean nothing.
    pub(crate) fn write(&mut self, operation: &'static str, rows: usize, width: usize) -> Result<&mut [f32]> {
        if width > self.capacity {
            return Err(device(operation, format!("rows of {width} into a buffer of {}", self.capacity)));
        }
        self.width = width;
        let len = rows * width;
        if self.data.len() < len {
            memory::reserve("activations", &mut self.data, len)?;
            self.data.resize(len, 0.0);
        }
        Ok(&mut self.data[..len])
    }

    fn too_short(&self, operation: &'static str, rows: usize) -> mirai_model::backend::BackendError {
        let message = format!("{rows} rows of {} from a buffer of {} values", self.width, self.data.len());
        device(operation, message)
    }
}
