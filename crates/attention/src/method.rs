//! One attention call: queries against a cache under a mask, by a method.

use crate::exact::{self, AttentionScratch};
use crate::output::Output;
use crate::strided::FromF32;
use crate::tiles::Call;
use crate::{
    ArraysError, BudgetError, BudgetSettings, DciSettings, DciSettingsError, KeyValueCache, Mask, Report, StridedView,
    ThreadTeam, budgeted, dci,
};

/// How the keys of a query are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Method {
    /// All keys the mask allows: tiled, online softmax.
    #[default]
    Exact,
    /// The keys that matter, so that few rows miss more of their softmax mass than the budget says: of those that are
    /// measured all along the text about one in a hundred may, and miss anything. Rows that look for single keys, and are
    /// fewer than that, can be lost, and neither estimates nor audits are likely to show it.
    Budgeted(BudgetSettings),
    /// The keys with the largest logits, found by multi-level Prioritized DCI: IceFormer as published
    /// ([Mao, Ester and Li 2024](https://arxiv.org/abs/2405.02842)).
    Dci(DciSettings),
}

impl Method {
    /// Every method with its default settings, in the order reports list them.
    pub const ALL: [Self; 3] =
        [Self::Exact, Self::Budgeted(BudgetSettings::DEFAULT), Self::Dci(DciSettings::PUBLISHED)];

    /// Checks the method's settings.
    ///
    /// # Errors
    /// The first setting out of its range.
    pub fn validate(&self) -> Result<(), MethodError> {
        match self {
            Self::Exact => Ok(()),
            Self::Budgeted(settings) => settings.validate().map_err(MethodError::Budget),
            Self::Dci(settings) => settings.validate().map_err(MethodError::Dci),
        }
    }

    /// Name as the command line takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Budgeted(_) => "budgeted",
            Self::Dci(_) => "dci",
        }
    }

    /// Name of the kernel that most work is done by on a cache of this type, as reports print it.
    pub fn kernel_name(self, kind: crate::KeyValueType) -> &'static str {
        match self {
            Self::Exact | Self::Budgeted(_) => Attention::kernel_name(kind),
            Self::Dci(_) => dci::kernel_name(kind),
        }
    }
}

/// A setting of a method that is out of its range.
#[derive(Clone, Debug, PartialEq)]
pub enum MethodError {
    /// Of method `budgeted`.
    Budget(BudgetError),
    /// Of method `dci`.
    Dci(DciSettingsError),
}

impl std::fmt::Display for MethodError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Budget(error) => error.fmt(formatter),
            Self::Dci(error) => error.fmt(formatter),
        }
    }
}

impl std::error::Error for MethodError {}

/// Queries of one call.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[tokens, query_heads, key_dim]`.
    pub data: &'a [f32],
    /// Query heads, a multiple of the cache's `kv_heads`; head `h` reads key/value head `h / (query_heads / kv_heads)`.
    pub query_heads: usize,
    /// Position of the first query among the keys of the cache. After appending a chunk: cache length − chunk length.
    pub first_position: usize,
}

/// Settings of an attention step.
#[derive(Clone, Debug)]
pub struct Attention {
    /// How keys are chosen.
    pub method: Method,
    /// Which keys may be seen.
    pub mask: Mask,
    /// Factor on the logits, usually `1/√key_dim`.
    pub scale: f32,
}

/// One sequence of a [`Attention::run_batch`].
pub struct Sequence<'a> {
    /// The sequence's own queries; lengths may differ from sequence to sequence.
    pub queries: Queries<'a>,
    /// The sequence's own keys and values.
    pub cache: &'a KeyValueCache,
    /// The sequence's own mask: left or right padding is its `keys`.
    pub mask: Mask,
    /// `[tokens, query_heads, value_dim]`.
    pub output: &'a mut [f32],
    /// `[tokens, query_heads]`, where wanted.
    pub log_sum_exp: Option<&'a mut [f32]>,
}

