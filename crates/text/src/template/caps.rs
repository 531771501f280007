//! What a template can take, found by rendering probe conversations at load time.
//!
//! A template is a program; the only reliable description of what it accepts is what it does. Each
//! probe carries marker words and looks for them in the output, so that a message which is dropped
//! in silence counts as not accepted, just like one that is refused.

use std::time::SystemTime;

use serde_json::{Map, Value as Json, json};

use super::{ChatTemplate, RenderInput};
use crate::TemplateError;

/// Fuel of one probe; the longest real template needs about a tenth of it.
const PROBE_FUEL: u64 = 100_000;

/// The form of `content` that a template wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ContentStyle {
    /// One string (templates that take both get this).
    #[default]
    Text,
    /// A list of `{"type": "text", "text": ...}`; a string fails or is not rendered.
    Parts,
}

/// The form of a tool call's `arguments` that a template wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ArgumentStyle {
    /// A JSON object, which the template writes itself.
    #[default]
    Object,
    /// JSON text, which the template copies.
    Text,
}

/// How a template takes the reasoning of an assistant's earlier message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReasoningStyle {
    /// Not at all: it is left out.
    #[default]
    Dropped,
    /// In a field of that name beside `content`. The template still decides in which turns it shows it.
    Field(&'static str),
    /// As `{"type": "thinking", "thinking": ...}` among the parts of `content`.
    Part,
}

/// Names of that field, most widely used first.
pub(super) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

/// What a template can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateCaps {
    /// The role `system` at the start.
    pub system: bool,
    /// Several system messages, also later in the conversation.
    pub multiple_system: bool,
    /// The role `developer` as one of its own.
    pub developer: bool,
    /// How content is passed.
    pub content: ContentStyle,
    /// How arguments of tool calls are passed.
    pub arguments: ArgumentStyle,
    /// An assistant message with tool calls may have `content: null`.
    pub null_content: bool,
    /// The `tools` of a request appear in the text.
    pub tools: bool,
    /// Tool calls and results in the history appear in the text.
    pub tool_messages: bool,
    /// Without tools the template wants an empty list, not `none`.
    pub empty_tools: bool,
    /// How earlier reasoning is passed.
    pub reasoning: ReasoningStyle,
}

impl Default for TemplateCaps {
    fn default() -> Self {
        Self {
            system: true,
            multiple_system: true,
            developer: false,
            content: ContentStyle::Text,
            arguments: ArgumentStyle::Object,
            null_content: false,
            tools: false,
            tool_messages: false,
            empty_tools: false,
            reasoning: ReasoningStyle::Dropped,
        }
    }
}

struct Prober<'a> {
    template: &'a ChatTemplate,
    content: ContentStyle,
    empty_tools: bool,
}

/// Renders the probes. Must run on the sandbox's thread.
pub(super) fn probe(template: &ChatTemplate, source: &str) -> Result<TemplateCaps, TemplateError> {
    let mut prober = Prober { template, content: ContentStyle::Text, empty_tools: false };
    prober.find_content_style()?;
    let system = prober.shows(&json!([msg("system", "zqsys"), msg("user", "zquser")]), &["zqsys"]);
    let several_at_start =
        json!([msg("system", "zqsysone"), msg("system", "zqsystwo"), msg("user", "zquser"),]);
    let one_later = json!([
        msg("system", "zqsysone"),
        msg("user", "zquser"),
        msg("assistant", "zqanswer"),
        msg("system", "zqsystwo"),
        msg("user", "zqagain"),
    ]);
    let both = ["zqsysone", "zqsystwo"];
    // Generic templates copy any role into the text. A model knows the developer's only where its
    // template names it.
    let developer = source.contains("developer")
        && prober.shows(&json!([msg("developer", "zqdev"), msg("user", "zquser")]), &["zqdev"]);
    let (arguments, tool_messages) = prober.find_argument_style();
    let null_call = tool_conversation(&Json::Null, arguments);
    let null_content =
        prober.render(&null_call, None).is_ok_and(|text| text.contains("zqtool") && !text.contains("None"));
    let user = json!([msg("user", "zquser")]);
    let tools = prober.render(&user, Some(&probe_tools())).is_ok_and(|text| text.contains("zqtool"));
    Ok(TemplateCaps {
        system,
        multiple_system: prober.shows(&several_at_start, &both) && prober.shows(&one_later, &both),
        developer,
        content: prober.content,
        arguments,
        null_content,
        tools,
        tool_messages,
        empty_tools: prober.empty_tools,
        reasoning: prober.find_reasoning_style(arguments),
    })
}

fn msg(role: &str, text: &str) -> Json {
    json!({"role": role, "content": text})
}

fn probe_tools() -> Json {
    json!([{"type": "function", "function": {
        "name": "zqtool", "description": "zqdescription",
        "parameters": {"type": "object",
            "properties": {"zqkey": {"type": "string", "description": "a key"}},
            "required": ["zqkey"]},
    }}])
}

