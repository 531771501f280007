//! Steps on the emulated driver: recorded and replayed, submitted ahead, counted, and drawn from in every way a request can
//! ask for.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod support;

use std::sync::Arc;

use mirai_cpu::{CpuBackend, CpuOptions};
use mirai_cuda::{CudaBackend, CudaOptions, Gpu, MemoryOptions};
use mirai_engine::{
    BlockId, Executor, Row, RowFault, RowInput, RowOutput, SamplingParams, SeqId, SlotId, SlotOpen,
    StepOutcome, StepPlan,
};
use mirai_model::backend::{Backend, CacheDtype};
use mirai_model::testing::{Driver, Played, Script};
use mirai_model::{CacheBudget, LoadOptions, ModelExecutor, ModelSource, load};
use support::{counts_on_emulated_driver, on_emulated_driver};

const MEMORY: (&str, &str) = ("MIRAI_EMU_MEMORY", "268435456");

/// Two layers with heads of 64, so that the tensor-core kernels run.
const CONFIG: &[u8] = br#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300,
    "max_position_embeddings": 256, "dtype": "bfloat16"}"#;

fn options() -> LoadOptions {
    LoadOptions {
        dummy: Some(11),
        cache: CacheBudget::Tokens(1024),
        cache_dtype: CacheDtype::Bf16,
        max_slots: 6,
        max_step_tokens: 96,
        ..LoadOptions::default()
    }
}

fn executor<B: Backend>(backend: B) -> ModelExecutor<B> {
    let source = ModelSource::memory("dummy", &[("config.json", CONFIG)]);
    load(&source, &options(), backend, &mut |_, _| {}).unwrap().executor
}

fn cuda_options(graphs: bool) -> CudaOptions {
    let memory = MemoryOptions { utilization: 0.95, cache: None };
    CudaOptions { memory, graphs, matmul_candidates: 1, ..CudaOptions::default() }
}

fn cuda(graphs: bool) -> ModelExecutor<CudaBackend> {
    executor(CudaBackend::new(Gpu::open(0).unwrap(), cuda_options(graphs)).unwrap())
}

fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 37 + seed * 101 + 5) % 300).collect()
}

fn drawing(len: u32, draw: usize, sampling: SamplingParams) -> Script {
    let mut script = Script::greedy(&prompt(len, len), draw, 3);
    script.sampling = SamplingParams { logprobs: Some(3), ..sampling };
    script
}

/// Tokens and bits of all log-probabilities.
fn bits(played: &[Played]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let of = |p: &Played| {
        let tops = p.drawn.iter().flat_map(|t| t.top.iter().map(|(_, l)| l.to_bits()));
        (p.tokens.clone(), p.drawn.iter().map(|t| t.logprob.to_bits()).chain(tops).collect())
    };
    played.iter().map(of).collect()
}

fn scripts() -> Vec<Script> {
    let random = SamplingParams { temperature: 0.8, top_p: 0.9, top_k: 50, seed: 7, ..Default::default() };
    let penalised = SamplingParams { repetition_penalty: 1.3, ..Default::default() };
    let lens = [3, 40, 17, 1, 33];
    let params =
        [SamplingParams::default(), random, penalised, SamplingParams::default(), Default::default()];
    lens.into_iter().zip(params).map(|(len, params)| drawing(len, 12, params)).collect()
}

#[test]
fn replayed_steps_have_the_bits_of_issued_ones() {
    on_emulated_driver("replayed_steps_have_the_bits_of_issued_ones", &[MEMORY], || {
        let issued = bits(&Driver::new(cuda(false)).play(&scripts()));
        let executor = cuda(true);
        let recorded = executor.backend().recorded();
        let rows: Vec<usize> = recorded.iter().map(|(rows, _)| *rows).collect();
        assert_eq!(rows, [1, 2, 4, 6]);
        // Embedding, eight kernels a layer, the last norm, the outputs' rows; head, preparation and draw.
        assert!(recorded.iter().all(|(_, kernels)| *kernels == 1 + 2 * 8 + 2 + 3), "{recorded:?}");
        let mut driver = Driver::new(executor);
        assert_eq!(bits(&driver.play(&scripts())), issued);
        assert_eq!(bits(&driver.play(&scripts())), issued, "once more, in slots that others had");
    });
}

