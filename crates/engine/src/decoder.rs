//! The decoder: the whole way of tokens through the layers, in one place.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use iceformer_attention::{
    Attention, AttentionScratch, CacheShape, HeadReport, KeyValueCache, KeyValueType, Mask, Method, Queries, Report,
};
use iceformer_kernels::ThreadTeam;
use iceformer_kernels::activation::{silu_multiply, silu_multiply_joined};
use iceformer_kernels::add::add;
use iceformer_kernels::linear::{LinearScratch, LinearWeights};
use iceformer_kernels::norm::{rms_norm_in_place, rms_norm_rows};
use iceformer_kernels::rope::{self, RopeTable, Rotations};

use crate::config::{ModelConfig, RopeConfig, RopeScaling};
use crate::joined_linear::{DecoderError, JoinedLinear, Linear};
use crate::observer::{AttentionInputs, AttentionObserver};
use crate::weight_source::WeightSource;
use crate::weights::{LayerTensor, TensorName};

/// A decoder model, its weights packed for this machine.
pub struct Decoder {
    config: ModelConfig,
    /// `[vocabulary, hidden_size]`; only rows are looked up where the output layer is another.
    embedding: LinearWeights,
    layers: Vec<Layer>,
    /// `[hidden_size]`
    output_norm: Vec<f32>,
    /// `[vocabulary, hidden_size]`; `None`: the embedding.
    output: Option<LinearWeights>,
    rope: RopeTable,
}

struct Layer {
    /// `[hidden_size]`
    attention_norm: Vec<f32>,
    /// `[(query_heads + 2 · kv_heads) · head_dim, hidden_size]`
    query_key_value: JoinedLinear,
    /// Weights of each head's query and key norm, `[head_dim]` both.
    query_key_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// `[hidden_size, query_heads · head_dim]`
    attention_output: Linear,
    /// Which keys the layer's queries see.
    mask: Mask,
    /// `[hidden_size]`
    feed_forward_norm: Vec<f32>,
    /// `[2 · intermediate_size, hidden_size]`
    gate_up: JoinedLinear,
    /// `[hidden_size, intermediate_size]`
    down: Linear,
}

/// Buffers of one forward pass, allocated once for the longest chunk and used from the front.
pub struct DecoderState {
    /// Most tokens of one pass.
    chunk: usize,
    /// The residual stream, `[chunk, hidden_size]`.
    hidden: Vec<f32>,
    /// Input of a layer's products, then their sum to add: `[chunk, hidden_size]`.
    normed: Vec<f32>,
    /// Output of joined products: queries, keys and values, or gate and up.
    joined: Vec<f32>,
    /// `[chunk, query_heads, head_dim]`
    queries: Vec<f32>,
    /// `[chunk, kv_heads, head_dim]`
    keys: Vec<f32>,
    /// `[chunk, kv_heads, head_dim]`
    values: Vec<f32>,
    /// `[chunk, query_heads, head_dim]`
    attended: Vec<f32>,
    /// `[chunk, intermediate_size]`
    activated: Vec<f32>,
    /// `[wanted tokens, vocabulary]`
    logits: Vec<f32>,
    rotations: Rotations,
    linear: LinearScratch,
    attention: AttentionScratch,
    /// How attention chooses keys.
    method: Method,
    times: PartTimes,
    /// One for each layer.
    reports: Vec<Report>,
    observer: Option<Box<dyn AttentionObserver>>,
}

/// The tokens of a pass whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsFor {
    /// None: the pass only fills the cache, and the last layer's queries and feed-forward layers are left out.
    None,
    /// The last one: what generation needs.
    Last,
    /// All of them, `[tokens, vocabulary]`: for perplexity and comparisons.
    All,
}

/// Wall time by kind of work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PartTimes {
    /// Attention calls.
    pub attention: Duration,
    /// Linear layers, biases included.
    pub linear: Duration,
    /// Everything else: embedding, norms, rotation, activation, sums, the cache.
    pub rest: Duration,
}

impl PartTimes {
    /// All parts together.
    pub fn total(&self) -> Duration {
        self.attention + self.linear + self.rest
    }