fn tool_conversation(content: &Json, style: ArgumentStyle) -> Json {
    let object = json!({"zqkey": "zqvalue"});
    let arguments = match style {
        ArgumentStyle::Object => object,
        ArgumentStyle::Text => object.to_string().into(),
    };
    // Nine letters and digits: the only form of id that Mistral's templates accept.
    json!([
        msg("user", "zquser"),
        {"role": "assistant", "content": content, "tool_calls": [{
            "id": "abcdefghi", "type": "function",
            "function": {"name": "zqtool", "arguments": arguments}}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "zqtool", "content": "zqresult"},
        msg("assistant", "zqanswer"),
        msg("user", "zqagain"),
    ])
}

impl Prober<'_> {
    fn render(&self, messages: &Json, tools: Option<&Json>) -> Result<String, TemplateError> {
        let mut messages = messages.clone();
        if self.content == ContentStyle::Parts {
            for message in messages.as_array_mut().into_iter().flatten() {
                if let Json::String(text) = &message["content"] {
                    message["content"] = json!([{"type": "text", "text": text}]);
                }
            }
        }
        let none = json!([]);
        let input = RenderInput {
            messages: &messages,
            tools: tools.or(self.empty_tools.then_some(&none)),
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &Map::new(),
            now: SystemTime::UNIX_EPOCH,
        };
        let fuel = PROBE_FUEL.min(self.template.limits.base_fuel);
        self.template.render_here(&input, fuel)
    }

    fn shows(&self, messages: &Json, markers: &[&str]) -> bool {
        self.render(messages, None).is_ok_and(|text| markers.iter().all(|marker| text.contains(marker)))
    }

    /// Sets the content style and what stands for no tools, or says why no conversation at all
    /// can be rendered.
    fn find_content_style(&mut self) -> Result<(), TemplateError> {
        let user = json!([msg("user", "zquser")]);
        let with_system = json!([msg("system", "zqsys"), msg("user", "zquser")]);
        let plain = self.render(&user, None);
        if let Err(error) = &plain
            && is_limit(error)
        {
            return plain.map(|_| ());
        }
        for (style, empty_tools) in [
            (ContentStyle::Text, false),
            (ContentStyle::Parts, false),
            (ContentStyle::Text, true),
            (ContentStyle::Parts, true),
        ] {
            self.content = style;
            self.empty_tools = empty_tools;
            let accepted = |text: String| text.contains("zquser") && !text.contains("'zquser'");
            if self.render(&user, None).is_ok_and(accepted)
                || self.render(&with_system, None).is_ok_and(accepted)
            {
                return Ok(());
            }
        }
        plain.and_then(|_| {
            Err(TemplateError::Render("the text of a user message does not appear in the prompt".to_owned()))
        })
    }

    fn find_argument_style(&self) -> (ArgumentStyle, bool) {
        for style in [ArgumentStyle::Object, ArgumentStyle::Text] {
            // Python's repr of the object means that text was expected.
            let accepted = |text: String| {
                ["zqtool", "zqkey", "zqvalue", "zqresult"].iter().all(|marker| text.contains(marker))
                    && !text.contains("'zqkey'")
            };
            for content in [json!(""), Json::Null] {
                let messages = tool_conversation(&content, style);
                if self.render(&messages, None).is_ok_and(accepted)
                    || self.render(&messages, Some(&probe_tools())).is_ok_and(accepted)
                {
                    return (style, true);
                }
            }
        }
        (ArgumentStyle::Object, false)
    }
}

impl Prober<'_> {
    /// Looks in which form reasoning appears: in the turn of a tool call, which is where most templates keep it, or
    /// in an earlier answer.
    fn find_reasoning_style(&self, arguments: ArgumentStyle) -> ReasoningStyle {
        for field in REASONING_FIELDS {
            let mut calling = tool_conversation(&json!(""), arguments);
            let mut plain =
                json!([msg("user", "zquser"), msg("assistant", "zqanswer"), msg("user", "zqagain")]);
            // Up to the tool's result, so that the model is still in the turn.
            if let Some(list) = calling.as_array_mut() {
                list.truncate(3);
            }
            calling[1][field] = "zqreason".into();
            plain[1][field] = "zqreason".into();
            if [calling, plain].iter().any(|messages| self.shows(messages, &["zqreason"])) {
                return ReasoningStyle::Field(field);
            }
        }
        let parts =
            json!([{"type": "thinking", "thinking": "zqreason"}, {"type": "text", "text": "zqanswer"}]);
        let messages = json!([
            msg("user", "zquser"),
            {"role": "assistant", "content": parts},
            msg("user", "zqagain"),
        ]);
        // A template that does not look into the list writes it out as it is.
        let accepted = |text: String| {
            text.contains("zqreason")
                && text.contains("zqanswer")
                && !text.contains("\"thinking\"")
                && !text.contains("'thinking'")
        };
        match self.render(&messages, None).is_ok_and(accepted) {
            true => ReasoningStyle::Part,
            false => ReasoningStyle::Dropped,
        }
    }
}

fn is_limit(error: &TemplateError) -> bool {
    matches!(error, TemplateError::OutOfFuel { .. } | TemplateError::OutputTooLarge { .. })
}
