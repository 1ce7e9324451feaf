//! The figures of a measurement; those of several layers add up.

use iceformer_attention::HeadReport;
use iceformer_kernels::ceilings::Ceilings;
use iceformer_study::error::{RowError, quantile};
use serde_json::{Map, Value, json};

use crate::command_line::bench::measure::{self, Times};

/// What was measured.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub attention: Times,
    pub append_cpu_seconds: f64,
    /// Of the method that it is compared with.
    pub against: Option<Times>,
    pub report: HeadReport,
    /// Operations of exact attention.
    pub operations: f64,
    /// Of the sampled rows.
    pub errors: Vec<RowError>,
    pub cache_bytes: usize,
    /// Those of pages that hold keys and values.
    pub occupied_bytes: usize,
    pub index_bytes: usize,
}

impl Figures {
    /// Adds those of another layer.
    pub fn add(&mut self, other: &Self) {
        self.attention = sum(self.attention, other.attention);
        self.append_cpu_seconds += other.append_cpu_seconds;
        self.against = other.against.map(|times| sum(self.against.unwrap_or_default(), times));
        self.report += &other.report;
        self.operations += other.operations;
        self.errors.extend_from_slice(&other.errors);
        self.cache_bytes += other.cache_bytes;
        self.occupied_bytes += other.occupied_bytes;
        self.index_bytes += other.index_bytes;
    }

    /// The fields of a line of output. `against`: name of the method that it is compared with; `kernel`: of the first.
    pub fn fields(&self, against: Option<&str>, kernel: &str, ceilings: &Ceilings) -> Map<String, Value> {
        let Self { attention, report, .. } = self;
        let rate = self.operations / attention.cpu_seconds * 1e-9;
        let (ceiling_name, ceiling) = measure::kernel_ceiling(kernel, ceilings);
        let mut line = json!({
            "cpu_seconds": attention.cpu_seconds,
            "wall_seconds": attention.wall_seconds,
            "append_cpu_seconds": self.append_cpu_seconds,
        });
        if let (Some(name), Some(times)) = (against, self.against) {
            line[format!("{name}_cpu_seconds")] = times.cpu_seconds.into();
            line[format!("{name}_wall_seconds")] = times.wall_seconds.into();
            line["speedup"] = (times.cpu_seconds / attention.cpu_seconds).into();
        }
        let share = |part: u64, whole: u64| if whole == 0 { 1.0 } else { part as f64 / whole as f64 };
        let missed: Vec<f64> = self.errors.iter().map(|error| error.missed_mass).collect();
        let relative: Vec<f64> = self.errors.iter().map(|error| error.relative).collect();
        let estimated = |share| report.estimated_missed_mass.quantile(share);
        let more = json!({
            "allowed_keys": report.allowed_keys,
            "evaluated_keys": report.evaluated_keys,
            "kept_keys": report.kept_keys,
            "kept_share": share(report.kept_keys, report.allowed_keys),
            "fallback_share": share(report.fallback_rows, report.rows),
            "samples": self.errors.len(),
            "missed_mass_p50": quantile(&missed, 0.5),
            "missed_mass_p95": quantile(&missed, 0.95),
            "missed_mass_p99": quantile(&missed, 0.99),
            "estimated_missed_mass_p95": estimated(0.95),
            "estimated_missed_mass_p99": estimated(0.99),
            "relative_error": quantile(&relative, 0.5),
            "rate_per_core": rate,
            "ceiling": ceiling_name,
            "ceiling_rate_per_core": ceiling,
            "ceiling_fraction": rate / ceiling,
            "cache_bytes": self.cache_bytes,
            "index_bytes": self.index_bytes,
        });
        let mut fields = Map::new();
        for part in [line, more] {
            fields.extend(part.as_object().cloned().unwrap_or_default());
        }
        fields
    }
}

fn sum(a: Times, b: Times) -> Times {
    Times { cpu_seconds: a.cpu_seconds + b.cpu_seconds, wall_seconds: a.wall_seconds + b.wall_seconds }
}
