//! Groupings of the families' layers, and what budgets become.

use super::*;
use crate::arch::spec_from_config;
use crate::config::parse_object;

fn spec(fields: &str) -> ModelSpec {
    let json = format!(
        r#"{{"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 4096, {fields}}}"#
    );
    spec_from_config("config.json", &parse_object("config.json", json.as_bytes(), 9_999).unwrap()).unwrap()
}

fn mixed() -> ModelSpec {
    spec(
        r#""num_hidden_layers": 12, "use_sliding_window": true, "sliding_window": 64, "max_window_layers": 8"#,
    )
}

fn layers(layout: &GroupLayout) -> usize {
    match layout {
        GroupLayout::Paged(pages) => pages.layers,
        GroupLayout::Recurrent(states) => states.layers,
    }
}

fn request(budget: CacheBudget) -> CacheRequest {
    CacheRequest {
        budget,
        snapshot_bytes: None,
        dtype: CacheDtype::Bf16,
        max_model_len: None,
        slots: 4,
        max_step_tokens: 128,
    }
}

#[test]
fn layers_of_one_kind_make_one_group() {
    let g = Grouping::new(&spec(r#""num_hidden_layers": 12"#), CacheDtype::Bf16, 4_096);
    assert_eq!(g.kinds, [GroupKind::Full]);
    assert_eq!(g.places[11], Some((0, 11)));
    // 12 layers, keys and values, 2 heads, 16 tokens, 16 elements, 2 bytes.
    assert_eq!(g.page_bytes(), 12 * 2 * 2 * 16 * 16 * 2);
}

#[test]
fn mixed_layers_waste_nothing() {
    let g = Grouping::new(&mixed(), CacheDtype::F32, 4_096);
    assert_eq!(g.kinds, [GroupKind::Full, GroupKind::Full, GroupKind::Window(64)]);
    assert!(g.layouts.iter().all(|l| layers(l) == 4));
    assert_eq!((g.place(0), g.place(7), g.place(8)), ((0, 0), (1, 3), (2, 0)));
    let short = Grouping::new(&mixed(), CacheDtype::F32, 64);
    assert_eq!(short.kinds, [GroupKind::Full], "a window as long as the context is none");
}

#[test]
fn many_groups_are_traded_for_some_waste() {
    // 61 full and 2 windowed layers: pages of one layer would waste nothing and need 63 groups.
    let s = spec(
        r#""num_hidden_layers": 63, "use_sliding_window": true, "sliding_window": 64, "max_window_layers": 61"#,
    );
    let g = Grouping::new(&s, CacheDtype::F32, 4_096);
    assert!(g.kinds.len() <= MAX_GROUPS, "{}", g.kinds.len());
    assert_eq!(g.layouts.iter().map(layers).sum::<usize>(), 63);
}

#[test]
fn budgets_become_pages() {
    let (_, layout, report) = plan_cache(&mixed(), &request(CacheBudget::Tokens(4_096))).unwrap();
    assert_eq!((layout.blocks, layout.table_len), (3 * 256 + 1, 256));
    assert_eq!((report.tokens, report.max_context), (4_096, 4_096));
    let bytes = report.page_bytes * 101;
    let (_, layout, report) = plan_cache(&mixed(), &request(CacheBudget::Bytes(bytes))).unwrap();
    assert_eq!((layout.blocks, report.bytes), (101, bytes));
    // Two full groups, and a window of 64 with a step of 128: 13 pages.
    assert_eq!(report.max_context, (100 - 13) / 2 * 16, "the context shrinks to what fits");
}

/// Specification of a golden case.
fn case(name: &str) -> ModelSpec {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let source = crate::source::ModelSource::directory(&folder).unwrap();
    crate::loader::read_spec(&source).unwrap()
}

fn pages(layout: &GroupLayout) -> PageLayout {
    match layout {
        GroupLayout::Paged(pages) => *pages,
        GroupLayout::Recurrent(_) => panic!("a recurrent group"),
    }
}

#[test]
fn a_latent_is_stored_once_for_all_heads() {
    let spec = case("deepseek");
    let g = Grouping::new(&spec, CacheDtype::Bf16, 96);
    assert_eq!(g.kinds, [GroupKind::Full]);
    let p = pages(&g.layouts[0]);
    assert_eq!((p.layers, p.kv_heads, p.key_dim, p.value_dim), (3, 1, 18 + 8, 18));
    assert_eq!((p.stored, g.token_bytes()), (Stored::ValueInKey, 3 * 26 * 2));
    let a = g.attention(&spec, 2);
    assert_eq!((a.q_heads, a.kv_heads, a.layer_in_group, a.appends), (3, 1, 2, true));
}

#[test]
fn keys_that_are_values_are_stored_with_their_rotated_part() {
    let spec = case("gemma4");
    let g = Grouping::new(&spec, CacheDtype::F32, 96);
    assert_eq!(g.kinds.iter().filter(|k| **k == GroupKind::Window(7)).count(), 1);
    let (group, _) = g.place(1);
    let p = pages(&g.layouts[group]);
    assert_eq!((p.kv_heads, p.key_dim, p.value_dim, p.stored), (2, 24 + 6, 24, Stored::ValueInKey));
    assert_eq!((g.attention(&spec, 0).window, g.attention(&spec, 1).window), (Some(7), None));
}

#[test]
fn layers_that_read_another_layers_keys_have_its_place() {
    let spec = case("gemma4-shared-kv");
    let g = Grouping::new(&spec, CacheDtype::F32, 96);
    assert_eq!((g.place(3), g.place(4)), (g.place(2), g.place(1)));
    let (own, borrowed) = (g.attention(&spec, 1), g.attention(&spec, 4));
    assert!(own.appends && !borrowed.appends);
    assert_eq!((own.key_dim, own.window), (borrowed.key_dim, borrowed.window));
    assert_eq!(g.attention(&spec, 3).window, Some(6));
    assert_eq!(g.layouts.iter().map(layers).sum::<usize>(), 3);
}

#[test]
fn an_encoder_keeps_nothing() {
    let spec = case("xlmr-embed");
    let (g, layout, report) = plan_cache(&spec, &request(CacheBudget::Bytes(0))).unwrap();
    assert!(g.kinds.is_empty() && layout.groups.is_empty());
    assert_eq!((layout.blocks, report.blocks, report.bytes, report.tokens), (0, 0, 0, 0));
    assert_eq!((report.max_context, report.token_bytes), (spec.context, 0));
    let a = g.attention(&spec, 1);
    assert_eq!((a.visibility, a.appends, a.window), (Visibility::Whole, false, None));
}

#[test]
fn states_and_snapshots_are_paid_from_the_budget() {
    let spec = case("qwen3_5");
    let g = Grouping::new(&spec, CacheDtype::F32, 96);
    assert_eq!(g.kinds, [GroupKind::Recurrent, GroupKind::Full]);
    assert_eq!((g.places[0], g.places[2], g.places[3]), (Some((0, 0)), Some((0, 1)), Some((1, 1))));
    // Two layers: convolution of 2 * 2 * 8 + 4 * 6 over 3 rows, state of 4 * 8 * 6; f32.
    let state = 2 * (56 * 3 + 192) * 4;
    assert_eq!(g.state_bytes(), state);
    let state = state as u64;
    let ask = |budget, snapshot_bytes| {
        plan_cache(&spec, &CacheRequest { snapshot_bytes, ..request(CacheBudget::Bytes(budget)) })
    };
    let (_, layout, report) = ask(80 * state, None).unwrap();
    assert_eq!((layout.snapshots, report.snapshots, report.state_bytes), (10, 10, state));
    assert_eq!(report.bytes, report.blocks * report.page_bytes + (4 + 10) * state);
    assert!(report.bytes <= 80 * state);
    let (_, layout, _) = ask(80 * state, Some(3 * state)).unwrap();
    assert_eq!(layout.snapshots, 3);
    let e = ask(3 * state, None).unwrap_err();
    assert!(e.to_string().contains("`max-num-seqs`") && e.to_string().contains("is 4"), "{e}");
    let (_, layout, _) = plan_cache(&spec, &request(CacheBudget::Tokens(96))).unwrap();
    assert_eq!((layout.snapshots, layout.blocks), (4, 7), "a snapshot a slot, pages of one group");
}

#[test]
fn what_does_not_fit_is_refused() {
    let ask = |budget, len| plan_cache(&mixed(), &CacheRequest { max_model_len: len, ..request(budget) });
    let e = ask(CacheBudget::Bytes(1_000), None).unwrap_err();
    assert!(e.to_string().contains("1000") && e.exit_code() == 2, "{e}");
    let e = ask(CacheBudget::Tokens(512), Some(2_048)).unwrap_err();
    let ModelError::CacheTooSmall { fits, wanted: 2_048, .. } = e else { panic!("{e}") };
    assert!(e.to_string().contains(&format!("(use --max-model-len {fits})")), "{e}");
    ask(CacheBudget::Tokens(512), Some(fits)).unwrap();
    ask(CacheBudget::Tokens(512), Some(fits + 1)).unwrap_err();
    let e = ask(CacheBudget::Tokens(9_999), Some(4_097)).unwrap_err();
    assert!(e.to_string().contains("`max-model-len`") && e.to_string().contains("4096"), "{e}");
}
