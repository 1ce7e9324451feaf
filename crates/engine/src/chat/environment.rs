//! The Jinja environment that transformers gives to chat templates.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat;

use super::json;

/// Deeper than any real template nests.
const RECURSION: usize = 100;

/// An environment with what `apply_chat_template` offers.
pub(super) fn new<'source>() -> Environment<'source> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_recursion_limit(RECURSION);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", json::to_json);
    environment.add_test("sequence", is_sequence);
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

/// Methods of Python's values: those of `pycompat`, and a few of its strings that it lacks.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, name, arguments);
    };
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            if separator.is_empty() {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let (parts, whole) = match name {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            let parts = parts.map_or(whole, |(before, after)| [before, separator, after]);
            Ok(parts.into_iter().map(Value::from).collect())
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
            let most =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<Value> = match separator {
                Some("") => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
                Some(separator) => text.rsplitn(most, separator).map(Value::from).collect(),
                None => rsplit_whitespace(text, most).map(Value::from).collect(),
            };
            parts.reverse();
            Ok(parts.into())
        }
        _ => pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// The words of a text from its end, at most `most`; the last of so many is all that is left.
fn rsplit_whitespace(text: &str, most: usize) -> impl Iterator<Item = &str> {
    let (mut rest, mut left) = (text, most);
    std::iter::from_fn(move || {
        rest = rest.trim_end();
        if rest.is_empty() {
            return None;
        }
        left -= 1;
        let start = match left {
            0 => 0,
            _ => rest
                .char_indices()
                .rfind(|(_, character)| character.is_whitespace())
                .map_or(0, |(at, character)| at + character.len_utf8()),
        };
        let word = &rest[start..];
        rest = &rest[..start];
        Some(word)
    })
}

/// Jinja's: what has a length and is indexed, strings and maps as well.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Bytes)
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
    fn strings_as_in_python() {
        let environment = new();
        for (expression, expected) in [
            ("'ab'.removeprefix('a')", "b"),
            ("'ab'.removeprefix('b')", "ab"),
            ("'ab'.removesuffix('b')", "a"),
            ("'a=b=c'.partition('=') | tojson", r#"["a", "=", "b=c"]"#),
            ("'a=b=c'.rpartition('=') | tojson", r#"["a=b", "=", "c"]"#),
            ("'abc'.partition('=') | tojson", r#"["abc", "", ""]"#),
            ("'abc'.rpartition('=') | tojson", r#"["", "", "abc"]"#),
            ("'a,b,c'.rsplit(',') | tojson", r#"["a", "b", "c"]"#),
            ("'a,b,c'.rsplit(',', 1) | tojson", r#"["a,b", "c"]"#),
            ("'a,b,c'.rsplit(',', -1) | tojson", r#"["a", "b", "c"]"#),
            ("'  a  b c '.rsplit() | tojson", r#"["a", "b", "c"]"#),
            ("'  a  b c '.rsplit(none, 1) | tojson", r#"["  a  b", "c"]"#),
            ("'  a  b c '.rsplit(none, 0) | tojson", r#"["  a  b c"]"#),
            ("'a b'.split() | tojson", r#"["a", "b"]"#),
            ("('a' is sequence, [] is sequence, {} is sequence, 1 is sequence) | tojson", "[true, true, true, false]"),
        ] {
            assert_eq!(
                environment.render_str(&format!("{{{{ {expression} }}}}"), ()).unwrap(),
                expected,
                "{expression}"
            );
        }
        assert!(environment.render_str("{{ 'a'.rsplit('') }}{{ 'a'.partition('') }}", ()).is_err());
    }

    #[test]
    fn the_time_is_written_as_asked() {
        let environment = new();
        let text = environment.render_str("{{ strftime_now('%d %b %Y') }}", ()).unwrap();
        assert_eq!(text, jiff::Zoned::now().strftime("%d %b %Y").to_string());
        assert!(environment.render_str("{{ strftime_now('%') }}", ()).is_err());
    }
}