/// Kernels of a layer in a recorded step: experts, and more rows than weights are streamed for.
#[test]
fn layers_have_no_more_kernels_than_promised() {
    on_emulated_driver("layers_have_no_more_kernels_than_promised", &[MEMORY], || {
        let config = |layers: usize, more: &str| {
            let text = format!(
                r#"{{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": {layers}, "num_attention_heads": 1,
                "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "max_position_embeddings": 64,
                "dtype": "bfloat16", {more}}}"#
            );
            &*Box::leak(text.into_boxed_str())
        };
        let kernels = |layers, more, slots| {
            let source = ModelSource::memory("dummy", &[("config.json", config(layers, more).as_bytes())]);
            let options = LoadOptions { max_slots: slots, ..options() };
            let memory = MemoryOptions { utilization: 0.95, cache: None };
            let options_of = CudaOptions { memory, matmul_candidates: 1, ..CudaOptions::default() };
            let backend = CudaBackend::new(Gpu::open(0).unwrap(), options_of).unwrap();
            let executor = load(&source, &options, backend, &mut |_, _| {}).unwrap().executor;
            executor.backend().recorded()
        };
        let a_layer = |more, slots| -> Vec<(usize, usize)> {
            let (one, two) = (kernels(1, more, slots), kernels(2, more, slots));
            one.iter().zip(two).map(|(a, b)| (a.0, b.1 - a.1)).collect()
        };
        let dense = a_layer(r#""architectures": ["LlamaForCausalLM"]"#, 66);
        // Above 64 rows the gate is a kernel of its own.
        let promised = |rows: usize| (rows, if rows <= 64 { 8 } else { 9 });
        assert_eq!(dense, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 66].map(promised));
        let gemma = r#""architectures": ["Gemma2ForCausalLM"], "sliding_window": 32, "query_pre_attn_scalar": 64,
            "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0"#;
        let around = a_layer(gemma, 2);
        assert_eq!(around, [(1, 8), (2, 8)], "norms behind blocks too");
        let moe =
            r#""architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2"#;
        let experts = a_layer(moe, 2);
        assert_eq!(experts, [(1, 11), (2, 11)]);
    });
}

