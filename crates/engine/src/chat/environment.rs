//! The Jinja environment that transformers gives to chat templates.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

/// Deeper than any real template nests.
const RECURSION: usize = 100;

/// An environment with what `apply_chat_template` offers.
pub(super) fn new<'source>() -> Environment<'source> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_recursion_limit(RECURSION);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", to_json);
    environment
}

/// `{% generation %}` marks the assistant's words for training; it is a tag of transformers' own that writes nothing.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(length) = tag[2..].find("%}") else { break };
        output.push_str(before);
        let (tag, after) = tag.split_at(2 + length + 2);
        let name = tag[2..2 + length]
            .trim_matches(|character: char| matches!(character, '-' | '+') || character.is_whitespace());
        match name {
            "generation" => output.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => output.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => {
                // Only the opening: what looks like this tag's end may stand in a string, with another tag behind it.
                output.push_str("{%");
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = after;
    }
    output.push_str(rest);
    output
}

/// What a template says when it refuses messages.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(words: String) -> Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template raised an exception").with_source(Refusal(words)))
}

/// The words of `raise_exception`, wherever in the chain of errors they are.
pub(super) fn refusal(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Refusal(words)) = error.downcast_ref() {
            return Some(words.clone());
        }
        source = error.source();
    }
    None
}

/// The local time, written as Python's `strftime` does.
fn strftime_now(format: String) -> Result<String, Error> {
    jiff::fmt::strtime::format(&format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// Python's `json.dumps(value, ensure_ascii=False)`: unlike Jinja's own filter it does not escape HTML.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut bytes, PythonFormatter)).map_err(failed)?,
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
        }
    }
    let text = String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(text))
}

/// A space behind commas and colons.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        CompactFormatter.begin_object_value(writer)?;
        writer.write_all(b" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_vanish() {
        let source =
            "a{%- generation -%}b{% endgeneration %}c{% if x == '%}' %}{% generation%}d{%endgeneration %}{% endif %}";
        let cleaned = without_generation_tags(source);
        assert_eq!(cleaned, "a{%- if true -%}b{% endif %}c{% if x == '%}' %}{% if true%}d{%endif %}{% endif %}");
        for unfinished in ["{%", "{% generation", "x{%-", "{%%}", "{%-%}", "{%}", "{%}%}"] {
            assert_eq!(without_generation_tags(unfinished), unfinished);
        }
    }

    #[test]
    fn json_as_python_writes_it() {
        let environment = new();
        let render = |source: &str| environment.render_str(source, ()).unwrap();
        assert_eq!(
            render("{{ {'b': [1, 2.5, none, true], 'a': '<é>&\"'} | tojson }}"),
            r#"{"b": [1, 2.5, null, true], "a": "<é>&\""}"#
        );
        assert_eq!(render("{{ {'b': [1]} | tojson(indent=2) }}"), "{\n  \"b\": [\n    1\n  ]\n}");
        assert_eq!(render("{{ [] | tojson }}{{ {} | tojson }}"), "[]{}");
    }

    #[test]
    fn the_time_is_written_as_asked() {
        let environment = new();
        let text = environment.render_str("{{ strftime_now('%d %b %Y') }}", ()).unwrap();
        assert_eq!(text, jiff::Zoned::now().strftime("%d %b %Y").to_string());
        assert!(environment.render_str("{{ strftime_now('%') }}", ()).is_err());
    }
}
