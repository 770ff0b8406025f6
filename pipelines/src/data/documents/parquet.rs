//! Parquet files: a document is a string of one column.

use std::fs::File;

use parquet::basic::Type;
use parquet::column::reader::ColumnReader;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use super::{DocumentError, Progress, ReadError, Sink};

/// Strings that are read at a time.
const ROWS: usize = 256;

/// Reads a column of all row groups.
pub(super) fn read(
    file: File,
    name: &str,
    field: &str,
    progress: &Progress,
    sink: &mut dyn Sink,
) -> Result<(), ReadError> {
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let damaged = |error: ParquetError, position: String| DocumentError::Damaged {
        name: name.into(),
        reason: error.to_string(),
        position,
    };
    let reader = SerializedFileReader::new(file)
        .map_err(|error| damaged(error, format!("in the footer, at the end of its {length} bytes")))?;
    let metadata = reader.metadata();
    let schema = metadata.file_metadata().schema_descr();
    let column = schema.columns().iter().position(|column| column.path().string() == field).ok_or_else(|| {
        let names: Vec<String> =
            schema.columns().iter().map(|column| format!("{:?}", column.path().string())).collect();
        let reason = format!("there is no column {field:?}, but {}", names.join(", "));
        no_text(name, "the schema", format!("{reason}; name the one with the text: --set documents.field=…"))
    })?;
    let described = schema.column(column);
    if described.physical_type() != Type::BYTE_ARRAY || described.max_rep_level() != 0 {
        return Err(no_text(name, "the schema", format!("the column {field:?} does not hold strings")).into());
    }
    let optional = described.max_def_level();
    let groups = reader.num_row_groups();
    let mut row = 0_u64;
    for group in 0..groups {
        let position = |row: u64| format!("row {row}, in row group {} of {groups}", group + 1);
        let rows = metadata.row_group(group).num_rows();
        let column = reader
            .get_row_group(group)
            .and_then(|group| group.get_column_reader(column))
            .map_err(|error| damaged(error, position(row)))?;
        let ColumnReader::ByteArrayColumnReader(mut column) = column else {
            return Err(no_text(name, "the schema", format!("the column {field:?} does not hold strings")).into());
        };
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let first = row;
        loop {
            levels.clear();
            values.clear();
            let wanted = if optional > 0 { Some(&mut levels) } else { None };
            let (records, ..) =
                column.read_records(ROWS, wanted, None, &mut values).map_err(|error| damaged(error, position(row)))?;
            if records == 0 {
                break;
            }
            if let Some(at) = levels.iter().position(|&level| level < optional) {
                let row = row + at as u64;
                return Err(no_text(name, &format!("row {row}"), format!("the column {field:?} is null")).into());
            }
            for value in &values {
                sink.text(value.data())?;
                sink.end()?;
            }
            row += records as u64;
        }
        if row - first != rows as u64 {
            let error = ParquetError::General(format!("{} rows where the footer tells {rows}", row - first));
            return Err(damaged(error, position(row)).into());
        }
        progress.set(length * (group as u64 + 1) / groups as u64);
    }
    Ok(())
}

fn no_text(name: &str, position: &str, reason: String) -> DocumentError {
    DocumentError::NoText { name: name.into(), position: position.into(), reason }
}
