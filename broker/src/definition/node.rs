//! A definition as it was written, whatever it was written in.

use std::collections::BTreeMap;

use super::DefinitionError;

/// Most elements of a list, and most keys of a table.
const MAX_ELEMENTS: usize = 256;

/// Most characters of a key that a message repeats.
const MAX_KEY: usize = 64;

/// A value, and the line on which it is in a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) line: Option<usize>,
    pub(super) value: Value,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i128),
    Boolean(bool),
    List(Vec<Node>),
    Table(BTreeMap<String, Node>),
    /// Something that no key takes; its name.
    Other(String),
}

impl Value {
    /// Its type, for a message.
    fn kind(&self) -> &str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Boolean(_) => "a boolean",
            Self::List(_) => "a list",
            Self::Table(_) => "a dictionary",
            Self::Other(name) => name,
        }
    }
}

/// The keys of a table, taken one by one.
#[derive(Debug)]
pub(super) struct Fields {
    /// What comes before the keys in messages: empty, or as `disk[0].`.
    prefix: String,
    line: Option<usize>,
    /// Where each key is, also when it has been taken.
    lines: BTreeMap<String, usize>,
    rest: BTreeMap<String, Node>,
}

impl Fields {
    /// Of `node`, which is called `name` and has no other keys than `known` ones. They are looked at
    /// before any value: a key that seems to be missing may be one that is misspelt.
    pub(super) fn of(node: Node, name: &str, known: &[&str]) -> Result<Self, DefinitionError> {
        let Node { line, value } = node;
        let refused = |problem| DefinitionError {
            key: name.to_owned(),
            line,
            problem,
        };
        let rest = match value {
            Value::Table(rest) if rest.len() <= MAX_ELEMENTS => rest,
            Value::Table(rest) => {
                let problem = format!("{} keys, at most {MAX_ELEMENTS} are possible", rest.len());
                return Err(refused(problem));
            }
            other => {
                let problem = format!("{} where a dictionary is expected", other.kind());
                return Err(refused(problem));
            }
        };
        let line_of = |(key, node): (&String, &Node)| Some((key.clone(), node.line?));
        let fields = Self {
            prefix: if name.is_empty() {
                String::new()
            } else {
                format!("{name}.")
            },
            line,
            lines: rest.iter().filter_map(line_of).collect(),
            rest,
        };
        let mut keys = fields.rest.keys();
        match keys.find(|key| !known.contains(&key.as_str())) {
            None => Ok(fields),
            Some(key) => {
                let problem = format!("unknown key; there are {}", known.join(", "));
                Err(fields.wrong(key, problem))
            }
        }
    }

    /// An error about `key`, with its line; about one that is not there, with its table's.
    pub(super) fn wrong(&self, key: &str, problem: impl Into<String>) -> DefinitionError {
        let short: String = key.chars().take(MAX_KEY).collect();
        DefinitionError {
            key: format!("{}{short}", self.prefix),
            line: self.lines.get(key).copied().or(self.line),
            problem: problem.into(),
        }
    }

    fn mistyped(&self, key: &str, node: &Node, expected: &str) -> DefinitionError {
        let problem = format!("{} where {expected} is expected", node.value.kind());
        self.wrong(key, problem)
    }

    /// Takes a string, which `check` makes something of.
    pub(super) fn text<T>(
        &mut self,
        key: &str,
        check: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, DefinitionError> {
        let Some(node) = self.rest.remove(key) else {
            return Ok(None);
        };
        let Value::Text(text) = &node.value else {
            return Err(self.mistyped(key, &node, "a string"));
        };
        check(text)
            .map(Some)
            .map_err(|problem| self.wrong(key, problem))
    }

    /// Takes a boolean.
    pub(super) fn boolean(&mut self, key: &str) -> Result<Option<bool>, DefinitionError> {
        match self.rest.remove(key) {
            None => Ok(None),
            Some(Node {
                value: Value::Boolean(value),
                ..
            }) => Ok(Some(value)),
            Some(node) => Err(self.mistyped(key, &node, "a boolean")),
        }
    }

    /// Takes an integer from `least` to `most`.
    pub(super) fn integer(
        &mut self,
        key: &str,
        least: u32,
        most: u32,
    ) -> Result<Option<u32>, DefinitionError> {
        let Some(node) = self.rest.remove(key) else {
            return Ok(None);
        };
        let Value::Integer(value) = node.value else {
            return Err(self.mistyped(key, &node, "an integer"));
        };
        match u32::try_from(value) {
            Ok(value) if (least..=most).contains(&value) => Ok(Some(value)),
            _ => Err(self.wrong(key, format!("{value}: give {least} to {most}"))),
        }
    }

    /// Takes a number of bytes: an integer, or a string with a unit.
    pub(super) fn size(
        &mut self,
        key: &str,
        check: impl FnOnce(&str) -> Result<u64, String>,
    ) -> Result<Option<u64>, DefinitionError> {
        match self.rest.get(key) {
            None => Ok(None),
            Some(Node {
                value: Value::Text(_),
                ..
            }) => self.text(key, check),
            Some(Node {
                value: Value::Integer(bytes),
                ..
            }) => {
                let bytes = *bytes;
                self.rest.remove(key);
                u64::try_from(bytes)
                    .map(Some)
                    .map_err(|_| self.wrong(key, format!("{bytes}: give a number of bytes")))
            }
            Some(node) => Err(self.mistyped(key, node, "an integer or a string")),
        }
    }

    /// Takes a list of dictionaries, which have no other keys than `known` ones.
    pub(super) fn tables(
        &mut self,
        key: &str,
        known: &[&str],
    ) -> Result<Vec<Self>, DefinitionError> {
        let Some(node) = self.rest.remove(key) else {
            return Ok(Vec::new());
        };
        let Value::List(elements) = node.value else {
            return Err(self.mistyped(key, &node, "a list of dictionaries"));
        };
        if elements.len() > MAX_ELEMENTS {
            let problem = format!(
                "{} elements, at most {MAX_ELEMENTS} are possible",
                elements.len()
            );
            return Err(self.wrong(key, problem));
        }
        elements
            .into_iter()
            .enumerate()
            .map(|(at, element)| Self::of(element, &format!("{key}[{at}]"), known))
            .collect()
    }

    /// An error with `problem` if `key` is there.
    pub(super) fn excluded(&self, key: &str, problem: &str) -> Result<(), DefinitionError> {
        match self.rest.get(key) {
            None => Ok(()),
            Some(_) => Err(self.wrong(key, problem)),
        }
    }

    /// An error if `value` is none.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, DefinitionError> {
        value.ok_or_else(|| self.wrong(key, "it must be given"))
    }
}
