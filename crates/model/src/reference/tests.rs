//! The oracle's own pieces, against values from elsewhere.
#![allow(clippy::unwrap_used)]

use super::experts::{activate, choose, erf, glu};
use super::outcome::log_softmax;
use super::{Reference, norm_row};
use crate::backend::{
    Activation, Backend, CacheLayout, Norm, NormKind, RouteGroups, RouteSpec, Rows, Scoring,
};

fn route(scoring: Scoring) -> RouteSpec {
    RouteSpec { experts: 4, top_k: 2, scoring, normalize: false, scale: 2.0, groups: None }
}

#[test]
fn known_values() {
    // Abramowitz and Stegun, table 7.1.
    assert!((erf(0.5) - 0.520_499_877_8).abs() < 1e-10);
    assert!((erf(2.0) - 0.995_322_265_0).abs() < 1e-10);
    assert_eq!((erf(-7.0), erf(0.0)), (-1.0, 0.0));
    let gelu = activate(Activation::Gelu, 1.0).unwrap();
    assert!((gelu - 0.841_344_746_1).abs() < 1e-10, "half of 1 + erf(1 / sqrt 2)");
    let xielu = Activation::Xielu { alpha_p: 0.8, alpha_n: 1.3, beta: 0.5, eps: -1e-6 };
    assert!((activate(xielu, 2.0).unwrap() - (0.8 * 4.0 + 1.0)).abs() < 1e-6);
    let negative = (f64::exp(-1.0) - 1.0 + 1.0) * 1.3 - 0.5;
    assert!((activate(xielu, -1.0).unwrap() - negative).abs() < 1e-6);
    let clamped = Activation::ClampedSwiglu { alpha: 1.0, limit: 2.0 };
    let expected = 3.0 * 2.0 / (1.0 + f64::exp(-2.0));
    assert!((glu(clamped, &[9.0, 9.0]).unwrap()[0] - expected).abs() < 1e-12);
    assert!(activate(clamped, 1.0).is_err());
    assert_eq!(log_softmax(&[0.0, f64::NAN]), None);
}

#[test]
fn layer_norm_subtracts_the_mean_and_has_a_bias() {
    let norm = Norm {
        kind: NormKind::Layer,
        weight: Some(vec![1.0, 2.0]),
        bias: Some(vec![0.0, 5.0]),
        offset: 1.0,
        eps: 0.0,
    };
    let mut out = [0.0; 2];
    norm_row(&[1.0, 3.0], &norm, &mut out);
    assert_eq!(out, [-2.0, 8.0]);
}

#[test]
fn experts_are_chosen_as_the_specification_says() {
    let logits = [1.0, 3.0, 3.0, 0.0];
    let total: f64 = logits.iter().map(|l: &f64| l.exp()).sum();
    let all = choose(&route(Scoring::Softmax), None, None, &logits);
    assert_eq!((all[0].0, all[1].0), (1, 2), "equal scores: the lowest first");
    assert!((all[0].1 - 2.0 * f64::exp(3.0) / total).abs() < 1e-12);
    let chosen = choose(&route(Scoring::SoftmaxOfChosen), None, Some(&vec![1.0, 3.0, 1.0, 1.0]), &logits);
    assert!((chosen[0].1 - 3.0).abs() < 1e-12 && (chosen[1].1 - 1.0).abs() < 1e-12);
    // The correction decides the choice and not the weight.
    let corrected = choose(&route(Scoring::Sigmoid), Some(&vec![0.0, 0.0, 0.0, 9.0]), None, &logits);
    assert_eq!(corrected[0], (3, 1.0));
    let groups = Some(RouteGroups { count: 2, chosen: 1 });
    let spec = RouteSpec { groups, normalize: true, scale: 1.0, ..route(Scoring::Sigmoid) };
    let grouped = choose(&spec, None, None, &[5.0, -9.0, 1.0, 0.9]);
    assert_eq!((grouped[0].0, grouped[1].0), (2, 3), "the better pair, without the best expert");
    assert!((grouped[0].1 + grouped[1].1 - 1.0).abs() < 1e-12);
}

#[test]
fn rows_wider_than_their_buffer_are_refused() {
    let mut oracle = Reference::default();
    let layout = CacheLayout { groups: vec![], blocks: 0, slots: 1, snapshots: 0, table_len: 1 };
    oracle.allocate_cache(&layout).unwrap();
    let mut buffer = oracle.buffer(Rows::Tokens, 3).unwrap();
    assert!(oracle.fit(&mut buffer, 4).is_err());
    assert!(oracle.state_layout(0).is_err());
    assert!(oracle.collect(&mut mirai_engine::StepOutcome::default()).is_err());
}
