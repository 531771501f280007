//! A server on a free port, with a simulated engine, a tokenizer of bytes and a ChatML template.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mirai_engine::sim::{Draw, DrawFn, PoolFn, SimConfig, SimExecutor};
use mirai_engine::{EngineConfig, EngineHandle, Geometry, GroupKind};
use mirai_ledger::Ledger;
use mirai_ledger::price::PriceBook;
use mirai_ledger::quota::Quotas;
use mirai_server::{
    Accounting, ExitReason, FimTokens, GenerationDefaults, ServedModel, Server, ServerConfig, ServerHandle,
    Task,
};
use mirai_text::{ChatTemplate, SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

pub const MODEL: &str = "org/tiny";
pub const ALIAS: &str = "tiny";
pub const CONTEXT: u32 = 2048;
pub const EOS: u32 = 257;
/// The tokenizer's ids end at 259; the logits are wider, as in many real models.
pub const VOCAB: u32 = 264;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Longest that a test waits for what must come. Far above what it takes on an idle machine: a test that misses
/// it hangs, whatever else the machine does.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// GPT-2's spelling of bytes as characters.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + rank).unwrap()
}

/// Ids 0 to 255 are the bytes; then `<|im_start|>`, `<|im_end|>`, `<|bos|>`, and `more` special tokens.
pub fn tokenizer(more: &[&str]) -> Tokenizer {
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        vocab.insert(byte_char(byte).to_string(), json!(byte));
    }
    let special = ["<|im_start|>", "<|im_end|>", "<|bos|>"];
    let mut added = Vec::new();
    for (id, name) in (256..).zip(special.iter().chain(more)) {
        vocab.insert((*name).to_owned(), json!(id));
        added.push(json!({"id": id, "content": name, "special": true, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false}));
    }
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json_bytes(file.to_string().as_bytes()).unwrap()
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Writes readable text with characters of one, two and four bytes, quotes and line feeds; of
/// `allowed_token_ids` it takes one, and it ends only where a test allows an end.
pub fn draw(draw: &Draw<'_>) -> u32 {
    let key = mix(draw.context ^ draw.sampling.seed.rotate_left(17) ^ (u64::from(draw.choice) << 40));
    if let Some(allowed) = &draw.sampling.allowed_token_ids {
        return allowed[(key % allowed.len() as u64) as usize];
    }
    let last = |n: usize| draw.output.len().checked_sub(n).map(|i| draw.output[i]);
    match (last(3), last(2), last(1)) {
        (_, _, Some(0xc3)) => return 0xa9,
        (_, _, Some(0xf0)) => return 0x9f,
        (_, Some(0xf0), Some(0x9f)) => return 0x98,
        (Some(0xf0), Some(0x9f), Some(0x98)) => return 0x80,
        _ => {}
    }
    let symbols = b"abcdefghijklmnopqrstuvwxyz    \"\n\\\xc3\xf0";
    u32::from(symbols[(key % symbols.len() as u64) as usize])
}

/// What a test may change.
pub struct Options {
    pub config: ServerConfig,
    pub engine: EngineConfig,
    pub step: Duration,
    pub slots: u32,
    pub blocks: u32,
    pub fim: bool,
    pub template: bool,
    /// Special tokens from id 259 on.
    pub tokens: &'static [&'static str],
    pub draw: DrawFn,
    /// What the device is.
    pub shape: fn(&mut Geometry),
    /// Pools prompts; 8 numbers that depend on every token unless a test wants others.
    pub pool: Option<PoolFn>,
    pub task: Task,
    /// Last touches on the model.
    pub setup: fn(&mut ServedModel),
    /// What requests are accounted in.
    pub ledger: Option<Ledger>,
    /// What it costs.
    pub prices: Option<Arc<PriceBook>>,
    /// What counts limits.
    pub quotas: Option<Quotas>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: ServerConfig { port: 0, workers: 2, ..ServerConfig::default() },
            engine: EngineConfig::default(),
            step: Duration::ZERO,
            slots: 64,
            blocks: 4096,
            fim: false,
            template: true,
            tokens: &[],
            draw: Arc::new(draw),
            shape: |_| {},
            pool: None,
            task: Task::Generate,
            setup: |_| {},
            ledger: None,
            prices: None,
            quotas: None,
        }
    }
}

