//! Exports of a small ledger, and what must never be in one.

use super::*;
use crate::date;
use crate::row::{EnergyMethod, Row, UserKind};
use crate::store::tests::{Database, LEASE, SqliteFile, closed, new, tokens};
use crate::store::{Entry, Grouping};
use crate::value::Hex;

const BOOK: &str = "currency = 'EUR'\n[[list]]\nversion = '2026-11'\nvalid_from = 2026-11-01\n\
                    [[list.model]]\nname = 'gpt-oss-120b'\ninput = 0.15\ncached_input = 0.075\noutput = 0.6\n\
                    gpu_hour = 3.6\n\
                    [[list]]\nversion = '2026-12'\nvalid_from = 2026-11-20\n\
                    [[list.model]]\nname = '*'\ninput = 0.3\noutput = 1\n";

/// What must never leave: it is where a person would be.
const CANARY: &str = "canary-7f3a";

fn row(n: u64, at: &str, application: &str, model: &str) -> Row {
    let row = Row {
        id: format!("R{n}"),
        queued_at: date::parse(at).unwrap(),
        application: application.into(),
        key_id: format!("{application}-1"),
        model: model.into(),
        user: Some(CANARY.into()),
        user_salt: Some(Hex([0xca; 16])),
        user_commitment: Some(Hex([0xcb; 32])),
        user_anon: UserKind::Present,
        prompt_tokens: 1200,
        cached_tokens: 1000,
        gpu_micros: 1_500_000,
        energy_microjoules: 720_000_000,
        energy_method: if n.is_multiple_of(2) { EnergyMethod::Nvml } else { EnergyMethod::Estimated },
        price_version: (n != 4).then(|| if n > 2 { "2026-12".into() } else { "2026-11".into() }),
        ..Row::default()
    };
    closed(&row, 300)
}

fn ledger() -> (SqliteFile, Box<dyn Store>) {
    let db = SqliteFile::new();
    let mut store = db.connect();
    let me = store.register("w", LEASE, false).unwrap();
    let rows = [
        row(0, "2026-11-19T08:00:00Z", "mail", "gpt-oss-120b"),
        row(1, "2026-11-19T23:59:59Z", "mail", "gpt-oss-120b"),
        row(2, "2026-11-20T00:00:00Z", "mail", "unknown"),
        row(3, "2026-11-20T00:00:00Z", "mail", "gpt-oss-120b"),
        row(4, "2026-11-20T12:00:00Z", "search, \"all\"", "gpt-oss-120b"),
    ];
    let entries: Vec<Entry> = rows.into_iter().map(new).collect();
    store.commit(&me, LEASE, &entries).unwrap();
    let running = Row { state: crate::State::Open, ..row(9, "2026-11-20T12:00:00Z", "mail", "gpt-oss-120b") };
    let running = tokens(&Row { finish: crate::Finish::None, ..running }, 7);
    store.commit(&me, LEASE, &[new(running)]).unwrap();
    (db, Box::new(store))
}

fn request(book: Option<&PriceBook>) -> Request<'_> {
    Request {
        query: UsageQuery {
            from: date::parse("2026-11-01").unwrap(),
            to: date::parse("2026-12-01").unwrap(),
            bucket: date::DAY,
            group_by: Grouping { application: true, model: true, ..Grouping::default() },
            ..UsageQuery::ALL
        },
        prices: book,
        footprint: None,
        account: "ministry".into(),
    }
}

fn written(request: &Request<'_>, format: Format) -> (String, Exported) {
    let (_db, mut store) = ledger();
    let mut out = Vec::new();
    let done = export(&mut *store, request, format, &mut out).unwrap();
    (String::from_utf8(out).unwrap(), done)
}

#[test]
fn csv_has_costs_to_the_last_part_and_leaves_out_what_runs() {
    let book = PriceBook::parse(BOOK).unwrap();
    let (text, done) = written(&request(Some(&book)), Format::Csv);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[0],
        "start,end,application,model,requests,open_requests,prompt_tokens,cached_tokens,completion_tokens,\
         reasoning_tokens,wasted_tokens,gpu_seconds,energy_joules,measured_joules,cost,currency,\
         unpriced_requests"
    );
    // Two requests: 2 x (200 x 0.15 + 1000 x 0.075 + 300 x 0.6) millionths, and 3 s of a device at 3.6 an hour.
    assert_eq!(
        lines[1],
        "2026-11-19T00:00:00Z,2026-11-20T00:00:00Z,mail,gpt-oss-120b,2,0,2400,2000,600,0,0,3,1440,720,\
         0.00357,EUR,0"
    );
    assert_eq!(lines.len(), 5);
    assert!(lines[2].contains("mail,gpt-oss-120b,1,1,1200,1000,300,"), "{}", lines[2]);
    // Its list is the earlier one, which has no price for it; costs are empty, not zero.
    assert!(lines[3].contains("mail,unknown,1,0,") && lines[3].ends_with(",,EUR,1"), "{}", lines[3]);
    // It names no list: the one in force counts. Its name needs quotes.
    assert!(
        lines[4].contains(",\"search, \"\"all\"\"\",") && lines[4].ends_with("0.00066,EUR,0"),
        "{}",
        lines[4]
    );
    assert_eq!(done, Exported { lines: 4, requests: 5, open: 1, unpriced: 1 });
}

