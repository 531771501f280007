//! One measured request: sends it, reads its stream, takes the times. Owns what counts as a failure.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::{Method, Response, StatusCode};

use crate::FailureKind;
use crate::client::{Client, transport};
use crate::error::Failure;
use crate::sse::{Chunk, Kind, Scanner, Usage, excerpt, skim};

/// Most bytes of an error answer that are read for its message.
const MAX_ERROR_BODY: usize = 64 << 10;
/// Most chunks of one stream.
const MAX_CHUNKS: usize = 16 << 20;
/// How long the end of the body may follow `[DONE]` for the connection to be used again.
const TAIL: Duration = Duration::from_secs(1);

/// What was measured of one request. Times are since the start of the run.
#[derive(Debug)]
pub(crate) struct Sample {
    /// When the schedule wanted it sent; equal to `start` in a closed loop.
    pub(crate) intended: Duration,
    pub(crate) start: Duration,
    /// When the request was over for the client, whatever its outcome.
    pub(crate) end: Duration,
    /// Tokens asked for.
    pub(crate) requested: u32,
    pub(crate) timeline: Timeline,
    pub(crate) outcome: Result<Usage, Failure>,
}

/// Times of the chunks of one stream, since its request was sent.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    pub(crate) ttft: Option<Duration>,
    /// Last chunk with text or usage.
    pub(crate) last: Duration,
    /// Last chunk with text.
    pub(crate) last_token: Duration,
    /// Gaps between chunks with text, in microseconds.
    pub(crate) itl_us: Vec<u32>,
}

impl Timeline {
    fn token(&mut self, now: Duration) {
        if self.ttft.is_none() {
            self.ttft = Some(now);
        } else {
            let gap = now.saturating_sub(self.last_token).as_micros();
            self.itl_us.push(u32::try_from(gap).unwrap_or(u32::MAX));
        }
        self.last_token = now;
    }
}

/// Everything that is the same for all requests of a run.
pub(crate) struct Plan {
    pub(crate) client: Client,
    pub(crate) path: &'static str,
    pub(crate) timeout: Duration,
}

/// Sends one request and measures it. `origin` is the start of the run.
pub(crate) async fn execute(
    plan: &Plan,
    body: Bytes,
    requested: u32,
    origin: Instant,
    intended: Option<Duration>,
) -> Sample {
    let sent = Instant::now();
    let start = sent - origin;
    let mut timeline = Timeline::default();
    let work = exchange(plan, body, sent, &mut timeline);
    let outcome = tokio::time::timeout(plan.timeout, work).await.unwrap_or_else(|_| {
        let message = format!("not complete after {} s", plan.timeout.as_secs_f64());
        Err(Failure::new(FailureKind::Timeout, message))
    });
    let end = if outcome.is_ok() { start + timeline.last } else { origin.elapsed() };
    Sample { intended: intended.unwrap_or(start), start, end, requested, timeline, outcome }
}

async fn exchange(
    plan: &Plan,
    body: Bytes,
    sent: Instant,
    timeline: &mut Timeline,
) -> Result<Usage, Failure> {
    let (response, sender) = plan.client.send(Method::POST, plan.path, body).await?;
    let status = response.status();
    if status != StatusCode::OK {
        let message = error_message(response).await;
        // The body may not have been read to its end, so the connection is not used again.
        return Err(Failure::new(FailureKind::Http(status.as_u16()), message));
    }
    check_content_type(&response)?;
    let mut body = response.into_body();
    let mut stream = Stream::default();
    while !stream.is_done {
        let Some(frame) = body.frame().await else {
            return Err(stream.cut());
        };
        let Ok(data) = frame.map_err(transport)?.into_data() else {
            continue;
        };
        // One time stamp a read: all its chunks became visible together.
        stream.feed(&data, sent.elapsed(), timeline)?;
    }
    let usage = stream.finish(timeline)?;
    let tail = async {
        while let Some(frame) = body.frame().await {
            frame.ok()?;
        }
        Some(())
    };
    if let Ok(Some(())) = tokio::time::timeout(TAIL, tail).await {
        plan.client.recycle(sender);
    }
    Ok(usage)
}

/// State of one stream of chunks.
#[derive(Default)]
struct Stream {
    scanner: Scanner,
    usage: Option<Usage>,
    /// When a choice ended without text, for answers whose text is all withheld.
    finished: Option<Duration>,
    chunks: usize,
    is_done: bool,
}

impl Stream {
    fn feed(&mut self, data: &[u8], now: Duration, timeline: &mut Timeline) -> Result<(), Failure> {
        let Self { scanner, usage, finished, chunks, is_done } = self;
        let mut failure = None;
        let fed = scanner.feed(data, |payload| {
            if *is_done {
                return Ok(());
            }
            let chunk: Chunk = skim(payload)?;
            *chunks += 1;
            if *chunks > MAX_CHUNKS {
                return Err(format!("more than {MAX_CHUNKS} chunks"));
            }
            match chunk.kind {
                Kind::Done => *is_done = true,
                Kind::Error => {
                    failure = Some(Failure::new(FailureKind::ServerError, excerpt(payload)));
                    return Err(String::new());
                }
                Kind::Token => {
                    timeline.token(now);
                    timeline.last = now;
                }
                Kind::Finish => {
                    *finished = Some(now);
                    timeline.last = now;
                }
                Kind::Other => timeline.last = now,
            }
            *usage = chunk.usage.or(*usage);
            Ok(())
        });
        match (failure, fed) {
            (Some(failure), _) => Err(failure),
            (None, Err(reason)) => Err(Failure::new(FailureKind::Malformed, reason)),
            (None, Ok(())) => Ok(()),
        }
    }

