//! `GET /v1/organization/usage/completions`: sums of requests, in OpenAI's shape.
//!
//! Owns the parameters and their bounds. Who calls sees what its own application used, unless it may see all.

use hyper::Uri;
use mirai_ledger::Scope;
use mirai_ledger::date::{DAY, HOUR, MINUTE, SECOND};
use mirai_ledger::store::sqlite::system_micros;
use mirai_ledger::store::{Grouping, MAX_FILTER, UsageQuery, UsageRow};

use crate::api::usage::{UsageBucket, UsagePage, UsageResult};
use crate::auth::Caller;
use crate::error::ApiError;
use crate::http::reply::Reply;
use crate::routes;
use crate::state::State;

/// Most results of one page, over all its buckets.
const MAX_RESULTS: u32 = 10_000;
/// Most parameters that are looked at.
const MAX_PARAMETERS: usize = 500;
/// What begins the word that leads to the next page.
const PAGE: &str = "page_";

/// Whose usage a caller may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sees<'a> {
    /// Everybody's.
    All,
    /// That of one application.
    Own(&'a str),
}

impl<'a> Sees<'a> {
    pub(crate) fn of(caller: &'a Caller) -> Self {
        if caller.scopes.has(Scope::Admin) { Self::All } else { Self::Own(&caller.application) }
    }
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    query: UsageQuery,
    /// End of the whole query, of which this is a page; microseconds since 1970.
    end: i64,
}

/// Answers the request.
pub(crate) async fn usage(state: &State, uri: &Uri, sees: Sees<'_>) -> Result<Reply, ApiError> {
    let asked = asked(uri.query().unwrap_or_default(), system_micros(), sees)?;
    let Some(reader) = state.usage() else {
        return Err(ApiError::not_found("this server keeps no ledger"));
    };
    let Some(asked) = asked else {
        // Only other applications were asked for: there is nothing to see of them, not even whether they exist.
        return Ok(Reply::json(&page_of(Vec::new(), None)));
    };
    let query = asked.query.clone();
    let rows = reader.query(move |store| store.usage(&query)).await?;
    if rows.len() > MAX_RESULTS as usize {
        let text = format!("more than {MAX_RESULTS} results: ask for fewer buckets or groups");
        return Err(ApiError::invalid_value(text).param("limit"));
    }
    Ok(Reply::json(&page(&asked, rows)))
}

/// The parameters, decoded. `name[]` is `name`: both spellings of lists are in use.
fn parameters(text: &str) -> Result<Vec<(String, String)>, ApiError> {
    let bad = || ApiError::invalid_value("the query string cannot be read");
    let mut out = Vec::new();
    for part in text.split('&').filter(|part| !part.is_empty()) {
        if out.len() == MAX_PARAMETERS {
            return Err(ApiError::invalid_value(format!("more than {MAX_PARAMETERS} parameters")));
        }
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let decode = |text: &str| routes::decode(&text.replace('+', " ")).ok_or_else(bad);
        let name = decode(name)?;
        out.push((name.strip_suffix("[]").unwrap_or(&name).to_owned(), decode(value)?));
    }
    Ok(out)
}

fn seconds(name: &'static str, value: &str) -> Result<i64, ApiError> {
    // A year of four digits: far from where microseconds overflow.
    let good = |n: &i64| (0..253_402_300_800).contains(n);
    let seconds = value.parse().ok().filter(good);
    seconds.map(|n| n * SECOND).ok_or_else(|| {
        ApiError::invalid_value(format!("`{name}` must be a time in Unix seconds")).param(name)
    })
}

/// Widths of buckets: the word, the width, and how many a page has by default and at most.
const WIDTHS: [(&str, i64, i64, i64); 3] =
    [("1m", MINUTE, 60, 1440), ("1h", HOUR, 24, 168), ("1d", DAY, 7, 31)];

