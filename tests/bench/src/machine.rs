//! What the figures were measured on: they mean nothing without it.

use std::process::Command;

use crate::bed::SETTINGS;

/// The machine, the versions, the settings: a line each.
pub fn describe() -> String {
    let pg = std::env::var("WALMIRROR_PG_BIN").unwrap_or_default();
    let walmirror = std::env::var("WALMIRROR_BIN").unwrap_or_default();
    let settings: Vec<&str> = SETTINGS.lines().filter(|line| !line.is_empty()).collect();
    [
        format!("machine: {}, {} cores, {}", cpu(), cores(), memory()),
        format!("kernel: {}", output("uname", &["-srm"])),
        format!("Postgres: {}", output(&format!("{pg}/postgres"), &["--version"])),
        format!("Redis: {}", output("redis-server", &["--version"])),
        format!("walmirror: {}", output(&walmirror, &["--version"])),
        format!("Postgres settings: {}", settings.join(", ")),
        "Redis settings: no save, no appendonly, one server per contestant's run".to_owned(),
    ]
    .join("\n")
}

fn output(program: &str, args: &[&str]) -> String {
    let result = Command::new(program).args(args).output();
    result.map_or_else(
        |e| format!("{program}: {e}"),
        |o| String::from_utf8_lossy(&o.stdout).trim().to_owned(),
    )
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name"));
    model
        .unwrap_or("unknown CPU")
        .trim_start_matches(['\t', ' ', ':'])
        .to_owned()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn memory() -> String {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = kib
        .and_then(|text| text.split_whitespace().next())
        .and_then(|n| n.parse::<f64>().ok());
    format!("{:.0} GB", kib.unwrap_or(0.0) / 1048576.0)
}
