//! Line charts as SVG; colours and fonts come from the page, so that it can be light or dark.

use std::fmt::Write;

/// How values are spread along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    Linear,
    Logarithmic,
    /// Logarithmic with a mark at each power of two and some room at both ends.
    Doubling,
}

/// One axis.
pub struct Axis {
    pub label: &'static str,
    pub scale: Scale,
    /// Values that the axis shows at least; `None`: those of the points.
    pub range: Option<(f64, f64)>,
    /// A value as the axis writes it.
    pub format: fn(f64) -> String,
}

/// One line.
pub struct Series {
    pub name: String,
    /// Number of its colour.
    pub color: usize,
    pub dashed: bool,
    /// In the order of the line.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
/// Left, top, right and bottom of the drawing.
const LEFT: f64 = 84.0;
const TOP: f64 = 14.0;
const RIGHT: f64 = WIDTH - 16.0;
const BOTTOM: f64 = HEIGHT - 48.0;
/// Colours that the page has.
pub const COLORS: usize = 8;

/// The chart with its legend below; a sentence where no series has a point that can be drawn.
pub fn chart(x: &Axis, y: &Axis, series: &[Series]) -> String {
    let drawable = |axis: &Axis, value: f64| value.is_finite() && (axis.scale == Scale::Linear || value > 0.0);
    let points = || series.iter().flat_map(|series| &series.points);
    let drawn = || points().filter(|point| drawable(x, point.0) && drawable(y, point.1));
    let (Some(across), Some(up)) =
        (Range::new(x, drawn().map(|point| point.0)), Range::new(y, drawn().map(|point| point.1)))
    else {
        return "<p class=\"none\">Nothing was counted.</p>".into();
    };
    let px = |value: f64| LEFT + across.share(value) * (RIGHT - LEFT);
    let py = |value: f64| BOTTOM - up.share(value) * (BOTTOM - TOP);

    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", escape(y.label));
    for tick in across.ticks() {
        let (at, told) = (px(tick), escape(&(x.format)(tick)));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{BOTTOM}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{told}</text>",
            BOTTOM + 17.0
        );
    }
    for tick in up.ticks() {
        let (at, told) = (py(tick), escape(&(y.format)(tick)));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{told}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    let middle = f64::midpoint(TOP, BOTTOM);
    let _ = write!(
        svg,
        "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"label\" transform=\"translate(16 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        f64::midpoint(LEFT, RIGHT),
        HEIGHT - 10.0,
        escape(x.label),
        escape(y.label)
    );
    for line in series {
        let at: Vec<(f64, f64)> =
            line.points.iter().filter(|point| drawable(x, point.0) && drawable(y, point.1)).copied().collect();
        let path: Vec<String> = at.iter().map(|&(a, b)| format!("{:.1},{:.1}", px(a), py(b))).collect();
        let (color, dashes) = (line.color % COLORS, if line.dashed { " dashed" } else { "" });
        let _ = write!(svg, "<polyline class=\"line c{color}{dashes}\" points=\"{}\"/>", path.join(" "));
        for (a, b) in at {
            let _ = write!(
                svg,
                "<circle class=\"dot c{color}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>{}: {}, {}</title></circle>",
                px(a),
                py(b),
                escape(&line.name),
                escape(&(x.format)(a)),
                escape(&(y.format)(b))
            );
        }
    }
    svg += "</svg><ul class=\"legend\">";
    for line in series {
        let (color, dashes) = (line.color % COLORS, if line.dashed { " dashed" } else { "" });
        let _ = write!(
            svg,
            "<li><svg viewBox=\"0 0 28 10\" aria-hidden=\"true\"><line class=\"line c{color}{dashes}\" x1=\"1\" y1=\"5\" \
             x2=\"27\" y2=\"5\"/></svg>{}</li>",
            escape(&line.name)
        );
    }
    svg + "</ul>"
}

/// What an axis spans.
struct Range {
    least: f64,
    most: f64,
    scale: Scale,
}

impl Range {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>) -> Option<Self> {
        let (mut least, mut most) = axis.range.unwrap_or((f64::INFINITY, f64::NEG_INFINITY));
        let mut any = false;
        for value in values {
            (least, most, any) = (least.min(value), most.max(value), true);
        }
        if !any {
            return None;
        }
        // A single value needs room around it.
        if most - least <= 1e-9 * most.abs() {
            match axis.scale {
                Scale::Logarithmic | Scale::Doubling => (least, most) = (least / 1.5, most * 1.5),
                Scale::Linear => {
                    (least, most) = (least - 0.5 * least.abs().max(1e-3), most + 0.5 * most.abs().max(1e-3))
                }
            }
        }
        if axis.scale == Scale::Doubling {
            (least, most) = (least / 1.05, most * 1.05);
        }
        Some(Self { least, most, scale: axis.scale })
    }

