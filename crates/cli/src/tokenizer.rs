//! From a model's vocabulary to the tokenizer of `text`, whichever form it has.

use mirai_model::texts::TokenizerData;
use mirai_text::{GgufVocab, SpecialTokens, Tokenizer, TokenizerConfig, tekken_special_tokens};

use crate::exit::Failure;

/// The tokenizer, and the tokens that the model's files name.
pub(crate) fn tokenizer(data: TokenizerData) -> Result<(Tokenizer, SpecialTokens), Failure> {
    match data {
        TokenizerData::Files(files) => {
            let config = files.get("tokenizer_config.json").map(|b| TokenizerConfig::from_json_bytes(b));
            let config = config.transpose().map_err(Failure::model)?;
            // Where a folder has both, both say the same, and the first also says what surrounds a text.
            if let Some(json) = files.get("tokenizer.json") {
                let tokenizer = Tokenizer::from_json_bytes(json).map_err(Failure::model)?;
                return Ok((tokenizer, config.unwrap_or_default().special));
            }
            if let Some(json) = files.get("tekken.json") {
                let tokenizer = Tokenizer::from_tekken_bytes(json).map_err(Failure::model)?;
                let special =
                    config.map_or_else(|| tekken_special_tokens(&tokenizer), |config| config.special);
                return Ok((tokenizer, special));
            }
            let found: Vec<&str> = files.keys().map(String::as_str).collect();
            let found = found.join(", ");
            let text = format!("the model has neither tokenizer.json nor tekken.json (found: {found})");
            Err(Failure::model(text))
        }
        TokenizerData::Gguf(vocab) => {
            let text = |id: Option<u32>| id.and_then(|id| vocab.tokens.get(id as usize).cloned());
            let special = SpecialTokens {
                bos: text(vocab.bos_id),
                eos: text(vocab.eos_id),
                unk: text(vocab.unk_id),
                pad: None,
            };
            let vocab = GgufVocab {
                model: vocab.model,
                pre: vocab.pre,
                tokens: vocab.tokens,
                scores: vocab.scores,
                token_types: vocab.token_types,
                merges: vocab.merges,
                bos_id: vocab.bos_id,
                eos_id: vocab.eos_id,
                unk_id: vocab.unk_id,
                add_bos: vocab.add_bos,
                add_eos: vocab.add_eos,
                add_space_prefix: vocab.add_space_prefix,
            };
            Ok((Tokenizer::from_gguf_vocab(vocab).map_err(Failure::model)?, special))
        }
    }
}
