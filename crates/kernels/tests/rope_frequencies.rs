//! Scaled rotary frequencies against those of transformers (`testing/golden/scripts/rope_frequencies.py`).

use iceformer_kernels::rope::{RopeError, RopeScaling, RopeTable, yarn_attention_factor};
use serde_json::Value;

#[test]
fn frequencies_equal_those_of_transformers() {
    let golden = include_str!("../../../testing/golden/rope_frequencies.json");
    let cases: Vec<Value> = serde_json::from_str(golden).unwrap();
    assert_eq!(cases.len(), 8);
    for case in &cases {
        let number = |name: &str| case[name].as_f64();
        let needed = |name: &str| number(name).unwrap_or_else(|| panic!("{name} in {case}"));
        let original_context = number("original_max_position_embeddings").unwrap_or_default();
        let scaling = match case["rope_type"].as_str().unwrap() {
            "linear" => RopeScaling::Linear { factor: needed("factor") },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor"),
                low_frequency_factor: needed("low_freq_factor"),
                high_frequency_factor: needed("high_freq_factor"),
                original_context,
            },
            "yarn" => RopeScaling::Yarn {
                factor: needed("factor"),
                original_context,
                beta_fast: number("beta_fast").unwrap_or(32.0),
                beta_slow: number("beta_slow").unwrap_or(1.0),
                attention_factor: number("attention_factor").unwrap_or_else(|| {
                    yarn_attention_factor(needed("factor"), number("mscale"), number("mscale_all_dim"))
                }),
                truncate: case["truncate"].as_bool().unwrap_or(true),
            },
            other => panic!("unknown type {other}"),
        };
        let head_dim = needed("head_dim") as usize;
        let table = RopeTable::new(head_dim, needed("rope_theta"), &scaling).unwrap();
        let expected = case["expected_frequencies"].as_array().unwrap();
        assert_eq!(table.inverse_frequencies().len(), expected.len());
        for (frequency, expected) in table.inverse_frequencies().iter().zip(expected) {
            let expected = expected.as_f64().unwrap();
            // transformers computes them in f32.
            assert!((frequency - expected).abs() <= 2e-6 * expected, "{frequency} and {expected} in {scaling:?}");
        }
        let factor = case["expected_factor"].as_f64().unwrap();
        assert!((table.attention_factor() - factor).abs() <= 1e-12, "{scaling:?}");
    }
}

#[test]
fn factors_divide_the_frequencies() {
    let plain = RopeTable::new(8, 10_000.0, &RopeScaling::None).unwrap();
    assert_eq!(plain.inverse_frequencies(), [1.0, 0.1, 0.01, 0.001]);
    assert_eq!(plain.rotary_dim(), 8);
    let scaled = RopeTable::new(8, 10_000.0, &RopeScaling::Factors(vec![1.0, 2.0, 4.0, 8.0])).unwrap();
    for ((scaled, plain), factor) in
        scaled.inverse_frequencies().iter().zip(plain.inverse_frequencies()).zip([1, 2, 4, 8])
    {
        assert_eq!(*scaled, plain / f64::from(factor));
    }
}

#[test]
fn settings_out_of_range_are_refused() {
    let yarn = |factor, beta_fast| RopeScaling::Yarn {
        factor,
        original_context: 4096.0,
        beta_fast,
        beta_slow: 1.0,
        attention_factor: 1.0,
        truncate: true,
    };
    let equal = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 4.0,
        high_frequency_factor: 4.0,
        original_context: 8192.0,
    };
    let refused = |width, theta, scaling: &RopeScaling| RopeTable::new(width, theta, scaling).unwrap_err().to_string();
    assert_eq!(refused(7, 1e4, &RopeScaling::None), "a rotary width of 7; expected an even number above zero");
    assert_eq!(refused(0, 1e4, &RopeScaling::None), "a rotary width of 0; expected an even number above zero");
    assert_eq!(refused(8, 0.0, &RopeScaling::None), "rope theta is 0; expected a finite number above zero");
    assert_eq!(refused(8, f64::NAN, &RopeScaling::None), "rope theta is NaN; expected a finite number above zero");
    assert!(refused(8, 1e4, &RopeScaling::Linear { factor: f64::INFINITY }).starts_with("rope factor is inf"));
    assert!(refused(8, 1e4, &equal).starts_with("rope high_freq_factor − low_freq_factor is 0"));
    assert!(refused(8, 1e4, &yarn(-1.0, 32.0)).starts_with("rope factor is -1"));
    assert!(refused(8, 1e4, &yarn(4.0, 0.0)).starts_with("rope beta_fast is 0"));
    assert!(refused(8, 1.0, &yarn(4.0, 32.0)).starts_with("rope theta − 1 is 0"));
    assert_eq!(
        RopeTable::new(8, 1e4, &RopeScaling::Factors(vec![1.0])).unwrap_err(),
        RopeError::Factors { given: 1, expected: 4 }
    );
    assert!(refused(4, 1e4, &RopeScaling::Factors(vec![1.0, 0.0])).starts_with("rope factor is 0"));
}