    /// What was added since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            attention: self.attention.saturating_sub(earlier.attention),
            linear: self.linear.saturating_sub(earlier.linear),
            rest: self.rest.saturating_sub(earlier.rest),
        }
    }
}

/// The pass was cancelled; the caches hold a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

impl Decoder {
    /// Packs the weights of `source`, layer by layer; `progress(done, total)` is told about each layer.
    ///
    /// # Errors
    /// When a tensor is missing, unreadable or of another shape than its type allows.
    pub fn load<S: WeightSource>(
        source: &S,
        team: &ThreadTeam,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, DecoderError> {
        let config = source.config().clone();
        let matrix = |name| Linear::load(source, name, None, team).map(|linear| linear.weights);
        let embedding = matrix(TensorName::TokenEmbedding)?;
        let output = (!config.tied_embeddings).then(|| matrix(TensorName::Output)).transpose()?;
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            progress(layer, config.layers);
            layers.push(Layer::load(source, &config, layer, team)?);
        }
        progress(config.layers, config.layers);
        Ok(Self {
            embedding,
            layers,
            output_norm: source.vector(TensorName::OutputNorm)?,
            output,
            rope: rope_table(&config.rope, config.head_dim)?,
            config,
        })
    }

    /// The shape of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.linear_weights().map(LinearWeights::bytes).sum()
    }

    /// Bytes of packed weights that one token reads: all but an embedding that is not the output layer.
    pub fn weight_bytes_per_token(&self) -> usize {
        let embedding = if self.output.is_some() { self.embedding.bytes() } else { 0 };
        self.weight_bytes() - embedding
    }

    /// Operations (a multiply-add counts two) of the linear layers in reading a prompt of `tokens` tokens, of which
    /// only the last one's logits are wanted.
    pub fn prompt_linear_operations(&self, tokens: usize) -> f64 {
        let size = |weights: &LinearWeights| (weights.in_features() * weights.out_features()) as f64;
        let layers = self.layers.iter().enumerate().map(|(index, layer)| {
            let appended: f64 = layer.query_key_value.parts.iter().map(|part| size(&part.weights)).sum();
            let gate_up: f64 = layer.gate_up.parts.iter().map(|part| size(&part.weights)).sum();
            let others = gate_up + size(&layer.attention_output.weights) + size(&layer.down.weights);
            let rows = if index + 1 < self.layers.len() { tokens } else { 1 };
            tokens as f64 * appended + rows as f64 * others
        });
        2.0 * (layers.sum::<f64>() + size(self.output.as_ref().unwrap_or(&self.embedding)))
    }

    /// Names of the linear kernels that run for a prompt and for a single token, each once, in the order of the layers.
    pub fn linear_kernels(&self) -> Vec<&'static str> {
        const PROMPT_ROWS: usize = 512;
        let mut names = Vec::new();
        for weights in self.linear_weights().skip(usize::from(self.output.is_some())) {
            for name in [weights.kernel_name(PROMPT_ROWS), weights.kernel_name(1)] {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
        }
        names
    }

    fn linear_weights(&self) -> impl Iterator<Item = &LinearWeights> {
        let layers = self.layers.iter().flat_map(|layer| {
            let joined = layer.query_key_value.parts.iter().chain(&layer.gate_up.parts);
            joined.chain([&layer.attention_output, &layer.down]).map(|linear| &linear.weights)
        });
        [&self.embedding].into_iter().chain(layers).chain(&self.output)
    }

    /// Empty caches, one for each layer.
    pub fn caches(&self, kind: KeyValueType) -> Vec<KeyValueCache> {
        let (kv_heads, head_dim) = (self.config.kv_heads, self.config.head_dim);
        let shape = CacheShape { kv_heads, key_dim: head_dim, value_dim: head_dim };
        self.layers.iter().map(|_| KeyValueCache::new(shape, kind)).collect()
    }

    /// Buffers for passes of up to `chunk` tokens.
    pub fn state(&self, chunk: usize) -> DecoderState {
        let config = &self.config;
        let buffer = |width: usize| vec![0.0; chunk * width];
        let joined = |layer: &Layer| layer.query_key_value.out_features().max(layer.gate_up.out_features());
        DecoderState {
            chunk,
            hidden: buffer(config.hidden_size),
            normed: buffer(config.hidden_size),
            joined: buffer(self.layers.iter().map(joined).max().unwrap_or(0)),
            queries: buffer(config.query_heads * config.head_dim),
            keys: buffer(config.kv_heads * config.head_dim),
            values: buffer(config.kv_heads * config.head_dim),
            attended: buffer(config.query_heads * config.head_dim),
            activated: buffer(config.intermediate_size),
            logits: Vec::new(),
            rotations: Rotations::default(),
            linear: LinearScratch::default(),
            attention: AttentionScratch::default(),
            method: Method::default(),
            times: PartTimes::default(),
            reports: vec![Report::default(); self.layers.len()],
            observer: None,
        }
    }

    /// Runs `tokens`, which follow those in `caches`, appends their keys and values, and gives the wanted logits,
    /// `[wanted, vocabulary]`.
    ///
    /// # Errors
    /// [`Cancelled`] when `watch`, which is told before each layer how many are done, or the state's observer breaks;
    /// the caches of the first layers are then longer than the others, to be truncated by the caller.
    ///
    /// # Panics
    /// When there are no tokens or more than the state's chunk, or a token is not below the vocabulary.
    pub fn forward<'s>(
        &self,
        tokens: &[u32],
        wanted: LogitsFor,
        caches: &mut [KeyValueCache],
        state: &'s mut DecoderState,
        team: &ThreadTeam,
        mut watch: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<&'s [f32], Cancelled> {
        let hidden_size = self.config.hidden_size;
        assert!((1..=state.chunk).contains(&tokens.len()), "a pass takes 1 to {} tokens", state.chunk);
        let mut clock = Clock::start();
        for (&token, row) in tokens.iter().zip(state.hidden.chunks_exact_mut(hidden_size)) {
            self.embedding.row(token as usize, row);
        }
        self.rope.rotations(caches[0].len(), tokens.len(), &mut state.rotations, team);
        clock.lap(&mut state.times.rest);

        let mut rows = tokens.len();
        for (index, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            if watch(index).is_break() {
                return Err(Cancelled);
            }
            // Behind the last layer's keys and values only the rows with wanted logits matter.
            let keep = match wanted {
                _ if index + 1 < self.layers.len() => rows,
                LogitsFor::All => rows,
                LogitsFor::Last => 1,
                LogitsFor::None => 0,
            };
            layer.append_keys_and_values(&self.config, rows, cache, state, team, &mut clock);
            if state.show_observer(&self.config, index, cache.len() - rows, rows).is_break() {
                return Err(Cancelled);
            }
            if keep < rows {
                let first = (rows - keep) * hidden_size;
                state.hidden.copy_within(first..rows * hidden_size, 0);
                let query_width = self.config.query_heads * self.config.head_dim;
                state.queries.copy_within((rows - keep) * query_width..rows * query_width, 0);
                rows = keep;
            }
            if rows > 0 {
                let report = layer.attend(&self.config, rows, cache, state, team, &mut clock);
                state.reports[index] += &report;
                layer.feed_forward(&self.config, rows, state, team, &mut clock);
            }
        }

        let DecoderState { hidden, normed, logits, linear, times, .. } = state;
        logits.resize(rows * self.config.vocabulary, 0.0);
        if rows > 0 {
            let (hidden, normed) = (&hidden[..rows * hidden_size], &mut normed[..rows * hidden_size]);
            rms_norm_rows(hidden, &self.output_norm, self.config.norm_epsilon, normed, team);
            clock.lap(&mut times.rest);
            self.output.as_ref().unwrap_or(&self.embedding).forward(normed, logits, team, linear);
            clock.lap(&mut times.linear);
        }
        Ok(logits)
    }
}

