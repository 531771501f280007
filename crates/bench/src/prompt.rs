//! Builds request bodies. Owns what a prompt of random tokens looks like on each endpoint; the same spec and
//! seed always give the same bytes.

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::json;

use crate::dataset::{Input, Spec, Workload, mix};
use crate::trace::BLOCK_TOKENS;
use crate::{BenchOptions, Endpoint};

/// Text whose tokens `/tokenize` is asked for, and whose words make the prompts of the chat endpoint: common
/// words of two languages.
pub(crate) const SAMPLE_TEXT: &str = "the house of a friend stands near the old river and we go there when it is warm \
to read and talk about the work of the day some people like long walks others would rather stay at home with \
a good book every morning the train leaves at seven and comes back late in the evening the city is large but \
quiet in winter children play in the garden while their mother writes letters to her brother in another \
country le jardin est grand et la maison reste calme pendant que nous parlons de notre voyage il faut prendre \
la route avant midi pour arriver chez eux sans retard une lettre attend sur la table avec trois livres et \
quelques fleurs le soir tombe vite dans cette ville où personne ne ferme sa porte on mange du pain du fromage \
et des pommes puis chacun raconte une histoire vraie ou fausse selon son humeur";

/// What random tokens are drawn from.
#[derive(Debug)]
pub(crate) enum Vocabulary {
    /// Token ids.
    Ids(Vec<u32>),
    /// Words, each followed by a space.
    Words(Vec<&'static str>),
}

impl Vocabulary {
    pub(crate) fn words() -> Self {
        let mut words: Vec<&'static str> = SAMPLE_TEXT.split_ascii_whitespace().collect();
        words.sort_unstable();
        words.dedup();
        Self::Words(words)
    }
}

/// Builds bodies for one run.
pub(crate) struct BodyBuilder {
    endpoint: Endpoint,
    vocabulary: Vocabulary,
    seed: u64,
    prefix_len: u32,
    model: String,
    temperature: f64,
    ignore_eos: bool,
}

impl BodyBuilder {
    pub(crate) fn new(options: &BenchOptions, model: &str, vocabulary: Vocabulary) -> Self {
        Self {
            endpoint: options.endpoint,
            vocabulary,
            seed: options.seed,
            prefix_len: options.prefix_len,
            model: serde_json::Value::from(model).to_string(),
            temperature: options.temperature,
            ignore_eos: options.effective_ignore_eos(),
        }
    }

    /// The JSON body of one request.
    pub(crate) fn body(&self, workload: &Workload, spec: &Spec) -> Bytes {
        let prompt = self.prompt(workload, &spec.input);
        let mut body = String::with_capacity(prompt.len() + 256);
        let (before, after, limit) = match self.endpoint {
            Endpoint::Chat => {
                ("\"messages\":[{\"role\":\"user\",\"content\":", "}]", "max_completion_tokens")
            }
            Endpoint::Completions => ("\"prompt\":", "", "max_tokens"),
        };
        // Writing to a String cannot fail.
        let _ = write!(
            body,
            "{{\"model\":{},{before}{prompt}{after},\"{limit}\":{},\"temperature\":{},\"stream\":true,\
             \"stream_options\":{{\"include_usage\":true}}",
            self.model, spec.output_len, self.temperature
        );
        // Servers that do not know the extension may refuse it: it is sent only where it is wanted.
        if self.ignore_eos {
            body.push_str(",\"ignore_eos\":true");
        }
        body.push('}');
        Bytes::from(body)
    }

    /// The prompt as a JSON value.
    fn prompt(&self, workload: &Workload, input: &Input) -> String {
        let mut writer = Writer::new(&self.vocabulary);
        match input {
            Input::Text(index) => return json!(workload.texts[*index]).to_string(),
            Input::Random { len, seed } => {
                writer.tokens(mix(self.seed, u64::MAX), self.prefix_len);
                writer.tokens(*seed, *len);
            }
            Input::Blocks { len, blocks } => {
                let mut left = *len;
                for hash in &workload.hashes[blocks.clone()] {
                    let count = left.min(BLOCK_TOKENS);
                    writer.tokens(mix(mix(self.seed, 3), *hash), count);
                    left -= count;
                }
            }
        }
        writer.finish()
    }
}

/// Appends random tokens to a JSON list of ids or to a JSON string of words.
struct Writer<'a> {
    vocabulary: &'a Vocabulary,
    json: String,
}

impl<'a> Writer<'a> {
    fn new(vocabulary: &'a Vocabulary) -> Self {
        let open = match vocabulary {
            Vocabulary::Ids(_) => "[",
            Vocabulary::Words(_) => "\"",
        };
        Self { vocabulary, json: open.to_owned() }
    }

