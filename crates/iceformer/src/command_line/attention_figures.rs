//! What attention did in a run: a line for people, all of it for programs.

use iceformer_attention::{HeadReport, Method, Report};
use serde::Serialize;

/// Attention of a run. Field names are those of the JSON output.
#[derive(Debug, Serialize)]
pub struct AttentionFigures {
    pub method: &'static str,
    /// Of method `budgeted`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<f32>,
    #[serde(flatten)]
    pub total: HeadFigures,
    /// Layer by layer, head by head; left out by method `exact`, which keeps everything.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Vec<HeadFigures>>,
}

/// What was done for one head, or for all.
#[derive(Debug, Serialize)]
pub struct HeadFigures {
    /// Share of the (query, key) pairs whose own value entered the output.
    pub kept_share: f64,
    /// Share of the rows that were computed exactly because nothing else kept the budget or paid.
    pub fallback_share: f64,
    /// Missed mass that half of the rows stay within, as the method estimates it; none where nothing was left out.
    pub estimated_missed_mass_p50: Option<f32>,
    pub estimated_missed_mass_p99: Option<f32>,
    /// Missed mass that 99 % of the audited rows stay within.
    pub audited_missed_mass_p99: Option<f32>,
    pub audited_rows: u64,
}

impl AttentionFigures {
    /// The figures of `reports`, one for each layer.
    pub fn new(method: Method, reports: &[Report]) -> Self {
        let mut total = HeadReport::default();
        reports.iter().for_each(|report| total += &report.total());
        let layers = match method {
            Method::Exact => Vec::new(),
            _ => reports.iter().map(|report| report.heads.iter().map(HeadFigures::new).collect()).collect(),
        };
        let budget = match method {
            Method::Budgeted(settings) => Some(settings.budget),
            _ => None,
        };
        Self { method: method.name(), budget, total: HeadFigures::new(&total), layers }
    }

    /// One line; none for method `exact`.
    pub fn line(&self) -> Option<String> {
        if self.method == Method::Exact.name() {
            return None;
        }
        let HeadFigures { kept_share, fallback_share, .. } = self.total;
        let mut line = format!("{} kept {:.1} % of the keys", self.method, 100.0 * kept_share);
        if let Some(budget) = self.budget {
            line += &format!("; {:.1} % of the rows fell back to exact", 100.0 * fallback_share);
            let mass = |mass: Option<f32>| mass.map_or("none".into(), |mass| format!("{mass:.3}"));
            line += &format!(
                "; missed mass of 99 % of the rows: estimated {}, audited {} ({} rows), budget {budget}",
                mass(self.total.estimated_missed_mass_p99),
                mass(self.total.audited_missed_mass_p99),
                self.total.audited_rows,
            );
        }
        Some(line)
    }
}

impl HeadFigures {
    fn new(report: &HeadReport) -> Self {
        Self {
            kept_share: report.kept_share(),
            fallback_share: report.fallback_share(),
            estimated_missed_mass_p50: report.estimated_missed_mass.quantile(0.5),
            estimated_missed_mass_p99: report.estimated_missed_mass.quantile(0.99),
            audited_missed_mass_p99: report.audited_missed_mass.quantile(0.99),
            audited_rows: report.audited_missed_mass.count(),
        }
    }
}
