//! The Jinja environment that transformers gives to chat templates.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use minijinja_contrib::globals;

use super::{filters, json, methods};

/// Deeper than any real template nests.
const RECURSION: usize = 100;

/// An environment with what `apply_chat_template` offers.
pub(super) fn new<'source>() -> Environment<'source> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_recursion_limit(RECURSION);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_unknown_method_callback(methods::call);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("cycler", |items: Rest<Value>| globals::cycler(items.to_vec()));
    environment.add_function("joiner", globals::joiner);
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("e", filters::escape);
    environment.add_filter("escape", filters::escape);
    environment.add_filter("forceescape", filters::force_escape);
    environment.add_filter("center", filters::center);
    environment.add_filter("default", filters::default);
    environment.add_filter("d", filters::default);
    environment.add_filter("truncate", filters::truncate);
    environment.add_filter("urlencode", filters::url_encode);
    environment.add_filter("wordcount", filters::word_count);
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
    fn the_time_is_written_as_asked() {
        let environment = new();
        let text = environment.render_str("{{ strftime_now('%d %b %Y') }}", ()).unwrap();
        assert_eq!(text, jiff::Zoned::now().strftime("%d %b %Y").to_string());
        assert!(environment.render_str("{{ strftime_now('%') }}", ()).is_err());
    }
}
