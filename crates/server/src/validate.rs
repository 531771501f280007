//! The one place where a request is judged: any endpoint's body becomes one [`GenerationRequest`], or a 400
//! that names the field.
//!
//! Owns ranges, defaults and caps. Ranges are checked before anything is tokenized or allocated, and finiteness
//! after the cast to the type that the device uses.

use std::sync::Arc;

use mirai_engine::SamplingParams;
use mirai_text::ReasoningStart;

use crate::api::common::Common;
use crate::api::wire::PromptInput;
use crate::auth::Attribution;
use crate::config::Limits;
use crate::error::ApiError;
use crate::model::ModelInfo;
use crate::rules::{Body, Rules};
use crate::task::Wanted;
use crate::{prompt, unsupported};

/// Which shape the answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
}

/// A request that can be served: what goes to the engine, and how its answer is written.
#[derive(Debug)]
pub(crate) struct GenerationRequest {
    pub(crate) kind: Kind,
    /// The served name asked for.
    pub(crate) model: Arc<str>,
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) sampling: Arc<SamplingParams>,
    /// Choices for each prompt.
    pub(crate) n: u32,
    pub(crate) output: OutputOptions,
    /// Of the client, before the server mixes in who it is.
    pub(crate) cache_salt: Option<String>,
    /// Whom it says that it is for.
    pub(crate) attribution: Attribution,
}

/// One prompt.
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) ids: Arc<[u32]>,
    /// Its text, where it is to be echoed.
    pub(crate) echo: Option<String>,
    /// Most output tokens; at least 1.
    pub(crate) max_tokens: u32,
    /// Where it leaves the model, if reasoning is to be told apart.
    pub(crate) reasoning: Option<ReasoningStart>,
}

/// How the answer is written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct OutputOptions {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    pub(crate) logprobs: bool,
    pub(crate) prompt_logprobs: bool,
    pub(crate) tokens_as_ids: bool,
    pub(crate) return_token_ids: bool,
    pub(crate) echo: bool,
    /// `max_tokens` 0 with `echo`: the prompt comes back and no output.
    pub(crate) echo_only: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) skip_special: bool,
    /// Reasoning is made and counted, but not shown.
    pub(crate) hide_reasoning: bool,
}

/// Judges a body.
///
/// # Errors
/// 400 naming the field, 404 for another model.
pub(crate) fn validate(mut body: Body, rules: Rules<'_>) -> Result<GenerationRequest, ApiError> {
    let common = match &mut body {
        Body::Chat(chat) => chat.take_common(),
        Body::Completion(completion) => completion.take_common(),
    };
    let model = resolve_model(common.model.as_deref(), rules.model)?.clone();
    rules.model.task.check(Wanted::Text)?;
    unsupported::check(&common, &body)?;
    let cap = token_cap(&common, &body)?;
    let mut output = output_options(&common, &body, cap, rules)?;
    let n = choices(&common, &body, rules.limits)?;
    let mut sampling = sampling(&common, rules)?;
    sampling.logprobs = logprobs(&body, rules.limits)?;
    sampling.prompt_logprobs = prompt_logprobs(&common, &output, sampling.logprobs, rules.limits)?;
    output.logprobs = sampling.logprobs.is_some();
    output.prompt_logprobs = common.prompt_logprobs.is_some();
    sampling.bad_words = bad_words(&common, rules)?;
    let (kind, inputs) = match body {
        Body::Chat(chat) => (Kind::Chat, vec![prompt::chat(*chat, rules)?]),
        Body::Completion(body) => (Kind::Completion, prompt::completion(*body, rules)?),
    };
    let prompts = inputs
        .into_iter()
        .map(|input| fit(input, cap, &output, sampling.min_tokens, rules))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(GenerationRequest {
        kind,
        model,
        prompts,
        sampling: Arc::new(sampling),
        n,
        output,
        attribution: Attribution::of(common.user, common.safety_identifier, common.metadata),
        cache_salt: common.cache_salt,
    })
}

/// Looks a model's name up in the table of served names.
pub(crate) fn resolve_model<'a>(
    wanted: Option<&str>,
    model: &'a ModelInfo,
) -> Result<&'a Arc<str>, ApiError> {
    model.resolve(wanted).ok_or_else(|| {
        ApiError::model_not_found("this model is not served here; GET /v1/models lists what is")
            .param("model")
    })
}