/// A running server.
pub struct TestServer {
    pub address: SocketAddr,
    pub metrics_address: Option<SocketAddr>,
    pub admin_address: Option<SocketAddr>,
    pub handle: ServerHandle,
    pub engine: EngineHandle,
    pub run: JoinHandle<ExitReason>,
}

/// Loads a model as the binary would.
pub fn model(options: &Options) -> ServedModel {
    let tokenizer = tokenizer(options.tokens);
    let vocab = VOCAB.max(tokenizer.vocab_size() as u32);
    let mut geometry = Geometry {
        groups: vec![GroupKind::Full],
        blocks: options.blocks,
        slots: options.slots,
        snapshots: 0,
        max_step_tokens: 2048,
        max_context: CONTEXT,
        vocab,
        generates: true,
        pools: false,
        whole_prompts: false,
    };
    (options.shape)(&mut geometry);
    let mut sim = SimConfig::new(geometry);
    if let Some(pool) = &options.pool {
        sim.pool = pool.clone();
    }
    sim.step_time = options.step;
    sim.draw = options.draw.clone();
    let (engine, events) =
        mirai_engine::start(options.engine.clone(), move || Ok(Box::new(SimExecutor::new(sim)))).unwrap();
    let mut model = ServedModel {
        names: vec![MODEL.to_owned(), ALIAS.to_owned()],
        revision: String::new(),
        estimate: None,
        footprint: None,
        max_model_len: CONTEXT,
        tokenizer,
        template: options
            .template
            .then(|| ChatTemplate::compile(TEMPLATE, SpecialTokens::default()).unwrap()),
        eos_token_ids: vec![EOS],
        bos_token_id: Some(258),
        generation_defaults: GenerationDefaults::default(),
        task: options.task.clone(),
        reasoning: None,
        vocab,
        created: 1_700_000_000,
        fim: options.fim.then_some(FimTokens { prefix: 256, suffix: 257, middle: 258 }),
        engine,
        events,
    };
    (options.setup)(&mut model);
    model
}

impl TestServer {
    pub async fn start(mut options: Options) -> Self {
        let server = Server::bind(options.config.clone()).await.unwrap();
        let handle = server.handle();
        let (address, metrics_address) = (server.local_addr(), server.metrics_addr());
        let admin_address = server.admin_addr();
        if let Some(ledger) = options.ledger.take() {
            handle
                .account(Accounting { ledger, replica: "pod-0".to_owned(), prices: options.prices.take() })
                .unwrap();
        }
        if let Some(quotas) = options.quotas.take() {
            handle.quotas(quotas).unwrap();
        }
        let served = model(&options);
        let engine = served.engine.clone();
        handle.ready(served).unwrap();
        Self { address, metrics_address, admin_address, handle, engine, run: tokio::spawn(server.run()) }
    }

    pub async fn plain() -> Self {
        Self::start(Options::default()).await
    }

    /// Ends it and says why it ended.
    pub async fn stop(self) -> ExitReason {
        self.handle.shutdown();
        self.run.await.unwrap()
    }

    /// A metric's value: the series whose name and labels begin like this, added up.
    pub async fn metric(&self, name: &str) -> f64 {
        let address = self.metrics_address.unwrap_or(self.address);
        let page = crate::client::get(address, "/metrics").await;
        assert_eq!(page.status, 200);
        sum(&page.text(), name)
    }

    /// Waits until `check` holds.
    pub async fn until(&self, what: &str, limit: Duration, mut check: impl AsyncFnMut(&Self) -> bool) {
        let start = Instant::now();
        while !check(self).await {
            assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
            // The cores are for what is waited for.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// The sum of all series of a page that begin like this.
pub fn sum(page: &str, name: &str) -> f64 {
    page.lines()
        .filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{']) || name.contains('{'))
        })
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap())
        .sum()
}

/// A chat body.
pub fn chat(text: &str, more: &Value) -> Value {
    let mut body =
        json!({"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 16, "seed": 1});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// A completion body.
pub fn completion(prompt: &Value, more: &Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 16, "seed": 1});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}