    /// `count` tokens that depend on `seed` alone.
    fn tokens(&mut self, seed: u64, count: u32) {
        for number in 0..u64::from(count) {
            let draw = mix(seed, number);
            match self.vocabulary {
                Vocabulary::Ids(ids) => {
                    let _ = write!(self.json, "{},", ids[pick(draw, ids.len())]);
                }
                Vocabulary::Words(words) => {
                    self.json.push_str(words[pick(draw, words.len())]);
                    self.json.push(' ');
                }
            }
        }
    }

    fn finish(mut self) -> String {
        if self.json.len() > 1 {
            self.json.pop();
        }
        self.json.push(match self.vocabulary {
            Vocabulary::Ids(_) => ']',
            Vocabulary::Words(_) => '"',
        });
        self.json
    }
}

/// Maps a uniform number to an index below `len` without the bias of a remainder.
fn pick(draw: u64, len: usize) -> usize {
    ((u128::from(draw) * len as u128) >> 64) as usize
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::options::tests::parse;
    use serde_json::Value;

    fn ids() -> Vocabulary {
        Vocabulary::Ids((100..200).collect())
    }

    fn body(args: &[&str], vocabulary: Vocabulary, workload: &Workload, index: usize) -> Value {
        let builder = BodyBuilder::new(&parse(args), "org/mo\"del", vocabulary);
        serde_json::from_slice(&builder.body(workload, &workload.specs[index])).unwrap()
    }

    fn prompt_ids(body: &Value) -> Vec<u64> {
        body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
    }

    fn random(len: u32, seed: u64) -> Spec {
        Spec { input: Input::Random { len, seed }, output_len: 9, at: None }
    }

    #[test]
    fn completions_have_the_exact_number_of_ids() {
        let workload = Workload { specs: vec![random(40, 1), random(40, 2)], ..Workload::default() };
        let args = ["--prefix-len", "10"];
        let (a, b) = (body(&args, ids(), &workload, 0), body(&args, ids(), &workload, 1));
        let (first, second) = (prompt_ids(&a), prompt_ids(&b));
        assert_eq!((first.len(), second.len()), (50, 50));
        assert_eq!(first[..10], second[..10]);
        assert_ne!(first[10..], second[10..]);
        assert!(first.iter().all(|id| (100..200).contains(id)));
        assert_eq!(a["model"], "org/mo\"del");
        assert_eq!(a["max_tokens"], 9);
        assert_eq!(a["stream"], true);
        assert_eq!(a["stream_options"]["include_usage"], true);
        assert_eq!(a["ignore_eos"], true);
        assert_eq!(a["temperature"], 0);
    }

    #[test]
    fn chat_has_words() {
        let workload = Workload { specs: vec![random(25, 1)], ..Workload::default() };
        let args = ["--endpoint", "chat", "--ignore-eos", "false", "--temperature", "0.7"];
        let value = body(&args, Vocabulary::words(), &workload, 0);
        let text = value["messages"][0]["content"].as_str().unwrap();
        assert_eq!(text.split(' ').count(), 25);
        assert_eq!(value["max_completion_tokens"], 9);
        assert_eq!(value["temperature"], 0.7);
        assert!(value.get("ignore_eos").is_none() && value.get("prompt").is_none());
    }

    #[test]
    fn blocks_share_prefixes_as_their_hashes_do() {
        let spec = |len, blocks| Spec { input: Input::Blocks { len, blocks }, output_len: 1, at: None };
        let workload = Workload {
            specs: vec![spec(1100, 0..3), spec(1536, 3..6)],
            hashes: vec![7, 8, 9, 7, 8, 10],
            ..Workload::default()
        };
        let first = prompt_ids(&body(&[], ids(), &workload, 0));
        let second = prompt_ids(&body(&[], ids(), &workload, 1));
        assert_eq!((first.len(), second.len()), (1100, 1536));
        assert_eq!(first[..1024], second[..1024]);
        assert_ne!(first[1024..1100], second[1024..1100]);
        assert_ne!(first[..512], first[512..1024]);
    }

    #[test]
    fn texts_are_escaped() {
        let workload = Workload {
            specs: vec![Spec { input: Input::Text(0), output_len: 1, at: None }],
            texts: vec!["a \"b\"\n\\".to_owned()],
            ..Workload::default()
        };
        assert_eq!(body(&[], ids(), &workload, 0)["prompt"], "a \"b\"\n\\");
        let chat = body(&["--endpoint", "chat"], Vocabulary::words(), &workload, 0);
        assert_eq!(chat["messages"][0]["content"], "a \"b\"\n\\");
    }

    #[test]
    fn picks_are_uniform() {
        let mut counts = [0_u32; 10];
        for number in 0..100_000 {
            counts[pick(mix(5, number), 10)] += 1;
        }
        // Six standard deviations of a binomial count.
        assert!(counts.iter().all(|&count| (f64::from(count) - 10_000.0).abs() < 6.0 * 95.0), "{counts:?}");
    }
}