    /// The body has ended before `[DONE]`.
    fn cut(&self) -> Failure {
        let message = if self.chunks == 0 && !self.scanner.is_mid_line() {
            "the answer is empty".to_owned()
        } else {
            let place = if self.scanner.is_mid_line() { "within a line" } else { "before [DONE]" };
            format!("the stream ended {place} after {} chunks", self.chunks)
        };
        Failure::new(FailureKind::CutStream, message)
    }

    fn finish(&self, timeline: &mut Timeline) -> Result<Usage, Failure> {
        let usage = self.usage.ok_or_else(|| {
            Failure::new(
                FailureKind::NoUsage,
                "no usage chunk; does the server know stream_options.include_usage?",
            )
        })?;
        if usage.completion_tokens > 0 && timeline.ttft.is_none() {
            timeline.ttft = self.finished;
        }
        if usage.completion_tokens == 0 || timeline.ttft.is_none() {
            let message = format!("usage says {} completion tokens", usage.completion_tokens);
            return Err(Failure::new(FailureKind::NoTokens, message));
        }
        Ok(usage)
    }
}

fn check_content_type(response: &Response<Incoming>) -> Result<(), Failure> {
    let value = response.headers().get(hyper::header::CONTENT_TYPE);
    let text = value.and_then(|value| value.to_str().ok()).unwrap_or("none");
    if text.trim_start().to_ascii_lowercase().starts_with("text/event-stream") {
        return Ok(());
    }
    let message = format!("Content-Type is {text:?}, not text/event-stream");
    Err(Failure::new(FailureKind::Malformed, message))
}

/// The message of an OpenAI error body, else its beginning.
async fn error_message(response: Response<Incoming>) -> String {
    let body = match Limited::new(response.into_body(), MAX_ERROR_BODY).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return format!("unreadable body: {error}"),
    };
    let value: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let message = value.as_ref().and_then(|value| {
        value.pointer("/error/message").or_else(|| value.pointer("/message")).and_then(|text| text.as_str())
    });
    message.map_or_else(|| excerpt(&body), ToOwned::to_owned)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    const TOKEN: &[u8] = b"data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
    const USAGE: &[u8] =
        b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n";

    #[test]
    fn times_of_a_stream() {
        let (mut stream, mut timeline) = (Stream::default(), Timeline::default());
        stream
            .feed(
                b"data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
                ms(1),
                &mut timeline,
            )
            .unwrap();
        stream.feed(TOKEN, ms(10), &mut timeline).unwrap();
        stream.feed(TOKEN, ms(15), &mut timeline).unwrap();
        stream.feed(&[TOKEN, TOKEN].concat(), ms(35), &mut timeline).unwrap();
        stream.feed(USAGE, ms(36), &mut timeline).unwrap();
        assert!(stream.is_done);
        let usage = stream.finish(&mut timeline).unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 4));
        assert_eq!(timeline.ttft, Some(ms(10)));
        assert_eq!(timeline.itl_us, [5_000, 20_000, 0]);
        assert_eq!(timeline.last, ms(36));
    }

    #[test]
    fn an_answer_whose_text_is_withheld_still_has_a_first_token() {
        let (mut stream, mut timeline) = (Stream::default(), Timeline::default());
        let finish = b"data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\n";
        stream.feed(finish, ms(7), &mut timeline).unwrap();
        stream.feed(USAGE, ms(8), &mut timeline).unwrap();
        stream.finish(&mut timeline).unwrap();
        assert_eq!(timeline.ttft, Some(ms(7)));
    }

    #[test]
    fn failures_of_a_stream() {
        let mut timeline = Timeline::default();
        let kind = |bytes: &[u8], timeline: &mut Timeline| {
            let mut stream = Stream::default();
            match stream.feed(bytes, ms(1), timeline) {
                Err(failure) => failure.kind,
                Ok(()) if !stream.is_done => stream.cut().kind,
                Ok(()) => stream.finish(timeline).unwrap_err().kind,
            }
        };
        assert_eq!(
            kind(b"data: {\"error\":{\"message\":\"x\"}}\n\n", &mut timeline),
            FailureKind::ServerError
        );
        assert_eq!(kind(b"data: nonsense\n\n", &mut timeline), FailureKind::Malformed);
        assert_eq!(kind(TOKEN, &mut timeline), FailureKind::CutStream);
        assert_eq!(kind(b"", &mut timeline), FailureKind::CutStream);
        assert_eq!(kind(b"data: {", &mut timeline), FailureKind::CutStream);
        assert_eq!(kind(b"data: [DONE]\n\n", &mut timeline), FailureKind::NoUsage);
        let none = b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3}}\n\ndata: [DONE]\n\n";
        assert_eq!(kind(none, &mut timeline), FailureKind::NoTokens);
    }
}