/// The cap that the request names. `max_completion_tokens` wins over its older name.
fn token_cap(common: &Common, body: &Body) -> Result<Option<u32>, ApiError> {
    let (name, cap) = match body {
        Body::Chat(chat) if chat.max_completion_tokens.is_some() => {
            ("max_completion_tokens", chat.max_completion_tokens)
        }
        _ => ("max_tokens", common.max_tokens),
    };
    let echo = matches!(body, Body::Completion(c) if c.echo == Some(true));
    if cap == Some(0) && !echo {
        return Err(out_of_range(name, "0", "at least 1"));
    }
    if let (Some(min), Some(cap)) = (common.min_tokens, cap)
        && min > cap
    {
        let text = format!("`min_tokens` is {min}, more than `{name}` ({cap})");
        return Err(ApiError::invalid_value(text).param("min_tokens"));
    }
    Ok(cap)
}

fn output_options(
    common: &Common,
    body: &Body,
    cap: Option<u32>,
    rules: Rules<'_>,
) -> Result<OutputOptions, ApiError> {
    let stream = common.stream == Some(true);
    let options = common.stream_options.unwrap_or_default();
    if common.stream_options.is_some() && !stream {
        return Err(ApiError::invalid_value("`stream_options` needs `stream`").param("stream_options"));
    }
    if common.cache_salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.len() > 128) {
        return Err(ApiError::invalid_value("`cache_salt` must have 1 to 128 bytes").param("cache_salt"));
    }
    let continuous_usage = options.continuous_usage_stats == Some(true);
    if continuous_usage && options.include_usage != Some(true) {
        let text = "`stream_options.continuous_usage_stats` needs `stream_options.include_usage`";
        return Err(ApiError::invalid_value(text).param("stream_options.continuous_usage_stats"));
    }
    let echo = matches!(body, Body::Completion(c) if c.echo == Some(true));
    let hide_reasoning = matches!(body, Body::Chat(chat) if chat.include_reasoning == Some(false));
    Ok(OutputOptions {
        stream,
        include_usage: options.include_usage == Some(true),
        continuous_usage,
        tokens_as_ids: common.return_tokens_as_token_ids == Some(true),
        return_token_ids: common.return_token_ids == Some(true),
        echo,
        echo_only: echo && cap == Some(0),
        stop: stop(common, rules.limits)?,
        include_stop: common.include_stop_str_in_output == Some(true),
        skip_special: common.skip_special_tokens != Some(false),
        hide_reasoning,
        ..OutputOptions::default()
    })
}

fn stop(common: &Common, limits: &Limits) -> Result<Vec<String>, ApiError> {
    let list = common.stop.as_ref().map(|stop| stop.0.as_slice()).unwrap_or_default();
    if list.len() > limits.max_stop {
        let text = format!("`stop` has {} strings, the limit is {}", list.len(), limits.max_stop);
        return Err(ApiError::invalid_value(text).param("stop"));
    }
    for stop in list {
        if stop.is_empty() || stop.len() > limits.max_stop_bytes {
            let text =
                format!("a stop string has {} bytes, 1 to {} are served", stop.len(), limits.max_stop_bytes);
            return Err(ApiError::invalid_value(text).param("stop"));
        }
    }
    Ok(list.to_vec())
}

fn choices(common: &Common, body: &Body, limits: &Limits) -> Result<u32, ApiError> {
    let n = common.n.unwrap_or(1);
    if n == 0 || n > limits.max_n {
        return Err(out_of_range("n", &n.to_string(), &format!("from 1 to {}", limits.max_n)));
    }
    let Body::Completion(completion) = body else { return Ok(n) };
    if completion.best_of.is_some_and(|best| best > n) {
        return Err(ApiError::unsupported("`best_of` beyond `n` is not served").param("best_of"));
    }
    let prompts = completion.prompt.as_ref().map_or(0, PromptInput::len);
    if prompts > limits.max_prompts {
        let text = format!("{prompts} prompts, the limit is {}", limits.max_prompts);
        return Err(ApiError::invalid_value(text).param("prompt"));
    }
    let all = prompts as u64 * u64::from(n);
    if all > u64::from(limits.max_choices) {
        let text = format!(
            "{prompts} prompts with `n` = {n} are {all} choices, the limit is {}",
            limits.max_choices
        );
        return Err(ApiError::invalid_value(text).param("n"));
    }
    Ok(n)
}

