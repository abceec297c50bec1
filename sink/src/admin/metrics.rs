//! `/metrics`: the figures by name, in the text format of OpenMetrics, which Prometheus reads. docs/operations.md explains
//! each; a test compares the two.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::atomic::Ordering;

use super::sample::Sample;
use crate::run::Health;

pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const SEE_DOCS: &str = "See docs/operations.md";

/// The figures of one moment.
#[derive(Debug)]
struct Figures {
    counters: Vec<(String, &'static str, u64)>,
    /// Counters with a label `reason`.
    by_reason: Vec<(String, Vec<(&'static str, u64)>)>,
    gauges: Vec<(&'static str, &'static str, f64)>,
}

pub(super) fn text(health: &Health, sample: Sample) -> Result<String, fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Figures::new(health, &sample)));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

impl Figures {
    fn new(health: &Health, sample: &Sample) -> Self {
        let counted = health.metrics.read().into_iter();
        let mut counters: Vec<_> = counted
            .map(|(name, value)| (format!("walmirror_{name}"), SEE_DOCS, value))
            .collect();
        let by_reason = health.metrics.read_by_reason().into_iter();
        let by_reason = by_reason
            .map(|(name, reasons)| (format!("walmirror_{name}"), reasons))
            .collect();
        let of_process = [
            ("walmirror_sessions", "Sessions that began", &health.sessions),
            (
                "walmirror_retries",
                "Sessions that failed and were tried again",
                &health.retries,
            ),
            (
                "walmirror_gaps",
                "Times that everything had to be made anew, the first start included",
                &health.gaps,
            ),
        ];
        counters.extend(
            of_process.map(|(name, help, value)| (name.to_owned(), help, value.load(Ordering::Relaxed))),
        );
        let (tables, due, pending) = health.backfill();
        let bit = |is: bool| f64::from(u8::from(is));
        let mut gauges = vec![
            (
                "walmirror_ready",
                "Whether /readyz says yes",
                bit(health.ready().is_ok()),
            ),
            (
                "walmirror_applied_lsn",
                "Everything before this is in Redis",
                health.applied().0 as f64,
            ),
            (
                "walmirror_confirmed_lsn",
                "Everything before this the server may forget",
                health.confirmed().0 as f64,
            ),
            (
                "walmirror_lag_bytes",
                "WAL that the server has and Redis has not",
                health.lag_bytes() as f64,
            ),
            (
                "walmirror_lag_seconds",
                "How old Redis is while there is more, or no session streams",
                health.lag_seconds(),
            ),
            (
                "walmirror_spool_bytes",
                "Transactions in progress that wait for their commit, in memory and on disk",
                health.spooled() as f64,
            ),
            ("walmirror_tables", "Mirrored and cached tables", tables as f64),
            (
                "walmirror_tables_unfilled",
                "Tables whose backfill is not at its end",
                due as f64,
            ),
            (
                "walmirror_rereading",
                "Whether keys wait to be read again",
                bit(pending),
            ),
        ];
        if let Some(pending) = sample.pending {
            gauges.push((
                "walmirror_pending_keys",
                "Keys that wait to be read again",
                pending as f64,
            ));
        }
        if let Some(retained) = &sample.retained {
            gauges.push((
                "walmirror_slot_retained_bytes",
                "WAL that the server keeps for the slot",
                retained.bytes as f64,
            ));
            if let Some(safe) = retained.safe_bytes {
                gauges.push((
                    "walmirror_slot_safe_bytes",
                    "WAL that may still be written before the slot is lost",
                    safe as f64,
                ));
            }
        }
        if let Some(bytes) = resident_bytes() {
            gauges.push(("walmirror_resident_bytes", "Resident memory", bytes as f64));
        }
        Self {
            counters,
            by_reason,
            gauges,
        }
    }
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, value) in &self.counters {
            let counter = ConstCounter::new(*value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        for (name, reasons) in &self.by_reason {
            let mut family = encoder.encode_descriptor(name, SEE_DOCS, None, MetricType::Counter)?;
            for (reason, value) in reasons {
                ConstCounter::new(*value).encode(family.encode_family(&[("reason", *reason)])?)?;
            }
        }
        for (name, help, value) in &self.gauges {
            let gauge = ConstGauge::new(*value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

/// The second number of statm is that of resident pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_figure_is_explained() {
        let sample = Sample {
            retained: Some(crate::replication::Retained {
                bytes: 1,
                safe_bytes: Some(-1),
                limit_bytes: Some(2),
            }),
            pending: Some(3),
        };
        let text = text(&Health::default(), sample).unwrap();
        let docs = include_str!("../../../docs/operations.md");
        for name in text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        {
            assert!(docs.contains(name), "{name} is not in docs/operations.md");
        }
        // Each reason, too.
        for line in text.lines() {
            let reason = line
                .split_once("reason=\"")
                .and_then(|(_, rest)| rest.split('"').next());
            assert!(
                reason.is_none_or(|reason| docs.contains(reason)),
                "{line} is not in docs/operations.md"
            );
        }
        assert!(
            text.contains("walmirror_captures_dropped_total{reason=\"changed\"} 0"),
            "{text}"
        );
        assert!(
            text.contains("walmirror_pending_keys 3") && text.ends_with("# EOF\n"),
            "{text}"
        );
    }
}
