//! Tables as other tools of the system print them: no lines, a heading, a sum at the end.

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

/// A column.
#[derive(Clone, Copy, Debug)]
pub enum Column {
    /// Text, from the left.
    Left(&'static str),
    /// Numbers, from the right.
    Right(&'static str),
}

impl Column {
    fn name(self) -> &'static str {
        match self {
            Self::Left(name) | Self::Right(name) => name,
        }
    }

    fn alignment(self) -> CellAlignment {
        match self {
            Self::Left(_) => CellAlignment::Left,
            Self::Right(_) => CellAlignment::Right,
        }
    }
}

/// A table with a heading, and how many `things` there are below it; only the rows without
/// `legend`. An empty cell is a dash, so that each row has as many words as columns for programs
/// that split it.
pub fn table(
    legend: bool,
    columns: &[Column],
    rows: impl IntoIterator<Item = Vec<String>>,
    thing: &str,
) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    if legend {
        table.set_header(columns.iter().map(|column| column.name()));
    }
    let mut count = 0;
    for row in rows {
        count += 1;
        let cell = |text: &String| Cell::new(if text.is_empty() { "-" } else { text });
        table.add_row(row.iter().map(cell));
    }
    for (column, shape) in table.column_iter_mut().zip(columns) {
        column
            .set_padding((0, 2))
            .set_cell_alignment(shape.alignment());
    }
    let mut text = String::new();
    if legend || count > 0 {
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
    }
    if legend {
        let plural = match thing {
            _ if count == 1 => "",
            _ if thing.ends_with('s') => "es",
            _ => "s",
        };
        text.push_str(&format!("\n{count} {thing}{plural}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 2] = [Column::Left("NAME"), Column::Right("VCPUS")];

    fn rows() -> Vec<Vec<String>> {
        vec![
            vec!["vm1".into(), "12".into()],
            vec!["longer".into(), String::new()],
        ]
    }

    #[test]
    fn a_table_has_heading_and_sum() {
        let text = table(true, &COLUMNS, rows(), "machine");
        assert_eq!(
            text,
            "NAME    VCPUS\nvm1        12\nlonger      -\n\n2 machines\n"
        );
    }

    #[test]
    fn without_legend_there_are_only_rows() {
        assert_eq!(
            table(false, &COLUMNS, rows(), "machine"),
            "vm1     12\nlonger   -\n"
        );
        assert_eq!(table(false, &COLUMNS, vec![], "machine"), "");
    }

    #[test]
    fn nothing_is_said_to_be_nothing() {
        assert_eq!(
            table(true, &COLUMNS, vec![], "machine"),
            "NAME  VCPUS\n\n0 machines\n"
        );
    }
}
