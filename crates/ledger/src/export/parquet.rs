//! Parquet: the same columns as CSV, with their types.
//!
//! Owns the mapping of cells to Parquet's types: times are UTC microseconds, decimals are exact with twelve
//! places. Groups of lines are bounded, so memory is.

use std::io::{self, Write};
use std::sync::Arc;

use parquet::basic::{LogicalType, Repetition, TimeUnit, Type as Physical};
use parquet::data_type::{
    ByteArray, ByteArrayType, DataType, DoubleType, FixedLenByteArray, FixedLenByteArrayType, Int64Type,
};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedColumnWriter, SerializedFileWriter};
use parquet::schema::types::Type;

use super::{Cell, Column, ExportError, Kind, Line, Sink};

/// Lines in one row group.
const GROUP: usize = 16_384;

impl From<ParquetError> for ExportError {
    fn from(error: ParquetError) -> Self {
        Self::Write(io::Error::other(error.to_string()))
    }
}

pub(super) struct Parquet<'a> {
    columns: Vec<Column>,
    writer: SerializedFileWriter<&'a mut (dyn Write + Send)>,
    lines: Vec<Vec<Cell>>,
}

fn column_type(column: &Column) -> Result<Type, ParquetError> {
    let (physical, logical, length) = match column.kind {
        Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String), 0),
        Kind::Time => (Physical::INT64, Some(LogicalType::timestamp(true, TimeUnit::MICROS)), 0),
        Kind::Count => (Physical::INT64, None, 0),
        Kind::Picos => (Physical::FIXED_LEN_BYTE_ARRAY, Some(LogicalType::decimal(12, 38)), 16),
        Kind::Float => (Physical::DOUBLE, None, 0),
    };
    let builder = Type::primitive_type_builder(column.name, physical)
        .with_repetition(Repetition::OPTIONAL)
        .with_logical_type(logical)
        .with_length(length);
    if column.kind == Kind::Picos {
        builder.with_precision(38).with_scale(12).build()
    } else {
        builder.build()
    }
}

impl<'a> Parquet<'a> {
    pub(super) fn new(columns: Vec<Column>, out: &'a mut (dyn Write + Send)) -> Result<Self, ExportError> {
        let fields: Result<Vec<_>, _> = columns.iter().map(|c| column_type(c).map(Arc::new)).collect();
        let schema = Type::group_type_builder("usage").with_fields(fields?).build()?;
        let properties = WriterProperties::builder().build();
        let writer = SerializedFileWriter::new(out, Arc::new(schema), Arc::new(properties))?;
        Ok(Self { columns, writer, lines: Vec::new() })
    }

    fn group(&mut self) -> Result<(), ExportError> {
        let mut group = self.writer.next_row_group()?;
        for (index, column) in self.columns.iter().enumerate() {
            let Some(mut to) = group.next_column()? else { break };
            let cells = self.lines.iter().map(|line| &line[index]);
            match column.kind {
                Kind::Text => write::<ByteArrayType>(&mut to, cells, |cell| match cell {
                    Cell::Text(text) => Some(ByteArray::from(text.as_str())),
                    _ => None,
                })?,
                Kind::Time | Kind::Count => write::<Int64Type>(&mut to, cells, |cell| match cell {
                    Cell::Time(at) => Some(*at),
                    Cell::Count(n) => Some(i64::try_from(*n).unwrap_or(i64::MAX)),
                    _ => None,
                })?,
                Kind::Picos => write::<FixedLenByteArrayType>(&mut to, cells, |cell| match cell {
                    Cell::Picos(picos) => {
                        Some(FixedLenByteArray::from(ByteArray::from(picos.to_be_bytes().to_vec())))
                    }
                    _ => None,
                })?,
                Kind::Float => write::<DoubleType>(&mut to, cells, |cell| match cell {
                    Cell::Float(x) => Some(*x),
                    _ => None,
                })?,
            }
            to.close()?;
        }
        group.close()?;
        self.lines.clear();
        Ok(())
    }
}

/// Writes one column: values where there are some, and for each line whether there is one.
fn write<'c, T: DataType>(
    to: &mut SerializedColumnWriter<'_>,
    cells: impl Iterator<Item = &'c Cell>,
    value: impl Fn(&Cell) -> Option<T::T>,
) -> Result<(), ExportError> {
    let values: Vec<Option<T::T>> = cells.map(value).collect();
    let levels: Vec<i16> = values.iter().map(|value| i16::from(value.is_some())).collect();
    let values: Vec<T::T> = values.into_iter().flatten().collect();
    to.typed::<T>().write_batch(&values, Some(&levels), None)?;
    Ok(())
}

impl Sink for Parquet<'_> {
    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        self.lines.push(self.columns.iter().map(|column| (column.read)(line)).collect());
        if self.lines.len() >= GROUP { self.group() } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), ExportError> {
        if !self.lines.is_empty() {
            self.group()?;
        }
        self.writer.finish()?;
        self.writer.inner_mut().flush()?;
        Ok(())
    }
}