/// Everything that says how tokens are drawn.
fn sampling(common: &Common, rules: Rules<'_>) -> Result<SamplingParams, ApiError> {
    let defaults = &rules.model.defaults;
    let temperature = number("temperature", common.temperature.or(defaults.temperature), 1.0, 0.0, 2.0)?;
    let top_p = number("top_p", common.top_p.or(defaults.top_p), 1.0, 0.0, 1.0)?;
    if top_p <= 0.0 {
        return Err(out_of_range("top_p", "0", "above 0, at most 1"));
    }
    let penalty = common.repetition_penalty.or(defaults.repetition_penalty);
    let repetition_penalty = number("repetition_penalty", penalty, 1.0, 0.0, 10.0)?;
    if repetition_penalty < 1e-3 {
        return Err(out_of_range("repetition_penalty", &repetition_penalty.to_string(), "from 0.001 to 10"));
    }
    Ok(SamplingParams {
        temperature: settle_temperature(temperature),
        top_p,
        top_k: top_k(common.top_k.or(defaults.top_k), rules.model.vocab)?,
        min_p: number("min_p", common.min_p.or(defaults.min_p), 0.0, 0.0, 1.0)?,
        seed: common.seed.map_or_else(rand::random, i64::cast_unsigned),
        presence_penalty: number("presence_penalty", common.presence_penalty, 0.0, -2.0, 2.0)?,
        frequency_penalty: number("frequency_penalty", common.frequency_penalty, 0.0, -2.0, 2.0)?,
        repetition_penalty,
        logit_bias: logit_bias(common, rules)?,
        allowed_token_ids: allowed_token_ids(common, rules.model)?,
        stop_token_ids: stop_token_ids(common, rules.model)?,
        min_tokens: common.min_tokens.unwrap_or(0),
        ..SamplingParams::default()
    })
}

/// Temperatures too small to divide by: below 1e-5 greedy is meant, and 0.01 already is as sharp as logits get.
fn settle_temperature(temperature: f32) -> f32 {
    if temperature < 1e-5 { 0.0 } else { temperature.max(0.01) }
}

/// A number in a range, finite as the f32 that the device computes with.
fn number(name: &'static str, value: Option<f64>, default: f32, min: f32, max: f32) -> Result<f32, ApiError> {
    let Some(value) = value else { return Ok(default) };
    let cast = value as f32;
    if !cast.is_finite() || !(min..=max).contains(&cast) {
        return Err(out_of_range(name, &value.to_string(), &format!("from {min} to {max}")));
    }
    // -0.0 compares equal to the lower bound; what is drawn must not depend on its sign.
    Ok(cast + 0.0)
}

fn out_of_range(name: &str, value: &str, range: &str) -> ApiError {
    ApiError::invalid_value(format!("`{name}` is {value}, but must be {range}")).param(name)
}

fn top_k(value: Option<i64>, vocab: u32) -> Result<u32, ApiError> {
    match value {
        None | Some(-1 | 0) => Ok(0),
        Some(k) if k < -1 => Err(out_of_range("top_k", &k.to_string(), "-1 or more")),
        Some(k) => Ok(u32::try_from(k).ok().filter(|k| *k < vocab).unwrap_or(0)),
    }
}

fn logit_bias(common: &Common, rules: Rules<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(bias) = &common.logit_bias else { return Ok(Vec::new()) };
    let limit = rules.limits.max_logit_bias;
    if bias.0.len() > limit {
        let text = format!("`logit_bias` has {} entries, the limit is {limit}", bias.0.len());
        return Err(ApiError::invalid_value(text).param("logit_bias"));
    }
    let mut list = Vec::with_capacity(bias.0.len());
    for &(id, value) in &bias.0 {
        token_id("logit_bias", id, rules.model.vocab)?;
        list.push((id, number("logit_bias", Some(value), 0.0, -100.0, 100.0)?));
    }
    list.sort_by_key(|entry| entry.0);
    if list.windows(2).any(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::invalid_value("`logit_bias` names a token twice").param("logit_bias"));
    }
    Ok(list)
}

fn allowed_token_ids(common: &Common, model: &ModelInfo) -> Result<Option<Vec<u32>>, ApiError> {
    let Some(list) = &common.allowed_token_ids else { return Ok(None) };
    if list.0.is_empty() {
        let text = "`allowed_token_ids` is empty, so no token would be possible";
        return Err(ApiError::invalid_value(text).param("allowed_token_ids"));
    }
    sorted_ids("allowed_token_ids", list.0.clone(), model.vocab).map(Some)
}

fn stop_token_ids(common: &Common, model: &ModelInfo) -> Result<Vec<u32>, ApiError> {
    let mut list = common.stop_token_ids.as_ref().map(|ids| ids.0.clone()).unwrap_or_default();
    list = sorted_ids("stop_token_ids", list, model.vocab)?;
    if common.ignore_eos != Some(true) {
        list.extend_from_slice(&model.eos_token_ids);
        list.sort_unstable();
        list.dedup();
    }
    Ok(list)
}

fn sorted_ids(name: &'static str, mut list: Vec<u32>, vocab: u32) -> Result<Vec<u32>, ApiError> {
    list.sort_unstable();
    list.dedup();
    match list.last() {
        Some(&largest) => token_id(name, largest, vocab).map(|()| list),
        None => Ok(list),
    }
}

