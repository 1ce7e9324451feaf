//! A call and its data, beside the f64 reference.

use iceformer_attention::{Attention, AttentionScratch, CacheShape, KeyValueCache, Mask, Method, Queries, ThreadTeam};
use iceformer_testing::attention::{Problem, Solution};

#[derive(Debug)]
pub struct Case {
    pub tokens: usize,
    pub keys: usize,
    pub query_heads: usize,
    pub shape: CacheShape,
    pub mask: Mask,
    pub first_position: usize,
    pub scale: f32,
}

pub struct Data {
    pub queries: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
}

impl Case {
    pub fn attention(&self) -> Attention {
        Attention { method: Method::Exact, mask: self.mask.clone(), scale: self.scale }
    }

    pub fn reference(&self, data: &Data) -> Solution {
        let CacheShape { kv_heads, key_dim, value_dim } = self.shape;
        Problem {
            queries: &data.queries,
            keys: &data.keys,
            values: &data.values,
            query_heads: self.query_heads,
            kv_heads,
            key_dim,
            value_dim,
            scale: f64::from(self.scale),
            first_position: self.first_position,
            causal: self.mask.causal,
            window: self.mask.window,
            unpadded: self.mask.keys.clone(),
        }
        .solve()
    }

    pub fn run(&self, data: &Data, cache: &KeyValueCache, team: &ThreadTeam) -> (Vec<f32>, Vec<f32>) {
        let mut output = vec![f32::NAN; self.tokens * self.query_heads * self.shape.value_dim];
        let mut log_sum_exp = vec![f32::NAN; self.tokens * self.query_heads];
        let queries =
            Queries { data: &data.queries, query_heads: self.query_heads, first_position: self.first_position };
        let scratch = &mut AttentionScratch::default();
        self.attention().run(queries, cache, &mut output, Some(&mut log_sum_exp), team, scratch);
        (output, log_sum_exp)
    }
}
