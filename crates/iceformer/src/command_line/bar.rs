//! A bar on a terminal, with as much beside it as the line has room for.

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Columns of the bar where there is room, and the fewest that it is drawn in.
const BAR: [usize; 2] = [20, 4];
/// Columns of a line where the terminal does not tell.
const COLUMNS: u16 = 80;

/// The bar of one piece of work.
pub struct Bar {
    what: &'static str,
    bar: ProgressBar,
    /// Columns that the bar was last drawn in.
    columns: Option<usize>,
}

impl Bar {
    /// A bar of `what` ("reading") on standard error.
    pub fn new(what: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        Self { what, bar, columns: None }
    }

    /// Shows that `done` of `total` is done; `parts`: what is done, how fast, and the time left.
    pub fn show(&mut self, done: u64, total: u64, parts: &[Option<String>; 3]) {
        let width = Term::stderr().size_checked().map_or(COLUMNS, |(_, columns)| columns);
        // What stands beside bar and text: "reading ", "100 % " and the space behind the bar.
        let taken = self.what.chars().count() + 8;
        let (columns, told) = fitted(usize::from(width).saturating_sub(taken), parts);
        if self.columns != Some(columns) {
            self.columns = Some(columns);
            let bar = if columns > 0 { format!("{{bar:{columns}}} ") } else { String::new() };
            let style = ProgressStyle::with_template(&format!("{} {bar}{{percent:>3}} % {{wide_msg}}", self.what));
            self.bar.set_style(style.expect("the template is well formed"));
        }
        self.bar.set_length(total);
        self.bar.set_message(told);
        self.bar.set_position(done);
    }

    /// Takes the bar off the terminal.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Columns of the bar (0: none) and the text that `room` columns hold: the bar shrinks and goes first, then the rate, then
/// what is done; the time left stays.
fn fitted(room: usize, parts: &[Option<String>; 3]) -> (usize, String) {
    let [done, rate, left] = parts;
    let mut told = String::new();
    for kept in [&[done, rate, left][..], &[done, left], &[left]] {
        told = kept.iter().copied().flatten().map(String::as_str).collect::<Vec<_>>().join(", ");
        let used = told.chars().count();
        if used <= room {
            // One column parts them.
            let columns = (room - used).saturating_sub(1).min(BAR[0]);
            return (if columns < BAR[1] { 0 } else { columns }, told);
        }
    }
    (0, told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_the_last_to_go() {
        let parts = ["12,345 of 17,245 tokens", "1,234 tokens/s", "3 min 20 s left"].map(|part| Some(part.to_owned()));
        // The whole text has 56 columns.
        for (room, columns, told) in [
            (100, 20, "12,345 of 17,245 tokens, 1,234 tokens/s, 3 min 20 s left"),
            (65, 8, "12,345 of 17,245 tokens, 1,234 tokens/s, 3 min 20 s left"),
            (58, 0, "12,345 of 17,245 tokens, 1,234 tokens/s, 3 min 20 s left"),
            (55, 14, "12,345 of 17,245 tokens, 3 min 20 s left"),
            (30, 14, "3 min 20 s left"),
            (5, 0, "3 min 20 s left"),
        ] {
            assert_eq!(fitted(room, &parts), (columns, told.to_owned()), "{room}");
        }
        assert_eq!(fitted(65, &[None, None, None]), (20, String::new()));
    }
}