impl Layer {
    fn load<S: WeightSource>(
        source: &S,
        config: &ModelConfig,
        layer: usize,
        team: &ThreadTeam,
    ) -> Result<Self, DecoderError> {
        use LayerTensor::*;
        let name = |tensor| TensorName::Layer(layer, tensor);
        let vector = |tensor| source.vector(name(tensor));
        let with_bias = |tensor, bias, present: bool| (name(tensor), present.then_some(name(bias)));
        let linear = |tensor, bias, present: bool| Linear::load(source, name(tensor), present.then_some(bias), team);
        let has_bias = config.attention_bias;
        let query_key_value = [
            with_bias(Query, QueryBias, has_bias),
            with_bias(Key, KeyBias, has_bias),
            with_bias(Value, ValueBias, has_bias),
        ];
        let has_bias = config.feed_forward_bias;
        let gate_up = [with_bias(Gate, GateBias, has_bias), with_bias(Up, UpBias, has_bias)];
        Ok(Self {
            attention_norm: vector(AttentionNorm)?,
            query_key_value: JoinedLinear::load(source, &query_key_value, team)?,
            query_key_norm: match config.query_key_norm {
                true => Some((vector(QueryNorm)?, vector(KeyNorm)?)),
                false => None,
            },
            attention_output: linear(AttentionOutput, name(OutputBias), config.output_bias)?,
            mask: Mask { window: config.attention_window(layer), ..Mask::causal() },
            feed_forward_norm: vector(FeedForwardNorm)?,
            gate_up: JoinedLinear::load(source, &gate_up, team)?,
            down: linear(Down, name(DownBias), config.feed_forward_bias)?,
        })
    }

