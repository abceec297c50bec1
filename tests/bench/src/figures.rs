//! The figures of a case: samples of every contestant, the table that is printed, and the JSON.

use std::fmt;
use std::fs;

use serde_json::{Map, Value, json};

use crate::options::Options;
use crate::plot;

/// A figure that contestants are measured by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// The name in the table and in the JSON, with its unit.
    pub name: &'static str,
    /// Digits after the point.
    pub digits: usize,
}

pub const RATE: Metric = Metric {
    name: "rows/s",
    digits: 0,
};
pub const BYTES: Metric = Metric {
    name: "bytes/row",
    digits: 1,
};
pub const WALSENDER_CPU: Metric = Metric {
    name: "walsender µs/row",
    digits: 2,
};
pub const WALSENDER_MEMORY: Metric = Metric {
    name: "walsender MiB",
    digits: 1,
};

/// A contestant and what was measured of it.
pub struct Contestant {
    /// Its name.
    pub name: String,
    /// Why there are no figures.
    pub skipped: Option<String>,
    samples: Vec<(Metric, Vec<f64>)>,
}

impl Contestant {
    /// Nothing measured yet.
    pub fn new(name: &str) -> Contestant {
        Contestant {
            name: name.to_owned(),
            skipped: None,
            samples: Vec::new(),
        }
    }

    /// A contestant that cannot take part.
    pub fn skipped(name: &str, why: &str) -> Contestant {
        Contestant {
            skipped: Some(why.to_owned()),
            ..Contestant::new(name)
        }
    }

    /// Adds the result of a round.
    pub fn add(&mut self, metric: Metric, value: f64) {
        match self.samples.iter_mut().find(|(m, _)| *m == metric) {
            Some((_, values)) => values.push(value),
            None => self.samples.push((metric, vec![value])),
        }
    }

    /// What was measured, in the order of the rounds.
    pub fn rounds(&self, metric: Metric) -> &[f64] {
        let found = self.samples.iter().find(|(m, _)| *m == metric);
        found.map_or(&[], |(_, values)| values)
    }

    /// What was measured, sorted.
    pub fn sorted(&self, metric: Metric) -> Option<Vec<f64>> {
        let (_, values) = self.samples.iter().find(|(m, _)| *m == metric)?;
        let mut values = values.clone();
        values.sort_by(f64::total_cmp);
        Some(values)
    }

    /// The median.
    pub fn median(&self, metric: Metric) -> Option<f64> {
        self.sorted(metric).map(|values| median(&values))
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    }
}

/// A target of the project, and what was measured.
pub struct Goal {
    /// What is measured.
    pub what: String,
    /// The bound, as people write it.
    pub target: String,
    /// The figure.
    pub measured: String,
    /// Whether it is good enough.
    pub met: bool,
}

impl Goal {
    /// A figure that should be at least so much.
    pub fn at_least(what: &str, target: f64, unit: &str, measured: f64) -> Goal {
        Goal {
            what: what.to_owned(),
            target: format!("≥ {target}{unit}"),
            measured: format!("{measured:.2}{unit}"),
            met: measured >= target,
        }
    }

    /// A figure that should be at most so much.
    pub fn at_most(what: &str, target: f64, unit: &str, measured: f64) -> Goal {
        Goal {
            what: what.to_owned(),
            target: format!("≤ {target}{unit}"),
            measured: format!("{measured:.2}{unit}"),
            met: measured <= target,
        }
    }
}

/// The result of one workload.
pub struct Outcome {
    /// The name of its files.
    pub name: String,
    /// What was done.
    pub title: String,
    /// How the outputs were compared.
    pub compared: String,
    /// The figure that decides; the first contestant is what the others are set against.
    pub headline: Metric,
    /// Who took part.
    pub contestants: Vec<Contestant>,
    /// Targets.
    pub goals: Vec<Goal>,
}

impl Outcome {
    /// A contestant by name.
    pub fn find(&self, name: &str) -> Option<&Contestant> {
        self.contestants
            .iter()
            .find(|c| c.name == name && c.skipped.is_none())
    }

    /// The first contestant's median over another one's.
    pub fn ratio(&self, name: &str, metric: Metric) -> Option<f64> {
        Some(self.contestants.first()?.median(metric)? / self.find(name)?.median(metric)?)
    }

