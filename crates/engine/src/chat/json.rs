//! JSON as Python's `json.dumps` writes it, which is what transformers gives to chat templates as `tojson`.

use std::collections::BTreeMap;
use std::io::{Result as WriteResult, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// Widest step of indentation.
const WIDEST_INDENT: usize = 16;

/// The filter: `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`. Unlike Jinja's own
/// it does not escape HTML, nor is its result safe from escaping.
pub(super) fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Value> = options.get("separators")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if holds_undefined(&value) {
        return Err(Error::new(ErrorKind::BadSerialization, "tojson: an undefined value is no JSON"));
    }
    let value = if sort_keys == Some(true) { sorted(&value) } else { value };
    let indent = indent.map(|width| " ".repeat(width.min(WIDEST_INDENT)));
    let (between, behind_key) = match &separators {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some(pair) => {
            let part = |index: usize| pair.get_item_by_index(index).ok()?.as_str().map(str::to_owned);
            part(0)
                .zip(part(1))
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "tojson: separators are a pair of strings"))?
        }
    };
    let formatter = PythonFormatter {
        lines: indent.as_ref().map(|indent| PrettyFormatter::with_indent(indent.as_bytes())),
        between: &between,
        behind_key: &behind_key,
        ensure_ascii: ensure_ascii == Some(true),
    };
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
    let text = String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from(text))
}

/// Whether `value` or something in it is undefined, which Python refuses to write.
fn holds_undefined(value: &Value) -> bool {
    let mut items = value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Undefined => true,
        ValueKind::Map => items.any(|key| holds_undefined(&value.get_item(&key).unwrap_or_default())),
        ValueKind::Seq => items.any(|item| holds_undefined(&item)),
        _ => false,
    }
}

/// `value` with the keys of its maps in order, at every depth.
fn sorted(value: &Value) -> Value {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::Map => {
            let ordered: BTreeMap<Value, Value> =
                items().map(|key| (key.clone(), sorted(&value.get_item(&key).unwrap_or_default()))).collect();
            Value::from_pairs(ordered)
        }
        ValueKind::Seq => items().map(|item| sorted(&item)).collect(),
        _ => value.clone(),
    }
}

struct PythonFormatter<'a> {
    /// Where there is an indentation.
    lines: Option<PrettyFormatter<'a>>,
    between: &'a str,
    behind_key: &'a str,
    ensure_ascii: bool,
}

impl PythonFormatter<'_> {
    /// What stands before an element: a separator unless it is the first, and the lines' own.
    fn begin_element<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> WriteResult<()> {
        if !first {
            writer.write_all(self.between.as_bytes())?;
        }
        // As if it were the first: the comma is written.
        self.lines.as_mut().map_or(Ok(()), |lines| lines.begin_array_value(writer, true))
    }
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        match &mut self.lines {
            Some(lines) => lines.begin_array(writer),
            None => CompactFormatter.begin_array(writer),
        }
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        match &mut self.lines {
            Some(lines) => lines.end_array(writer),
            None => CompactFormatter.end_array(writer),
        }
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> WriteResult<()> {
        self.begin_element(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        self.lines.as_mut().map_or(Ok(()), |lines| lines.end_array_value(writer))
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        match &mut self.lines {
            Some(lines) => lines.begin_object(writer),
            None => CompactFormatter.begin_object(writer),
        }
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        match &mut self.lines {
            Some(lines) => lines.end_object(writer),
            None => CompactFormatter.end_object(writer),
        }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> WriteResult<()> {
        self.begin_element(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        writer.write_all(self.behind_key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> WriteResult<()> {
        self.lines.as_mut().map_or(Ok(()), |lines| lines.end_object_value(writer))
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> WriteResult<()> {
        if !self.ensure_ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for character in fragment.chars() {
            match character.is_ascii() {
                true => write!(writer, "{character}")?,
                false => {
                    character.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(writer, "\\u{unit:04x}"))?
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::environment;

    #[test]
    fn json_as_python_writes_it() {
        let environment = environment::new();
        let render = |source: &str| environment.render_str(source, ()).unwrap();
        let cases = [
            ("{'b': [1, 2.5, none, true], 'a': '<é>&\"'} | tojson", r#"{"b": [1, 2.5, null, true], "a": "<é>&\""}"#),
            ("{'b': [1]} | tojson(indent=2)", "{\n  \"b\": [\n    1\n  ]\n}"),
            ("{'b': [1, 2], 'a': {}} | tojson(indent=1)", "{\n \"b\": [\n  1,\n  2\n ],\n \"a\": {}\n}"),
            ("[[], {}] | tojson", "[[], {}]"),
            ("{'b': [1, 2], 'a': 0} | tojson(separators=(',', ':'))", r#"{"b":[1,2],"a":0}"#),
            ("[1, 2] | tojson(indent=2, separators=(' ;', ':'))", "[\n  1 ;\n  2\n]"),
            ("{'b': [{'d': 1, 'c': 2}], 'a': 0} | tojson(sort_keys=true)", r#"{"a": 0, "b": [{"c": 2, "d": 1}]}"#),
            ("'aé🙂' | tojson(ensure_ascii=true)", r#""a\u00e9\ud83d\ude42""#),
            ("'aé🙂' | tojson(ensure_ascii=false)", "\"aé🙂\""),
        ];
        for (expression, expected) in cases {
            assert_eq!(render(&format!("{{{{ {expression} }}}}")), expected, "{expression}");
        }
        let undefined = ["x | tojson", "{'a': x} | tojson", "[{'a': [x]}] | tojson"];
        let unknown = ["[] | tojson(separators=',')", "[] | tojson(separators=(1, 2))", "[] | tojson(width=2)"];
        for wrong in undefined.into_iter().chain(unknown) {
            let rendered = environment.render_str(&format!("{{{{ {wrong} }}}}"), ());
            assert!(rendered.is_err(), "{wrong}");
        }
    }
}