    /// Where a value lies, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.least) / (self.most - self.least),
            Scale::Logarithmic | Scale::Doubling => (value / self.least).ln() / (self.most / self.least).ln(),
        }
    }

    /// Round values within the range.
    fn ticks(&self) -> Vec<f64> {
        let inside = |tick: &f64| *tick >= self.least * (1.0 - 1e-9) - 1e-12 && *tick <= self.most * (1.0 + 1e-9);
        match self.scale {
            Scale::Linear => {
                let rough = (self.most - self.least) / 5.0;
                let decade = 10f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * decade).find(|&s| s >= rough).unwrap_or(rough);
                let first = (self.least / step).ceil() as i64;
                let last = (self.most / step + 1e-9).floor() as i64;
                (first..=last).map(|index| index as f64 * step).filter(inside).collect()
            }
            Scale::Doubling => {
                let powers = (self.least.log2().ceil() as i32)..=(self.most.log2().floor() as i32);
                powers.map(|power| 2f64.powi(power)).collect()
            }
            Scale::Logarithmic => {
                let decades = (self.least.log10().floor() as i32)..=(self.most.log10().ceil() as i32);
                let of = |steps: &[f64]| -> Vec<f64> {
                    let all =
                        decades.clone().flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
                    all.filter(inside).collect()
                };
                let (coarse, fine) = (of(&[1.0]), of(&[1.0, 2.0, 5.0]));
                match (coarse.len(), fine.len()) {
                    (4.., _) | (_, 11..) => coarse,
                    (_, 3..) => fine,
                    // A range of less than a decade: as if it were linear.
                    _ => Self { scale: Scale::Linear, ..*self }.ticks(),
                }
            }
        }
    }
}

/// Text as HTML and SVG take it.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(scale: Scale) -> Axis {
        Axis { label: "x", scale, range: None, format: |value| format!("{value:.4}") }
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let ticks = |scale, values: &[f64]| Range::new(&axis(scale), values.iter().copied()).unwrap().ticks();
        assert_eq!(ticks(Scale::Linear, &[0.0, 1.0]).len(), 6);
        assert_eq!(ticks(Scale::Logarithmic, &[1000.0, 40_000.0]), [1e3, 2e3, 5e3, 1e4, 2e4]);
        assert_eq!(ticks(Scale::Logarithmic, &[1e-6, 1.0]).len(), 7);
        assert_eq!(ticks(Scale::Doubling, &[2030.0, 8180.0]), [2048.0, 4096.0, 8192.0]);
        let narrow: Vec<f64> =
            ticks(Scale::Logarithmic, &[0.65, 1.25]).iter().map(|tick| (tick * 10.0).round()).collect();
        assert_eq!(narrow, [8.0, 10.0, 12.0]);
        for values in [&[3.0][..], &[0.0], &[1e-12, 1e-12], &[4096.0]] {
            assert!(ticks(Scale::Linear, values).len() < 20);
            assert!(values[0] == 0.0 || ticks(Scale::Logarithmic, values).len() < 20);
        }
    }

    #[test]
    fn what_cannot_be_drawn_is_left_out() {
        let series = |points| [Series { name: "a<b".into(), color: 0, dashed: false, points }];
        let drawn = chart(
            &axis(Scale::Logarithmic),
            &axis(Scale::Linear),
            &series(vec![(1.0, 2.0), (0.0, 1.0), (2.0, f64::NAN)]),
        );
        assert_eq!(drawn.matches("<circle").count(), 1);
        assert!(drawn.contains("a&lt;b") && !drawn.contains("NaN"));
        let none = chart(&axis(Scale::Linear), &axis(Scale::Linear), &series(vec![]));
        assert!(none.contains("Nothing was counted"));
    }
}
