//! A text of records of one length, in a part of which queries look for one far key each, while all others look near: what
//! is measured and audited must not be of one part only.

use iceformer_attention::{AttentionScratch, KeyValueType, Mask, Method, ThreadTeam};
use iceformer_testing::random::Random;
use iceformer_testing::synthetic::{Inputs, Shape};

use crate::case::{BUDGETED, Case, assert_kept};

const TOKENS: usize = 8_192;
const WIDTH: usize = 128;
/// Channels that turn with the position, a frequency for each two; all others are random.
const TURNING: usize = 32;

/// Tokens of a record, of which two eighths look for keys far away.
fn looks_far(token: usize, record: usize) -> bool {
    (3 * record..5 * record).contains(&(8 * (token % record))) && token >= 512
}

/// Queries that look near have logits of variance 2 with keys far away; one that looks far has a logit of 22 with its key.
fn records(record: usize) -> Case {
    let mut random = Random::new(3);
    let mut keys = random.normals(TOKENS * WIDTH, 1.0);
    let values = random.normals(TOKENS * WIDTH, 1.0);
    let mut queries = vec![0.0; TOKENS * WIDTH];
    let scale = (WIDTH as f32).sqrt();
    // Were they evenly spaced, positions far away would look near.
    let (lowest, highest) = (std::f64::consts::TAU / 400.0, std::f64::consts::TAU / 60.0);
    let frequencies: Vec<f32> = (0..TURNING / 2)
        .map(|pair| lowest + (highest - lowest) * (pair as f64 + random.unit()) / (TURNING / 2) as f64)
        .map(|frequency| frequency as f32)
        .collect();
    for (token, key) in keys.chunks_exact_mut(WIDTH).enumerate() {
        for (frequency, channels) in frequencies.iter().zip(key[..TURNING].chunks_exact_mut(2)) {
            let (sine, cosine) = (token as f32 * frequency).sin_cos();
            channels.copy_from_slice(&[cosine, sine]);
        }
    }
    let along = |direction: &[f32], length: f32| -> Vec<f32> {
        let norm = direction.iter().map(|value| value * value).sum::<f32>().sqrt();
        direction.iter().map(|value| value / norm * length).collect()
    };
    for (token, query) in queries.chunks_exact_mut(WIDTH).enumerate() {
        let (turning, rest) = query.split_at_mut(TURNING);
        if looks_far(token, record) && token > 300 {
            let key = 64 + random.below(token - 264);
            rest.copy_from_slice(&along(&keys[key * WIDTH..][TURNING..WIDTH], 5.0_f32.sqrt() * scale));
        } else {
            rest.copy_from_slice(&along(&random.normals(WIDTH - TURNING, 1.0), 2.0_f32.sqrt() * scale));
            let own = &keys[token * WIDTH..][..TURNING];
            turning.iter_mut().zip(own).for_each(|(query, key)| *query = 0.75 * scale * key);
        }
    }
    let shape = Shape {
        query_tokens: TOKENS,
        key_tokens: TOKENS,
        query_heads: 1,
        kv_heads: 1,
        key_dim: WIDTH,
        value_dim: WIDTH,
    };
    Case { shape, inputs: Inputs { queries, keys, values }, mask: Mask::causal() }
}

/// What the rows from the half of the text on missed, read in chunks of so many tokens.
fn missed_in_chunks(case: &Case, chunk: usize) -> Vec<f64> {
    let team = ThreadTeam::new(2);
    let read = |method: Method| {
        let mut cache = case.cache(KeyValueType::F32, 0..0, &team);
        let (mut scratch, mut output) = (AttentionScratch::default(), Vec::new());
        for first in (0..TOKENS).step_by(chunk) {
            let tokens = first..first + chunk;
            case.append(&mut cache, tokens.clone(), &team);
            output.extend(case.run_in(&mut scratch, first, &case.mask, method, &cache, tokens, &team).0);
        }
        output
    };
    case.missed(&read(Method::Exact), &read(BUDGETED)).split_off(TOKENS / 2)
}

#[test]
fn no_part_of_a_record_is_left_unmeasured() {
    for (chunk, record) in [(TOKENS, 32), (512, 32), (2_048, 64)] {
        let case = records(record);
        assert_kept(&missed_in_chunks(&case, chunk), &format!("records of {record} tokens in chunks of {chunk}"));
    }
}