    /// Writes the JSON and the plot.
    pub fn save(&self, options: &Options, machine: &str) {
        let write = |extension: &str, text: String| {
            let file = options.out.join(format!("{}.{extension}", self.name));
            fs::write(&file, text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        };
        write("json", format!("{:#}\n", self.json(options, machine)));
        write("svg", plot::bars(self));
    }

    fn json(&self, options: &Options, machine: &str) -> Value {
        let contestants = self.contestants.iter().map(|c| {
            let mut object = Map::new();
            object.insert("name".into(), json!(c.name));
            if let Some(why) = &c.skipped {
                object.insert("skipped".into(), json!(why));
            }
            for (metric, values) in &c.samples {
                let median = c.median(*metric);
                object.insert(metric.name.into(), json!({ "median": median, "rounds": values }));
            }
            Value::Object(object)
        });
        let goals = self
            .goals
            .iter()
            .map(|g| json!({ "what": g.what, "target": g.target, "measured": g.measured, "met": g.met }));
        json!({
            "name": self.name,
            "title": self.title,
            "compared": self.compared,
            "quick": options.quick,
            "rounds": options.rounds,
            "machine": machine.lines().collect::<Vec<_>>(),
            "contestants": contestants.collect::<Vec<_>>(),
            "targets": goals.collect::<Vec<_>>(),
        })
    }

    /// The metrics that anybody was measured by, in the order of their first appearance.
    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![self.headline];
        for (metric, _) in self.contestants.iter().flat_map(|c| &c.samples) {
            if !metrics.contains(metric) {
                metrics.push(*metric);
            }
        }
        metrics
    }

    fn lines(&self) -> Vec<Vec<String>> {
        let metrics = self.metrics();
        let mut heading = vec![self.title.clone()];
        for metric in &metrics {
            heading.push(metric.name.to_owned());
            if *metric == self.headline {
                heading.extend(["min – max".to_owned(), "ratio".to_owned()]);
            }
        }
        let base = self.contestants.first().and_then(|c| c.median(self.headline));
        let mut lines = vec![heading];
        for contestant in &self.contestants {
            let mut line = vec![contestant.name.clone()];
            if let Some(why) = &contestant.skipped {
                line.push(format!("skipped: {why}"));
            }
            for metric in metrics.iter().filter(|_| contestant.skipped.is_none()) {
                let values = contestant.sorted(*metric);
                let show = |value: f64| number(value, metric.digits);
                line.push(values.as_deref().map_or("–".to_owned(), |v| show(median(v))));
                if *metric == self.headline {
                    let ends = values.as_ref().and_then(|v| Some((v.first()?, v.last()?)));
                    line.push(ends.map_or("–".to_owned(), |(&a, &b)| format!("{} – {}", show(a), show(b))));
                    let ratio = values.as_deref().and_then(|v| Some(median(v) / base?));
                    line.push(ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}×")));
                }
            }
            lines.push(line);
        }
        lines
    }
}

/// The tables are Markdown, so that docs/benchmarks.md shows what the tool printed.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        write_table(f, &lines)?;
        writeln!(f, "\n{}", self.compared)?;
        if !self.goals.is_empty() {
            let mut goals = vec![["target", "bound", "measured", ""].map(str::to_owned).to_vec()];
            for goal in &self.goals {
                let verdict = if goal.met { "met" } else { "**missed**" };
                goals.push(vec![
                    goal.what.clone(),
                    goal.target.clone(),
                    goal.measured.clone(),
                    verdict.to_owned(),
                ]);
            }
            writeln!(f)?;
            write_table(f, &goals)?;
        }
        Ok(())
    }
}

fn write_table(f: &mut fmt::Formatter<'_>, lines: &[Vec<String>]) -> fmt::Result {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |line: &Vec<String>, i: usize| line.get(i).cloned().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            lines
                .iter()
                .map(|line| cell(line, i).chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    for (number, line) in lines.iter().enumerate() {
        for (i, &width) in widths.iter().enumerate() {
            let text = cell(line, i);
            // Names to the left, figures to the right.
            if i == 0 {
                write!(f, "| {text:<width$} ")?
            } else {
                write!(f, "| {text:>width$} ")?
            }
        }
        writeln!(f, "|")?;
        if number == 0 {
            for (i, &width) in widths.iter().enumerate() {
                let (left, right) = if i == 0 { ("", "-") } else { ("", ":") };
                write!(f, "|{left}{}{right}", "-".repeat(width + 1))?;
            }
            writeln!(f, "|")?;
        }
    }
    Ok(())
}

/// 1234567.8 as 1 234 568.
pub fn number(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, fraction) = text.split_once('.').map_or((text.as_str(), ""), |(w, f)| (w, f));
    let mut out = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 && digit.is_ascii_digit() && !out.ends_with('-') {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    if fraction.is_empty() {
        out
    } else {
        format!("{out}.{fraction}")
    }
}
