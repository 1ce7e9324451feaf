//! Text from model files, made safe to print in a one-line message.

/// `text` in quotes, control characters escaped, shortened to about 60 characters: names in a hostile file may hold
/// line breaks or be very long.
pub(crate) fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    let mut shown = String::from("\"");
    for (index, character) in text.chars().enumerate() {
        if index == SHOWN {
            shown.push('…');
            break;
        }
        shown.extend(character.escape_debug());
    }
    shown.push('"');
    shown
}

/// `text` with control characters escaped, for names that are shown as they are.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let escaped = character.is_control().then(|| character.escape_debug());
            let plain = (!character.is_control()).then_some(character);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}
