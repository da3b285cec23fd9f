//! A definition in a TOML file.
//!
//! It is passed on to the broker as it is: which keys there are and what they may be is known
//! there alone. What the broker refuses it names by its key (`disk[0].path: …`), and that key's
//! line is shown.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use api::Dictionary;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use zbus::{OwnedVariant, Variant};

use crate::error::{Failure, Result};

/// A file that was read.
#[derive(Debug)]
pub struct DefinitionFile {
    path: PathBuf,
    text: String,
}

impl DefinitionFile {
    /// The file at `path`, which holds `text`.
    pub fn new(path: &Path, text: String) -> Self {
        Self {
            path: path.into(),
            text,
        }
    }

    /// As the broker takes it.
    ///
    /// # Errors
    /// It is no TOML, or has a value that is of no use in a definition.
    pub fn dictionary(&self) -> Result<Dictionary> {
        let (values, _) = self.parse()?;
        let owned = |(key, value): (String, Variant<'static>)| {
            // Only descriptors can fail to become owned, and there are none here.
            Some((key, OwnedVariant::try_from(value).ok()?))
        };
        Ok(values.into_iter().filter_map(owned).collect())
    }

    /// A mistake that the broker found.
    pub fn mistake(&self, problem: String) -> Failure {
        let lines = self.parse().map(|(_, lines)| lines).unwrap_or_default();
        let key = problem.split(": ").next().unwrap_or_default();
        // A key that is missing has no line, but the table in which it is missing has.
        let above = std::iter::successors(Some(key), |key| {
            let end = key.rfind(['.', '['])?;
            key.get(..end)
        });
        let line = above.filter_map(|key| lines.get(key).copied()).next();
        self.failure(problem, line)
    }

    /// The values, and the line of each key.
    fn parse(&self) -> Result<(HashMap<String, Variant<'static>>, BTreeMap<String, usize>)> {
        let table = DeTable::parse(&self.text).map_err(|error| {
            let line = error.span().map(|span| self.line_of(&span));
            self.failure(error.message().to_owned(), line)
        })?;
        let mut lines = BTreeMap::new();
        let values = self.table(table.into_inner(), "", &mut lines)?;
        Ok((values, lines))
    }

    fn table(
        &self,
        table: DeTable<'_>,
        above: &str,
        lines: &mut BTreeMap<String, usize>,
    ) -> Result<HashMap<String, Variant<'static>>> {
        let mut values = HashMap::new();
        for (key, value) in table {
            let key = key.into_inner().into_owned();
            let path = match above {
                "" => key.clone(),
                above => format!("{above}.{key}"),
            };
            values.insert(key, self.value(value, path, lines)?);
        }
        Ok(values)
    }

    fn value(
        &self,
        value: Spanned<DeValue<'_>>,
        path: String,
        lines: &mut BTreeMap<String, usize>,
    ) -> Result<Variant<'static>> {
        let line = self.line_of(&value.span());
        let useless = |what: String| self.failure(format!("{path}: {what}"), Some(line));
        let variant = match value.into_inner() {
            DeValue::String(text) => text.into_owned().into(),
            DeValue::Boolean(flag) => flag.into(),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map_err(|_| useless(format!("{number} is too large")))?
                .into(),
            DeValue::Float(number) => {
                return Err(useless(format!(
                    "{number} is a fraction, which is of no use here"
                )));
            }
            DeValue::Datetime(time) => {
                return Err(useless(format!(
                    "{time} is a time, which is of no use here"
                )));
            }
            DeValue::Table(table) => self.table(table, &path, lines)?.into(),
            DeValue::Array(list) => {
                let mut tables = Vec::new();
                for (at, element) in list.into_iter().enumerate() {
                    let path = format!("{path}[{at}]");
                    let line = self.line_of(&element.span());
                    let DeValue::Table(table) = element.into_inner() else {
                        let what = format!("{path}: give a table, as {{ key = value }}");
                        return Err(self.failure(what, Some(line)));
                    };
                    tables.push(self.table(table, &path, lines)?);
                    lines.insert(path, line);
                }
                tables.into()
            }
        };
        lines.insert(path, line);
        Ok(variant)
    }

    /// The line on which `span` begins, from 1.
    fn line_of(&self, span: &Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn failure(&self, problem: String, line: Option<usize>) -> Failure {
        let path = self.path.display();
        let shown =
            line.and_then(|line| Some((line, self.text.lines().nth(line.checked_sub(1)?)?)));
        Failure::Definition {
            of: line.map_or_else(|| path.to_string(), |line| format!("{path}:{line}")),
            problem,
            excerpt: shown.map(|(line, text)| {
                let gap = " ".repeat(line.to_string().len());
                format!("{gap} |\n{line} | {text}\n{gap} |")
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::json_object;

    fn file(text: &str) -> DefinitionFile {
        DefinitionFile::new(Path::new("web.toml"), text.into())
    }

    const TEXT: &str = "\
kernel = \"/k\"
memory = \"1G\"
vcpus = 2

[[disk]]
path = \"/a\"
read-only = true

[[disk]]
paht = \"/b\"
";

    #[test]
    fn a_file_is_passed_on_as_it_is() {
        let definition = file(TEXT).dictionary().unwrap();
        let expected = serde_json::json!({
            "kernel": "/k", "memory": "1G", "vcpus": 2,
            "disk": [{"path": "/a", "read-only": true}, {"paht": "/b"}],
        });
        assert_eq!(json_object(&definition), expected);
        let signature = definition["disk"].value_signature().to_string();
        assert_eq!(signature, "aa{sv}");
    }

    #[test]
    fn what_the_broker_refuses_is_shown_with_its_line() {
        for (problem, shown) in [
            (
                "disk[1].paht: there is no such key",
                "web.toml:10: disk[1].paht: there is no such key\n   |\n10 | paht = \"/b\"\n   |",
            ),
            (
                "disk[1].path: it must be given",
                "web.toml:9: disk[1].path: it must be given\n  |\n9 | [[disk]]\n  |",
            ),
            (
                "memory: too much",
                "web.toml:2: memory: too much\n  |\n2 | memory = \"1G\"\n  |",
            ),
            (
                "initrd: it must be given",
                "web.toml: initrd: it must be given",
            ),
        ] {
            assert_eq!(file(TEXT).mistake(problem.into()).to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_definition_is_refused_here() {
        for (text, line, word) in [
            ("a = 1\nb = \n", 2, "b = "),
            ("a = 1.5", 1, "fraction"),
            ("\nday = 2020-01-01", 2, "time"),
            ("disk = [\n 3 ]", 2, "give a table"),
            ("a = 99999999999999999999", 1, "too large"),
        ] {
            let failure = file(text).dictionary().unwrap_err();
            assert_eq!(failure.status(), crate::error::status::REFUSED, "{text}");
            let shown = failure.to_string();
            assert!(shown.starts_with(&format!("web.toml:{line}: ")), "{shown}");
            assert!(shown.contains(word), "{shown}");
        }
    }
}