fn token_id(name: &'static str, id: u32, vocab: u32) -> Result<(), ApiError> {
    if id < vocab {
        return Ok(());
    }
    let text = format!("`{name}` names token {id}, but ids end at {}", vocab.saturating_sub(1));
    Err(ApiError::invalid_value(text).param(name))
}

fn logprobs(body: &Body, limits: &Limits) -> Result<Option<u32>, ApiError> {
    let (name, wanted) = match body {
        Body::Chat(chat) => match (chat.logprobs, chat.top_logprobs) {
            (Some(true), top) => ("top_logprobs", Some(top.unwrap_or(0))),
            (_, Some(top)) if top > 0 => {
                return Err(ApiError::invalid_value("`top_logprobs` needs `logprobs`").param("top_logprobs"));
            }
            _ => ("logprobs", None),
        },
        Body::Completion(completion) => ("logprobs", completion.logprobs),
    };
    at_most_logprobs(name, wanted, limits)
}

/// The engine is asked for them either by name, or because an echoed prompt shows log-probabilities too.
fn prompt_logprobs(
    common: &Common,
    output: &OutputOptions,
    logprobs: Option<u32>,
    limits: &Limits,
) -> Result<Option<u32>, ApiError> {
    if common.prompt_logprobs.is_some() && output.stream {
        let text = "`prompt_logprobs` is not served together with `stream`";
        return Err(ApiError::unsupported(text).param("prompt_logprobs"));
    }
    let named = at_most_logprobs("prompt_logprobs", common.prompt_logprobs, limits)?;
    Ok(if output.echo { named.max(logprobs) } else { named })
}

fn at_most_logprobs(name: &str, wanted: Option<u32>, limits: &Limits) -> Result<Option<u32>, ApiError> {
    match wanted {
        Some(k) if k > limits.max_logprobs => {
            Err(out_of_range(name, &k.to_string(), &format!("from 0 to {}", limits.max_logprobs)))
        }
        other => Ok(other),
    }
}

/// A word is forbidden at the beginning of a text and after a space, as most vocabularies spell these apart.
fn bad_words(common: &Common, rules: Rules<'_>) -> Result<Vec<Vec<u32>>, ApiError> {
    let list = common.bad_words.as_ref().map(|words| words.0.as_slice()).unwrap_or_default();
    let limits = rules.limits;
    if list.len() > limits.max_bad_words {
        let text = format!("`bad_words` has {} entries, the limit is {}", list.len(), limits.max_bad_words);
        return Err(ApiError::invalid_value(text).param("bad_words"));
    }
    let mut sequences = Vec::with_capacity(2 * list.len());
    for word in list {
        let bare = word.trim_start();
        if bare.is_empty() || word.len() > limits.max_bad_word_bytes {
            let text =
                format!("a bad word has {} bytes, 1 to {} are served", word.len(), limits.max_bad_word_bytes);
            return Err(ApiError::invalid_value(text).param("bad_words"));
        }
        for text in [bare.to_owned(), format!(" {bare}")] {
            let ids = rules
                .model
                .tokenizer
                .encode(&text, false, false)
                .map_err(|e| prompt::encoding("bad_words", &e))?;
            if !ids.is_empty() && ids.iter().all(|id| *id < rules.model.vocab) && !sequences.contains(&ids) {
                sequences.push(ids);
            }
        }
    }
    Ok(sequences)
}

/// Prompt and cap together must fit into the context.
fn fit(
    input: prompt::Input,
    cap: Option<u32>,
    output: &OutputOptions,
    min_tokens: u32,
    rules: Rules<'_>,
) -> Result<Prompt, ApiError> {
    let context = rules.model.max_model_len;
    let length = u32::try_from(input.ids.len()).unwrap_or(u32::MAX);
    let room = context.saturating_sub(length);
    let needed = if output.echo_only { 1 } else { cap.unwrap_or(1).max(min_tokens).max(1) };
    if needed > room {
        let text = format!(
            "the prompt has {length} tokens and {needed} output tokens are asked for, but the context has {context}"
        );
        // The field to change: the prompt if it leaves no room at all, else the cap.
        let param = if room == 0 { input.param } else { "max_tokens" };
        return Err(ApiError::context_length(text).param(param));
    }
    let server_cap = rules.limits.max_output_tokens.unwrap_or(u32::MAX).max(min_tokens).max(1);
    let default = rules.model.defaults.max_new_tokens.unwrap_or(u32::MAX).max(min_tokens).max(1);
    let wanted = if output.echo_only { 1 } else { cap.unwrap_or_else(|| room.min(default)) };
    Ok(Prompt {
        reasoning: input.reasoning,
        ids: input.ids.into(),
        echo: output.echo.then_some(input.text).flatten(),
        max_tokens: wanted.min(server_cap).min(room),
    })
}
