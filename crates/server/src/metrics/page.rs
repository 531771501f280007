//! Prometheus' text format: one page of it.

use std::fmt::Write as _;

use super::Histogram;

/// Families and samples, in the order in which they are written.
pub(super) struct Page(String);

impl Page {
    /// An empty page.
    pub(super) fn new() -> Self {
        Self(String::with_capacity(32 << 10))
    }

    /// What has been written.
    pub(super) fn into_text(self) -> String {
        self.0
    }

    pub(super) fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    pub(super) fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = if labels.is_empty() {
            writeln!(self.0, "{name} {value}")
        } else {
            writeln!(self.0, "{name}{{{labels}}} {value}")
        };
    }

    pub(super) fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, "", value);
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, labels: &str, histogram: &Histogram) {
        let (rows, sum, count) = histogram.read();
        self.buckets(name, help, labels, &rows, sum, count);
    }

    /// A histogram of which `rows` are (bound, observations up to it).
    pub(super) fn buckets(
        &mut self,
        name: &str,
        help: &str,
        labels: &str,
        rows: &[(f64, u64)],
        sum: f64,
        count: u64,
    ) {
        self.family(name, "histogram", help);
        let comma = if labels.is_empty() { "" } else { "," };
        for (bound, value) in rows {
            let _ = writeln!(self.0, "{name}_bucket{{{labels}{comma}le=\"{bound:?}\"}} {value}");
        }
        let _ = writeln!(self.0, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, count as f64);
    }
}

/// Label values: backslash, quote and line feed.
pub(super) fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
