//! What attention methods keep of a model's accuracy.
//!
//! [`Driver`] runs methods on cases and on windows of a text: each text is read once by each method, then asked in two
//! set-ups ([`Setup`]). Cases come from files or are generated with a seed from any text ([`SourceText`]); who is told
//! what was measured is an [`Observer`]. [`Results`] sums up, and [`page`] shows it.

mod agreement;
mod case;
mod driver;
mod error;
mod input;
pub mod longeval;
mod measurement;
pub mod needle;
pub mod page;
mod perplexity;
mod prompt;
mod random;
mod score;
mod summary;
mod text;

pub use agreement::{AgreementSettings, QUESTION, run_agreement};
pub use case::{Case, PlannedCase};
pub use driver::{Driver, Observer};
pub use error::EvaluationError;
pub use input::{MOST_BYTES, decode, read_limited};
pub use measurement::{Cost, Finding, Measurement, Place, Setup};
pub use perplexity::{PerplexitySettings, SCORED, run_perplexity};
pub use prompt::{Encoder, Prompt, PromptTokens, Question};
pub use score::share_found;
pub use summary::{LEAST_ACCURACY, Quality, Results, Retention, Summary};
pub use text::{NamedText, SourceText};