/// Coarser groups are the sums of finer ones, costs included, though costs need finer ones still.
#[test]
fn groups_add_up_whatever_they_are() {
    let book = PriceBook::parse(BOOK).unwrap();
    let mut totals = Vec::new();
    for bits in 0..16_u8 {
        for bucket in [date::MINUTE, date::HOUR, date::DAY, i64::MAX] {
            let mut request = request(Some(&book));
            request.query.bucket = bucket;
            request.query.group_by = Grouping {
                application: bits & 1 > 0,
                key_id: bits & 2 > 0,
                model: bits & 4 > 0,
                price_version: bits & 8 > 0,
            };
            let (_db, mut store) = ledger();
            let mut sum = Line::default();
            for_each_line(&mut *store, &request, |line| {
                sum.sums.add(&line.sums);
                sum.unpriced += line.unpriced;
                sum.cost = Some(sum.cost.unwrap_or_default() + line.cost.unwrap_or_default());
                assert!(line.end > line.sums.start && line.end <= request.query.to);
                Ok(())
            })
            .unwrap();
            totals.push(sum);
        }
    }
    assert!(totals.iter().all(|line| *line == totals[0]), "{totals:?}");
    assert_eq!((totals.len(), totals[0].unpriced, totals[0].sums.requests), (64, 1, 5));
}

#[test]
fn json_is_json_and_a_table_lines_up() {
    let mut request = request(None);
    request.footprint = Some(Footprint { pue: 1.25, kg_per_kwh: 0.04 });
    let (text, _) = written(&request, Format::Json);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["object"], "usage");
    assert_eq!((json["data"].as_array().unwrap().len(), json["data"][0]["requests"].as_u64()), (4, Some(2)));
    // 1440 J are 0.0004 kWh, and a quarter more for the site.
    assert!((json["data"][0]["kWh"].as_f64().unwrap() - 0.0005).abs() < 1e-12);
    assert!((json["data"][0]["kgCO2eq"].as_f64().unwrap() - 0.00002).abs() < 1e-12);
    assert!(json["data"][0].get("cost").is_none());
    let (text, _) = written(&request, Format::Table);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5);
    assert!(lines[1].starts_with("2026-11-19 00:00  2026-11-20 00:00  mail "), "{}", lines[1]);
    let at = lines[0].find("open_requests").unwrap() + "open_requests".len();
    assert!(lines[1..].iter().all(|line| line[..at].ends_with(['0', '1'])), "{text}");
}

#[test]
fn focus_has_a_line_for_each_kind_of_token() {
    let book = PriceBook::parse(BOOK).unwrap();
    let (text, done) = written(&request(Some(&book)), Format::Focus);
    let lines: Vec<Vec<String>> = text.lines().map(split).collect();
    let get = |line: usize, column: &str| {
        let at = lines[0].iter().position(|name| name == column).unwrap();
        lines[line][at].as_str()
    };
    assert!(lines.iter().all(|line| line.len() == lines[0].len()));
    assert_eq!((done.lines, lines.len()), (4, 1 + 4 + 3 + 3 + 3));
    let first =
        ["x_TokenType", "ConsumedQuantity", "ConsumedUnit", "ListUnitPrice", "BilledCost", "SkuPriceId"];
    assert_eq!(
        first.map(|column| get(1, column)),
        ["input", "400", "tokens", "0.00000015", "0.00006", "gpt-oss-120b/input/2026-11"]
    );
    assert_eq!(
        ["ConsumedQuantity", "ConsumedUnit", "BilledCost"].map(|c| get(4, c)),
        ["0.000833333333", "Hours", "0.003"]
    );
    assert_eq!(
        (get(1, "BillingPeriodStart"), get(1, "BillingPeriodEnd")),
        ("2026-11-01T00:00:00Z", "2026-12-01T00:00:00Z")
    );
    assert_eq!(
        (get(1, "ChargePeriodStart"), get(1, "ChargePeriodEnd")),
        ("2026-11-19T00:00:00Z", "2026-11-20T00:00:00Z")
    );
    assert_eq!((get(1, "SubAccountId"), get(1, "BillingAccountId")), ("mail", "ministry"));
    // Without a price there is no SKU price, and so no quantity but ours.
    let unknown = lines.iter().position(|line| line.contains(&"unknown".to_owned())).unwrap();
    for column in ["SkuPriceId", "ConsumedQuantity", "PricingQuantity", "ListUnitPrice", "ConsumedUnit"] {
        assert_eq!(get(unknown, column), "", "{column}");
    }
    assert_eq!((get(unknown, "BilledCost"), get(unknown, "x_Quantity")), ("0", "200"));
    // Costs of lines are those of the other formats.
    let total: f64 = (1..lines.len()).map(|line| get(line, "BilledCost").parse::<f64>().unwrap()).sum();
    assert!((total - (0.00357 + 2.0 * 0.00066)).abs() < 1e-12, "{total}");
}

