//! Methods of Python's values: those of `pycompat`, and those of strings that it lacks.

use minijinja::value::from_args;
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Calls method `name` of `value`.
pub(super) fn call(state: &mut State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
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
        "center" | "ljust" | "rjust" => {
            let (width, fill): (usize, Option<&str>) = from_args(arguments)?;
            let mut fill = fill.unwrap_or(" ").chars();
            match (fill.next(), fill.next()) {
                (Some(fill), None) => Ok(justified(state, text, name, width, fill)?.into()),
                _ => Err(Error::new(ErrorKind::InvalidOperation, "expected one character to fill with")),
            }
        }
        "zfill" => {
            let (width,): (usize,) = from_args(arguments)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let number = justified(state, digits, "rjust", width.saturating_sub(sign.len()), '0')?;
            Ok(format!("{sign}{number}").into())
        }
        "index" => match pycompat::unknown_method_callback(state, value, "find", arguments)? {
            place if place.as_i64() == Some(-1) => {
                Err(Error::new(ErrorKind::InvalidOperation, "index: no such part of the string"))
            }
            place => Ok(place),
        },
        "swapcase" => {
            let () = from_args(arguments)?;
            let swapped = |character: char| match character.is_uppercase() {
                true => character.to_lowercase().collect::<String>(),
                false => character.to_uppercase().collect(),
            };
            Ok(text.chars().map(swapped).collect::<String>().into())
        }
        "expandtabs" => {
            let (width,): (Option<usize>,) = from_args(arguments)?;
            let width = width.unwrap_or(8);
            state.consume_fuel(fuel_for(text.matches('\t').count().saturating_mul(width)))?;
            Ok(expanded_tabs(text, width).into())
        }
        "format" => {
            state.consume_fuel(fuel_for(numbers_in_fields(text)))?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
        _ => pycompat::unknown_method_callback(state, value, name, arguments),
    }
}

/// The numbers in the replacement fields of a format string added up: no widths and precisions are larger together.
fn numbers_in_fields(format: &str) -> usize {
    let (mut sum, mut number, mut is_field) = (0_usize, 0_usize, false);
    let mut bytes = format.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'{' if !is_field && bytes.next_if_eq(&b'{').is_some() => {}
            b'{' => is_field = true,
            b'0'..=b'9' if is_field => number = number.saturating_mul(10).saturating_add(usize::from(byte - b'0')),
            _ => {
                sum = sum.saturating_add(std::mem::take(&mut number));
                is_field &= byte != b'}';
            }
        }
    }
    sum
}

/// What so many bytes cost before they are made; the library takes it only for results that are there.
fn fuel_for(bytes: usize) -> u64 {
    (bytes / 64) as u64
}

/// `text`, filled up to `width` characters as Python's method `name` does.
pub(super) fn justified(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    width: usize,
    fill: char,
) -> Result<String, Error> {
    let missing = width.saturating_sub(text.chars().count());
    state.consume_fuel(fuel_for(missing.saturating_mul(fill.len_utf8())))?;
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // Python puts the odd one left where the width is odd.
        _ => missing / 2 + (missing & width & 1),
    };
    let fill = |count| std::iter::repeat_n(fill, count);
    Ok(fill(left).chain(text.chars()).chain(fill(missing - left)).collect())
}

fn expanded_tabs(text: &str, width: usize) -> String {
    let (mut expanded, mut column) = (String::with_capacity(text.len()), 0);
    for character in text.chars() {
        match character {
            '\t' => {
                let spaces = if width == 0 { 0 } else { width - column % width };
                expanded.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            _ => {
                expanded.push(character);
                column = if matches!(character, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    expanded
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

#[cfg(test)]
mod tests {
    use super::super::environment;

    #[test]
    fn strings_as_in_python() {
        let environment = environment::new();
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
            (
                "'ab'.center(5) ~ '|' ~ 'ab'.center(4, '*') ~ 'abc'.center(6, '-') ~ 'abc'.center(2)",
                "  ab |*ab*-abc--abc",
            ),
            ("'ab'.ljust(4) ~ '|' ~ 'é'.rjust(3, '🙂')", "ab  |🙂🙂é"),
            ("'ab'.zfill(4) ~ ' ' ~ '-5'.zfill(4) ~ ' ' ~ '+5'.zfill(1) ~ ' ' ~ '--5'.zfill(5)", "00ab -005 +5 -00-5"),
            ("'{:03d}|{:>4}|{{20251129000000}}'.format(7, 'a')", "007|   a|{20251129000000}"),
            ("'aéb'.index('b')", "2"),
            ("'Straße É'.swapcase()", "sTRASSE é"),
            (
                "'a\\tb\\n\\tc'.expandtabs(4) ~ '|' ~ '\\t'.expandtabs() ~ '|' ~ 'a\\tb'.expandtabs(0)",
                "a   b\n    c|        |ab",
            ),
            ("('a' is sequence, [] is sequence, {} is sequence, 1 is sequence) | tojson", "[true, true, true, false]"),
        ] {
            assert_eq!(
                environment.render_str(&format!("{{{{ {expression} }}}}"), ()).unwrap(),
                expected,
                "{expression}"
            );
        }
        for wrong in
            ["'a'.rsplit('')", "'a'.partition('')", "'a'.index('b')", "'a'.center(3, '')", "'a'.ljust(3, 'ab')"]
        {
            assert!(environment.render_str(&format!("{{{{ {wrong} }}}}"), ()).is_err(), "{wrong}");
        }
    }
}
