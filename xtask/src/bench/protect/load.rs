//! The loads: who asks, for what, and what of it is reported.

use std::time::Duration;

use anyhow::{Context, Result};

use super::asking::{self, Question};
use super::{Better, Sample};
use crate::bench::clients::{self, Measured, RedisResult};

/// How long a load lasts, about.
const SECONDS: u32 = 3;
/// Requests to find out how many make [`SECONDS`], for each connection and for each request in flight.
const TRIAL: u64 = 100;
/// Most of those.
const TRIAL_MAX: u64 = 5_000;

/// A load.
pub(super) struct Load {
    /// Its name in the table.
    pub(super) name: &'static str,
    client: Client,
}

/// Who asks.
enum Client {
    /// redis-benchmark.
    Redis {
        /// A run before, that makes what is asked for.
        prepare: Option<&'static [&'static str]>,
        arguments: &'static [&'static str],
        /// Requests in flight.
        in_flight: u64,
    },
    /// wrk.
    Wrk {
        path: &'static str,
        connections: u32,
    },
    /// One client of our own.
    Asking(Question),
}

const fn redis(name: &'static str, arguments: &'static [&'static str], in_flight: u64) -> Load {
    Load {
        name,
        client: Client::Redis {
            prepare: None,
            arguments,
            in_flight,
        },
    }
}

const fn wrk(name: &'static str, path: &'static str, connections: u32) -> Load {
    Load {
        name,
        client: Client::Wrk { path, connections },
    }
}

const SET_1: Load = redis("SET, 1 client", &["-t", "set", "-c", "1"], 1);
const SET_50: Load = redis("SET, 50 clients", &["-t", "set", "-c", "50"], 50);
const GET_50: Load = redis("GET, 50 clients", &["-t", "get", "-c", "50"], 50);
const GET_PIPELINED: Load = redis(
    "GET, 50 clients, -P 16",
    &["-t", "get", "-c", "50", "-P", "16"],
    800,
);

/// On redis.
pub(super) const REDIS: &[Load] = &[
    SET_1,
    SET_50,
    GET_50,
    GET_PIPELINED,
    redis(
        "SET -r 1M -d 512, 50 clients",
        &["-t", "set", "-c", "50", "-r", "1000000", "-d", "512"],
        50,
    ),
    Load {
        name: "GET of 16 KiB, 10 clients",
        client: Client::Redis {
            prepare: Some(&["-t", "set", "-c", "1", "-d", "16384"]),
            arguments: &["-t", "get", "-c", "10", "-d", "16384"],
            in_flight: 10,
        },
    },
    Load {
        name: "TIME, 1 client",
        client: Client::Asking(Question {
            port: 6379,
            text: "TIME\r\n",
            // *2, and length and text of seconds and microseconds.
            lines: Some(5),
        }),
    },
];

/// On redis that makes each answer durable first.
pub(super) const DURABLE: &[Load] = &[SET_1, SET_50, GET_50];

/// On nginx.
pub(super) const NGINX: &[Load] = &[
    wrk("1 KiB, 50 clients", "/index.html", 50),
    Load {
        name: "1 KiB, new connection each, 1 client",
        client: Client::Asking(Question {
            port: 80,
            text: "GET /index.html HTTP/1.0\r\n\r\n",
            lines: None,
        }),
    },
];

/// On the `kv` guest.
pub(super) const KV: &[Load] = &[SET_1, SET_50, GET_50, GET_PIPELINED];

/// On the `http` guest.
pub(super) const HTTP: &[Load] = &[
    wrk("1 KiB, 1 client", "/size/1024", 1),
    wrk("1 KiB, 50 clients", "/size/1024", 50),
];

impl Load {
    /// Lets the client ask for [`SECONDS`] or so.
    pub(super) fn measure(&self) -> Result<Measured> {
        match &self.client {
            Client::Redis {
                prepare,
                arguments,
                in_flight,
            } => {
                if let Some(prepare) = prepare {
                    clients::redis_with(prepare, TRIAL)?;
                }
                measure_redis(arguments, *in_flight)
            }
            Client::Wrk { path, connections } => clients::wrk(path, *connections, SECONDS),
            Client::Asking(question) => asking::ask(question, Duration::from_secs(SECONDS.into())),
        }
    }
}

fn measure_redis(arguments: &[&str], in_flight: u64) -> Result<Measured> {
    let trial = only(clients::redis_with(
        arguments,
        (TRIAL * in_flight).min(TRIAL_MAX),
    )?)?;
    let requests = (trial.rate * f64::from(SECONDS)) as u64;
    let requests = requests.max(TRIAL);
    let result = only(clients::redis_with(arguments, requests)?)?;
    Ok(Measured {
        rate: result.rate,
        p50_ms: result.p50_ms,
        p99_ms: result.p99_ms,
        max_ms: result.max_ms,
        requests,
    })
}

fn only(results: Vec<RedisResult>) -> Result<RedisResult> {
    let first = results.into_iter().next();
    first.context("redis-benchmark reported nothing")
}

impl Measured {
    /// What is reported of a guest without protection, of whose rate the CPUs leave `bound` to a pair.
    pub(super) fn unprotected(&self, load: &Load, bound: f64) -> Vec<Sample> {
        let figures = [
            ("unprotected", "1/s", self.rate),
            ("what the CPUs let a pair keep", "", bound),
        ];
        let samples = figures.map(|(what, unit, value)| {
            let what = format!("{}, {what}", load.name);
            Sample::new(&what, unit, Better::Higher, value).over(self.requests)
        });
        samples.into()
    }

    /// What is reported of a guest under protection, beside what it did `alone`.
    pub(super) fn protected(&self, load: &Load, alone: Option<Self>, resyncs: u64) -> Vec<Sample> {
        let per_thousand = resyncs as f64 * 1e3 / self.requests.max(1) as f64;
        let kept = alone.map(|alone| ("kept", "", Better::Higher, self.rate / alone.rate));
        let figures = [
            ("protected", "1/s", Better::Higher, self.rate),
            ("protected p50", "ms", Better::Lower, self.p50_ms),
            ("protected p99", "ms", Better::Lower, self.p99_ms),
            ("protected max", "ms", Better::Lower, self.max_ms),
            ("resyncs per 1,000", "", Better::Lower, per_thousand),
        ];
        let all = kept.into_iter().chain(figures);
        all.map(|(what, unit, better, value)| {
            let what = format!("{}, {what}", load.name);
            Sample::new(&what, unit, better, value).over(self.requests)
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_of_a_server_have_names_of_their_own() {
        for loads in [REDIS, NGINX, KV, HTTP] {
            let mut names: Vec<_> = loads.iter().map(|load| load.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), loads.len());
        }
    }

    #[test]
    fn what_is_kept_is_a_share_of_what_was_without() {
        let measured = |rate| Measured {
            rate,
            p50_ms: 1.0,
            p99_ms: 2.0,
            max_ms: 3.0,
            requests: 2_000,
        };
        let samples = measured(800.0).protected(&SET_1, Some(measured(1_000.0)), 4);
        let value = |end: &str| {
            let found = samples.iter().find(|sample| sample.what.ends_with(end));
            found.map(|sample| sample.value)
        };
        assert_eq!(value("kept"), Some(0.8));
        assert_eq!(value("resyncs per 1,000"), Some(2.0));
        assert_eq!(measured(800.0).protected(&SET_1, None, 0).len(), 5);
    }
}