fn split(line: &str) -> Vec<String> {
    let (mut fields, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => fields.last_mut().unwrap().push(c),
        }
    }
    fields
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_is_read_back_by_its_own_reader() {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use ::parquet::record::RowAccessor;
    let book = PriceBook::parse(BOOK).unwrap();
    let (_db, mut store) = ledger();
    let mut request = request(Some(&book));
    request.footprint = Some(Footprint { pue: 1.0, kg_per_kwh: 0.1 });
    let mut file = Vec::new();
    export(&mut *store, &request, Format::Parquet, &mut file).unwrap();
    let reader = SerializedFileReader::new(bytes::Bytes::from(file)).unwrap();
    let rows: Vec<_> = reader.get_row_iter(None).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!(rows[0].get_timestamp_micros(0).unwrap(), date::parse("2026-11-19").unwrap());
    assert_eq!((rows[0].get_string(2).unwrap().as_str(), rows[0].get_long(6).unwrap()), ("mail", 2400));
    let text = rows[0].to_string();
    assert!(text.contains("cost: 0.003570000000") && text.contains("kWh: 0.0004"), "{text}");
    assert!(rows[2].to_string().contains("cost: null"), "{}", rows[2]);
    // Nothing at all is a file too.
    request.query.to = request.query.from;
    let mut file = Vec::new();
    export(&mut *store, &request, Format::Parquet, &mut file).unwrap();
    assert_eq!(
        SerializedFileReader::new(bytes::Bytes::from(file)).unwrap().metadata().file_metadata().num_rows(),
        0
    );
}

/// `LEDGER_GOLDEN=1 cargo test -p mirai-ledger published_examples` writes them anew.
#[test]
fn the_published_examples_are_what_is_written() {
    let book = PriceBook::parse(BOOK).unwrap();
    let mut request = request(Some(&book));
    request.footprint = Some(Footprint { pue: 1.2, kg_per_kwh: 0.04 });
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/examples/");
    for (format, name) in [
        (Format::Table, "usage.txt"),
        (Format::Csv, "usage.csv"),
        (Format::Json, "usage.json"),
        (Format::Focus, "usage-focus.csv"),
    ] {
        let (text, _) = written(&request, format);
        let path = format!("{folder}{name}");
        if std::env::var_os("LEDGER_GOLDEN").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "{name}");
    }
}

/// Rows hold a canary where a person would be. No export has it, nor its salt, nor its commitment.
#[test]
fn no_format_holds_a_user() {
    let book = PriceBook::parse(BOOK).unwrap();
    for format in [Format::Table, Format::Csv, Format::Json, Format::Focus] {
        let mut request = request(Some(&book));
        request.query.group_by = Grouping::ALL;
        let (text, done) = written(&request, format);
        assert!(done.requests == 5 && text.contains("mail"));
        for word in [CANARY, "caca", "cbcb", "user"] {
            assert!(!text.to_lowercase().contains(word), "{format:?} holds {word}");
        }
    }
}

#[test]
fn an_output_that_fails_and_a_table_without_end_are_errors() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (_db, mut store) = ledger();
    for format in [Format::Csv, Format::Json, Format::Focus, Format::Table] {
        let error = export(&mut *store, &request(None), format, &mut Full).unwrap_err();
        assert!(matches!(error, ExportError::Write(_)), "{error}");
    }
    let mut out = Vec::new();
    let mut table = text::Table::new(Vec::new(), &mut out);
    let line = Line::default();
    (0..MAX_TABLE).for_each(|_| table.line(&line).unwrap());
    assert!(matches!(table.line(&line), Err(ExportError::TooLong)));
}
