//! What a model is served for: from the configuration and the model's files to the loader's and the server's words.
//!
//! Owns the defaults of embedders and rerankers. Neither reads a weight nor computes a score.

use std::collections::BTreeMap;

use mirai_model::backend::Pooling;
use mirai_model::loader::read_spec;
use mirai_model::pooling::{Matryoshka, PublishedPooling, Task as ModelTask};
use mirai_model::spec::{Head, PoolOutput};
use mirai_model::texts::TokenizerData;
use mirai_model::{LoadOptions, ModelSource, ModelSpec};
use mirai_server::{EmbedSpec, PairFormat, ScoreRule, ScoreSpec, Task as ServedTask};
use mirai_text::{SpecialTokens, Tokenizer};

use crate::config::Task;
use crate::exit::Failure;
use crate::tokenizer::tokenizer;

/// Largest tokenizer file.
const MAX_TOKENIZER: usize = 64 << 20;

/// How Qwen3-Reranker asks whether a document answers a query (its model card). Its answer is "yes" or "no".
const JUDGE: [&str; 4] = [
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct \
     provided. Note that the answer can only be \"yes\" or \"no\".<|im_end|>\n<|im_start|>user\n",
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: ",
    "\n<Document>: ",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
];

/// The loader's options for the task that was asked for. An encoder sees a prompt only as a whole, so its steps are at
/// least as long as its context.
pub(crate) fn options(
    task: Task,
    source: &ModelSource,
    options: LoadOptions,
) -> Result<LoadOptions, Failure> {
    let spec = read_spec(source).map_err(Failure::model)?;
    let generates = matches!(spec.head, Head::Logits { .. });
    let task = match task {
        Task::Auto => ModelTask::Native,
        Task::Generate if generates || read_as_embedder(&spec) => ModelTask::Plain,
        Task::Generate => return Err(cannot(&spec, "generate")),
        Task::Embed if spec.is_bidirectional() => ModelTask::Native,
        Task::Embed => ModelTask::Embed(Pooling::Last),
        Task::Score if matches!(&spec.head, Head::Pool(p) if p.output != PoolOutput::Embedding) => {
            ModelTask::Plain
        }
        Task::Score if spec.is_bidirectional() => return Err(cannot(&spec, "score")),
        Task::Score => {
            let (no, yes) = judgement(source)?;
            ModelTask::Rerank { no, yes }
        }
    };
    let mut options = LoadOptions { task, ..options };
    if spec.is_bidirectional() {
        let context = options.max_model_len.unwrap_or(spec.context).min(spec.context);
        options.max_step_tokens = options.max_step_tokens.max(context);
    }
    Ok(options)
}

/// A causal model that is an embedder only because its folder says so.
fn read_as_embedder(spec: &ModelSpec) -> bool {
    !spec.is_bidirectional() && spec.architecture.ends_with("ForCausalLM")
}

fn cannot(spec: &ModelSpec, what: &str) -> Failure {
    Failure::usage(format!("--task {what}: {} cannot", spec.architecture))
}

/// Ids of the two words that a reranker says.
fn judgement(source: &ModelSource) -> Result<(u32, u32), Failure> {
    const FILE: &str = "tokenizer.json";
    let ModelSource::Files { files, .. } = source else {
        return Err(Failure::usage("--task score: rerankers in GGUF files are not supported"));
    };
    let file =
        files.get(FILE).ok_or_else(|| Failure::model(format!("--task score needs the model's {FILE}")))?;
    let bytes = file.read(FILE, MAX_TOKENIZER).map_err(Failure::model)?;
    let (tokenizer, _) = tokenizer(TokenizerData::Files(BTreeMap::from([(FILE.to_owned(), bytes)])))?;
    let id = |word: &str| {
        let missing = || Failure::model(format!("--task score: the vocabulary has no token `{word}`"));
        tokenizer.token_to_id(word).ok_or_else(missing)
    };
    Ok((id("no")?, id("yes")?))
}

/// What the server is to know of a loaded model's head.
pub(crate) fn served(
    spec: &ModelSpec,
    published: Option<&PublishedPooling>,
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
) -> Result<ServedTask, Failure> {
    let Head::Pool(pool) = &spec.head else { return Ok(ServedTask::Generate) };
    match &pool.output {
        PoolOutput::Embedding => Ok(ServedTask::Embed(EmbedSpec {
            width: spec.hidden as u32,
            matryoshka: published.is_some_and(|p| p.matryoshka != Matryoshka::Unknown),
            // Where nobody says otherwise: what OpenAI's clients expect.
            normalize: published.is_none_or(|p| p.normalized),
        })),
        PoolOutput::Classifier { labels } => {
            let rule = match labels {
                1 => ScoreRule::Sigmoid,
                2 => ScoreRule::Softmax { index: 1 },
                n => return Err(Failure::model(format!("a classifier with {n} labels scores no pairs"))),
            };
            Ok(ServedTask::Score(ScoreSpec { pair: pair(tokenizer, special)?, rule }))
        }
        PoolOutput::Tokens { .. } => {
            let [before, query, document, after] = JUDGE.map(str::to_owned);
            let pair = PairFormat::Text { before, query, document, after };
            Ok(ServedTask::Score(ScoreSpec { pair, rule: ScoreRule::Softmax { index: 1 } }))
        }
    }
}

/// `<s> query </s></s> document </s>`, as XLM-RoBERTa's tokenizer joins a pair.
fn pair(tokenizer: &Tokenizer, special: &SpecialTokens) -> Result<PairFormat, Failure> {
    let id = |name: &str, token: &Option<String>| {
        let id = token.as_deref().and_then(|token| tokenizer.token_to_id(token));
        id.ok_or_else(|| {
            Failure::model(format!("tokenizer_config.json names no {name} that the vocabulary has"))
        })
    };
    let (start, end) = (id("bos_token", &special.bos)?, id("eos_token", &special.eos)?);
    Ok(PairFormat::Tokens { before: vec![start], between: vec![end, end], after: vec![end] })
}