/// Orders in which blocks and threads run, and how late work runs, change nothing.
#[test]
fn orders_and_laziness_change_no_bit() {
    const NAME: &str = "orders_and_laziness_change_no_bit";
    let variables: [&[(&str, &str)]; 3] = [
        &[MEMORY],
        &[MEMORY, ("MIRAI_EMU_LAZY", "1")],
        &[MEMORY, ("MIRAI_EMU_LAZY", "1"), ("MIRAI_EMU_ORDER", "random:3")],
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    for (index, variables) in variables.iter().enumerate() {
        let file = folder.path().join(index.to_string());
        let mut variables = variables.to_vec();
        variables.push(("RESULT", file.to_str().unwrap()));
        on_emulated_driver(NAME, &variables, || {
            let played = bits(&Driver::new(cuda(true)).play(&scripts()));
            std::fs::write(std::env::var("RESULT").unwrap(), format!("{played:?}")).unwrap();
        });
        if support::is_inside() || !support::is_built(NAME) {
            return;
        }
        seen.push(std::fs::read_to_string(file).unwrap());
    }
    assert_eq!(seen.len(), 3);
    assert!(seen.windows(2).all(|w| w[0] == w[1]), "{seen:#?}");
}

struct Steps {
    executor: ModelExecutor<CudaBackend>,
    step: u64,
}

impl Steps {
    fn open(slot: u32, params: &SamplingParams) -> SlotOpen {
        SlotOpen {
            slot: SlotId(slot),
            seq: SeqId(slot.into()),
            choice: 0,
            sampling: Arc::new(params.clone()),
            prompt: prompt(slot, 20).into(),
            output: vec![],
            computed: 0,
            blocks: vec![(0..16).map(|b| BlockId(1 + slot * 16 + b)).collect()],
            restore: None,
        }
    }

    fn prefill(&mut self, params: &[SamplingParams]) {
        let slots = 0..params.len() as u32;
        let plan = StepPlan {
            step: self.step,
            opens: slots.clone().zip(params).map(|(slot, params)| Self::open(slot, params)).collect(),
            tokens: slots.clone().flat_map(|slot| prompt(slot, 20)).collect(),
            rows: slots.map(|slot| Self::row(slot, 0, 20, RowInput::Tokens(slot * 20))).collect(),
            ..StepPlan::default()
        };
        self.submit(&plan);
    }

    fn row(slot: u32, start: u32, len: u32, input: RowInput) -> Row {
        Row { seq: SeqId(slot.into()), slot: SlotId(slot), start, len, input, output: RowOutput::Sample }
    }

    fn decode(&mut self, rows: u32, position: u32) {
        let rows = (0..rows).map(|slot| Self::row(slot, position, 1, RowInput::LastDrawn)).collect();
        self.submit(&StepPlan { step: self.step, rows, ..StepPlan::default() });
    }

    fn submit(&mut self, plan: &StepPlan) {
        self.executor.submit(plan).unwrap();
        self.step += 1;
    }

    fn collect(&mut self) -> StepOutcome {
        let mut outcome = StepOutcome::default();
        self.executor.collect(&mut outcome).unwrap();
        outcome
    }
}

/// Draws `steps` tokens for each request, each step submitted before the one before was collected, or not.
fn draw_ahead(params: &[SamplingParams], steps: u32, ahead: bool) -> Vec<StepOutcome> {
    let mut s = Steps { executor: cuda(true), step: 0 };
    s.prefill(params);
    let mut out = Vec::new();
    for position in 20..20 + steps {
        if !ahead {
            out.push(s.collect());
        }
        s.decode(params.len() as u32, position);
        if ahead {
            out.push(s.collect());
        }
    }
    out.push(s.collect());
    out
}

#[test]
fn a_step_ahead_gives_the_same_tokens() {
    on_emulated_driver("a_step_ahead_gives_the_same_tokens", &[MEMORY, ("MIRAI_EMU_LAZY", "1")], || {
        // The second request's forbidden words depend on tokens that the host has not seen at submission.
        let greedy = SamplingParams::default();
        let undisturbed = draw_ahead(&[greedy.clone(), greedy.clone(), greedy.clone()], 8, false);
        let drawn: Vec<u32> = undisturbed.iter().map(|step| step.tokens[1]).collect();
        let single = drawn.iter().copied().find(|token| !drawn[..2].contains(token)).unwrap_or(299);
        let bad_words = vec![vec![drawn[0], drawn[1]], vec![single]];
        let wary = SamplingParams { bad_words, ..SamplingParams::default() };
        let masked =
            SamplingParams { allowed_token_ids: Some(vec![3, 77, 299]), ..SamplingParams::default() };
        let params = [greedy, wary, masked];
        let (behind, ahead) = (draw_ahead(&params, 8, false), draw_ahead(&params, 8, true));
        for (a, b) in behind.iter().zip(&ahead) {
            assert_eq!((a.step, &a.tokens), (b.step, &b.tokens));
        }
        let tokens: Vec<u32> = ahead.iter().map(|step| step.tokens[1]).collect();
        assert_eq!(tokens[0], drawn[0]);
        assert_ne!(tokens[1], drawn[1], "forbidden after the first");
        assert!(!tokens.contains(&single));
        assert!(ahead.iter().all(|step| [3, 77, 299].contains(&step.tokens[2])));
        let first: Vec<u32> = ahead.iter().map(|step| step.tokens[0]).collect();
        assert_eq!(first, undisturbed.iter().map(|step| step.tokens[0]).collect::<Vec<_>>());
        assert!(ahead.iter().all(|step| step.device_time.as_nanos() < 60_000_000_000));
    });
}

/// A decode step is one upload, two graphs, one read-back, and no allocation.
#[test]
fn a_decode_step_costs_what_it_should() {
    const NAME: &str = "a_decode_step_costs_what_it_should";
    let run = |steps: &str| {
        counts_on_emulated_driver(NAME, &[MEMORY, ("STEPS", steps)], || {
            let steps: u32 = std::env::var("STEPS").unwrap().parse().unwrap();
            draw_ahead(&vec![SamplingParams::default(); 3], steps, true);
        })
    };
    // The second process runs the body once and has nothing to judge.
    let Some(few) = run("2") else { return };
    let Some(many) = run("12") else { return };
    let of = |counts: &serde_json::Value, what: &str| counts[what].as_i64().unwrap_or(0);
    let more = |what: &str| of(&many, what) - of(&few, what);
    assert_eq!(more("graph_launches"), 20);
    assert_eq!(more("uploads"), 10);
    assert_eq!(more("readbacks"), 10);
    assert_eq!((more("allocations"), more("host_allocations")), (0, 0));
    assert_eq!((of(&many, "allocations"), of(&many, "allocations_after_graphs")), (1, 0), "one arena");
    assert!(of(&many, "kernels") > 0, "{many}");
}

/// What a longer sequence left in a slot's table is cleared on the device, and takes no room in the upload.
#[test]
fn a_table_s_stale_end_is_cleared_on_the_device() {
    const NAME: &str = "a_table_s_stale_end_is_cleared_on_the_device";
    let run = |blocks: &str| {
        counts_on_emulated_driver(NAME, &[MEMORY, ("BLOCKS", blocks)], || {
            let blocks = std::env::var("BLOCKS").unwrap().parse().unwrap();
            let mut s = Steps { executor: cuda(false), step: 0 };
            s.prefill(&[SamplingParams::default()]);
            s.collect();
            let mut open = Steps::open(0, &SamplingParams::default());
            open.blocks[0].truncate(blocks);
            let rows = vec![Steps::row(0, 0, 20, RowInput::Tokens(0))];
            s.submit(&StepPlan {
                step: 1,
                opens: vec![open],
                tokens: prompt(0, 20),
                rows,
                ..StepPlan::default()
            });
            s.collect();
        })
    };
    let Some(equal) = run("16") else { return };
    let Some(shorter) = run("8") else { return };
    let more = |what: &str| shorter[what].as_i64().unwrap() - equal[what].as_i64().unwrap();
    assert_eq!((more("fills"), more("uploads")), (1, 0));
}

/// However many sequences with penalties begin in a step, their tokens go up in one copy.
#[test]
fn sequences_with_penalties_begin_without_waiting_for_each_other() {
    const NAME: &str = "sequences_with_penalties_begin_without_waiting_for_each_other";
    let uploads = |penalty: &str| {
        counts_on_emulated_driver(NAME, &[MEMORY, ("PENALTY", penalty)], || {
            let frequency_penalty = std::env::var("PENALTY").unwrap().parse().unwrap();
            let params = SamplingParams { frequency_penalty, ..SamplingParams::default() };
            draw_ahead(&vec![params; 4], 2, true);
        })
        .map(|counts| counts["uploads"].as_i64().unwrap())
    };
    // Copies of their own would have waited for each other, behind the step that runs.
    let Some(without) = uploads("0") else { return };
    let Some(with) = uploads("0.5") else { return };
    assert_eq!(with, without + 1);
}

/// Tokens as the CPU draws them, where a request says more about them than the model does.
#[test]
fn requests_are_followed_as_on_the_cpu() {
    on_emulated_driver("requests_are_followed_as_on_the_cpu", &[MEMORY], || {
        let bias = vec![(7, 40.0), (8, 39.0), (9, 38.0)];
        let table = [
            SamplingParams { logit_bias: vec![(5, 60.0)], ..Default::default() },
            SamplingParams { allowed_token_ids: Some(vec![42]), temperature: 1.0, ..Default::default() },
            SamplingParams { logit_bias: bias.clone(), frequency_penalty: 1.7, ..Default::default() },
            SamplingParams { logit_bias: bias.clone(), presence_penalty: 1.5, ..Default::default() },
            SamplingParams { logit_bias: bias.clone(), repetition_penalty: 1.5, ..Default::default() },
            SamplingParams {
                logit_bias: bias.clone(),
                stop_token_ids: vec![7],
                min_tokens: 3,
                bad_words: vec![vec![8, 8]],
                ..Default::default()
            },
        ];
        let scripts: Vec<Script> = table.into_iter().map(|params| drawing(20, 8, params)).collect();
        let cpu = Driver::new(executor(CpuBackend::new(&CpuOptions::default()))).play(&scripts);
        let gpu = Driver::new(cuda(true)).play(&scripts);
        for (script, (cpu, gpu)) in scripts.iter().zip(cpu.iter().zip(&gpu)) {
            assert_eq!(cpu.tokens, gpu.tokens, "{:?}", script.sampling);
            for (a, b) in cpu.drawn.iter().zip(&gpu.drawn) {
                assert!((a.logprob - b.logprob).abs() < 0.1, "{} and {}", a.logprob, b.logprob);
                assert_eq!((a.top.len(), b.top.len()), (3, 3));
            }
        }
    });
}

/// As many biases as the server lets a request have, in each of three: none may take another's room.
#[test]
fn three_rows_with_a_thousand_biases_each_are_served() {
    on_emulated_driver("three_rows_with_a_thousand_biases_each_are_served", &[MEMORY], || {
        let config = String::from_utf8(CONFIG.to_vec()).unwrap();
        let config = config.replace(r#""vocab_size": 300"#, r#""vocab_size": 1100"#).into_boxed_str();
        let config: &str = Box::leak(config);
        let source = ModelSource::memory("dummy", &[("config.json", config.as_bytes())]);
        let biased = |favourite: u32| {
            let bias = |token| (token, if token == favourite { 50.0 } else { -50.0 });
            SamplingParams { logit_bias: (0..1024).map(bias).collect(), ..Default::default() }
        };
        let masked = SamplingParams { allowed_token_ids: Some(vec![11, 900]), ..biased(900) };
        let scripts = [biased(1000), masked, biased(3)].map(|params| drawing(20, 3, params));
        let backend = CudaBackend::new(Gpu::open(0).unwrap(), cuda_options(true)).unwrap();
        let executor = load(&source, &options(), backend, &mut |_, _| {}).unwrap().executor;
        let played = Driver::new(executor).play(&scripts);
        let tokens: Vec<_> = played.iter().map(|p| p.tokens.clone()).collect();
        assert_eq!(tokens, [[1000; 3], [900; 3], [3; 3]]);
    });
}

#[test]
fn a_row_with_a_fault_fails_alone() {
    on_emulated_driver("a_row_with_a_fault_fails_alone", &[MEMORY], || {
        let nothing = SamplingParams { allowed_token_ids: Some(vec![]), ..Default::default() };
        let out = draw_ahead(&[SamplingParams::default(), nothing, SamplingParams::default()], 1, true);
        let faults: Vec<_> = out[0].rows.iter().map(|row| row.fault.clone()).collect();
        assert_eq!(faults, [None, Some(RowFault::NothingAllowed), None]);
        assert_eq!((out[0].tokens.len(), out[0].rows[2].tokens.clone()), (2, 1..2));
    });
}

/// A layer that sees 32 tokens keeps no more: what the pages hold depends on it.
#[test]
fn a_length_that_fits_only_because_of_windows_is_served() {
    on_emulated_driver("a_length_that_fits_only_because_of_windows_is_served", &[MEMORY], || {
        let config = br#"{"architectures": ["Gemma2ForCausalLM"], "sliding_window": 32, "query_pre_attn_scalar": 64,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64,
            "max_position_embeddings": 4096, "dtype": "bfloat16"}"#;
        // 140 pages of 4 KiB beside what a region is rounded up by: seven for a window and the step, one for nobody, so 132 of
        // 16 tokens.
        let memory = MemoryOptions { utilization: 0.95, cache: Some(140 * 4096 + 512) };
        let longest = |len| {
            let source = ModelSource::memory("dummy", &[("config.json", &config[..])]);
            let cache = CacheBudget::Device;
            let options = LoadOptions {
                cache,
                max_model_len: Some(len),
                max_step_tokens: 64,
                max_slots: 1,
                ..options()
            };
            let cuda = CudaOptions { memory, ..cuda_options(false) };
            let backend = CudaBackend::new(Gpu::open(0).unwrap(), cuda).unwrap();
            load(&source, &options, backend, &mut |_, _| {}).map(|loaded| loaded.cache.max_context)
        };
        let fits = 132 * 16;
        assert_eq!(longest(fits).unwrap(), fits);
        for more in [fits + 1, 4096] {
            let error = longest(more).unwrap_err();
            assert_eq!(error.exit_code(), 3, "{error}");
            let words = [format!("use --max-model-len {fits}"), "\n  KV cache ".to_owned()];
            assert!(words.iter().all(|words| error.to_string().contains(words)), "{error}");
        }
    });
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    on_emulated_driver("plans_that_do_not_fit_are_refused", &[MEMORY], || {
        let mut s = Steps { executor: cuda(false), step: 0 };
        s.prefill(&[SamplingParams::default()]);
        s.decode(1, 20);
        let rows = vec![Steps::row(0, 21, 1, RowInput::LastDrawn)];
        let plan = StepPlan { step: 2, rows, ..StepPlan::default() };
        let error = s.executor.submit(&plan).unwrap_err().to_string();
        assert!(error.contains("2 steps are not yet collected"), "{error}");
        s.collect();
        s.collect();
        let mut outcome = StepOutcome::default();
        let error = s.executor.collect(&mut outcome).unwrap_err().to_string();
        assert!(error.contains("no step was submitted"), "{error}");
    });
}