    /// Norm, queries, keys and values of `rows` tokens, rotated; keys and values go to the cache.
    fn append_keys_and_values(
        &self,
        config: &ModelConfig,
        rows: usize,
        cache: &mut KeyValueCache,
        state: &mut DecoderState,
        team: &ThreadTeam,
        clock: &mut Clock,
    ) {
        let DecoderState { hidden, normed, joined, queries, keys, values, rotations, linear, times, .. } = state;
        let (query_heads, kv_heads, head_dim) = (config.query_heads, config.kv_heads, config.head_dim);
        let normed = &mut normed[..rows * config.hidden_size];
        let joined = &mut joined[..rows * self.query_key_value.out_features()];
        let queries = &mut queries[..rows * query_heads * head_dim];
        let keys = &mut keys[..rows * kv_heads * head_dim];
        let values = &mut values[..rows * kv_heads * head_dim];

        rms_norm_rows(&hidden[..normed.len()], &self.attention_norm, config.norm_epsilon, normed, team);
        clock.lap(&mut times.rest);
        self.query_key_value.forward(normed, rows, joined, team, linear);
        clock.lap(&mut times.linear);
        self.query_key_value.columns(joined, rows, 0).copy_to(queries, team);
        self.query_key_value.columns(joined, rows, 1).copy_to(keys, team);
        self.query_key_value.columns(joined, rows, 2).copy_to(values, team);
        if let Some((query_norm, key_norm)) = &self.query_key_norm {
            rms_norm_in_place(queries, query_norm, config.norm_epsilon, team);
            rms_norm_in_place(keys, key_norm, config.norm_epsilon, team);
        }
        rotations.apply(queries, query_heads, head_dim, team);
        rotations.apply(keys, kv_heads, head_dim, team);
        cache.append(keys, values, team);
        clock.lap(&mut times.rest);
    }

    /// Attention of the first `rows` queries, which are the last of the cache, and its output layer, added to the
    /// residual stream. Returns what attention did.
    fn attend(
        &self,
        config: &ModelConfig,
        rows: usize,
        cache: &mut KeyValueCache,
        state: &mut DecoderState,
        team: &ThreadTeam,
        clock: &mut Clock,
    ) -> Report {
        let DecoderState { hidden, normed, queries, attended, linear, attention, times, method, .. } = state;
        let query_width = config.query_heads * config.head_dim;
        let attended = &mut attended[..rows * query_width];
        let sum = &mut normed[..rows * config.hidden_size];

        let queries = Queries {
            data: &queries[..rows * query_width],
            query_heads: config.query_heads,
            first_position: cache.len() - rows,
        };
        let step = Attention { method: *method, mask: self.mask.clone(), scale: 1.0 / (config.head_dim as f32).sqrt() };
        let report = step.run(queries, cache, attended, None, team, attention);
        // Before the next layer makes copies too.
        cache.compact(team);
        clock.lap(&mut times.attention);
        self.attention_output.forward(attended, sum, team, linear);
        clock.lap(&mut times.linear);
        add(&mut hidden[..sum.len()], sum, team);
        clock.lap(&mut times.rest);
        report
    }