/// Judges the parameters. `None` if the caller may see nothing of what it asks for.
fn asked(text: &str, now: i64, sees: Sees<'_>) -> Result<Option<Asked>, ApiError> {
    let (mut start, mut end, mut page, mut limit) = (None, now, None, None);
    let mut width = WIDTHS[2];
    let mut query = UsageQuery {
        group_by: Grouping::default(),
        closed_only: true,
        limit: MAX_RESULTS + 1,
        ..UsageQuery::ALL
    };
    for (name, value) in parameters(text)? {
        match name.as_str() {
            "start_time" => start = Some(seconds("start_time", &value)?),
            "end_time" => end = seconds("end_time", &value)?,
            "page" => page = Some(value),
            "limit" => limit = Some(value),
            "bucket_width" => {
                width = WIDTHS.into_iter().find(|width| width.0 == value).ok_or_else(|| {
                    ApiError::invalid_value("`bucket_width` must be 1m, 1h or 1d").param("bucket_width")
                })?;
            }
            "group_by" => value.split(',').try_for_each(|by| group(&mut query.group_by, by))?,
            "project_ids" => filter("project_ids", &mut query.applications, value)?,
            "api_key_ids" => filter("api_key_ids", &mut query.key_ids, value)?,
            "models" => filter("models", &mut query.models, value)?,
            "user_ids" | "batch" => {
                let text = format!("`{name}` is not served: users are pseudonyms, and there are no batches");
                return Err(ApiError::unsupported(text).param(name));
            }
            // As in bodies: what is not known is ignored.
            _ => {}
        }
    }
    let (_, bucket, default, most) = width;
    let Some(start) = start else {
        return Err(ApiError::missing_field("`start_time` is missing").param("start_time"));
    };
    let count = match limit {
        None => default,
        Some(text) => text.parse().ok().filter(|n| (1..=most).contains(n)).ok_or_else(|| {
            ApiError::invalid_value(format!("`limit` must be from 1 to {most}")).param("limit")
        })?,
    };
    let from = match page {
        None => start,
        Some(page) => page
            .strip_prefix(PAGE)
            .and_then(|at| seconds("page", at).ok())
            .filter(|at| *at >= start)
            .ok_or_else(|| ApiError::invalid_value("`page` is not one that was given out").param("page"))?,
    };
    if end <= start {
        return Err(ApiError::invalid_value("`end_time` must be after `start_time`").param("end_time"));
    }
    query.bucket = bucket;
    query.from = from.min(end);
    query.to = end.min((from / bucket + count) * bucket);
    if let Sees::Own(own) = sees {
        if !query.applications.is_empty() && !query.applications.iter().any(|name| name == own) {
            return Ok(None);
        }
        query.applications = vec![own.to_owned()];
    }
    Ok(Some(Asked { query, end }))
}

fn group(by: &mut Grouping, name: &str) -> Result<(), ApiError> {
    match name {
        "project_id" => by.application = true,
        "api_key_id" => by.key_id = true,
        "model" => by.model = true,
        _ => {
            let text = "`group_by` takes project_id, api_key_id and model";
            return Err(ApiError::invalid_value(text).param("group_by"));
        }
    }
    Ok(())
}

fn filter(name: &'static str, values: &mut Vec<String>, value: String) -> Result<(), ApiError> {
    if values.len() == MAX_FILTER {
        return Err(
            ApiError::invalid_value(format!("`{name}` has more than {MAX_FILTER} values")).param(name)
        );
    }
    values.push(value);
    Ok(())
}

fn page_of(data: Vec<UsageBucket>, next: Option<i64>) -> UsagePage {
    UsagePage {
        object: "page".to_owned(),
        data,
        has_more: next.is_some(),
        next_page: next.map(|at| format!("{PAGE}{}", at / SECOND)),
    }
}

/// Buckets without gaps, with their results.
fn page(asked: &Asked, rows: Vec<UsageRow>) -> UsagePage {
    let query = &asked.query;
    let mut rows = rows.into_iter().filter(|row| row.requests > 0).peekable();
    let mut data = Vec::new();
    let mut at = query.from;
    while at < query.to {
        let end = ((at / query.bucket + 1) * query.bucket).min(query.to);
        let mut results = Vec::new();
        while let Some(row) = rows.next_if(|row| row.start < end) {
            results.push(result(&query.group_by, row));
        }
        data.push(UsageBucket {
            object: "bucket".to_owned(),
            start_time: at / SECOND,
            // An end within a second is told as the next one: `now` is no whole second.
            end_time: (end + SECOND - 1) / SECOND,
            results,
        });
        at = end;
    }
    page_of(data, (query.to < asked.end).then_some(query.to))
}

