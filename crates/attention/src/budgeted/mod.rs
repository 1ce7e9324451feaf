//! Budgeted attention: the keys that matter, within an error budget that the user sets.

mod settings;

pub use settings::{BudgetError, BudgetSettings};
