//! Shares by layer and head as SVG.

use std::fmt::Write;

const LEFT: f64 = 34.0;
const TOP: f64 = 20.0;
const WIDTH: f64 = 640.0;
/// Smallest width of a cell that its percentage fits in.
const READABLE: f64 = 34.0;

/// A cell for each layer (down) and head (across), the darker the more; `shares` is `[layers][heads]`.
pub fn heat_map(shares: &[Vec<f64>]) -> String {
    let heads = shares.iter().map(Vec::len).max().unwrap_or(0);
    if heads == 0 {
        return "<p class=\"none\">Nothing was counted.</p>".into();
    }
    let cell = ((WIDTH - LEFT) / heads as f64).min(64.0);
    let height = cell.clamp(14.0, 26.0);
    let (width, bottom) = (LEFT + cell * heads as f64, TOP + height * shares.len() as f64);
    // Small maps are not blown up to the width of the page.
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width:.1} {bottom:.1}\" style=\"max-width: {width:.0}px\" role=\"img\" \
         aria-label=\"kept share by layer and head\">"
    );
    let every = (heads as f64 * 22.0 / (WIDTH - LEFT)).ceil().max(1.0) as usize;
    for head in (0..heads).step_by(every) {
        let x = LEFT + cell * (head as f64 + 0.5);
        let _ = write!(svg, "<text class=\"tick\" x=\"{x:.1}\" y=\"14\" text-anchor=\"middle\">{head}</text>");
    }
    for (layer, row) in shares.iter().enumerate() {
        let y = TOP + height * layer as f64;
        let middle = y + height / 2.0 + 4.0;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{layer}</text>",
            LEFT - 8.0
        );
        for (head, &share) in row.iter().enumerate() {
            let x = LEFT + cell * head as f64;
            // Text stays readable on the darkest cell.
            let opacity = 0.85 * share.clamp(0.0, 1.0);
            let _ = write!(
                svg,
                "<rect class=\"heat\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{cell:.1}\" height=\"{height:.1}\" \
                 fill-opacity=\"{opacity:.3}\"><title>layer {layer}, head {head}: {:.2} %</title></rect>",
                100.0 * share
            );
            if cell >= READABLE {
                let _ = write!(
                    svg,
                    "<text class=\"cell\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"middle\">{:.1}</text>",
                    x + cell / 2.0,
                    100.0 * share
                );
            }
        }
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::heat_map;

    #[test]
    fn every_head_has_a_cell() {
        let drawn = heat_map(&[vec![0.5; 3], vec![1.0; 3]]);
        assert_eq!((drawn.matches("<rect").count(), drawn.matches("layer 1, head 2: 100.00 %").count()), (6, 1));
        assert!(heat_map(&[]).contains("Nothing"));
        assert_eq!(heat_map(&vec![vec![0.1; 64]; 80]).matches("<rect").count(), 64 * 80);
    }
}
