//! A definition in a TOML file.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::DefinitionError;
use super::node::{Node, Value};

/// Largest file that is read, in bytes.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// Parses a file's text.
pub(super) fn parse(text: &str) -> Result<Node, DefinitionError> {
    let table = DeTable::parse(text).map_err(|error| DefinitionError {
        key: String::new(),
        line: error.span().map(|span| line_of(text, &span)),
        problem: error.message().to_owned(),
    })?;
    Ok(Node {
        line: None,
        value: table_of(text, table.into_inner()),
    })
}

/// The line on which `span` begins, from 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.as_bytes().get(..span.start).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn table_of(text: &str, table: DeTable<'_>) -> Value {
    let entries: BTreeMap<_, _> = table
        .into_iter()
        .map(|(key, value)| (key.into_inner().into_owned(), node_of(text, value)))
        .collect();
    Value::Table(entries)
}

fn node_of(text: &str, value: Spanned<DeValue<'_>>) -> Node {
    let line = Some(line_of(text, &value.span()));
    let value = match value.into_inner() {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(
                |_| Value::Other(format!("the integer {number}")),
                Value::Integer,
            ),
        DeValue::Boolean(value) => Value::Boolean(value),
        DeValue::Float(_) => Value::Other("a fraction".into()),
        DeValue::Datetime(_) => Value::Other("a time".into()),
        DeValue::Array(list) => Value::List(
            list.into_iter()
                .map(|element| node_of(text, element))
                .collect(),
        ),
        DeValue::Table(table) => table_of(text, table),
    };
    Node { line, value }
}
