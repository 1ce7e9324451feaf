//! What is shown while a model is loaded and a prompt is read: a bar on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::bar::Bar;
use super::text::{grouped, rate, seconds};

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// Seconds that work may take without a bar.
const BAR_AFTER: f64 = 0.3;

/// Seconds between two steps that the estimate of the time left knows.
const STEP_EVERY: f64 = 0.1;

/// Progress of one piece of work.
pub struct Progress {
    what: &'static str,
    unit: &'static str,
    start: Instant,
    display: Display,
    /// `(done, seconds)` of each step.
    steps: Vec<(f64, f64)>,
    /// Done, and the whole, as last told.
    last: Option<(usize, usize)>,
}

enum Display {
    Bar(Bar),
    Lines(Instant),
    Quiet,
}

impl Progress {
    /// Shows `what` ("reading") counted in `unit` ("tokens"), unless `quiet`.
    pub fn new(what: &'static str, unit: &'static str, quiet: bool) -> Self {
        let start = Instant::now();
        let display = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Display::Quiet,
            (false, true) => Display::Bar(Bar::new(what)),
            (false, false) => Display::Lines(start),
        };
        Self { what, unit, start, display, steps: Vec::new(), last: None }
    }

    /// Shows that `done` of `total` is done.
    pub fn update(&mut self, done: usize, total: usize) {
        let elapsed = self.start.elapsed().as_secs_f64();
        let is_new = self.steps.last().is_none_or(|&(_, at)| elapsed - at >= STEP_EVERY);
        if done > 0 && (is_new || done == total) {
            self.steps.push((done as f64, elapsed));
        }
        self.last = Some((done, total));
        if matches!(self.display, Display::Bar(_)) && elapsed < BAR_AFTER {
            return;
        }
        let count = format!("{} of {} {}", grouped(done as u64), grouped(total as u64), self.unit);
        let has_rate = self.unit == "tokens" && done > 0 && elapsed > 0.0;
        let per_second = has_rate.then(|| format!("{} tokens/s", rate(done as f64 / elapsed)));
        let left = || format!("{} left", seconds((self.time_at(total as f64) - elapsed).max(0.0)));
        let left = (done > 0 && done < total).then(left);
        self.show(done as u64, total as u64, [Some(count), per_second, left]);
    }

    /// Shows that a share of the work is done, of work whose parts have nothing in common to count.
    pub fn update_share(&mut self, share: f64) {
        let elapsed = self.start.elapsed().as_secs_f64();
        if matches!(self.display, Display::Bar(_)) && elapsed < BAR_AFTER {
            return;
        }
        let is_line = matches!(self.display, Display::Lines(_));
        let percent = (share > 0.0 && is_line).then(|| format!("{:.0} %", 100.0 * share));
        let left = (share > 0.0).then(|| format!("{} left", seconds(elapsed * (1.0 - share) / share)));
        self.show((share * 1000.0) as u64, 1000, [percent, None, left]);
    }

    /// Notes that `done` of `total` are done, which is told where the work is stopped.
    pub fn count(&mut self, done: usize, total: usize) {
        self.last = Some((done, total));
    }

    /// `parts`: what is done, how fast, and the time left.
    fn show(&mut self, done: u64, total: u64, parts: [Option<String>; 3]) {
        match &mut self.display {
            Display::Quiet => {}
            Display::Bar(bar) => bar.show(done, total, &parts),
            Display::Lines(last) if last.elapsed() >= LINE_EVERY => {
                *last = Instant::now();
                let told: Vec<String> = parts.into_iter().flatten().collect();
                let _ = writeln!(std::io::stderr(), "{}: {}", self.what, told.join(", "));
            }
            Display::Lines(_) => {}
        }
    }

    /// Ends the display of work that was stopped: the last line tells how much of it was done.
    pub fn cancelled(self) {
        match &self.display {
            Display::Quiet => return,
            Display::Bar(bar) => bar.clear(),
            Display::Lines(_) => {}
        }
        let time = seconds(self.start.elapsed().as_secs_f64());
        let told = match self.last {
            Some((done, total)) => {
                format!("after {} of {} {} in {time}", grouped(done as u64), grouped(total as u64), self.unit)
            }
            None => format!("after {time}"),
        };
        let _ = writeln!(std::io::stderr(), "{}: cancelled {told}", self.what);
    }

    /// Ends the display: the bar goes, and plain lines end with one that tells the whole.
    pub fn finish(self) {
        let elapsed = self.start.elapsed().as_secs_f64();
        match &self.display {
            Display::Bar(bar) => bar.clear(),
            Display::Lines(_) => {
                if let Some(&(done, _)) = self.steps.last() {
                    let done = grouped(done as u64);
                    let _ = writeln!(std::io::stderr(), "{}: {done} {} in {}", self.what, self.unit, seconds(elapsed));
                }
            }
            Display::Quiet => {}
        }
    }

    /// Estimated seconds from the start to `total`: each token costs a constant for the linear layers and a share that
    /// grows with its position for attention, so the time is `a·n + b·n²`, fitted by least squares.
    fn time_at(&self, total: f64) -> f64 {
        let Some(&(done, elapsed)) = self.steps.last() else { return 0.0 };
        let proportional = elapsed * total / done;
        if self.unit != "tokens" || self.steps.len() < 4 {
            return proportional;
        }
        let sum = |term: fn(f64, f64) -> f64| self.steps.iter().map(|&(n, t)| term(n, t)).sum::<f64>();
        let (n2, n3, n4) = (sum(|n, _| n * n), sum(|n, _| n * n * n), sum(|n, _| n * n * n * n));
        let (tn, tn2) = (sum(|n, t| t * n), sum(|n, t| t * n * n));
        let determinant = n2 * n4 - n3 * n3;
        let (a, b) = ((tn * n4 - tn2 * n3) / determinant, (tn2 * n2 - tn * n3) / determinant);
        if a.is_finite() && b.is_finite() && a >= 0.0 && b >= 0.0 {
            elapsed + a * (total - done) + b * (total * total - done * done)
        } else {
            proportional
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_knows_that_attention_grows() {
        let mut progress = Progress::new("reading", "tokens", true);
        let time = |n: f64| 0.01 * n + 1e-6 * n * n;
        progress.steps = (1..=8).map(|chunk| f64::from(chunk) * 512.0).map(|n| (n, time(n))).collect();
        assert!((progress.time_at(32_768.0) / time(32_768.0) - 1.0).abs() < 1e-6);
        progress.steps.truncate(2);
        assert!(progress.time_at(32_768.0) < time(32_768.0));
    }
}
