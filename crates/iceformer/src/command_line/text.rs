//! Numbers as people read them, and input text.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use iceformer_evaluation::{decode, read_limited};

/// `12345` as `12,345`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A rate with three significant digits or grouped thousands.
pub fn rate(value: f64) -> String {
    match value {
        v if v >= 100.0 => grouped(v.round() as u64),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Bytes in binary units.
pub fn bytes(count: u64) -> String {
    let count = count as f64;
    match count {
        c if c >= (1u64 << 30) as f64 => format!("{:.2} GiB", c / (1u64 << 30) as f64),
        c if c >= (1u64 << 20) as f64 => format!("{:.1} MiB", c / (1u64 << 20) as f64),
        c => format!("{:.1} KiB", c / 1024.0),
    }
}

/// Seconds as `8.2 s` or `3 min 20 s`.
pub fn seconds(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1} s");
    }
    let whole = value.round() as u64;
    match whole / 3600 {
        0 => format!("{} min {} s", whole / 60, whole % 60),
        hours => format!("{hours} h {} min", whole / 60 % 60),
    }
}

/// The text of a file, or of standard input for `-`.
pub fn read_text(path: &Path) -> anyhow::Result<String> {
    let (name, bytes) = if path.as_os_str() == "-" {
        ("standard input".to_owned(), read_limited(std::io::stdin().lock()))
    } else {
        (path.display().to_string(), File::open(path).and_then(read_limited))
    };
    let bytes = bytes.with_context(|| name.clone())?;
    decode(bytes).map_err(anyhow::Error::msg).context(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0.5, 12.34, 1234.5].map(rate), ["0.50", "12.3", "1,235"]);
        assert_eq!([512, 3 << 20, 5 << 30].map(bytes), ["0.5 KiB", "3.0 MiB", "5.00 GiB"]);
        assert_eq!([1.25, 200.0, 7260.0].map(seconds), ["1.2 s", "3 min 20 s", "2 h 1 min"]);
    }
}