    /// The feed-forward layers of the first `rows` tokens, added to the residual stream.
    fn feed_forward(
        &self,
        config: &ModelConfig,
        rows: usize,
        state: &mut DecoderState,
        team: &ThreadTeam,
        clock: &mut Clock,
    ) {
        let DecoderState { hidden, normed, joined, activated, linear, times, .. } = state;
        let width = config.intermediate_size;
        let normed = &mut normed[..rows * config.hidden_size];
        let joined = &mut joined[..rows * 2 * width];
        let activated = &mut activated[..rows * width];

        rms_norm_rows(&hidden[..normed.len()], &self.feed_forward_norm, config.norm_epsilon, normed, team);
        clock.lap(&mut times.rest);
        self.gate_up.forward(normed, rows, joined, team, linear);
        clock.lap(&mut times.linear);
        let activated = if self.gate_up.is_one_part() {
            silu_multiply_joined(joined, width, activated, team);
            activated
        } else {
            let (gate, up) = joined.split_at_mut(rows * width);
            silu_multiply(gate, up, team);
            gate
        };
        clock.lap(&mut times.rest);
        self.down.forward(activated, normed, team, linear);
        clock.lap(&mut times.linear);
        add(&mut hidden[..normed.len()], normed, team);
        clock.lap(&mut times.rest);
    }
}

impl DecoderState {
    /// Most tokens of one pass.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Wall time spent so far, by kind of work.
    pub fn times(&self) -> PartTimes {
        self.times
    }

    /// How attention chooses keys from the next pass on.
    pub fn set_method(&mut self, method: Method) {
        self.method = method;
    }

    /// Shows `observer` what attention is given from the next pass on; `None`: nobody looks.
    pub fn set_observer(&mut self, observer: Option<Box<dyn AttentionObserver>>) {
        self.observer = observer;
    }

    /// Shows the observer, where there is one, the queries, keys and values of `rows` tokens.
    fn show_observer(
        &mut self,
        config: &ModelConfig,
        layer: usize,
        first_position: usize,
        rows: usize,
    ) -> ControlFlow<()> {
        let Some(observer) = &mut self.observer else { return ControlFlow::Continue(()) };
        let kv_width = config.kv_heads * config.head_dim;
        observer.observe(AttentionInputs {
            layer,
            first_position,
            queries: &self.queries[..rows * config.query_heads * config.head_dim],
            keys: &self.keys[..rows * kv_width],
            values: &self.values[..rows * kv_width],
        })
    }

    /// What attention did so far, layer by layer, summed over passes.
    pub fn reports(&self) -> &[Report] {
        &self.reports
    }

    /// What attention did so far, summed over layers, heads and passes.
    pub fn report(&self) -> HeadReport {
        let mut total = HeadReport::default();
        self.reports.iter().for_each(|report| total += &report.total());
        total
    }
}

/// Splits wall time among the parts of a pass.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    /// Books the time since the last lap.
    fn lap(&mut self, part: &mut Duration) {
        let now = Instant::now();
        *part += now - self.0;
        self.0 = now;
    }
}

fn rope_table(config: &RopeConfig, head_dim: usize) -> Result<RopeTable, rope::RopeError> {
    let scaling = match config.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => rope::RopeScaling::None,
        RopeScaling::Linear { factor } => rope::RopeScaling::Linear { factor: factor.into() },
        RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_context } => {
            rope::RopeScaling::Llama3 {
                factor: factor.into(),
                low_frequency_factor: low_frequency_factor.into(),
                high_frequency_factor: high_frequency_factor.into(),
                original_context: original_context as f64,
            }
        }
        RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, original_context, truncate } => {
            rope::RopeScaling::Yarn {
                factor: factor.into(),
                attention_factor: attention_factor.into(),
                beta_fast: beta_fast.into(),
                beta_slow: beta_slow.into(),
                original_context: original_context as f64,
                truncate,
            }
        }
        RopeScaling::Factors(ref factors) => {
            rope::RopeScaling::Factors(factors.iter().map(|&factor| factor.into()).collect())
        }
    };
    RopeTable::new(head_dim, config.theta, &scaling)
}
