//! Activations and parameter vectors in host memory.
//!
//! Owns the growth of buffers: an operation that writes one makes it as long as the step needs, so that memory
//! follows the largest step that was really run.

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

/// Parameters of a norm, or a bias.
#[derive(Clone, Debug)]
pub struct CpuVector(pub(crate) Vec<f32>);

/// Rotary tables.
#[derive(Clone, Debug)]
pub struct CpuRope(pub(crate) mirai_model::backend::RopeTable);

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