fn result(by: &Grouping, row: UsageRow) -> UsageResult {
    UsageResult {
        object: "organization.usage.completions.result".to_owned(),
        input_tokens: row.prompt_tokens,
        input_cached_tokens: row.cached_tokens,
        input_uncached_tokens: row.prompt_tokens.saturating_sub(row.cached_tokens),
        output_tokens: row.completion_tokens,
        input_audio_tokens: 0,
        output_audio_tokens: 0,
        num_model_requests: row.requests,
        project_id: by.application.then_some(row.application),
        user_id: None,
        api_key_id: by.key_id.then_some(row.key_id),
        model: by.model.then_some(row.model),
        batch: None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: i64 = 1_795_486_338 * SECOND;

    fn refused(text: &str) -> (String, String) {
        let error = asked(text, NOW, Sees::All).unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        (error.param.unwrap_or_default(), error.code.to_owned())
    }

    fn found(text: &str, sees: Sees<'_>) -> Asked {
        asked(text, NOW, sees).unwrap().unwrap()
    }

    #[test]
    fn parameters_are_openais() {
        let day = DAY / SECOND;
        let start = NOW / DAY * day;
        let asked = found(&format!("start_time={}", start - 10 * day), Sees::All);
        assert_eq!((asked.query.bucket, asked.query.from), (DAY, (start - 10 * day) * SECOND));
        assert_eq!((asked.query.to, asked.end), ((start - 3 * day) * SECOND, NOW));
        let text = format!(
            "start_time={}&end_time={start}&bucket_width=1h&limit=3&group_by=model,project_id&group_by[]=api_key_id\
             &models[]=a%2Fb&models%5B%5D=c+d&api_key_ids=k&project_ids=p&unknown=1&page=page_{}",
            start - day,
            start - day + 1800,
        );
        let asked = found(&text, Sees::All);
        let query = &asked.query;
        assert_eq!(query.group_by, Grouping { price_version: false, ..Grouping::ALL });
        assert_eq!(query.models, ["a/b", "c d"]);
        assert_eq!((&query.key_ids[..], &query.applications[..]), (&["k".into()][..], &["p".into()][..]));
        // Within a bucket: it is the first of three.
        assert_eq!(query.from, (start - day + 1800) * SECOND);
        assert_eq!(query.to, (start - day + 3 * 3600) * SECOND);
        assert!(query.closed_only && query.limit == MAX_RESULTS + 1);
    }

    #[test]
    fn wrong_parameters_are_named() {
        let many = "start_time=1&".to_owned() + &"models=m&".repeat(MAX_FILTER + 1);
        for (text, param) in [
            ("", "start_time"),
            ("start_time=", "start_time"),
            ("start_time=-1", "start_time"),
            ("start_time=1e9", "start_time"),
            ("start_time=9999999999999", "start_time"),
            ("start_time=2&end_time=2", "end_time"),
            ("start_time=1&end_time=x", "end_time"),
            ("start_time=1&bucket_width=1w", "bucket_width"),
            ("start_time=1&limit=0", "limit"),
            ("start_time=1&limit=32", "limit"),
            ("start_time=1&bucket_width=1h&limit=169", "limit"),
            ("start_time=1&group_by=user_id", "group_by"),
            ("start_time=1&page=2", "page"),
            ("start_time=100&page=page_99", "page"),
            ("start_time=1&models=%ff", ""),
            (many.as_str(), "models"),
        ] {
            assert_eq!(refused(text).0, param, "{text}");
        }
        assert_eq!(refused("start_time=1&user_ids=u"), ("user_ids".into(), "unsupported_parameter".into()));
        assert_eq!(refused("start_time=1&batch=true").1, "unsupported_parameter");
        assert_eq!(refused(&"a&".repeat(MAX_PARAMETERS + 1)).0, "");
    }

    #[test]
    fn an_application_sees_its_own() {
        let own = Sees::Own("mail");
        assert_eq!(found("start_time=1", own).query.applications, ["mail"]);
        assert_eq!(found("start_time=1&project_ids=x&project_ids=mail", own).query.applications, ["mail"]);
        assert_eq!(asked("start_time=1&project_ids=other", NOW, own).unwrap(), None);
        assert!(found("start_time=1", Sees::All).query.applications.is_empty());
        assert_eq!(found("start_time=1", Sees::Own("")).query.applications, [""]);
    }

    #[test]
    fn buckets_follow_one_another_page_by_page() {
        let start = NOW / DAY * DAY - 3 * DAY + HOUR;
        let mut page_word = String::new();
        let mut buckets = Vec::new();
        for _ in 0..9 {
            let asked =
                found(&format!("start_time={}&limit=2{page_word}&group_by=model", start / SECOND), Sees::All);
            let row = |at: i64, requests| UsageRow {
                start: at.max(asked.query.from),
                model: "m".into(),
                requests,
                prompt_tokens: 5,
                cached_tokens: 2,
                ..UsageRow::default()
            };
            let rows = vec![row(asked.query.from, 1), row(asked.query.from + DAY, 0)];
            let page = page(&asked, rows);
            buckets.extend(page.data);
            assert_eq!(page.has_more, page.next_page.is_some());
            let Some(next) = page.next_page else { break };
            page_word = format!("&page={next}");
        }
        assert_eq!(buckets.len(), 4);
        assert_eq!(buckets[0].start_time, start / SECOND);
        assert_eq!(buckets[3].end_time, NOW / SECOND);
        assert!(buckets.windows(2).all(|pair| pair[0].end_time == pair[1].start_time));
        assert_eq!(buckets.iter().map(|bucket| bucket.results.len()).collect::<Vec<_>>(), [1, 0, 1, 0]);
        let json = serde_json::to_value(&buckets[0].results[0]).unwrap();
        assert_eq!((json["input_uncached_tokens"].as_u64(), json["model"].as_str()), (Some(3), Some("m")));
        assert!(json["project_id"].is_null() && json["user_id"].is_null() && json["batch"].is_null());
    }
}