impl Attention {
    /// Writes `output` `[tokens, query_heads, value_dim]` and, where asked for, `log_sum_exp` `[tokens, query_heads]`
    /// (nats, over the keys kept; −∞ for a query that sees no key, whose output is zero). The result does not depend on
    /// the number of threads. That of method `budgeted` does on earlier calls with the same cache, as more queries were
    /// measured then, and so on the order of calls that share it: within what the budget promises either way.
    ///
    /// # Panics
    /// When a slice has another length than its shape takes, `query_heads` is no multiple of `kv_heads`, the last query
    /// would have a position beyond [`usize::MAX`], or the method's settings are out of range ([`Method::validate`]).
    pub fn run(
        &self,
        queries: Queries<'_>,
        cache: &KeyValueCache,
        output: &mut [f32],
        log_sum_exp: Option<&mut [f32]>,
        team: &ThreadTeam,
        scratch: &mut AttentionScratch,
    ) -> Report {
        let shape = cache.shape();
        let heads = queries.query_heads;
        assert!(
            heads > 0 && heads.is_multiple_of(shape.kv_heads),
            "{heads} query heads are no multiple of {} key/value heads",
            shape.kv_heads
        );
        let tokens = queries.data.len() / (heads * shape.key_dim);
        assert_eq!(queries.data.len(), tokens * heads * shape.key_dim, "queries are no whole number of tokens");
        assert_eq!(output.len(), tokens * heads * shape.value_dim, "output is [tokens, query_heads, value_dim]");
        if let Some(log_sum_exp) = &log_sum_exp {
            assert_eq!(log_sum_exp.len(), tokens * heads, "log_sum_exp is [tokens, query_heads]");
        }
        ArraysError::check_positions(queries.first_position, tokens).unwrap_or_else(|error| panic!("{error}"));
        self.method.validate().unwrap_or_else(|error| panic!("{error}"));
        let call = Call {
            attention: self,
            queries: StridedView::token_major(queries.data, tokens, heads, shape.key_dim),
            first_position: queries.first_position,
            cache,
            soft_cap: None,
        };
        let output = Output::new(output, [1, tokens, heads, shape.value_dim], None).with_log_sum_exp(log_sum_exp);
        self.run_call(&call, output, team, scratch)
    }

    /// As [`run`](Self::run), for a call whose shapes and settings were checked.
    pub(crate) fn run_call<T: FromF32>(
        &self,
        call: &Call<'_>,
        output: Output<'_, T>,
        team: &ThreadTeam,
        scratch: &mut AttentionScratch,
    ) -> Report {
        match self.method {
            _ if call.soft_cap.is_some() => exact::run(call, output, team, scratch),
            Method::Exact => exact::run(call, output, team, scratch),
            Method::Budgeted(settings) => budgeted::run(call, &settings, output, team, scratch),
            Method::Dci(settings) => dci::run(call, &settings, output, team, &mut scratch.dci),
        }
    }

    /// Runs every sequence of a ragged batch under its own mask (`self.mask` is not used). Returns the sum of reports.
    ///
    /// # Panics
    /// As [`run`](Self::run), for any sequence.
    pub fn run_batch(&self, batch: &mut [Sequence<'_>], team: &ThreadTeam, scratch: &mut AttentionScratch) -> Report {
        let mut total = Report::default();
        for sequence in batch {
            let attention = Self { mask: sequence.mask.clone(), ..self.clone() };
            let log_sum_exp = sequence.log_sum_exp.as_deref_mut();
            total += &attention.run(sequence.queries, sequence.cache, sequence.output, log_sum_exp, team, scratch);
        }
        total
    }

    /// Name of the exact kernel that runs on a cache of this type, as reports print it.
    pub fn kernel_name(kind: crate::KeyValueType) -> &'static str {
        use iceformer_kernels::InstructionSet;
        use iceformer_kernels::attention::AttentionTile;
        AttentionTile::kernel_name(InstructionSet::current(), kind.empty_block())
    }
}
