//! Filters of Jinja that the library lacks or writes otherwise.

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, State, Value};

use super::methods::justified;

/// `escape` and `e`: what is marked as safe stays.
pub(super) fn escape(value: Value) -> Value {
    if value.is_safe() { value } else { force_escape(value) }
}

/// The library's own writes quotes otherwise, and slashes too.
pub(super) fn force_escape(value: Value) -> Value {
    let text = value.to_string();
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            other => escaped.push(other),
        }
    }
    Value::from_safe_string(escaped)
}

pub(super) fn center(state: &State<'_, '_>, value: Value, width: Option<usize>) -> Result<String, Error> {
    justified(state, &value.to_string(), "center", width.unwrap_or(80), ' ')
}

/// `default(value, default_value='', boolean=False)`; the library's own takes no names.
pub(super) fn default(
    state: &State<'_, '_>,
    value: Value,
    other: Option<Value>,
    lax: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let other = other.or(options.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let lax = lax.or(options.get("boolean")?).unwrap_or_else(|| Value::from(false));
    options.assert_all_used()?;
    minijinja::filters::default(state, &value, Rest(vec![other, lax]))
}

/// `truncate(length=255, killwords=false, end='...', leeway=5)`, the last by its name.
pub(super) fn truncate(
    text: &str,
    length: Option<usize>,
    cuts_words: Option<bool>,
    end: Option<&str>,
    options: Kwargs,
) -> Result<String, Error> {
    let length = length.or(options.get("length")?).unwrap_or(255);
    let cuts_words = cuts_words.or(options.get("killwords")?).unwrap_or(false);
    let end = end.or(options.get("end")?).unwrap_or("...");
    let leeway = options.get::<Option<usize>>("leeway")?.unwrap_or(5);
    options.assert_all_used()?;
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(Error::new(ErrorKind::InvalidOperation, "truncate: the length is below that of the end"));
    };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let kept: String = text.chars().take(kept).collect();
    let kept = if cuts_words { kept.as_str() } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words) };
    Ok(format!("{kept}{end}"))
}

/// A part of a URL; slashes stay.
pub(super) fn url_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte.is_ascii_alphanumeric() || b"_.-~/".contains(&byte) {
            true => encoded.push(char::from(byte)),
            false => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

/// Runs of letters, digits and underscores.
pub(super) fn word_count(text: &str) -> usize {
    let is_between = |character: char| !(character.is_alphanumeric() || character == '_');
    text.split(is_between).filter(|word| !word.is_empty()).count()
}

#[cfg(test)]
mod tests {
    use super::super::environment;

    #[test]
    fn filters_as_in_jinja() {
        let environment = environment::new();
        for (expression, expected) in [
            (r#""<a href='x/y'>&\"" | e"#, "&lt;a href=&#39;x/y&#39;&gt;&amp;&#34;"),
            ("'<' | safe | e", "<"),
            ("'<' | safe | forceescape", "&lt;"),
            ("'<' | e | escape", "&lt;"),
            ("['a'] | tojson | e", "[&#34;a&#34;]"),
            ("'ab' | center(5) ~ '|'", "  ab |"),
            ("x | default ~ x | d('y') ~ '' | default('y') ~ '' | default('z', true) ~ 0 | d('1', false)", "yz0"),
            ("x | default(default_value='x') ~ '' | default('y', boolean=true) ~ 'w' | d('z', boolean=true)", "xyw"),
            ("'one two three' | truncate(9, leeway=0)", "one..."),
            ("'one two three' | truncate(9, true, '…', leeway=0)", "one two …"),
            ("'one two three' | truncate(length=9)", "one two three"),
            ("'a b/é~?' | urlencode", "a%20b/%C3%A9~%3F"),
            ("'It is, é_1: well-known' | wordcount", "5"),
            ("range(5) | map('string') | join(joiner('-')())", "01234"),
        ] {
            let rendered = environment.render_str(&format!("{{{{ {expression} }}}}"), ());
            assert_eq!(rendered.unwrap(), expected, "{expression}");
        }
        let source = "{% set row = cycler('a', 'b') %}{% set comma = joiner(', ') %}\
            {% for x in range(3) %}{{ comma() }}{{ row.next() }}{% endfor %}";
        assert_eq!(environment.render_str(source, ()).unwrap(), "a, b, a");
        assert!(environment.render_str("{{ 'abc' | truncate(2) }}", ()).is_err());
    }
}
