//! Stop strings, found in a text that comes in pieces.

/// Looks for stop strings in streamed text and holds back what may be the start of one.
///
/// ```
/// # use iceformer_engine::StopStrings;
/// let mut stop = StopStrings::new(["\nUser:"]);
/// assert_eq!(stop.push("Hello\nUs").text, "Hello");
/// let end = stop.push("er: hi");
/// assert!(end.stopped && end.text.is_empty());
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
    stopped: bool,
}

/// What a piece of text released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Text that can be shown: it holds no stop string and is not the start of one.
    pub text: String,
    /// Whether a stop string was found; it and everything after it are gone.
    pub stopped: bool,
}

impl StopStrings {
    /// Stops at the first place where any of `strings` occurs; empty strings are ignored.
    pub fn new<S: Into<String>>(strings: impl IntoIterator<Item = S>) -> Self {
        let strings = strings.into_iter().map(Into::into).filter(|string: &String| !string.is_empty()).collect();
        Self { strings, held: String::new(), stopped: false }
    }

    /// Takes the next piece and gives what can be shown. After a stop everything is dropped.
    pub fn push(&mut self, piece: &str) -> Stopped {
        if self.stopped {
            return Stopped { text: String::new(), stopped: true };
        }
        self.held.push_str(piece);
        if let Some(position) = self.strings.iter().filter_map(|string| self.held.find(string.as_str())).min() {
            self.stopped = true;
            self.held.truncate(position);
            return Stopped { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.strings.iter().map(|string| longest_start_at_end(&self.held, string)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Stopped { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Gives what was held back, once no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are a proper start of `string`.
fn longest_start_at_end(text: &str, string: &str) -> usize {
    (1..string.len().min(text.len() + 1))
        .rev()
        .find(|&length| string.is_char_boundary(length) && text.as_bytes().ends_with(&string.as_bytes()[..length]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn earliest_stop_wins_and_nothing_follows() {
        let mut stop = StopStrings::new(["bc", "abcd", ""]);
        assert_eq!(stop.push("xxa"), Stopped { text: "xx".into(), stopped: false });
        assert_eq!(stop.push("bc"), Stopped { text: "a".into(), stopped: true });
        assert_eq!(stop.push("more"), Stopped { text: String::new(), stopped: true });
    }

    #[test]
    fn held_text_is_released_at_the_end() {
        let mut stop = StopStrings::new(["</end>"]);
        assert_eq!(stop.push("a</en").text, "a");
        assert_eq!(stop.finish(), "</en");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,30}", stop in "[abé]{1,4}", cut in 1usize..5) {
            let mut matcher = StopStrings::new([stop.clone()]);
            let mut shown = String::new();
            let characters: Vec<char> = text.chars().collect();
            for piece in characters.chunks(cut) {
                shown += &matcher.push(&piece.iter().collect::<String>()).text;
            }
            shown += &matcher.finish();
            let expected = text.find(&stop).map_or(text.as_str(), |position| &text[..position]);
            prop_assert_eq!(shown, expected);
        }
    }
}
