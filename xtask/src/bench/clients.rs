//! Clients on the host, and what they report.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{netns, process};

/// Longest run of a client.
const RUN_MAX: Duration = Duration::from_secs(60);

/// What redis-benchmark says of one command.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RedisResult {
    /// `GET` or `SET`.
    pub(super) test: String,
    /// Requests per second.
    pub(super) rate: f64,
    /// Median latency in milliseconds.
    pub(super) p50_ms: f64,
    /// 99th percentile of the latency in milliseconds.
    pub(super) p99_ms: f64,
    /// Longest latency in milliseconds.
    pub(super) max_ms: f64,
}

/// Measures GET and SET with a number of connections and a depth of pipelining.
pub(super) fn redis(connections: u32, depth: u32, requests: u64) -> Result<Vec<RedisResult>> {
    let (connections, depth) = (connections.to_string(), depth.to_string());
    redis_with(
        &["-t", "set,get", "-c", &connections, "-P", &depth],
        requests,
    )
}

/// Measures by redis-benchmark what `arguments` say.
pub(super) fn redis_with(arguments: &[&str], requests: u64) -> Result<Vec<RedisResult>> {
    let mut command = process::command("redis-benchmark", ["-h", netns::GUEST, "--csv"]);
    command.args(["-n", &requests.to_string()]).args(arguments);
    let text = process::capture_within(&mut command, RUN_MAX)?;
    let results: Vec<RedisResult> = text.lines().filter_map(redis_line).collect();
    anyhow::ensure!(
        !results.is_empty(),
        "redis-benchmark reported nothing: {}",
        text.trim()
    );
    Ok(results)
}

/// A line of its CSV: test, rate, and latencies average, least, p50, p95, p99, most.
fn redis_line(line: &str) -> Option<RedisResult> {
    let fields: Vec<&str> = line
        .split(',')
        .map(|field| field.trim_matches('"'))
        .collect();
    Some(RedisResult {
        test: (*fields.first()?).to_owned(),
        rate: fields.get(1)?.parse().ok()?,
        p50_ms: fields.get(4)?.parse().ok()?,
        p99_ms: fields.get(6)?.parse().ok()?,
        max_ms: fields.get(7)?.parse().ok()?,
    })
}

/// What a client saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    /// Requests per second.
    pub(super) rate: f64,
    /// Median latency in milliseconds.
    pub(super) p50_ms: f64,
    /// 99th percentile of the latency in milliseconds.
    pub(super) p99_ms: f64,
    /// Longest latency in milliseconds.
    pub(super) max_ms: f64,
    /// Requests in all.
    pub(super) requests: u64,
}

/// Measures an HTTP page for some seconds.
pub(super) fn wrk(path: &str, connections: u32, seconds: u32) -> Result<Measured> {
    let text = process::capture_within(&mut wrk_command(path, connections, seconds), RUN_MAX)?;
    read_wrk(&text).with_context(|| format!("wrk reported nothing that can be read: {text}"))
}

fn wrk_command(path: &str, connections: u32, seconds: u32) -> Command {
    let mut command = process::command("wrk", ["--latency", "-t1"]);
    command
        .arg(format!("-c{connections}"))
        .arg(format!("-d{seconds}s"));
    command.arg(format!("http://{}{path}", netns::GUEST));
    command
}

fn read_wrk(text: &str) -> Option<Measured> {
    let after = |mark: &str| {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(mark))?;
        line.trim_start()
            .strip_prefix(mark)?
            .split_whitespace()
            .next()
    };
    let requests = text.lines().find(|line| line.contains(" requests in "))?;
    // Average, deviation, most. The heading of the percentiles begins with the same word.
    let of_thread = text
        .lines()
        .find(|line| line.trim_start().starts_with("Latency  "))?;
    Some(Measured {
        rate: after("Requests/sec:")?.parse().ok()?,
        p50_ms: milliseconds(after("50%")?)?,
        p99_ms: milliseconds(after("99%")?)?,
        max_ms: milliseconds(of_thread.split_whitespace().nth(3)?)?,
        requests: requests.split_whitespace().next()?.parse().ok()?,
    })
}

/// A time such as `870.00us`, `1.20ms` or `1.01s`.
fn milliseconds(text: &str) -> Option<f64> {
    let number_ends = text.find(|c: char| c.is_ascii_alphabetic())?;
    let value: f64 = text[..number_ends].parse().ok()?;
    match &text[number_ends..] {
        "us" => Some(value / 1000.0),
        "ms" => Some(value),
        "s" => Some(value * 1000.0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_redis_benchmark_is_read() {
        let line = r#""GET","19822.99","2.000","0.400","1.900","2.500","3.100","9.000""#;
        let result = redis_line(line).expect("a result");
        assert_eq!((result.test.as_str(), result.rate), ("GET", 19_822.99));
        assert_eq!(
            (result.p50_ms, result.p99_ms, result.max_ms),
            (1.9, 3.1, 9.0)
        );
        assert_eq!(redis_line(r#""test","rps","avg_latency_ms""#), None);
    }

    #[test]
    fn the_report_of_wrk_is_read() {
        let text = "Running 3s test @ http://10.99.0.2/\n  1 threads and 50 connections\n\
                    \x20   Latency     0.91ms  100.00us   7.21ms   90.12%\n\
                    \x20 Latency Distribution\n     50%  870.00us\n     99%    1.20ms\n\
                    \x20 16557 requests in 3.00s, 20.1MB read\nRequests/sec:  5519.00\n";
        let result = read_wrk(text).expect("a result");
        assert_eq!(
            result,
            Measured {
                rate: 5519.0,
                p50_ms: 0.87,
                p99_ms: 1.2,
                max_ms: 7.21,
                requests: 16_557
            }
        );
    }

    #[test]
    fn times_are_in_milliseconds() {
        assert_eq!(milliseconds("500.00us"), Some(0.5));
        assert_eq!(milliseconds("2.00s"), Some(2000.0));
        assert_eq!(milliseconds("2.00m"), None);
    }
}
